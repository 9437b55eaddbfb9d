"""Which settings a run may be continued with, and how a change is named."""

import re
from collections.abc import Iterable
from typing import Any

from megavlm.base.errors import UserError
from megavlm.base.quoting import shortened

# Settings that may change when a run is continued, because they change neither the data nor what a step computes.
# train.steps is one of them so that a finished run can be extended; the schedule keeps its length.
FREE_TO_CHANGE = (
    "parallel",
    "vision",
    "checkpoint",
    "log",
    "eval",
    "generate",
    "reward_pool",
    "environment.workers",
    "rollout.cache_gib",
    "rollout.max_sequences",
    "rollout.log_every",
    "rollout.vllm",
    "align.offload",
    "output",
    "overwrite",
    "data.eval",
    "data.pad_multiple",  # follows parallel.context; a run that continues with another value says so
    "data.workers",
    "data.max_bad_fraction",
    "data.max_dropped_fraction",
    "data.media_roots",
    "data.media_protocols",
    "model.kernels",
    "train.steps",
    "train.epochs",
    "train.recompute",
    "train.offload_activations",
    "train.overlap",
    "train.experts",
    "train.offload_optimizer",
    "train.logprob_chunk_tokens",
    "train.max_skipped_steps",
    "train.hang_minutes",
    "train.memory_check",
    "train.deterministic",
    "train.profile",
)
# Settings that change what later steps compute, but neither the model nor the position in the data. They may change if
# the command line says so with --change.
CHANGEABLE = (
    "train.lr",
    "train.min_lr",
    "train.lr_scale",
    "train.warmup_steps",
    "train.schedule",
    "train.schedule_steps",
    "train.warmup_share",
    "train.restarts",
    "train.decay_share",
    "train.decay_shape",
    "train.schedule_table",
    "train.batch_ramp_lr",
    "train.loss",
    "train.weight_decay",
    "train.adam_moments",
    "train.clip_grad",
    # only the blend: weights, loss weights, epochs and limits of the same sources, and further sources at the end
    "data.train",
    "data.replay",  # the same, and the share
    "align.critic.lr",
    "align.critic.warmup_steps",
    "reward",
    "environment",
)
_SOURCE = re.compile(r"data\.train\[(\d+)\]\..*")
_BLEND = re.compile(r"data\.(train|replay)\b.*\.(weight|loss_weight|epochs|max_tokens|share)")
_LONGEST = 60  # characters of a value in a message


def is_free(key: str) -> bool:
    """Whether a run may continue with another value of this dotted key."""
    return any(_is_below(key, free) for free in FREE_TO_CHANGE)


def is_changeable(key: str, sources: int | None = None) -> bool:
    """Whether a run may continue with another value of this dotted key if the command line allows it.

    Further sources may be added at the end of data.train, which had so many `sources` before.
    """
    if key.startswith("data."):
        if sources and (found := _SOURCE.fullmatch(key)) and int(found[1]) >= sources:
            return True
        return _BLEND.fullmatch(key) is not None
    return any(_is_below(key, changeable) for changeable in CHANGEABLE)


def is_allowed(key: str, change: Iterable[str], sources: int | None = None) -> bool:
    """Whether ``--change`` with these keys allows another value of this dotted key (see ``is_changeable``)."""
    return is_changeable(key, sources) and any(_is_below(key, given) for given in change)


def check_change(keys: Iterable[str]) -> None:
    """Raises a UserError if one of the keys of ``--change`` cannot be changed in a run."""
    for key in keys:
        if not (key in CHANGEABLE or is_changeable(key)):
            raise UserError(
                f"--change {key}: a run cannot be continued with another value of it",
                f"with --change: {', '.join(CHANGEABLE)}; always: {', '.join(FREE_TO_CHANGE)}",
            )


def flags_for(keys: Iterable[str]) -> str:
    """The options that allow changes of these keys: "--change train.lr --change data.train"."""
    short = dict.fromkeys(next(c for c in CHANGEABLE if _is_below(key, c)) for key in keys)
    return " ".join(f"--change {key}" for key in short)


def listed(changes: dict[str, tuple[Any, Any]]) -> str:
    """One line for each change, with both values, each preceded by a line break."""
    return "".join(f"\n  {key}: {text(old)} there, {text(new)} now" for key, (old, new) in changes.items())


def text(value: Any) -> str:
    """A value in a message."""
    return "null" if value is None else shortened(str(value), _LONGEST)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings and lists of mappings by dotted key, such as ``data.train[0].weight``."""
    if isinstance(tree, dict) and tree:
        parts = {f"{prefix}.{key}" if prefix else str(key): value for key, value in tree.items()}
    elif isinstance(tree, list) and tree and all(isinstance(value, dict) for value in tree):
        parts = {f"{prefix}[{number}]": value for number, value in enumerate(tree)}
    else:
        return {prefix: tree}
    return {key: leaf for part, value in parts.items() for key, leaf in flat(value, part).items()}


def _is_below(key: str, above: str) -> bool:
    return key == above or key.startswith((f"{above}.", f"{above}["))
