"""Adapters on the toys: by peft on transformers' model, and one step of training with them in some layout."""

from dataclasses import dataclass
from pathlib import Path

import torch
from packed import packed_rows
from parity import AUX, ROWS, balancing_loss, part_of, save_weights, targets_of, watch_routers
from toy import reference_inputs, reference_model

LR = 2.0
DECODER = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]  # not all that are fused: k and up have none
TOWER = ["attn.qkv", "attn.proj", "linear_fc1", "linear_fc2"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
# name: (toy model, peft's options)
ADAPTERS = {
    "lora": ("dense", {"r": 4, "lora_alpha": 6, "target_modules": DECODER + TOWER}),
    "rslora, patterns": (
        "dense",
        {
            "r": 4,
            "lora_alpha": 6,
            "use_rslora": True,
            "target_modules": [*DECODER, "k_proj"],
            "rank_pattern": {"o_proj": 2, r"layers\.[12]\.self_attn\.q_proj": 7},
            "alpha_pattern": {"v_proj": 3},
        },
    ),
    "dora": ("dense", {"r": 4, "lora_alpha": 6, "use_dora": True, "target_modules": DECODER + TOWER}),
    "fourierft": ("dense", {"n_frequency": 50, "scaling": 300.0, "target_modules": DECODER + TOWER}),
    "lora on experts": (
        "moe",
        {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj", "attn.qkv"], "target_parameters": EXPERTS},
    ),
    "dora beside experts": ("moe", {"r": 3, "use_dora": True, "target_modules": ["q_proj", "o_proj"]}),
    "fourierft beside experts": ("moe", {"n_frequency": 50, "target_modules": ["v_proj", "o_proj"]}),
}


def peft_model(folder: Path, options: dict):
    """transformers' model with a peft adapter on which everything has a value that matters."""
    from peft import FourierFTConfig, LoraConfig, get_peft_model

    make = FourierFTConfig if "n_frequency" in options else LoraConfig
    model = get_peft_model(reference_model(folder), make(**options))
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            noise = torch.randn(parameter.shape, generator=draw)
            if "magnitude" in name:
                parameter *= 1 + 0.1 * noise
            elif "spectrum" in name:
                parameter.copy_(noise)
            elif parameter.ndim == 1:
                parameter *= 1 + 0.1 * noise
            else:
                parameter.copy_(noise / parameter.shape[1] ** 0.5)
    return model


@dataclass
class AdaptedStep:
    """The loss of a step, {part: grad_norm}, and by peft's name the adapter before and after it."""

    loss: float
    norms: dict[str, float]
    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]


def step_of_peft(model, folder: Path, records: list[dict], root: Path) -> AdaptedStep:
    """One SGD step on the mean over all targets, sample by sample."""
    from peft import get_peft_model_state_dict
    from transformers import AutoProcessor

    processor, is_moe = AutoProcessor.from_pretrained(folder), "moe" in folder.name
    tensors = lambda: {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    before = tensors()
    inputs = [(reference_inputs(processor, record, root), targets_of(processor, record, root)) for record in records]
    count, total = sum(len(where) for _, where in inputs), 0.0
    model.base_model.model.eval()
    for row in ROWS:
        routers = watch_routers(model.base_model.model) if is_moe else {}
        learned = torch.zeros(())
        for arguments, where in (inputs[i] for i in row):
            logprobs = model(**arguments).logits[0].log_softmax(-1)
            learned = learned - logprobs[where - 1, arguments["input_ids"][0, where]].sum() / count
        total += learned.item()
        for logits in routers.values():
            config = model.base_model.model.config.text_config
            learned = learned + AUX * balancing_loss(torch.cat(logits), config) / len(ROWS)
        learned.backward()
    squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                squares[part_of(name)] += parameter.grad.double().square().sum().item()
                parameter -= LR * parameter.grad
    return AdaptedStep(total, {part: square**0.5 for part, square in squares.items()}, before, tensors())


def step_with_adapter(folder, checkpoint, root, records, settings, out, rows_of_step=ROWS):
    """Runs on every rank: one step with adapters, which are saved to ``out``.

    Returns the loss, norms, and those of the adapters' tensors that tensor-parallel ranks have whole.
    """
    from megavlm.config.settings import Settings
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import start
    from megavlm.training.objective import CrossEntropy
    from megavlm.training.step import Step

    settings = Settings(**settings)
    session = start(settings, training=True)
    vlm, groups = session.vlm, session.groups
    rows = packed_rows(folder, root, records, settings, rows_of_step) if groups.is_leader else []
    each = len(rows_of_step) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    feed = Feed(vlm, iter(mine) if groups.is_leader else None)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)
    result = Step(vlm, Optimizers(vlm, settings.train), feed, each, objective, settings.vision.window)()
    save_adapter(session, out)
    whole = {
        f"{number}.{name}": getattr(adapter, name).detach()
        for number, adapter in enumerate(session.adapters.adapters)
        for name, (_, _, axis) in adapter.names.items()
        if axis is None
    }
    return result.loss, result.norms, whole


def save_adapter(session, out: Path) -> None:
    """Saves to ``out``, on all ranks, what a checkpoint of the session's model holds of its weights."""
    from megavlm.adapters.attach import learned
    from megavlm.convert import SHARDED_METADATA
    from megavlm.convert.peft_config import ADAPTER_CONFIG, write_config

    save_weights(learned(session.vlm.sharded_state_dict(dict(SHARDED_METADATA))), out, session.groups)
    if torch.distributed.get_rank() == 0:
        write_config(out / ADAPTER_CONFIG, session.adapters.settings, session.shapes)


def load_and_save(settings: dict, out: Path) -> None:
    """Runs on every rank: ``model.adapter`` into a model and out again."""
    from megavlm.config.settings import Settings
    from megavlm.runtime.session import start

    save_adapter(start(Settings(**settings), training=True), out)
