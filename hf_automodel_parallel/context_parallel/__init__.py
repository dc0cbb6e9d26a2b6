"""Context parallelism: one sequence spread over the ranks of the ``cp`` axis, attention over all of it."""
