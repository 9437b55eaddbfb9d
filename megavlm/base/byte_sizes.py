"""Numbers of bytes as people write them on a command line."""

import re

from megavlm.base.errors import UserError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def parse_size(text: str) -> int:
    """The number of bytes given as "500MB", "2GiB" or "64k". Raises UserError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?|)b?", text.strip().lower())
    size = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if size < 1:
        raise UserError(f"--shard-size is {text!r}; allowed: a size such as 500MB or 2GiB")
    return size
