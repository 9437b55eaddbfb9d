"""How long a step takes on GPUs that need not be there: what is predicted of it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Span:
    """Something that the first rank of a pipeline stage does in a step.

    Attributes:
        stage: the pipeline stage from 0.
        name: "tower", "exchange", "forward", "backward", "head", "reduction" or "optimizer".
        micro_batch: the micro-batch from 0; None if it belongs to none.
        start, end: seconds from the beginning of the step.
    """

    stage: int
    name: str
    micro_batch: int | None
    start: float
    end: float


@dataclass(frozen=True)
class Operator:
    """Operations of one kind and size on one rank, for instance all products of a layer's first MLP matrix.

    Attributes:
        name: the kind, such as "product", "attention", "elementwise" or a collective.
        count: how often it is carried out in a step.
        flops, moved: operations, and bytes that are read and written, of one time.
        seconds: predicted seconds of one time.
    """

    name: str
    count: int
    flops: float
    moved: float
    seconds: float


@dataclass(frozen=True)
class Traffic:
    """What one rank sends in a step within a group of ranks.

    Attributes:
        volume: bytes that it hands to the collectives.
        count: number of collectives.
        seconds: predicted seconds, whether or not they are hidden behind computation.
    """

    volume: int
    count: int
    seconds: float


@dataclass(frozen=True)
class StepTime:
    """The predicted time of a step.

    Attributes:
        seconds: of the whole step.
        parts: the same seconds by what the slowest stage spends them on; "bubble" is waiting for other stages.
        spans: the timeline of all stages.
        traffic: by the group of ranks: "tensor", "context", "pipeline", "expert", "data", "tower".
        operators: what one rank of the slowest stage computes.
    """

    seconds: float
    parts: dict[str, float]
    spans: list[Span] = field(default_factory=list)
    traffic: dict[str, Traffic] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
