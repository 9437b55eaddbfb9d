"""The start of every command that runs the model: process groups, shapes, checks, the model and its weights."""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megavlm.adapters.attach import Adapters
from megavlm.base.errors import UserError
from megavlm.checkpoint.folders import find_checkpoint
from megavlm.checkpoint.load_weights import has_score_head, shapes_at_start
from megavlm.checkpoint.manager import MAIN
from megavlm.config.settings import Settings
from megavlm.layout.shapes import check_batch_ramp, check_expert_settings, check_layout, check_window
from megavlm.layout.speed import check_speed_with_model
from megavlm.model.configs import check_supported, decoder_widths
from megavlm.model.shapes import Shapes
from megavlm.model.vlm import VLM
from megavlm.monitor.hang_watch import collective_minutes
from megavlm.platform import Groups, init
from megavlm.runtime.adapter_start import check_adapter, load_start, with_stored_adapter
from megavlm.runtime.further_model import check_further_models, further_model

_log = logging.getLogger(__name__)


@dataclass
class Model:
    """A model on this rank, and its adapters if it has any."""

    vlm: VLM
    adapters: Adapters | None = None


@dataclass
class Session:
    """The models of a command on this rank, and their layout.

    Attributes:
        settings: the settings of the command.
        shapes: the shapes of all models.
        groups: the process groups of all models.
        models: the models by name. ``MAIN`` is the model that the command is about; a method may add others, such as a
            critic, a frozen reference or a reward model.
    """

    settings: Settings
    shapes: Shapes
    groups: Groups
    models: dict[str, Model]

    @property
    def vlm(self) -> VLM:
        """The main model."""
        return self.models[MAIN].vlm

    @property
    def adapters(self) -> Adapters | None:
        """The adapters of the main model."""
        return self.models[MAIN].adapters

    def add_model(self, name: str, load: Path | None, *, trained: bool, score_head: bool = False) -> Model:
        """Adds another model with the same shapes and layout.

        Args:
            name: name of the model in ``models`` and, if it is trained, in checkpoints.
            load, trained, score_head: see ``further_model``.

        Raises:
            UserError: ``load`` contains no complete weights, or another model.
        """
        assert name not in self.models, name
        self.models[name] = Model(
            *further_model(
                self.settings,
                self.shapes,
                self.groups,
                self.vlm,
                self.adapters,
                load,
                trained=trained,
                score_head=score_head,
            )
        )
        return self.models[name]

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes the files of the run and prints its messages."""
        return dist.get_rank() == 0


def check_shapes(settings: Settings, shapes: Shapes, world_size: int, *, training: bool = True) -> int:
    """Checks that the model fits the layout on ``world_size`` processes. Returns the data-parallel size.

    Raises:
        UserError: it does not; the message says which values are allowed.
    """
    text = shapes.text
    check_supported(shapes)
    num_experts = text.moe.num_experts if text.moe else None
    check_expert_settings(settings.train, num_experts, decoder_trained="language" not in settings.frozen())
    check_window(settings.vision.window, settings.parallel)
    check_adapter(settings, shapes)
    dp_size = check_layout(
        settings.parallel,
        world_size,
        num_heads=text.heads,
        num_kv_heads=text.kv_heads,
        vocab_size=text.vocab,
        num_experts=num_experts,
        num_layers=text.layers,
        ffn=text.ffn,
        expert_ffn=text.moe.ffn if text.moe else None,
        seq_length=settings.data.seq_length,
        global_batch_size=settings.train.global_batch_size if training else None,
    )
    if training:
        check_batch_ramp(settings.train.batch_ramp, settings.parallel, world_size)
    for seq_length in (settings.data.seq_length, *settings.data.length_ramp.values()):
        check_speed_with_model(
            settings.train,
            settings.parallel,
            seq_length=seq_length,
            decoder_widths=decoder_widths(shapes, settings.parallel),
            tower_widths={"hidden size": shapes.vision.hidden, "MLP": shapes.vision.ffn},
            num_experts=num_experts,
            all_layers_have_experts=all(text.is_moe_layer(i) for i in range(text.layers)),
        )
    _check_sizes(settings, shapes)
    if training and settings.vision.balance == "world" and dp_size == 1:
        raise UserError(
            "vision.balance is world, but there is only one data-parallel rank, so that the setting has no effect",
            "set vision.balance to model_parallel, or start more processes",
        )
    return dp_size


def _check_sizes(settings: Settings, shapes: Shapes) -> None:
    """Raises UserError for sizes that are legal in themselves, but have no meaning for this model."""
    text, train = shapes.text, settings.train
    most = text.max_positions * (text.rope_scaling.factor if text.rope_scaling is not None else 1)
    if settings.data.seq_length > most:
        raise UserError(
            f"data.seq_length is {settings.data.seq_length}, but the model is made for {most:.0f} positions "
            f"(max_position_embeddings and rope_parameters in {settings.model.hf / 'config.json'})",
            "lower data.seq_length, raise max_position_embeddings, or set YaRN in rope_parameters",
        )
    largest = max(text.hidden, shapes.vision.merged_hidden)  # the shorter side of the largest matrix of a layer
    if train.optimizer == "galore" and train.galore_rank >= largest:
        raise UserError(
            f"train.galore_rank is {train.galore_rank}, but the model's matrices have at most {largest} rows or "
            "columns: GaLore would be plain Adam",
            f"set train.galore_rank below {largest}, or train.optimizer to adam",
        )


def start(
    settings: Settings,
    *,
    training: bool,
    load: bool = True,
    score_head: bool = False,
    ema: bool = False,
    shapes: Shapes | None = None,
) -> Session:
    """Builds the model on this rank and loads ``model.load`` into it, unless that is random weights.

    Args:
        settings: the settings of the command.
        training: whether weights will change; otherwise the model is in eval mode.
        load: whether to load ``model.load`` and the first values of the adapters; False for a run that may continue
            from a checkpoint of its own.
        score_head: whether to add the head of a reward model.
        ema: whether to load the moving averages of the weights.
        shapes: the model's shapes; None: those of ``model.hf``, or of the run that ``model.load`` names.

    Raises:
        UserError: the settings do not fit the model, the number of processes or each other; ``model.load`` or
            ``model.adapter`` belongs to another model.
    """
    if shapes is None:  # otherwise they may be those of a part of the model, with which its files do not agree
        shapes = shapes_at_start(settings.model)
        if training:
            check_further_models(settings, shapes)
    settings = with_stored_adapter(settings, shapes)
    if not training and settings.adapter.type is not None and settings.model.adapter is None:
        raise UserError(
            f"adapter.type is {settings.adapter.type}, but model.adapter is not set: the adapter would have no effect",
            "set model.adapter to the run that trained the adapter, or adapter.type to null",
        )
    if settings.train.overlap.tensor and not training:  # its buffers have the size of a training row
        overlap = settings.train.overlap.model_copy(update={"tensor": False})
        train = settings.train.model_copy(update={"overlap": overlap})
        settings = settings.model_copy(update={"train": train})
    share_frames = training and settings.vision.balance == "world"
    groups = init(
        settings.parallel,
        settings.train.seed,
        collective_minutes(settings.train.hang_minutes, watched=training),
        share_frames=share_frames,
        deterministic=settings.train.deterministic,
    )
    check_shapes(settings, shapes, dist.get_world_size(), training=training)
    path = find_checkpoint(settings.model.start) if load and settings.model.start is not None else None
    if path is not None and not score_head and dist.get_rank() == 0 and has_score_head(path):
        _log.warning("%s has a reward head, which is not used here", path)
    if settings.train.overlap.tensor:
        from megavlm.model.kernels.te import start_userbuffers

        tokens = settings.data.seq_length // settings.parallel.context
        fp8 = settings.train.precision == "fp8"
        start_userbuffers(tokens, shapes.text.hidden, settings.parallel.tensor, fp8=fp8)
    vlm = VLM(shapes, settings, groups, share_frames=share_frames, score_head=score_head)
    adapters = Adapters(vlm, settings.adapter) if settings.adapter.type is not None else None
    vlm.train(training)
    if load:
        load_start(settings, vlm, adapters, ema=ema)
    return Session(settings, shapes, groups, {MAIN: Model(vlm, adapters)})
