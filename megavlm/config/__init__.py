"""Settings: every default, range and explanation, and the files they are read from."""
