"""The list of training methods, which the command line, the dry run and the launch scripts use.

This module does not import the methods, so that help texts and checks need not wait until torch is loaded.
"""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megavlm.align.evaluation_checks import check_evaluation
from megavlm.align.sampling_checks import check_numbers, check_sampling
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings

if TYPE_CHECKING:
    from megavlm.records.records import Kind
    from megavlm.training.method import Method


@dataclass(frozen=True)
class MethodEntry:
    """An entry of the registry.

    Attributes:
        make: "module:function"; the function gets the settings and returns the Method, or raises UserError.
        summary: one line for the list of commands.
        example: a command line for the help of the method.
        kind: what it trains on.
        aligns: whether the method reads the section ``align`` and compares answers.
        requires: settings that must be set for this method, in addition to those of every training run; of "a|b", one.
        reads: settings with paths of files that must exist, in addition to those of every training run.
        has_stages: whether the setting ``stage`` is for this method.
        samples: whether it samples answers and reads the sections ``rollout`` and ``reward``; then the number of rows
            of a step follows from the answers.
    """

    make: str
    summary: str
    example: str
    kind: "Kind"
    aligns: bool = False
    requires: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    has_stages: bool = False
    samples: bool = False


METHODS = {
    "pretrain": MethodEntry(
        "megavlm.training.language_modeling:pretrain",
        "train one of the four pretraining stages (stage: 0 … 3)",
        "megavlm pretrain stage0.yaml model.load=HF_FOLDER output=runs/stage0 --nproc 2",
        "pretrain",
        requires=("stage", "model.load"),
        has_stages=True,
    ),
    "sft": MethodEntry(
        "megavlm.training.language_modeling:sft",
        "supervised fine-tuning on conversations",
        "megavlm sft sft.yaml model.load=HF_FOLDER output=runs/sft --nproc 2",
        "tune",
        requires=("model.load",),
    ),
    "rm": MethodEntry(
        "megavlm.align.rm:method",
        "train a reward model on pairs of answers",
        "megavlm rm rm.yaml train.lr=1e-5 output=runs/rm --nproc 2",
        "pair",
        aligns=True,
        requires=("model.load",),
    ),
    "dpo": MethodEntry(
        "megavlm.align.dpo:method",
        "preference tuning on pairs of a chosen and a rejected answer",
        "megavlm dpo dpo.yaml align.loss=simpo train.lr=5e-7 output=runs/dpo --nproc 2",
        "pair",
        aligns=True,
        requires=("model.load",),
        reads=("align.reference",),
    ),
    "kto": MethodEntry(
        "megavlm.align.kto:method",
        "preference tuning on single answers that are labelled desirable or undesirable",
        "megavlm kto kto.yaml train.lr=5e-7 output=runs/kto --nproc 2",
        "judged",
        aligns=True,
        requires=("model.load",),
        reads=("align.reference",),
    ),
    "grpo": MethodEntry(
        "megavlm.reinforcement.grpo:method",
        "reinforcement learning from groups of sampled answers and their rewards",
        "megavlm grpo grpo.yaml align.loss=dapo train.lr=1e-6 output=runs/grpo --nproc 2",
        "prompt",
        aligns=True,
        requires=("model.load", "rollout.prompts", "reward|environment.python"),
        reads=("reward", "environment"),
        samples=True,
    ),
    "ppo": MethodEntry(
        "megavlm.reinforcement.ppo:method",
        "reinforcement learning from sampled answers and a critic, which judges each token",
        "megavlm ppo ppo.yaml align.critic.load=runs/rm train.lr=1e-6 output=runs/ppo --nproc 2",
        "prompt",
        aligns=True,
        requires=("model.load", "rollout.prompts", "reward|environment.python"),
        reads=("reward", "environment", "align.critic.load"),
        samples=True,
    ),
}


def make_method(name: str, settings: Settings) -> "Method":
    """Makes the method with this name. Raises UserError for settings that the method would ignore."""
    check_method(name, settings)
    module, _, function = METHODS[name].make.partition(":")
    make: Any = getattr(importlib.import_module(module), function)
    return make(settings)


def check_method(name: str, settings: Settings) -> None:
    """Checks the settings of a method as far as possible without importing it or torch. Raises UserError."""
    if settings.stage is not None and not METHODS[name].has_stages:
        raise UserError(
            f"stage is {settings.stage}, but {name} has no stages: the setting would be ignored", "set stage to null"
        )
    check_evaluation(settings, name, METHODS[name].kind, samples=METHODS[name].samples)
    if METHODS[name].aligns:
        check_numbers(name, settings)
    if METHODS[name].samples:
        check_sampling(settings, name)
        return
    for section in ("rollout", "reward", "reward_pool", "environment"):
        if settings.is_changed(section):
            raise UserError(f"the section {section} is not used by {name}, so it would be ignored", f"remove {section}")
