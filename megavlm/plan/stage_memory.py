"""The memory of a step on a rank, put together from what one micro-batch does in each chunk of the decoder.

How many micro-batches are under way at a time follows from the schedule.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from megavlm.plan.schedule import turns
from megavlm.plan.step_memory import Peak
from megavlm.tracing.static_memory import StaticMemory


@dataclass(frozen=True)
class ChunkMemory:
    """What a micro-batch does in a chunk of the decoder, in bytes by phase, beside what was alive before.

    Attributes:
        forward, backward: the fullest moment of each pass.
        kept: between the passes.
        left: after both: gradients of features.
        layers: number of layers.
        again, attention: what a layer computes again in its backward pass, and of that, what is in core attention.
        on_host: what the layers have in host memory between the passes (``train.offload_activations``).
    """

    forward: Peak
    kept: dict[str, int]
    backward: Peak
    left: dict[str, int]
    layers: int = 1
    again: int = 0
    attention: int = 0
    on_host: int = 0

    def keeping(self, *, attention: bool) -> "ChunkMemory":
        """The same if layers are not computed again; if ``attention``, core attention still is."""
        size = self.again - (self.attention if attention else 0)

        def more(sizes: Mapping[str, int], layers: int) -> dict[str, int]:
            return {**sizes, "decoder": sizes.get("decoder", 0) + layers * size}

        def of(peak: Peak) -> Peak:  # one layer is in it that is being computed, or computed again
            return Peak(peak.phase, more(peak.by_phase, self.layers - 1))

        return replace(
            self, forward=of(self.forward), kept=more(self.kept, self.layers), backward=of(self.backward), again=0
        )

    def part(self, parts: int) -> "ChunkMemory":
        """About what a chunk with one of so many parts of the layers does."""
        if self.on_host:  # the device keeps the last layer's input alone
            return replace(self, on_host=self.on_host // parts)
        gone = {name: size - size // parts for name, size in self.kept.items()}

        def of(peak: Peak) -> Peak:
            return Peak(peak.phase, {name: size - gone.get(name, 0) for name, size in peak.by_phase.items()})

        kept = {name: size - gone[name] for name, size in self.kept.items()}
        return replace(self, forward=of(self.forward), kept=kept, backward=of(self.backward))


@dataclass(frozen=True)
class Moment:
    """The fullest moment of a phase of a run on a rank: what it holds then, and what it makes.

    Attributes:
        name: "load", "sampling", "encode", "decoder", "tower" (its backward pass), "update" or "checkpoint".
        static, peak: of the model that needs most.
    """

    name: str
    static: StaticMemory
    peak: Peak

    @property
    def total(self) -> int:
        """Bytes."""
        return self.static.total + self.peak.total


@dataclass(frozen=True)
class StageMemory:
    """A window on one rank.

    Attributes:
        encode: the fullest moment until the tower has encoded the window.
        before: bytes by phase when the decoder begins: rows, features, and what the tower keeps.
        chunks: what each chunk of the decoder does.
        tower: the fullest moment of the tower's backward pass.
        again: what the tower computes again in it.
    """

    encode: Peak
    before: dict[str, int]
    chunks: list[ChunkMemory]
    tower: Peak
    again: int = 0

    def peak(self, stage: int, stages: int, window: int) -> Peak:
        """The fullest moment of a step with this many micro-batches in a window, without the update."""
        return max(self.peaks(stage, stages, window).values(), key=lambda peak: peak.total)

    def peaks(self, stage: int, stages: int, window: int) -> dict[str, Peak]:
        """The same for each of the phases "encode", "decoder" and "tower", the tower's backward pass."""
        sizes = [[sum(of.values()) for of in (chunk.kept, chunk.left)] for chunk in self.chunks]
        alive, done = [0] * len(sizes), [0] * len(sizes)  # by chunk: the micro-batches between their passes; after both
        others, most, fullest = 0, -1, Peak("", {})
        for turn in turns(stage, stages, window, len(self.chunks)):
            number = turn.chunk
            kept, left = sizes[number]
            if turn.backward:
                alive[number] -= 1
                others -= kept
            mine = self.chunks[number].backward if turn.backward else self.chunks[number].forward
            if others + mine.total > most:
                most = others + mine.total
                counts = [(c.kept, n) for c, n in zip(self.chunks, alive, strict=True)]
                counts += [(c.left, n) for c, n in zip(self.chunks, done, strict=True)]
                fullest = Peak(mine.phase, _sum([(self.before, 1), (mine.by_phase, 1), *counts]))
            if turn.backward:
                done[number] += 1
                others += left
            else:
                alive[number] += 1
                others += kept
        return {"encode": self.encode, "decoder": fullest, "tower": self.tower}

    def on_host(self, stage: int, stages: int, window: int) -> int:
        """The host memory that the inputs of layers need."""
        now = most = 0
        for turn in turns(stage, stages, window, len(self.chunks)):
            now += self.chunks[turn.chunk].on_host * (-1 if turn.backward else 1)
            most = max(most, now)
        return most

    def keeping(self, recompute: str, *, tower: bool) -> "StageMemory":
        """The same with less computed again, told from a window of which all is: about what it would be.

        Args:
            recompute: "full", "core_attn" or "none", see ``train.recompute``.
            tower: whether the tower's work is kept.
        """
        chunks = self.chunks
        if recompute != "full":
            chunks = [chunk.keeping(attention=recompute == "core_attn") for chunk in chunks]
        more = self.again if tower else 0
        before = {**self.before, "tower": self.before.get("tower", 0) + more}
        encode = {**self.encode.by_phase, "tower": max(self.encode.by_phase.get("tower", 0), more)}
        return replace(self, encode=Peak(self.encode.phase, encode), before=before, chunks=chunks)

    def interleaved(self, chunks: int) -> "StageMemory":
        """About the same with the layers in so many chunks, told from one with all of them."""
        (whole,) = self.chunks
        return replace(self, chunks=[whole.part(chunks)] * chunks)

    def without(self, phase: str) -> "StageMemory":
        """The same without what is made in a phase."""

        def left(sizes: Mapping[str, int]) -> dict[str, int]:
            return {name: size for name, size in sizes.items() if name != phase}

        def of(peak: Peak) -> Peak:
            return Peak(peak.phase, left(peak.by_phase))

        chunks = [
            replace(c, forward=of(c.forward), kept=left(c.kept), backward=of(c.backward), left=left(c.left))
            for c in self.chunks
        ]
        return replace(self, encode=of(self.encode), before=left(self.before), chunks=chunks, tower=of(self.tower))


def _sum(parts: list[tuple[Mapping[str, int], int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for sizes, times in parts:
        for phase, size in sizes.items():
            total[phase] += size * times
    return {phase: size for phase, size in total.items() if size}
