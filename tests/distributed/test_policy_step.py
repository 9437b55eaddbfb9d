"""Steps of reinforcement learning in several layouts, and the same in plain PyTorch on transformers' model.

The answers are given, so that all that is computed from them is compared: two updates, so that the second has ratios of
new to old probabilities other than 1, and a model that has moved away from its reference.
"""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from parity import Toys, check_update, mostly_slow, named_as_in_hf, part_of, pieces_of, put_together, settings_of
from toy import reference_inputs, reference_model

from megavlm.align.losses import correction, policy_loss

# (processes, toy model, parallel settings)
LAYOUTS = {
    "one process": (1, "dense", {}),
    "DP2": (2, "dense", {}),
    "TP2": (2, "dense", {"tensor": 2}),
    "PP2": (2, "dense", {"pipeline": 2}),
    "PP2 × VPP2": (2, "dense", {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "MoE EP2": (2, "moe", {"expert": 2}),
}
# name, unless the section align has another: (section align, temperature, learning rate). The rates are such that the
# second update clips some tokens.
LOSSES = {
    "grpo": ({"beta": 0.2}, 0.7, 0.5),
    "dr_grpo": ({"correction": "token_truncate"}, 1.0, 2.0),
    "dapo": ({"epsilon": 0.1}, 1.0, 0.5),
    "gspo": ({"epsilon": 0.05, "epsilon_high": 0.08, "correction": "sequence_mask"}, 1.0, 1.0),
    "sapo": ({}, 1.3, 0.5),
    "cispo": ({"epsilon_high": 1.1, "correction": "token_mask"}, 1.0, 0.5),
    "rloo": ({"loss": "dr_grpo", "advantage": "rloo"}, 1.0, 2.0),  # the numbers of the answers are their rewards
}
PROMPTS, GROUP, MOST = (0, 1, 2, 3), 3, 9


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def given() -> list[list[tuple[list[int], list[float], float]]]:
    """For each prompt its answers: tokens, log-probabilities of the sampler, and the advantage, or the reward."""
    draw = torch.Generator().manual_seed(3)
    groups = []
    for prompt in range(len(PROMPTS)):
        lengths = torch.randint(1, MOST + 1, (GROUP,), generator=draw).tolist()
        advantages = (torch.randn(GROUP, generator=draw) + 0.2 * prompt).tolist()
        groups.append([
            (
                torch.randint(5, 60, (length,), generator=draw).tolist(),
                (torch.randn(length, generator=draw) - 6).tolist(),
                advantage,
            )
            for length, advantage in zip(lengths, advantages, strict=True)
        ])  # fmt: skip
    return groups


def question(record: dict) -> dict:
    """A conversation without its last answer."""
    return {**record, "messages": record["messages"][:-1]}


def answered(processor, toys: Toys, number: int, tokens: list[int]) -> dict[str, torch.Tensor]:
    """The inputs of transformers' model for the question of a toy record, followed by an answer."""
    inputs = reference_inputs(processor, question(toys.records[number]), toys.root, add_generation_prompt=True)
    added = {"input_ids": torch.tensor([tokens])}
    added |= {
        name: torch.full((1, len(tokens)), fill) for name, fill in (("attention_mask", 1), ("mm_token_type_ids", 0))
    }
    return {name: torch.cat([value, added[name]], dim=1) if name in added else value for name, value in inputs.items()}


def expected(
    toys: Toys, kind: str, loss: str, frozen: tuple[str, ...] = (), groups: list | None = None
) -> tuple[list[float], dict[str, float], dict[str, torch.Tensor]]:
    """The losses and norms of two updates (means), and the weights after them, with transformers.

    ``groups``: the answers; None: those of ``given``.
    """
    from transformers import AutoProcessor

    align, temperature, lr = LOSSES[loss]
    loss = align.get("loss", loss)
    folder, answers = toys.folder(kind), [answer for group in groups or given() for answer in group]
    if align.get("advantage") == "rloo":
        answers = [less_the_others(group, n) for group in groups or given() for n in range(GROUP)]
    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    mask = torch.tensor([[float(t < len(tokens)) for t in range(MOST)] for tokens, _, _ in answers])
    padded = lambda rows: torch.stack([torch.nn.functional.pad(row, (0, MOST - len(row))) for row in rows])

    def logprobs() -> torch.Tensor:
        rows = []
        for number, (tokens, _, _) in enumerate(answers):
            inputs = answered(processor, toys, PROMPTS[number // GROUP], tokens)
            logits = model(**inputs).logits[0, -len(tokens) - 1 : -1]
            rows.append((logits / temperature).log_softmax(-1)[range(len(tokens)), tokens])
        return padded(rows)

    with torch.no_grad():
        old = logprobs()
    sampled = padded([torch.tensor(logs) for _, logs, _ in answers])
    weights, mismatch = correction(align.get("correction", "off"), old, sampled, mask)
    options = {name: value for name, value in align.items() if name in ("epsilon", "epsilon_high")}
    if loss == "dr_grpo":
        options["max_length"] = MOST
    losses, all_norms = [], []
    for _ in range(2):
        model.zero_grad()
        advantage = torch.tensor([[a] for _, _, a in answers])
        value, metrics = policy_loss(
            loss, logprobs(), old, advantage, mask, old, beta=align.get("beta", 0.0), weights=weights, **options
        )
        value.backward()
        losses.append(value.item())
        squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if part_of(name) in frozen:
                    continue
                squares[part_of(name)] += parameter.grad.double().square().sum().item()
                parameter -= lr * parameter.grad
        all_norms.append({part: square**0.5 for part, square in squares.items()})
    norms = {part: sum(norms[part] for norms in all_norms) / 2 for part in all_norms[0]}
    after = {name: value.clone() for name, value in model.state_dict().items()}
    return losses, norms | {name: value.item() for name, value in (metrics | mismatch).items()}, after


def less_the_others(group: list[tuple], number: int) -> tuple:
    """An answer with its advantage instead of its reward: RLOO's, the reward less the mean of the others."""
    (tokens, logs, reward), others = group[number], [reward for _, _, reward in group[:number] + group[number + 1 :]]
    return tokens, logs, reward - sum(others) / len(others)


def step_in_layout(settings: dict, root, records: list[dict], answers: list | None = None):
    """Runs on every rank: a step with two updates. Returns its result, and this rank's pieces of the weights.

    ``answers``: those to the records; None: those of ``given``.
    """
    session, step = policy_step(settings, root, records, answers)
    result = step()
    return result.loss, result.norms, result.counts, result.fields, pieces_of(session.vlm)


def policy_step(settings: dict, root, records: list[dict], answers: list | None = None, *, samples: bool = False):
    """On every rank: a session, and what takes a step with these answers whenever it is called.

    ``samples``: whether the prompts are first given to the built-in engine, whose answers are not used.
    """
    from megavlm.align.losses import advantages
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.data.row import Annotations, Asked
    from megavlm.media.files import in_folder
    from megavlm.optim.optimizers import Optimizers
    from megavlm.reinforcement.grpo import Policy
    from megavlm.reinforcement.judged import Batch, Judged
    from megavlm.reinforcement.policy_objective import PolicyObjective
    from megavlm.reinforcement.policy_step import PolicyStep
    from megavlm.rewards.score import Score
    from megavlm.rollout.engine import Answer, Answered, Prompt, Sampling
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import start
    from megavlm.training.memory_check import check_memory, longest_row
    from megavlm.training.start_weights import StartWeights
    from megavlm.training.step import Step

    settings = Settings(**settings)
    session, groups = start(settings, training=True), None
    groups, options = session.groups, Policy.of(settings).options
    renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple) if groups.is_leader else None

    class Given:
        def collect(self) -> Batch:
            judged = []
            for number, (record, group) in enumerate(zip(records, answers or given(), strict=True)):
                if renderer is None or number % groups.dp_size != groups.dp_rank:
                    continue
                sample = renderer.encode(record, in_folder(root), f"prompt {number}", kind="prompt", index=number)
                asked = Asked(columns=record, question="", media=[], reference=None)
                sample.annotations = Annotations(asked=asked)
                made = [Answer(tokens, logs, logs, logs, "stop") for tokens, logs, _ in group]
                numbers = [number for _, _, number in group]
                if settings.align.advantage is not None:
                    numbers = advantages(settings.align.advantage, torch.tensor(numbers), GROUP).tolist()
                answered = Answered(Prompt(sample, tuple(range(GROUP))), made)
                scores = [Score(0.0, {}, [])] * GROUP
                judged.append(Judged(answered, [""] * GROUP, scores, [0.0] * GROUP, numbers))
            if samples:
                prompts = [group.answered.prompt for group in judged]
                for _ in engine_of(session).generate(iter(prompts) if renderer else None, Sampling(MOST)):
                    pass
            return Batch(judged, judged, {}, {}, [])

    objective = PolicyObjective(options, 64, groups.language)
    optimizers = Optimizers(session.vlm, settings.train, settings.align.updates)
    step = Step(session.vlm, optimizers, Feed(session.vlm, None), 1, objective, settings.vision.window)
    reference = StartWeights(session, offload=True) if options.beta else None
    if dist.get_world_size() == 1:  # what was never sampled leaves no trace in the metrics of the step
        check_memory([step], partial(longest_row, renderer), settings)
    return session, PolicyStep(session, step, Given(), objective, renderer, reference)


def engine_of(session):
    from megavlm.rollout.builtin import BuiltinEngine

    sizes = {"places": 6, "cache_gib": 0.1, "prompt_tokens": 256, "chunk_tokens": 64}
    return BuiltinEngine(session.vlm, cache_setting="rollout.cache_gib", **sizes)


def weights_of(ranks: list[tuple], folder) -> dict[str, torch.Tensor]:
    return named_as_in_hf(put_together([pieces for *_, pieces in ranks]), folder)


def start_of(folder) -> dict[str, torch.Tensor]:
    from transformers.modeling_utils import load_state_dict

    return load_state_dict(str(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def expectations(toys):
    made = {}

    def expectation(kind: str, loss: str):
        if (kind, loss) not in made:
            made[kind, loss] = expected(toys, kind, loss)
        return made[kind, loss]

    return expectation


@pytest.mark.parametrize(
    ("layout", "loss"),
    # a layout does not ask which loss of tokens, or of whole answers, it is
    mostly_slow(
        [(layout, loss) for layout in LAYOUTS for loss in LOSSES],
        lambda case: case[0] == "one process" or (case[1] in ("dapo", "gspo") and case[0] != "PP2"),
    ),
)
def test_two_updates_are_those_of_plain_pytorch(layout, loss, toys, expectations, request):
    """To 1e-5 for the loss, 3e-5 for norms and 1e-4 for weights, of their update, as in the other layout tests."""
    processes, kind, parallel = LAYOUTS[layout]
    align, temperature, lr = LOSSES[loss]
    losses, wanted, weights = expectations(kind, loss)
    # In short rows, one data-parallel rank has more of them than the other, which fills up.
    seq_length = 192 if layout == "DP2" else 512
    settings = settings_of(toys.folder(kind), parallel, seq_length=seq_length, lr=lr, moe_aux_loss_coeff=0.0)
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"loss": loss, "updates": 2, **align}
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST, "temperature": temperature}
    world, records = request.getfixturevalue(f"world{processes}"), [toys.records[n] for n in PROMPTS]
    ranks = world.run(step_in_layout, settings, toys.root, records)
    found, norms, counts, fields, _ = ranks[0]
    # advantages around 1 of both signs nearly cancel in the loss; each is rounded to 6e-8 in float32
    assert found == pytest.approx(sum(losses) / 2, rel=1e-5, abs=2e-7)
    for part in ("vision", "projector", "language"):
        assert norms[f"grad_norm/{part}"] == pytest.approx(wanted[part], rel=3e-5), part
    check_update(weights_of(ranks, toys.folder(kind)), weights, start_of(toys.folder(kind)))
    assert fields["mismatch_max"] == pytest.approx(wanted["mismatch_max"], rel=1e-4)
    assert fields["ratio_max"] == pytest.approx(max(1.0, wanted["ratio_max"]), rel=1e-4)
    # the first update clips nothing, and starts where the reference is
    assert fields["clip_share"] == pytest.approx(wanted["clip_share"] / 2, rel=1e-4)
    assert 0 < fields["clip_share"] < 0.5 or loss == "sapo"
    if align.get("beta"):
        assert fields["kl"] == pytest.approx(wanted["kl"] / 2, rel=1e-4)
    assert counts["samples"] == len(PROMPTS) * GROUP
    assert counts["frames_encoded"] == counts["frames"]
