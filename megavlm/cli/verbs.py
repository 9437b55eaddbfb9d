"""The table of the command's verbs: what each takes, reads, needs and writes."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megavlm.align.registry import METHODS, MethodEntry

RUN = ("model", "adapter", "data", "parallel", "vision", "train", "checkpoint", "log", "generate")
RUN_REQUIRES = ("output", "data.train", "train.steps", "train.global_batch_size", "train.lr")
READS = ("model.hf", "model.load", "model.adapter")
RUN_READS = (*READS, "data.train", "data.eval")


def positive(text: str) -> int:
    """The argparse type of a count."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


@dataclass(frozen=True)
class Verb:
    """One job of the command.

    Attributes:
        target: "module:function", imported when the job starts; called with the settings, if it has sections, and one
            keyword argument per positional and flag; returns an exit status or None for 0.
        summary: one line for the list of verbs.
        example: command lines for its help.
        sections: sections of settings, or single keys, that it reads; without any it takes no CONFIG.yaml.
        requires: keys without a usable default that must be set.
        reads: keys of files that must exist.
        writes: result file or folder below `output` that must not exist yet; "" for a run folder; None for nothing.
        positionals: arguments beside CONFIG.yaml: {keyword: argparse options}.
        flags: options of this verb alone: {keyword: argparse options}; `--image` is keyword `image`.
        local_workers: whether it takes --nproc.
        fixed: further keyword arguments, the same at each call.
    """

    target: str
    summary: str
    example: str
    sections: tuple[str, ...] = RUN
    requires: tuple[str, ...] = ()
    reads: tuple[str, ...] = READS
    writes: str | None = None
    positionals: dict[str, dict[str, Any]] = field(default_factory=dict)
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    local_workers: bool = True
    fixed: dict[str, Any] = field(default_factory=dict)


def _of_method(name: str, method: MethodEntry) -> Verb:
    return Verb(
        "megavlm.commands.train:main",
        method.summary,
        method.example,
        sections=(*RUN, "align") if method.aligns else RUN,
        requires=(*method.requires, *RUN_REQUIRES),
        reads=(*RUN_READS, *method.reads),
        writes="",
        fixed={"method": name},
    )


VERBS = {name: _of_method(name, method) for name, method in METHODS.items()} | {
    "score": Verb(
        "megavlm.commands.score:main",
        "log-probabilities of each target token of data.eval, into scores.jsonl",
        "megavlm score sft.yaml model.load=runs/sft/checkpoints/step_00000100 output=runs/scores",
        sections=("model", "adapter", "data", "parallel", "vision", "train.precision", "train.logprob_chunk_tokens"),
        requires=("output", "model.load", "data.eval"),
        reads=(*READS, "data.eval"),
        writes="scores.jsonl",
        flags={"reward": {"action": "store_true", "help": "the score of a reward model (megavlm rm) instead"}},
    ),
    "infer": Verb(
        "megavlm.commands.infer:main",
        "answers to the questions of data.eval, into answers.jsonl, or to one prompt",
        "megavlm infer sft.yaml model.load=CHECKPOINT data.eval=questions.jsonl output=runs/answers\n"
        'megavlm infer sft.yaml model.load=CHECKPOINT --prompt "What is this?" --image cat.png',
        sections=("model", "adapter", "data", "parallel", "vision", "train.precision", "train.seed", "generate"),
        requires=("model.load",),
        reads=(*READS, "data.eval"),
        writes="answers.jsonl",
        flags={
            "prompt": {"metavar": "TEXT", "help": "answer this on the terminal, instead of data.eval"},
            "image": {
                "metavar": "PATH",
                "type": Path,
                "action": "append",
                "default": [],
                "help": "picture shown with --prompt; may be repeated",
            },
            "video": {
                "metavar": "PATH",
                "type": Path,
                "action": "append",
                "default": [],
                "help": "video shown with --prompt; may be repeated",
            },
        },
    ),
    "export": Verb(
        "megavlm.commands.export:main",
        "a Hugging Face folder out of a checkpoint, an adapter merged in or by itself",
        "megavlm export sft.yaml model.load=runs/sft/checkpoints/step_00000100 --out exported\n"
        "megavlm export sft-lora.yaml model.adapter=runs/sft-lora --out exported\n"
        "megavlm export sft-lora.yaml model.adapter=runs/sft-lora --adapter --out adapter",
        sections=("model", "adapter"),
        requires=("model.load",),
        flags={
            "out": {"metavar": "DIR", "type": Path, "required": True, "help": "folder to write; must not exist"},
            "adapter": {"action": "store_true", "help": "write model.adapter alone, in peft's format"},
        },
        local_workers=False,
    ),
    "validate": Verb(
        "megavlm.commands.validate:main",
        "read a configuration and its data's first samples; say what would happen or what is wrong",
        "megavlm validate stage2.yaml --world-size 64\n"
        "megavlm validate dpo-lora.yaml --world-size 64 --no-files --dry-run dpo",
        reads=(),
        flags={
            "world_size": {"metavar": "N", "type": int, "help": "number of processes it is meant for"},
            "no_files": {
                "action": "store_true",
                "help": "look at settings, shapes and layout alone; data and checkpoints may be missing",
            },
            "dry_run": {
                "metavar": "VERB",
                "choices": tuple(METHODS),
                "help": "also build what ranks of VERB would hold, without memory, and count it; no GPU is used",
            },
        },
        local_workers=False,
    ),
    "data prepare": Verb(
        "megavlm.commands.data_prepare:main",
        "index a folder of WebDataset shards, or make one out of JSONL files and their media",
        "megavlm data prepare shards\nmegavlm data prepare --jsonl train.jsonl more.jsonl --out shards",
        sections=(),
        reads=(),
        positionals={"folder": {"metavar": "DIR", "nargs": "?", "help": "folder of *.tar shards to index"}},
        flags={
            "jsonl": {
                "metavar": "FILE",
                "nargs": "+",
                "default": [],
                "help": "write these JSONL files (paths or URLs) and their media into shards instead",
            },
            "out": {"metavar": "DIR", "type": Path, "help": "folder for the shards of --jsonl; must not exist"},
            "shard_size": {
                "metavar": "SIZE",
                "help": "size that each shard of --jsonl grows to; default 500MB",
            },
            "skip_broken": {
                "action": "store_true",
                "help": "leave out samples of --jsonl that cannot be read, and list them in DIR/skipped.jsonl",
            },
            "force": {"action": "store_true", "help": "index DIR anew though it is up to date"},
        },
        local_workers=False,
    ),
    "data inspect": Verb(
        "megavlm.commands.data_inspect:main",
        "look at the data of a configuration: its sources, lengths, packing and rendered samples",
        "megavlm data inspect sft.yaml --out data-inspect",
        sections=("model", "data", "parallel", "train.seed"),
        requires=("data.train",),
        reads=("model.hf", "data.train"),
        flags={
            "out": {
                "metavar": "DIR",
                "type": Path,
                "default": Path("data-inspect"),
                "help": "folder for the report; must not exist; default data-inspect",
            },
            "samples": {
                "metavar": "N",
                "type": positive,
                "default": 200,
                "help": "samples of each source that are looked at; default 200",
            },
        },
        local_workers=False,
    ),
}
