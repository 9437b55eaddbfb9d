"""One training step in some layout, and the same in plain PyTorch on transformers' model."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from packed import packed_rows
from safetensors.torch import load_file, save_file
from toy import reference_inputs, reference_model, toy_folder, toy_records

# Fields of metrics.jsonl that tell of the machine, not of the training.
VARYING = {
    *("seconds", "seconds_checkpoint", "seconds_data", "seconds_tower", "seconds_tower_max", "slowest_rank"),
    *("tower_imbalance", "tokens_per_second", "model_tflops", "mfu", "memory_gib"),
}
ROWS = ((0, 1, 2), (3, 5), (4, 6), (7,))  # toy records in each row of a step; the second row has no picture
# So large a rate that updates stand above the rounding of the weights they are added to, and small enough to train.
STEPS, LR = 3, 0.2
AUX = 0.05  # of the experts' balancing loss: a tenth of the router's gradient in the toy


@dataclass
class Trained:
    """Steps as (loss, {part: grad_norm}), and the weights after them by Hugging Face name."""

    steps: list[tuple[float, dict[str, float]]]
    weights: dict[str, torch.Tensor]


def part_of(name: str) -> str:
    """Part of the model that an HF weight belongs to."""
    if "visual" not in name:
        return "language"
    return "projector" if "merger" in name else "vision"


def train_reference(
    folder: Path,
    records: list[dict],
    root: Path,
    freeze: tuple[str, ...] = (),
    *,
    rows: tuple[tuple[int, ...], ...] | None = None,
    aux: float = 0.0,
    lr: float = LR,
    steps: int = STEPS,
    lr_scale: dict[str, float] | None = None,
    unfreeze_after: dict[str, int] | None = None,
    kl: float = 0.0,
) -> Trained:
    """SGD without momentum on the mean over all targets of the batch, sample by sample: nothing is packed here.

    ``aux`` is the coefficient of the experts' balancing loss, which looks at the samples of a row together: the mean
    over the ``rows`` is added to what is learned, not to the loss that is reported, unless the decoder is frozen.
    ``kl`` is the weight of the divergence from the model as it was before the first step.
    """
    from transformers import AutoProcessor

    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    start = reference_model(folder) if kl else None
    inputs = [(reference_inputs(processor, record, root), targets_of(processor, record, root)) for record in records]
    count = sum(len(where) for _, where in inputs)
    done = []
    for number in range(1, steps + 1):
        frozen = [part for part in freeze if number <= (unfreeze_after or {}).get(part, steps)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) not in frozen)
        model.zero_grad()
        total = 0.0
        for row in rows or [(i,) for i in range(len(records))]:
            learned, routers = torch.zeros(()), watch_routers(model) if aux and "language" not in frozen else {}
            for arguments, where in (inputs[i] for i in row):
                logprobs = model(**arguments).logits[0].log_softmax(-1)
                loss = -logprobs[where - 1, arguments["input_ids"][0, where]].sum() / count
                if kl:
                    with torch.no_grad():
                        before = start(**arguments).logits[0].log_softmax(-1)
                    gaps = (logprobs.exp() * (logprobs - before)).sum(-1)
                    loss = loss + kl * gaps[where - 1].sum() / count
                learned = learned + loss
                total += loss.item()
            for logits in routers.values():
                learned = learned + aux * balancing_loss(torch.cat(logits), model.config.text_config) / len(rows)
            if learned.requires_grad:
                learned.backward()
        squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    squares[part_of(name)] += parameter.grad.double().square().sum().item()
                    parameter -= lr * (lr_scale or {}).get(part_of(name), 1.0) * parameter.grad
        done.append((total, {part: square**0.5 for part, square in squares.items()}))
    return Trained(done, {name: value.clone() for name, value in model.state_dict().items()})


def watch_routers(model) -> dict[int, list[torch.Tensor]]:
    """Router logits [t, experts] of each layer, filled by every forward from now on until this is called again."""
    seen: dict[int, list[torch.Tensor]] = {}
    for index, layer in enumerate(model.model.language_model.layers):
        gate = layer.mlp.gate
        gate._forward_hooks.clear()
        gate.register_forward_hook(lambda _, args, out, index=index: seen.setdefault(index, []).append(out[0]))
    return seen


def balancing_loss(logits: torch.Tensor, config) -> torch.Tensor:
    """E Σ f_i P_i of one layer and row (Switch Transformer, arXiv:2101.03961, counting the k choices of each token).

    f_i: share of the T · k choices that fell on expert i; P_i: mean router probability of expert i.
    """
    experts, k = config.num_experts, config.num_experts_per_tok
    probabilities = logits.float().softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter(1, probabilities.topk(k).indices, 1.0)
    return experts * (chosen.sum(0) / (len(logits) * k) * probabilities.mean(0)).sum()


def targets_of(processor, record: dict, root: Path) -> torch.Tensor:
    """int64 [n]: places of the tokens that are learned: every assistant turn with its end token.

    Found from the rendered tokens alone: after "<|im_start|>assistant\\n" up to and including "<|im_end|>".
    """
    tokens = reference_inputs(processor, record, root)["input_ids"][0].tolist()
    start = processor.tokenizer.encode("<|im_start|>assistant\n")
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    places, at = [], 0
    while at < len(tokens):
        if tokens[at : at + len(start)] == start:
            at += len(start)
            while True:
                places.append(at)
                at += 1
                if tokens[at - 1] == end:
                    break
        else:
            at += 1
    return torch.tensor(places)


def train_layout(
    folder: Path, checkpoint: Path, root: Path, records: list[dict], settings: dict, out: Path, rows_of_step=ROWS
):
    """Runs on every rank of a world: trains the toy in one layout; saves the weights to ``out``.

    Returns [(loss, norms, counts)] of the steps.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.convert import SHARDED_METADATA
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import MAIN, Model, Session
    from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL
    from megavlm.training.start_weights import StartWeights
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel, data_peers=settings.vision.balance == "world")
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    for chunk in vlm.language:
        chunk.embedded_tokens = 48  # the toy's rows too are embedded in parts
    load_weights(checkpoint, vlm)
    rows = packed_rows(folder, root, records, settings, rows_of_step) if groups.is_leader else []
    each = len(rows_of_step) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    feed = Feed(vlm, iter(mine * STEPS) if groups.is_leader else None)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens)
    if settings.train.kl_to_start:
        start = StartWeights(Session(settings, vlm.shapes, groups, {MAIN: Model(vlm)}))
        objective = CrossEntropyWithKL(["data"], objective.chunk_tokens, settings.train.kl_to_start, start)
    optimizers = Optimizers(vlm, settings.train)
    step = Step(
        vlm,
        optimizers,
        feed,
        each,
        objective,
        settings.vision.window,
    )
    results = []
    for number in range(1, STEPS + 1):
        optimizers.unfreeze(number)
        results.append(step())
    save_weights(vlm.sharded_state_dict(dict(SHARDED_METADATA)), out, groups)
    return [(result.loss, result.norms, result.counts) for result in results]


