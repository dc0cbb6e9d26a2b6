"""Speed, memory and traffic, side by side with other implementations: ``python -m benchmarks.run --help``.

A suite measures and writes result files (:mod:`benchmarks.recorder`); ``python -m benchmarks.report`` makes
``docs/benchmarks.md`` of them.
"""
