"""Environments of tests: one that does what it is told, and one whose methods are coroutines."""

import asyncio
import io
import os
import signal
import time

import numpy as np
from PIL import Image


def picture(level: int) -> Image.Image:
    return Image.fromarray(np.full((32, 32, 3), level, np.uint8))


class Counter:
    """Counts its answers, and does what a record or an answer says."""

    def __init__(self, start: int = 0, log: str | None = None):
        self.count, self.log = start, log

    def reset(self, what="", seed=0, **record):
        self.what, self.seed = what, seed
        if what == "raise at reset":
            raise KeyError("no such door")
        if what == "first":
            return {"text": "Welcome.", "pictures": [picture(9)]}
        if what == "nonsense at reset":
            return {"text": "Welcome.", "reward": 1.0}
        if what == "hang at reset":
            time.sleep(600)

    def step(self, answer):
        self.count += 1
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"{os.getpid()} {self.what} {self.count} {answer}\n")
        what = self.what if self.what != "obey" else answer
        if what == "raise":
            raise RuntimeError("the door is stuck")
        if what == "exit":
            os._exit(3)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "leave":
            raise SystemExit("enough")
        if what == "hang":
            time.sleep(600)
        if what == "wait":
            time.sleep(0.3)
        if what == "await":
            return asyncio.sleep(1)
        file = io.BytesIO()
        picture(5).save(file, "PNG")
        odd = {
            "none": None,
            "text": ("hm", [], "1", False),
            "nan": ("hm", [], float("nan"), False),
            "field": {"txt": "a"},
            "done": {"text": "", "done": "yes"},
            "number": 7,
            "a list": {"pictures": "ab"},
            "array": {"pictures": [[3]]},
            "floats": {"pictures": [np.zeros((3, 3))]},
            "no file": {"pictures": ["nowhere.png"]},
            "pictures": {"pictures": [picture(1), np.full((8, 8), 2, np.uint8), file.getvalue(), "on_disk.png"]},
            "stop": ("over", (), 1, True),
            "broken": {"pictures": [b"broken"]},
        }
        if what in odd:
            return odd[what]
        return f"{self.count} {self.seed}", [], 0.25, False

    def close(self):
        if self.log:
            with open(self.log, "a") as file:
                file.write(f"closed {self.what}\n")


class Together:
    """Waits without keeping others from working."""

    async def reset(self, what=""):
        self.what, self.count = what, 0

    async def step(self, answer):
        self.count += 1
        if self.what == "hang":
            await asyncio.sleep(600)
        if self.what == "block" and self.count == 2:
            time.sleep(600)
        if self.what == "raise":
            raise ValueError("no")
        await asyncio.sleep(0.4)
        return f"{self.count} {answer}", [], 1.0, self.count == 2

    async def close(self):
        await asyncio.sleep(0)


def made(start=5):
    return Counter(start)


def made_together():
    return Together()


class NoStep:
    def reset(self):
        return None
