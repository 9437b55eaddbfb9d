"""All settings: the sections combined, and the checks between sections."""

from pydantic import Field, model_validator

from megavlm.base.errors import UserError
from megavlm.base.quoting import quoted
from megavlm.config.adapter_section import AdapterSettings
from megavlm.config.align_sections import AlignSettings
from megavlm.config.data_sections import DataSettings, DataSource
from megavlm.config.environment_section import ENVIRONMENT, EnvironmentSettings
from megavlm.config.eval_section import EvalSettings
from megavlm.config.reward_section import RewardPoolSettings, Rewards, RewardSettings
from megavlm.config.rollout_section import RolloutSettings
from megavlm.config.schedule_section import check_ramp
from megavlm.config.section import Bool, FilePath, Int, Section
from megavlm.config.sections import (
    CheckpointSettings,
    GenerateSettings,
    LogSettings,
    ModelSettings,
    ParallelSettings,
    VisionSettings,
    WandbSettings,
)
from megavlm.config.speed_checks import check_speed
from megavlm.config.train_section import TrainSettings

__all__ = [
    "AdapterSettings",
    "AlignSettings",
    "CheckpointSettings",
    "DataSettings",
    "DataSource",
    "EnvironmentSettings",
    "EvalSettings",
    "GenerateSettings",
    "LogSettings",
    "ModelSettings",
    "ParallelSettings",
    "RewardPoolSettings",
    "RewardSettings",
    "RolloutSettings",
    "Settings",
    "TrainSettings",
    "VisionSettings",
    "WandbSettings",
]


