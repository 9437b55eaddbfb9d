"""Looks for the fastest parallel layout of a number of GPUs."""
