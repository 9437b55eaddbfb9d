"""Which fields of the records rewards need, so that their absence is told before a run and not by every answer."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from megavlm.base.errors import UserError
from megavlm.config.reward_section import RewardSettings
from megavlm.rewards.texts import accepted


def missing_fields(rewards: Sequence[RewardSettings], record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(reward, field) for each field that a reward needs and that a record lacks, or whose value it cannot use.

    A function in a Python file needs the columns for which it has parameters without a default. A file that cannot be
    read, or in which the function is not simply defined, is passed over.
    """
    found = []
    for reward in rewards:
        if "field" in reward.options:
            if not _has_answer(record, reward.options["field"]):
                found.append((reward.key, reward.options["field"]))
        elif reward.python is not None:
            given = {*record, "completions", "prompts"}
            if _has_answer(record, "answer"):
                given.add("answer")
            found += [(reward.key, name) for name in _parameters(reward) if name not in given]
    return found


def _has_answer(record: Mapping[str, Any], field: str) -> bool:
    columns = {name: [value] for name, value in record.items()}
    try:
        return accepted(columns, field, 1) != [None]
    except UserError:
        return False


def _parameters(reward: RewardSettings) -> list[str]:
    """The parameters of the function that must be given, without the first, which gets the completions."""
    try:
        module = ast.parse(reward.file.read_text(encoding="utf-8")) if reward.file is not None else ast.Module([], [])
    except (OSError, ValueError, SyntaxError):
        return []
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == reward.function:
            arguments = node.args
            positional = [*arguments.posonlyargs, *arguments.args]
            needed = positional[1 : len(positional) - len(arguments.defaults)]
            pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
            needed += [argument for argument, default in pairs if default is None]
            return [argument.arg for argument in needed]
    return []
