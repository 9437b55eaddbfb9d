"""The verbs that plan a run, and that measure steps beside the plan; a part of the table of verbs."""

from pathlib import Path

from megavlm.cli.verb import FOR, READS, RUN, Verb, amount, at_least_one, natural, positive

PLAN_VERBS = {
    "plan": Verb(
        "megavlm.commands.plan:main",
        "show the memory and the time of a layout on GPUs that need not be there",
        "megavlm plan sft.yaml --gpus 64\nmegavlm plan sft.yaml parallel.tensor=4 --gpus 32 --gpu h200 --pictures 2",
        sections=(*RUN, "align", "rollout", "reward", "environment"),
        requires=("train.steps|train.epochs", "train.lr"),
        reads=(),
        flags={
            "gpus": {"metavar": "N", "type": positive, "required": True, "help": "number of GPUs"},
            "gpu": {
                "metavar": "NAME",
                "default": "h100",
                "help": "h100 (the default), h200, b200, h800, a100, or a YAML file of measurements",
            },
            "for": FOR,
            "samples": {"metavar": "N", "type": positive, "default": 1, "help": "samples in a row; default 1"},
            "pictures": {"metavar": "N", "type": natural, "help": "pictures in a row; default: as many as fit"},
            "data": {
                "metavar": "FILE",
                "type": Path,
                "help": "summary.json of megavlm data inspect: plan with rows as in these data, not with full ones",
            },
            "imbalance": {
                "metavar": "X",
                "type": at_least_one,
                "default": 1.3,
                "help": "tokens that the busiest expert-parallel rank gets over their mean; default 1.3",
            },
            "price": {
                "metavar": "X",
                "type": amount,
                "help": "of one GPU for an hour; the cost of the run is then shown",
            },
            "search": {
                "action": "store_true",
                "help": "look for the fastest layout: parallel, train.recompute, vision.recompute",
            },
            "write": {
                "metavar": "FILE.yaml",
                "type": Path,
                "help": "with --search: write the fastest layout as a configuration that inherits from CONFIG.yaml",
            },
            "json": {
                "action": "store_true",
                "dest": "as_json",
                "help": "print one line of JSON, in bytes, FLOPs and seconds",
            },
            "page": {"metavar": "OUT.html", "type": Path, "help": "also write an HTML page; the file must not exist"},
        },
        local_workers=False,
    ),
    "bench": Verb(
        "megavlm.commands.bench:main",
        "measure steps of a configuration on this machine, as one line of JSON",
        "megavlm bench sft.yaml --nproc 8\n"
        "megavlm bench sft.yaml --synthetic --pictures 2 train.global_batch_size=8 --steps 5",
        sections=(*RUN, "align", "rollout", "reward", "environment"),
        requires=("train.steps|train.epochs", "train.lr"),
        reads=(*READS, "data.train"),
        flags={
            "steps": {"metavar": "N", "type": positive, "default": 10, "help": "number of measured steps; default 10"},
            "warmup": {"metavar": "N", "type": natural, "default": 3, "help": "steps before them; default 3"},
            "for": FOR,
            "synthetic": {
                "action": "store_true",
                "help": "take random weights and synthetic rows, so that model.load and data.train need not exist",
            },
            "samples": {
                "metavar": "N",
                "type": positive,
                "default": 1,
                "help": "samples in a synthetic row; default 1",
            },
            "pictures": {
                "metavar": "N",
                "type": natural,
                "help": "pictures in a synthetic row; default: as many as fit",
            },
            "operators": {
                "metavar": "FILE",
                "type": Path,
                "help": "a new YAML file for the times of single operators, which `megavlm plan --gpu FILE` reads",
            },
        },
    ),
}
