"""Conversations as the model's chat template writes them, and where the answers stand in its output."""
