"""Runs with other losses, ramps and epochs: as plain PyTorch computes them, and on the same bits when they continue."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from parity import VARYING, part_of, settings_of, targets_of
from toy import reference_inputs, reference_model, write_records

WEIGHTS = (1.0, 3.0)  # of the losses of two sources: the first five records, and the others
Z_LOSS, SMOOTHING = 0.01, 0.1
LAYOUTS = {
    "one process": (1, "dense", {}),
    "DP2": (2, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}


def train(settings: dict, method: str = "sft") -> None:
    """Runs on every rank: `megavlm sft`, or another verb."""
    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.training.loop import train as train_by

    made = Settings(**settings)
    assert train_by(made, make_method(method, made)) == 0


def lines_of(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in VARYING} for line in lines]


def run_settings(toys, kind: str, parallel: dict, output: Path, data: list[dict], **train) -> dict:
    sections = {name: train.pop(name, {}) for name in ("data_settings", "checkpoint")}
    settings = settings_of(toys.folder(kind), parallel, memory_check=False, **train)
    settings["train"]["steps"] = train.get("steps")
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["data"] |= {"train": data, "workers": 0, **sections["data_settings"]}
    settings |= {"output": str(output), "log": {"wandb": {"mode": "off"}}, "checkpoint": sections["checkpoint"]}
    return settings


def sources(toys) -> list[dict]:
    """The toy's records as two sources whose losses have different weights; the first record is in three messages."""
    parts = toys.records[:5], toys.records[5:]
    paths = [write_records(toys.root / f"part{n}.jsonl", list(part)) for n, part in enumerate(parts)]
    both = zip(paths, WEIGHTS, strict=True)
    return [{"path": str(path), "loss_weight": weight, "epochs": 1.0} for path, weight in both]


@pytest.fixture(scope="module")
def expected(toys):
    """(kind, per) → the losses and gradient norms of a step on all records, sample by sample."""
    from transformers import AutoProcessor

    known: dict = {}

    def of(kind: str) -> dict:
        if kind in known:
            return known[kind]
        model, processor = reference_model(toys.folder(kind)), AutoProcessor.from_pretrained(toys.folder(kind))
        samples = []
        for record in toys.records:
            where, inputs = targets_of(processor, record, toys.root), reference_inputs(processor, record, toys.root)
            logits = model(**inputs).logits[0][where - 1]
            tokens = inputs["input_ids"][0, where]
            cross = torch.nn.functional.cross_entropy
            samples.append(
                {
                    "nll": cross(logits, tokens, reduction="sum"),
                    "smooth": cross(logits, tokens, reduction="sum", label_smoothing=SMOOTHING),
                    "z_loss": Z_LOSS * logits.logsumexp(-1).square().sum(),
                    "count": len(where),
                }
            )
        for power, per in ((0, "token"), (1, "sample"), (0.5, "sqrt")):
            weights = [WEIGHTS[number >= 5] / s["count"] ** power for number, s in enumerate(samples)]
            whole = sum(weight * s["count"] for weight, s in zip(weights, samples, strict=True))
            mean = lambda key, weights=weights, whole=whole: (
                sum(weight * s[key] for weight, s in zip(weights, samples, strict=True)) / whole
            )
            loss = mean("smooth") + mean("z_loss")
            model.zero_grad()
            loss.backward(retain_graph=True)
            squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    squares[part_of(name)] += parameter.grad.double().square().sum().item()
            known.setdefault(kind, {})[per] = {
                "loss": loss.item(),
                "nll": mean("nll").item(),
                "z_loss": mean("z_loss").item(),
                **{f"grad_norm/{part}": square**0.5 for part, square in squares.items()},
            }
        return known[kind]

    return of


@pytest.mark.parametrize(
    ("layout", "per"),
    [*((layout, "sqrt") for layout in LAYOUTS), ("one process", "token"), ("DP2", "sample")],
)
def test_a_step_is_that_of_plain_pytorch(layout, per, toys, expected, tmp_path, request):
    """All records are one epoch in packed rows; the rows that they do not need are empty."""
    processes, kind, parallel = LAYOUTS[layout]
    loss = {"per": per, "z_loss": Z_LOSS, "label_smoothing": SMOOTHING}
    settings = run_settings(
        toys, kind, parallel, tmp_path / "run", sources(toys), epochs=1.0, global_batch_size=8, loss=loss,
        moe_aux_loss_coeff=0.0,
    )  # fmt: skip
    request.getfixturevalue(f"world{processes}").run(train, settings)
    (line,) = lines_of(tmp_path / "run")
    # float32 sums in another order, as in test_layouts.py
    for name, value in expected(kind)[per].items():
        assert line[name] == pytest.approx(value, rel=3e-5 if name.startswith("grad") else 1e-5), name
    assert line["samples"] == 8
    assert line["target_tokens"] == sum(line[f"target_tokens/part{n}"] for n in range(2))
    assert (line["epoch/part0"], line["epoch/part1"]) == (1.0, 1.0)
    for other in {"token", "sample", "sqrt"} - {per}:  # far more than the tolerances lies between them
        assert any(line[name] != pytest.approx(value, rel=1e-3) for name, value in expected(kind)[other].items())


