"""Settings that contradict sampling or would be ignored; checked before anything large is imported."""

from collections.abc import Iterable

from megavlm.align.loss_tables import advantages_of, losses_of
from megavlm.base.errors import UserError
from megavlm.config.section import Section
from megavlm.config.sections import RANDOM
from megavlm.config.settings import Settings

GROUP_SIZES = {"grpo": 16, "ppo": 1}
"""By method, the number of answers to each prompt if ``rollout.group_size`` is null."""


WHY_PPO = ("align.loss=ppo", "align.critic", "align.discount")
"""Settings by which a configuration can only be meant for ppo; see ``MethodEntry.meant_by``."""


def first_set(settings: Settings, keys: Iterable[str]) -> str | None:
    """The first of settings "key" or "key=value" that is not at its default, or has that value; None if none is."""
    for key, _, value in (text.partition("=") for text in keys):
        section: Section = settings
        *above, name = key.split(".")
        for part in above:
            section = getattr(section, part)
        if section.is_changed(name) and (not value or getattr(section, name) == value):
            return key
    return None


def with_group_size(settings: Settings, verb: str | None) -> Settings:
    """The settings with the number of answers to each prompt that ``verb`` samples; None: a guess."""
    if settings.rollout.group_size is not None:
        return settings
    verb = verb or ("ppo" if first_set(settings, WHY_PPO) else "grpo")
    size = GROUP_SIZES.get(verb, GROUP_SIZES["grpo"])
    return settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"group_size": size})})


def check_numbers(verb: str, settings: Settings) -> None:
    """Raises UserError for settings of loss and rows that a method other than pretrain and sft would ignore."""
    train, data = settings.train, settings.data
    weighted = next((key for key, source in data.leaves.items() if source.loss_weight != 1), None)
    given = {
        "train.loss": train.is_changed("loss"),
        "data.length_ramp": bool(data.length_ramp),
        f"the loss_weight of {weighted}": weighted is not None,
    }
    for key in (key for key, is_given in given.items() if is_given):
        raise UserError(f"{key} is set, but {verb} does not use it, so it would be ignored", f"remove {key}")


def check_names(settings: Settings, verb: str) -> None:
    """Raises UserError if ``align.loss`` or ``align.advantage`` is none of a method that samples its answers."""
    for what, names in (("loss", losses_of(verb)), ("advantage", advantages_of(verb))):
        name = getattr(settings.align, what)
        if name is not None and name not in names:
            raise UserError(
                f"align.{what} is {name}, which is no {what} of {verb}", f"choose one of {', '.join(names)}"
            )


def check_sampling(settings: Settings, verb: str) -> None:
    """Raises UserError if a setting does not fit a method that samples its answers, ``verb``.

    What depends on the options of losses is checked when the method is made.
    """
    check_names(settings, verb)
    data, train = settings.data, settings.train
    if data.seq_length <= settings.answer_tokens:
        raise UserError(
            f"{settings.answer_setting} is {settings.answer_tokens}, but a row has data.seq_length = {data.seq_length} "
            "tokens for the prompt and its answer",
            f"raise data.seq_length, or lower {settings.answer_setting}",
        )
    if train.global_batch_size is not None:
        raise UserError(
            f"train.global_batch_size is set, but {verb} packs its answers into as many rows as they need: it would be "
            "ignored",
            "remove train.global_batch_size; rollout.prompts and rollout.group_size give the size of a step",
        )
    if train.epochs is not None:
        raise UserError(
            f"train.epochs is {train.epochs:g}, but the steps of {verb} are counted in prompts",
            "set train.steps: epochs × number of prompts / rollout.prompts",
        )
    if data.too_long == "truncate":
        raise UserError("data.too_long is truncate, but prompts are never truncated", "set data.too_long to drop")
    if data.replay is not None:
        raise UserError(f"data.replay is set, but {verb} does not use it, so it would be ignored", "remove data.replay")
    if data.is_changed("packing"):
        raise UserError(f"data.packing is set, but {verb} packs its answers best-fit always", "remove data.packing")
    if train.kl_to_start:
        raise UserError(
            f"train.kl_to_start is {train.kl_to_start:g}, but {verb} does not use it, so it would be ignored",
            "remove train.kl_to_start; align.beta keeps the model close to where it starts",
        )
    if data.is_changed("packing_buffer"):
        raise UserError(
            f"data.packing_buffer is set, but {verb} packs the answers of a step: it would be ignored",
            "remove data.packing_buffer",
        )
    if train.precision == "fp8":
        raise UserError("train.precision is fp8, in which sampling has not been tried", "set train.precision to bf16")
    if train.overlap.tensor:
        raise UserError(
            "train.overlap.tensor is true, but its buffers have the size of a training row, and sampled rows have "
            "others",
            "set train.overlap.tensor to false",
        )
    if settings.rollout.engine == "vllm":
        _check_vllm(settings)
    ahead = settings.rollout.ahead
    if ahead and settings.rollout.engine == "megatron":
        raise UserError(
            f"rollout.ahead is {ahead}, but rollout.engine megatron samples with the weights that learn, so that "
            "sampling and learning take turns",
            "set rollout.engine to vllm, or rollout.ahead to 0",
        )
    if verb == "grpo" and settings.rollout.group_size == 1:
        raise UserError(
            "rollout.group_size is 1, but grpo compares the answers to a prompt with each other",
            "set rollout.group_size to at least 2, or use megavlm ppo",
        )
    if verb == "ppo":
        _check_ppo(settings)
    _check_align(settings)


