"""Samples that kill the process that reads them: named, passed over, and nothing else changes."""

import ctypes
import json
import multiprocessing
import os
import signal
import time
from dataclasses import dataclass
from itertools import islice

import pytest
import torch

from megavlm.base.errors import RunFailure, UserError
from megavlm.config.settings import DataSettings
from megavlm.data import rows as rows_module
from megavlm.data.eval_samples import EvalSamples
from megavlm.data.loader import build_loader
from megavlm.data.renderer import Renderer
from megavlm.records.skipped_samples import BROKEN
from megavlm.sources.blend import open_file
from megavlm.workers.current_sample import RECORD, Reading
from megavlm.workers.fatal_samples import FatalSamples
from megavlm.workers.worker_processes import WorkerRows, rows_from_workers

FATAL = 7  # the index of the sample that kills


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    path = tmp_path_factory.mktemp("fatal") / "texts.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{n}: " + "word " * (1 + 5 * n % 7)}) for n in range(20)))
    return path


@pytest.fixture
def load(texts, make_renderer, tmp_path, monkeypatch):
    """load(workers): a loader of the run in tmp_path / "run"; closed at the end."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)  # seconds to wait for an end
    loaders = []

    def load(workers=2, output=tmp_path / "run"):
        settings = DataSettings(train=[{"path": texts}], seq_length=64, workers=workers, packing_buffer=6)
        renderer = make_renderer(seq_length=64)
        loaders.append(build_loader(settings, renderer, "pretrain", dp_rank=0, dp_size=1, seed=0, output=output))
        return loaders[-1]

    yield load
    for loader in loaders:
        loader.close()


def when_read(monkeypatch, part, indices, do):
    """Calls `do` when the record or the pixels of one of these samples are read."""
    if part == "record":
        draft_unit = rows_module.draft_unit
        monkeypatch.setattr(
            rows_module, "draft_unit", lambda r, f, index, k: (index in indices and do(), draft_unit(r, f, index, k))[1]
        )
    else:
        complete = Renderer.complete
        monkeypatch.setattr(
            Renderer, "complete", lambda r, draft, *p: (draft.index in indices and do(), complete(r, draft, *p))[1]
        )


def dies(by=signal.SIGSEGV):
    return lambda: os.kill(os.getpid(), by)


def fails():
    raise ValueError("damaged")


def contents(row):
    return (row.sources, row.loader_state, *(t.tolist() for t in vars(row).values() if torch.is_tensor(t)))


def skipped(rows):
    """Line and cause of the broken samples; others are too long."""
    broken = [s for row in rows for s in row.skipped_samples if s.kind == BROKEN]
    return {s.sample.rpartition(":")[2]: s.cause for s in broken}


@pytest.mark.parametrize(("part", "number"), [("pixels", signal.SIGSEGV), ("record", signal.SIGKILL)])
def test_a_sample_that_kills_its_worker_is_passed_over_and_all_other_rows_are_the_same(
    load, monkeypatch, caplog, part, number
):
    """They are those of a run in which the sample fails at the same place with an exception; also after a resume.

    A signal that may come from outside is given a second chance.
    """
    with monkeypatch.context() as patch:
        when_read(patch, part, {FATAL}, fails)
        expected = [contents(row) for row in islice(load(output=None), 12)]
    when_read(monkeypatch, part, {FATAL}, dies(number))
    loader, found, states = load(), [], []
    for _ in range(12):
        states.append(loader.state_dict())
        found.append(next(loader))
    assert [contents(row) for row in found] == expected
    ((line, cause),) = skipped(found).items()
    assert line == str(FATAL + 1)
    assert f"the data worker was killed by signal {int(number)} ({number.name}" in cause
    assert cause.endswith("while reading it")
    told = [f"texts.jsonl:{FATAL + 1}: the data worker was killed" in r.getMessage() for r in caplog.records]
    assert told == ([True, True] if number == signal.SIGKILL else [True])

    caplog.clear()
    resumed = load()
    resumed.load_state_dict(states[2])
    assert [contents(row) for row in islice(resumed, 10)] == expected[2:]
    assert not caplog.records  # nothing died again


def test_without_workers_a_sample_is_passed_over_after_the_process_died_twice(load, monkeypatch, caplog):
    """Once may have been a time limit of the cluster: a run that is killed continues with the same rows."""
    when_read(monkeypatch, "pixels", {FATAL}, dies(signal.SIGKILL))
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=lambda: list(islice(load(0), 12)))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    loader = load(0)
    assert "it is passed over from now on" in caplog.text
    assert skipped(islice(loader, 12)) == {str(FATAL + 1): "the process died twice while reading it"}


def test_an_orderly_end_without_workers_accuses_no_sample(load, monkeypatch, caplog, tmp_path):
    when_read(monkeypatch, "pixels", {FATAL}, fails)
    assert skipped(islice(load(0), 12)) == {str(FATAL + 1): "ValueError: damaged"}
    load(0)
    assert not caplog.records
    assert not (tmp_path / "run" / "fatal_samples" / "list.jsonl").exists()


def test_a_worker_that_dies_between_rows_costs_no_row_and_disturbs_no_step(load, caplog):
    """torch's own handler of SIGCHLD would raise in the middle of whatever the trainer does then."""
    expected = [contents(row) for row in islice(load(output=None), 8)]
    before = set(multiprocessing.active_children())
    loader = load()
    found = [contents(next(loader)) for _ in range(3)]
    worker = next(child for child in multiprocessing.active_children() if child not in before)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.3)  # interrupted by the signal, in which an exception would be raised
    found += [contents(next(loader)) for _ in range(5)]
    assert found == expected
    assert "was killed by signal 9" in caplog.text


