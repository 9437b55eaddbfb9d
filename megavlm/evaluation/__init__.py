"""Evaluation while training: held-out rows, their loss, and the hook that the training loop calls."""
