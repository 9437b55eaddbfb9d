"""What judges given answers in several layouts: a reward model's scores, and the divergence from the reference."""

import pytest
import torch
from parity import Toys, settings_of
from test_policy_step import GROUP, LAYOUTS, MOST, PROMPTS, answered, given
from test_preference import first_head
from toy import reference_model


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


def scores_in_layout(settings: dict, root, records: list[dict]):
    """Runs on every rank: the scores of the given answers by a reward model; [] on ranks that are no leaders."""
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.model.vlm import VLM
    from megavlm.reinforcement.answer_rows import AnswerGroup
    from megavlm.reinforcement.reward_models import RewardModels
    from megavlm.rollout.engine import Answer
    from megavlm.runtime.session import start

    settings = Settings(**settings)
    session = start(settings, training=True)
    groups = session.groups
    renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple) if groups.is_leader else None
    models = RewardModels(session, [], renderer)
    vlm = VLM(session.shapes, settings, groups, score_head=True).train(False)
    load_weights(settings.model.load, vlm)
    for chunk in vlm.language:
        if hasattr(chunk, "score_head"):
            chunk.score_head.weight.data.copy_(first_head(chunk.score_head.weight.shape[1]))
    models._models["taste"] = vlm
    asked = []
    for number, (record, answers) in enumerate(zip(records, given(), strict=True)):
        if renderer is not None and number % groups.dp_size == groups.dp_rank:
            sample = renderer.encode(record, in_folder(root), f"prompt {number}", kind="prompt", index=number)
            made = [Answer(tokens, logs, logs, logs, "stop") for tokens, logs, _ in answers]
            asked.append(AnswerGroup(sample, made, [0.0] * GROUP))
    return models.scores(asked)["taste"], groups.dp_rank


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "MoE EP2"])
def test_a_reward_model_scores_the_answers(layout, toys, request):
    """To 1e-5 of scores of the size of 1: the score at the last token, by transformers' hidden states."""
    from transformers import AutoProcessor

    processes, kind, parallel = LAYOUTS[layout]
    settings = settings_of(toys.folder(kind), parallel, seq_length=192, lr=0.1)
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["train"]["global_batch_size"] = None
    records = [toys.records[n] for n in PROMPTS]
    ranks = request.getfixturevalue(f"world{processes}").run(scores_in_layout, settings, toys.root, records)
    model, processor = reference_model(toys.folder(kind)), AutoProcessor.from_pretrained(toys.folder(kind))
    head = first_head(model.config.text_config.hidden_size)[0]
    for scores, dp_rank in ranks:
        if not scores:
            continue
        size = 2 if layout == "DP2" else 1
        wanted = [
            (model.model(**answered(processor, toys, n, tokens)).last_hidden_state[0, -1] @ head).item()
            for n, answers in list(zip(PROMPTS, given(), strict=True))[dp_rank::size]
            for tokens, _, _ in answers
        ]
        assert scores == pytest.approx(wanted, abs=1e-5)


def divergences_in_layout(settings: dict, root, records: list[dict]):
    """Runs on every rank: what the divergence adds to the rewards of the given answers; [] where there is no leader."""
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.media.files import in_folder
    from megavlm.reinforcement.answer_rows import AnswerGroup
    from megavlm.reinforcement.divergence import Divergence
    from megavlm.reinforcement.grpo import Policy
    from megavlm.reinforcement.policy_objective import PolicyObjective
    from megavlm.rollout.engine import Answer
    from megavlm.runtime.session import start
    from megavlm.training.start_weights import StartWeights

    settings = Settings(**settings)
    session = start(settings, training=True)
    groups, policy = session.groups, Policy.of(settings)
    renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple) if groups.is_leader else None
    objective = PolicyObjective(policy.options, 64, groups.language)
    divergence = Divergence(session, StartWeights(session), objective, renderer, policy.kl_in_reward)
    with torch.no_grad():  # the reference is where the model started, not where it is now
        for chunk in session.vlm.language:
            for parameter in chunk.parameters():
                parameter.mul_(1.3)
    asked = []
    for number, (record, answers) in enumerate(zip(records, given(), strict=True)):
        if renderer is not None:
            sample = renderer.encode(record, in_folder(root), f"prompt {number}", kind="prompt", index=number)
            made = [Answer(tokens, [0.0] * len(logs), logs, logs, "length") for tokens, logs, _ in answers]
            asked.append(AnswerGroup(sample, made, [0.0] * GROUP))
    return divergence.parts(asked), policy.options.beta, policy.kl_in_reward


@pytest.mark.parametrize("layout", ["PP2 × VPP2", "CP2"])
def test_the_divergence_in_rewards_is_that_of_whole_answers(layout, toys, request):
    """To 1e-5 of sums of about 30 nats: log-probabilities of transformers' model, less those of sampling."""
    from transformers import AutoProcessor

    processes, kind, parallel = LAYOUTS[layout]
    settings = settings_of(toys.folder(kind), parallel, seq_length=192, lr=0.1)
    settings["model"]["load"] = str(toys.checkpoint(kind))
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"beta": 0.2, "kl_in": "reward", "mask_truncated": True}
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST, "temperature": 0.7}
    records = [toys.records[n] for n in PROMPTS]
    ranks = request.getfixturevalue(f"world{processes}").run(divergences_in_layout, settings, toys.root, records)
    model, processor = reference_model(toys.folder(kind)), AutoProcessor.from_pretrained(toys.folder(kind))
    wanted = []
    for n, answers in zip(PROMPTS, given(), strict=True):
        for tokens, logs, _ in answers:
            logits = model(**answered(processor, toys, n, tokens)).logits[0, -len(tokens) - 1 : -1]
            wanted.append((logits / 0.7).log_softmax(-1)[range(len(tokens)), tokens].sum().item() - sum(logs))
    parts, in_loss, in_reward = ranks[0]
    assert parts == pytest.approx(wanted, rel=1e-5, abs=1e-4)
    assert (in_loss, in_reward) == (0.0, 0.2)
