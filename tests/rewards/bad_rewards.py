"""Rewards that misbehave as the answers say, and one that is well written."""

import asyncio
import ctypes
import os
import subprocess
import sys
import time


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


def child(completions, **columns):
    """Starts a process that outlives the call."""
    return [subprocess.Popen(["sleep", "600"]).pid for _ in completions]
