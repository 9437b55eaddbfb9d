"""Every setting with the extremes of its type: refused by name, or a value with which a run makes sense."""

import json
import types
import typing
from pathlib import Path

import pytest
from spoiling import run_apart

from megavlm.base.errors import UserError
from megavlm.commands import validate
from megavlm.config import describe
from megavlm.config.load import load_settings
from megavlm.model.shapes import Shapes

KEYS = [entry.key for entry in describe.entries()]
HUGE = 10**6  # from here on, a number must be in UNLIMITED
WHOLE = (-(2**63), -1, 0, 1, 2, HUGE, 2**31 - 1, 2**31, 10**30)
REAL = (-1e300, -1e-300, -1.0, 0.0, 1e-300, 1e-40, 1e-30, 0.5, 1.0, 1e6, 1e37, 1e300, float("inf"), float("nan"))
TEXT = ("", " ", "x", "a\0b", "x" * 5000, "${NOWHERE", "é\ud83d")
OTHER = (None, True, [], {}, [[]], [None], {"x": 1}, {"vision": -1}, ["vision"] * 2, [{"path": "a"}] * 2, "é")

# What must be set as well, so that the setting is not refused because it would have no effect.
LORA = ("model.load=mcore", "adapter.type=lora")
GALORE = ("train.optimizer=galore",)
PIPELINE = ("parallel.pipeline=2",)
BESIDE = {
    "adapter.rank": LORA, "adapter.alpha": LORA, "adapter.rslora": LORA, "adapter.dropout": LORA,
    "adapter.rank_pattern": LORA, "adapter.alpha_pattern": LORA, "adapter.targets": LORA, "adapter.quantize": LORA,
    "adapter.lr_ratio": LORA, "adapter.modules_to_save": LORA, "train.muon_momentum": ("train.optimizer=muon",),
    "adapter.frequencies": ("model.load=mcore", "adapter.type=fourierft"),
    "adapter.scaling": ("model.load=mcore", "adapter.type=fourierft", "adapter.frequencies=10"),
    "adapter.seed": ("model.load=mcore", "adapter.type=fourierft", "adapter.frequencies=10"),
    "train.profile.steps": ("train.profile.start=1",), "train.profile.ranks": ("train.profile.start=1",),
    "train.galore_rank": GALORE, "train.galore_update_every": GALORE, "train.galore_scale": GALORE,
    "parallel.virtual_pipeline": PIPELINE, "parallel.first_stage_layers": PIPELINE,
    "parallel.last_stage_layers": PIPELINE, "checkpoint.keep_every": ("checkpoint.every=1",),
    "generate.samples": ("generate.temperature=1.0",),
    "generate.top_p": ("generate.temperature=1.0",), "generate.top_k": ("generate.temperature=1.0",),
    **{
        f"rollout.{name}": ("rollout.engine=vllm",)
        for name in ("ahead", "vllm.python", "vllm.url", "vllm.servers", "vllm.tensor_parallel",
                     "vllm.devices", "vllm.start_minutes", "vllm.request_minutes", "vllm.args")
    },
    "rollout.partial": ("rollout.engine=vllm", "rollout.ahead=1"),
    "train.epochs": ("train.steps=null",), "train.restarts": ("train.schedule=cosine",),
    "train.decay_share": ("train.schedule=wsd",), "train.decay_shape": ("train.schedule=wsd",),
    "train.schedule_table": ("train.schedule=table",), "train.batch_ramp": ("train.global_batch_size=2147483647",),
    "train.batch_ramp_lr": ("train.global_batch_size=2", "train.batch_ramp={1: 1}", "train.steps=3"),
    "train.warmup_steps": ("train.steps=2147483647",), "train.min_lr": ("train.lr=1000", "train.schedule=cosine"),
    "parallel.expert": ("train.global_batch_size=null",), "parallel.expert_tensor": ("train.global_batch_size=null",),
    **dict.fromkeys(
        ("environment.options", "environment.max_turns", "environment.role", "environment.weight",
         "environment.timeout", "environment.workers"),
        ("environment.python=doors.py:Doors", "environment.max_tokens=2000"),
    ),
    "environment.python": ("environment.max_tokens=2000",),
    "environment.max_tokens": ("environment.python=doors.py:Doors",),
    "data.min_pixels": ("data.max_pixels=2147483647",),
    **dict.fromkeys(("eval.every", "eval.every_epochs"), ("data.eval=eval.jsonl",)),
    **dict.fromkeys(
        ("eval.answers.samples", "eval.answers.scorer", "eval.answers.max_new_tokens"),
        ("data.eval=eval.jsonl", "eval.every=1"),
    ),
    **dict.fromkeys(("eval.rows", "eval.best"), ("data.eval=eval.jsonl", "eval.every=1")),
    "eval.stop_after": ("data.eval=eval.jsonl", "eval.every=1", "eval.best=eval/loss"),
}  # fmt: skip

