"""Runs the model on all samples of ``data.eval``, whatever some of them contain, and writes a file of results."""

from collections.abc import Callable, Iterator
from typing import Any, Literal

from rich.progress import Progress

from megavlm.checkpoint.fingerprint import describe_samples, digest_of_paths
from megavlm.config.requirements import required
from megavlm.data.eval_samples import EvalSamples, meaningless_sample
from megavlm.data.renderer import Renderer
from megavlm.data.row import Row, Sample
from megavlm.runtime.eval_rows import PROGRESS, EvalRows, note_settings
from megavlm.runtime.feed import Window
from megavlm.runtime.results import Results
from megavlm.runtime.session import Session
from megavlm.runtime.weights import Weights
from megavlm.sources.blend import open_eval_sources
from megavlm.sources.open_files import Joined, SampleFile

# Settings of the data section on which results depend, beside the limits of pictures and videos.
_DATA = {"eval", "seq_length", "packing", "pad_multiple", "too_long", "append_eos"}


class Evaluation:
    """One pass over ``data.eval``. Create it on all ranks.

    Args:
        session: the session of the command.
        weights: what it has loaded.
        renderer: renders the samples.
        name: the name of the file of results in ``output``.
        kind: "prompt" or "tune".
        made_with: settings of the verb on which the results depend, recorded beside them.

    Raises:
        UserError: see ``Results``; ``data.eval`` cannot be read.
    """

    def __init__(
        self,
        session: Session,
        weights: Weights,
        renderer: Renderer,
        name: str,
        kind: Literal["prompt", "tune"],
        made_with: dict[str, dict[str, Any]],
    ):
        self._session, self._renderer, self._kind = session, renderer, kind
        settings = session.settings
        data, self.path = settings.data, required(settings.output, "output") / name
        of_data = data.model_dump(mode="json", include={"eval", "media_roots", "media_protocols"})
        note = {"weights": weights.note(), "data": of_data, **made_with}

        def identity() -> dict[str, Any]:
            of_data = data.model_dump(mode="json", include=_DATA) | data.limits
            return {
                "weights": f"{weights}, files {weights.digest()}",
                "model.hf": str(settings.model.hf),
                "files of model.hf": digest_of_paths(settings.model.hf.glob("*.j*")),
                "model.kernels": settings.model.kernels,
                "model.resize_vocabulary": settings.model.resize_vocabulary,
                "adapter.quantize": settings.adapter.quantize,
                "train.precision": settings.train.precision,
                **{f"data.{key}": value for key, value in of_data.items()},
                "content of data.eval": describe_samples(self.file()),
                **{f"{part}.{key}": value for part, values in made_with.items() for key, value in values.items()},
            }

        self._results = Results(session, self.path, note, identity)
        if session.is_first:
            note_settings(settings)

    def run(
        self,
        what: str,
        rows_of: Callable[[Iterator[Sample]], Iterator[Row]],
        compute: Callable[[Window], list[dict[str, Any]]],
        size: int = 1,
    ) -> tuple[list[dict[str, Any]], str]:
        """Reads all samples and publishes the results. Call it on all ranks.

        Args:
            what: label of the progress bar.
            rows_of: packs samples into rows.
            compute: returns the results of a window on the leader: one of each sample of its rows in their order, with
                ``index``.
            size: number of rows of a window.

        Returns:
            See ``Results.publish``.

        Raises:
            UserError: no sample can be used; the disk is full.
        """
        session, renderer, (samples, _) = self._session, self._renderer, self._samples()
        rows = rows_of(iter(samples)) if samples is not None else None
        filler = lambda: next(rows_of(iter([meaningless_sample(renderer)])))
        for window, real in EvalRows(session, rows, what, size, filler):
            found = compute(window)
            if samples is None:
                self._results.take([], [])
                continue
            count = sum(micro_batch.host.num_samples for micro_batch in window.micro_batches[:real])
            done = [{**samples.about.pop(line.pop("index")), **line} for line in found[:count]]
            self._results.take(done, samples.take_skipped())
        self._results.take([], samples.take_skipped() if samples is not None else [])
        return self._results.publish(self._names())

    def stream(
        self, what: str, results_of: Callable[[Iterator[Sample] | None], Iterator[dict[str, Any]]]
    ) -> tuple[list[dict[str, Any]], str]:
        """As ``run``, for results that come one by one, in any order and on each rank at other times.

        Args:
            what: label of the progress bar.
            results_of: yields a result with ``index`` for each sample; the samples are None except on leaders.
        """
        (samples, count), ranks = self._samples(), self._session.groups.dp_size
        with Progress(*PROGRESS, disable=not self._session.is_first) as bar:
            label = what if ranks == 1 else f"{what}, share of the first of {ranks} data-parallel ranks"
            task = bar.add_task(label, total=count)
            for line in results_of(iter(samples) if samples is not None else None):
                assert samples is not None, "results come on leaders"
                about = samples.about.pop(line.pop("index"))
                skipped = samples.take_skipped()
                self._results.keep([{**about, **line}], skipped)
                bar.update(task, advance=1 + len(skipped))
        self._results.take([], samples.take_skipped() if samples is not None else [])
        return self._results.publish(self._names())

    def _samples(self) -> tuple[EvalSamples | None, int]:
        """The samples of this data-parallel rank that are not done yet, on its leader, and how many these are."""
        session, groups = self._session, self._session.groups
        if not groups.is_leader:
            return None, 0
        file = self.file()
        mine = [i for i in range(groups.dp_rank, len(file), groups.dp_size) if i not in self._results.done]
        workers, output = session.settings.data.workers, self.path.parent
        return EvalSamples(file, self._renderer, self._kind, mine, workers, output, groups.dp_rank), len(mine)

    def file(self) -> SampleFile:
        """All samples of ``data.eval``."""
        return Joined("data.eval", [source.file for source in open_eval_sources(self._session.settings.data)])

    def _names(self) -> str:
        return ", ".join(str(source.path) for source in self._session.settings.data.eval)
