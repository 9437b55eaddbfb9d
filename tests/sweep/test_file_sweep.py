"""Every file that a verb reads, spoiled in every way: one message in words and status 2, whatever the verb."""

import shutil
from pathlib import Path

import pytest
from spoiling import FAULTS, check_words, run_apart, run_here, spoiled

TRAINING = ("pretrain", "sft", "rm", "dpo", "kto", "grpo", "ppo")
VERBS = (*TRAINING, "score", "infer", "chat", "validate", "data inspect", "export", "plan", "bench")
PROCESSOR = ("tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja")
SHARDS = ("shards/.nv-meta/.info.json", "shards/a.tar.idx", "shards/a.tar")
DATA = {"rm": "pairs", "dpo": "pairs", "kto": "judged"}
SAMPLED = ["train.global_batch_size=null", "reward=[{name: exact}]", "rollout.prompts=2", "rollout.max_new_tokens=8"]
NEEDED = {
    "pretrain": ["stage=1"],
    "grpo": SAMPLED,
    "ppo": SAMPLED,
    "plan": ["--gpus", "8"],
    "export": ["--out", "out"],
    "data inspect": ["--out", "out"],
}


def arguments_of(verb: str, *more: str) -> list[str]:
    """A command line that would succeed."""
    data = [f"data.train={DATA[verb]}.jsonl"] if verb in DATA else []
    return [*verb.split(), "run.yaml", *data, *NEEDED.get(verb, []), *more]


@pytest.mark.parametrize("fault", FAULTS)
def test_configurations(place, capfd, fault):
    with spoiled(place / "run.yaml", fault):
        for verb in VERBS:
            check_words(*run_here(capfd, *arguments_of(verb)), "run.yaml")
    with spoiled(place / "base.yaml", fault):
        status, printed = run_here(capfd, *arguments_of("validate"))
        if fault == "emptied":  # a file without settings
            assert (status, printed) == (0, "")
        else:
            check_words(status, printed, "base.yaml")


@pytest.mark.parametrize("fault", FAULTS)
def test_config_json(place, capfd, fault):
    with spoiled(place / "hf/config.json", fault):
        for verb in ("validate", "data inspect", "export"):
            check_words(*run_here(capfd, *arguments_of(verb)), "config.json", "model.hf", "hf: ")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", PROCESSOR)
def test_processors_and_tokenizers(place, capfd, file, fault):
    """Some of these files may be missing or hold other settings: then there are defaults."""
    with spoiled(place / "hf" / file, fault):
        status, printed = run_here(capfd, *arguments_of("validate"))
        if status != 0 or printed:
            check_words(status, printed, "hf", "chat template")


@pytest.mark.parametrize("fault", FAULTS)
def test_data_files(place, capfd, fault):
    with spoiled(place / "train.jsonl", fault):
        for verb in ("validate", "data inspect"):
            check_words(*run_here(capfd, *arguments_of(verb)), "train.jsonl")
            shutil.rmtree(place / "out", ignore_errors=True)
        check_words(*run_here(capfd, "data", "prepare", "--jsonl", "train.jsonl", "--out", "out"), "train.jsonl")


@pytest.mark.parametrize("fault", FAULTS)
def test_pictures(place, capfd, fault):
    with spoiled(place / "cat.png", fault):
        for verb in ("validate", "data inspect"):
            check_words(*run_here(capfd, *arguments_of(verb)), "cat.png")
            shutil.rmtree(place / "out", ignore_errors=True)
        if fault != "truncated":  # the header is whole, and nothing else is looked at
            check_words(*run_here(capfd, "data", "prepare", "--jsonl", "train.jsonl", "--out", "out"), "cat.png")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", SHARDS)