def save_weights(state: dict, out: Path, groups) -> None:
    """Saves a sharded state dict to the new folder ``out``, on all ranks."""
    from megavlm.checkpoint.writer import CheckpointWriter

    writer = CheckpointWriter(groups.language.dp_cp, groups.world_host, background=False)
    writer.start(state, out)
    writer.finish(lambda folder: None, wait=True)


def settings_of(folder: Path, parallel: dict, *, freeze: tuple[str, ...] = (), moe: bool = False, **train) -> dict:
    """Settings of the parity runs: float32, plain SGD, rows of 256 tokens."""
    vision, seq_length = train.pop("vision", {}), train.pop("seq_length", 256)
    return {
        "model": {"hf": str(folder), "freeze": list(freeze)},
        "data": {"seq_length": seq_length},
        "parallel": parallel,
        "vision": vision,
        "train": {
            "precision": "fp32", "optimizer": "sgd", "lr": LR, "schedule": "constant", "steps": STEPS,
            "global_batch_size": len(ROWS), "clip_grad": 0.0, "weight_decay": 0.0, "logprob_chunk_tokens": 64,
            **({"moe_aux_loss_coeff": AUX} if moe else {}), **train,
        },
    }  # fmt: skip


def weights_of(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a Megatron checkpoint by Hugging Face name, through the project's own conversion table."""
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint
    from megavlm.convert.names import table
    from megavlm.model.shapes import Shapes

    stored, weights = McoreCheckpoint(checkpoint), {}
    for entry in table(Shapes.from_hf(folder)):
        tensor = stored.read(entry.key)
        weights |= dict(zip(entry.hf, entry.layout.to_hf(tensor, list(entry.hf.values())), strict=True))
    return weights


def with_other_output(folder: Path) -> Path:
    """A copy of a tied folder with an ``lm_head.weight`` of its own; config.json still ties it to the embedding."""
    out = folder.with_name(f"{folder.name}-other-output")
    if not out.exists():
        shutil.copytree(folder, out)
        weights = load_file(out / "model.safetensors")
        embedding = weights["model.language_model.embed_tokens.weight"]
        noise = torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5))
        weights["lm_head.weight"] = embedding + 0.1 * noise
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def stretched(folder: Path, out: Path) -> Path:
    """A copy of a model folder whose config.json asks for YaRN; the toy's samples are longer than its first context."""
    if not out.exists():
        shutil.copytree(folder, out)
        config = json.loads((out / "config.json").read_text())
        config["text_config"]["rope_parameters"] |= {
            "rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
        (out / "config.json").write_text(json.dumps(config))
    return out


class Toys:
    """Toy models, their Megatron checkpoints, and reference runs, each made once."""

    def __init__(self, root: Path):
        self.root, self.records = root, toy_records(root)
        self._references: dict = {}

    def folder(self, kind: str) -> Path:
        """``kind``: dense, dense-untied, dense-other-output, moe, moe-tied; yarn: dense, with stretched frequencies."""
        if kind == "dense-other-output":
            return with_other_output(self.folder("dense"))
        if kind == "yarn":
            return stretched(self.folder("dense"), self.root / "toy-yarn")
        return toy_folder(self.root, moe=kind.startswith("moe"), tied=kind in ("dense", "moe-tied"))

    def checkpoint(self, kind: str) -> Path:
        from megavlm.convert import hf_to_mcore

        path = self.root / f"{kind}-mcore"
        if not path.exists():
            hf_to_mcore(self.folder(kind), path, progress=False)
        return path

    def reference(self, kind: str, freeze: tuple[str, ...] = ()) -> Trained:
        if (kind, freeze) not in self._references:
            aux = AUX if kind.startswith("moe") else 0.0
            self._references[kind, freeze] = train_reference(
                self.folder(kind), self.records, self.root, freeze, rows=ROWS, aux=aux
            )
        return self._references[kind, freeze]
