"""Runs ranks that need not exist, without memory, and records what is alive and what is computed."""
