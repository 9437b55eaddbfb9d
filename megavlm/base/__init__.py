"""Helpers that every folder may use: errors for users, atomic files, child processes, number formats. No torch."""
