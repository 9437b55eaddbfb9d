"""Adapters of an expert model are trained with the balancing loss of its frozen routers, as by transformers and peft.

transformers multiplies sums over all layers of experts, and counts each of the k choices of a token as a whole one;
Megatron has a loss for each layer, and counts it as 1 / k. With one layer of experts they differ by the factor k alone.
"""

import pytest
import torch
from adapted import LR, AdaptedStep, peft_model, step_with_adapter
from parity import AUX, part_of, settings_of, targets_of
from safetensors.torch import load_file
from toy import TEXT, VISION, reference_inputs

# Layer 2 has the only experts, so that adapters are in front of its router and behind it.
EXPERTS = {"num_hidden_layers": 4, "decoder_sparse_step": 1, "mlp_only_layers": [0, 1, 3]}
ROWS = tuple((number,) for number in range(8))  # a row holds one record, of which transformers makes a batch
CHOICES = 2  # of a token


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from megavlm.demo.model_folder import make_model_folder

    out = tmp_path_factory.mktemp("one layer of experts") / "toy-moe"
    return make_model_folder(out, text=TEXT | EXPERTS, vision=VISION, moe=True, norm_noise=0.3, seed=7)


def peft_step(model, folder, records, root, coefficient: float) -> tuple[AdaptedStep, float]:
    """One step of SGD on the loss of transformers with ``output_router_logits``, and its mean ``aux_loss``."""
    from peft import get_peft_model_state_dict
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    tensors = lambda: {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    before, total, balancing = tensors(), 0.0, 0.0
    inputs = [(reference_inputs(processor, record, root), targets_of(processor, record, root)) for record in records]
    count = sum(len(where) for _, where in inputs)
    for arguments, where in inputs:
        out = model(**arguments, output_router_logits=True)
        logprobs = out.logits[0].log_softmax(-1)
        loss = -logprobs[where - 1, arguments["input_ids"][0, where]].sum() / count
        (loss + coefficient * out.aux_loss / len(records)).backward()
        total, balancing = total + loss.item(), balancing + out.aux_loss.item() / len(records)
    square = 0.0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora" in name), "the router and all else is frozen"
            if parameter.grad is not None:
                assert part_of(name) == "language"
                square += parameter.grad.double().square().sum().item()
                parameter -= LR * parameter.grad
    return AdaptedStep(total, {"language": square**0.5}, before, tensors()), balancing


def step_and_totals(*arguments):
    """Runs on every rank: a step with adapters, and what is known of the experts."""
    from megavlm.training.step import Step

    made, make = [], Step.__init__

    def watched(self, *given) -> None:
        make(self, *given)
        made.append(self)

    Step.__init__ = watched
    try:
        loss, norms, _ = step_with_adapter(*arguments, ROWS)
    finally:
        Step.__init__ = make
    return loss, norms, made[0].expert_load.totals()


@pytest.mark.parametrize(
    ("processes", "parallel", "recompute"),
    [(1, {}, "none"), (1, {}, "full"), (2, {"expert": 2}, "none"), (2, {"tensor": 2}, "none")],
    ids=["one process", "recomputed", "EP2", "TP2"],
)
def test_the_balancing_loss_is_that_of_transformers(processes, parallel, recompute, folder, toys, tmp_path, request):
    from megavlm.convert.adapter import ADAPTER_MODEL, Adapter
    from megavlm.model.shapes import Shapes

    make = lambda: peft_model(folder, {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]})
    make().save_pretrained(tmp_path / "adapter")
    without, _ = peft_step(make(), folder, toys.records, toys.root, 0.0)
    expected, balancing = peft_step(make(), folder, toys.records, toys.root, AUX / CHOICES)

    settings = settings_of(folder, parallel, moe=True, freeze=("vision", "projector"), lr=LR, recompute=recompute)
    settings["model"] |= {"load": str(folder), "adapter": str(tmp_path / "adapter")}
    settings["train"]["global_batch_size"] = len(ROWS)
    given = folder, None, toys.root, toys.records, settings, tmp_path / "mcore"
    loss, norms, totals = request.getfixturevalue(f"world{processes}").run(step_and_totals, *given)[0]
    assert loss == pytest.approx(expected.loss, rel=1e-5)
    assert norms["grad_norm/language"] == pytest.approx(expected.norms["language"], rel=3e-5)
    assert totals.layers == [3]
    assert totals.balancing == pytest.approx([balancing / CHOICES], rel=1e-5)
    Adapter(tmp_path / "mcore", Shapes.from_hf(folder)).write(tmp_path / "peft")
    after = load_file(tmp_path / "peft" / ADAPTER_MODEL)
    assert after.keys() == expected.after.keys()
    reached = 0
    for name, value in after.items():
        update = expected.after[name] - expected.before[name]
        assert (value - expected.after[name]).norm() <= 1e-4 * update.norm(), name
        reached += (without.after[name] - expected.after[name]).norm() > 1e-2 * update.norm()
    # It reaches the adapters in front of the router (those of layer 2 itself are), and none behind it.
    assert reached == 2 * 2 * 3
