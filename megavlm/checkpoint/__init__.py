"""Checkpoints: writing in the background, restoring in any layout, and the folder that contains them."""
