"""Where this package meets Accelerate, the Trainer and the launcher."""
