"""What servers of vLLM are compared with and used by: the built-in engine, transformers, trainers, whole runs."""

import json
import time
from pathlib import Path

import forked_command
import torch
from safetensors.torch import load_file, save_file
from test_engine import engine_of, start
from toy import read_samples, reference_inputs, toy_records, write_records
from vllm_served import by_index

from megavlm.monitor.metrics import read_metrics
from megavlm.monitor.rollout_log import read_rollouts


def of_the_built_in_engine(settings: dict, sampling) -> dict[int, list]:
    from megavlm.rollout.engine import Prompt

    session, renderer, samples = start(settings)
    engine = engine_of(session, renderer, places=25)
    return by_index(engine.generate(iter([Prompt(sample, (0,)) for sample in samples]), sampling))


def logprobs_of(model, processor, record: dict, root: Path, tokens: list[int]) -> list[float]:
    """transformers' log-probabilities of an answer."""
    inputs = reference_inputs(processor, record, root, add_generation_prompt=True)
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([tokens])], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):
        inputs[name] = torch.nn.functional.pad(inputs[name], (0, len(tokens)), value=value)
    with torch.no_grad():
        logits = model(**inputs).logits[0, length - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0].tolist()


def changed(folder: Path, out: Path) -> Path:
    """A copy of a folder in which every weight is another one, those of the tower, too."""
    out.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (out / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(3)
    noisy = lambda value: value + 0.1 * value.std(correction=0) * torch.randn(value.shape, generator=generator)
    weights = {name: noisy(value) for name, value in load_file(folder / "model.safetensors").items()}
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def change(session, number: int = 0) -> None:
    """Changes what is trained, by values of this number; copies on other ranks change alike."""
    from megavlm.model.vlm import PARTS

    for module in (module for part in PARTS for module in session.vlm.modules_of(part)):
        for parameter in module.parameters():
            if parameter.requires_grad:
                values = (torch.arange(parameter.numel()) + number).cos()
                parameter.data += 0.03 * values.view_as(parameter)


def from_a_trainer(settings: dict, sampling) -> tuple[dict, dict]:
    """Runs on every rank: the answers of vLLM and of the built-in engine with weights that were changed here.

    Adapters alone are changed if there are any.
    """
    from megavlm.config.settings import Settings
    from megavlm.data.renderer import Renderer
    from megavlm.reinforcement.engines import make_engine
    from megavlm.rollout.engine import Prompt
    from megavlm.runtime import session

    settings = Settings(**settings)
    session = session.start(settings, training=True)
    change(session)
    renderer, groups = Renderer(settings.model.hf, settings.data), session.groups
    samples = read_samples(settings.data.eval[0].path, renderer, "prompt")[groups.dp_rank :: groups.dp_size]
    prompts = lambda: iter([Prompt(sample, (0,)) for sample in samples]) if groups.is_leader else None
    engine = make_engine(session)
    engine.sync()
    found = by_index(engine.generate(prompts(), sampling))
    engine.close()
    session.vlm.train(False)
    return found, by_index(engine_of(session, renderer, places=25).generate(prompts(), sampling))


LORA = {
    "adapter": {
        "type": "lora",
        "rank": 4,
        "targets": ["attn.qkv", "merger.linear_fc1", "q_proj", "v_proj", "down_proj"],
    }
}
TRAINERS = {
    "TP2": ("dense", {"parallel": {"tensor": 2}}),
    "PP2, LoRA": ("dense", {"parallel": {"pipeline": 2}, **LORA}),
    "DP2 × EP2": ("moe", {"parallel": {"expert": 2}}),
}


def trainer_settings(served, toys, kind: str, questions: Path, output: Path) -> dict:
    """The settings of `from_a_trainer` in one process, for a server that is there."""
    return {
        "model": {"hf": str(toys.folder(kind)), "load": str(toys.checkpoint(kind))},
        "data": {"eval": str(questions), "seq_length": 512},
        "train": {"precision": "fp32"},
        "rollout": {"engine": "vllm", "max_sequences": 64, "vllm": {"url": served._urls}},
        "output": str(output),
    }


def grpo_config(served, toys, folder: Path, steps: int, **rollout) -> Path:
    """The file with the settings of a run on the toy records whose answers a server samples; None: one of its own."""
    data = write_records(toys.root / "for_grpo.jsonl", toy_records(toys.root))
    config = {
        "model": {"hf": str(toys.folder("dense")), "load": str(toys.checkpoint("dense"))},
        "data": {"train": [{"path": str(data)}], "seq_length": 256, "workers": 0},
        "train": {"optimizer": "adam", "lr": 1e-3, "precision": "fp32", "warmup_steps": 0, "memory_check": False,
                  "steps": steps},
        "align": {"beta": 0.0},
        "rollout": {"engine": "vllm", "prompts": 4, "group_size": 4, "max_new_tokens": 5, "log_every": 1,
                    "vllm": {"url": served._urls} if served else {}, **rollout},
        "reward": [{"python": f"{Path(__file__).parent / 'grpo_rewards.py'}:letters"}],
        "reward_pool": {"workers": 1},
        "log": {"wandb": {"mode": "off"}},
        "output": str(folder),
    }  # fmt: skip
    (folder.parent / "run.yaml").write_text(json.dumps(config))
    return folder.parent / "run.yaml"


def grpo(served, toys, folder: Path, steps: int, **rollout) -> tuple[list[dict], list[str], float]:
    """A run: its metrics, its prompts in the order in which they were learned, and how many seconds its end took."""
    result = forked_command.run(["grpo", str(grpo_config(served, toys, folder, steps, **rollout))])
    ended = time.time()
    assert result.returncode == 0, result.stdout + result.stderr
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    learned = [group.sample for step in read_rollouts(folder) for group in step.groups]
    return lines, learned, ended - (folder / "metrics.jsonl").stat().st_mtime
