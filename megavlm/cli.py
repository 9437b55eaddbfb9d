"""The command: `megavlm VERB CONFIG.yaml [section.key=value …] [--nproc N]`.

Exit status: 0 done, or stopped by SIGTERM or SIGUSR1 after a checkpoint; 2 bad settings or data, told in one message on
standard error; 1 anything else.
"""

import argparse
import difflib
import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from megavlm import environment, failures, local_workers, processes
from megavlm.config import layout, output, requirements
from megavlm.config.errors import UserError
from megavlm.config.load import load_settings
from megavlm.config.settings import Settings
from megavlm.imports import no_collection

RUN = ("model", "data", "parallel", "vision", "train", "checkpoint", "log", "generate")
RUN_REQUIRES = ("output", "data.train", "train.steps", "train.global_batch_size", "train.lr")
RUN_READS = ("model.hf", "model.load", "data.train", "data.eval")


@dataclass(frozen=True)
class Verb:
    """One job of the command.

    Attributes:
        target: "module:function", imported when the job starts; called with the settings and one keyword argument per
            flag; returns an exit status or None for 0.
        summary: one line for the list of verbs.
        example: command lines for its help.
        sections: sections of settings, or single keys, that it reads.
        requires: keys without a usable default that must be set.
        reads: keys of files that must exist.
        writes: result file or folder below `output` that must not exist yet; "" for a run folder; None for nothing.
        flags: options of this verb alone: {keyword: argparse options}; `--image` is keyword `image`.
        local_workers: whether it takes --nproc.
    """

    target: str
    summary: str
    example: str
    sections: tuple[str, ...] = RUN
    requires: tuple[str, ...] = ()
    reads: tuple[str, ...] = ("model.hf", "model.load")
    writes: str | None = None
    flags: dict[str, dict[str, Any]] = field(default_factory=dict)
    local_workers: bool = True


