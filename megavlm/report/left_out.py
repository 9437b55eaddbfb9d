"""What a report leaves out of the files of a run, in words, and why an output folder has nothing to report."""

from pathlib import Path

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted
from megavlm.monitor.metrics import FILE_NAME as METRICS
from megavlm.monitor.metrics import num_damaged, num_odd_values, read_lines
from megavlm.monitor.rollout_log import FILE_NAME as ROLLOUTS
from megavlm.monitor.rollout_log import HELD_OUT_FILE, read_rollouts
from megavlm.output.folder import CHANGES_FILE
from megavlm.report.answers import FILE_NAME as ANSWERS
from megavlm.report.run_data import changes_of

_LINES = (METRICS, CHANGES_FILE, ROLLOUTS, HELD_OUT_FILE)  # files of a run with a line for each step that they tell of
_MOST_CAUSES = 3  # of an error


def left_out_of(folder: Path, *, is_needed: bool) -> list[str]:
    """For each file of a run that has a line per step: how many lines and values of it a report cannot show.

    A file that cannot be read is told as well, or with ``is_needed`` raised as UserError.
    """
    found = []
    for file in (folder / name for name in _LINES):
        try:
            counts = [(num_damaged(file), "line", "damaged or without a step"), _of_another_form(file)]
        except UserError as error:
            if is_needed:
                raise
            found.append(error.message)
            continue
        if told := [f"{counted(count, noun)}, {what}" for count, noun, what in counts if count]:
            found.append(f"{file}: {'; '.join(told)}")
    return found


def _of_another_form(file: Path) -> tuple[int, str, str]:
    """How much of the lines with a step is not what the file should have, a noun for that, and what it is."""
    if file.name == METRICS:
        return num_odd_values(file), "value", "no number that a report can show"
    before = len(read_lines(file))
    shown = changes_of(file.parent) if file.name == CHANGES_FILE else read_rollouts(file.parent, file.name)
    has_changed = len(read_lines(file)) != before  # the run goes on
    return 0 if has_changed else before - len(shown), "line", "with fields of another form"


def nothing_to_report(folder: Path, left_out: list[str]) -> UserError:
    """Why there is no report of a folder, if ``left_out`` has all that could not be shown of it and its neighbours."""
    existing = [name for name in (METRICS, ANSWERS) if (folder / name).is_file()]
    if not existing:
        return UserError(
            f"{folder} has neither {METRICS} nor {ANSWERS}, so there is nothing to report",
            "give the output folder of a run",
        )
    starts = tuple(f"{path}{end}" for path in (folder, folder.absolute()) for end in ("/", ":"))
    causes = [text for text in dict.fromkeys(left_out) if text.startswith(starts)]
    if METRICS in existing and not causes:
        return UserError(
            f"{folder} has nothing to report: {METRICS} has no complete line of a step",
            "wait for the first logged step of the run",
        )
    if METRICS in existing and not any(METRICS in cause for cause in causes):
        causes.append(f"{METRICS} has no complete line of a step")
    if ANSWERS in existing and not causes:
        causes.append(f"{ANSWERS} has no answers of this run")
    return UserError(
        f"{folder} has nothing to report: {'; '.join(causes[:_MOST_CAUSES])}", "repair these files, or move them away"
    )
