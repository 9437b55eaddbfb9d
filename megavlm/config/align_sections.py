"""The align section: the losses of the preference methods and of reinforcement learning, and the reference model."""

from typing import Literal

from pydantic import Field

from megavlm.config.section import Bool, FilePath, Float, Int, Section, Str


class AlignSettings(Section):
    """The loss and the reference model of the preference methods dpo, kto and rm, and of reinforcement learning."""

    loss: Str | None = Field(
        None,
        description="for dpo: the loss function, one of sigmoid (the loss of the DPO paper), hinge, ipo, robust, simpo "
        "and orpo; simpo and orpo need no reference model. For grpo: one of grpo, dr_grpo, dapo, gspo, sapo and cispo. "
        "null: sigmoid for dpo, grpo for grpo",
    )
    beta: Float | None = Field(
        None,
        ge=0,
        description="for dpo, kto and grpo: strength with which the policy is kept close to the reference model; "
        "higher values keep it closer. null: 0.1 for dpo and kto, 2.5 for simpo; for grpo 0.03 with the loss grpo and "
        "0 with the others. 0, only for grpo: there is no reference model",
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss",
        description="only for grpo: where the divergence from the reference model counts. loss: k3 of each token, "
        "times beta, in the loss; reward: the log-ratio of each answer to the reference (k1, summed over its tokens), "
        "times beta, is taken off its reward before advantages are computed, as in RLOO's paper",
    )
    gamma: Float | None = Field(
        None,
        description="only for simpo: margin by which the reward of the chosen answer should exceed that of the "
        "rejected one; null: 0.55 × beta",
    )
    label_smoothing: Float | None = Field(
        None,
        ge=0,
        lt=0.5,
        description="only for sigmoid and robust: assumed fraction of pairs with swapped labels; null: 0 for sigmoid, "
        "0.1 for robust",
    )
    lam: Float | None = Field(
        None, ge=0, description="only for orpo: weight of the odds-ratio term in the loss; null: 0.1"
    )
    desirable_weight: Float = Field(1.0, ge=0, description="only for kto: weight of answers with the label true")
    undesirable_weight: Float = Field(1.0, ge=0, description="only for kto: weight of answers with the label false")
    centering: Float = Field(
        0.01, ge=0, description="only for rm: weight of the term that keeps the scores centred on 0; 0: no such term"
    )
    advantage: Str | None = Field(
        None,
        description="only for grpo: how rewards become advantages, one of grpo (divided by the standard deviation of "
        "the group), dr_grpo (not divided) and rloo (compared with the mean of the other answers). null: dr_grpo with "
        "the loss dr_grpo, otherwise grpo",
    )
    ddof: Int | None = Field(
        None,
        ge=0,
        le=1,
        description="only for the advantage grpo: what is subtracted from the number of answers in the variance of the "
        "group; null: 1",
    )
    epsilon: Float | None = Field(
        None,
        gt=0,
        description="only for the losses grpo, dr_grpo, dapo and gspo: how far the ratio of new to old probability may "
        "fall below 1 before it is clipped; null: 0.2, for gspo 3e-4",
    )
    epsilon_high: Float | None = Field(
        None,
        gt=0,
        description="only for the losses grpo, dr_grpo, dapo, gspo and cispo: how far the ratio may rise above 1; "
        "null: epsilon, for dapo 0.28, for gspo 4e-4. For cispo it is the largest ratio itself; null: 5",
    )
    dual_clip: Float | None = Field(
        None,
        gt=1,
        description="only for the losses grpo, dr_grpo, dapo and gspo: largest ratio that counts for answers with a "
        "negative advantage; null: no such limit",
    )
    tau_pos: Float | None = Field(
        None, gt=0, description="only for the loss sapo: temperature for positive advantages; null: 1"
    )
    tau_neg: Float | None = Field(
        None, gt=0, description="only for the loss sapo: temperature for negative advantages; null: 1.05"
    )
    updates: Int = Field(
        1,
        ge=1,
        description="only for grpo: how often each step learns from its answers; above 1 they become off-policy",
    )
    mini_batches: Int = Field(
        1,
        ge=1,
        description="only for grpo: number of parts into which the prompts of a step are divided; there is an update "
        "of the weights for each",
    )
    correction: Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "off",
        description="only for grpo: how differences between the log-probabilities of sampler and trainer are "
        "corrected. truncate: the importance ratio is limited; mask: tokens or answers outside the limits are left "
        "out; off: the differences are only measured",
    )
    correction_lowest: Float | None = Field(
        None,
        ge=0,
        description="only with a correction that masks: smallest importance ratio; null: 0.5 for tokens, else 0",
    )
    correction_highest: Float | None = Field(
        None,
        gt=0,
        description="only with a correction: largest importance ratio; null: 2 for token_truncate, 5 for token_mask, 3 "
        "for answers",
    )
    overlong_cache: Int | None = Field(
        None,
        ge=1,
        description="only for grpo: number of tokens before rollout.max_new_tokens from which the reward of an answer "
        "falls with its length, down to 1 less at the maximum; null: length has no influence",
    )
    mask_truncated: Bool = Field(
        False,
        description="only for grpo: whether answers that were cut off at rollout.max_new_tokens are not learned from; "
        "their rewards still count in their groups",
    )
    offload_reference: Bool = Field(
        False,
        description="only for grpo: whether the reference model is in host memory while it is not used",
    )
    routing_replay: Bool | None = Field(
        None,
        description="only for grpo with a mixture of experts: whether updates send each token to the experts to which "
        "it went while its answer was sampled; false: they choose anew. null: true",
    )
    reference_at: Literal["start", "step"] = Field(
        "start",
        description="when the log-probabilities of the reference model are computed. start: before the first step, for "
        "all data, and written to a file; step: in each step, which costs a second forward pass and a copy of the "
        "trained weights",
    )
    reference: FilePath | None = Field(
        None,
        description="file with the log-probabilities of the reference model; null: reference.safetensors in the output "
        "folder, which is computed with the weights of model.load before the first step",
    )
