"""Loss parallelism: logits that stay sharded over the vocabulary, and losses that work on the shards.

With a vocabulary of 128k tokens the logits are the largest activation of a model. The output projection is column-wise,
so each tp rank computes the logits of its vocabulary slice, and here they are never gathered unless an operation needs
them all.

* :mod:`.logits`: the projection's hook returns a :class:`~.logits.ShardedLogits`, a tensor subclass with the full shape
  with this rank's shard. So the model's own loss, soft-capping and scaling run unchanged.
  ``__torch_function__`` looks each torch function up in the table ``HANDLERS``. A handler works on the shard, or
  returns NotImplemented where its arguments do not allow that. Then, and without a handler, the logits are gathered
  once and the function gets plain tensors: right for every function, but not sharded.
* :mod:`.elementwise`: handlers for gradients, element-wise functions, and views of the leading dimensions.
* :mod:`.reductions`: handlers for functions over the vocabulary (cross entropy, log_softmax, gather, sum).
* :mod:`.cross_entropy`: their arithmetic on plain shards, without the tensor subclass.
* :mod:`.token_statistics`: log-probabilities, entropy and more with the projection in it, chunk by chunk.
* :mod:`.fused_head`: lets TRL's fused head use it, which reads the head's weight and never calls the head.

The two handler modules fill the table when they are imported, which this file does. They import ``logits``, never the
other way round.
"""

from . import elementwise, reductions  # noqa: F401  they fill HANDLERS
