"""A Hugging Face folder read directly: any box of any weight has the bits of the converted checkpoint."""

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_round_trip import rewrite
from tiny_models import make_config, make_folder

from megavlm.base.errors import UserError
from megavlm.checkpoint.fingerprint import digest_of_folders
from megavlm.checkpoint.load_weights import shapes_at_start, start_words
from megavlm.config.sections import ModelSettings
from megavlm.convert import hf_to_mcore, mcore_to_hf
from megavlm.convert.hf_source import HfSource
from megavlm.convert.mcore_checkpoint import McoreCheckpoint

GATE_UP = "model.language_model.layers.0.mlp.experts.gate_up_proj"


def turned(weights):
    """Experts as in the released folders: [experts, in, out]."""
    return {n: t.mT.contiguous() if ".experts." in n else t for n, t in weights.items()}


@pytest.mark.parametrize("kind", ["dense", "moe", "moe, turned", "biases"])
def test_every_box_has_the_bits_of_the_converted_checkpoint(kind, dense, moe, tmp_path):
    folder = dense if kind == "dense" else moe
    if kind == "moe, turned":
        folder = rewrite(moe, tmp_path / "hf", turned)
        first = next(file for file in folder.glob("*.safetensors") if GATE_UP in load_file(file))
        assert load_file(first)[GATE_UP].shape == (4, 48, 40)
    elif kind == "biases":
        folder = make_folder(tmp_path / "hf", attention_bias=True)
    hf_to_mcore(folder, tmp_path / "mcore", progress=False)
    source, stored, draw = HfSource(folder), McoreCheckpoint(tmp_path / "mcore"), random.Random(1)
    assert source.tensors == stored.tensors
    for key, (shape, dtype) in source.tensors.items():
        whole = stored.read(key)
        for _ in range(4):
            cuts = [sorted(draw.sample(range(size + 1), 2)) for size in shape]
            box = tuple(slice(*cut) for cut in cuts)
            target = torch.empty_like(whole[box], dtype=torch.bfloat16 if draw.random() < 0.3 else dtype)
            source.copy_box(key, [cut[0] for cut in cuts], target)
            assert torch.equal(target, whole[box].to(target.dtype)), (key, cuts)
            assert torch.equal(source.read(key, *cuts[0]), whole[box[0]])


def cut_off(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-100])


def in_eight_bits(folder):
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file, metadata={"format": "pt"})


def without_a_tensor(folder):
    rest = load_file(folder / "model.safetensors")
    del rest["model.visual.merger.norm.bias"]
    save_file(rest, folder / "model.safetensors", metadata={"format": "pt"})


def without_weights(folder):
    for file in folder.glob("model*"):
        file.unlink()


SPOILT = {
    cut_off: r"is not a complete safetensors file: cut off at",
    in_eight_bits: r"stored as F8_E4M3, so the weights are quantised",
    without_a_tensor: r"missing tensor model\.visual\.merger\.norm\.bias",
    without_weights: r"holds no weights",
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_a_damaged_folder_is_refused_before_anything_runs(spoil, tmp_path):
    folder = make_folder(tmp_path / "hf", tied=True, shards=False)
    shutil.copytree(folder, tmp_path / "load")
    spoil(tmp_path / "load")
    with pytest.raises(UserError, match=SPOILT[spoil]):
        shapes_at_start(ModelSettings(hf=folder, load=tmp_path / "load"))


OTHERS = {
    "text_config.num_hidden_layers is 3 in the Hugging Face folder and 4 in config.json": {"num_hidden_layers": 4},
    "text_config.intermediate_size is 80 in the Hugging Face folder and 96 in config.json": {"intermediate_size": 96},
    "tie_word_embeddings is true in the Hugging Face folder and false in config.json": {"tied": False},
    "vision_config.depth is 3 in the Hugging Face folder and 4 in config.json": {"vision": {"depth": 4}},
}


@pytest.mark.parametrize("words", OTHERS)
def test_the_folder_of_another_model_is_refused_in_the_terms_of_config_json(words, dense, tmp_path):
    make_config(**{"tied": True, **OTHERS[words]}).save_pretrained(tmp_path / "hf")
    with pytest.raises(
        UserError, match=f"is a Hugging Face folder of another model than config.json describes: {words}"
    ):
        shapes_at_start(ModelSettings(hf=tmp_path / "hf", load=dense))


def test_an_output_layer_of_its_own_and_a_reward_head_are_seen(dense, tmp_path):
    both = lambda w: {**w, "lm_head.weight": w["model.language_model.embed_tokens.weight"].flip(0).contiguous()}
    folder = rewrite(dense, tmp_path / "hf", both)
    save_file({"weight": torch.ones(1, 48)}, folder / "reward_head.safetensors")
    assert not shapes_at_start(ModelSettings(hf=dense, load=folder)).tied
    hf_to_mcore(folder, tmp_path / "mcore", progress=False)
    assert HfSource(folder).tensors == McoreCheckpoint(tmp_path / "mcore").tensors
    assert shapes_at_start(ModelSettings(hf=dense, load=dense)).tied


def test_the_fingerprint_is_that_of_the_weights(dense, tmp_path):
    """Not of what lies beside them in a folder, such as a read-me or the tokenizer."""
    folder = shutil.copytree(dense, tmp_path / "hf")
    (folder / "README.md").write_text("what a fine model")
    assert digest_of_folders(folder) == digest_of_folders(dense)
    file = sorted(folder.glob("*.safetensors"))[0]
    save_file({n: t + 1 for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    assert digest_of_folders(folder) != digest_of_folders(dense)


def test_what_a_command_starts_from_is_said(dense, tmp_path):
    words = lambda load: start_words(ModelSettings(hf=dense, load=load))
    assert words(None) == "nothing: training needs model.load"
    assert words("random") == "random weights"
    assert words(dense) == f"Hugging Face folder {dense}"
    step = tmp_path / "run" / "checkpoints" / "step_00000003"
    hf_to_mcore(dense, step, progress=False)
    assert words(tmp_path / "run") == words(step) == f"checkpoint {step}"


def test_a_folder_named_random_is_no_word(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    word, folder = (ModelSettings(hf="hf", load=load) for load in ("random", "./random"))
    assert word.start is None
    assert folder.start == tmp_path / "random"
    # as in config.yaml, which a run that continues reads
    for model in (word, folder):
        assert ModelSettings(**json.loads(model.model_dump_json())) == model


def test_there_is_nothing_to_convert_in_a_hugging_face_folder(dense, tmp_path):
    with pytest.raises(UserError, match="is a Hugging Face folder already"):
        mcore_to_hf(dense, dense, tmp_path / "out", progress=False)
    with pytest.raises(UserError, match=r"model\.load is random"):
        mcore_to_hf("random", dense, tmp_path / "out", progress=False)