def test_shards(place, capfd, file, fault):
    with spoiled(place / file, fault):
        status, printed = run_here(capfd, *arguments_of("validate", "data.train=shards"))
        if (file, fault) == ("shards/a.tar", "truncated"):  # only zeros at its end are gone
            assert (status, printed) == (0, "")
        else:
            check_words(status, printed, ".info.json" if "info" in file else "a.tar")


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("file", [".metadata", "metadata.json", "__0_0_0.distcp"])
def test_checkpoints(place, capfd, file, fault):
    """What the tools say of them is in tests/convert/test_damaged_files.py."""
    with spoiled(place / "mcore" / file, fault):
        check_words(*run_here(capfd, *arguments_of("export")), "mcore")
        assert not (place / "out").exists()
        status, printed = run_here(capfd, *arguments_of("validate"))
        if file != "__0_0_0.distcp" or status != 0:  # whose data is read when it is loaded
            check_words(status, printed, "mcore")


# A verb that builds a model takes a second or two, so each verb and each kind of file is met once or twice.
APART = [
    ("sft", "hf/config.json", "truncated"),
    ("infer", "hf/tokenizer.json", "binary"),
    ("dpo", "hf/tokenizer.json", "a folder"),
    ("score", "hf/processor_config.json", "binary"),
    ("pretrain", "train.jsonl", "other JSON"),
    ("sft", "train.jsonl", "emptied"),
    ("rm", "pairs.jsonl", "a folder"),
    ("dpo", "pairs.jsonl", "binary"),
    ("kto", "judged.jsonl", "a list"),
    ("score", "eval.jsonl", "a list"),
    ("infer", "eval.jsonl", "other JSON"),
    ("sft", "cat.png", "binary"),
    ("score", "cat.png", "a dangling link"),
    ("infer", "cat.png", "truncated"),
    ("sft", "mcore/.metadata", "truncated"),
    ("score", "mcore/__0_0_0.distcp", "truncated"),
    ("infer", "mcore/__0_0_0.distcp", "binary"),
    ("grpo", "train.jsonl", "binary"),
    ("grpo", "hf/tokenizer.json", "truncated"),
    ("ppo", "train.jsonl", "emptied"),
    ("ppo", "mcore/metadata.json", "a list"),
    ("chat", "hf/tokenizer.json", "other JSON"),
    ("chat", "mcore/.metadata", "binary"),
    ("plan", "hf/config.json", "binary"),
    ("bench", "hf/config.json", "a list"),
]


@pytest.mark.parametrize(("verb", "file", "fault"), APART)
def test_verbs_that_build_a_model(place, verb, file, fault):
    with spoiled(place / file, fault):
        check_words(*run_apart(*arguments_of(verb)), Path(file).name, "hf")


@pytest.mark.parametrize("fault", FAULTS)
def test_files_of_an_earlier_start(place, capfd, fault):
    """config.yaml, which is looked at before a process starts."""
    (place / "run/checkpoints/step_00000001").mkdir(parents=True)  # without one, the run begins again
    (place / "run/config.yaml").write_text("model: {hf: hf}\n")
    with spoiled(place / "run/config.yaml", fault):
        check_words(*run_here(capfd, *arguments_of("sft")), "run")


@pytest.mark.parametrize("name", ["metrics.jsonl", "data_errors.jsonl"])
@pytest.mark.parametrize("fault", FAULTS)
def test_lines_of_an_earlier_start(tmp_path, name, fault):
    """They are read when a run continues."""
    from megavlm.base.errors import UserError
    from megavlm.monitor.metrics import append_lines, drop_after, read_lines

    path = tmp_path / name
    path.write_text('{"step": 1, "sample": "a", "kind": "broken"}\n' * 4)
    with spoiled(path, fault):
        if fault in ("a folder", "not permitted"):
            for read in (read_lines, lambda path: drop_after(path, 1)):
                with pytest.raises(UserError, match=f"{name} cannot be read"):
                    read(path)
            return
        drop_after(path, 1)
        assert len(read_lines(path)) == (2 if fault == "truncated" else 0)
        append_lines(path, ['{"step": 2}\n'])


@pytest.mark.parametrize("fault", FAULTS)
def test_the_reference_file(place, fault):
    from megavlm.align.reference import _read
    from megavlm.base.errors import UserError

    path = place / "reference.safetensors"
    path.write_bytes(b"\x10" + bytes(7) + b'{"a":[1, null]} ')
    with spoiled(path, fault), pytest.raises(UserError, match="reference"):
        _read(path, {}, 1)
    path.unlink()
