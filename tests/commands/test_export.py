"""An exported folder is complete: limits of training, tokens that end an answer, files of a chosen size, a model card.

It is that of the chosen step, also if the run goes on and deletes the checkpoint meanwhile.
"""

import json
import re
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from toy import picture, reference_model, toy_folder
from transformers import AutoProcessor, GenerationConfig

from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import publish
from megavlm.commands import export
from megavlm.config.load import resolved_yaml
from megavlm.config.settings import Settings
from megavlm.convert import hf_to_mcore
from megavlm.demo.vllm_answers import vllm_python, vllm_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(model folder, output folder of a run that trained with limits of its own)."""
    root = tmp_path_factory.mktemp("run")
    hf = toy_folder(root)
    hf_to_mcore(hf, root / "run" / "checkpoints" / "step_00000001", progress=False)
    limits = {"max_pixels": 2048, "video_fps": 1.0, "video_max_pixels": 32_768}
    settings = Settings(model={"hf": hf}, data=limits, output=root / "run")
    (root / "run" / "config.yaml").write_text(resolved_yaml(settings))
    return hf, root / "run"


def exported(hf, load, out, **data):
    export.main(Settings(model={"hf": hf, "load": load}, data=data), out)
    return json.loads((out / "processor_config.json").read_text())


def test_the_limits_of_the_run_are_exported(run, tmp_path, capsys):
    hf, folder = run
    before = json.loads((hf / "processor_config.json").read_text())
    after = exported(hf, folder, tmp_path / "out")
    assert after["image_processor"].pop("size")["longest_edge"] == 2048
    assert after["video_processor"].pop("size")["longest_edge"] == 32_768
    assert after["video_processor"].pop("fps") == 1.0
    for part, names in (("image_processor", ["size"]), ("video_processor", ["size", "fps"])):
        assert after[part] == {name: value for name, value in before[part].items() if name not in names}
    told = capsys.readouterr().out
    assert "limits of training: data.max_pixels=2048, data.video_max_pixels=32768, data.video_fps=1.0" in told


def test_limits_of_the_export_come_first_and_none_change_nothing(run, tmp_path, capsys):
    hf, folder = run
    assert exported(hf, folder, tmp_path / "own", max_pixels=4096)["image_processor"]["size"]["longest_edge"] == 4096
    apart = shutil.copytree(folder / "checkpoints" / "step_00000001", tmp_path / "converted")
    capsys.readouterr()
    exported(hf, apart, tmp_path / "out")
    assert "limits of training" not in capsys.readouterr().out
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == (hf / "processor_config.json").read_bytes()


def weights_in(folder):
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def test_files_have_the_chosen_size_and_load_with_the_code_of_the_card(run, tmp_path, monkeypatch, capsys):
    hf, folder = run
    out = tmp_path / "out"
    export.main(Settings(model={"hf": hf, "load": folder}), out, shard_size="1MB")
    files = sorted(out.glob("*.safetensors"))
    sizes = [sum(value.nbytes for value in load_file(file).values()) for file in files]
    assert len(files) > 2
    assert all(size <= 1_000_000 or len(load_file(file)) == 1 for file, size in zip(files, sizes, strict=True))
    assert [file.name for file in files] == [
        f"model-{n:05}-of-{len(files):05}.safetensors" for n in range(1, len(files) + 1)
    ]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    before, after = load_file(hf / "model.safetensors"), weights_in(out)
    assert before.keys() == after.keys() == index["weight_map"].keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    code = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    shown = picture(tmp_path, "chelsea", (96, 64))
    monkeypatch.chdir(tmp_path)  # where the folder is called as in the card
    capsys.readouterr()
    found: dict = {}
    exec(code.replace("picture.jpg", str(tmp_path / shown)).replace("128", "8"), found)
    answer = capsys.readouterr().out
    model = reference_model(hf)  # the same answer from the model before
    tokens = model.generate(**found["inputs"], max_new_tokens=8)
    assert (
        answer
        == found["processor"].decode(tokens[0, found["inputs"]["input_ids"].shape[1] :], skip_special_tokens=True)
        + "\n"
    )


def test_the_tokens_that_end_an_answer(run, tmp_path):
    hf, folder = run
    exported(hf, folder, tmp_path / "copied")
    name = "generation_config.json"
    assert (tmp_path / "copied" / name).read_bytes() == (hf / name).read_bytes()
    assert (tmp_path / "copied" / "chat_template.jinja").read_bytes() == (hf / "chat_template.jinja").read_bytes()
    without = shutil.copytree(hf, tmp_path / "hf")
    (without / name).unlink()
    exported(without, folder, tmp_path / "made")
    written = GenerationConfig.from_pretrained(tmp_path / "made")
    assert written.eos_token_id == [json.loads((hf / "config.json").read_text())["text_config"]["eos_token_id"]]


def test_a_licence_goes_with_the_weights(run, tmp_path):
    hf, folder = run
    licensed = shutil.copytree(hf, tmp_path / "models--Qwen--Toy" / "snapshots" / "0")
    (licensed / "LICENSE").write_text("do what you like")
    (licensed / "README.md").write_text("---\nlicense: mit\n---\nThe card of the base model.\n")
    exported(licensed, folder, tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "do what you like"
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nbase_model: Qwen/Toy\nlibrary_name: transformers\nlicense: mit\n")
    assert "The card of the base model" not in card


@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_that_is_deleted_while_it_is_read(named, run, tmp_path, monkeypatch):
    hf, _ = run
    root = tmp_path / "run" / "checkpoints"
    for step in (1, 2):
        hf_to_mcore(hf, root / f"step_{step:08}", progress=False)
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(Settings(model={"hf": hf})))
    real = export.mcore_to_hf

    def while_the_run_goes_on(load, *arguments, **options):
        partial = (root / "step_00000001").rename(root / "step_00000003.0badcafe.partial")
        publish(partial, keep=1, keep_every=None)
        assert not (root / "step_00000002").exists()
        real(load, *arguments, **options)

    monkeypatch.setattr(export, "mcore_to_hf", while_the_run_goes_on)
    load = root / "step_00000002" if named else tmp_path / "run"
    export.main(Settings(model={"hf": hf, "load": load}), tmp_path / "out")
    before, after = load_file(hf / "model.safetensors"), weights_in(tmp_path / "out")
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert [path.name for path in root.iterdir()] == ["step_00000003"]
    if named:
        with pytest.raises(UserError, match="step_00000002 does not exist"):
            export.main(Settings(model={"hf": hf, "load": load}), tmp_path / "again")


def test_a_checkpoint_that_is_deleted_just_before(run, tmp_path, monkeypatch):
    """Between the choice of the newest and its files having further names: the next choice is taken."""
    hf, _ = run
    root = tmp_path / "run" / "checkpoints"
    hf_to_mcore(hf, root / "step_00000001", progress=False)
    (tmp_path / "run" / "config.yaml").write_text(resolved_yaml(Settings(model={"hf": hf})))
    real, calls = export.choose, []

    def choose(settings, **_):
        chosen = real(settings)
        if not calls:
            (root / "step_00000001").rename(root / "step_00000002")
        calls.append(chosen[1].step)
        return chosen

    monkeypatch.setattr(export, "choose", choose)
    export.main(Settings(model={"hf": hf, "load": tmp_path / "run"}), tmp_path / "out")
    assert calls == [1, 2]
    assert "after step 2" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"shard_size": "five"}, "--shard-size is 'five'; allowed"), ({"shard_size": "1GB", "adapter": True}, "ignored")],
)
def test_sizes_that_cannot_be_used(flags, message, run, tmp_path):
    with pytest.raises(UserError, match=message):
        export.main(Settings(model={"hf": run[0], "load": run[1]}), tmp_path / "out", **flags)


@pytest.mark.slow
def test_vllm_and_transformers_answer_alike(run, tmp_path):
    """Real vLLM reads the exported files: weights in shards, processor with the limits of training, end tokens."""
    python = vllm_python()
    if python is None:
        pytest.skip("there is no environment with vLLM (make vllm)")
    hf, folder = run
    out = tmp_path / "out"
    export.main(Settings(model={"hf": hf, "load": folder}), out, shard_size="1MB")
    processor = AutoProcessor.from_pretrained(out)
    cat, page = (
        str(tmp_path / picture(tmp_path, name, size)) for name, size in (("chelsea", (96, 64)), ("page", (384, 192)))
    )
    # the page is larger than the limit of training
    asked = [("What is this?", [cat]), ("Read this.", [page]), ("Compare.", [cat, page]), ("Hi", [])]
    prompts = []
    for question, names in asked:
        content = [*({"type": "image"} for _ in names), {"type": "text", "text": question}]
        messages = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        prompts.append({"text": text, "images": names})
    theirs = vllm_tokens(python, out, prompts, 8)
    model, ours = reference_model(out), []
    for prompt in prompts:
        pictures = [Image.open(file).convert("RGB") for file in prompt["images"]]
        inputs = processor(text=[prompt["text"]], images=pictures or None, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        ours.append(tokens[0, inputs["input_ids"].shape[1] :].tolist())
    assert theirs == ours
    assert len({tuple(answer) for answer in ours}) == len(asked)  # the questions matter
