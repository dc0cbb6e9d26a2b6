"""``python -m hf_automodel_parallel.launch``: see :mod:`hf_automodel_parallel.accelerate_plugin.launcher`."""

from .accelerate_plugin.launcher import main

if __name__ == "__main__":
    main()
