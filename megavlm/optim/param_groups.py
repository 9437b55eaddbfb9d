"""The groups of ``group_rules`` as overrides of single parameters, which Megatron's optimizers take."""

from collections.abc import Iterable

from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from torch import Tensor
from torch.nn import Parameter

from megavlm.config.train_section import TrainSettings
from megavlm.convert import SHARDED_METADATA
from megavlm.convert.peft_names import CHECKPOINT_PREFIX, LORA_A, LORA_B, MAGNITUDE, SPECTRUM
from megavlm.model.vlm import VLM
from megavlm.optim.group_rules import Rule, rule_of, weights_of


class ParamGroups:
    """The rules of the parameters on this rank.

    Args:
        vlm: the model.
        train: the ``train`` section.
    """

    def __init__(self, vlm: VLM, train: TrainSettings):
        self._vlm, self._rules = vlm, dict[Tensor, Rule]()
        if not train.groups and train.layer_decay == 1:
            return
        names_of = {weight.key: weight.names for weight in weights_of(vlm.shapes)}
        key_of = {name: key for key, names in names_of.items() for name in names}
        for shard in vlm.sharded_state_dict(dict(SHARDED_METADATA)).values():
            key, parameter = getattr(shard, "key", ""), getattr(shard, "data", None)
            if not isinstance(parameter, Parameter):
                continue
            names, layer_key = names_of.get(key, (key,)), key
            if key.startswith(CHECKPOINT_PREFIX):  # an adapter counts as a weight of the layer on which it is
                name = key.removeprefix(CHECKPOINT_PREFIX)
                kind = next(kind for kind in (LORA_A, LORA_B, MAGNITUDE, SPECTRUM) if name.endswith(f".{kind}"))
                linear = name.removesuffix(f".{kind}")
                names, layer_key = (name,), key_of.get(f"{linear}.weight") or key_of[linear]
            self._rules[parameter] = rule_of(train, vlm.shapes, names, layer_key)

    def freeze(self) -> None:
        """Freezes the parameters of the groups that are frozen."""
        for parameter, rule in self._rules.items():
            if rule.freeze:
                parameter.requires_grad_(False)
        for chunk in self._vlm.language:
            own = [(parameter, self._rules[parameter]) for parameter in chunk.parameters() if parameter in self._rules]
            if any(rule.freeze for _, rule in own) and any(parameter.requires_grad for parameter, _ in own):
                chunk.inputs_need_grad = True

    def overrides(self, parameters: Iterable[Parameter]) -> dict[ParamKey, dict[str, float]]:
        """Megatron's overrides for those parameters that have a learning rate or a weight decay of their own.

        ``lr_scale`` is not a name of Megatron's: it becomes an entry of the parameter group, from which
        ``Optimizers`` computes the rates.
        """
        by_values: dict[tuple[float, float | None], set[Tensor]] = {}
        for parameter in parameters:
            rule = self._rules.get(parameter, Rule())
            scale = rule.lr_scale * getattr(parameter, "lr_scale", 1.0)  # an adapter's B may have one (LoRA+)
            if (scale, rule.weight_decay) != (1.0, None):
                by_values.setdefault((scale, rule.weight_decay), set()).add(parameter)
        found = {}
        for (scale, decay), own in by_values.items():
            predicate = ParamWithNamePredicate(f"{scale} {decay}", lambda parameter, _, own=own: parameter in own)
            decays = {} if decay is None else {"start_wd": decay, "end_wd": decay}
            found[ParamKey(with_name_predicate=predicate)] = {"lr_scale": scale, **decays}
        return found
