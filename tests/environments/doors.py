"""An environment of tests with two doors: it shows a picture after each of the first answers, and judges letters."""

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
