"""Reinforcement learning of an adapter: the reference model is the one that the run starts with."""

import pytest
import torch
from adapted import ADAPTERS, DECODER, peft_model, save_adapter
from parity import mostly_slow, settings_of
from test_policy_step import GROUP, MOST, PROMPTS, answered, given, policy_step
from toy import reference_model

TEMPERATURE = 0.7
# (processes, parallel settings)
LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"tensor": 2}),
    "PP2 × VPP2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "CP2": (2, {"context": 2}),
}
CASES = [(layout, start) for layout in LAYOUTS for start in ("a new adapter", "a trained adapter")]


def two_steps(settings: dict, root, records: list[dict], out) -> list[float]:
    """Runs on every rank: the divergence in two steps. The adapter between them is saved to ``out``."""
    session, step = policy_step(settings, root, records)
    first = step().fields["kl"]
    save_adapter(session, out)
    return [first, step().fields["kl"]]


def logprobs(model, toys) -> torch.Tensor:
    """Those of all tokens of the given answers, by transformers' or peft's model."""
    from transformers import AutoProcessor

    processor, found = AutoProcessor.from_pretrained(toys.folder("dense")), []
    for number, group in zip(PROMPTS, given(), strict=True):
        for tokens, _, _ in group:
            with torch.no_grad():
                logits = model(**answered(processor, toys, number, tokens)).logits[0, -len(tokens) - 1 : -1]
            found.append((logits.double() / TEMPERATURE).log_softmax(-1)[range(len(tokens)), tokens])
    return torch.cat(found)


@pytest.mark.parametrize(
    ("layout", "start"), mostly_slow(CASES, lambda case: case[0] == "one process" or case == ("TP2", "a new adapter"))
)
def test_the_divergence_is_that_from_the_start(layout, start, toys, tmp_path, request):
    """Nothing in the first step, and in the second the k3 of peft's model against that at the start: of a new adapter,
    the model without it.
    """
    from peft import PeftModel

    from megavlm.convert.adapter import Adapter
    from megavlm.model.shapes import Shapes

    folder, (processes, parallel) = toys.folder("dense"), LAYOUTS[layout]
    settings = settings_of(folder, parallel, seq_length=512, lr=0.002, freeze=("vision", "projector"))
    settings["model"]["load"] = str(toys.checkpoint("dense"))
    if start == "a new adapter":
        model = reference_model(folder)
        settings["adapter"] = {"type": "lora", "rank": 4, "targets": DECODER}
    else:
        model = peft_model(folder, ADAPTERS["lora"][1] | {"target_modules": DECODER}).eval()
        model.save_pretrained(tmp_path / "start")
        settings["model"]["adapter"] = str(tmp_path / "start")
    before = logprobs(model, toys)
    settings["train"]["global_batch_size"] = None
    settings["align"] = {"loss": "grpo", "beta": 0.2}
    settings["rollout"] = {"group_size": GROUP, "max_new_tokens": MOST, "temperature": TEMPERATURE}
    world, records = request.getfixturevalue(f"world{processes}"), [toys.records[n] for n in PROMPTS]
    first, second = world.run(two_steps, settings, toys.root, records, tmp_path / "mcore")[0]
    Adapter(tmp_path / "mcore", Shapes.from_hf(folder)).write(tmp_path / "peft", folder)
    gaps = before - logprobs(PeftModel.from_pretrained(reference_model(folder), tmp_path / "peft").eval(), toys)
    expected = (gaps.exp() - gaps - 1).mean().item()
    assert first == pytest.approx(0.0, abs=1e-10)  # the squares of what float32 rounds
    assert second == pytest.approx(expected, rel=1e-4)
    assert second > 1e-3
