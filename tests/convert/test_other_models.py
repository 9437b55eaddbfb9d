"""A checkpoint, adapter or head of another model is refused before anything runs, in the terms of config.json."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_config

from megavlm.base.errors import UserError
from megavlm.convert import hf_to_mcore, mcore_to_hf
from megavlm.convert.adapter import Adapter
from megavlm.convert.check_checkpoint import check_checkpoint
from megavlm.convert.mcore_checkpoint import McoreCheckpoint, TensorToWrite, write_checkpoint
from megavlm.convert.merge import merge_adapter
from megavlm.convert.names import table
from megavlm.model.shapes import Shapes

BASE = {"tied": True}
# What differs from the base: (arguments of make_config, field of config.json, value in the base, value there).
OTHERS = {
    "more layers": ({"num_hidden_layers": 4}, "text_config.num_hidden_layers", 3, 4),
    "wider": ({"hidden_size": 64, "vision": {"out_hidden_size": 64}}, "text_config.hidden_size", 48, 64),
    "wider MLP": ({"intermediate_size": 96}, "text_config.intermediate_size", 80, 96),
    "more tokens": ({"vocab_size": 80}, "text_config.vocab_size", 64, 80),
    "more heads": ({"num_attention_heads": 6}, "text_config.num_attention_heads", 4, 6),
    "more key heads": ({"num_key_value_heads": 4}, "text_config.num_key_value_heads", 2, 4),
    "biases": ({"attention_bias": True}, "text_config.attention_bias", "false", "true"),
    "untied": ({"tied": False}, "tie_word_embeddings", "true", "false"),
    "experts": ({"moe": True}, "model_type", "qwen3_vl", "qwen3_vl_moe"),
    "deeper tower": ({"vision": {"depth": 4}}, "vision_config.depth", 3, 4),
    "wider tower": ({"vision": {"hidden_size": 64}}, "vision_config.hidden_size", 32, 64),
    "more positions": (
        {"vision": {"num_position_embeddings": 64}},
        "vision_config.num_position_embeddings",
        16,
        64,
    ),
    "more levels": (
        {"vision": {"deepstack_visual_indexes": [0, 1, 2]}},
        "number of vision_config.deepstack_visual_indexes",
        2,
        3,
    ),
}


def model(folder, **changes):
    """(folder with config.json, checkpoint) of a model; all weights are one."""
    make_config(**BASE | changes).save_pretrained(folder / "hf")
    return folder / "hf", checkpoint(folder / "mcore", table(Shapes.from_hf(folder / "hf")))


def checkpoint(folder, entries, **more):
    shapes = {entry.key: entry.shape for entry in entries} | more
    folder.mkdir(parents=True)
    ones = lambda shape: lambda first, last: torch.ones(last - first, *shape[1:])
    write_checkpoint(folder, [TensorToWrite(k, s, torch.float32, ones(s)) for k, s in shapes.items()], {"step": 0})
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model(tmp_path_factory.mktemp("base"))


def refused(action, *arguments, **options) -> str:
    with pytest.raises(UserError) as raised:
        action(*arguments, **options)
    assert len(raised.value.message) < 1200
    return raised.value.message


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_in_both_directions(name, base, tmp_path):
    changes, field, here, there = OTHERS[name]
    other = model(tmp_path / "other", **changes)
    for (hf, _), (_, mcore), config, stored in ((base, other, here, there), (other, base, there, here)):
        message = refused(mcore_to_hf, mcore, hf, tmp_path / "out", progress=False)
        assert f"{field} is {stored} in the checkpoint and {config} in config.json" in message
        assert str(mcore) in message
        assert not (tmp_path / "out").exists()


def test_the_same_model_is_accepted_with_optimizer_states_and_further_models(base, tmp_path):
    shapes = Shapes.from_hf(base[0])
    further = {"optimizer.state.exp_avg.language.x": (3,), "critic.language.x": (2,), "critic.optimizer.x": (2,)}
    mcore = McoreCheckpoint(checkpoint(tmp_path / "mcore", table(shapes), **further))
    check_checkpoint(mcore, shapes)
    message = refused(check_checkpoint, mcore, shapes, prefix="critic.")
    assert "no weights of a Qwen3-VL" in message


def test_fewer_rows_can_be_allowed_but_nothing_else(base, tmp_path):
    more_tokens, stored = model(tmp_path / "tokens", vocab_size=80)
    more_layers, _ = model(tmp_path / "layers", vocab_size=80, num_hidden_layers=4)
    check_checkpoint(McoreCheckpoint(base[1]), Shapes.from_hf(more_tokens), fewer_rows=True)
    message = refused(check_checkpoint, McoreCheckpoint(base[1]), Shapes.from_hf(more_layers), fewer_rows=True)
    assert "text_config.num_hidden_layers is 3" in message
    assert "vocab_size" not in message
    message = refused(check_checkpoint, McoreCheckpoint(stored), Shapes.from_hf(base[0]), fewer_rows=True)
    assert "text_config.vocab_size is 80" in message


def test_a_reward_head_of_another_width_is_refused(base, tmp_path):
    shapes = Shapes.from_hf(base[0])
    mcore = checkpoint(tmp_path / "mcore", table(shapes), **{"language.score_head.weight": (1, 49)})
    message = refused(check_checkpoint, McoreCheckpoint(mcore), shapes)
    assert "score_head.weight has shape [1, 49], but config.json implies [1, 48]" in message


def test_other_checkpoints_are_named_for_what_they_are(base, tmp_path):
    shapes = Shapes.from_hf(base[0])
    adapter = checkpoint(tmp_path / "adapter", [], **{"adapter.model.x.lora_A.weight": (2, 2)})
    foreign = checkpoint(tmp_path / "gpt", [], **{"decoder.layers.0.mlp.linear_fc1.weight": (2, 2)})
    assert "an adapter without its base weights" in refused(check_checkpoint, McoreCheckpoint(adapter), shapes)
    assert "no weights of a Qwen3-VL" in refused(check_checkpoint, McoreCheckpoint(foreign), shapes)


def adapter_files(folder, hf, kind):
    """LoRA of rank 2 on all q_proj and on down_proj, as ``kind``: "peft" or "checkpoint"."""
    text = Shapes.from_hf(hf).text
    tensors = {}
    for layer in range(text.layers):
        name = f"model.language_model.layers.{layer}"
        heads = text.heads * text.head_dim
        for module, out, inner in (("self_attn.q_proj", heads, text.hidden), ("mlp.down_proj", text.hidden, text.ffn)):
            tensors[f"{name}.{module}.lora_A.weight"] = (2, inner)
            tensors[f"{name}.{module}.lora_B.weight"] = (out, 2)
    folder.mkdir()
    if kind == "peft":
        ones = {f"base_model.model.{name}": torch.ones(shape) for name, shape in tensors.items()}
        save_file(ones, folder / "adapter_model.safetensors")
    else:
        folder.rmdir()
        checkpoint(folder, [], **{f"adapter.{name}": shape for name, shape in tensors.items()})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["peft", "checkpoint"])
def test_an_adapter_of_another_model_is_refused_in_both_directions(kind, base, tmp_path):
    make_config(**BASE, num_hidden_layers=4).save_pretrained(tmp_path / "more")
    make_config(**BASE, intermediate_size=96).save_pretrained(tmp_path / "wider")
    ours = adapter_files(tmp_path / "ours", base[0], kind)
    Adapter(ours, Shapes.from_hf(base[0]))
    for name, field, here, there in (
        ("more", "text_config.num_hidden_layers", 3, 4),
        ("wider", "text_config.intermediate_size", 80, 96),
    ):
        theirs = adapter_files(tmp_path / f"of-{name}", tmp_path / name, kind)
        message = refused(Adapter, theirs, Shapes.from_hf(base[0]))
        assert f"{field} is {there} in the adapter and {here} in config.json" in message
        message = refused(Adapter, ours, Shapes.from_hf(tmp_path / name))
        assert f"{field} is {here} in the adapter and {there} in config.json" in message


def test_parts_trained_beside_an_adapter_are_compared_too(base, tmp_path):
    shapes, adapter = Shapes.from_hf(base[0]), adapter_files(tmp_path / "adapter", base[0], "checkpoint")
    config = (adapter / "adapter_config.json").read_text()
    tensors = {key: shape for key, (shape, _) in McoreCheckpoint(adapter).tensors.items()}
    projector = [entry for entry in table(shapes) if entry.key.startswith("projector.")]

    def with_parts(name, entries, **more):
        folder = checkpoint(tmp_path / name, entries, **tensors, **more)
        (folder / "adapter_config.json").write_text(config)
        return folder

    Adapter(with_parts("whole", projector, **{"language.score_head.weight": (1, 48)}), shapes)
    level = {"projector.deepstack.2.norm.weight": (128,)}
    for folder, words in (
        (with_parts("less", projector[:-1]), f"missing tensor {projector[-1].key}"),
        (with_parts("more", projector, **level), "further tensor projector.deepstack.2.norm.weight"),
    ):
        assert words in refused(Adapter, folder, shapes)


def test_a_reward_head_beside_an_adapter_is_compared_when_it_is_merged(dense, tmp_path):
    adapter = adapter_files(tmp_path / "adapter", dense, "peft")
    save_file({"weight": torch.ones(1, 32)}, adapter / "reward_head.safetensors")
    message = refused(merge_adapter, dense, adapter, tmp_path / "out", progress=False)
    assert "a weight of shape [1, 32], but the head of this model needs" in message


def test_padding_of_a_vocabulary_is_dropped_only_if_it_is_zero(dense, tmp_path):
    """Rows behind the vocabulary that are not zero are tokens of a larger model."""
    hf_to_mcore(dense, tmp_path / "mcore", progress=False)
    stored = McoreCheckpoint(tmp_path / "mcore")
    for value in (0.0, 1.0):
        sources = []
        for key, (shape, dtype) in stored.tensors.items():
            tensor = stored.read(key)
            if "word_embeddings" in key:
                tensor = torch.cat([tensor, torch.full((16, shape[1]), value)])
            sources.append(TensorToWrite(key, tuple(tensor.shape), dtype, lambda a, b, t=tensor: t[a:b]))
        (tmp_path / f"padded-{value}").mkdir()
        write_checkpoint(tmp_path / f"padded-{value}", sources, {"step": 0})
    mcore_to_hf(tmp_path / "padded-0.0", dense, tmp_path / "back", progress=False)
    for file in dense.glob("*.safetensors"):
        back = load_file(tmp_path / "back" / file.name)
        assert all(torch.equal(value, back[name]) for name, value in load_file(file).items())
    message = refused(mcore_to_hf, tmp_path / "padded-1.0", dense, tmp_path / "out", progress=False)
    assert "text_config.vocab_size is 80 in the checkpoint and 64 in config.json" in message
