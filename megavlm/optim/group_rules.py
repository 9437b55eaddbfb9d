"""Which weights have a learning rate and a weight decay of their own (``train.groups``, ``train.layer_decay``).

Settings name weights as Hugging Face does. The table of names says which of these tensors make up a Megatron parameter;
they can only be in one group together. This module does not import Megatron, so that ``validate`` is quick.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

from megavlm.base.errors import UserError
from megavlm.base.number_format import counted, short
from megavlm.config.settings import Settings
from megavlm.config.train_section import TrainSettings
from megavlm.convert.names import MCORE_EMBEDDING, MCORE_OUTPUT, table
from megavlm.convert.peft_names import CHECKPOINT_PREFIX, LORA_B, part_of, saved_whole, targeted, tensor_shapes
from megavlm.model.score_head import KEY as SCORE_HEAD
from megavlm.model.shapes import Shapes

_LAYER = re.compile(r"^(language\.decoder|vision)\.layers\.(\d+)\.")
_EMBEDDINGS = {MCORE_EMBEDDING: "language", "vision.patch_embed": "vision", "vision.position_embedding": "vision"}


@dataclass(frozen=True)
class Rule:
    """How a weight is trained.

    Attributes:
        lr_scale: factor of the learning rate of its part.
        weight_decay: coefficient of the weight decay; None: ``train.weight_decay``.
        freeze: whether it is not trained.
        group: index in ``train.groups``; None if it belongs to no group.
    """

    lr_scale: float = 1.0
    weight_decay: float | None = None
    freeze: bool = False
    group: int | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter of the whole model: its key in a checkpoint, that of the layer's weight (the same, but for adapters),
    the Hugging Face tensors that it consists of, its part, its size, and whether weight decay applies to it."""

    key: str
    layer_key: str
    names: tuple[str, ...]
    part: str
    numel: int
    decays: bool


def weights_of(shapes: Shapes, settings: Settings | None = None) -> list[Weight]:
    """All weights of a model; with ``settings`` those that it trains, adapters included.

    Norms and biases have no weight decay: tensors with one axis.
    """
    found = [
        Weight(e.key, e.key, tuple(e.hf), part_of(next(iter(e.hf))), math.prod(e.shape), len(e.shape) > 1)
        for e in table(shapes)
    ]
    if settings is None:
        return found
    adapter, adapted = settings.adapter, []
    linears = targeted(adapter, shapes).values() if adapter.type else []
    for linear in linears:
        for kind, shape in tensor_shapes(adapter, linear).items():
            name = f"{linear.name}.{kind}"
            size, decays = math.prod(shape), len(shape) > 1
            adapted.append(Weight(CHECKPOINT_PREFIX + name, linear.entry.key, (name,), part_of(name), size, decays))
    fixed = {*settings.frozen(), *(weight.part for weight in adapted)}
    whole = saved_whole(adapter, shapes) if adapter.type else {}
    return [weight for weight in found if weight.part not in fixed or weight.key in whole] + adapted


def rule_of(train: TrainSettings, shapes: Shapes, names: Iterable[str], layer_key: str) -> Rule:
    """How a weight with these Hugging Face names is trained. ``layer_key``: see ``Weight``.

    The first group whose pattern is found in one of the names counts.
    """
    scale = train.layer_decay ** _depth(layer_key, shapes) if train.layer_decay < 1 else 1.0
    for number, group in enumerate(train.groups):
        if any(re.search(group.match, name) for name in names):
            return Rule(scale * group.lr_scale, group.weight_decay, group.freeze, number)
    return Rule(scale)


def _depth(key: str, shapes: Shapes) -> int:
    """How many layers of its own stack a weight is below the last one; embeddings are below the first layer."""
    layers = {"language": shapes.text.layers, "vision": shapes.vision.layers}
    if found := _LAYER.match(key):
        return layers[found[1].partition(".")[0]] - 1 - int(found[2])
    return next((layers[stack] for start, stack in _EMBEDDINGS.items() if key.startswith(start)), 0)


