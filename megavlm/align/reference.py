"""The reference's log-probabilities of all answers: worked out once with the weights that training starts from.

They stand in a safetensors file, float32 [samples, 2] for each source (chosen and rejected, or own and foreign answer;
NaN for a sample that cannot be used), with a note on model and data, and are used again where the note agrees.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import load, save
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from megavlm.align.sequences import answer_logprobs
from megavlm.base.atomic_files import atomic_open
from megavlm.base.errors import UserError
from megavlm.checkpoint.fingerprint import digest_of, digest_of_folders
from megavlm.checkpoint.folders import find_checkpoint, latest
from megavlm.checkpoint.load_weights import load_weights
from megavlm.config.settings import Settings
from megavlm.data.answer_groups import draft_unit
from megavlm.data.files import File
from megavlm.data.records import Kind
from megavlm.data.renderer import Draft, DraftError, Renderer
from megavlm.data.row import Annotations, Row
from megavlm.data.shards import ShardFolder
from megavlm.data.sources import Source
from megavlm.model.language import LanguageModel
from megavlm.platform.collectives import on_first_rank
from megavlm.runtime.eval_rows import EvalRows
from megavlm.runtime.feed import MicroBatch
from megavlm.runtime.forward import forward_only
from megavlm.runtime.session import Session

FILE_NAME = "reference.safetensors"
# Settings on which log-probabilities depend, beside the model.
_SETTINGS = ("min_pixels", "max_pixels", "video_fps", "video_max_frames", "seq_length")


class Reference:
    """Looks up a row's reference log-probabilities. Made by ``reference_of``."""

    def __init__(self, tables: list[np.ndarray]):
        self.tables = tables

    def attach(self, rows: Iterator[Row]) -> Iterator[Row]:
        """The same rows, their annotations with ``ref_logprob``. Raises UserError for a sample without one."""
        for row in rows:
            annotated = []
            samples = zip(row.sources, row.source_ids, row.indices, row.annotations, strict=True)
            for name, source, index, annotations in samples:
                value = float(self.tables[source][index, _column(annotations)])
                if np.isnan(value):
                    raise UserError(
                        f"{name}: the reference file has no log-probability for it: when the file was "
                        "made it could not be read, or (with another data.pad_multiple) was longer than a row",
                        "remove the file: it is made again",
                    )
                annotated.append(replace(annotations, ref_logprob=value))
            yield replace(row, annotations=annotated)


def reference_of(
    session: Session,
    renderer: Renderer | None,
    sources: list[Source] | None,
    kind: Kind,
    heartbeat: Callable[[str], None],
) -> Reference:
    """Reads the reference file, or makes it. Call it on all ranks; afterwards the model's weights may be others.

    Args:
        renderer, sources: of the training data, on leaders.
        heartbeat: called with what is being done whenever there is progress.

    Raises:
        UserError: on all ranks, the file is of another model, other data or other settings.
    """
    settings = session.settings
    path = settings.align.reference or settings.output / FILE_NAME

    def stored() -> list[np.ndarray] | None:
        if not path.exists():
            return None
        try:
            return _read(path, _note(settings, sources, kind), len(sources))
        except UserError:
            # the file of this output folder may be of other data, if no step was done since it was written
            if settings.align.reference is not None or latest(settings.output / "checkpoints") is not None:
                raise
            return None

    tables = on_first_rank(stored, session.groups.world_host)
    if tables is None:
        tables = _make(session, renderer, sources, kind, heartbeat)
        if session.is_first:
            note = json.dumps(_note(settings, sources, kind))
            with atomic_open(path, "wb") as file:
                file.write(save({str(n): t for n, t in enumerate(tables)}, metadata={"note": note}))
    return Reference(tables)


