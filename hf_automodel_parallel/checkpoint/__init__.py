"""Training checkpoints: complete or marked as incomplete, loaded on any mesh, without running code from a file.

On disk a checkpoint has the files that Accelerate and the Trainer write: ``pytorch_model_fsdp_0/`` and ``optimizer_0/``
in the format of torch.distributed.checkpoint (DCP), or ``pytorch_model_fsdp.bin`` and ``optimizer.bin``; scheduler,
random states, ``trainer_state.json``. So their tools and torch's can read it. ``checkpoint_manifest.json`` is written
last. A directory with a manifest is complete; one with ``checkpoint_incomplete.json`` instead is not.

To read one without a process group and without the mesh it was saved on:

* :func:`.manifest.read_manifest`, :func:`.manifest.verify`: its files, their sizes and checksums.
* :func:`.reader.read_metadata`: names, shapes, dtypes and chunks of a DCP directory, from a restricted unpickler.
  Tensors of the model are called ``model.<name>``, with the names of ``model.state_dict()`` (of a PEFT model those of
  its wrapper); states of the optimizer ``optimizer.state.<parameter>.<key>``. ``planner_data`` holds the path of each
  key.
* :class:`.reader.SafeFileSystemReader` and :class:`.reader.SafeLoadPlanner` for
  ``torch.distributed.checkpoint.load(flat_state, storage_reader=..., planner=..., no_dist=True)``: the flat state (key
  -> tensor to fill) may hold any selection of the keys, and a :class:`.shards.LocalShard` may stand for some chunks of
  a tensor.
* :func:`.files.load_plain`: the single files, with ``weights_only``.
"""
