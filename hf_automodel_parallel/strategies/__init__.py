"""Strategies: the steps that parallelise a model, in their order, for models in general and for each family."""
