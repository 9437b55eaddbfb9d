"""Rewards that misbehave as the answers say, and one that is well written."""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def obey(completions, **columns):
    values = []
    for text in completions:
        match text:
            case "raise":
                raise RuntimeError("the judge is out")
            case "exit":
                os._exit(3)
            case "system exit":
                sys.exit("enough")
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                ctypes.string_at(0)
            case "sleep":
                time.sleep(600)
        values.append(
            {"nan": float("nan"), "infinity": float("inf"), "text": "1", "none": None, "lambda": obey}.get(text, 1.0)
        )
    if "short" in completions:
        return values[:-1]
    return {"text instead": "111", "number instead": 1.0}.get(completions[0], values)


async def lengths(completions, prompts, answer):
    """Only some of the columns, awaited together."""

    async def one(text, prompt, right):
        await asyncio.sleep(0.001)
        return len(text) + len(prompt) + right

    return await asyncio.gather(*map(one, completions, prompts, answer))


def process_id(completions, **columns):
    return [os.getpid()] * len(completions)


def waits_for(completions, sign, **columns):
    """Writes its process id into the folder and waits until it may go on."""
    folder = Path(sign[0])
    (folder / str(os.getpid())).touch()
    while not (folder / "go").exists():
        time.sleep(0.01)
    return [1.0] * len(completions)


def child(completions, **columns):
    """Starts a process that outlives the call."""
    return [subprocess.Popen(["sleep", "600"]).pid for _ in completions]
