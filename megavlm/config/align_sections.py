"""The align section: the losses of the preference methods, and the reference model."""

from typing import Literal

from pydantic import Field

from megavlm.config.section import FilePath, Float, Section, Str


class AlignSettings(Section):
    """The loss and the reference model of the preference methods dpo, kto and rm."""

    loss: Str = Field(
        "sigmoid",
        description="only for dpo: the loss function, sigmoid (that of the DPO paper), hinge, ipo, robust, simpo or "
        "orpo; simpo and orpo need no reference model",
    )
    beta: Float | None = Field(
        None,
        gt=0,
        description="only for dpo and kto: strength with which the policy is kept close to the reference model; higher "
        "values keep it closer. null: 0.1, for simpo 2.5",
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
