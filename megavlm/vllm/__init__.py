"""vLLM as an engine: servers in an environment of their own, and what the trainer says to them."""
