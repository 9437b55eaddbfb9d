"""Samples and pictures that data sources contain more than once, also with small changes."""
