"""Tables of docs/ that repeat a file under docs/benchmarks: each row has the numbers of that file."""

import json
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"


def rows_below(page: str, header: str) -> list[list[str]]:
    """The cells of the rows of a table, by its first line."""
    lines = (DOCS / page).read_text(encoding="utf-8").partition(header + "\n")[2].splitlines()[1:]
    assert lines, header
    end = next(number for number, line in enumerate(lines) if not line.startswith("|"))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:end]]


def found(name: str) -> dict:
    return json.loads((DOCS / "benchmarks" / f"{name}.json").read_text(encoding="utf-8"))


def test_predicted_and_measured_seconds() -> None:
    rows = rows_below("planning.md", "| configuration | predicted | measured | ratio |")
    cases = found("step_time")["cases"]
    assert rows == [
        [name, f"{one['predicted']:.2f} s", f"{one['measured']:.2f} s", f"{one['predicted'] / one['measured']:.2f}"]
        for name, one in cases.items()
    ]


def test_planned_and_counted_memory() -> None:
    rows = rows_below("planning.md", "| setting | ranks | planned, MiB | off counted | off allocated |")
    settings: dict[str, list[dict]] = {}
    for rank in found("plan_memory")["ranks"]:
        settings.setdefault(rank["setting"], []).append(rank)
    furthest = lambda ranks, name: max((rank[name] for rank in ranks), key=abs)
    assert rows == [
        [
            name,
            str(len(ranks)),
            f"{max(rank['planned'] for rank in ranks) / 2**20:.1f}",
            f"{100 * furthest(ranks, 'off_counted'):+.2f} %",
            f"{100 * furthest(ranks, 'off_allocated'):+.1f} %",
        ]
        for name, ranks in settings.items()
    ]


def test_the_built_in_engine_beside_vllm() -> None:
    rows = rows_below(
        "measurements.md",
        "| prompts | built-in: tokens per second, and per second of the processor | vLLM | ratio |",
    )
    engines, ratios = found("vllm_engine"), found("vllm_engine")["ratios"]
    speeds = lambda one: f"{one['tokens_per_second']:.0f} and {one['tokens_per_cpu_second']:.0f}"
    assert rows == [
        [
            kind,
            *(speeds(engines[name]["of"][kind]) for name in ("megavlm", "vllm")),
            " and ".join(f"{ratio:.2f}" for ratio in ratios[kind]),
        ]
        for kind in ratios
    ]


def test_new_weights_for_another_program() -> None:
    rows = rows_below(
        "measurements.md",
        "| layout | stream | with a digest of every tensor | checkpoint, conversion, reading | "
        "memory added on rank 0 by the stream |",
    )
    for layout, *cells in rows:
        one = found("weight_sync")[layout]
        seconds = one["seconds"]
        files = " + ".join(f"{seconds[way]:.2f}" for way in ("write a checkpoint", "convert it", "read the folder"))
        assert cells == [
            f"{seconds['stream']:.2f} s",
            f"{seconds['stream with digests']:.2f} s",
            f"{files} s",
            f"{one['mib_of_rank_0']['stream']} MiB",
        ]


def test_adapters_alone_and_merged() -> None:
    sync, mismatch, speed = rows_below("measurements.md", "| | merged | alone |")
    ways = [found("vllm_adapters")[name] for name in ("merged", "alone")]
    assert sync[1:] == [f"{one['seconds_sync']:.2f}" for one in ways]
    assert mismatch[1:] == [f"{one['mismatch_kl']:.5f}, {one['mismatch_max']:.3f}" for one in ways]
    assert speed[1:] == [f"{one['rollout_tokens_per_second']:.0f}" for one in ways]
