"""Which linear layers have an adapter, with which names and shapes: peft's rules applied to the table of names.

In a Megatron checkpoint the tensors of an adapter are called "adapter.<HF name of the linear layer>.<kind>". The
experts of a layer are one tensor in Hugging Face's model, and their adapters are stacked in the checkpoint, while peft
writes them side by side (see ``to_peft``).
"""

import re
from dataclasses import dataclass

from torch import Tensor

from megavlm.base.errors import UserError
from megavlm.config.adapter_section import AdapterSettings
from megavlm.convert.names import Entry, table
from megavlm.convert.tensor_order import Experts, Shape
from megavlm.model.shapes import Shapes

CHECKPOINT_PREFIX = "adapter."
PEFT_PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
SPECTRUM = "fourierft_spectrum"


@dataclass(frozen=True)
class Linear:
    """A linear layer of Hugging Face's model.

    Attributes:
        name: name of the module, or of the experts' parameter.
        entry: the Megatron tensor that contains its weight.
        out, inner: numbers of output and input features.
        experts: number of experts that are stacked in it; None for a plain linear layer.
    """

    name: str
    entry: Entry
    out: int
    inner: int
    experts: int | None = None

    @property
    def rows(self) -> Shape:
        """Output features: (out,), or (2, out / 2) for an expert's gate and up, because ranks split each half."""
        return (2, self.out // 2) if self.experts and "gate_up" in self.name else (self.out,)


def linears(shapes: Shapes) -> dict[str, Linear]:
    """The linear layers that can have an adapter, by name: attention, MLPs, experts and mergers of all parts."""
    found = {}
    for entry in table(shapes):
        module, _, kind = entry.key.rpartition(".")
        if kind != "weight" or not module.rpartition(".")[2].startswith("linear_"):
            continue
        for hf, shape in entry.hf.items():
            experts = shape[0] if isinstance(entry.layout, Experts) else None
            name, (out, inner) = hf.removesuffix(".weight"), shape[-2:]
            found[name] = Linear(name, entry, out, inner, experts)
    return found


def part_of(name: str) -> str:
    """The part of the model that an HF weight belongs to: ``vision``, ``projector`` or ``language``."""
    if not name.startswith("model.visual."):
        return "language"
    return "projector" if "merger" in name else "vision"


def targets_of(adapter: AdapterSettings, shapes: Shapes) -> list[str]:
    """``adapter.targets``, or the names that null stands for."""
    if adapter.targets is not None:
        return list(adapter.targets)
    decoder = [linear for linear in linears(shapes).values() if part_of(linear.name) == "language"]
    plain = dict.fromkeys(linear.name.rpartition(".")[2] for linear in decoder if not linear.experts)
    if adapter.type != "lora":
        return list(plain)
    return [*plain, *dict.fromkeys("mlp.experts." + x.name.rpartition(".")[2] for x in decoder if x.experts)]


def targeted(adapter: AdapterSettings, shapes: Shapes) -> dict[str, Linear]:
    """The linear layers that have an adapter, in the order of the layers.

    Raises:
        UserError: a target or pattern matches nothing, or experts have a type or dropout that they do not support.
    """
    every, targets = linears(shapes), targets_of(adapter, shapes)
    matches = lambda name, target: name == target or name.endswith("." + target)
    for target in targets:
        if not any(matches(name, target) for name in every):
            ends = ", ".join(dict.fromkeys(".".join(name.split(".")[-2:]) for name in every))
            raise UserError(
                f"adapter.targets has {target!r}, which ends the name of no linear layer of this model",
                f"their names end in {ends}",
            )
    found = {name: x for name, x in every.items() if any(matches(name, target) for target in targets)}
    for setting in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(adapter, setting):
            if not any(_ends_in(pattern, name) for name in found):
                raise UserError(
                    f"adapter.{setting} has {pattern!r}, which matches no linear layer with an adapter",
                    "correct or remove it",
                )
    small = next((x for x in found.values() if adapter.frequencies > x.out * x.inner), None)
    if adapter.type == "fourierft" and small is not None:
        raise UserError(
            f"adapter.frequencies is {adapter.frequencies}, but {small.name} has {small.out} × {small.inner} weights",
            "lower it, or remove that layer from adapter.targets",
        )
    experts = next((name for name, linear in found.items() if linear.experts), None)
    for setting, value in {"type": adapter.type, "dropout": adapter.dropout}.items():
        if experts and value not in ("lora", 0.0):
            raise UserError(
                f"adapter.{setting} is {value}, but {experts} is a tensor of several experts, for which peft supports "
                "only plain LoRA",
                "remove the experts from adapter.targets, or use adapter.type lora without dropout",
            )
    return found


def saved_whole(adapter: AdapterSettings, shapes: Shapes) -> dict[str, Entry]:
    """The weights of ``adapter.modules_to_save``, by their keys in a checkpoint.

    Raises:
        UserError: a module does not exist, is not in a part that has adapters, has an adapter itself, or is only a part
            of a Megatron parameter.
    """
    found: dict[str, Entry] = {}
    linears = targeted(adapter, shapes) if adapter.modules_to_save else {}
    parts = {part_of(name) for name in linears}
    for module in adapter.modules_to_save:
        here, hit = f"adapter.modules_to_save has {module!r}", dict[str, Entry]()
        for entry in table(shapes):
            # "embed_tokens" is the end of a module's name, and a module may hold others
            own = [name for name in entry.hf if f".{module}." in f".{name.rpartition('.')[0]}."]
            if own and len(own) < len(entry.hf):
                others = " and ".join(name for name in entry.hf if name not in own)
                raise UserError(f"{here}, which is one parameter with {others}", "name all of them or none")
            hit |= {entry.key: entry} if own else {}
        if not hit:
            tied = " (the output layer is the word embedding: name embed_tokens)" if module == "lm_head" else ""
            raise UserError(f"{here}, which ends the name of no module of this model{tied}", "correct or remove it")
        for name in (name for entry in hit.values() for name in entry.hf):
            if part_of(name) not in parts:
                raise UserError(
                    f"{here}, but {part_of(name)} has no adapters",
                    "remove it: a part without adapters is trained in full unless model.freeze names it",
                )
            if name.removesuffix(".weight") in linears:
                raise UserError(f"{here}, but {name} has an adapter", "remove it from one of the two lists")
        found |= hit
    return found


def rank_of(adapter: AdapterSettings, name: str) -> int:
    """The rank of a linear layer's adapter matrices."""
    return _from_pattern(adapter.rank_pattern, name, adapter.rank)


def scale_of(adapter: AdapterSettings, name: str) -> float:
    """The factor by which the product of a layer's two adapter matrices is multiplied."""
    rank, alpha = rank_of(adapter, name), _from_pattern(adapter.alpha_pattern, name, adapter.alpha)
    return alpha / rank**0.5 if adapter.rslora else alpha / rank


def tensor_shapes(adapter: AdapterSettings, linear: Linear) -> dict[str, Shape]:
    """The kinds and shapes of an adapter's tensors in a Megatron checkpoint. Experts are the first axis."""
    if adapter.type == "fourierft":
        return {SPECTRUM: (adapter.frequencies,)}
    rank = rank_of(adapter, linear.name)
    stack = (linear.experts,) if linear.experts else ()
    shapes = {LORA_A: (*stack, rank, linear.inner), LORA_B: (*stack, *linear.rows, rank)}
    return shapes | ({MAGNITUDE: linear.rows} if adapter.type == "dora" else {})


def peft_name(adapter: AdapterSettings, shapes: Shapes, linear: Linear, kind: str) -> str:
    """The name of a tensor in adapter_model.safetensors.

    For experts, peft wraps the module once for each of its parameters, and the last of them is the outermost.
    """
    if not linear.experts:
        return f"{PEFT_PREFIX}{linear.name}.{kind}"
    module = linear.name.rpartition(".")[0]
    around = [name for name in targeted(adapter, shapes) if name.startswith(module + ".")]
    return f"{PEFT_PREFIX}{module}.{'base_layer.' * (len(around) - 1 - around.index(linear.name))}{kind}"


def to_peft(linear: Linear, kind: str, tensor: Tensor) -> Tensor:
    """A tensor in peft's shape; for experts A [experts × rank, in], B [out, rank × experts] (``peft.ParamWrapper``)."""
    if not linear.experts:
        return tensor
    if kind == LORA_A:
        return tensor.flatten(0, 1)
    return tensor.reshape(linear.experts, linear.out, -1).permute(1, 2, 0).flatten(1).contiguous()


def from_peft(linear: Linear, kind: str, tensor: Tensor, shape: Shape, expert: int | None = None) -> Tensor:
    """The inverse of ``to_peft``, to ``shape`` of ``tensor_shapes``; for one ``expert`` without the expert axis."""
    if linear.experts and kind == LORA_B:
        tensor = tensor.unflatten(1, (-1, linear.experts)).permute(2, 0, 1)
    elif linear.experts:
        tensor = tensor.unflatten(0, (linear.experts, -1))
    if expert is not None:
        tensor, shape = tensor[expert], shape[1:]
    return tensor.reshape(shape).contiguous()


def _ends_in(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def _from_pattern[Value](patterns: dict[str, Value], name: str, otherwise: Value) -> Value:
    return next((value for pattern, value in patterns.items() if _ends_in(pattern, name)), otherwise)
