"""adapter.modules_to_save: whole modules beside an adapter are trained, written and read as peft does it."""

import pytest
import torch
from adapted import DECODER, peft_model, step_of_peft
from parity import settings_of
from test_adapters import check_step, settings_with
from test_evaluation import lines_of, train, without
from toy import reference_inputs, reference_model, write_records

from megavlm.convert.mcore_checkpoint import McoreCheckpoint

# toy: peft's options. In the first one, the output layer is the word embedding.
CASES = {
    "dense": {"modules_to_save": ["embed_tokens", "language_model.norm"], "ensure_weight_tying": True},
    "dense-untied": {"modules_to_save": ["lm_head", "layers.1.post_attention_layernorm"]},
}


@pytest.mark.parametrize(
    ("kind", "parallel"),
    [("dense", {"tensor": 2}), ("dense-untied", {"pipeline": 2})],
    ids=["tied, TP2", "untied, PP2"],
)
def test_a_step_is_that_of_peft_and_comes_back(kind, parallel, toys, tmp_path, world2):
    """From peft's folder, one step in a layout, into a folder that peft loads, and merged into a whole model."""
    from peft import PeftModel, get_peft_model_state_dict
    from transformers import AutoProcessor

    from megavlm.convert import mcore_to_hf
    from megavlm.convert.adapter import Adapter
    from megavlm.model.shapes import Shapes

    folder = toys.folder(kind)
    model = peft_model(folder, {"r": 4, "lora_alpha": 6, "target_modules": DECODER, **CASES[kind]})
    model.save_pretrained(tmp_path / "start")
    reference = step_of_peft(model, folder, toys.records, toys.root)
    settings = settings_with(toys, kind, tmp_path / "start", parallel, {}, reference)
    check_step(world2, settings, reference, toys, kind, tmp_path)
    loaded = PeftModel.from_pretrained(reference_model(folder), tmp_path / "peft")
    own = get_peft_model_state_dict(loaded)
    assert own.keys() == reference.after.keys()
    found = Adapter(tmp_path / "mcore", Shapes.from_hf(folder))
    mcore_to_hf(toys.checkpoint(kind), folder, tmp_path / "merged", adapter=found, progress=False)
    inputs = reference_inputs(AutoProcessor.from_pretrained(folder), toys.records[1], toys.root)
    with torch.no_grad():
        apart, merged = loaded(**inputs).logits, reference_model(tmp_path / "merged")(**inputs).logits
        base = reference_model(folder)(**inputs).logits
    assert (merged - apart).norm() <= 1e-5 * apart.norm()
    assert (base - apart).norm() > 1e-2 * apart.norm()


def test_a_tied_matrix_that_is_saved_twice_with_different_values_is_told(toys, tmp_path):
    """One of them would be lost."""
    from safetensors.torch import load_file, save_file

    from megavlm.base.errors import UserError
    from megavlm.convert.adapter import Adapter
    from megavlm.model.shapes import Shapes

    options = {"r": 4, "lora_alpha": 6, "target_modules": DECODER, **CASES["dense"]}
    peft_model(toys.folder("dense"), options).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (name,) = (name for name in tensors if "lm_head" in name)
    save_file({**tensors, name: tensors[name] + 1}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"has saved .*embed_tokens.* and .*lm_head.* with different values"):
        Adapter(tmp_path, Shapes.from_hf(toys.folder("dense")))


def test_a_run_continues_on_the_same_bits(toys, tmp_path, world2):
    """Two steps and two more, against four: metrics, weights and the state of the optimizer."""
    found, data = {}, write_records(toys.root / "saved.jsonl", toys.records)
    for name, starts in {"straight": (4,), "resumed": (2, 4)}.items():
        for steps in starts:
            made = settings_of(toys.folder("dense"), {"tensor": 2}, freeze=("vision", "projector"), lr=1e-2)
            made["train"] |= {"steps": steps, "optimizer": "adam", "memory_check": False}
            made["model"]["load"] = str(toys.checkpoint("dense"))
            made["adapter"] = {"type": "lora", "rank": 4, "targets": DECODER, "dropout": 0.2}
            made["adapter"]["modules_to_save"] = CASES["dense"]["modules_to_save"]
            made["data"] |= {"train": str(data), "workers": 0}
            made |= {"output": str(tmp_path / name), "log": {"wandb": {"mode": "off"}}}
            assert world2.run(train, made) == ["", ""]
        found[name] = McoreCheckpoint(tmp_path / name / "checkpoints/step_00000004")
        lines = without(lines_of(tmp_path / name / "metrics.jsonl"))
        assert lines == found.setdefault("lines", lines)
    one, other = found["straight"], found["resumed"]
    assert one.tensors == other.tensors
    assert all(torch.equal(one.read(key), other.read(key)) for key in one.tensors)
    saved = [key for key in one.tensors if "lora" not in key]
    assert any("word_embeddings" in key for key in saved if not key.startswith("optimizer."))
    assert any("word_embeddings" in key for key in saved if key.startswith("optimizer."))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        (["k_proj"], "one parameter with .*q_proj.* and .*v_proj"),
        (["lm_head"], "no module of this model .the output layer is the word embedding: name embed_tokens"),
        (["embed"], "ends the name of no module"),
        (["visual.merger"], "but projector has no adapters"),
        (["o_proj"], "o_proj.weight has an adapter"),
    ],
)
def test_what_cannot_be_saved_is_told(modules, message, toys):
    from megavlm.base.errors import UserError
    from megavlm.config.adapter_section import AdapterSettings
    from megavlm.convert.peft_names import saved_whole
    from megavlm.model.shapes import Shapes

    adapter = AdapterSettings(type="lora", targets=["o_proj"], modules_to_save=modules)
    with pytest.raises(UserError, match=message):
        saved_whole(adapter, Shapes.from_hf(toys.folder("dense")))