# Numbers without an upper limit of their own, and what a huge one means.
UNLIMITED = {
    **dict.fromkeys(("adapter.seed", "train.seed"), "a seed"),
    **dict.fromkeys(
        (
            "train.steps", "train.global_batch_size", "train.warmup_steps", "generate.max_new_tokens",
            "eval.answers.max_new_tokens",
            "generate.samples", "rollout.prompts", "rollout.group_size", "rollout.max_new_tokens",
            "rollout.replace_flat", "align.updates", "align.mini_batches", "align.critic.alone_steps",
            "align.critic.warmup_steps", "environment.max_turns", "environment.max_tokens", "rollout.ahead",
        ),
        "as much work as was asked for",
    ),
    **dict.fromkeys(
        ("eval.every", "eval.every_epochs", "eval.rows", "eval.answers.samples", "eval.stop_after",
         "checkpoint.every", "checkpoint.every_epochs",
         "checkpoint.every_minutes", "checkpoint.keep", "checkpoint.keep_every", "log.every",
         "train.galore_update_every", "rollout.log_every", "rollout.vllm.start_minutes",
         "rollout.vllm.request_minutes"),
        "never, or always",
    ),
    **dict.fromkeys(
        (
            "data.max_patches_per_row", "data.max_pixels", "data.min_pixels", "data.video_max_frames", "data.video_fps",
            "data.video_min_pixels", "data.video_max_pixels", "data.video_max_pixels_per_frame",
            "data.max_image_megapixels", "vision.chunk_patches", "vision.window",
            "train.logprob_chunk_tokens", "train.max_skipped_steps",
            "generate.batch_size", "generate.top_k", "data.packing_buffer", "train.hang_minutes",
            "rollout.vllm.servers", "rollout.vllm.tensor_parallel",
            "generate.cache_gib", "rollout.cache_gib", "rollout.max_sequences", "rollout.top_k",
            "align.overlong_cache", "align.correction_lowest", "align.correction_highest", "align.critic.clip",
            "environment.timeout",
        ),
        "no limit: as many as there are, or a sample that is too long",
    ),
    **dict.fromkeys(
        (
            "train.adam_eps", "train.clip_grad",
            "train.moe_aux_loss_coeff", "train.moe_z_loss_coeff", "train.kl_to_start", "train.loss.z_loss",
            "adapter.alpha", "adapter.scaling", "align.beta", "adapter.lr_ratio", "align.sft_weight",
            "align.gamma", "align.lam", "align.desirable_weight", "align.undesirable_weight", "align.centering",
            "generate.temperature", "rollout.temperature", "align.epsilon", "align.epsilon_high", "align.dual_clip",
            "align.tau_pos", "align.tau_neg", "environment.weight",
        ),
        "a bad choice, with which steps are skipped or nothing is learned",
    ),
}  # fmt: skip


def kinds_of(annotation: typing.Any) -> set:
    """The types in an annotation: {int, NoneType} for `Int | None`."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        inner = typing.get_args(annotation)
        inner = inner[:1] if typing.get_origin(annotation) is typing.Annotated else inner
        return set().union(*map(kinds_of, inner))
    return {annotation}


def values_of(key: str) -> list:
    kinds = kinds_of(describe.find(tuple(key.split("."))).annotation)
    values = [*OTHER]
    if kinds & {int, float}:
        values += [*WHOLE, *REAL]
    if kinds & {str, Path}:
        values += TEXT
    return values


@pytest.fixture
def configuration(place, monkeypatch):
    """run.yaml, with a model whose shapes are read once."""
    shapes = Shapes.from_hf(place / "hf")
    monkeypatch.setattr(Shapes, "from_hf", lambda folder: shapes)
    return place / "run.yaml"


def written(value: object) -> str:
    if isinstance(value, float) and not value < float("inf"):
        return ".nan" if value != value else ".inf"
    return json.dumps(value)


def refusal(configuration: Path, key: str, override: str) -> UserError | None:
    """What is said of a setting when it is read, or by `validate`; None if it is accepted."""
    try:
        settings = load_settings(configuration, [*BESIDE.get(key, ()), override])
        if key != "model.hf":
            validate.main(settings, no_files=True)
    except UserError as error:
        return error
    return None


@pytest.mark.parametrize("key", KEYS)
def test_extremes(configuration, key, capsys):
    """Refused by name, or a value of which it is known that it makes sense."""
    for value in values_of(key):
        override = f"{key}={written(value)}"
        if (error := refusal(configuration, key, override)) is not None:
            told = str(error).replace(override, "")  # which says where the setting was written
            # of two settings that contradict each other, the message may name the other one, and this in its remedy
            assert key in told or key.rpartition(".")[2] in told, (override, told[:300])
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) >= HUGE:
            assert key in UNLIMITED, f"{override} is accepted: give the setting a limit, or say what it means"
    capsys.readouterr()


def test_every_setting_without_a_limit_exists():
    assert not set(UNLIMITED) - set(KEYS)
    assert not set(BESIDE) - set(KEYS)


@pytest.mark.parametrize(
    ("verb", "overrides"),
    [
        (
            "sft",
            (
                "train.lr=1000", "train.clip_grad=1e-6", "train.logprob_chunk_tokens=1", "vision.chunk_patches=4",
                "vision.window=2147483647", "data.packing_buffer=1", "log.every=2147483647",
                "checkpoint.every=2147483647", "data.max_pixels=2147483647", "data.video_fps=1e37",
                "train.steps=2", "train.warmup_steps=2", "train.galore_scale=1000", "train.optimizer=galore",
            ),
        ),
        ("sft", ("train.lr=1000", "train.adam_eps=1e-37", "train.weight_decay=1000", "train.max_skipped_steps=0")),
        (
            "infer",
            (
                "generate.temperature=1e-3", "generate.top_k=2147483647", "generate.top_p=1e-37",
                "generate.max_new_tokens=2", "generate.batch_size=2147483647",
            ),
        ),
        ("infer", ("generate.temperature=1e37", "generate.top_k=1", "generate.max_new_tokens=1")),
    ],
    ids=["odd but well", "numbers that overflow", "nearly greedy", "nearly uniform"],
)  # fmt: skip
def test_extremes_that_are_accepted_run(place, verb, overrides):
    """To the end, or to a message: a run whose numbers overflow says so."""
    status, printed = run_apart(verb, "run.yaml", *overrides)
    assert "Traceback" not in printed, printed
    assert (status, "error:" in printed) in ((0, False), (1, True)), printed
