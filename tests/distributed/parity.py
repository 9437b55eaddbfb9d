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
    *("seconds_rollout", "seconds_reward", "seconds_update", "seconds_sync", "rollout_tokens_per_second"),
    *("seconds_values", "seconds_critic", "seconds_environment"),
}
ROWS = ((0, 1, 2), (3, 5), (4, 6), (7,))  # toy records in each row of a step; the second row has no picture
# So large a rate that updates stand above the rounding of the weights they are added to, and small enough to train.
# The second step shows that the update has reached every copy of a weight; plain SGD keeps no other state.
STEPS, LR = 2, 0.2
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
    z: float = 0.0,
    make_optimizer=None,
) -> Trained:
    """SGD without momentum on the mean over all targets of the batch, sample by sample: nothing is packed here.

    ``make_optimizer``: makes another optimizer for the model, which then has a rate of its own.

    ``aux`` is the coefficient of the experts' balancing loss, which looks at the samples of a row together: the mean
    over the ``rows`` is added to what is learned, not to the loss that is reported, unless the decoder is frozen.
    ``z`` is the coefficient of the routers' z-loss, a mean over the tokens of a row, likewise.
    ``kl`` is the weight of the divergence from the model as it was before the first step.
    """
    from transformers import AutoProcessor

    model, processor = reference_model(folder), AutoProcessor.from_pretrained(folder)
    start = reference_model(folder) if kl else None
    inputs = [(reference_inputs(processor, record, root), targets_of(processor, record, root)) for record in records]
    count = sum(len(where) for _, where in inputs)
    done = []
    optimizer = make_optimizer(model) if make_optimizer else None
    for number in range(1, steps + 1):
        frozen = [part for part in freeze if number <= (unfreeze_after or {}).get(part, steps)]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(part_of(name) not in frozen)
        model.zero_grad()
        total = 0.0
        for row in rows or [(i,) for i in range(len(records))]:
            learned, routers = torch.zeros(()), watch_routers(model) if (aux or z) and "language" not in frozen else {}
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
                learned = learned + z * torch.cat(logits).float().logsumexp(-1).square().mean() / len(rows)
            if learned.requires_grad:
                learned.backward()
        squares = dict.fromkeys(("vision", "projector", "language"), 0.0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    squares[part_of(name)] += parameter.grad.double().square().sum().item()
                    if optimizer is None:
                        parameter -= lr * (lr_scale or {}).get(part_of(name), 1.0) * parameter.grad
        if optimizer is not None:
            optimizer.step()
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


def train_layout(folder: Path, checkpoint: Path, root: Path, records: list[dict], settings: dict, rows_of_step=ROWS):
    """Runs on every rank of a world: trains the toy in one layout.

    Returns [(loss, norms, counts)] of the steps, and the ``pieces_of`` the weights after them.
    """
    from megavlm import platform
    from megavlm.checkpoint.load_weights import load_weights
    from megavlm.config.settings import Settings
    from megavlm.model.shapes import Shapes
    from megavlm.model.vlm import VLM
    from megavlm.optim.optimizers import Optimizers
    from megavlm.runtime.feed import Feed
    from megavlm.runtime.session import MAIN, Model, Session
    from megavlm.training.objective import CrossEntropy, CrossEntropyWithKL
    from megavlm.training.start_weights import StartWeights
    from megavlm.training.step import Step

    settings = Settings(**settings)
    groups = platform.init(settings.parallel, share_frames=settings.vision.balance == "world")
    vlm = VLM(Shapes.from_hf(folder), settings, groups).train()
    for chunk in vlm.language:
        chunk.embedded_tokens = 48  # the toy's rows too are embedded in parts
    load_weights(checkpoint, vlm)
    rows = packed_rows(folder, root, records, settings, rows_of_step) if groups.is_leader else []
    each = len(rows_of_step) // groups.dp_size
    mine = rows[groups.dp_rank * each : (groups.dp_rank + 1) * each]
    steps = settings.train.steps
    feed = Feed(vlm, iter(mine * steps) if groups.is_leader else None)
    objective = CrossEntropy(["data"], settings.train.logprob_chunk_tokens, settings.train.loss)
    if settings.train.kl_to_start:
        start = StartWeights(Session(settings, vlm.shapes, groups, {MAIN: Model(vlm)}))
        objective = CrossEntropyWithKL(objective, settings.train.kl_to_start, start)
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
    for number in range(1, steps + 1):
        optimizers.unfreeze(number)
        results.append(step())
    return [(result.loss, result.norms, result.counts) for result in results], pieces_of(vlm)


def mostly_slow(cases, is_quick):
    """Parameters of a test: those that ``is_quick`` run in ``make test``, the others show the same once more."""
    import pytest

    return [
        pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=() if is_quick(case) else pytest.mark.slow)
        for case in cases
    ]


