"""Measures steps of a configuration, and single operators, on this machine."""
