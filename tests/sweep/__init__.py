"""Every causal language model of the installed transformers, tiny, against one process."""
