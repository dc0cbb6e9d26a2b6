"""What the tests of this package share: a pool of worker processes, tiny models, a one-process oracle, comparers."""