def save_weights(state: dict, out: Path, groups) -> None:
    """Saves a sharded state dict to the new folder ``out``, on all ranks."""
    from megavlm.checkpoint.writer import CheckpointWriter

    writer = CheckpointWriter(groups.language.dp_cp, groups.world_host, background=False)
    writer.start(state, out)
    writer.finish(lambda folder: None, wait=True)


def settings_of(folder: Path, parallel: dict, *, freeze: tuple[str, ...] = (), moe: bool = False, **train) -> dict:
    """Settings of the parity runs: float32, plain SGD, rows of 256 tokens."""
    vision, seq_length = train.pop("vision", {}), train.pop("seq_length", 256)
    steps = max([STEPS, *(1 + after for after in train.get("unfreeze_after", {}).values())])
    return {
        "model": {"hf": str(folder), "freeze": list(freeze)},
        "data": {"seq_length": seq_length},
        "parallel": parallel,
        "vision": vision,
        "train": {
            "precision": "fp32", "optimizer": "sgd", "lr": LR, "schedule": "constant", "steps": steps,
            "global_batch_size": len(ROWS), "clip_grad": 0.0, "weight_decay": 0.0, "logprob_chunk_tokens": 64,
            **({"moe_aux_loss_coeff": AUX} if moe else {}), **train,
        },
    }  # fmt: skip


def pieces_of(vlm) -> list[tuple]:
    """What this rank would write of the weights into a checkpoint: (key, global shape, global offset, values).

    A checkpoint on a disk takes longer than the steps of a toy; tests/distributed/test_checkpoint.py has those.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica

    from megavlm.convert import SHARDED_METADATA

    state = vlm.sharded_state_dict(dict(SHARDED_METADATA))
    apply_factories(state)
    shards = [x for x in nested_values(state) if isinstance(x, ShardedTensor) and is_main_replica(x.replica_id)]
    return [
        (x.key, x.global_shape, x.global_offset, x.data.detach().view((1,) * x.prepend_axis_num + x.local_shape))
        for x in shards
    ]


def put_together(ranks: list[list[tuple]]) -> dict[str, torch.Tensor]:
    """The weights by Megatron's keys, from the ``pieces_of`` all ranks, which must be everything once."""
    weights: dict[str, torch.Tensor] = {}
    for key, shape, offset, values in (piece for pieces in ranks for piece in pieces):
        whole = weights.setdefault(key, torch.full(shape, torch.nan))
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape, strict=True))
        assert whole[place].isnan().all(), f"{key}: two ranks have the same piece"
        whole[place] = values
    assert not (holes := [key for key, whole in weights.items() if whole.isnan().any()]), f"{holes}: a piece is missing"
    return weights


def named_as_in_hf(weights: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Weights by Hugging Face name, through the project's own conversion table."""
    from megavlm.convert.names import table
    from megavlm.model.shapes import Shapes

    named = {}
    for entry in table(Shapes.from_hf(folder)):
        named |= dict(zip(entry.hf, entry.layout.to_hf(weights[entry.key], list(entry.hf.values())), strict=True))
    return named


def weights_of(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """Weights of a Megatron checkpoint by Hugging Face name."""
    from megavlm.convert.mcore_checkpoint import McoreCheckpoint

    stored = McoreCheckpoint(checkpoint)
    return named_as_in_hf({key: stored.read(key) for key in stored.tensors}, folder)


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

    def reference(self, kind: str, freeze: tuple[str, ...] = (), **options) -> Trained:
        """``train_reference`` on the ``ROWS``, with these options of it."""
        key = kind, freeze, json.dumps(options, sort_keys=True)
        if key not in self._references:
            aux = AUX if kind.startswith("moe") else 0.0
            self._references[key] = train_reference(
                self.folder(kind), self.records, self.root, freeze, rows=ROWS, aux=aux, **options
            )
        return self._references[key]


def check_update(after: dict, expected: dict, start: dict) -> None:
    """Weights after an update are the expected ones, to 1e-4 of the update of each."""
    for weight, value in after.items():
        update = expected[weight] - start[weight]
        assert (value - expected[weight]).norm() <= 1e-4 * update.norm() + 1e-9, weight
