"""FLOPs of a step against torch's FlopCounterMode: exactly, for every product of matrices that a step carries out."""

from collections import Counter

import torch
from parity import settings_of
from test_dry_run import alone

# name: (toy, options of settings_of), in one process
STEPS = {
    "all is trained": ("dense", {}),
    "untied": ("dense-untied", {}),
    "projector alone": ("dense", {"freeze": ("vision", "language")}),
    "decoder alone": ("dense", {"freeze": ("vision", "projector")}),
    "tower alone": ("dense", {"freeze": ("projector", "language")}),
    "recomputed layers": ("dense", {"recompute": "full"}),
    "recomputed layers, the rest frozen": ("dense", {"recompute": "full", "freeze": ("vision", "projector")}),
    "recomputed MLPs and attention": ("dense", {"recompute": ["mlp", "core_attn"]}),
    "recomputed tower": ("dense", {"vision": {"recompute": True, "chunk_patches": 64}}),
    "recomputed tower, frozen": ("dense", {"vision": {"recompute": True}, "freeze": ("vision",)}),
    "experts": ("moe", {}),
    "recomputed experts": ("moe", {"recompute": ["moe"]}),
}  # fmt: skip
# name: (processes, toy, parallel settings): summed over all ranks
LAYOUTS = {
    "TP2 × PP2": (4, "dense", {"tensor": 2, "pipeline": 2}),
    "CP2": (2, "dense", {"context": 2}),
    "DP2": (2, "dense", {}),
    "EP2 × TP2": (2, "moe", {"expert": 2, "tensor": 2}),
}


def attention_flops(query, key, value, *args, **kwargs) -> int:
    """Two products of queries and keys, half of each with causality; shapes as FlopCounterMode gives them."""
    batch, heads, n, dim = query
    causal = args[1] if len(args) > 1 else kwargs.get("is_causal", False)
    return 2 * 2 * batch * heads * n * key[2] * dim // (2 if causal else 1)


def attention_backward_flops(grad, query, key, value, out, log_sum, dropout, causal, *args, **kwargs) -> int:
    """Five such products, one of which is that of the forward pass again."""
    return attention_flops(query, key, value, dropout, causal) * 5 // 2


def product_flops(total, left, right, **kwargs) -> int:
    """Of ``addmm_``, which FlopCounterMode does not know."""
    return 2 * left[0] * left[1] * right[1]


class NoModules:
    """In the place of FlopCounterMode's tracker of modules, which does not stand a forward pass without gradients."""

    parents = ("Global",)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


def counted(settings, world: int | None = None, rank: int = 0) -> tuple[Counter, dict[str, float], dict[str, float]]:
    """FLOPs that a step of two rows carries out on this rank, of the tower and projector and of the decoder; and those
    that ``hardware_flops`` and ``parts_flops`` tell of the step."""
    from torch.utils.flop_counter import FlopCounterMode

    from megavlm.align.registry import make_method
    from megavlm.config.settings import Settings
    from megavlm.model.flops import parts_flops
    from megavlm.monitor.phases import Phases
    from megavlm.optim.optimizers import Optimizers
    from megavlm.plan.hardware_flops import hardware_flops
    from megavlm.plan.mix import Mix
    from megavlm.plan.step_memory import RowsAtHand
    from megavlm.runtime.session import start
    from megavlm.tracing.absent_rank import absent_rank, that_can_be_absent
    from megavlm.tracing.balanced_experts import BalancedExperts
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
        aten.addmm_: product_flops,
    }
    settings, found = Settings(**settings), Counter()

    class OfTower(Phases):
        is_named = True

        def tower(self):
            return self("tower")

        def _phase(self, name):
            return Within(name)

    class Within:
        def __init__(self, name):
            self.name = name

        def __enter__(self):
            self.before = counter.get_total_flops()

        def __exit__(self, *error):
            if self.name == "tower":
                found["tower"] += counter.get_total_flops() - self.before

    def of(session, optimizers):
        mix, vlm = Mix.of(settings, session.shapes, samples=2), session.vlm
        feed, objective = RowsAtHand(vlm, [mix.row(settings, session.shapes)] * 2), CrossEntropy(["data"], 64)
        phases = OfTower()
        phases._open.append("other")
        step = Step(vlm, optimizers, feed, 2, objective, None, ("data",), phases.tower, phases)
        if world is not None:
            vlm.decoder_config.batch_p2p_comm = False
        with counter:
            step.gradients(feed.rows(2))
        found["all"] = counter.get_total_flops()
        work, frozen = mix.work(2 * session.groups.dp_size), settings.model.freeze
        told = hardware_flops(session.shapes, work, settings, frozen), parts_flops(session.shapes, work, frozen)
        return found, *told

    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    counter.mod_tracker = NoModules()
    if world is None:
        session = start(settings, training=True, load=False)
        return of(session, Optimizers(session.vlm, settings.train))
    absent = absent_rank(that_can_be_absent(settings), make_method("sft", settings), rank, world)
    with absent as (session, (model,)), BalancedExperts(model.vlm):
        return of(session, model.optimizers)


def all_steps(settings: dict) -> dict:
    with alone():
        return {name: counted(own, 1) for name, own in settings.items()}


def all_layouts(settings: dict) -> dict:
    with alone():
        return {
            name: [counted(own, LAYOUTS[name][0], rank) for rank in range(LAYOUTS[name][0])]
            for name, own in settings.items()
        }


def settings_for(toys, kind: str, parallel: dict, options: dict) -> dict:
    settings = settings_of(toys.folder(kind), parallel, **options, moe=kind == "moe")
    settings["model"]["load"] = "none"
    settings["data"]["max_pixels"] = 96 * 96
    return settings


def test_a_step_carries_out_what_is_told(toys, world1):
    settings = {name: settings_for(toys, kind, {}, options) for name, (kind, options) in STEPS.items()}
    (found,) = world1.run(all_steps, settings)
    ((real, *_),) = world1.run(counted, settings["all is trained"])
    assert real == found["all is trained"][0]  # products of real matrices are the same
    for name, (done, hardware, model) in found.items():
        assert done["tower"] == hardware["vision"] + hardware["projector"], name
        assert done["all"] - done["tower"] == hardware["language"], name
        assert sum(model.values()) < sum(hardware.values())


def test_ranks_carry_it_out_together(toys, world1):
    settings = {name: settings_for(toys, kind, parallel, {}) for name, (_, kind, parallel) in LAYOUTS.items()}
    (found,) = world1.run(all_layouts, settings)
    for name, ranks in found.items():
        hardware = ranks[0][1]
        assert sum(done["all"] for done, *_ in ranks) == sum(hardware.values()), name
