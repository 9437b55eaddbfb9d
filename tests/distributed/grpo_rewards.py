"""Rewards of tests: one that gives the answers of a toy, which are no words, some order; and one that misbehaves."""

import os
import time


def letters(completions, **columns):
    """A number from 0 to 1 that depends on the letters, so that answers differ."""
    return [sum(map(ord, text)) % 11 / 10 for text in completions]


def troublesome(completions, trouble, **columns):
    """What the record asks for."""
    kind = trouble[0]
    if kind == "raises":
        raise ValueError("no reward today")
    if kind == "hangs":
        time.sleep(60)
    if kind == "dies":
        os._exit(3)
    values = {"is not a number": float("nan"), "is a string": "good", "does not apply": None, "is equal": 0.9}
    values |= {"is right": 1.0, "is wrong": 0.0}
    if kind in values:
        return [values[kind]] * len(completions)
    return letters(completions)