def described(settings: Settings, shapes: Shapes, *, score_head: bool = False) -> list[str]:
    """A line for each group of weights: what it has and how it is trained. Empty without groups.

    Raises:
        UserError: a pattern matches nothing that is trained, only weights of earlier groups, only a part of a
            parameter, or only weights to which its weight decay does not apply; or everything would be frozen.
    """
    train = settings.train
    if not train.groups and train.layer_decay == 1:
        return []
    weights = weights_of(shapes, settings)
    if score_head:  # a reward model has a head in place of the output layer
        weights, size = [weight for weight in weights if weight.key != MCORE_OUTPUT], shapes.text.hidden
        weights.append(Weight(SCORE_HEAD, SCORE_HEAD, (SCORE_HEAD,), "language", size, True))
    rules = [rule_of(train, shapes, weight.names, weight.layer_key) for weight in weights]
    for number, group in enumerate(train.groups):
        _check_group(number, group.match, weights, rules)
        own = [weight for weight, rule in zip(weights, rules, strict=True) if rule.group == number]
        if group.weight_decay is not None and not any(weight.decays for weight in own):
            raise UserError(
                f"train.groups[{number}].weight_decay is {group.weight_decay:g}, but {group.match!r} matches only "
                "norms and biases, which have no weight decay: it would be ignored",
                "remove weight_decay, or match matrices",
            )
    if all(rule.freeze for rule in rules):
        raise UserError("train.groups freezes every weight: nothing would be trained", "freeze fewer of them")
    of_group: dict[int | None, list[tuple[Weight, float]]] = {}
    for weight, rule in zip(weights, rules, strict=True):
        scale = rule.lr_scale * next((x for part, x in train.lr_scale.items() if part == weight.part), 1.0)
        if weight.names[0].endswith(LORA_B):
            scale *= settings.adapter.lr_ratio
        of_group.setdefault(rule.group, []).append((weight, scale))
    return [_line(train, number, of_group[number]) for number in sorted(of_group, key=lambda n: (n is None, n))]


def _check_group(number: int, match: str, weights: list[Weight], rules: list[Rule]) -> None:
    here = f"train.groups[{number}].match is {match!r}"
    hit = [w for w in weights if any(re.search(match, name) for name in w.names)]
    if not hit:
        ends = ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "N", name) for w in weights for name in w.names))
        raise UserError(f"{here}, which is found in no weight that is trained", f"their names, N for a number: {ends}")
    for weight in hit:
        if others := [name for name in weight.names if not re.search(match, name)]:
            found = next(name for name in weight.names if name not in others)
            raise UserError(
                f"{here}, which is found in {found}, but not in {' and '.join(others)}: they are one parameter",
                "let the pattern match all of them or none",
            )
    if not any(rule.group == number for rule in rules):
        raise UserError(
            f"{here}, but all {counted(len(hit), 'weight')} that it matches belong to earlier groups: it would be "
            "ignored",
            "put this group before the others, or remove it",
        )


def _line(train: TrainSettings, number: int | None, own: list[tuple[Weight, float]]) -> str:
    group = None if number is None else train.groups[number]
    name = "other weights" if group is None else group.match
    what = f"{counted(len(own), 'tensor')}, {short(sum(weight.numel for weight, _ in own))} numbers"
    if group is not None and group.freeze:
        return f"{name}: {what}: frozen"
    decay = train.weight_decay if group is None or group.weight_decay is None else group.weight_decay
    none = "" if all(weight.decays for weight, _ in own) else " (norms and biases: 0)"
    scales = [scale for _, scale in own]
    ends = dict.fromkeys(f"{scale:.4g}" for scale in (min(scales), max(scales)))
    return f"{name}: {what}: lr × {' to '.join(ends)}, weight decay {decay:g}{none}"
