"""One step of preference tuning in several layouts, and the same in plain PyTorch on transformers' model."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from parity import (
    Toys,
    check_update,
    mostly_slow,
    named_as_in_hf,
    part_of,
    pieces_of,
    put_together,
    settings_of,
    targets_of,
)
from toy import reference_inputs, reference_model

# (processes, toy model, parallel settings)
LAYOUTS = {
    "one process": (1, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}
ROWS = ((0, 1), (2, 3), (4, 5, 6), (7,))
REJECTED = [
    "A dog.",
    "Nothing at all, or so it seems to me.",
    "No.",
    "Five, I think.",
    "Tea.",
    "Green.",
    "A letter.",
    "Yes, the same.",
]
# name: options of the loss that differ from its defaults
LOSSES = {
    "sigmoid": {"beta": 0.3, "label_smoothing": 0.1},
    "sigmoid_norm": {"beta": 2.0},
    "hinge": {"beta": 0.2},
    "ipo": {"beta": 0.4},
    "robust": {},
    "simpo": {},
    "orpo": {"lam": 0.5},
    "kto": {},
    "rm": {},
}
# small gradients: the update should stand above the rounding of the weights
LR = {"kto": 2.0, "robust": 1.0, "orpo": 1.0}
CENTERING = 0.05
SFT = {"sigmoid_norm": 0.3}  # weight of the chosen answers' likelihood
KTO = (0.2, 1.0, 1.3)  # beta, weights of good and bad answers


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def pairs_of(records: list[dict]) -> list[dict]:
    """Prompts with one and several pictures, a video, and none; the toys' answers are preferred."""
    return [
        {
            **{name: value for name, value in record.items() if name != "messages"},
            "messages": record["messages"][:-1],
            "chosen": record["messages"][-1]["content"],
            "rejected": REJECTED[number],
            "margin": number / 10,
        }
        for number, record in enumerate(records)
    ]


def judged_of(pairs: list[dict]) -> list[dict]:
    rest = [{n: v for n, v in pair.items() if n not in ("chosen", "rejected", "margin")} for pair in pairs]
    return [
        {**record, "completion": pair["chosen" if number % 3 else "rejected"], "label": bool(number % 3)}
        for number, (record, pair) in enumerate(zip(rest, pairs, strict=True))
    ]


def answered(record: dict, answer: str) -> dict:
    return {**record, "messages": [*record["messages"], {"role": "assistant", "content": answer}]}


@dataclass
class Expected:
    loss: float
    norms: dict[str, float]
    weights: dict[str, torch.Tensor]
    refs: list[tuple[float, float]]
    head: torch.Tensor | None = None


def plain_loss(name: str, c, j, ref, lengths, options: dict):
    """Of one pair, in words of METHODS: summed log-probabilities c and j, the reference's, tokens of each."""
    beta = options.get("beta", {"simpo": 2.5}.get(name, 0.1))
    delta = (c - ref[0]) - (j - ref[1])
    softplus = torch.nn.functional.softplus
    c_mean, j_mean = c / lengths[0], j / lengths[1]
    if name == "sigmoid":
        e = options["label_smoothing"]
        return (1 - e) * softplus(-beta * delta) + e * softplus(beta * delta)
    if name == "sigmoid_norm":
        mean = (c - ref[0]) / lengths[0] - (j - ref[1]) / lengths[1]
        return softplus(-beta * mean) - SFT[name] * c_mean
    if name == "hinge":
        return torch.relu(1 - beta * delta)
    if name == "ipo":
        mean = (c - ref[0]) / lengths[0] - (j - ref[1]) / lengths[1]
        return (mean - 1 / (2 * beta)) ** 2
    if name == "robust":
        return (0.9 * softplus(-beta * delta) - 0.1 * softplus(beta * delta)) / 0.8
    if name == "simpo":
        return softplus(-(beta * (c_mean - j_mean) - 0.55 * beta))
    odds = (c_mean - j_mean) - (torch.log1p(-c_mean.exp()) - torch.log1p(-j_mean.exp()))
    return -c_mean + options["lam"] * softplus(-odds)


def first_head(hidden: int) -> torch.Tensor:
    """[1, hidden], of a reward head before the step."""
    return torch.randn(1, hidden, generator=torch.Generator().manual_seed(5)) / 10


