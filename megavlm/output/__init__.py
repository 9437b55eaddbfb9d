"""The output folder of a run: its lock, its inputs, and how a start continues what is there."""
