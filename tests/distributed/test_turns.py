"""Answers in several turns by the built-in engine: what is learned is what transformers computes of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from killing import Commands, Kill
from parity import mostly_slow, part_of, settings_of
from PIL import Image
from test_kill import is_continued
from toy import reference_model, toy_records, write_records

from megavlm.monitor.metrics import read_metrics

DOORS = Path(__file__).parents[1] / "environments" / "doors.py"
# Toys never end an answer by themselves; these letters do.
STOP = ["a", "e", "i", "o", "n", "t", "s", "r"]
ENVIRONMENT = {"python": f"{DOORS}:Doors", "max_turns": 3, "max_tokens": 90, "workers": 1}
NUMBER, COUNT = 0, 4  # the toy record with one picture, and the number of answers


def learn(settings: dict, record: dict, root: Path):
    """Runs on every rank: an update from conversations.

    Returns the answers (on leaders), norms, fields and counts of the step, and the frames that this rank has encoded.
    """
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.data.row import Annotations, Asked
    from megavlm.media.files import in_folder
    from megavlm.optim.optimizers import Optimizers
    from megavlm.reinforcement.engines import in_turns
    from megavlm.reinforcement.grpo import Policy, _sampling
    from megavlm.reinforcement.judged import Batch, Judged
    from megavlm.reinforcement.policy_objective import PolicyObjective
    from megavlm.reinforcement.policy_step import PolicyStep
    from megavlm.rewards.score import Score
    from megavlm.rollout.builtin import BuiltinEngine
    from megavlm.rollout.engine import Prompt
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import start
    from megavlm.training.step import Step

    settings = Settings(**settings)
    session = start(settings, training=True)
    groups = session.groups
    reader = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
    renderer = reader if groups.is_leader else None
    engine = BuiltinEngine(
        session.vlm, places=3, cache_gib=0.1, cache_setting="", prompt_tokens=256, chunk_tokens=7,
        decode=reader.tokenizer.decode, special=reader.tokenizer.all_special_ids,
        records_routing=session.shapes.text.moe is not None,
    )  # fmt: skip
    conversations = in_turns(session, engine, renderer)
    found = []

    class Sampled:
        def collect(self) -> Batch:
            prompts = None
            if renderer is not None:
                sample = renderer.encode(record, in_folder(root), "asked.jsonl:1", kind="prompt", index=0)
                asked = Asked(columns=record, question="", media=[], reference=None)
                sample.annotations = Annotations(asked=asked)
                prompts = iter([Prompt(sample, tuple(range(3, 3 + COUNT)))])
            found.extend(conversations.generate(prompts, _sampling(session, (reader.tokenizer.eos_token_id,))))
            scores, advantages = [Score(0.0, {}, [])] * COUNT, [1.0 + number for number in range(COUNT)]
            judged = [Judged(one, [""] * COUNT, scores, [0.0] * COUNT, advantages) for one in found]
            return Batch(judged, judged, {}, {}, [])

    objective = PolicyObjective(Policy.of(settings).options, 64, groups.language)
    optimizers = Optimizers(session.vlm, settings.train, 1)
    step = Step(session.vlm, optimizers, Feed(session.vlm, None), 1, objective, settings.vision.window)
    seen: list[int] = []
    session.vlm.vision.register_forward_pre_hook(lambda _, frames: seen.append(len(frames[0].lengths)))
    try:
        result = PolicyStep(session, step, Sampled(), objective, renderer, None)()
    finally:
        conversations.close()
    answers = [answer for one in found for answer in one.answers]
    return answers, result.norms, result.fields, result.counts, sum(seen)


# (processes, toy model, parallel settings)
LAYOUTS = {
    "one process": (1, "dense", {}),
    "CP2": (2, "dense", {"context": 2}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}


def given(toys, layout: str) -> tuple[dict, dict]:
    """The settings of a layout, and the question that is asked."""
    _, kind, parallel = LAYOUTS[layout]
    record = toy_records(toys.root)[NUMBER]
    settings = settings_of(toys.folder(kind), parallel, seq_length=256, lr=0.1, moe_aux_loss_coeff=0.0)
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"loss": "dr_grpo"}
    settings["rollout"] = {"group_size": COUNT, "max_new_tokens": 6, "stop": STOP}
    settings["environment"] = ENVIRONMENT
    return settings, {**record, "messages": record["messages"][:1]}


@pytest.mark.parametrize("layout", mostly_slow(["one process", "TP2"], lambda layout: layout == "one process"))
def test_a_frozen_tower_sees_each_shown_picture_once(layout, toys, request):
    """Each turn is a prompt with all pictures so far, and answers with pictures of their own share none in rows."""
    settings, record = given(toys, layout)
    settings["model"]["freeze"] = ["vision"]
    ranks = request.getfixturevalue(f"world{LAYOUTS[layout][0]}").run(learn, settings, record, toys.root)
    answers, _, fields, counts, _ = ranks[0]
    shown = sum(len(answer.continued.frame_grids) - 1 for answer in answers)
    assert 2 <= fields["frames_kept"] <= 1 + shown
    assert sum(seen for *_, seen in ranks) == fields["frames_kept"]
    assert counts["frames"] > fields["frames_kept"]
    assert counts["frames_encoded"] == 0
    assert fields["mismatch_max"] < 2e-5


@pytest.mark.parametrize("layout", mostly_slow(list(LAYOUTS), lambda layout: layout in ("one process", "CP2")))
def test_what_is_learned_is_what_the_model_said(layout, toys, request):
    """Log-probabilities, and the gradients of −Σ advantage · log p over what was said, with the pictures of both.

    To 3e-5 for the norms, as in the other tests of layouts, and 2e-5 for log-probabilities of some −7 nats.
    """
    from transformers import AutoProcessor

    processes, kind, _ = LAYOUTS[layout]
    folder, (settings, record) = toys.folder(kind), given(toys, layout)
    ranks = request.getfixturevalue(f"world{processes}").run(learn, settings, record, toys.root)
    answers = [answer for rank in ranks for answer in rank[0]]
    _, norms, fields, counts, _ = ranks[0]
    assert {answer.num_turns for answer in answers} >= {2, 3}
    assert fields["mismatch_max"] < 2e-5
    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    copies = 2 if layout == "MoE EP2" else 1  # two data-parallel ranks learn from the same
    assert len(answers) == COUNT * copies
    total = 0.0
    for number, answer in enumerate(answers[:COUNT]):
        assert answer.failures == ()
        ids, shown = answer.continued.input_ids, [Image.open(toys.root / record["images"][0]).convert("RGB")]
        own = [turn for turn in answer.turns if turn.by == "environment"][: answer.num_turns - 1]
        texts = [turn.text for turn in answer.turns if turn.by == "model"]
        for said, text in enumerate(texts[: len(own)], 1):
            level = sum(map(ord, processor.tokenizer.decode(processor.tokenizer(text)["input_ids"]))) % 256
            shown.append(Image.fromarray(np.full((32 * said, 64, 3), level, np.uint8)))
        pictures = processor.image_processor(images=shown, return_tensors="pt")
        image = (ids == processor.image_token_id).long()
        logits = model(input_ids=ids[None], mm_token_type_ids=image[None], **pictures).logits[0]
        logs = logits[:-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0][-len(answer.tokens) :]
        said = torch.tensor(answer.said)
        assert int(said.sum()) == answer.num_said == sum(value != 0 for value in answer.policy_logprobs)
        torch.testing.assert_close(torch.tensor(answer.policy_logprobs)[said], logs[said].detach(), atol=2e-5, rtol=0)
        total = total - (1.0 + number) * logs[said].sum()
    # dr_grpo divides by the number of answers and by a constant length
    (total / COUNT / ENVIRONMENT["max_tokens"]).backward()
    squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
    for name, parameter in model.named_parameters():
        squares[part_of(name)] += parameter.grad.double().square().sum().item()
    for part, square in squares.items():
        assert norms[f"grad_norm/{part}"] == pytest.approx(square**0.5, rel=3e-5), part
    assert counts["target_tokens"] == copies * sum(answer.num_said for answer in answers[:COUNT])


@pytest.fixture(scope="module")
def grpo(toys, tmp_path_factory):
    """grpo(output, overrides): arguments of a run with an environment, and without any other reward."""
    folder = tmp_path_factory.mktemp("turns")

    def arguments(output, *overrides) -> list[str]:
        config = {
            "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
            "data": {
                "train": [{"path": str(write_records(toys.root / "doors.jsonl", toy_records(toys.root)))}],
                "seq_length": 256, "workers": 1,
            },
            "train": {"steps": 4, "lr": 1e-3, "precision": "fp32", "warmup_steps": 1, "memory_check": False},
            "align": {"beta": 0},
            "rollout": {"prompts": 4, "group_size": 3, "max_new_tokens": 6, "stop": STOP, "log_every": 1},
            "environment": ENVIRONMENT,
            "checkpoint": {"every": 2, "keep": 2},
            "log": {"wandb": {"mode": "off"}},
        }  # fmt: skip
        path = folder / f"{output.name}.yaml"
        path.write_text(json.dumps(config))
        return ["grpo", str(path), f"output={output}", *overrides]

    return arguments


@pytest.mark.slow  # three starts of two processes
def test_killed_and_started_again_it_speaks_the_same(grpo, tmp_path):
    """On two ranks. Conversations of a step that was cut off begin anew."""
    commands = Commands(reports=False)
    kills = [
        lambda done: Kill(rank=0, step=done + 1, writing=True),
        lambda done: Kill(rank=1, step=done + 1, delay=0.1),
    ]
    try:
        is_continued(commands, grpo, tmp_path / "straight", tmp_path / "killed", kills, 4)
    finally:
        commands.close()
    texts = [(tmp_path / run / "rollouts.jsonl").read_text() for run in ("straight", "killed")]
    assert texts[0] == texts[1]
    lines = read_metrics(tmp_path / "straight")
    for line in lines:
        assert 1 < line["turns"] <= 3
        assert line["environment_failures"] == 0
        assert 0 <= line["truncated_by_turns"] <= 1
        assert line["seconds_environment"] <= line["seconds_rollout"]
        assert 0 < line["reward"] == line["reward/environment"]
        assert line["grad_norm"] > 0
    answers = [answer for group in json.loads(texts[0].splitlines()[0])["groups"] for answer in group["answers"]]
    spoken = max(answers, key=lambda answer: len(answer["turns"]))
    assert [turn["by"] for turn in spoken["turns"][:4]] == ["model", "environment"] * 2
    assert spoken["turns"][1]["pictures"][0].startswith("data:image/jpeg;base64,")
    assert "Door" in spoken["turns"][1]["text"]


TROUBLE = ["raise", "raise at reset", "hang", "exit", "broken", "nan", "fine", "fine"]


def test_a_bad_environment_costs_only_its_answers(grpo, toys, tmp_path):
    """Two answers to each prompt. The run goes on, and the answers that failed are named."""
    import forked_command

    output = tmp_path / "bad"
    records = [record | {"what": what} for record, what in zip(toy_records(toys.root), TROUBLE, strict=True)]
    arguments = grpo(output, "train.steps=1", "train.warmup_steps=0", "data.workers=0", "data.shuffle=false")
    data = write_records(toys.root / "bad_doors.jsonl", records)
    odd = DOORS.parent / "odd_environments.py"
    arguments += [f"data.train=[{{path: {data}}}]", "rollout.prompts=8", "rollout.group_size=2", "data.seq_length=320"]
    arguments += [f"environment.python={odd}:Counter", "environment.timeout=2.0", "environment.workers=2"]
    arguments += ["environment.max_turns=2", "reward_pool.max_failed_fraction=1.0", "reward=[{name: length, limit: 3}]"]
    result = forked_command.run(arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    [line] = read_metrics(output)
    assert line["environment_failures"] == line["reward_failures"] == 2 * 6
    assert line["groups"] == 8
    assert line["grad_norm"] > 0
    failed = [json.loads(text) for text in (output / "reward_failures.jsonl").read_text().splitlines()]
    causes = {TROUBLE[int(one["sample"].rpartition(":")[2]) - 1]: one["cause"] for one in failed}
    assert {one["reward"] for one in failed} == {"environment"}
    expected = {
        "raise": "step: RuntimeError: the door is stuck",
        "raise at reset": "reset: KeyError",
        "hang": "no result after",
        "exit": "its process ended with status 3",
        "broken": "picture 1 of its environment cannot be read",
        "nan": "step: its reward is nan",
    }
    assert causes.keys() == expected.keys()
    for what, cause in expected.items():
        assert cause in causes[what], (what, causes[what])
    groups = json.loads((output / "rollouts.jsonl").read_text())["groups"]
    assert groups[0]["answers"][0]["reward"] is None