def expected(toys: Toys, kind: str, name: str) -> Expected:
    """The same step with transformers: each answer by itself, nothing packed, nothing shared."""
    from transformers import AutoProcessor

    folder = toys.folder(kind)
    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    pairs = pairs_of(toys.records)
    judged = judged_of(pairs)

    def logprob(record: dict, answer: str):
        record = answered(record, answer)
        inputs = reference_inputs(processor, record, toys.root)
        where = targets_of(processor, record, toys.root)
        before = targets_of(processor, answered({**record, "messages": record["messages"][:-1]}, ""), toys.root)
        where = where[len(before) - 1 :]  # the last turn alone: an empty answer there is its end token
        logprobs = model(**inputs).logits[0].log_softmax(-1)
        return logprobs[where - 1, inputs["input_ids"][0, where]].sum(), len(where)

    if name == "kto":
        answers = [(record["completion"], judged[(n + 1) % 8]["completion"]) for n, record in enumerate(judged)]
        records = judged
    else:
        answers, records = [(pair["chosen"], pair["rejected"]) for pair in pairs], pairs
    head = first_head(model.config.text_config.hidden_size).requires_grad_(True)

    def score(record: dict, answer: str):
        """At the end token of the answer, the last that is learned."""
        inputs = reference_inputs(processor, answered(record, answer), toys.root)
        last = targets_of(processor, answered(record, answer), toys.root)[-1]
        return (model.model(**inputs).last_hidden_state[0, last] * head[0]).sum(), 1

    of_answer = score if name == "rm" else logprob
    found = [[of_answer(record, answer) for answer in both] for record, both in zip(records, answers, strict=True)]
    # a reference that differs from the policy, in another way for each answer
    refs = [
        (own.item() + 0.7 * math.sin(n), other.item() - 0.9 * math.cos(n))
        for n, ((own, _), (other, _)) in enumerate(found)
    ]
    if name == "kto":
        beta, good, bad = KTO
        gaps = [other.item() - ref[1] for (_, (other, _)), ref in zip(found, refs, strict=True)]
        z0 = max(0.0, sum(gaps) / len(gaps))
        assert z0 > 0
        losses = []
        for record, ((own, _), _), ref in zip(judged, found, refs, strict=True):
            surplus = own - ref[0] - z0 if record["label"] else z0 - (own - ref[0])
            losses.append((good if record["label"] else bad) * (1 - torch.sigmoid(beta * surplus)))
    elif name == "rm":
        losses = [
            CENTERING * (own + other) ** 2 - torch.log(torch.sigmoid(own - other - pair["margin"]))
            for pair, ((own, _), (other, _)) in zip(pairs, found, strict=True)
        ]
    else:
        losses = [
            plain_loss(name, own, other, ref, lengths, LOSSES[name])
            for ((own, n), (other, m)), ref in zip(found, refs, strict=True)
            for lengths in [(n, m)]
        ]
    loss = sum(losses) / len(losses)
    loss.backward()
    squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[part_of(parameter_name)] += parameter.grad.double().square().sum().item()
                parameter -= LR.get(name, 0.2) * parameter.grad
        if head.grad is not None:
            squares["language"] += head.grad.double().square().sum().item()
            head -= LR.get(name, 0.2) * head.grad
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return Expected(loss.item(), {part: square**0.5 for part, square in squares.items()}, weights, refs, head)


def step_in_layout(folder, checkpoint, root, records, settings, name, refs):
    """Runs on every rank: one step. Returns (loss, norms, counts, fields, ``pieces_of`` the weights)."""
    from megavlm import platform
    from megavlm.align.objectives import JudgedObjective, PairObjective, RewardObjective
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.data.answer_groups import draft_unit
    from megavlm.data.renderer import Renderer
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.sources.jsonl import JsonlFile
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel)
    vlm = VLM(Shapes.from_hf(folder), settings, groups, score_head=name == "rm").train()
    load_weights(checkpoint, vlm)
    for chunk in vlm.language:
        if hasattr(chunk, "score_head"):
            chunk.score_head.weight.data.copy_(first_head(chunk.score_head.weight.shape[1]))
    renderer, file = Renderer(folder, settings.data, settings.pad_multiple), JsonlFile(records)
    kind = "judged" if name == "kto" else "pair"
    rows = []
    for places in ROWS:
        row = renderer.complete_row([draft_unit(renderer, file, place, kind) for place in places])
        logprobs = [refs[index][place % 2] for place, index in enumerate(row.indices)]
        pairs = zip(row.annotations, logprobs, strict=True)
        rows.append(replace(row, annotations=[replace(answer, ref_logprob=logprob) for answer, logprob in pairs]))
    each = len(rows) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    feed = Feed(vlm, iter(mine) if groups.is_leader else None)
    if name == "kto":
        objective = JudgedObjective(*KTO, 64, groups.language)
    elif name == "rm":
        sequence_parallel = settings.parallel.sequence_parallel
        objective = RewardObjective(CENTERING, groups.language, sequence_parallel=sequence_parallel)
    else:
        objective = PairObjective(name, LOSSES[name], 64, groups.language, sft_weight=SFT.get(name, 0.0))
    optimizers = Optimizers(vlm, settings.train)
    result = Step(vlm, optimizers, feed, each, objective, settings.vision.window)()
    optimizers.zero_grad()  # as a second step begins: Megatron checks that each gradient has been reduced
    return result.loss, result.norms, result.counts, result.fields, pieces_of(vlm)


