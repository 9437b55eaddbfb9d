"""Routing replay: updates use the experts that the sampler has chosen, token by token, in every layout."""

import pytest
import torch
from parity import Toys, settings_of
from test_policy_step import question

# (processes, parallel settings)
LAYOUTS = {
    "TP2": (2, {"tensor": 2}),
    "PP2 × VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
    "EP2": (2, {"expert": 2}),
}
PROMPTS, GROUP, MOST, LAYERS = (0, 1, 2, 5), 3, 6, 4
DISTURBANCE = 0.02


@pytest.fixture(scope="module")
def toys(tmp_path_factory) -> Toys:
    return Toys(tmp_path_factory.mktemp("toys"))


class Experts:
    """Sees the choices of all routers of this rank, and disturbs their inputs, always in the same way.

    With random weights, experts are often almost equally likely, so that a little is enough.
    """

    def __init__(self, vlm, disturbance: float):
        self.seen: dict[int, list[torch.Tensor]] = {}
        self.disturbance, self._hooks = disturbance, []
        for chunk in vlm.language:
            for layer in chunk.decoder.layers:
                self._hooks.append(layer.mlp.router.register_forward_pre_hook(self._disturb))
                self._hooks.append(layer.mlp.router.register_forward_hook(self._see(layer.layer_number)))

    def _disturb(self, _, args):
        wave = torch.arange(args[0].numel(), dtype=torch.float32).view(args[0].shape).mul(0.7).sin()
        return (args[0] + self.disturbance * wave.to(args[0].dtype), *args[1:])

    def _see(self, number: int):
        return lambda _, args, result: self.seen.setdefault(number, []).append(result[1].clone())

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def passes(settings: dict, root, records: list[dict]) -> dict:
    """Runs on every rank: answers are sampled, and the same rows run with and without replay, disturbed or not.

    Returns for each pass: how many tokens, summed over layers, went to other experts than the sampler's; of how many;
    and the largest difference of a log-probability from the sampler's.
    """
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.data.row import IGNORE
    from megavlm.media.files import in_folder
    from megavlm.optim.optimizers import Optimizers
    from megavlm.reinforcement.answer_rows import AnswerGroup, answer_rows, on_all_ranks
    from megavlm.reinforcement.grpo import Policy
    from megavlm.reinforcement.policy_objective import PolicyObjective
    from megavlm.rollout.builtin import BuiltinEngine
    from megavlm.rollout.engine import Prompt, Sampling
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.forward import forward_only
    from megavlm.runtime.routing import chosen_anew
    from megavlm.runtime.session import start
    from megavlm.training.step import Step

    settings = Settings(**settings)
    session = start(settings, training=True)
    vlm, groups = session.vlm, session.groups
    renderer, prompts = None, None
    if groups.is_leader:
        renderer = Renderer(settings.model.hf, settings.data, settings.pad_multiple)
        mine = [n for n in range(len(records)) if n % groups.dp_size == groups.dp_rank]
        samples = [renderer.encode(records[n], in_folder(root), f"prompt {n}", kind="prompt", index=n) for n in mine]
        prompts = iter([Prompt(s, tuple(range(GROUP * s.index, GROUP * s.index + GROUP))) for s in samples])
    engine = BuiltinEngine(
        vlm, places=5, cache_gib=0.1, cache_setting="x", prompt_tokens=256, chunk_tokens=64, records_routing=True
    )
    answered = list(engine.generate(prompts, Sampling(MOST, temperature=1.0, stop=(7, 8, 9, 10))))
    made = [
        AnswerGroup(one.prompt.sample, one.answers, [1.0, -1.0, 0.5], one.routing)
        for one in sorted(answered, key=lambda one: one.prompt.sample.index)
    ]
    rows = on_all_ranks(answer_rows(made, renderer, None) if renderer else [], renderer, vlm, None)
    objective = PolicyObjective(Policy.of(settings).options, 64, groups.language)
    found: dict = {"answers": sum(len(group.answers) for group in made)}
    vlm.train(False)
    for name, disturbance, replays in (
        ("undisturbed", 0.0, False), ("replayed", DISTURBANCE, True), ("anew", DISTURBANCE, False),
    ):  # fmt: skip
        experts, differences, wrong, known = Experts(vlm, disturbance), [], 0, 0

        def compare(chunk, hidden, micro_batch, differences=differences):
            sampled = torch.zeros(len(micro_batch.host.labels))
            is_target = micro_batch.host.labels != IGNORE
            logprobs = [a.sampled.logprobs for a in micro_batch.host.annotations if a.sampled]
            sampled[is_target] = torch.cat([torch.empty(0), *logprobs])
            targets = micro_batch.targets
            own = objective.logprobs(chunk, hidden, micro_batch)
            here = targets.weights > 0
            differences.extend((own - sampled[targets.row_index.clamp(min=0)]).abs()[here].tolist())
            return own

        for window in Feed(vlm, None).windows(rows.copy(), len(rows.hosts)):
            experts.seen.clear()
            if replays:
                forward_only(vlm, window, compare)
            else:
                with chosen_anew():
                    forward_only(vlm, window, compare)
            for number, maps in experts.seen.items():
                for micro_batch, chosen in zip(window.micro_batches, maps, strict=True):
                    if micro_batch.row.routing is None:  # a row that only fills
                        continue
                    choice = micro_batch.row.routing.choice[:, number - 1].long()
                    is_known = choice[:, 0] > 0
                    wanted = torch.zeros(len(choice), chosen.shape[1] + 1).scatter(1, choice, 1)[:, 1:].bool()
                    wrong += int((wanted != chosen)[is_known].any(-1).sum())
                    known += int(is_known.sum())
        experts.remove()
        found[name] = wrong, known, max(differences, default=0.0)
    sampled = [
        length - 1  # without the last token of the answer
        for row in rows.hosts
        for length, annotations in zip(row.sample_lengths, row.annotations, strict=True)
        if annotations.sampled is not None
    ]
    found["tokens"] = sum(sampled) if groups.is_leader else 0
    vlm.train()
    gradients = []
    for recompute in (None, "full"):
        config = vlm.decoder_config
        config.recompute_granularity, config.recompute_method = recompute, "uniform" if recompute else None
        config.recompute_num_layers = 1 if recompute else None
        optimizers, experts = Optimizers(vlm, settings.train, 1), Experts(vlm, DISTURBANCE)
        step = Step(vlm, optimizers, Feed(vlm, None), 1, objective)
        result = step.update(rows.copy())
        gradients.append((result.loss, result.norms["grad_norm"]))
        experts.remove()
    found["gradients"] = gradients
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_updates_use_the_experts_of_the_sampler(layout, toys, request):
    processes, parallel = LAYOUTS[layout]
    settings = settings_of(toys.folder("moe"), parallel, seq_length=192, lr=1e-20, moe_aux_loss_coeff=0.0)
    settings["model"]["load"] = str(toys.checkpoint("moe"))
    settings["train"]["global_batch_size"] = None
    settings["train"]["overlap"] = {"gradients": False}  # two optimizers follow each other on the same weights
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST}
    world = request.getfixturevalue(f"world{processes}")
    ranks = world.run(passes, settings, toys.root, [question(toys.records[n]) for n in PROMPTS])
    both = lambda name, place: sum(rank[name][place] for rank in ranks)
    assert sum(rank["answers"] for rank in ranks) == len(PROMPTS) * GROUP
    for name in ("undisturbed", "replayed", "anew"):
        assert both(name, 1) == LAYERS * sum(rank["tokens"] for rank in ranks)
    # A pass in float32 without replay chooses the same, if it sees the same token in the same place: 5e-6 nats apart.
    assert both("undisturbed", 0) == 0
    largest = {name: max(rank[name][2] for rank in ranks) for name in ("undisturbed", "replayed", "anew")}
    assert largest["undisturbed"] < 1e-4
    # The disturbance changes what the chosen experts get, a little, and others are chosen unless they are prescribed.
    assert both("replayed", 0) == 0
    assert both("anew", 0) > 0.02 * both("anew", 1)
    assert largest["replayed"] < 0.1
    assert largest["anew"] > 0.5
    for rank in ranks:
        plain, recomputed = rank["gradients"]
        assert recomputed == pytest.approx(plain, rel=1e-6)
