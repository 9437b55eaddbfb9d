"""The align section: what preference methods minimise, and what they compare with."""

from typing import Literal

from pydantic import Field

from megavlm.config.section import FilePath, Float, Section, Str


class AlignSettings(Section):
    """Preference methods."""

    loss: Str = Field(
        "sigmoid",
        description="loss of dpo: sigmoid (DPO's own), hinge, ipo, robust, simpo or orpo; simpo and orpo need no "
        "reference model",
    )
    beta: Float | None = Field(
        None, gt=0, description="how far the policy may go from the reference; null: 0.1, of simpo 2.5"
    )
    gamma: Float | None = Field(None, description="of simpo: by how much the chosen answer is to win; null: 0.55 beta")
    label_smoothing: Float | None = Field(
        None, ge=0, lt=0.5, description="of sigmoid and robust: share of pairs taken to be labelled wrong; null: 0, 0.1"
    )
    lam: Float | None = Field(None, ge=0, description="of orpo: weight of the odds ratio; null: 0.1")
    desirable_weight: Float = Field(1.0, ge=0, description="of kto: weight of answers with label true")
    undesirable_weight: Float = Field(1.0, ge=0, description="of kto: weight of answers with label false")
    centering: Float = Field(0.01, ge=0, description="of rm: how strongly scores are pulled to 0")
    reference_at: Literal["start", "step"] = Field(
        "start",
        description="when the reference's log-probabilities are worked out: at the start, of all data, into a file; or "
        "in each step, by a second forward pass with a copy of what learns",
    )
    reference: FilePath | None = Field(
        None,
        description="file of the reference's log-probabilities; null: reference.safetensors in the output folder, made "
        "with the weights of model.load before the first step",
    )
