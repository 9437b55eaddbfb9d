"""The align section: the losses of the preference methods and of reinforcement learning, and the reference model."""

from typing import Literal

from pydantic import Field

from megavlm.config.section import Bool, FilePath, Float, Int, Section, Str


class CriticSettings(Section):
    """The value model of ppo, which estimates the rewards to come and has an optimizer of its own."""

    load: FilePath | None = Field(
        None,
        description="what it starts from: most often the output folder of a run of megavlm rm, or a checkpoint of it. "
        "null: as the policy, with a new head",
    )
    lr: Float | None = Field(None, gt=0, le=1000, description="its learning rate; null: train.lr")
    warmup_steps: Int | None = Field(
        None, ge=0, description="number of steps in which its learning rate rises from 0; null: train.warmup_steps"
    )
    alone_steps: Int = Field(
        0,
        ge=0,
        description="number of steps at the beginning in which it alone learns. The schedule of the policy's learning "
        "rate begins after them",
    )
    clip: Float | None = Field(
        0.2,
        gt=0,
        description="how far a value may move in the updates of a step before its gradient ends; null: there is no "
        "limit",
    )


class AlignSettings(Section):
    """The loss and the reference model of the preference methods dpo, kto and rm, and of reinforcement learning."""

    loss: Str | None = Field(
        None,
        description="for dpo: the loss function, one of sigmoid (the loss of the DPO paper), sigmoid_norm (the same on "
        "per-token means), hinge, ipo, robust, simpo and orpo; simpo and orpo need no reference model. For grpo: one "
        "of grpo, dr_grpo, dapo, gspo, sapo and cispo. For ppo: ppo. null: sigmoid for dpo, grpo for grpo, ppo for ppo",
    )
    beta: Float | None = Field(
        None,
        ge=0,
        description="for dpo, kto, grpo and ppo: strength with which the policy is kept close to the reference model; "
        "higher values keep it closer. null: 0.1 for dpo and kto, 5 for sigmoid_norm, 2.5 for simpo; for grpo 0.03 "
        "with the loss grpo and 0 with the others; 0.05 for ppo. 0, only for grpo and ppo: there is no reference model",
    )
    kl_in: Literal["loss", "reward"] | None = Field(
        None,
        description="only for grpo and ppo: where the divergence from the reference model counts. loss: k3 of each "
        "token, times beta, in the loss; reward: the log-ratio to the reference (k1), times beta, is taken off rewards "
        "before advantages are computed: for ppo that of each token off its own reward, for grpo the sum over an "
        "answer off the answer's, as in RLOO's paper. null: loss for grpo, reward for ppo",
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
        description="only for sigmoid, sigmoid_norm and robust: assumed fraction of pairs with swapped labels; null: "
        "0.1 for robust, otherwise 0",
    )
    sft_weight: Float = Field(
        0.0,
        ge=0,
        description="only for dpo: weight of the chosen answer's negative log-likelihood, a mean over its tokens, in "
        "the loss (RPO, 2404.19733), which keeps the chosen answers likely; orpo has this term already",
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
        description="for grpo: how rewards become advantages, one of grpo (divided by the standard deviation of the "
        "group), dr_grpo (not divided) and rloo (compared with the mean of the other answers); for ppo: gae, from the "
        "values of the critic. null: dr_grpo with the loss dr_grpo, gae for ppo, otherwise grpo",
    )
    discount: Float = Field(
        1.0, ge=0, le=1, description="only for ppo: factor of rewards that come one token later (γ of GAE)"
    )
    gae_lambda: Float = Field(
        0.95,
        ge=0,
        le=1,
        description="only for ppo: λ of GAE. At 1, advantages come from rewards alone, less the value before the "
        "token; lower values trust the critic more, for less noise",
    )
    whiten: Bool = Field(
        True,
        description="only for ppo: whether the advantages of all tokens of a step are shifted and scaled to mean 0 and "
        "variance 1",
    )
    critic: CriticSettings = CriticSettings()
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
        description="only for the losses ppo, grpo, dr_grpo, dapo and gspo: how far the ratio of new to old "
        "probability may fall below 1 before it is clipped; null: 0.2, for gspo 3e-4",
    )
    epsilon_high: Float | None = Field(
        None,
        gt=0,
        description="only for the losses ppo, grpo, dr_grpo, dapo, gspo and cispo: how far the ratio may rise above 1; "
        "null: epsilon, for dapo 0.28, for gspo 4e-4. For cispo it is the largest ratio itself; null: 5",
    )
    dual_clip: Float | None = Field(
        None,
        gt=1,
        description="only for the losses ppo, grpo, dr_grpo, dapo and gspo: largest ratio that counts for answers with "
        "a negative advantage; null: no such limit",
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
        description="only for grpo and ppo: how often each step learns from its answers; above 1, they become "
        "off-policy",
    )
    mini_batches: Int = Field(
        1,
        ge=1,
        description="only for grpo and ppo: number of parts into which the prompts of a step are divided; there is an "
        "update of the weights for each",
    )
    correction: Literal["off", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = Field(
        "off",
        description="only for grpo and ppo: how differences between the log-probabilities of sampler and trainer are "
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
        description="only for grpo and ppo: number of tokens before rollout.max_new_tokens from which the reward of an "
        "answer falls with its length, down to 1 less at the maximum; null: length has no influence",
    )
    mask_truncated: Bool = Field(
        False,
        description="only for grpo and ppo: whether answers that were cut off at rollout.max_new_tokens are not "
        "learned from; their rewards still count in their groups",
    )
    offload: list[Literal["reference", "critic", "reward"]] = Field(
        [],
        description="only for grpo and ppo: which models are in host memory while they are not used. reference: the "
        "reference model; critic, only for ppo: the value model, with its gradients and the state of its optimizer; "
        "reward: reward models",
    )
    routing_replay: Bool | None = Field(
        None,
        description="only for grpo and ppo with a mixture of experts: whether updates send each token to the experts "
        "to which it went while its answer was sampled; false: they choose anew. null: true",
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
