"""Everything is in pyproject.toml, besides one step: wheels hold launch configs and examples, inside of the package."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithExamples(build_py):
    """Also copies ``accelerate_configs`` and ``examples``, which a clone has beside the package."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("accelerate_configs", "examples"):
            target = Path(self.build_lib) / "hf_automodel_parallel" / folder
            shutil.copytree(folder, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithExamples})
