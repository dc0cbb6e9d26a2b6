"""Writes Hugging Face files one tensor at a time, from sharded models and from training checkpoints.

No rank holds more than its shards and the tensors that are being written. transformers' and PEFT's own code decides the
content of the files (tied weights, weight conversions, splitting, adapters); it runs on meta tensors.
"""
