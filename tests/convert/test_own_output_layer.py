"""A folder whose config.json ties the output layer, but which has another lm_head: untied, as in transformers."""

import json
import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_round_trip import assert_same_files, rewrite, there_and_back, weights
from transformers import AutoModelForImageTextToText

from megavlm.base.errors import UserError
from megavlm.convert import compare, hf_to_mcore, mcore_to_hf
from megavlm.convert.mcore_checkpoint import McoreCheckpoint
from megavlm.convert.merge import merge_adapter

EMBEDDING, OUTPUT = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def own(dense, tmp_path_factory):
    return rewrite(
        dense, tmp_path_factory.mktemp("own") / "hf", lambda w: {**w, OUTPUT: w[EMBEDDING].flip(0).contiguous()}
    )


def test_it_is_the_model_that_transformers_loads_and_comes_back_with_the_same_bits(own, tmp_path, caplog):
    assert_same_files(own, there_and_back(own, tmp_path))
    theirs = AutoModelForImageTextToText.from_pretrained(own, dtype=torch.float32)
    stored = McoreCheckpoint(tmp_path / "mcore")
    assert torch.equal(stored.read("language.output_layer.weight"), theirs.lm_head.weight)
    assert torch.equal(stored.read("language.embedding.word_embeddings.weight"), theirs.get_input_embeddings().weight)
    assert not torch.equal(theirs.lm_head.weight, theirs.get_input_embeddings().weight)
    said = [r.getMessage() for r in caplog.records if r.name.startswith("megavlm") and r.levelno == logging.WARNING]
    assert len(said) == 1
    assert "tie_word_embeddings: true, but lm_head.weight differs" in said[0]


def test_an_equal_copy_stays_tied_as_in_transformers(dense, tmp_path):
    copy = rewrite(dense, tmp_path / "hf", lambda w: {**w, OUTPUT: w[EMBEDDING].clone()})
    hf_to_mcore(copy, tmp_path / "mcore", progress=False)
    assert "language.output_layer.weight" not in McoreCheckpoint(tmp_path / "mcore").tensors
    theirs = AutoModelForImageTextToText.from_pretrained(copy)
    assert theirs.lm_head.weight is theirs.get_input_embeddings().weight


def test_a_comparison_sees_it(own, dense, tmp_path):
    hf_to_mcore(own, tmp_path / "own", progress=False)
    hf_to_mcore(dense, tmp_path / "tied", progress=False)
    for a, b in ((own, dense), (dense, own), (own, tmp_path / "tied"), (tmp_path / "own", dense)):
        (difference,), _ = compare(a, b, progress=False)
        assert (difference.name, difference.what) == (OUTPUT, "values")
    assert compare(own, tmp_path / "own", progress=False)[0] == []


def test_a_merge_keeps_it(own, tmp_path):
    adapter, name = tmp_path / "adapter", "model.language_model.layers.0.self_attn.q_proj"
    adapter.mkdir()
    matrices = {"lora_A.weight": torch.randn(2, 48), "lora_B.weight": torch.randn(64, 2)}
    save_file(
        {f"base_model.model.{name}.{kind}": value for kind, value in matrices.items()},
        adapter / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    merge_adapter(own, adapter, tmp_path / "merged", progress=False)
    before, after = weights(own), weights(tmp_path / "merged")
    assert [key for key in before if not torch.equal(before[key], after[key])] == [f"{name}.weight"]


def test_a_checkpoint_that_lost_it_is_not_written_over_it(own, dense, tmp_path):
    """As earlier versions converted such a folder."""
    hf_to_mcore(dense, tmp_path / "mcore", progress=False)
    with pytest.raises(UserError, match=r"lm_head\.weight that differs .* no output layer of its own"):
        mcore_to_hf(tmp_path / "mcore", own, tmp_path / "out", progress=False)


def test_an_untied_checkpoint_of_another_model_does_not_pass_for_it(own, tmp_path):
    hf_to_mcore(own, tmp_path / "mcore", progress=False)
    layout = json.loads((tmp_path / "mcore" / "hf_layout.json").read_text())
    assert layout.pop("untied") is True
    (tmp_path / "mcore" / "hf_layout.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match="tie_word_embeddings is false in the checkpoint and true in config"):
        mcore_to_hf(tmp_path / "mcore", own, tmp_path / "out", progress=False)


def test_the_copy_in_another_file_is_read(own, tmp_path):
    """The two weights in different files of a sharded folder."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text((own / "config.json").read_text())
    content = load_file(own / "model.safetensors")
    files = {"a.safetensors": {OUTPUT: content.pop(OUTPUT)}, "b.safetensors": content}
    for name, tensors in files.items():
        save_file(tensors, tmp_path / "hf" / name, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors}}
    (tmp_path / "hf" / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    assert_same_files(tmp_path / "hf", there_and_back(tmp_path / "hf", tmp_path))
