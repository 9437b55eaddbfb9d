"""Watching runs while they train: their metrics.jsonl is followed, and shown on a local page or on the terminal."""
