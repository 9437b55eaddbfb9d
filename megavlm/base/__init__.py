"""What every room may use: errors for users, atomic files, child processes, number formats. It imports no torch."""