class Settings(Section):
    """The settings of a configuration file, with all defaults filled in.

    `megavlm.config.load.load_settings` makes them from files and overrides. Tests may write
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
    eval: EvalSettings = EvalSettings()
    reward: Rewards = Field(
        [],
        description="only for methods that sample answers: how the answers are judged. A list of rewards, for example "
        "[{name: math}, {python: rewards.py:short, weight: 0.1}]; an answer gets their weighted sum",
    )
    reward_pool: RewardPoolSettings = RewardPoolSettings()
    environment: EnvironmentSettings = EnvironmentSettings()
    align: AlignSettings = AlignSettings()
    rollout: RolloutSettings = RolloutSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()
    generate: GenerateSettings = GenerateSettings()
    output: FilePath | None = Field(
        None,
        description="output folder of the run, with config.yaml, metrics.jsonl, the checkpoints and the report",
    )
    overwrite: Bool = Field(
        False,
        description="whether results in the output folder may be replaced. A run with the same settings is always "
        "continued; one with other settings is replaced",
    )

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.train.precision == "fp8" and self.model.kernels != "te":
            raise UserError(
                f"train.precision is fp8, but model.kernels is {self.model.kernels}: only te (Transformer Engine) "
                "supports fp8",
                "set model.kernels to te, or train.precision to bf16",
            )
        limited = [quoted(source.label) for source in self.data.leaves.values() if source.max_tokens is not None]
        if limited and self.train.epochs:
            raise UserError(
                f"{limited[0]} has max_tokens, but train.epochs says already how often each source is read",
                "remove max_tokens, or set train.steps instead of train.epochs",
            )
        free = ", ".join(part for part in self.train.unfreeze_after if part not in self.model.freeze)
        if free:
            raise UserError(
                f"train.unfreeze_after is {self.train.unfreeze_after}, but model.freeze is "
                f"{self.model.freeze}: the entry for {free} would be ignored",
                f"remove {free} from train.unfreeze_after, or add it to model.freeze",
            )
        frozen = ", ".join(part for part in self.train.lr_scale if part in self.frozen())
        if frozen:
            raise UserError(
                f"train.lr_scale is {self.train.lr_scale}, but model.freeze has {frozen}: the entry would be ignored",
                f"remove {frozen} from one of them",
            )
        if self.train.kl_to_start and self.model.start is None:
            load = "not set" if self.model.load is None else self.model.load
            raise UserError(
                f"train.kl_to_start is {self.train.kl_to_start:g}, but model.load is {load}: there is no model to "
                "stay close to",
                "set model.load to the weights to stay close to, or set kl_to_start to 0",
            )
        self._check_environment()
        self.eval.check_names([source.label for source in self.data.eval])
        check_speed(self.train, self.parallel, self.model.kernels, self.adapter.type)
        if self.data.length_ramp and self.train.overlap.tensor:
            raise UserError(
                f"data.length_ramp is {self.data.length_ramp}, but the buffers of train.overlap.tensor have one length",
                "set train.overlap.tensor to false, or remove length_ramp",
            )
        check_ramp("data.length_ramp", self.data.length_ramp, self.train.steps)
        for key, length in self._lengths:
            check_seq_length(length, self.parallel, key)
        self._check_pad_multiple()
        return self

    def frozen(self, step: int | None = None) -> list[str]:
        """The parts that are frozen in step ``step`` (counted from 1); without a step, those that are always frozen."""
        unfreeze_after = self.train.unfreeze_after
        return [
            p for p in self.model.freeze if p not in unfreeze_after or (step is not None and step <= unfreeze_after[p])
        ]

    def rows_per_step(self, data_parallel: int, step: int | None = None) -> int:
        """The number of rows of a step on each data-parallel rank; without a step, the largest number.

        Without ``train.global_batch_size`` it differs between steps, and this is the number of rows whose frames are
        encoded together: a few times as many as fill the pipeline.
        """
        size = self.train.global_batch_size if step is None else self.train.rows_of(step)
        return 4 * self.parallel.pipeline if size is None else size // data_parallel

    @property
    def answer_tokens(self) -> int:
        """The maximum number of tokens after a prompt: of an answer or, with an environment, of all its turns."""
        return self.environment.max_tokens or self.rollout.max_new_tokens

    @property
    def answer_setting(self) -> str:
        """The setting that gives ``answer_tokens``."""
        return "environment.max_tokens" if self.environment.max_tokens else "rollout.max_new_tokens"

    @property
    def pad_multiple(self) -> int:
        """The number of tokens to a multiple of which each sample in a row is padded."""
        return self.data.pad_multiple or self.parallel.pieces

    def _check_environment(self) -> None:
        has_one = self.environment.python is not None
        weights = [reward.weight for reward in self.reward] + [self.environment.weight] * has_one
        if weights and not any(weights):
            raise UserError("all rewards have weight 0: there would be nothing to learn", "give one of them a weight")
        if self.answer_tokens < self.rollout.max_new_tokens:
            raise UserError(
                f"environment.max_tokens is {self.answer_tokens}, less than a single answer may have with "
                f"rollout.max_new_tokens = {self.rollout.max_new_tokens}",
                "raise environment.max_tokens, or lower rollout.max_new_tokens",
            )
        if has_one and any(reward.key == ENVIRONMENT for reward in self.reward):
            raise UserError(
                f"a reward has the name {ENVIRONMENT}, under which that of the environment is reported",
                "give it another label",
            )

    def _check_pad_multiple(self) -> None:
        if self.pad_multiple % self.parallel.pieces:
            raise UserError(
                f"data.pad_multiple is {self.data.pad_multiple}, but context parallelism cuts each sample into "
                f"2 × parallel.context = {self.parallel.pieces} equal pieces",
                f"set data.pad_multiple to null or a multiple of {self.parallel.pieces}",
            )
        for key, length in self._lengths:
            if length % self.pad_multiple:
                raise UserError(
                    f"{key} is {length}, which is not divisible by data.pad_multiple = {self.pad_multiple}",
                    f"set {key} to {-(-length // self.pad_multiple) * self.pad_multiple}",
                )

    @property
    def _lengths(self) -> list[tuple[str, int]]:
        """The lengths that rows have, with the setting of each."""
        ramp = [(f"data.length_ramp[{step}]", length) for step, length in self.data.length_ramp.items()]
        return [("data.seq_length", self.data.seq_length), *ramp]


def check_seq_length(seq_length: int, parallel: ParallelSettings, key: str = "data.seq_length") -> None:
    """Raises a UserError if rows of `seq_length` tokens cannot be cut as `parallel` says.

    Context parallelism cuts a row into 2 × context pieces and gives each rank an early and a late one, so that causal
    attention costs all ranks the same. Sequence parallelism cuts the tokens of a context rank into `tensor` slices.
    """
    cut = (parallel.tensor if parallel.sequence_parallel else 1) * parallel.pieces
    if seq_length % cut:
        formula = "2 × parallel.context × parallel.tensor" if parallel.context > 1 else "parallel.tensor"
        below, above = seq_length // cut * cut, (seq_length // cut + 1) * cut
        raise UserError(
            f"{key} is {seq_length}, which is not divisible by {formula} = {cut}",
            f"the nearest valid lengths are {below} and {above}" if below else f"the nearest valid length is {above}",
        )
