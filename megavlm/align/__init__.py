"""Alignment: the losses of preference methods, and the training methods that use them."""
