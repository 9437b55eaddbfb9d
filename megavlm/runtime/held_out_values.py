"""From which step on the values of ``eval.best`` in metrics.jsonl are of the same held-out data and questions."""

from collections.abc import Iterable
from pathlib import Path

from megavlm.config.eval_section import SCORE
from megavlm.monitor.metrics import read_lines
from megavlm.output.folder import CHANGES_FILE

_OF_LOSS = ("data.eval", "eval.rows")  # settings on which held-out values depend
_OF_SCORES = ("data.eval", "eval.answers", "generate.max_new_tokens", "generate.stop", "reward[", "environment.")


def comparable_after(output: Path, metric: str, changed: Iterable[tuple[str, int]] = ()) -> int:
    """The step after which all values of a metric can be compared; -1: all can.

    Args:
        output: the output folder of a run, whose changes.jsonl tells of changed settings.
        metric: the metric.
        changed: further changes of settings: the dotted key, and the step after which it holds.
    """
    keys = _OF_SCORES if metric.endswith(SCORE) else _OF_LOSS
    noted = [(str(change.get("setting")), change["step"]) for change in read_lines(output / CHANGES_FILE)]
    return max((step for key, step in [*noted, *changed] if key.startswith(keys)), default=-1)
