"""Predicted and measured time of training steps on this machine, on CPU cores with gloo.

``python -m benchmarks.step_time [--json FILE]``: measures the operators of eight configurations one by one, and
collectives, and the overhead of a call in a step of a tiny model that is none of the eight. It predicts the steps of
the eight from these, and runs the steps. Models are random, and large enough for products of matrices to take most of
the time. Operators are measured by as many processes at the same time as the configuration has. Measuring and running
alternate over the configurations, so that a change of the machine's speed meets both.
"""

import argparse
import gc
import itertools
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.ranks import run_ranks, versions
from megavlm.bench.call_overhead import call_overhead, record_tiny_step
from megavlm.bench.measure_operators import measure_collectives, measure_operators
from megavlm.demo.model_folder import TEXT, make_model_folder
from megavlm.monitor.phases import Phases
from megavlm.plan.costs import Assumed, Measured
from megavlm.plan.gpus import gpu_of
from megavlm.plan.predict import step_time
from megavlm.platform import shutdown

ROPE = {**TEXT["rope_parameters"], "mrope_section": [12, 10, 10]}  # of 32 frequencies
SMALL = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8,
         "num_key_value_heads": 4, "head_dim": 64, "rope_parameters": ROPE}  # fmt: skip
WIDE = {**SMALL, "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8}
DEEP = {**SMALL, "num_hidden_layers": 8}
VISION = {"depth": 4, "hidden_size": 384, "intermediate_size": 1536, "num_heads": 6}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}

# name: (processes, decoder, parallel settings, tokens of a row, pictures of a row, rows of a step, settings of train)
CASES = {
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
    recorded = {name: record(folders[name], CASES[name]) for name in names}
    tiny_step = record_tiny_step()
    found = {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, os.environ["RANK"] == "0")
    world = World(store, int(os.environ["RANK"]), size)
    overhead = call_overhead(tiny_step)
    for name in names:
        points = measured_points(world, recorded[name][2])
        with world.entered():
            real = run(folders[name], CASES[name])
        found[name] = predicted(CASES[name], recorded[name], points, overhead) | real
        if not world.rank:
            print(f"{name}: {found[name]['predicted']:.3f} s predicted, {real['steps']} measured", flush=True)
    dist.init_process_group("gloo", store=dist.PrefixStore("end", store), rank=world.rank, world_size=size)
    return found


class World:
    """The processes of a benchmark, which come together in a new process group for each piece of work."""

    def __init__(self, store: dist.Store, rank: int, size: int):
        self.store, self.rank, self.size, self._times = store, rank, size, 0

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Within the block this process is in a world with the others."""
        self._times += 1
        store = dist.PrefixStore(str(self._times), self.store)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size)
        yield
        shutdown()
        gc.collect()
        dist.destroy_process_group()


def record(folder: str, case: tuple) -> tuple:
    """Settings, the operators of each stage, and an example of each operator; without any rank."""
    from megavlm.align.registry import make_method
    from megavlm.plan.mix import Mix
    from megavlm.plan.stage_operators import stage_operators
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent

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


def measured_points(world: World, examples: Mapping) -> list[tuple]:
    """The seconds of operators and collectives, as means over the ranks."""
    here, seconds = torch.device("cpu"), defaultdict(list)
    with world.entered():
        mine = measure_operators(examples, here)
        if world.size > 1:
            mine += measure_collectives(dist.group.WORLD, here, 2**24)
        of_ranks: list = [None] * world.size
        dist.all_gather_object(of_ranks, mine)
    for call, one in itertools.chain.from_iterable(of_ranks):
        seconds[call].append(one)
    return [(call, statistics.mean(of)) for call, of in seconds.items()]


def run(folder: str, case: tuple) -> dict:
    """Seconds of each step on this rank, in the world that it is in."""
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
    return {"measured": statistics.median(seconds[1:]), "steps": seconds, "phases": split}


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
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="only these cases")
    chosen = parser.parse_args()
    cases = {}
    with tempfile.TemporaryDirectory() as root:
        for size in (1, 2):
            if chosen.processes not in (None, size):
                continue
            names = [name for name, case in CASES.items() if case[0] == size and name in chosen.cases]
            if not names:
                continue
            folders = {name: model(Path(root), CASES[name]) for name in names}
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
    """The folder of a random model without weights, of which config.json is enough."""
    folder = root / str(len(list(root.iterdir())))
    if not (root / "first").exists():
        make_model_folder(root / "first", text=TINY, vision=VISION)
    folder.mkdir()
    config = json.loads((root / "first/config.json").read_text())
    config["text_config"] |= case[1]
    config["vision_config"] |= VISION | {"out_hidden_size": case[1]["hidden_size"]}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


if __name__ == "__main__":
    main()
