"""The list of training methods, which the command line, the dry run and the launch scripts use.

This module does not import the methods, so that help texts and checks need not wait until torch is loaded.
"""

import importlib
from collections.abc import Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megavlm.align.evaluation_checks import check_evaluation
from megavlm.align.sampling_checks import WHY_PPO, check_numbers, check_sampling, first_set
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
        named: the method in words, for the card of a model that it has trained.
        marks: fields of ``metrics.jsonl`` by which a run of the method is recognised; it may share some with others.
        meant_by: settings by which a configuration can only be meant for it, as "key" or "key=value".
        meant_with_data: settings by which, together with data of its kind, a configuration is meant for it.
        is_usual: whether data of its kind alone suggest it.
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
    named: str
    marks: tuple[str, ...] = ()
    meant_by: tuple[str, ...] = ()
    meant_with_data: tuple[str, ...] = ()
    is_usual: bool = True
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
        "pretraining",
        meant_by=("stage",),
        requires=("stage", "model.load"),
        has_stages=True,
    ),
    "sft": MethodEntry(
        "megavlm.training.language_modeling:sft",
        "supervised fine-tuning on conversations",
        "megavlm sft sft.yaml model.load=HF_FOLDER output=runs/sft --nproc 2",
        "tune",
        "supervised fine-tuning",
        requires=("model.load",),
    ),
    "rm": MethodEntry(
        "megavlm.align.rm:method",
        "train a reward model on pairs of answers",
        "megavlm rm rm.yaml train.lr=1e-5 output=runs/rm --nproc 2",
        "pair",
        "training of a reward model on pairs of answers",
        marks=("pairs", "scores/mean"),
        meant_by=("align.centering",),
        is_usual=False,
        aligns=True,
        requires=("model.load",),
    ),
    "dpo": MethodEntry(
        "megavlm.align.dpo:method",
        "preference tuning on pairs of a chosen and a rejected answer",
        "megavlm dpo dpo.yaml align.loss=simpo train.lr=5e-7 output=runs/dpo --nproc 2",
        "pair",
        "preference tuning on pairs of answers",
        marks=("pairs",),
        aligns=True,
        requires=("model.load",),
        reads=("align.reference",),
    ),
    "kto": MethodEntry(
        "megavlm.align.kto:method",
        "preference tuning on single answers that are labelled desirable or undesirable",
        "megavlm kto kto.yaml train.lr=5e-7 output=runs/kto --nproc 2",
        "judged",
        "preference tuning on answers that are each labelled good or bad",
        marks=("z0",),
        meant_by=("align.desirable_weight", "align.undesirable_weight"),
        meant_with_data=("align.beta", "align.reference", "align.reference_at"),
        aligns=True,
        requires=("model.load",),
        reads=("align.reference",),
    ),
    "grpo": MethodEntry(
        "megavlm.reinforcement.grpo:method",
        "reinforcement learning from groups of sampled answers and their rewards",
        "megavlm grpo grpo.yaml align.loss=dapo train.lr=1e-6 output=runs/grpo --nproc 2",
        "prompt",
        "reinforcement learning from groups of sampled answers",
        marks=("reward_std",),
        meant_by=("rollout.prompts", "reward", "environment.python"),
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
        "reinforcement learning from sampled answers with a critic",
        marks=("reward_std", "value_loss"),
        meant_by=WHY_PPO,
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


def meant(settings: Settings) -> tuple[str, str] | None:
    """The method that a configuration can only be meant for, and the setting that tells so; None if none does.

    A method that is further down in the list builds on those above it, so it is looked at before them.
    """
    found = ((name, first_set(settings, method.meant_by)) for name, method in reversed(METHODS.items()))
    return next(((name, setting) for name, setting in found if setting is not None), None)


def usual(kind: "Kind") -> str:
    """The method that data of a kind alone suggest."""
    return next(name for name, method in METHODS.items() if method.kind == kind and method.is_usual)


def trained_by(fields: Set[str], *, has_stage: bool) -> str:
    """The method that has written lines with these fields to ``metrics.jsonl``: that of which most marks are there.

    Args:
        fields: the names of the fields.
        has_stage: whether the run has a value of ``stage``.
    """
    fitting = {name: method for name, method in METHODS.items() if fields >= set(method.marks)}
    return max(fitting, key=lambda name: (fitting[name].has_stages == has_stage, len(fitting[name].marks)))


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
