"""The reference model's log-probabilities of all answers, computed once with the weights that training starts from.

They are stored in a safetensors file: float32 [samples, 2] for each source, with the columns chosen and rejected
answer, or own and mismatched answer; NaN for a sample that cannot be used. The file has a note that identifies the
model and the data. A later start uses the file again if the note matches.
"""

import json
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load, save
from torch import Tensor
from torch.utils.data import IterableDataset

from megavlm.align.sequences import answer_logprobs
from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.checkpoint.fingerprint import digest_of, digest_of_folders
from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.load_weights import load_weights
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.data.answer_groups import draft_unit
from megavlm.data.draft import Draft, DraftError
from megavlm.data.renderer import Renderer
from megavlm.data.row import Annotations, Row
from megavlm.data.shards import ShardFolder
from megavlm.data.shared_memory import received, sent
from megavlm.data.sources import Source
from megavlm.data.worker_processes import in_workers
from megavlm.media.files import File
from megavlm.model.language import LanguageModel
from megavlm.platform.collectives import on_first_rank
from megavlm.records.records import Kind
from megavlm.runtime.eval_rows import EvalRows
from megavlm.runtime.feed import MicroBatch
from megavlm.runtime.forward import forward_only
from megavlm.runtime.session import Session

FILE_NAME = "reference.safetensors"
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
                        "remove the reference file; the next start writes it again",
                    )
                annotated.append(replace(annotations, ref_logprob=value))
            yield replace(row, annotations=annotated)


@dataclass(frozen=True)
class AnswerData:
    """The training data of a leader: its sources, and the renderer of their samples."""

    sources: list[Source]
    renderer: Renderer


def reference_of(session: Session, data: AnswerData | None, kind: Kind, heartbeat: Callable[[str], None]) -> Reference:
    """Reads the reference file, or computes and writes it. Call it on all ranks; it may change the model's weights.

    Args:
        session: the session of the run.
        data: the training data, on leaders; None on the other ranks.
        kind: how the records are rendered.
        heartbeat: called with a short description of what was done, after each sign of progress.

    Raises:
        UserError: on all ranks, if the file belongs to another model, other data or other settings.
    """
    settings = session.settings
    output = required(settings.output, "output")
    path = settings.align.reference or output / FILE_NAME

    def stored() -> list[np.ndarray] | None:
        if not path.exists():
            return None
        sources = _on_leader(data).sources
        try:
            return _read(path, _note(settings, sources, kind), len(sources))
        except UserError:
            # A run that has no checkpoint yet may have been started again with other data: compute the file again.
            if settings.align.reference is not None or latest(output / "checkpoints") is not None:
                raise
            return None

    tables = on_first_rank(stored, session.groups.world_host)
    if tables is None:
        tables = _make(session, data, kind, heartbeat)
        if session.is_first:
            note = json.dumps(_note(settings, _on_leader(data).sources, kind))
            with atomic_open(path, "wb") as file:
                file.write(save({str(n): t for n, t in enumerate(tables)}, metadata={"note": note}))
    return Reference(tables)


def _on_leader(data: AnswerData | None) -> AnswerData:
    assert data is not None, "rank 0 is a leader"
    return data


def _make(session: Session, data: AnswerData | None, kind: Kind, heartbeat: Callable[[str], None]) -> list[np.ndarray]:
    """Computes the tables with the weights of ``model.load`` and ``model.adapter``."""
    settings, vlm, groups = session.settings, session.vlm, session.groups
    if session.adapters is None:  # adapters already have their first values
        load_weights(find_checkpoint(required(settings.model.start, "model.load")), vlm)
    vlm.train(False)
    rows = None
    if data is not None:
        dataset = _AllAnswers(data, kind, groups.dp_rank, groups.dp_size)
        rows = received(iter(in_workers(dataset, settings.data.workers)))
    chunk_tokens = settings.train.logprob_chunk_tokens

    def answers(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        logprobs, _ = chunk.token_logprobs(hidden, micro_batch.targets, chunk_tokens)
        return answer_logprobs(logprobs, micro_batch, groups.language.cp)

    evaluated = EvalRows(session, rows, "reference", size=settings.parallel.pipeline)
    found: list[tuple[int, int, int, float]] = []  # source, index, column, log-probability
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
    found = evaluated.gather(found)
    vlm.train()

    def tables() -> list[np.ndarray]:
        sources = _on_leader(data).sources
        made = [np.full((len(source.file), 2), np.nan, dtype=np.float32) for source in sources]
        for source, index, column, value in found:
            made[source][index, column] = value
        return made

    return on_first_rank(tables, groups.world_host)


class _AllAnswers(IterableDataset[Row | UserError]):
    """Every sample of every source once, packed in order; data-parallel ranks and their workers divide the samples."""

    def __init__(self, data: AnswerData, kind: Kind, dp_rank: int, dp_size: int):
        self.sources, self.renderer, self.kind = data.sources, data.renderer, kind
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[Row | UserError]:
        return sent(self._rows())

    def _rows(self) -> Iterator[Row]:
        info = torch.utils.data.get_worker_info()
        number, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        first, stride = self.dp_rank + self.dp_size * number, self.dp_size * workers
        waiting: list[Draft] = []
        filled = 0  # tokens of the waiting drafts
        ends = list(accumulate(len(source.file) for source in self.sources))
        for place in range(first, ends[-1], stride):  # numbers the samples of all sources
            source = bisect_right(ends, place)
            index = place - (ends[source - 1] if source else 0)
            try:
                draft = draft_unit(self.renderer, self.sources[source].file, index, self.kind)
            except Exception:  # training reports broken samples
                continue
            for sample in (draft, *draft.followers):
                sample.source_id = source
            tokens = draft.padded_length(self.renderer.pad_multiple)
            if waiting and filled + tokens > self.renderer.seq_length:
                yield from self._row(waiting)
                waiting, filled = [], 0
            waiting.append(draft)
            filled += tokens
        yield from self._row(waiting)

    def _row(self, drafts: list[Draft]) -> Iterator[Row]:
        while drafts:
            try:
                yield self.renderer.complete_row(drafts)
                return
            except DraftError as error:
                drafts.pop(error.place)


def _column(annotations: Annotations) -> int:
    """Returns the column of the table for an answer: 0 for the first answer of its record, 1 for the further one."""
    return int(annotations.is_further_answer)


def _note(settings: Settings, sources: list[Source], kind: Kind) -> dict:
    """Identifies what the log-probabilities depend on; for files, see ``digest_of``."""
    folders = [find_checkpoint(path) for path in (settings.model.start, settings.model.adapter) if path is not None]
    files = [s.file.index_files if isinstance(s.file, ShardFolder) else [s.file.path] for s in sources]
    return {
        "kind": kind,
        "model": digest_of_folders(*folders),
        "processor": digest_of([File(str(p)) for p in sorted(settings.model.hf.glob("*.json*"))]),
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
            found = json.loads(file.metadata()["note"])
        tables = load(path.read_bytes())
    except Exception as error:
        raise UserError(
            f"{path} is not a file of reference log-probabilities: {error}",
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
