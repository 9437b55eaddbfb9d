"""Reward models and alignment with preferences."""
