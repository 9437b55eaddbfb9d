"""Alignment: losses on preferences, and the trainers that minimise them."""
