"""A LoRA adapter sent to real vLLM alone, beside the whole model with the adapter merged into it.

    python -m benchmarks.vllm_adapters [--layers N] [--steps N] [--json FILE]

Two runs of GRPO train the same adapter on a random model of 0.3 billion parameters in bfloat16, which a server of vLLM
samples: one sends it merged, one sends it alone (``enable_lora: true`` among the arguments of vLLM). Compared are, of
the steps after the first, the medians of the seconds until the server has the weights, of the tokens sampled in a
second, and of how far the trainer's log-probabilities of these are from vLLM's. ``make vllm`` sets vLLM up.
"""

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path

from benchmarks.forked import command
from benchmarks.ranks import versions
from benchmarks.weight_sync import TEXT
from megavlm.demo.data import write_records
from megavlm.monitor.metrics import read_metrics

WAYS = {"merged": {"enable_lora": False}, "alone": {"enable_lora": True}}
REWARD = "def letters(completions, **columns):\n    return [sum(map(ord, text)) % 11 / 10 for text in completions]\n"
FIELDS = ("seconds_sync", "rollout_tokens_per_second", "mismatch_kl", "mismatch_max", "grad_norm")


def configuration(root: Path, steps: int) -> Path:
    """Writes the configuration of the runs, their questions and their reward."""
    (root / "reward.py").write_text(REWARD)
    asked = [
        {"messages": [{"role": "user", "content": f"{n}: describe it."}, {"role": "assistant", "content": "No."}]}
        for n in range(64)
    ]
    write_records(root / "questions.jsonl", asked)
    config = {
        "model": {"hf": str(root / "model"), "load": str(root / "model"), "freeze": ["vision", "projector"]},
        "adapter": {"type": "lora", "rank": 32, "alpha": 64.0},
        "data": {"train": [{"path": str(root / "questions.jsonl")}], "seq_length": 256, "workers": 0},
        "train": {"steps": steps, "lr": 1e-3, "precision": "bf16", "warmup_steps": 0, "memory_check": False},
        "align": {"beta": 0.0},
        "rollout": {"engine": "vllm", "prompts": 8, "group_size": 4, "max_new_tokens": 32, "cache_gib": 0.25},
        "reward": [{"python": f"{root / 'reward.py'}:letters"}],
        "log": {"wandb": {"mode": "off"}},
    }
    (root / "run.yaml").write_text(json.dumps(config))
    return root / "run.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=20, help="layers of the decoder (default: 20)")
    parser.add_argument("--steps", type=int, default=6, help="number of steps (default: 6)")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args()
    os.environ |= {"MEGAVLM_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    import megavlm.commands.train  # noqa: F401 (so that no fork has to)
    from megavlm.demo.model_folder import make_model_folder

    found = {}
    with tempfile.TemporaryDirectory(prefix="megavlm-adapters-") as temporary:
        root = Path(temporary)
        make_model_folder(root / "model", text={**TEXT, "num_hidden_layers": args.layers}, dtype="bfloat16")
        config = configuration(root, args.steps)
        for name, arguments in WAYS.items():
            command("grpo", config, f"output={root / name}", f"rollout.vllm.args={json.dumps(arguments)}")
            steps = read_metrics(root / name)[1:]
            found[name] = {field: statistics.median(step[field] for step in steps) for field in FIELDS}
            print(f"{name}: {found[name]}", flush=True)
    if args.json:
        content = {"versions": versions(), "layers": args.layers, "steps": args.steps, **found}
        args.json.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