def break_off():
    raise EOFError


@dataclass
class Row:
    pass


class BrokenOff(Row):
    """A row whose connection breaks while it is received."""

    def __reduce__(self):
        return break_off, ()


class DyingRows(WorkerRows[Row]):
    """The first worker dies slowly while its row is received; all others make one row."""

    def __init__(self, output):
        self.fatal, self.died = FatalSamples([], 1), output / "died"

    def rows_of(self, process):
        if self.died.exists():
            yield Row()
            return
        self.died.touch()
        yield BrokenOff()
        time.sleep(0.1)  # until torch's thread has sent it
        libc = ctypes.PyDLL(None)  # its calls keep the interpreter's lock: no other thread sees that its files are gone
        os.closerange(3, 1 << 16)
        libc.sleep(1)
        os.kill(os.getpid(), signal.SIGSEGV)

    def taken(self, row):
        pass


def test_a_death_is_seen_although_the_files_of_a_dying_process_are_closed_before_it_has_a_status(tmp_path, caplog):
    assert list(rows_from_workers(DyingRows(tmp_path), 1)) == [Row()]
    assert "was killed by signal 11" in caplog.text


def test_many_fatal_samples_in_a_row_end_the_run_in_words_and_the_next_start_goes_on(load, monkeypatch):
    fatal = set(range(15))  # more than the first row can do without, as six of the others are read for it
    when_read(monkeypatch, "record", fatal, dies())
    with pytest.raises(RunFailure, match="the 4th in a row without a row of data") as caught:
        list(islice(load(1), 12))
    assert "texts.jsonl:" in str(caught.value)
    for _ in range(3):
        try:
            assert skipped(islice(load(1), 12)).keys() == {str(index + 1) for index in fatal}
            break
        except RunFailure:
            continue
    else:
        pytest.fail("the starts pass over no samples")


@dataclass
class NamedSource:
    """A source of one sample."""

    name: str

    @property
    def file(self):
        return self

    def source(self, index):
        return f"{self.name}:{index + 1}"

    def __len__(self):
        return 1


def test_a_line_end_in_the_name_of_a_file_does_not_end_its_line_in_the_list(tmp_path):
    sources = [NamedSource("a\u2028b\x85.jsonl")]
    found = Reading(RECORD, 0, 0)
    FatalSamples(sources, 0, tmp_path)._add(found, "it died", certain=True)
    with pytest.raises(UserError, match="it died"):
        FatalSamples(sources, 0, tmp_path).check(*found)


@pytest.fixture
def read_once(texts, renderer, tmp_path, monkeypatch):
    """read_once(workers): (the numbers of the samples that were read, {line: cause} of the others)."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.2)

    def read_once(workers):
        samples = EvalSamples(open_file(texts), renderer, "prompt", range(20), workers, tmp_path / "run")
        numbers = [samples.about[sample.index]["index"] for sample in samples]
        return numbers, {s.sample.rpartition(":")[2]: s.cause for s in samples.take_skipped()}

    return read_once


OTHERS = [index for index in range(20) if index != FATAL]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL])
def test_a_sample_that_kills_its_worker_costs_only_itself_when_a_file_is_read_once(
    read_once, monkeypatch, caplog, tmp_path, number
):
    when_read(monkeypatch, "pixels", {2 * FATAL}, dies(number))  # numbers of EvalSample
    numbers, causes = read_once(2)
    assert numbers == OTHERS
    assert list(causes) == [str(FATAL + 1)]
    assert f"was killed by signal {int(number)} ({number.name}" in causes[str(FATAL + 1)]
    assert len(caplog.records) == (2 if number == signal.SIGKILL else 1)
    assert [path.name for path in (tmp_path / "run" / "fatal_samples").iterdir()] == ["eval_list.jsonl"]
    caplog.clear()
    assert read_once(2) == (numbers, causes)
    assert not caplog.records  # nothing died again


def test_a_file_that_is_read_once_without_workers_is_read_at_the_third_start(read_once, monkeypatch):
    when_read(monkeypatch, "pixels", {2 * FATAL}, dies())
    for _ in range(2):
        child = multiprocessing.get_context("fork").Process(target=read_once, args=(0,))
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGSEGV
    assert read_once(0) == (OTHERS, {str(FATAL + 1): "the process died twice while reading it"})
