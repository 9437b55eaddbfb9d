"""How evenly a mixture of experts shares its tokens: fields of metrics.jsonl, and a file with every layer and expert.

``expert_load.json`` has the tokens of the newest logged step: ``step``, ``layers`` (their numbers, from 1) and
``tokens``, for each of these layers the tokens that went to each expert. The report draws it.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from megavlm.base.atomic_files import write_text

FILE_NAME = "expert_load.json"
_PAUSE = 10.0  # seconds between two versions of the file: it has a number for each expert of each layer
_GROUPS = ("early", "middle", "late")


@dataclass(frozen=True)
class ExpertTotals:
    """What the routers did with the global batch of a step.

    Attributes:
        layers: the numbers of the layers with experts, from 1.
        tokens: for each of them, how many tokens went to each expert, without padding.
        balancing, z: for each of them, the balancing loss and the z-loss before their weights, as means over the rows;
            None if they are not computed.
    """

    layers: Sequence[int]
    tokens: Sequence[Sequence[int]]
    balancing: Sequence[float] | None = None
    z: Sequence[float] | None = None


def loads(tokens: Sequence[int]) -> list[float]:
    """The loads of a layer's experts relative to an even load, so that their mean is 1; all 0 without tokens."""
    even = sum(tokens) / len(tokens)
    return [count / even if even else 0.0 for count in tokens]


def evenness(tokens: Sequence[int]) -> float | None:
    """The entropy of a layer's loads over its maximum: 1 if all experts have the same load, 0 if one has all."""
    total = sum(tokens)
    if not total or len(tokens) < 2:
        return None
    shares = [count / total for count in tokens if count]
    return max(0.0, -sum(share * math.log(share) for share in shares)) / math.log(len(tokens))


def expert_fields(totals: ExpertTotals | None) -> dict[str, float | None]:
    """The fields of metrics.jsonl (see ``monitor.metrics``); {} without totals."""
    if totals is None:
        return {}
    by_layer = [loads(tokens) for tokens in totals.tokens]
    fields = _of_thirds("experts/load_max", [max(layer) for layer in by_layer], max)
    fields |= _of_thirds("experts/load_min", [min(layer) for layer in by_layer], min)
    means = {
        "entropy": [evenness(tokens) for tokens in totals.tokens],
        "aux_loss": totals.balancing,
        "z_loss": totals.z,
    }
    for name, values in means.items():
        if values is not None:
            fields |= _of_thirds(f"experts/{name}", values, mean)
    return fields


def _of_thirds(
    name: str, values: Sequence[float | None], of: Callable[[Sequence[float]], float]
) -> dict[str, float | None]:
    """The mean, or what ``of`` gives, of the values of all layers and, if there are at least three, of their thirds."""
    parts = {name: values}
    if len(values) >= len(_GROUPS):
        cuts = [round(len(values) * i / len(_GROUPS)) for i in range(len(_GROUPS) + 1)]
        parts |= {f"{name}/{group}": values[cuts[i] : cuts[i + 1]] for i, group in enumerate(_GROUPS)}
    known = {key: [value for value in part if value is not None] for key, part in parts.items()}
    return {key: of(part) if part else None for key, part in known.items()}


class ExpertLoadFile:
    """Writes expert_load.json, at most once in ten seconds and at the end; nothing without experts."""

    def __init__(self, output: Path) -> None:
        self._path, self._waiting, self._written = output / FILE_NAME, "", -math.inf

    def put(self, step: int, totals: ExpertTotals | None) -> None:
        """Takes the totals of a step, on rank 0."""
        if totals is None:
            return
        self._waiting = json.dumps({"step": step, "layers": list(totals.layers), "tokens": list(totals.tokens)})
        if time.monotonic() - self._written >= _PAUSE:
            self.flush()

    def flush(self) -> None:
        """Writes what waits."""
        if self._waiting:
            write_text(self._path, self._waiting + "\n")
            self._waiting, self._written = "", time.monotonic()
