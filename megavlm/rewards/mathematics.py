r"""The reward math: whether the result of an answer equals that of the record as a number or formula (math-verify).

math-verify's own time limits use a signal, which works only in the main thread and not within long operations on large
numbers. Here they are off: the pool kills the process. Memory is limited, because 9^{9^{9^9}} needs more than there is.
"""

import contextlib
import functools
import logging
import os
import re
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.rewards.functions import Reward
from megavlm.rewards.texts import accepted, final_part, last_box, normalised

_LONGEST = 400  # characters of a result; math-verify takes 20 seconds for a text of 20,000 numbers
_DEEPEST = 20  # brackets within each other; it takes 14 seconds for 400
_MEMORY = 2 * 2**30  # bytes that the comparisons of a group may take
_SAID = re.compile(r"\b(?:answer|result)\b(?:\s+is\b)?[\s:=*]*|####", re.IGNORECASE)  # #### as in GSM8K
_PROSE = re.compile(r"(?<!\\)\b[^\W\d_]{2,}|\d\s+\d")  # two letters that are no command, or a row of numbers
_WORDS = re.compile(r"[^\W\d_]{2,}(?:[\s-]+[^\W\d_]+)*")
_TEXT = re.compile(r"\\(?:text|mathrm|textbf)\{([^{}]*)\}")
_SCIENTIFIC = re.compile(r"(?<![\w.])(-?\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w)")  # LaTeX would read 1e3 as 1·e·3


def math(*, field: str, decimals: int) -> Reward:
    """1 if the result of an answer equals a right answer, otherwise 0. `result_of` says what the result is.

    Args:
        field: the column with the right answers.
        decimals: decimal places to which numbers are rounded before comparison.
    """
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off
    from math_verify import parse, verify  # loads sympy, which takes a second or two

    parsed = functools.partial(parse, parsing_timeout=None)
    parsed_right = functools.lru_cache(maxsize=256)(parsed)  # answers are not kept: they may be enormous numbers

    def is_equal(result: str, right: str) -> bool:
        if _WORDS.fullmatch(word := _plain(right)):  # a word is no product of letters: "act" is not "cat"
            return normalised(_plain(result)) == normalised(word)
        if not (wanted := parsed_right(_marked(right))):
            raise UserError(f"the answer {quoted(right)} of the record is neither a number nor a formula")
        return _is_readable(result) and verify(wanted, parsed(_marked(result)), decimals, timeout_seconds=None)

    def judge(completions: list[str], **columns: list[Any]) -> list[float | None]:
        right = accepted(columns, field, len(completions))
        with _limited_memory():
            return [
                None if answers is None else float(any(is_equal(result_of(text), result_of(a)) for a in answers))
                for text, answers in zip(completions, right, strict=True)
            ]

    is_equal("2", "1")  # the first comparison loads more; nothing of this counts against the first group
    return judge


def result_of(text: str) -> str:
    r"""The result that an answer states.

    It is the content of its last \boxed{…}; otherwise what follows "answer is", "answer:" or "####" on its last line;
    otherwise that line. In a line of prose the last number counts.
    """
    part = final_part(text)
    box = last_box(part)
    if box is not None:
        return box
    lines = part[-_LONGEST:].rstrip().rpartition("\n")[2]
    return _SAID.split(lines)[-1].strip(" .*$")


def _is_readable(result: str) -> bool:
    """Whether math-verify can read a result in reasonable time. What it cannot read is equal to nothing."""
    depth = deepest = 0
    for character in result:
        depth += (character in "([{") - (character in ")]}")
        deepest = max(deepest, depth)
    return len(result) <= _LONGEST and deepest <= _DEEPEST


def _marked(result: str) -> str:
    """A result as math-verify expects it: a formula in a box, prose as it is."""
    if _PROSE.search(_TEXT.sub("", result)):
        return result
    return rf"\boxed{{{_SCIENTIFIC.sub(r'\1 \\cdot 10^{\2}', result)}}}"


def _plain(result: str) -> str:
    return _TEXT.sub(r"\1", result).strip(" .$")


@contextlib.contextmanager
def _limited_memory() -> Iterator[None]:
    """Allocations beyond the limit raise MemoryError, instead of having the kernel kill some process of the job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    limits = [used + _MEMORY, *(limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
