"""Gradient buffers, optimizers, schedules and gradient statistics, one set for each part of the model that learns."""
