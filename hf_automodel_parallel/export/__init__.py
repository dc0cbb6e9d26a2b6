"""Files of a Hugging Face model, one tensor at a time: from sharded models and from training checkpoints.

No rank holds more than its shard and the tensors that are being written. What the files look like is decided by the
libraries' own code (tied weights, weight conversions, splitting, adapters), which runs on tensors without values.
"""
