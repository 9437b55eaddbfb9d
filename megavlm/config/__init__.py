"""Settings: defaults, ranges and descriptions, and the files that they are read from."""
