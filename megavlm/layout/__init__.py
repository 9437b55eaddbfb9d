"""A parallel layout: what has to be divisible by what, which rank has which tokens, and which encodes which frame."""
