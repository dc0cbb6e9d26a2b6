"""The flow for one model family: which steps are taken, in which order."""
