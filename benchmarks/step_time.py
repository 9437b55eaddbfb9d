"""Predicted and measured time of training steps on this machine, on CPU cores with gloo.

``python -m benchmarks.step_time [--json FILE]``: measures the operators of eight configurations one by one, and
collectives, and the time of a call in a step of a tiny model that is none of the eight. It predicts the steps of the
eight from these, and runs the steps. Models are random, and large enough for products of matrices to take most of the
time. Operators are measured by as many processes at the same time as the configuration has. Measuring and running
alternate over the configurations, so that a change of the machine's speed meets both.
"""

import argparse
import gc
import itertools
import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks, versions
from megavlm.monitor.phases import Phases
from megavlm.plan.costs import Assumed, Measured
from megavlm.plan.gpus import gpu_of
from megavlm.plan.predict import step_time

SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
DEEP = {**SMALL, "num_hidden_layers": 8}
VISION = {"depth": 4, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}

# name: (processes, decoder, parallel settings, tokens of a row, pictures of a row, rows of a step, settings of train)
CASES = {
    "tiny": (1, TINY, {}, 64, 0, 2, {}),
    "small": (1, SMALL, {}, 512, 0, 4, {}),
    "small, long rows": (1, SMALL, {}, 2048, 0, 2, {}),
    "wide, 1 picture": (1, WIDE, {}, 512, 1, 2, {}),
    "small, 4 pictures": (1, SMALL, {}, 1024, 4, 2, {}),
    "deep, recomputed": (1, DEEP, {}, 512, 0, 4, {"recompute": "full"}),
    "wide, TP2": (2, WIDE, {"tensor": 2}, 512, 0, 2, {}),
    "deep, PP2, 1 picture": (2, DEEP, {"pipeline": 2}, 512, 1, 4, {}),
    "small, CP2": (2, SMALL, {"context": 2}, 2048, 0, 2, {}),
}
STEPS = 3  # that are timed, behind one that is not


def settings_of(folder: str, parallel: Mapping, tokens: int, rows: int, train: Mapping):
    from megavlm.config.settings import Settings

    return Settings(
        model={"hf": folder, "load": "none"},
        data={"seq_length": tokens, "max_pixels": 448 * 448},
        parallel=dict(parallel),
        train={"precision": "fp32", "lr": 1e-4, "steps": 10, "global_batch_size": rows, **train},
    )


def all_cases(names: list[str], folders: dict[str, str]) -> dict:
    """On every rank: predicts and runs these cases one after the other."""
    size = CASES[names[0]][0]
    recorded = {name: record(folders[name], CASES[name]) for name in ["tiny", *names]}
    found = {}
    for name in names:
        overhead = call_overhead(folders["tiny"], recorded["tiny"])  # again for each, as the machine's speed changes
        points = measured_points(recorded[name][2], size)
        real = run(folders[name], CASES[name])
        found[name] = predicted(CASES[name], recorded[name], points, overhead) | real
    return found


def record(folder: str, case: tuple) -> tuple:
    """Settings, the operators of each stage, and an example of each operator; without any rank."""
    from megavlm.align.registry import make_method
    from megavlm.plan.absent_rank import absent_rank, that_can_be_absent
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage_operators import stage_operators

    size, _, parallel, tokens, pictures, rows, train = case
    settings = settings_of(folder, parallel, tokens, rows, train)
    stages, examples = [], {}
    for stage in range(settings.parallel.pipeline):
        rank = size // settings.parallel.pipeline * stage
        absent = absent_rank(that_can_be_absent(settings), make_method("sft", settings), rank, size)
        with absent as (session, (one,)):
            row = Mix.of(settings, session.shapes, pictures=pictures).row(settings, session.shapes)
            where, window = torch.device("meta"), window_of(case)
            stages.append(
                stage_operators(one.vlm, one.optimizers, one.objective, row, window, where, examples=examples)
            )
    return settings, stages, examples


def window_of(case: tuple) -> int:
    return case[5] if "pipeline" in case[2] else min(case[5], 4)


def measured_points(examples: Mapping, size: int) -> list[tuple]:
    """The seconds of operators and collectives, as means over the ranks."""
    import torch.distributed as dist

    from megavlm.config.settings import Settings
    from megavlm.plan.measure_operators import measure_collectives, measure_operators
    from megavlm.platform import init

    here = torch.device("cpu")
    if size == 1:
        return measure_operators(examples, here)
    init(Settings(model={"hf": "none"}).parallel)
    of_ranks: list = [None] * size
    dist.all_gather_object(
        of_ranks, measure_operators(examples, here) + measure_collectives(dist.group.WORLD, here, 2**24)
    )
    seconds = defaultdict(list)
    for call, one in itertools.chain.from_iterable(of_ranks):
        seconds[call].append(one)
    leave()
    return [(call, statistics.mean(of)) for call, of in seconds.items()]