def _check_vllm(settings: Settings) -> None:
    if settings.adapter.quantize is not None:
        raise UserError(
            f"adapter.quantize is {settings.adapter.quantize}, but the weights are sent to vLLM, which 4 bits do not "
            "allow",
            "set rollout.engine to megatron, or adapter.quantize to null",
        )
    if settings.align.routing_replay:
        raise UserError(
            "align.routing_replay is true, but rollout.engine is vllm, which does not say which experts it chose",
            "remove align.routing_replay, or set rollout.engine to megatron",
        )


def _check_ppo(settings: Settings) -> None:
    train, critic = settings.train, settings.align.critic
    if settings.rollout.replace_flat:
        raise UserError(
            f"rollout.replace_flat is {settings.rollout.replace_flat}, but ppo does not compare the answers to a "
            "prompt: it would be ignored",
            "remove rollout.replace_flat",
        )
    if train.unfreeze_after:
        raise UserError(
            f"train.unfreeze_after is {train.unfreeze_after}, which ppo does not follow, so it would be ignored",
            "remove train.unfreeze_after",
        )
    if train.optimizer in ("galore", "muon"):
        raise UserError(
            f"train.optimizer is {train.optimizer}, with which two models in one run have not been tried",
            "set train.optimizer to adam",
        )
    if train.steps is not None and critic.alone_steps >= train.steps:
        raise UserError(
            f"align.critic.alone_steps is {critic.alone_steps}, but train.steps is {train.steps}: the policy would "
            "learn nothing",
            "lower align.critic.alone_steps",
        )
    if settings.model.load == RANDOM and critic.load is None:
        raise UserError(
            "model.load is random, and align.critic.load is not set: there is nothing that the critic could start from",
            "set model.load to trained weights",
        )


def _check_align(settings: Settings) -> None:
    align, rollout = settings.align, settings.rollout
    if align.beta and settings.model.load == RANDOM:
        raise UserError(
            "model.load is random, but with align.beta above 0 the model is compared with the weights that it starts "
            "from",
            "set model.load to these weights, or align.beta to 0",
        )
    if align.overlong_cache is not None and settings.environment.python is not None:
        raise UserError(
            "align.overlong_cache is set, but with an environment an answer has several turns, which it does not know",
            "remove align.overlong_cache; the environment's reward may depend on the lengths of its answers",
        )
    if align.overlong_cache is not None and align.overlong_cache > rollout.max_new_tokens:
        raise UserError(
            f"align.overlong_cache is {align.overlong_cache}, more than rollout.max_new_tokens = "
            f"{rollout.max_new_tokens}",
            "lower align.overlong_cache",
        )
    of_correction = {"lowest": align.correction_lowest, "highest": align.correction_highest}
    used = ("lowest", "highest") if align.correction.endswith("mask") else ("highest",)
    for key, value in of_correction.items():
        if value is not None and (align.correction == "off" or key not in used):
            raise UserError(
                f"align.correction_{key} is set, but align.correction is {align.correction}: it would be ignored",
                f"remove align.correction_{key}",
            )
    if align.kl_in == "reward":
        _check_kl_in_reward(settings)


def _check_kl_in_reward(settings: Settings) -> None:
    if settings.rollout.replace_flat or (settings.align.loss == "dapo" and settings.rollout.replace_flat is None):
        raise UserError(
            "align.kl_in is reward, so that answers with equal rewards differ by their divergence, but flat groups are "
            "to be replaced (rollout.replace_flat, 4 with align.loss dapo): there would be none",
            "set rollout.replace_flat to 0, or remove align.kl_in",
        )
    if any(reward.key == "kl" for reward in settings.reward):
        raise UserError(
            "a reward has the name kl, under which the divergence is reported with align.kl_in reward",
            "give it another label",
        )


def too_few_prompts(settings: Settings, total: int) -> list[str]:
    """A remark if the data have fewer than the prompts of a step; otherwise []."""
    prompts = settings.rollout.prompts or 0
    if prompts <= total:
        return []
    remark = (
        f"a step asks {prompts:,} prompts (rollout.prompts), but the data have {total:,}: each step goes through them "
        "more than once, and learns from several groups of answers to the same prompt"
    )
    return [remark]


def uncorrected(settings: Settings) -> list[str]:
    """A remark if answers are older than the weights that learn from them and nothing corrects for it; otherwise []."""
    ahead = settings.rollout.ahead
    if not ahead or settings.align.correction != "off":
        return []
    remark = (
        f"answers are up to {ahead} steps older than the weights that learn from them (rollout.ahead), and "
        "align.correction is off: the difference is measured (mismatch_kl), but not corrected"
    )
    return [remark]
