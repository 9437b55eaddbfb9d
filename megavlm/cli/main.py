"""The command `megavlm VERB CONFIG.yaml [section.key=value …] [--nproc N]`; see `megavlm.cli.verbs`.

Exit status: 0 after a success, or after a stop signal and a checkpoint; 2 if settings or data are invalid, with one
message on standard error; 130 (Ctrl-C), 143 (SIGTERM) and so on if a signal ended the command and nothing was saved; 1
otherwise.
"""

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

from megavlm.align.registry import METHODS, check_method
from megavlm.base import command_line, processes, stop_signals
from megavlm.base.errors import UserError
from megavlm.base.imports import no_collection
from megavlm.cli import environment, failures, local_workers
from megavlm.cli.arguments import wrong
from megavlm.cli.verb import Verb, positive
from megavlm.cli.verbs import VERBS
from megavlm.commands import needed
from megavlm.config import requirements
from megavlm.config.load import load_settings
from megavlm.config.settings import Settings
from megavlm.environments.worker_process import check_environment
from megavlm.layout import shapes
from megavlm.output import folder, held_run
from megavlm.output.folder import StartOptions
from megavlm.rewards.pool import check_rewards


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command with `arguments` (default: those of the process) and returns its exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if local_workers.is_worker():
        processes.end_with_parent()
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        failures.show("ended by Ctrl-C")
        return stop_signals.status_of(signal.SIGINT)
    except Exception as error:
        return failures.report(error)


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        from megavlm.cli import help as cli_help

        cli_help.show_verbs(VERBS)
        return 0 if arguments else failures.USER_ERROR
    if arguments[0] == "--version":
        from megavlm import __version__

        print(f"megavlm {__version__}")
        return 0
    name, rest = _split(arguments)
    if name not in VERBS:
        return _group(name, rest)
    verb = VERBS[name]
    if "-h" in rest or "--help" in rest:
        from megavlm.cli import help as cli_help

        cli_help.show_verb(name, verb)
        return 0
    return _run(name, verb, arguments, rest)


def _split(arguments: list[str]) -> tuple[str, list[str]]:
    """The verb, which has one or two words, and the arguments after it. An unknown verb is taken to be one word."""
    pair = " ".join(arguments[:2])
    return (pair, arguments[2:]) if pair in VERBS else (arguments[0], arguments[1:])


def _group(name: str, rest: list[str]) -> int:
    """Shows the verbs that begin with the word `name`. Raises UserError if there are none or another word follows."""
    verbs = {verb: entry for verb, entry in VERBS.items() if verb.startswith(f"{name} ")}
    if verbs and (not rest or rest[0] in ("-h", "--help", "help")):
        from megavlm.cli import help as cli_help

        cli_help.show_verbs(verbs, name)
        return 0 if rest else failures.USER_ERROR
    written = f"{name} {rest[0]}" if verbs else name
    known = verbs or VERBS
    # the second word helps to recognise a typing error in the first
    close = difflib.get_close_matches(" ".join([name, *rest[:1]]), known, n=1, cutoff=0.8)
    close = close or difflib.get_close_matches(written, known, n=1)
    verbs_listed = f"verbs: {', '.join(known)}"
    raise UserError(f"unknown verb {written!r}", f"did you mean {close[0]}? {verbs_listed}" if close else verbs_listed)


def _run(name: str, verb: Verb, arguments: list[str], rest: list[str]) -> int:
    options = vars(_parser(name, verb).parse_intermixed_args(rest))
    given: list[Settings] = []
    if verb.sections:
        config, overrides = options.pop("config"), [*options.pop("overrides"), *_as_settings(verb, options)]
        settings = load_settings(config, overrides)
        if verb.uses_run:
            settings = held_run.of_run(settings)
        given.append(settings)
        command_line.remember(config, overrides)
        nproc = options.pop("nproc", None)
        if not local_workers.is_worker():
            world_size = environment.join_group()
            if world_size and nproc:
                raise UserError(
                    f"--nproc {nproc} cannot be used in a process that torchrun or srun started (one of {world_size})",
                    "leave out --nproc, or start the command without torchrun and srun",
                )
            _check(name, verb, settings, options, world_size or nproc or 1)
            if nproc and nproc > 1:
                trains = name in METHODS
                return local_workers.run(arguments, nproc, reads_terminal=verb.reads_terminal, trains=trains)
    module, _, function = verb.target.partition(":")
    is_worker = local_workers.is_worker()
    quiet = True if is_worker else None  # the parent tells the user
    with stop_signals.watched(quiet=quiet, has_parent=is_worker) if name in METHODS else nullcontext():
        with no_collection():
            target = getattr(importlib.import_module(module), function)
        return target(*given, **options, **verb.fixed) or 0


