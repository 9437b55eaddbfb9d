"""What a configuration would do, without doing it."""
