"""The table of verbs: the arguments and settings of each verb, the files that it reads, and what it writes."""

from pathlib import Path
from typing import Any

from megavlm.align.registry import METHODS, MethodEntry
from megavlm.cli.plan_verbs import PLAN_VERBS
from megavlm.cli.verb import FOR, READS, RUN, Verb, positive

RUN_REQUIRES = ("output", "data.train", "train.steps|train.epochs", "train.lr")
START_FLAGS: dict[str, dict[str, Any]] = {
    "change": {
        "metavar": "KEY",
        "action": "append",
        "default": [],
        "help": "continue the run in output although this setting has changed: a learning rate or schedule, or "
        "data.train for the blend; may be repeated",
    },
    "restart": {"action": "store_true", "help": "delete the run in output, and start from the beginning"},
}
RUN_READS = (*READS, "data.train", "data.eval")

EMA: dict[str, Any] = {"action": "store_true", "help": "use the moving average of the weights (train.ema)"}


def _of_method(name: str, method: MethodEntry) -> Verb:
    return Verb(
        "megavlm.commands.train:main",
        method.summary,
        method.example,
        sections=(
            *RUN,
            *(["align"] if method.aligns else []),
            *(["rollout", "reward", "environment"] if method.samples else []),
        ),
        requires=(*method.requires, *RUN_REQUIRES, *([] if method.samples else ["train.global_batch_size"])),
        reads=(*RUN_READS, *method.reads),
        writes="",
        flags=START_FLAGS,
        fixed={"method": name},
    )