def _as_settings(verb: Verb, options: dict[str, Any]) -> list[str]:
    """Takes the flags that are another way to write a setting out of the options, and writes them as settings."""
    given = {key: options.pop(keyword) for keyword, key in verb.settings.items()}
    return [f"{key}={value}" for key, value in given.items() if value is not None]


def _check(name: str, verb: Verb, settings: Settings, options: dict[str, Any], world_size: int) -> None:
    """Checks everything that can be checked before processes are started and torch is imported."""
    one_prompt = options.get("prompt") is not None
    built, named = options.get("dry_run"), options.get("verb")
    if built and named and built != named:
        raise UserError(f"--dry-run {built} and --for {named} are two verbs", "leave out --for")
    job: str = (name == "validate" and (built or named)) or name
    if name == "infer" and not one_prompt and not settings.data.eval:
        raise UserError("infer has no questions", "ask one with --prompt TEXT, or set data.eval=FILE")
    requires = (*VERBS[job].requires, *(() if name != "infer" or one_prompt else ("data.eval", "output")))
    requirements.check_required(settings, requires, job)
    if job in METHODS:
        check_method(job, settings)
    if name in METHODS:
        needed.check_packages(settings)
    if name == "infer" and not one_prompt and (options["image"] or options["video"]):
        raise UserError("--image and --video can only be used with --prompt", "add --prompt TEXT, or leave them out")
    needed.check_files(settings, ("model.hf",) if options.get("synthetic") else verb.reads)
    for path in (*options.get("image", ()), *options.get("video", ())):
        if not path.is_file():
            raise UserError(f"file {path} does not exist", "check the path after --image or --video")
    if verb.local_workers:
        batch = settings.train.global_batch_size if verb.writes == "" else None
        data_parallel = shapes.check_world_size(settings.parallel, world_size, batch)
        if name in METHODS and METHODS[name].samples:
            prompts = requirements.required(settings.rollout.prompts, "rollout.prompts")
            shapes.check_prompts(prompts, settings.align.mini_batches, data_parallel)
    if int(os.environ.get("RANK", 0)) > 0:
        return  # rank 0 may already be writing to the output folder
    if name in METHODS and METHODS[name].samples:
        check_rewards(settings.reward)
        check_environment(settings.environment)
    if name in METHODS:
        check_rewards(settings.eval.answers.scorer)
    if "out" in options:
        folder.check_new(options["out"], settings)
    if verb.writes == "":
        folder.check_output(settings, StartOptions(options["restart"], tuple(options["change"])))
    elif verb.writes and not one_prompt:
        folder.check_new(requirements.required(settings.output, "output") / verb.writes, settings)


class _Parser(argparse.ArgumentParser):
    """A parser that raises UserError for wrong arguments."""

    def __init__(self, name: str, verb: Verb) -> None:
        super().__init__(prog=f"megavlm {name}", add_help=False, allow_abbrev=False)
        self._verb = (name, verb)

    def error(self, message: str) -> NoReturn:
        raise wrong(*self._verb, message)


def _parser(name: str, verb: Verb) -> argparse.ArgumentParser:
    parser = _Parser(name, verb)
    if verb.sections:
        parser.add_argument("config", type=Path, metavar="CONFIG.yaml")
        # without a default, argparse would list it as required
        parser.add_argument("overrides", nargs="*", default=[], metavar="section.key=value")
    for keyword, options in verb.positionals.items():
        parser.add_argument(keyword, **options)
    for keyword, options in verb.flags.items():
        parser.add_argument("--" + keyword.replace("_", "-"), **options)
    if verb.local_workers:
        parser.add_argument("--nproc", type=positive, metavar="N", help="number of local processes")
    return parser
