"""An environment of tests with two doors: it shows a picture after each of the first answers, and judges letters."""

import os
import time

import numpy as np


class Doors:
    """Its pictures and its end depend on what was said, and on how often."""

    def reset(self, **record):
        self.said = []

    def step(self, answer):
        self.said.append(answer)
        letters = sum(map(ord, answer))
        picture = np.full((32 * len(self.said), 64, 3), letters % 256, np.uint8)
        done = len(self.said) == 2 + (len(answer) > 2)
        return {"text": f"Door {letters % 3}?", "pictures": [picture], "reward": letters % 11 / 10, "done": done}


class SlowDoors(Doors):
    """Takes its time, and writes down when each of its calls begins and ends, and in which process."""

    def __init__(self, log):
        self.log = log

    def reset(self, seed, **record):
        self.seed = seed
        super().reset()

    def step(self, answer):
        name = f"{self.seed}/{'/'.join([*self.said, answer])!r}"
        self.note("begin", name)
        time.sleep(0.2)
        found = super().step(answer)
        self.note("end", name)
        return found

    def note(self, what, name):
        with open(self.log, "a") as file:
            file.write(f"{os.getpid()} {what} {name}\n")
