"""Whether the data of a configuration can be used by the verb that is meant, judged by some samples of each source."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from megavlm.align.registry import METHODS, meant, usual
from megavlm.base.errors import UserError
from megavlm.config.settings import Settings
from megavlm.data.answer_groups import likely_kind
from megavlm.data.renderer import Renderer
from megavlm.data.row_plan import RowPlan
from megavlm.data.rows import RowDataset
from megavlm.records.records import Kind
from megavlm.records.skipped_samples import SkippedSample, causes, excess
from megavlm.sources.blend import Source


@dataclass(frozen=True)
class Intended:
    """The verb that is meant to read the data.

    Attributes:
        verb: its name, a key of ``METHODS``.
        because: what it was guessed from; None if it was named.
    """

    verb: str
    because: str | None = None

    @property
    def kind(self) -> Kind:
        """The kind of samples that the verb trains on."""
        return METHODS[self.verb].kind

    @property
    def told(self) -> str:
        """The verb, and what it was guessed from."""
        return self.verb if self.because is None else f"{self.verb}, guessed from {self.because} (--for VERB names it)"


def intended(settings: Settings, sources: Sequence[Source], verb: str | None) -> Intended:
    """The verb for which a configuration is meant: ``verb`` if it is named, otherwise a guess from what is set.

    What the settings leave open is guessed from the first sample of the first source.
    """
    if verb is not None:
        return Intended(verb)
    if (found := meant(settings)) is not None:
        return Intended(*found)
    verb = usual(likely_kind(sources[0].file, "tune") if sources else "tune")
    changed = [f"align.{name}" for name in type(settings.align).model_fields if settings.align.is_changed(name)]
    if not changed:
        return Intended(verb, "the data")
    if set(changed) <= set(METHODS[verb].meant_with_data):
        return Intended(verb, f"{changed[0]} and the data")
    return Intended(usual("pair"), changed[0])  # it uses all that no other method has for itself


def renderer_of(settings: Settings, kind: Kind) -> Renderer:
    """The renderer with which samples of this kind are drafted in training; prompts leave room for an answer."""
    if kind == "prompt":
        return Renderer.of_prompts(settings.model.hf, settings.data, settings.answer_tokens, settings.answer_setting)
    return Renderer(settings.model.hf, settings.data, settings.pad_multiple)


def drafts_of(
    sources: Sequence[Source], renderer: Renderer, kind: Kind, settings: Settings, num_workers: int = 1
) -> RowDataset:
    """The class of the data workers, so that samples are drafted, and skipped, as in training with so many of them."""
    return RowDataset(
        list(sources),
        renderer,
        kind,
        buffer_size=settings.data.packing_buffer if settings.data.packing == "best_fit" else 1,
        max_patches=settings.data.max_patches_per_row,
        seed=settings.train.seed if settings.data.shuffle else None,
        first_worker=0,
        stride=1,
        num_workers=num_workers,
        plan=RowPlan.of(settings.train, settings.data),
    )


def refusal(
    name: str, looked_at: int, skipped: Sequence[SkippedSample], verb: str, limits: dict[str, float]
) -> UserError | None:
    """The error if a source cannot be trained on as far as the samples show that were looked at.

    Args:
        name: the name of the source.
        looked_at: the number of samples that were looked at.
        skipped: those of them that are skipped.
        verb: the verb that is meant.
        limits: ``DataSettings.skip_limits``.
    """
    found = excess(Counter(sample.kind for sample in skipped), looked_at, limits)
    if len(skipped) < looked_at and found is None:
        return None
    text, remedy = f"{verb} can use none of {looked_at:,} inspected samples", None
    if len(skipped) < looked_at and found is not None:
        text, remedy = f"of {looked_at:,} inspected samples, {found.text}", found.remedy
    return UserError("\n".join([f"data source {name}: {text}", *causes(skipped)]), remedy)
