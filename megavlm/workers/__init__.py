"""Processes that read and render samples: starting them, their memory, and samples that kill them."""
