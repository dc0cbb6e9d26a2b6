"""``python -m hf_automodel_parallel.launch``: see :mod:`hf_automodel_parallel.integrations.launch`."""

from .integrations.launch import main

if __name__ == "__main__":
    main()