@pytest.fixture(scope="module")
def talks(toys):
    """24 short conversations of 30 to 60 tokens."""
    words = lambda n: "Four. " * (1 + 5 * n % 7)
    talk = lambda n: [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": words(n)}]
    return [{"path": str(write_records(toys.root / "talks.jsonl", [{"messages": talk(n)} for n in range(24)]))}]


@pytest.mark.parametrize("layout", ["DP2", "TP2"])
def test_ramps_and_epochs_continue_on_the_same_bits(layout, toys, talks, tmp_path, request):
    """Rows and their number grow, epochs end; in TP2 the rows of the next step are read ahead."""
    processes, kind, parallel = LAYOUTS[layout]
    settings = run_settings(
        toys, kind, parallel, tmp_path / "run", talks, epochs=2.0, batch_ramp={2: 2, 4: 4}, global_batch_size=6,
        loss={"per": "sample"}, schedule="cosine", warmup_share=0.3, lr=0.01,
        data_settings={"seq_length": 128, "length_ramp": {3: 64}, "packing_buffer": 5, "pad_multiple": 4},
        checkpoint={"every": 1, "keep": 50},
    )  # fmt: skip
    world = request.getfixturevalue(f"world{processes}")
    world.run(train, settings)
    straight = lines_of(tmp_path / "run")
    assert sum(line["samples"] for line in straight) == 48
    assert straight[-1]["epoch/talks"] == 2.0
    assert straight[-2]["epoch/talks"] < 2.0
    steps, rates = len(straight), [line["lr"] for line in straight]
    assert steps > 5
    assert rates[0] == 0.0 < rates[1]
    assert max(rates) > 2 * rates[-1] >= 0  # the schedule has the length of the run
    for done in (2, 3):  # the last step of a number of rows, and of a length
        for step in range(done + 1, steps + 1):
            shutil.rmtree(tmp_path / f"run/checkpoints/step_{step:08d}")
        world.run(train, settings)
        assert lines_of(tmp_path / "run") == straight
    world.run(train, settings)  # it is over
    assert lines_of(tmp_path / "run") == straight


def test_checkpoints_after_each_epoch(toys, talks, tmp_path, world1):
    settings = run_settings(
        toys, "dense", {}, tmp_path / "run", talks, epochs=2.0, global_batch_size=2,
        data_settings={"seq_length": 128}, checkpoint={"every_epochs": 1},
    )  # fmt: skip
    world1.run(train, settings)
    lines = lines_of(tmp_path / "run")
    first = next(line["step"] for line in lines if line["epoch/talks"] >= 1)
    kept = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert kept == [f"step_{first:08d}", f"step_{len(lines):08d}"]


@pytest.mark.parametrize("method", ["dpo", "rm", "kto"])
def test_an_epoch_of_pairs(method, toys, tmp_path, world1):
    """Rows without pairs add nothing: neither to the loss nor to accuracy and margin."""
    from test_preference import judged_of, pairs_of

    records = pairs_of(toys.records) if method != "kto" else judged_of(pairs_of(toys.records))
    data = [{"path": str(write_records(toys.root / f"{method}.jsonl", records))}]
    found = []
    for name, rows in (("with", 12), ("without", 8)):
        settings = run_settings(
            toys, "dense", {}, tmp_path / name, data, epochs=1.0, global_batch_size=rows,
            data_settings={"seq_length": 384, "packing": "none"},
        )  # fmt: skip
        world1.run(train, settings, method)
        (line,) = lines_of(tmp_path / name)
        assert line.pop("packing") > 0
        found.append(line)
    assert found[0].get("pairs", found[0]["samples"] // 2) == 8
    assert found[0] == pytest.approx(found[1], rel=1e-5)
