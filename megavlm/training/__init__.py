"""The training step and loop, and what a run shows and writes."""
