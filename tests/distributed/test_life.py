"""The life of a run: every training verb, interrupted in every way, started again in every way (see life.py)."""

import itertools
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from killing import Commands, Kill
from life import CONTINUATIONS, EVERY, INTERRUPTIONS, NUMBERS, REFUSED, SAME, STEPS, outcome, table
from test_kill import metrics_of, reached, same_bits
from toy import TEXT, VISION, toy_records, write_records

from megavlm.align.registry import METHODS

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs" / "runs.md"
BAD = 2  # index of the broken sample, which step 3 reads
OTHER = "A dog, I think."
# Each verb, interruption and continuation at least once; all products are slow.
SOME = [
    ("pretrain", "nothing (a new run)", "the same settings"),
    ("sft", "Ctrl-C", "more `train.steps`"),
    ("rm", "SIGTERM", "another `train.lr`"),
    ("dpo", "kill -9", "another layout"),
    ("kto", "broken data", "`overwrite: true`"),
    ("sft", "a full disk", "more `train.steps`"),
    ("grpo", "SIGTERM", "more `train.steps`"),
    ("ppo", "kill -9", "the same settings"),
]
# With methods that sample answers, which take longer, these continuations are tried after one interruption alone.
ONCE = ("another `train.lr`", "another layout")


def is_tried(verb: str, interrupted: str, continued: str) -> bool:
    """Whether a case is part of the matrix."""
    return not METHODS[verb].samples or continued not in ONCE or interrupted == "SIGTERM"


ALL = [
    pytest.param(*case, id=" · ".join(case), marks=[] if case in SOME else [pytest.mark.slow])
    for case in itertools.product(METHODS, INTERRUPTIONS, CONTINUATIONS)
    if is_tried(*case)
]


@pytest.fixture(scope="module")
def commands():
    commands = Commands(reports=False)
    yield commands
    commands.close()


@pytest.fixture(scope="module")
def arguments(tmp_path_factory):
    """arguments(verb, output, overrides): the command line of a run on seven usable samples and a broken one."""
    from megavlm.convert import hf_to_mcore
    from megavlm.demo.model_folder import make_model_folder

    folder = tmp_path_factory.mktemp("life")
    text, vision = {**TEXT, "num_hidden_layers": 2}, {**VISION, "depth": 1, "deepstack_visual_indexes": [0]}
    hf, weights = make_model_folder(folder / "hf", text=text, vision=vision, norm_noise=0.3), folder / "weights"
    hf_to_mcore(hf, weights, progress=False)
    toys = toy_records(folder)
    pairs = [
        {**record, "messages": record["messages"][:-1], "chosen": record["messages"][-1]["content"], "rejected": OTHER}
        for record in toys
    ]
    judged = [
        {key: value for key, value in {**pair, "completion": pair["chosen"], "label": number % 2 == 0}.items()
         if key not in ("chosen", "rejected")}
        for number, pair in enumerate(pairs)
    ]  # fmt: skip
    records = {"rm": pairs, "dpo": pairs, "kto": judged}
    for verb, method in METHODS.items():
        samples = list(records.get(verb, toys))
        samples[BAD] = {"messages": 1}
        data = write_records(folder / f"{verb}.jsonl", samples)
        config = {
            "model": {"hf": str(hf), "load": str(weights)},
            "data": {
                "train": [{"path": str(data)}], "seq_length": 512, "packing": "none", "shuffle": False, "workers": 0,
            },
            "train": {
                "steps": STEPS, "global_batch_size": 1, "lr": 3e-4, "warmup_steps": 1, "precision": "fp32",
                "memory_check": False,
            },
            "checkpoint": {"every": EVERY, "async": False},
            "log": {"wandb": {"mode": "off"}},
        }  # fmt: skip
        if method.has_stages:
            config["stage"] = 1
        if method.samples:
            del config["train"]["global_batch_size"], config["data"]["packing"]  # both follow from the answers
            config["rollout"] = {"prompts": 1, "group_size": 3, "max_new_tokens": 5}
            config["reward"] = [{"python": f"{HERE / 'grpo_rewards.py'}:letters"}]
            config["reward_pool"] = {"workers": 1}
        if verb == "ppo":
            config["align"] = {"critic": {"lr": 1e-3, "alone_steps": 0}}
        (folder / f"{verb}.yaml").write_text(json.dumps(config))
    return lambda verb, output, overrides: [verb, str(folder / f"{verb}.yaml"), f"output={output}", *overrides]