VERBS = {name: _of_method(name, method) for name, method in METHODS.items()} | {
    "score": Verb(
        "megavlm.commands.score:main",
        "write the log-probabilities of all target tokens of data.eval to scores.jsonl",
        "megavlm score sft.yaml\n"
        "megavlm score sft.yaml model.load=runs/sft/checkpoints/step_00000100 output=runs/scores",
        sections=("model", "adapter", "data", "parallel", "vision", "train.precision", "train.logprob_chunk_tokens"),
        requires=("output", "model.load", "data.eval"),
        reads=(*READS, "data.eval"),
        writes="scores.jsonl",
        uses_run=True,
        flags={
            "reward": {"action": "store_true", "help": "write scores of a reward model (megavlm rm) instead"},
            "ema": EMA,
            "worst": {
                "metavar": "N",
                "type": positive,
                "help": "also write scores.html with the N samples of the highest loss per token, and show ten of them",
            },
            "each": {
                "action": "store_true",
                "help": "also write losses.jsonl: the loss per token of each sample, highest first",
            },
        },
    ),
    "infer": Verb(
        "megavlm.commands.infer:main",
        "generate answers to the questions of data.eval, written to answers.jsonl, or to one prompt",
        'megavlm infer sft.yaml --prompt "What is this?" --image cat.png\n'
        "megavlm infer sft.yaml data.eval=questions.jsonl\n"
        "megavlm infer sft.yaml model.load=CHECKPOINT data.eval=questions.jsonl output=runs/answers\n"
        "megavlm infer sft.yaml data.eval=questions.jsonl rollout.engine=vllm",
        sections=(
            *("model", "adapter", "data", "parallel", "vision", "train.precision", "train.seed", "generate"),
            *("rollout.engine", "rollout.max_sequences", "rollout.cache_gib", "rollout.vllm.url"),
            *("rollout.vllm.servers", "rollout.vllm.devices", "rollout.vllm.tensor_parallel"),
        ),
        requires=("model.load",),
        reads=(*READS, "data.eval"),
        writes="answers.jsonl",
        uses_run=True,
        flags={
            "prompt": {"metavar": "TEXT", "help": "answer this prompt on the terminal, instead of data.eval"},
            "image": {
                "metavar": "PATH",
                "type": Path,
                "action": "append",
                "default": [],
                "help": "picture for --prompt; may be repeated",
            },
            "video": {
                "metavar": "PATH",
                "type": Path,
                "action": "append",
                "default": [],
                "help": "video for --prompt; may be repeated",
            },
            "ema": EMA,
        },
    ),
    "chat": Verb(
        "megavlm.commands.chat:main",
        "hold a conversation on the terminal, with pictures and videos by path",
        "megavlm chat sft.yaml\n"
        "megavlm chat sft.yaml model.load=CHECKPOINT output=null --image cat.png\n"
        "megavlm chat sft.yaml model.load=HF_FOLDER output=null --adapter ADAPTER_FOLDER",
        sections=("model", "adapter", "data", "parallel", "vision", "train.precision", "train.seed", "generate"),
        requires=("model.load",),
        flags={
            "image": {
                "metavar": "PATH",
                "type": Path,
                "action": "append",
                "default": [],
                "help": "picture for the first question; may be repeated",
            },
            "video": {
                "metavar": "PATH",
                "type": Path,
                "action": "append",
                "default": [],
                "help": "video for the first question; may be repeated",
            },
            "adapter": {
                "metavar": "DIR",
                "help": "the adapter to talk with, the same as model.adapter=DIR: a folder of peft's, a checkpoint or "
                "a run of adapters",
            },
            "ema": EMA,
        },
        settings={"adapter": "model.adapter"},
        uses_run=True,
        reads_terminal=True,
    ),
    "export": Verb(
        "megavlm.commands.export:main",
        "convert a checkpoint to a Hugging Face folder, with an adapter merged or written separately",
        "megavlm export sft.yaml --out exported\n"
        "megavlm export sft.yaml model.load=runs/sft/checkpoints/step_00000100 --out exported\n"
        "megavlm export sft.yaml --shard-size 2GB --base-model Qwen/Qwen3-VL-8B-Instruct --out exported\n"
        "megavlm export sft-lora.yaml --adapter --out adapter",
        sections=("model", "adapter"),
        requires=("model.load",),
        flags={
            "out": {
                "metavar": "DIR",
                "type": Path,
                "required": True,
                "help": "new folder; overwrite=true replaces one",
            },
            "adapter": {"action": "store_true", "help": "write only the adapter, in peft's format"},
            "shard_size": {
                "metavar": "SIZE",
                "help": "largest size of a file of weights, such as 5GB; default: the files that model.hf has",
            },
            "base_model": {
                "metavar": "NAME",
                "help": "name of the base model on the hub, for the model card and for peft; default: known only if "
                "model.hf is in the hub's cache",
            },
            "ema": EMA,
        },
        local_workers=False,
        uses_run=True,
    ),
    "validate": Verb(
        "megavlm.commands.validate:main",
        "check a configuration and the first samples of its data, and show what it would do",
        "megavlm validate stage2.yaml --world-size 64\n"
        "megavlm validate stage2.yaml --world-size 64 --gpu h100\n"
        "megavlm validate dpo-lora.yaml --world-size 64 --no-files --dry-run dpo",
        reads=(),
        flags={
            "world_size": {
                "metavar": "N",
                "type": positive,
                "help": "number of processes for which the configuration is intended",
            },
            "no_files": {
                "action": "store_true",
                "help": "check only settings, shapes and layout; data and checkpoints may be missing",
            },
            "dry_run": {
                "metavar": "VERB",
                "choices": tuple(METHODS),
                "help": "also build the model and optimizer of some ranks of VERB without allocating memory, and print "
                "their sizes; no GPU is used",
            },
            "gpu": {
                "metavar": "NAME",
                "help": "also say whether the layout fits the memory of this GPU (see megavlm plan), such as h100",
            },
            "for": FOR,
            "change": START_FLAGS["change"],
        },
        local_workers=False,
    ),
    "watch": Verb(
        "megavlm.commands.watch:main",
        "show runs while they train, on a local page or on the terminal",
        "megavlm watch runs/sft\nmegavlm watch runs/sft runs/sft-2\nmegavlm watch --text runs/sft --field loss",
        sections=(),
        reads=(),
        positionals={
            "outputs": {
                "metavar": "OUTPUT",
                "nargs": "+",
                "type": Path,
                "help": "output folders of runs, or folders that contain some",
            }
        },
        flags={
            "text": {"action": "store_true", "help": "show curves on the terminal instead of a page"},
            "once": {"action": "store_true", "help": "only with --text: show them once"},
            "log": {"action": "store_true", "help": "only with --text: logarithmic scales"},
            "field": {
                "metavar": "NAME",
                "action": "append",
                "default": [],
                "help": "only with --text: a field of metrics.jsonl to draw; may be repeated; default: the main ones",
            },
            "port": {"metavar": "N", "type": int, "help": "port of the page; default: a free one from 8471 on"},
        },
        local_workers=False,
    ),
    **PLAN_VERBS,
    "data prepare": Verb(
        "megavlm.commands.data_prepare:main",
        "index a folder of WebDataset shards, or create one from data files and their media",
        "megavlm data prepare shards\nmegavlm data prepare --jsonl train.jsonl more.jsonl --out shards",
        sections=(),
        reads=(),
        positionals={"folder": {"metavar": "DIR", "nargs": "?", "help": "folder of *.tar shards to index"}},
        flags={
            "jsonl": {
                "metavar": "FILE",
                "nargs": "+",
                "default": [],
                "help": "instead of indexing DIR, write these data files (JSONL, JSON, Parquet, Arrow; paths, patterns "
                "or URLs) and their media into shards",
            },
            "out": {"metavar": "DIR", "type": Path, "help": "new folder for the shards of --jsonl; it must not exist"},
            "shard_size": {
                "metavar": "SIZE",
                "help": "maximum size of a shard written from --jsonl; default 500MB",
            },
            "workers": {
                "metavar": "N",
                "type": positive,
                "help": "processes that write shards of --jsonl, each some parts of the samples; default: one for each "
                "core, but one alone for fewer than 2,000 samples",
            },
            "part": {
                "metavar": "I/N",
                "help": "write only this part of the samples of --jsonl, from 1/N to N/N, into a folder below DIR, for "
                "a job array; afterwards, data prepare DIR joins the parts",
            },
            "media_roots": {
                "metavar": "DIR",
                "type": Path,
                "nargs": "+",
                "default": [],
                "help": "folders in which the local media of --jsonl must be (as data.media_roots); default: anywhere",
            },
            "media_protocols": {
                "metavar": "NAME",
                "nargs": "+",
                "default": [],
                "help": "protocols or hosts of other URLs that --jsonl may name (as data.media_protocols)",
            },
            "skip_broken": {
                "action": "store_true",
                "help": "skip samples of --jsonl that cannot be read, and list them in skipped.jsonl of the new folder",
            },
            "force": {"action": "store_true", "help": "index DIR again even if its index is up to date"},
        },
        local_workers=False,
    ),
    "data inspect": Verb(
        "megavlm.commands.data_inspect:main",
        "inspect the data of a configuration: its sources, lengths, packing and rendered samples",
        "megavlm data inspect sft.yaml --out data-inspect",
        sections=("model", "data", "parallel", "train.seed"),
        requires=("data.train",),
        reads=("model.hf", "data.train"),
        flags={
            "out": {
                "metavar": "DIR",
                "type": Path,
                "default": Path("data-inspect"),
                "help": "folder for the report; it must not exist; default data-inspect",
            },
            "samples": {
                "metavar": "N",
                "type": positive,
                "default": 200,
                "help": "number of samples to inspect in each source; default 200",
            },
            "for": FOR,
            "duplicates": {
                "action": "store_true",
                "help": "also read all samples, and report those that data.train and data.eval contain more than once",
            },
            "workers": {
                "metavar": "N",
                "type": positive,
                "help": "processes that read samples; default: one for each core",
            },
            "part": {
                "metavar": "I/N",
                "help": "with --duplicates: only read this part of the samples, from 1/N to N/N, for a job array; what "
                "was read is kept in MEGAVLM_CACHE",
            },
        },
        local_workers=False,
    ),
}
