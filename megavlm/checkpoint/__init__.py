"""Checkpoints: written in the background, restored in any layout, kept and published."""