def leave() -> None:
    """Leaves the world, so that this process can be an absent rank or a rank of another layout."""
    import torch.distributed as dist

    from megavlm.platform import shutdown

    shutdown()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def run(folder: str, case: tuple) -> dict:
    """Seconds of each step on this rank, in the real world."""
    import torch.distributed as dist

    from megavlm.optim.optimizers import Optimizers
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.runtime.session import start
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    _, _, parallel, tokens, pictures, rows, train = case
    settings = settings_of(folder, parallel, tokens, rows, train)
    session = start(settings, training=True, load=False)
    row = Mix.of(settings, session.shapes, pictures=pictures).row(settings, session.shapes)
    each = rows // session.groups.dp_size
    feed = RowsAtHand(session.vlm, [row] * each)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)
    phases = Phases(dist.group.WORLD, measured=True)
    step = Step(session.vlm, Optimizers(session.vlm, settings.train), feed, each, objective, window_of(case),
                ["data"], partial(phases, "tower"), phases)  # fmt: skip
    seconds = []
    for number in range(1 + STEPS):
        dist.barrier()
        start_time = time.perf_counter()
        with phases.step():
            step.update(feed.rows(each))
        dist.barrier()
        seconds.append(time.perf_counter() - start_time)
        if not number:
            phases.fields()
    split = phases.fields()
    leave()
    return {"measured": statistics.median(seconds[1:]), "steps": seconds, "phases": split}


def call_overhead(folder: str, recorded: tuple) -> float:
    """Seconds of a call in a step beyond the operator itself, from the steps of a tiny model."""
    (_, (stage,), examples), case = recorded, CASES["tiny"]
    costs = Measured(measured_points(examples, 1), 0.0, Assumed(gpu_of("a100")))
    counts = stage.of_step(case[5], case[5] / window_of(case))
    work = sum(count * costs.seconds(call) for call, count in counts.items() if call.kind != "collective")
    return max(run(folder, case)["measured"] - work, 0.0) / sum(counts.values())


def predicted(case: tuple, recorded: tuple, points: list[tuple], overhead: float) -> dict:
    settings, stages, _ = recorded
    rows, known = case[5], {call for call, _ in points}
    predicted = step_time(stages, settings, rows, window_of(case), Measured(points, overhead, Assumed(gpu_of("a100"))))
    unknown = {
        call.name for stage in stages for call in stage.of_step(rows, 1)
        if call.kind != "collective" and call not in known
    }  # fmt: skip
    return {
        "predicted": predicted.seconds,
        "parts": predicted.parts,
        "overhead_of_a_call": overhead,
        "operators_measured": len(points),
        "operators_not_measured": sorted(unknown),
        "traffic": {group: traffic.seconds for group, traffic in predicted.traffic.items()},
        "longest": [(one.name, one.count, one.seconds) for one in predicted.operators[:12]],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--processes", type=int, choices=(1, 2), help="only the cases with so many processes")
    chosen = parser.parse_args()
    cases = {}
    with tempfile.TemporaryDirectory() as root:
        for size in (1, 2):
            if chosen.processes not in (None, size):
                continue
            names = [name for name, case in CASES.items() if case[0] == size and name != "tiny"]
            folders = {name: model(Path(root), CASES[name]) for name in ["tiny", *names]}
            for name, found in run_ranks(size, all_cases, names, folders)[0].items():
                cases[name] = found | {"ratio": found["predicted"] / found["measured"]}
    table = Table("configuration", "predicted", "measured", "ratio", box=None)
    for name, of in cases.items():
        table.add_row(name, f"{of['predicted']:.2f}", f"{of['measured']:.2f}", f"{of['ratio']:.3f}")
    Console().print(table)
    if chosen.json:
        before = json.loads(chosen.json.read_text())["cases"] if chosen.json.exists() else {}
        chosen.json.write_text(json.dumps({"versions": versions(), "cases": before | cases}, indent=1) + "\n")


def model(root: Path, case: tuple) -> str:
    """The folder of a random model without weights."""
    from megavlm.demo.model_folder import make_model_folder

    folder = root / str(len(list(root.iterdir())))
    make_model_folder(folder, text=case[1], vision=VISION)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return str(folder)


if __name__ == "__main__":
    main()
