"""The model at work on this rank, whatever the command: session, rows, forward passes, generation."""
