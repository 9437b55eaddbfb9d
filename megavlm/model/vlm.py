"""The model on one rank: vision tower, projector, the decoder's chunks, and the tower's phase of a step."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megavlm.config.settings import Settings
from megavlm.layout.frame_balance import RankShare
from megavlm.model.configs import decoder_config, tower_config
from megavlm.model.kernels import provider, resolve
from megavlm.model.language import LanguageModel
from megavlm.model.projector import Projector
from megavlm.model.shapes import Shapes
from megavlm.model.tower_phase import TowerPhase
from megavlm.model.vision import VisionTower
from megavlm.platform import Groups, device
from megavlm.platform.host_states import HostStates

PARTS = ("vision", "projector", "language")


class VLM:
    """The model on one rank.

    Args:
        shapes: the model's shapes.
        settings: the settings of the run (sections model, adapter, parallel, vision and train).
        groups: process groups from ``megavlm.platform.init``.
        share_frames: whether ``vision.balance`` may have an effect. Data-parallel ranks that share frames must run the
            same number of steps.
        score_head: whether to add the head of a reward model, which is trained even if the decoder is frozen.

    Attributes:
        vision, projector: modules that every rank has whole.
        language: one LanguageModel for each virtual pipeline chunk.
        tower: runs vision and projector on the frames of this rank.
        scores: whether the model has the head of a reward model.
        resize_vocabulary: whether a checkpoint may have fewer rows of word embedding and output layer.
    """

    def __init__(
        self,
        shapes: Shapes,
        settings: Settings,
        groups: Groups,
        *,
        share_frames: bool = True,
        score_head: bool = False,
    ) -> None:
        parallel = settings.parallel
        self.shapes, self.groups, self.parallel = shapes, groups, parallel
        self.scores, self.resize_vocabulary = score_head, settings.model.resize_vocabulary
        self.kernels = resolve(settings.model.kernels, settings.train.precision)
        kernels = provider(self.kernels, settings.adapter)
        self.decoder_config = decoder_config(
            shapes,
            parallel,
            settings.train,
            self.kernels,
            grouped_experts=kernels.grouped_experts,
            fused_gradients=kernels.fused_gradients,
        )
        vision_config = tower_config(shapes, settings.train, self.kernels, fused_gradients=kernels.fused_gradients)

        self.vision = VisionTower(shapes.vision, vision_config, kernels, groups.tower).to(device())
        self.projector = Projector(shapes.vision, vision_config).to(device())
        # Megatron initialises linear layers with a generator that differs between tensor ranks: make the replicas equal
        for module in (self.vision, self.projector):
            for parameter in module.parameters():
                dist.broadcast(parameter.data, src=0)
        pipeline = groups.language.pp
        last_chunk = (parallel.virtual_pipeline or 1) - 1
        host_states = HostStates() if settings.train.offload_activations else None
        self.language = [
            LanguageModel(
                shapes,
                self.decoder_config,
                kernels,
                groups.language,
                pre_process=pipeline.rank() == 0 and not vp_stage,
                post_process=pipeline.rank() == pipeline.size() - 1 and (vp_stage or 0) == last_chunk,
                vp_stage=vp_stage,
                score_head=score_head,
                host_states=host_states,
            ).to(device())
            for vp_stage in self._chunks()
        ]
        for part in settings.model.freeze:
            for module in self.modules_of(part):
                module.requires_grad_(False)
        for chunk in self.language:
            if hasattr(chunk, "score_head"):
                chunk.score_head.requires_grad_(True)
                if not shapes.tied:  # scores do not use it, so without gradients only weight decay would change it
                    chunk.output_layer.requires_grad_(False)
        self.sharing = groups.sharing if share_frames and settings.vision.balance == "world" else None
        self.tower = TowerPhase(
            self.vision,
            self.projector,
            self.sharing.ranks if self.sharing is not None else groups.model_parallel,
            self._shares(),
            recompute=settings.vision.recompute,
            chunk_patches=settings.vision.chunk_patches,
            offload=settings.vision.offload,
        )

    def modules_of(self, part: str) -> Sequence[torch.nn.Module]:
        """The modules of a part: ``vision``, ``projector`` or ``language``."""
        return self.language if part == "language" else [getattr(self, part)]

    def train(self, mode: bool = True) -> "VLM":
        """Puts all modules into training mode, or into evaluation mode."""
        for part in PARTS:
            for module in self.modules_of(part):
                module.train(mode)
        return self

    @property
    def linear_cost(self) -> float:
        """The cost of a patch's matrix products per tower layer, in units of one query-key pair (``balance_frames``).

        In a layer, a pair costs 2 × hidden multiplications and a patch 4 × hidden² + 2 × hidden × ffn. In each merger a
        patch costs a quarter of joined² + joined × out.
        """
        vision = self.shapes.vision
        mergers = (1 + len(vision.deepstack_layers)) * vision.merged_hidden * (vision.merged_hidden + vision.out_hidden)
        per_patch = mergers / (vision.merged_hidden // vision.hidden)
        return 2.0 * vision.hidden + vision.ffn + per_patch / (2.0 * vision.hidden * vision.layers)

    def chunk_levels(self, pipeline_rank: int, vp_stage: int | None) -> list[int]:
        """The deepstack levels whose decoder layers are in this pipeline chunk."""
        config = self.decoder_config
        first = get_transformer_layer_offset(config, vp_stage, pipeline_rank)
        end = first + get_num_layers_to_build(config, vp_stage, pipeline_rank)
        return [k for k in range(len(self.shapes.vision.deepstack_layers)) if first <= k < end]

    def _chunks(self) -> Sequence[int | None]:
        """Indices of the virtual pipeline chunks on a rank; [None] without virtual pipeline stages."""
        count = self.parallel.virtual_pipeline
        return range(count) if count else [None]

    def _shares(self) -> list[RankShare]:
        """What each rank of the group that shares the frames needs."""
        shares = self.shares_of_a_row()
        if self.sharing is None:
            return shares
        by_rank = {
            rank: replace(share, dp_rank=dp_rank)
            for dp_rank, ranks in enumerate(self.sharing.members)
            for rank, share in zip(ranks, shares, strict=True)
        }
        return [by_rank[rank] for rank in range(len(by_rank))]

    def shares_of_a_row(self) -> list[RankShare]:
        """The shares in a model-parallel group, whose ranks count tensor fastest, then context, then pipeline."""
        parallel = self.parallel
        shares = []
        for pipeline_rank in range(parallel.pipeline):
            levels = [k for chunk in self._chunks() for k in self.chunk_levels(pipeline_rank, chunk)]
            planes = ((0,) if pipeline_rank == 0 else ()) + tuple(1 + k for k in levels)
            for context_rank, tensor_rank in itertools.product(range(parallel.context), range(parallel.tensor)):
                if parallel.sequence_parallel:
                    cut, gives_gradient = (parallel.tensor, tensor_rank), True
                else:
                    cut, gives_gradient = (1, 0), tensor_rank == 0
                shares.append(RankShare(parallel.context, context_rank, *cut, planes, gives_gradient))
        return shares

    def sharded_state_dict(self, metadata: dict) -> dict:
        """Megatron's ShardedTensors of all weights."""
        metadata = {**metadata, "alone": self.groups.tower.tp}
        replicated = {**metadata, "dp_cp_group": self.groups.tower.dp_cp}
        shards = {
            **self.vision.sharded_state_dict("vision.", metadata=replicated),
            **self.projector.sharded_state_dict("projector.", metadata=replicated),
        }
        for index, chunk in enumerate(self.language):
            part = chunk.sharded_state_dict(
                "language.", metadata={**metadata, "dp_cp_group": self.groups.language.dp_cp}
            )
            # each chunk counts its layers from 0, so the names need the chunk; the shards' own keys are global
            shards |= {f"{index}/{name}": value for name, value in part.items()}
        # TE's entries, numbered for experts: empty without delayed FP8 scaling, and not in what is converted from HF
        return {name: value for name, value in shards.items() if not re.search(r"\._extra_state\d*$", name)}

    def load_sharded(self, loaded: dict) -> None:
        """Loads what ``dist_checkpointing.load`` returned for all or some entries of ``sharded_state_dict``."""
        modules: dict[str, torch.nn.Module] = {"vision.": self.vision, "projector.": self.projector}
        modules |= {f"{index}/language.": chunk for index, chunk in enumerate(self.language)}
        for prefix, module in modules.items():
            part = {name.removeprefix(prefix): value for name, value in loaded.items() if name.startswith(prefix)}
            result = module.load_state_dict(part, strict=False)
            assert not result.unexpected_keys, f"{prefix}: {result.unexpected_keys[:3]}"
