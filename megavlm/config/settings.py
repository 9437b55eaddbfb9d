"""All settings of a run: `sections.py` and `data_sections.py` put together, and the checks between sections."""

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.align_sections import AlignSettings
from megavlm.config.data_sections import DataSettings, DataSource
from megavlm.config.section import Bool, FilePath, Int, Section
from megavlm.config.sections import (
    CheckpointSettings,
    GenerateSettings,
    LogSettings,
    ModelSettings,
    ParallelSettings,
    TrainSettings,
    VisionSettings,
    WandbSettings,
)

__all__ = [
    "AdapterSettings",
    "AlignSettings",
    "CheckpointSettings",
    "DataSettings",
    "DataSource",
    "GenerateSettings",
    "LogSettings",
    "ModelSettings",
    "ParallelSettings",
    "Settings",
    "TrainSettings",
    "VisionSettings",
    "WandbSettings",
]


class Settings(Section):
    """What a configuration file says, every default filled in.

    `megavlm.config.load.load_settings` makes one from files and overrides; a test may write
    `Settings(model={"hf": folder}, data={"seq_length": 64})`. Raises pydantic's ValidationError, which load_settings
    turns into a UserError.
    """

    stage: Int | None = Field(None, ge=0, le=3, description="pretraining stage; for the verb pretrain only")
    model: ModelSettings
    adapter: AdapterSettings = AdapterSettings()
    data: DataSettings = DataSettings()
    parallel: ParallelSettings = ParallelSettings()
    vision: VisionSettings = VisionSettings()
    train: TrainSettings = TrainSettings()
    align: AlignSettings = AlignSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    generate: GenerateSettings = GenerateSettings()
    output: FilePath | None = Field(
        None, description="folder of the run: config.yaml, metrics.jsonl, checkpoints, report"
    )
    overwrite: Bool = Field(False, description="replace what an earlier, different run left in the output folder")

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.train.precision == "fp8" and self.model.kernels != "te":
            raise UserError(
                f"train.precision is fp8, but model.kernels is {self.model.kernels}: only Transformer Engine has fp8",
                "set model.kernels to te, or train.precision to bf16",
            )
        free = ", ".join(part for part in self.train.unfreeze_after if part not in self.model.freeze)
        if free:
            raise UserError(
                f"train.unfreeze_after is {self.train.unfreeze_after}, but model.freeze is "
                f"{self.model.freeze}: that of {free} would be ignored",
                f"remove {free} from train.unfreeze_after, or add it to model.freeze",
            )
        frozen = ", ".join(part for part in self.train.lr_scale if part in self.frozen())
        if frozen:
            raise UserError(
                f"train.lr_scale is {self.train.lr_scale}, but model.freeze has {frozen}: it would be ignored",
                f"remove {frozen} from one of them",
            )
        if self.train.kl_to_start and self.model.load is None:
            raise UserError(
                f"train.kl_to_start is {self.train.kl_to_start:g}, but model.load is not set: nothing is to be kept",
                "set model.load, or kl_to_start to 0",
            )
        check_seq_length(self.data.seq_length, self.parallel)
        self._check_pad_multiple()
        return self

    def frozen(self, step: int | None = None) -> list[str]:
        """Parts that do not learn in step ``step`` (from 1); without one, those that never do."""
        unfreeze_after = self.train.unfreeze_after
        return [
            p for p in self.model.freeze if p not in unfreeze_after or (step is not None and step <= unfreeze_after[p])
        ]

    @property
    def pad_multiple(self) -> int:
        """Samples are padded in their rows to a multiple of this many tokens."""
        return self.data.pad_multiple or self.parallel.pieces

    def _check_pad_multiple(self) -> None:
        if self.pad_multiple % self.parallel.pieces:
            raise UserError(
                f"data.pad_multiple is {self.data.pad_multiple}, but context parallelism cuts each sample into "
                f"2 × parallel.context = {self.parallel.pieces} equal pieces",
                f"set data.pad_multiple to null or a multiple of {self.parallel.pieces}",
            )
        if self.data.seq_length % self.pad_multiple:
            raise UserError(
                f"data.seq_length is {self.data.seq_length}, which is not divisible by data.pad_multiple = "
                f"{self.pad_multiple}",
                f"set data.seq_length to {-(-self.data.seq_length // self.pad_multiple) * self.pad_multiple}",
            )


def check_seq_length(seq_length: int, parallel: ParallelSettings) -> None:
    """Raises UserError unless rows of `seq_length` tokens can be cut as `parallel` says.

    Sequence parallelism cuts a row in `tensor` slices; context parallelism first in 2 * context pieces, of which each
    rank takes an early and a late one, so that causal attention costs every rank the same.
    """
    cut = (parallel.tensor if parallel.sequence_parallel else 1) * parallel.pieces
    if seq_length % cut:
        formula = "2 × parallel.context × parallel.tensor" if parallel.context > 1 else "parallel.tensor"
        below, above = seq_length // cut * cut, (seq_length // cut + 1) * cut
        raise UserError(
            f"data.seq_length is {seq_length}, which is not divisible by {formula} = {cut}",
            f"nearest lengths that are: {below} and {above}" if below else f"nearest length that is: {above}",
        )