VERBS = {
    "pretrain": Verb(
        "megavlm.pretrain.stages:main",
        "train one of the four pretraining stages (stage: 0 … 3)",
        "megavlm pretrain stage0.yaml model.load=CHECKPOINT output=runs/stage0 --nproc 2",
        requires=("stage", *RUN_REQUIRES),
        reads=RUN_READS,
        writes="",
    ),
    "sft": Verb(
        "megavlm.training.sft:main",
        "supervised tuning on conversations",
        "megavlm sft sft.yaml train.lr=1e-5 output=runs/sft --nproc 2",
        requires=RUN_REQUIRES,
        reads=RUN_READS,
        writes="",
    ),
    "score": Verb(
        "megavlm.training.score:main",
        "log-probabilities of each target token of data.eval, into scores.jsonl",
        "megavlm score sft.yaml model.load=runs/sft/checkpoints/step_00000100 output=runs/scores",
        sections=("model", "data", "parallel", "vision", "train.precision", "train.logprob_chunk_tokens"),
        requires=("output", "model.load", "data.eval"),
        reads=("model.hf", "model.load", "data.eval"),
        writes="scores.jsonl",
    ),
    "infer": Verb(
        "megavlm.training.infer:main",
        "answers to the questions of data.eval, into answers.jsonl, or to one prompt",
        "megavlm infer sft.yaml model.load=CHECKPOINT data.eval=questions.jsonl output=runs/answers\n"
        'megavlm infer sft.yaml model.load=CHECKPOINT --prompt "What is this?" --image cat.png',
        sections=("model", "data", "parallel", "vision", "train.precision", "train.seed", "generate"),
        requires=("model.load",),
        reads=("model.hf", "model.load", "data.eval"),
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
        "megavlm.training.export:main",
        "a Hugging Face folder out of a checkpoint",
        "megavlm export sft.yaml model.load=runs/sft/checkpoints/step_00000100 --out exported",
        sections=("model",),
        requires=("model.load",),
        flags={"out": {"metavar": "DIR", "type": Path, "required": True, "help": "folder to write; must not exist"}},
        local_workers=False,
    ),
    "validate": Verb(
        "megavlm.training.validate:main",
        "read a configuration and its data's first samples; say what would happen or what is wrong",
        "megavlm validate stage2.yaml --world-size 64",
        reads=(),
        flags={
            "world_size": {"metavar": "N", "type": int, "help": "number of processes it is meant for"},
            "no_files": {
                "action": "store_true",
                "help": "look at settings, shapes and layout alone; data and checkpoints may be missing",
            },
        },
        local_workers=False,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (default: the process's own) and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if local_workers.is_worker():
        processes.end_with_parent()
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        failures.show("ended by Ctrl-C")
        return failures.OTHER_ERROR
    except Exception as error:
        return failures.report(error)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from megavlm import cli_help

        cli_help.show_verbs(VERBS)
        return 0 if arguments else failures.USER_ERROR
    if arguments[0] == "--version":
        from megavlm import __version__

        print(f"megavlm {__version__}")
        return 0
    name, *rest = arguments
    if name not in VERBS:
        close = difflib.get_close_matches(name, VERBS, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"verbs: {', '.join(VERBS)}"
        raise UserError(f"unknown verb {name!r}", remedy)
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        from megavlm import cli_help

        cli_help.show_verb(name, verb)
        return 0
    return _run(name, verb, arguments, rest)


def _run(name: str, verb: Verb, arguments: list[str], rest: list[str]) -> int:
    options = vars(_parser(name, verb).parse_intermixed_args(rest))
    settings = load_settings(options.pop("config"), options.pop("overrides"))
    nproc = options.pop("nproc", None)
    if not local_workers.is_worker():
        world_size = environment.join_group()
        if world_size and nproc:
            raise UserError(
                f"--nproc {nproc} in a process that torchrun or srun started, as one of {world_size}",
                "leave --nproc out, or start the command by itself",
            )
        _check(name, verb, settings, options, world_size or nproc or 1)
        if nproc and nproc > 1:
            return local_workers.run(arguments, nproc)
    module, _, function = verb.target.partition(":")
    with no_collection():
        target = getattr(importlib.import_module(module), function)
    return target(settings, **options) or 0


def _check(name: str, verb: Verb, settings: Settings, options: dict[str, Any], world_size: int) -> None:
    """All that can be checked before processes are started and torch is imported."""
    one_prompt = options.get("prompt") is not None
    requires = (*verb.requires, *(() if name != "infer" or one_prompt else ("data.eval", "output")))
    requirements.check_required(settings, requires, name)
    if name == "sft" and settings.stage is not None:
        raise UserError(f"stage is {settings.stage}, but sft has no stages: it would be ignored", "set stage to null")
    if not one_prompt and (options.get("image") or options.get("video")):
        raise UserError("--image and --video need --prompt: they would be ignored")
    requirements.check_files(settings, verb.reads)
    for path in (*options.get("image", ()), *options.get("video", ())):
        if not path.is_file():
            raise UserError(f"no such file: {path}")
    if verb.local_workers:
        batch = settings.train.global_batch_size if verb.writes == "" else None
        layout.check_world_size(settings.parallel, world_size, batch)
    if int(os.environ.get("RANK", 0)) > 0:
        return  # rank 0 may be writing to the output already
    if "out" in options:
        output.check_new(options["out"], settings)
    if verb.writes == "":
        output.check_output(settings)
    elif verb.writes and not one_prompt:
        output.check_new(settings.output / verb.writes, settings)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}", f"see {self.prog} --help")


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(prog=f"megavlm {name}", add_help=False, allow_abbrev=False)
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    for keyword, options in verb.flags.items():
        parser.add_argument("--" + keyword.replace("_", "-"), **options)
    if verb.local_workers:
        parser.add_argument("--nproc", type=_positive, metavar="N", help="local processes to start")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number
