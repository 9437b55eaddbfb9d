"""Rows for added tokens: how many the tokenizer needs, what a conversion writes, and who refuses a tokenizer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_folder
from transformers import AutoTokenizer

from megavlm.base.errors import UserError
from megavlm.cli.main import main
from megavlm.config.sections import ModelSettings
from megavlm.convert import hf_to_mcore, mcore_to_hf
from megavlm.convert.hf_shapes import model_shapes
from megavlm.convert.vocabulary import largest_id

EMBEDDING, OUTPUT = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def grown(model_folder, tmp_path_factory):
    """A folder with 512 rows, whose tokenizer has some more ids."""
    folder = shutil.copytree(model_folder, tmp_path_factory.mktemp("grown") / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<|new {i}|>" for i in range(520 - len(tokenizer))])
    tokenizer.save_pretrained(folder)
    return folder


def test_the_largest_id_is_that_of_transformers(model_folder, grown, tmp_path):
    for folder in (model_folder, grown):
        assert largest_id(folder) == max(AutoTokenizer.from_pretrained(folder).get_vocab().values())
    # the older form, in several files
    old = tmp_path / "old"
    old.mkdir()
    content = json.loads((grown / "tokenizer.json").read_text())
    (old / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    assert largest_id(old) == max(content["model"]["vocab"].values())
    (old / "added_tokens.json").write_text(json.dumps({t["content"]: t["id"] for t in content["added_tokens"]}))
    assert largest_id(old) == 519
    assert largest_id(tmp_path) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}', "\0\1"])
def test_a_damaged_tokenizer_is_named(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json cannot be read"):
        largest_id(tmp_path)


def test_rows_are_added_only_when_asked_for(model_folder, grown, dense):
    rows = lambda folder, resize: model_shapes(ModelSettings(hf=folder, resize_vocabulary=resize)).text.vocab
    assert (rows(model_folder, False), rows(model_folder, True), rows(grown, True)) == (512, 512, 640)
    with pytest.raises(UserError, match="has ids up to 519, but the vocabulary of the model has only 512 rows"):
        rows(grown, False)
    with pytest.raises(UserError, match="has no tokenizer"):
        rows(dense, True)


@pytest.fixture(scope="module")
def checkpoint(grown):
    hf_to_mcore(grown, grown.parent / "mcore", progress=False)
    return grown.parent / "mcore"


VERBS = {
    **{verb: (verb,) for verb in ("pretrain", "sft", "rm", "dpo", "kto", "score", "infer", "validate")},
    "validate without files": ("validate", "--no-files"),
    "data inspect": ("data inspect", "--out", "OUT"),
    "export": ("export", "--out", "OUT"),
}


@pytest.mark.parametrize("name", VERBS)
def test_no_verb_starts_with_ids_that_have_no_row(name, grown, checkpoint, tmp_path, capfd):
    messages = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "<|new 1|>"}]
    (tmp_path / "data.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    config = {
        "model": {"hf": str(grown), "load": str(checkpoint)},
        "data": {"train": str(tmp_path / "data.jsonl"), "eval": str(tmp_path / "data.jsonl"), "seq_length": 64},
        "train": {"steps": 1, "global_batch_size": 1, "lr": 1e-3},
        "output": str(tmp_path / "run"),
        **({"stage": 2} if name == "pretrain" else {}),
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    verb, *options = VERBS[name]
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    assert main([*verb.split(), str(tmp_path / "run.yaml"), *options]) == 2
    error = capfd.readouterr().err
    assert "the tokenizer of" in error
    assert "model.resize_vocabulary" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_export_writes_the_added_rows(tied, grown, tmp_path):
    """Of a checkpoint that lacks them, as below an adapter: the mean of the old rows. Files and index fit them."""
    hf = make_folder(tmp_path / "hf", tied=tied, vocab_size=512)
    before = {name: tensor for file in hf.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(grown / name, hf)
    hf_to_mcore(hf, tmp_path / "mcore", progress=False)
    mcore_to_hf(tmp_path / "mcore", hf, tmp_path / "out", resize_vocabulary=True, progress=False)

    out = tmp_path / "out"
    after = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if name in (EMBEDDING, OUTPUT):
            assert torch.equal(after[name][:512], tensor)
            mean = tensor.double().mean(0).float()
            assert torch.equal(after[name][512:], mean.expand(128, -1))
        else:
            assert torch.equal(after[name], tensor)
    assert json.loads((out / "config.json").read_text())["text_config"]["vocab_size"] == 640
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())

    # a checkpoint of a run with the setting has them: they stay without being asked for
    hf_to_mcore(out, tmp_path / "grown mcore", progress=False)
    mcore_to_hf(tmp_path / "grown mcore", hf, tmp_path / "again", progress=False)
    again = {n: t for file in (tmp_path / "again").glob("*.safetensors") for n, t in load_file(file).items()}
    assert again.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in again.items())
    assert json.loads((tmp_path / "again" / "config.json").read_text())["text_config"]["vocab_size"] == 640