@pytest.fixture(scope="module")
def straight(commands, arguments, tmp_path_factory):
    """straight(verb, overrides): the output of a run without an interruption, made once."""
    runs: dict[tuple[str, tuple[str, ...]], Path] = {}

    def straight(verb, overrides):
        if (verb, overrides) not in runs:
            output = tmp_path_factory.mktemp("straight") / "run"
            assert commands.run(arguments(verb, output, overrides), 1, output).statuses == [0]
            runs[verb, overrides] = output
        return runs[verb, overrides]

    return straight


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(run): moves the checkpoints of a run to a file system that has no room for another one.

    Returns a function that gives it more.
    """
    folder = tmp_path / "disk"

    def mount(*options: str) -> None:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", folder], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"needs to mount a small file system: {done.stderr.strip()}")

    def small_disk(run: Path):
        size = sum(file.stat().st_size for file in run.glob("checkpoints/*/*"))
        folder.mkdir()
        mount(f"size={size + size // 2}")
        shutil.copytree(run / "checkpoints", folder, dirs_exist_ok=True)
        shutil.rmtree(run / "checkpoints")
        (run / "checkpoints").symlink_to(folder)
        return lambda: mount("remount", f"size={10 * size}")

    yield small_disk
    if folder.exists():
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_the_documentation_has_the_table():
    assert table() in DOCS.read_text(encoding="utf-8")


def test_some_cases_are_quick_and_touch_every_row_and_column():
    assert [set(axis) for axis in zip(*SOME, strict=True)] == [set(METHODS), set(INTERRUPTIONS), set(CONTINUATIONS)]


@pytest.mark.parametrize(("verb", "interrupted", "continued"), ALL)
def test_the_table_holds(verb, interrupted, continued, commands, arguments, straight, small_disk, tmp_path):
    run, how = tmp_path / "run", INTERRUPTIONS[interrupted]
    overrides, expected = CONTINUATIONS[continued][0], outcome(interrupted, continued)
    log = run.with_suffix(".log")

    def start(overrides, status=0, kill=None):
        size = 2 if "parallel.tensor=2" in overrides else 1
        outcome = commands.run(arguments(verb, run, overrides), size, run, kill)
        assert outcome.statuses == [status] * size, log.read_text()

    if interrupted == "a full disk":
        start((), kill=Kill(0, 1, number=INTERRUPTIONS["SIGTERM"].number))
        enlarge = small_disk(run)
        start((), status=2)
        assert "No space left on device" in log.read_text()
        enlarge()
    elif how.kept is not None:
        kill = Kill(0, how.at_step, number=how.number) if how.number is not None else None
        start(how.overrides, -how.number if how.status.startswith("that") else int(how.status), kill)
        assert "Traceback" not in log.read_text()
        assert 1 <= reached(run) < STEPS
    kept = reached(run)

    if expected == REFUSED:
        log.write_text("")
        start(overrides, status=2)
        told = " ".join(log.read_text().split())
        assert "train.lr: 0.0003 there, 0.0002 now" in told
        assert "--change train.lr" in told
        start([*overrides, "--change", "train.lr"])
        changed = [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]
        of_start = [override.partition("=")[0] for override in how.overrides]  # they no longer hold, either
        assert [(line["step"], line["setting"]) for line in changed] == [(kept, key) for key in (*of_start, "train.lr")]
        assert f"the learning rate of step {kept + 1} is" in log.read_text()
        rates = [(line["step"], line["lr"]) for line in metrics_of(run)]
    else:
        start(overrides)

    if kept:
        assert f"continued after step {kept}" in log.read_text()

    reference: tuple[str, ...] = () if overrides in ((), ("overwrite=true",)) or expected != SAME else overrides
    if continued == "more `train.steps`" and how.kept is not None:
        reference = (*overrides, f"train.schedule_steps={STEPS}")
        assert f"the schedule of this run has {STEPS} steps: the learning rate of step {kept + 1} is" in log.read_text()
    whole = straight(verb, reference)
    lines, wanted = metrics_of(run), metrics_of(whole)
    last = f"checkpoints/step_{wanted[-1]['step']:08}"
    if expected == SAME:
        assert lines == wanted
        assert same_bits(run / last, whole / last)
        if METHODS[verb].samples:
            assert (run / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text()
    elif expected == NUMBERS:
        assert [line["step"] for line in lines] == [line["step"] for line in wanted]
        for line, other in zip(lines, wanted, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5)
            assert line["lr"] == other["lr"]
    else:
        assert lines[:kept] == wanted[:kept]
        assert rates[kept:] == [(line["step"], pytest.approx(line["lr"] * 2 / 3)) for line in wanted[kept:]]
