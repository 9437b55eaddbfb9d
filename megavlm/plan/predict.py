"""Predicts the time of a step from the operators of each stage, their costs, and the pipeline's schedule."""

from collections import defaultdict
from collections.abc import Sequence

from megavlm.config.settings import Settings
from megavlm.plan.costs import Costs
from megavlm.plan.schedule import Passes, timeline
from megavlm.plan.stage_operators import Counts, StageOperators
from megavlm.plan.step_time import Operator, Span, StepTime, Traffic
from megavlm.tracing.operators import Call


def step_time(
    stages: Sequence[StageOperators], settings: Settings, micro_batches: int, window: int, costs: Costs
) -> StepTime:
    """The predicted time of a step.

    Nothing overlaps but what is said to: with ``train.overlap.gradients``, the reduction of the decoder's gradients
    with the last micro-batch's backward pass.

    Args:
        stages: the operators of the first rank of each pipeline stage.
        settings: the settings of the run.
        micro_batches: number of micro-batches of a step.
        window: number of micro-batches whose frames are encoded together.
        costs: the costs of operators.
    """
    fp8 = settings.train.precision == "fp8"
    seconds = [_seconds_of_parts(stage, costs, fp8, settings.train.fp8.tower) for stage in stages]
    message = max(costs.seconds(call) for call in sends) if (sends := _sends(stages[0])) else 0.0
    chunks, last = stages[0].chunks, seconds[-1]
    passes = [Passes(of["forward"] / chunks, of["backward"] / chunks) for of in seconds]
    head = Passes(last["head"], last["head_backward"])
    spans: list[Span] = []
    now = 0.0
    for first in range(0, micro_batches, window):
        count = min(window, micro_batches - first)
        share = count / window
        now = _together(spans, seconds, now, {"tower": "tower", "exchange": "exchange"}, share)
        timed = timeline(passes, count, chunks, head=head, message=message, start=now)
        for stage, turn, start, end in timed:
            name, number = "backward" if turn.backward else "forward", first + turn.micro_batch
            middle = end
            if stage == len(stages) - 1 and turn.chunk == chunks - 1:
                middle = start + head.backward if turn.backward else end - head.forward
            if turn.backward and middle != end:
                spans += [Span(stage, "head", number, start, middle), Span(stage, name, number, middle, end)]
            else:
                spans.append(Span(stage, name, number, start, middle))
                if middle != end:
                    spans.append(Span(stage, "head", number, middle, end))
        now = max(one.end for one in timed)
        now = _together(spans, seconds, now, {"exchange": "exchange_backward", "tower": "tower_backward"}, share)
    for of, pass_ in zip(seconds, passes, strict=True):
        of["reduction"] += max(of["overlapped"] - pass_.backward * chunks, 0.0)
    now = _together(spans, seconds, now, {"reduction": "reduction"}, 1.0)
    now = _together(spans, seconds, now, {"optimizer": "optimizer"}, 1.0)
    busy = [_busy(spans, stage) for stage in range(len(stages))]
    slowest = max(range(len(stages)), key=lambda stage: sum(busy[stage].values()))
    bubble = now - sum(busy[slowest].values())
    parts = busy[slowest] | {"bubble": bubble if bubble > 1e-9 * now else 0.0}  # less is the rounding of sums
    windows = micro_batches / window
    whole = stages[slowest].of_step(micro_batches, windows)
    return StepTime(now, parts, spans, _traffic(whole, costs), _operators(whole, costs))


def _seconds_of_parts(stage: StageOperators, costs: Costs, fp8: bool, fp8_tower: bool) -> dict[str, float]:
    fp8_parts = {"forward", "backward"} if fp8 else set()
    fp8_parts |= {"tower", "tower_backward"} if fp8 and fp8_tower else set()
    return {
        name: sum(
            count * costs.seconds(call, fp8=name in fp8_parts) for call, count in counts.items() if call.name != "send"
        )
        for name, counts in stage.parts.items()
    }


def _sends(stage: StageOperators) -> list[Call]:
    return [call for name in ("forward", "backward") for call in stage.parts[name] if call.name == "send"]


def _together(
    spans: list[Span], seconds: Sequence[dict[str, float]], now: float, parts: dict[str, str], share: float
) -> float:
    """Adds a span of each stage for each of the parts, after which they wait for each other; returns when they end."""
    end = now
    for stage, of in enumerate(seconds):
        at = now
        for name, part in parts.items():
            if of[part]:
                spans.append(Span(stage, name, None, at, at + of[part] * share))
                at += of[part] * share
        end = max(end, at)
    return end


def _busy(spans: Sequence[Span], stage: int) -> dict[str, float]:
    found: dict[str, float] = defaultdict(float)
    for span in spans:
        if span.stage == stage:
            found[span.name] += span.end - span.start
    return dict(found)


def _traffic(counts: Counts, costs: Costs) -> dict[str, Traffic]:
    found: dict[str, Traffic] = {}
    for call, count in counts.items():
        if call.kind == "collective":
            before = found.get(call.group, Traffic(0, 0, 0.0))
            found[call.group] = Traffic(
                before.volume + round(count * call.moved),
                before.count + round(count),
                before.seconds + count * costs.seconds(call),
            )
    return found


def _operators(counts: Counts, costs: Costs) -> list[Operator]:
    """The operators by name and size, those that take longest first; elementwise ones by name alone."""
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for call, count in counts.items():
        key = (call.kind, call.name, call.sizes if call.kind in ("product", "attention") else ())
        for place, value in enumerate((1, call.flops, call.moved, costs.seconds(call))):
            sums[key][place] += count * value
    found = [
        Operator(_label(*key), round(n), flops / n, moved / n, seconds / n)
        for key, (n, flops, moved, seconds) in sums.items()
        if n > 0
    ]
    return sorted(found, key=lambda one: -one.count * one.seconds)


def _label(kind: str, name: str, sizes: tuple[int, ...]) -> str:
    if kind == "product":
        batch, m, k, n = sizes
        return f"product {f'{batch} × ' if batch > 1 else ''}[{m}, {k}] [{k}, {n}]"
    if kind == "attention":
        back = " backward" if name.endswith("backward") else ""
        return f"attention{back}, {sizes[1]} heads, {sizes[2]} queries, {sizes[3]} keys"
    return f"{kind} {name}"
