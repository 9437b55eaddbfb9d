"""report.html: a run and its predecessors on one page, which consists of a single file.

    python -m megavlm.report.run_report DIR

The config.yaml of a run names the checkpoint from which it started. If that checkpoint is in another output folder, the
report also includes the run of that folder, so the report of a fine-tuning run shows all stages of pretraining. Answers
that `megavlm infer` has written to one of these folders, or to a folder next to them, are shown with their pictures.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from megavlm.base.atomic_files import write_text
from megavlm.base.errors import UserError
from megavlm.base.number_format import percent, short
from megavlm.base.quoting import shortened
from megavlm.monitor.rl_warnings import history
from megavlm.monitor.rollout_log import HELD_OUT_FILE
from megavlm.report.answers import AnswerGroup, AnswerSource, group_answers, read_note, read_source
from megavlm.report.charts import Band, Curve, chart
from megavlm.report.experts import expert_charts, expert_map
from megavlm.report.left_out import left_out_of, nothing_to_report
from megavlm.report.loss_plot import HELD_OUT, smooth
from megavlm.report.page import render_page
from megavlm.report.phases import phases_bar
from megavlm.report.policy import is_rl, policy_charts
from megavlm.report.prediction import predictions
from megavlm.report.preferences import held_out_score, method_charts
from megavlm.report.rollouts import marked_tokens, shown_rollouts
from megavlm.report.run import RecordedRun, access_of, existing
from megavlm.report.run_data import changes_of, passes_of

FILE_NAME = "report.html"
TEMPLATE = "report.html.jinja"


def write_report(output_dir: str | Path) -> Path:
    """Writes report.html into an output folder; an existing one is replaced atomically.

    It reads config.yaml, metrics.jsonl, answers.jsonl and accuracy.json of this folder, of its predecessors and of the
    folders next to them, and the files of the questions. What is damaged is named and left out.

    Returns:
        The file.

    Raises:
        UserError: there is nothing to report, or config.yaml or a file with lines of steps of this folder cannot be
            read.
    """
    folder = Path(output_dir)
    left_out: list[str] = []
    chain = follow(folder, left_out)
    trained = [run for run in chain if run.lines]
    for run in chain:
        left_out += left_out_of(run.folder, is_needed=run.folder == folder)
    answers = group_answers(find_answers(chain, left_out))
    if not trained and not answers:
        raise nothing_to_report(folder, left_out)
    page = _render(chain, trained, answers, left_out)
    write_text(folder / FILE_NAME, page.encode("utf-8", "replace").decode("utf-8"))  # without halves of surrogate pairs
    return folder / FILE_NAME


def follow(folder: Path, left_out: list[str]) -> list[RecordedRun]:
    """The run of `folder` and its predecessors, oldest first.

    They end at one that cannot be read; ``left_out`` gets the reason.
    """
    chain: list[RecordedRun] = []
    seen: set[Path] = set()
    before: Path | None = folder
    while before is not None and before.resolve() not in seen:
        seen.add(before.resolve())
        try:
            chain.insert(0, RecordedRun.read(before))
        except UserError as error:
            if not chain:
                raise
            left_out.append(error.message)
            break
        before = _run_folder(chain[0].setting("model.load"), before)
    return chain


def find_answers(chain: list[RecordedRun], left_out: list[str]) -> list[AnswerSource]:
    """The answers in the folders of the chain, and those in folders next to them that used one of its checkpoints.

    They are ordered by the checkpoint that gave the answers, earliest first. The checkpoint from which the whole chain
    started is earlier than all runs. Why a folder cannot be read is appended to ``left_out``.
    """
    places = {run.folder.resolve(): place for place, run in enumerate(chain)}
    start = _loaded(chain[0])
    trained = max((place for place, run in enumerate(chain) if run.lines), default=None)
    found = []
    candidates = {path.parent for run in chain for path in run.folder.absolute().parent.glob("*/answers.jsonl")}
    for folder in sorted(candidates | {run.folder.absolute() for run in chain}):
        own_place = places.get(folder.resolve())
        try:
            run = RecordedRun.read(folder) if own_place is None else chain[own_place]
            note = read_note(folder)
            if note is None and run.lines:
                continue  # nobody knows whether these are answers of the run or of the model that it started from
            note = note or {"weights": run.setting("model") or {}, "data": run.setting("data") or {}}
            weights, data = note["weights"], note["data"]
            place = _place(weights, folder, places, start)
            if place is None and not run.lines:
                place = own_place
            if place is None:
                continue
            is_own = trained is None or place == trained
            source = read_source(
                folder, _questions(data, folder), access_of(data), weights=_words(weights), is_own=is_own
            )
        except UserError as error:
            left_out.append(error.message)
            continue
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:  # settings of any other form
            left_out.append(f"{folder}: the settings of its answers are damaged: {shortened(repr(error))}")
            continue
        if source is not None:
            found.append(((place, weights.get("step") or 0), source))
    return [source for _, source in sorted(found, key=lambda item: item[0])]


def _questions(data: dict[str, Any], folder: Path) -> Path | None:
    """The one file of questions; None if there are several, which are not told apart here, or none."""
    asked = data.get("eval")
    paths = [asked] if isinstance(asked, str) else [source["path"] for source in asked or ()]
    found = existing(Path(paths[0]), folder) if len(paths) == 1 else None
    return found if found is not None and found.is_file() else None


def _place(weights: dict[str, Any], folder: Path, places: dict[Path, int], start: Path | None) -> int | None:
    """The place in the chain of the run that gave the answers in ``folder``; -1 for the start of the whole chain.

    None if the weights do not belong to the chain.
    """
    named = weights.get("adapter") or weights.get("load")
    run = weights.get("run")
    path = _run_folder(named, folder)
    if run:  # which may be this folder
        path = existing(Path(run), folder) or folder.absolute().parent / Path(run).name
    if path is not None:
        return places.get(path.resolve())
    loaded = existing(Path(named), folder) if named else None
    return -1 if loaded is not None and start is not None and loaded.resolve() == start else None


def _words(weights: dict[str, Any]) -> str:
    """What answers were made from, for the page."""
    if weights.get("run"):
        return f"step {weights.get('step')} of {Path(weights['run']).name}"
    named = weights.get("adapter") or weights.get("load")
    return f"made from {Path(named).name}" if named else ""


def _loaded(run: RecordedRun) -> Path | None:
    """The checkpoint from which a run started; None if there is none."""
    load = run.setting("model.load")
    path = existing(Path(load), run.folder) if load else None
    return path.resolve() if path else None


def _run_folder(load: str | None, folder: Path) -> Path | None:
    """The output folder that contains a checkpoint; None if it does not belong to a run or does not exist.

    The folders of several runs may have been moved together, so the output folder is also searched next to `folder`.
    """
    if not load:
        return None
    parts = Path(load).parts
    at = parts.index("checkpoints") if "checkpoints" in parts else len(parts)
    named = Path(*parts[:at]) if at else None
    if named is None:
        return None
    path = existing(named, folder) or folder.absolute().parent / named.name
    is_run = any(os.path.isfile(path / name) for name in ("config.yaml", "metrics.jsonl"))
    return path if is_run and path.resolve() != folder.resolve() else None


def _render(
    chain: list[RecordedRun], trained: list[RecordedRun], answers: list[AnswerGroup], left_out: list[str]
) -> str:
    return render_page(
        TEMPLATE,
        filters={
            "total_of": RecordedRun.total,
            "marked_tokens": marked_tokens,
            "passes": passes_of,
            "changes": changes_of,
            "yaml": _yaml,
        },
        run=chain[-1],
        trained=trained,
        overview=_overview(trained),
        charts=[_charts(run, left_out) for run in trained],
        settings=_settings(chain),
        answers=answers,
        warnings=history(trained[-1].lines) if trained else [],
        rollouts=shown_rollouts(chain[-1]),
        predictions=[found for run in trained if (found := predictions(run)) is not None],
        held_out=shown_rollouts(chain[-1], HELD_OUT_FILE),
        left_out=list(dict.fromkeys(left_out)),  # complete by now
    )


def _overview(runs: list[RecordedRun]) -> str:
    """The loss of all runs in one chart, one run after another; the reward alone where the last run has one."""
    if is_rl(runs[-1].lines if runs else ()):
        run = runs[-1]
        curves = [Curve.smoothed("reward", run.column("reward"), "speed"), held_out_score(run.lines)]
        steps_of_run = [line["step"] for line in run.lines]
        return chart("Reward", steps_of_run, curves, kind="tall", note="mean over all answers")
    if len(runs) < 2:
        return ""
    steps, losses, average, bands, start = [], [], [], [], 0
    for run in runs:
        steps += [start, *(start + line["step"] for line in run.lines)]
        losses += [None, *run.column("loss")]  # None interrupts the line between two runs
        average += [None, *smooth(run.column("loss"))]
        bands.append(Band(run.name, start, steps[-1]))
        start = steps[-1]
    return chart("Loss", steps, [Curve("loss", losses, "loss", average)], bands=bands, kind="tall")


def _charts(run: RecordedRun, left_out: list[str]) -> list[tuple[str, list[Markup]]]:
    """The charts of one run that have values, under headings; "" if there is only one group."""
    steps = [line["step"] for line in run.lines]
    norms = [Curve.smoothed(part, run.column(f"grad_norm/{part}"), part) for part in run.trained_parts]
    if len(norms) > 1:
        norms.insert(0, Curve.smoothed("whole", run.column("grad_norm"), "text"))
    speed, mfu = run.column("tokens_per_second"), run.column("mfu")
    loss = Curve.smoothed("loss", run.column("loss"), "loss")
    held_out = Curve("held out", run.column(HELD_OUT), "speed", sparse=True)
    rl = is_rl(run.lines)
    charts = [
        chart("Loss", steps, [loss, held_out], kind="" if rl else "large"),
        *method_charts(run.lines),
        chart("Gradient norm", steps, norms, log=True),
        chart("Learning rate", steps, [Curve("learning rate", run.column("lr"), "lr")], from_zero=True),
        chart("Tokens per second", steps, [Curve.smoothed("tokens/s", speed, "speed")], from_zero=True, label=short),
        chart("MFU", steps, [Curve.smoothed("MFU", mfu, "speed")], from_zero=True, label=percent),
        phases_bar(run),
        chart("Peak memory, GiB", steps, [Curve("GiB", run.column("memory_gib"), "soft")], from_zero=True),
    ]
    groups = [*policy_charts(run.lines), ("Training", charts)] if rl else [("", charts)]
    experts = expert_charts(run.lines)
    try:
        experts.append(expert_map(run.folder))
    except UserError as error:
        left_out.append(error.message)
    groups.append(("Experts", experts))
    return [(heading, [drawn for drawn in group if drawn]) for heading, group in groups]


def _settings(chain: list[RecordedRun]) -> list[tuple[RecordedRun, list[tuple[str, str, bool]]]]:
    """For each run, (key, value, whether it differs from the run before), in the notation of the command line."""
    tables, before = [], None
    for run in chain:
        flat = _flat(run.config)
        differs = {key: before is not None and before.get(key) != text for key, text in flat.items()}
        tables.append((run, [(key, text, differs[key]) for key, text in flat.items()]))
        before = flat
    return tables


def _flat(tree: Any, prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + str(name)] = _yaml(value)
    return flat


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...").strip()


def main(arguments: list[str] | None = None) -> int:
    """Runs the command: writes the report of each folder. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m megavlm.report.run_report", description="Write report.html of output folders again."
    )
    parser.add_argument("output_dir", nargs="+", type=Path, metavar="DIR", help="output folder of a run")
    try:
        for folder in parser.parse_args(arguments).output_dir:
            print(write_report(folder))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
