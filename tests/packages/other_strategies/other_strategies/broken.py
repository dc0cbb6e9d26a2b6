"""An installed package whose module cannot be imported."""

raise ImportError("no such accelerator library")
