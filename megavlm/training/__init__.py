"""The training step, the training loop, and the methods and objectives of training."""
