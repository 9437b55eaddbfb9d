"""Gradient buffers, optimizers, schedules and gradient statistics, one set for each trainable part of the model."""
