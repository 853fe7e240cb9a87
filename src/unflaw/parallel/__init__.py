"""Training by several processes or GPUs."""
