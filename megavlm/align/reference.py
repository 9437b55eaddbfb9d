"""The reference model's log-probabilities of all answers, computed once with the weights that training starts from.

They are stored in a safetensors file: float32 [samples, 2] for each source, with the columns chosen and rejected
answer, or own and mismatched answer; NaN for a sample that cannot be used. Further rejected answers have further
columns. The file has a note that identifies the model and the data, and a digest of each record. A later start uses the
file again if the note matches. Where only the data differ, as after a repair, or samples could not be used, it computes
what has changed or is missing, and keeps the rest. While it is computed, a file ``*.partial`` of the same kind has what
is known so far and where each data worker is, so that an interrupted start is continued.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import load, save
from torch import Tensor

from megavlm.align.record_digests import kept_rows, record_digests
from megavlm.align.reference_rows import AllAnswers, AnswerData, Progress, unimportant_row
from megavlm.align.sequences import answer_logprobs
from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.base.json_files import parse_json
from megavlm.base.quoting import shortened
from megavlm.checkpoint.fingerprint import digest_of, digest_of_folders, digest_of_paths
from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.load_weights import load_weights
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.row import Annotations, Row
from megavlm.media.files import File
from megavlm.model.language import LanguageModel
from megavlm.platform.collectives import on_first_rank
from megavlm.records.records import Kind
from megavlm.runtime.eval_rows import EvalRows
from megavlm.runtime.feed import MicroBatch
from megavlm.runtime.forward import forward_only
from megavlm.runtime.session import Session
from megavlm.sources.blend import Source
from megavlm.workers.worker_processes import rows_from_workers

FILE_NAME = "reference.safetensors"
HELD_OUT = "reference_held_out.safetensors"
_DIGESTS = "digests."  # begins the names of the digests of records, int64 [samples] for each source
_SAVED_EVERY = 60.0  # seconds between two partial files
# Settings of the section data that the log-probabilities depend on.
_SETTINGS = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "seq_length")
# Those that are named only if they are set, so that files written before the settings existed are still read.
_LATER_SETTINGS = ("video_min_pixels", "video_max_pixels", "video_max_pixels_per_frame")


class Reference:
    """Looks up the reference log-probabilities of the answers of rows. ``reference_of`` makes it."""

    def __init__(self, tables: list[np.ndarray]):
        self.tables = tables

    def attach(self, rows: Iterator[Row]) -> Iterator[Row]:
        """Yields the same rows with ``ref_logprob`` in their annotations. Raises UserError for a sample without one."""
        for row in rows:
            annotated = []
            samples = zip(row.sources, row.source_ids, row.indices, row.annotations, strict=True)
            for name, source, index, annotations in samples:
                value = float(self.tables[source][index, _column(annotations)])
                if np.isnan(value):
                    raise UserError(
                        f"{name}: the reference file has no log-probability for this sample. When the file was "
                        "written, the sample could not be read, or (with another data.pad_multiple) it was longer "
                        "than a row",
                        "start again: a start computes what is missing, unless align.reference names the file",
                    )
                annotated.append(replace(annotations, ref_logprob=value))
            yield replace(row, annotations=annotated)


def reference_of(
    session: Session,
    data: AnswerData | None,
    kind: Kind,
    heartbeat: Callable[[str], None],
    *,
    held_out: bool = False,
) -> Reference:
    """Reads the reference file, or computes and writes it. Call it on all ranks; it may change the model's weights.

    Args:
        session: the session of the run.
        data: the training data, on leaders; None on the other ranks.
        kind: how the records are rendered.
        heartbeat: called with a short description of what was done, after each sign of progress.
        held_out: the data is that of data.eval, which may change at any time; it has a file of its own.

    Raises:
        UserError: on all ranks, if the file belongs to another model, other data or other settings.
    """
    settings = session.settings
    output = required(settings.output, "output")
    given = None if held_out else settings.align.reference
    path = output / HELD_OUT if held_out else given or output / FILE_NAME

    def stored() -> tuple[list[np.ndarray], bool] | None:
        """What the file has, and whether it is all that can be had."""
        if not path.exists():
            return None
        sources = _on_leader(data).sources
        note = _note(settings, sources, kind)
        try:
            tables = _read(path, note, len(sources))
        except UserError:
            if given is not None:
                raise
            if (kept := _kept(path, note, sources)) is not None:
                return kept, False
            # A run that has no checkpoint yet may have been started again with other data: compute the file again.
            if not held_out and latest(output / "checkpoints") is not None:
                raise
            return None
        return tables, given is not None or not any(np.isnan(table[:, 0]).any() for table in tables)

    tables, is_whole = on_first_rank(stored, session.groups.world_host) or (None, False)
    if not is_whole:
        note = _note(settings, data.sources, kind) if session.is_first and data is not None else {}
        tables = _make(session, data, kind, _Partial(path, note, tables), heartbeat)
        if session.is_first:
            digests = record_digests(_on_leader(data).sources)
            _write(path, tables, {"note": json.dumps(note)}, digests)
            _partial_path(path).unlink(missing_ok=True)
    assert tables is not None
    return Reference(tables)


def _on_leader(data: AnswerData | None) -> AnswerData:
    assert data is not None, "the renderer and the samples are on leaders, of which rank 0 is one"
    return data


class _Partial:
    """What is known of a reference that is being made; used on rank 0.

    Args:
        path: the reference file.
        note: see ``_note``.
        kept: the tables of a finished file of which some rows are to be computed again, NaN there; None: all are.
    """

    def __init__(self, path: Path, note: dict, kept: list[np.ndarray] | None = None):
        self._path, self._note, self._kept = _partial_path(path), note, kept
        self.tables: list[np.ndarray] = []
        self._places: dict[int, int] = {}

    def read(self, sources: list[Source], num_workers: int) -> Progress:
        """Continues from the file of an interrupted start, if it belongs to the same model, data and settings."""
        self.tables = [np.full((len(source.file), 2), np.nan, dtype=np.float32) for source in sources]
        try:
            with safe_open(self._path, "np") as file:
                stored = parse_json(file.metadata()["places"])
            self.tables = _read(self._path, self._note, len(sources))
        except Exception:  # there is none, or it belongs to something else
            if self._kept is None:
                return Progress({})
            self.tables = [table.copy() for table in self._kept]
            return Progress({}, [~np.isnan(table[:, 0]) for table in self.tables])
        if stored["workers"] != num_workers:
            return Progress({}, [~np.isnan(table[:, 0]) for table in self.tables])
        self._places = {int(worker): place for worker, place in stored["places"].items()}
        return Progress(self._places)

    def add(self, found: list[tuple[int, int, int, float]]) -> None:
        """Adds log-probabilities: source, index, column, value."""
        for source, index, column, value in found:
            width = self.tables[source].shape[1]
            if column >= width:
                more = ((0, 0), (0, column + 1 - width))
                self.tables[source] = np.pad(self.tables[source], more, constant_values=np.nan)
            self.tables[source][index, column] = value

    def save(self, places: list[dict[int, int]], num_workers: int) -> None:
        """Writes the file; ``places`` are those of the leaders. A full disk is no error, as it is only a precaution."""
        for of_rank in places:
            self._places |= of_rank
        stored = json.dumps({"workers": num_workers, "places": self._places})
        with suppress(OSError):
            _write(self._path, self.tables, {"note": json.dumps(self._note), "places": stored})


def _is_due(saved: float) -> bool:
    return time.monotonic() - saved >= _SAVED_EVERY


def _partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _write(path: Path, tables: list[np.ndarray], metadata: dict[str, str], digests: Sequence[np.ndarray] = ()) -> None:
    arrays = {str(number): table for number, table in enumerate(tables)}
    arrays |= {f"{_DIGESTS}{number}": found for number, found in enumerate(digests)}
    with atomic_open(path, "wb") as file:
        file.write(save(arrays, metadata=metadata))


def _kept(path: Path, note: dict, sources: list[Source]) -> list[np.ndarray] | None:
    """The tables without the rows of changed records; None if more than the data differs, or nobody can tell."""
    try:
        with safe_open(path, "np") as file:
            found = parse_json(file.metadata()["note"])
        arrays = load(path.read_bytes())
        tables = [arrays[str(number)] for number in range(len(sources))]
        before = [arrays[f"{_DIGESTS}{number}"] for number in range(len(sources))]
    except Exception:  # it is damaged, or from before there were digests
        return None
    names = [source[0] for source in found.get("data", [])]
    is_repaired = {**found, "data": None} == {**note, "data": None} and names == [source.name for source in sources]
    return kept_rows(tables, before, record_digests(sources)) if is_repaired else None


def _make(
    session: Session, data: AnswerData | None, kind: Kind, known: _Partial, heartbeat: Callable[[str], None]
) -> list[np.ndarray]:
    """Computes the tables with the weights of ``model.load`` and ``model.adapter``."""
    settings, vlm, groups = session.settings, session.vlm, session.groups
    if session.adapters is None:  # adapters already have their first values
        load_weights(find_checkpoint(required(settings.model.start, "model.load")), vlm)
    vlm.train(False)
    workers = settings.data.workers
    num_workers = groups.dp_size * max(workers, 1)
    progress = on_first_rank(lambda: known.read(_on_leader(data).sources, num_workers), groups.world_host)
    dataset = rows = None
    if data is not None:
        dataset = AllAnswers(data, kind, groups.dp_rank, groups.dp_size, workers, progress)
        rows = rows_from_workers(dataset, workers)
    chunk_tokens = settings.train.logprob_chunk_tokens

    def answers(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        logprobs, _ = chunk.token_logprobs(hidden, micro_batch.targets, chunk_tokens)
        return answer_logprobs(logprobs, micro_batch, groups.language.cp)

    filler = lambda: unimportant_row(_on_leader(data).renderer)
    evaluated = EvalRows(session, rows, "reference", size=settings.parallel.pipeline, filler=filler)
    found: list[tuple[int, int, int, float]] = []  # source, index, column, log-probability
    saved = time.monotonic()
    # One rank of the last pipeline stage reports each row; on the other stages, forward_only returns [].
    is_reporting_rank = groups.language.tp.rank() == 0 and groups.language.cp.rank() == 0
    for window, real in evaluated:
        results = forward_only(vlm, window, answers)
        heartbeat("the reference's log-probabilities")
        for micro_batch, result in zip(
            window.micro_batches[:real], results[:real] if is_reporting_rank else [], strict=False
        ):
            row = micro_batch.host
            columns = [_column(annotations) for annotations in row.annotations]
            found += zip(row.source_ids, row.indices, columns, result.tolist(), strict=True)
        if on_first_rank(partial(_is_due, saved), groups.world_host):
            known.add(evaluated.gather(found))
            places = evaluated.gather([dataset.places] if dataset is not None else [])
            if session.is_first:
                known.save(places, num_workers)
            found, saved = [], time.monotonic()
    known.add(evaluated.gather(found))
    vlm.train()
    return on_first_rank(lambda: known.tables, groups.world_host)


def _column(annotations: Annotations) -> int:
    """Returns the column of the table for an answer: 0 for the first answer of its record, then the further ones."""
    return annotations.number + 1 if annotations.is_further_answer else 0


def _note(settings: Settings, sources: list[Source], kind: Kind) -> dict:
    """Identifies what the log-probabilities depend on; for files, see ``digest_of``."""
    folders = [find_checkpoint(path) for path in (settings.model.start, settings.model.adapter) if path is not None]
    files = [source.file.index_files for source in sources]
    return {
        "kind": kind,
        "model": digest_of_folders(*folders),
        "processor": digest_of_paths(settings.model.hf.glob("*.json*")),
        "data": [
            [source.name, len(source.file), digest_of([File(path) for path in paths])]
            for source, paths in zip(sources, files, strict=True)
        ],
        "settings": {name: getattr(settings.data, name) for name in _SETTINGS}
        | {name: value for name in _LATER_SETTINGS if (value := getattr(settings.data, name)) is not None}
        | {"precision": settings.train.precision, "quantize": settings.adapter.quantize},
    }


def _read(path: Path, note: dict, num_sources: int) -> list[np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            found = parse_json(file.metadata()["note"])
        tables = load(path.read_bytes())
    except Exception as error:
        raise UserError(
            f"{path} is not a file of reference log-probabilities: {shortened(error)}",
            "remove it, or set align.reference to another file",
        ) from None
    names = {"model": "another model (model.load)", "data": "other data", "kind": "another method", "settings":
             "other settings of data or precision", "processor": "another processor (model.hf)"}  # fmt: skip
    different = [words for name, words in names.items() if found.get(name) != note[name]]
    if different:
        raise UserError(
            f"the reference file {path} was written with {', '.join(different)}",
            f"set align.reference to another file, or remove {path.name}; then it is computed again, by model.load",
        )
    return [tables[str(number)] for number in range(num_sources)]