@pytest.fixture(scope="module")
def files(toys) -> dict:
    """Files of pairs and of judged answers."""
    from toy import write_records

    pairs = pairs_of(toys.records)
    return {
        "pair": write_records(toys.root / "pairs.jsonl", pairs),
        "kto": write_records(toys.root / "judged.jsonl", judged_of(pairs)),
    }


@pytest.fixture(scope="module")
def expectations(toys):
    made = {}

    def expectation(kind: str, name: str) -> Expected:
        if (kind, name) not in made:
            made[kind, name] = expected(toys, kind, name)
        return made[kind, name]

    return expectation


@pytest.mark.parametrize(
    ("layout", "name"),
    # a layout does not ask which loss of pairs it is
    mostly_slow(
        [(layout, name) for layout in LAYOUTS for name in LOSSES],
        lambda case: case[0] == "one process" or case[1] in ("sigmoid", "orpo", "kto", "rm"),
    ),
)
def test_a_step_is_that_of_plain_pytorch(layout, name, toys, files, expectations, request):
    """To 1e-5 for the loss, 3e-5 for norms and 1e-4 for weights, of their update, as in the other layout tests."""
    from transformers.modeling_utils import load_state_dict

    processes, kind, parallel = LAYOUTS[layout]
    world, reference = request.getfixturevalue(f"world{processes}"), expectations(kind, name)
    settings = settings_of(
        toys.folder(kind),
        parallel,
        seq_length=512,
        lr=LR.get(name, 0.2),
        moe_aux_loss_coeff=0.0,
        **({"vision": {"window": 2}} if layout == "CP2" else {}),
    )
    file, folder = files["kto" if name == "kto" else "pair"], toys.folder(kind)
    ranks = world.run(step_in_layout, folder, toys.checkpoint(kind), toys.root, file, settings, name, reference.refs)
    loss, norms, counts, fields, _ = ranks[0]
    assert loss == pytest.approx(reference.loss, rel=1e-5)
    for part, norm in reference.norms.items():
        assert norms[f"grad_norm/{part}"] == pytest.approx(norm, rel=3e-5), part
    weights = put_together([pieces for *_, pieces in ranks])
    start, after = load_state_dict(str(folder / "model.safetensors")), named_as_in_hf(weights, folder)
    check_update(after, reference.weights, start)
    if name == "rm":
        head, before = weights["language.score_head.weight"], first_head(reference.head.shape[1])
        assert (head - reference.head).norm() <= 1e-4 * (reference.head - before).norm()
    assert counts["frames_encoded"] == counts["frames"] == 11  # of the prompts: once for both answers
    assert counts["samples"] == 16
    assert fields["accuracy"] >= 0


def test_a_pair_shares_its_pictures(toys, files):
    from megavlm.config.settings import DataSettings
    from megavlm.data.answer_groups import draft_unit
    from megavlm.data.renderer import Renderer
    from megavlm.sources.jsonl import JsonlFile

    renderer = Renderer(toys.folder("dense"), DataSettings(seq_length=512))
    file = JsonlFile(files["pair"])
    row = renderer.complete_row([draft_unit(renderer, file, place, "pair") for place in (1, 3, 2)])
    assert row.num_samples == 6
    assert (row.num_images, row.num_videos) == (3, 1)
    assert row.use_frames.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 3, 4]
    assert len(row.frame_grids) == 5
    assert len(row.pixels) == (row.frame_grids.prod(dim=1) * row.frame_images).sum()  # a step of a video has two
    assert [answer.margin for answer in row.annotations] == [0.1, None, 0.3, None, 0.2, None]
