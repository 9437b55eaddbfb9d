"""Whether a model, its rows and the settings for speed fit a parallel layout: what has to be divisible by what."""
