"""What all commands that run the model share: the session, rows, forward passes and generation."""
