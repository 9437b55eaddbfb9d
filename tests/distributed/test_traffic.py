"""What ranks send in a step: planned without them, against every collective that real ranks hand to gloo, to the byte.

The same runs compare operations: those planned by operator against ``hardware_flops``, and the model's own of the plan
against those of metrics.jsonl.
"""

from collections import Counter

import torch
from parity import settings_of
from test_dry_run import alone

ROWS = 4
# name: (processes, toy, parallel settings, rows of a window)
LAYOUTS = {
    "TP2": (2, "dense", {"tensor": 2}, 2),
    "CP2": (2, "dense-untied", {"context": 2}, 2),
    "PP2": (2, "dense", {"pipeline": 2}, 4),
    "DP2": (2, "dense", {}, 2),
    "EP2": (2, "moe", {"expert": 2}, 2),
    "TP2 × PP2, sequence": (4, "dense", {"tensor": 2, "pipeline": 2, "sequence": True}, 4),
    "CP2 × PP2 × VPP2": (4, "dense", {"context": 2, "pipeline": 2, "virtual_pipeline": 2}, 2),
    "EP2 × TP2 × DP2": (4, "moe", {"expert": 2, "tensor": 2}, 1),
}


class Handed(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts the bytes of all tensors that are inputs of collectives, as their schemas name them."""

    def __init__(self, names):
        super().__init__()
        self.names, self.bytes = names, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and not func.__name__.startswith("recv"):
            groups = [arg for arg in args if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type())]
            if groups:
                group = torch.distributed.ProcessGroup.unbox(groups[0])
                named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
                inputs = (
                    next(x for n, x in named.items() if n.startswith("input"))
                    if any(n.startswith("input") for n in named)
                    else named["tensors"]
                )
                tensors = [inputs] if isinstance(inputs, torch.Tensor) else inputs
                if group.size() > 1:
                    # stages may send in the group of all ranks
                    is_send = func.__name__.startswith("send")
                    name = "pipeline" if is_send else self.names.get(group.group_name, "other")
                    self.bytes[name] += sum(t.numel() * t.itemsize for t in tensors)
        return func(*args, **(kwargs or {}))


def step_of(session, optimizers, settings, window, rows):
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    row = Mix.of(settings, session.shapes, samples=2).row(settings, session.shapes)
    feed = RowsAtHand(session.vlm, [row] * rows)
    return row, feed, Step(session.vlm, optimizers, feed, rows, CrossEntropy(["data"], 64), window)


def measured(settings, window: int):
    """Runs on real ranks: the bytes that this rank hands over in a step, and the step's work by its own counts."""
    from megavlm.config.settings import Settings
    from megavlm.model.flops import Work
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.session import start
    from megavlm.tracing.operators import group_names

    settings = Settings(**settings)
    session = start(settings, training=True, load=False)
    _, feed, step = step_of(session, Optimizers(session.vlm, settings.train), settings, window, ROWS)
    with Handed(group_names(session.groups)) as handed:
        result = step.update(feed.rows(ROWS))
    return dict(handed.bytes), Work.from_counts(result.counts)


def planned(settings, window: int, world: int):
    """The same of all ranks, without them; and the operations of products and attention."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.plan.hardware_flops import hardware_flops
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage_operators import stage_operators
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent

    settings, found, flops = Settings(**settings), [], 0
    for rank in range(world):
        absent = absent_rank(that_can_be_absent(settings), make_method("sft", settings), rank, world)
        with absent as (session, (one,)):
            row, _, step = step_of(session, one.optimizers, settings, window, ROWS)
            operators = stage_operators(one.vlm, one.optimizers, step.objective, row, window, torch.device("meta"))
            counts = operators.of_step(ROWS, ROWS / window)
            volume = Counter()
            for call, count in counts.items():
                flops += count * call.flops
                if call.kind == "collective":
                    volume[call.group] += count * call.moved
            found.append(dict(volume))
            work = Mix.of(settings, session.shapes, samples=2).work(ROWS * session.groups.dp_size)
            told = sum(hardware_flops(session.shapes, work, settings).values())
    return found, flops, told, work


def plans(cases: dict) -> dict:
    with alone():
        return {name: planned(*case) for name, case in cases.items()}


def test_ranks_send_what_is_planned(toys, request, world1):
    cases = {}
    for name, (size, kind, parallel, window) in LAYOUTS.items():
        settings = settings_of(toys.folder(kind), parallel, optimizer="adam", precision="bf16", moe=kind == "moe")
        settings["model"]["load"] = "none"
        settings["data"]["max_pixels"] = 96 * 96
        cases[name] = (settings, window, size)
    (plan,) = world1.run(plans, cases)
    for name, (settings, window, size) in cases.items():
        real = request.getfixturevalue(f"world{size}").run(measured, settings, window)
        sent, flops, told, work = plan[name]
        for rank, ((handed, counted), expected) in enumerate(zip(real, sent, strict=True)):
            if LAYOUTS[name][1] == "moe":  # ranks get as many tokens of experts as routers choose: equal in the sum
                handed, expected = ({k: v for k, v in x.items() if k != "expert"} for x in (handed, expected))
            assert handed == expected, (name, rank)
            assert counted == work  # metrics.jsonl computes model_tflops and mfu from this
        totals = [sum((Counter(one) for one in ranks), Counter()) for ranks in ([h for h, _ in real], sent)]
        assert totals[0] == totals[1], name
        assert flops == told, name
