"""Files of a Hugging Face model from shards, one tensor at a time: on live models and from training checkpoints.

No rank ever holds more of the model than what is being written, and nothing in here decides what the files look like:
the libraries' own code does (tied weights, weight conversions, splitting, adapters), run on tensors without values.
"""
