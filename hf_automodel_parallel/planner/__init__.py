"""What a run costs before there is one: the real ``prepare`` and step on simulated ranks, and what follows from it."""