def _make(
    session: Session,
    renderer: Renderer | None,
    sources: list[Source] | None,
    kind: Kind,
    heartbeat: Callable[[str], None],
) -> list[np.ndarray]:
    settings, vlm, groups = session.settings, session.vlm, session.groups
    if session.adapters is None:  # adapters are where they start from
        load_weights(find_checkpoint(settings.model.load), vlm)
    vlm.train(False)
    rows = None
    if groups.is_leader:
        dataset = _AllAnswers(sources, renderer, kind, groups.dp_rank, groups.dp_size)
        workers = settings.data.workers
        rows = iter(DataLoader(dataset, batch_size=None, num_workers=workers, generator=torch.Generator()))
    chunk_tokens = settings.train.logprob_chunk_tokens

    def answers(chunk: LanguageModel, hidden: Tensor, micro_batch: MicroBatch) -> Tensor:
        logprobs, _ = chunk.token_logprobs(hidden, micro_batch.targets, chunk_tokens)
        return answer_logprobs(logprobs, micro_batch, groups.language.cp)

    evaluated, found = EvalRows(session, rows, "reference", size=settings.parallel.pipeline), []
    is_reporting_rank = (
        groups.language.tp.rank() == 0 and groups.language.cp.rank() == 0
    )  # for its row, if on the last stage
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
        made = [np.full((len(source.file), 2), np.nan, dtype=np.float32) for source in sources]
        for source, index, column, value in found:
            made[source][index, column] = value
        return made

    return on_first_rank(tables, groups.world_host)


class _AllAnswers(IterableDataset[Row]):
    """Every sample of every source once, in rows filled as they come, dealt to data ranks and their workers."""

    def __init__(self, sources: list[Source], renderer: Renderer, kind: Kind, dp_rank: int, dp_size: int):
        self.sources, self.renderer, self.kind = sources, renderer, kind
        self.dp_rank, self.dp_size = dp_rank, dp_size

    def __iter__(self) -> Iterator[Row]:
        info = torch.utils.data.get_worker_info()
        number, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        first, stride = self.dp_rank + self.dp_size * number, self.dp_size * workers
        waiting: list[Draft] = []
        places = [(source, index) for source, s in enumerate(self.sources) for index in range(len(s.file))]
        for source, index in places[first::stride]:
            try:
                draft = draft_unit(self.renderer, self.sources[source].file, index, self.kind)
            except Exception:  # training tells of it
                continue
            for sample in (draft, *draft.followers):
                sample.source_id = source
            tokens = sum(other.padded_length(self.renderer.pad_multiple) for other in (*waiting, draft))
            if waiting and tokens > self.renderer.seq_length:
                yield from self._row(waiting)
                waiting = []
            waiting.append(draft)
        yield from self._row(waiting)

    def _row(self, drafts: list[Draft]) -> Iterator[Row]:
        while drafts:
            try:
                yield self.renderer.complete_row(drafts)
                return
            except DraftError as error:
                drafts.pop(error.place)


def _column(annotations: Annotations) -> int:
    """The column of the table that holds an answer: 0 of its record's own answer, 1 of the further one."""
    return int(annotations.is_further_answer)


def _note(settings: Settings, sources: list[Source], kind: Kind) -> dict:
    """What the log-probabilities depend on, as far as names, sizes, and the beginnings and ends of files tell it."""
    folders = [find_checkpoint(path) for path in (settings.model.load, settings.model.adapter) if path is not None]
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
        | {"precision": settings.train.precision, "quantize": settings.adapter.quantize},
    }


def _read(path: Path, note: dict, num_sources: int) -> list[np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            found = json.loads(file.metadata()["note"])
        tables = load(path.read_bytes())
    except Exception as error:
        raise UserError(
            f"{path} is no file of reference log-probabilities: {error}", "remove it, or name another"
        ) from None
    names = {"model": "another model (model.load)", "data": "other data", "kind": "another method", "settings":
             "other settings of data or precision", "processor": "another processor (model.hf)"}  # fmt: skip
    different = [words for name, words in names.items() if found.get(name) != note[name]]
    if different:
        raise UserError(
            f"the reference file {path} was made with {', '.join(different)}",
            "name another one in align.reference, or leave it out: it is made anew",
        )
    return [tables[str(number)] for number in range(num_sources)]
