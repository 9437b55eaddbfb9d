"""The Qwen3 decoder: Megatron's embedding, TransformerBlock and output layer, with MRoPE and deepstack."""

import copy
from contextlib import AbstractContextManager, nullcontext

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlock,
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megavlm.model.kernels import Kernels
from megavlm.model.layers import DeepstackLayer, layer_submodules
from megavlm.model.packed import PackedRow
from megavlm.model.rope import InterleavedMRoPE
from megavlm.model.score_head import ScoreHead
from megavlm.model.shapes import Shapes
from megavlm.model.targets import Targets
from megavlm.model.token_logprobs import token_kl, token_logprobs, vocabulary_logits
from megavlm.platform.host_states import HostStates


class LanguageModel(LanguageModule):
    """One pipeline chunk of the decoder; the whole decoder if ``parallel.pipeline`` is 1.

    Args:
        shapes: the model's shapes.
        config: configuration from ``decoder_config``.
        kernels: provider of the layers.
        groups: process groups of the decoder.
        pre_process: whether this chunk has the word embedding.
        post_process: whether this chunk has the final norm and the output layer.
        vp_stage: index of the chunk on its rank with virtual pipeline stages; otherwise None.
        score_head: whether the last chunk also has the head of a reward model.
        host_states: has the inputs of recomputed layers in host memory until the backward pass; None: they stay.
    """

    inputs_need_grad = False
    """True if only adapters are trained: a recomputed layer has gradients only if its input requires them."""

    embedded_tokens = 32768
    """Maximum number of tokens whose full embeddings are on a rank at a time, before sequence parallelism cuts them."""

    def __init__(
        self,
        shapes: Shapes,
        config: TransformerConfig,
        kernels: Kernels,
        groups: ProcessGroupCollection,
        *,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        score_head: bool = False,
        host_states: HostStates | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=groups)
        text = shapes.text
        self.model_type = ModelType.encoder_or_decoder  # read by Megatron's schedules
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = shapes.tied
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=text.vocab,
                max_sequence_length=text.max_positions,
                position_embedding_type="none",
                tp_group=groups.tp,
            )
        self.rope = InterleavedMRoPE(text.head_dim, text.rope_theta, text.mrope_section, text.rope_scaling)
        self.decoder = TransformerBlock(
            config=config,
            spec=_block_submodules(shapes, config, kernels, groups, vp_stage),
            pre_process=pre_process,
            post_process=post_process,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if post_process:
            own = copy.copy(config)
            own.gradient_accumulation_fusion = False  # Megatron's layer would need apex for it
            self.output_layer = ColumnParallelLinear(
                text.hidden,
                text.vocab,
                config=own,
                init_method=config.init_method,
                bias=False,
                skip_weight_param_allocation=pre_process and shapes.tied,
                tp_group=groups.tp,
            )
        if post_process and score_head:
            self.score_head = ScoreHead(text.hidden, config.params_dtype, sequence_parallel=config.sequence_parallel)
        self.host_states = host_states
        self.setup_embeddings_and_output_layer()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor]) -> None:
        """Takes the hidden states of the previous stage. Megatron's schedules call this."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        row: PackedRow,
        visual: Tensor | None = None,
        deepstack: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Computes the hidden states of one row.

        Args:
            input_ids: int64 [T]; with context parallelism only the tokens of this rank (see ``RowCut``).
            position_ids: int64 [3, T], for the same tokens.
            row: the segments of the row, and ``visual_positions`` [N] in this rank's slice.
            visual: [N, hidden], embeddings that replace the visual placeholders in this slice.
            deepstack: [levels of this chunk, N, hidden], or None.
            padding_mask: bool [1, t], true for padding in this rank's slice, which the MoE balancing loss ignores.

        Returns:
            [t, 1, hidden], on the last stage after the final norm. t is the length of this rank's slice: T, divided by
            the number of tensor ranks with sequence parallelism.
        """
        hidden = None
        if self.pre_process:
            hidden = self._embed(input_ids)
            if visual is not None:
                assert row.visual_positions is not None
                hidden = hidden.index_copy(0, row.visual_positions, visual.unsqueeze(1).to(hidden.dtype))
            if self.inputs_need_grad and torch.is_grad_enabled() and not hidden.requires_grad:
                hidden = hidden.detach().requires_grad_(True)
        with self._inputs_on_host(hidden if hidden is not None else self.decoder.input_tensor):
            return self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                context=deepstack,
                rotary_pos_emb=self.rope(position_ids),
                packed_seq_params=row,
                padding_mask=padding_mask,
            )

    def _inputs_on_host(self, hidden: Tensor) -> AbstractContextManager[None]:
        if self.host_states is None:
            return nullcontext()
        return self.host_states.of(hidden.shape, len(self.decoder.layers), received=not self.pre_process)

    def _embed(self, input_ids: Tensor) -> Tensor:
        """[T] -> [t, 1, hidden]. With sequence parallelism in several parts, each with a piece of every slice."""
        slices = self.tp_group.size() if self.config.sequence_parallel else 1
        parts = input_ids.view(slices, -1).split(max(1, self.embedded_tokens // slices), dim=1)
        if slices == 1 or len(parts) == 1:
            return self.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)
        return torch.cat([self.embedding(input_ids=part.reshape(1, -1), position_ids=None) for part in parts])

    @property
    def output_weight(self) -> Tensor:
        """The output weight [vocabulary / tensor, hidden]; in tied models the word embedding."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )

    def token_logprobs(
        self, hidden: Tensor, targets: Targets, chunk_tokens: int, entropy: bool = False, temperature: float = 1.0,
        sums: bool = False,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """The log-probabilities of a row's targets; see ``megavlm.model.token_logprobs``."""
        return token_logprobs(
            hidden.squeeze(1), self.output_weight, targets, self.tp_group,
            sequence_parallel=self.config.sequence_parallel, chunk_tokens=chunk_tokens, entropy=entropy,
            temperature=temperature, sums=sums,
        )  # fmt: skip

    def token_kl(
        self, hidden: Tensor, start_states: Tensor, start_weight: Tensor, targets: Targets, chunk_tokens: int
    ) -> Tensor:
        """The KL divergence from another model at a row's targets; see ``megavlm.model.token_logprobs``."""
        return token_kl(
            hidden.squeeze(1), self.output_weight, start_states, start_weight, targets, self.tp_group,
            sequence_parallel=self.config.sequence_parallel, chunk_tokens=chunk_tokens,
        )  # fmt: skip

    def scores(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """The scores of tokens, float32 [n]; 0 for tokens that are on other ranks.

        Args:
            hidden: [t, 1, hidden], this rank's slice of the row.
            positions: int64 [n], position of each token in the slice; -1 if it is on another rank.
        """
        return self.score_head(hidden.squeeze(1)[positions.clamp(min=0)]) * (positions >= 0)

    def logits(self, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits float32 [n, vocabulary] at positions [n] of the whole row, on every tensor rank. Only to generate."""
        return vocabulary_logits(
            hidden.squeeze(1), self.output_weight, positions, self.tp_group, self.config.sequence_parallel
        )


def _block_submodules(
    shapes: Shapes,
    config: TransformerConfig,
    kernels: Kernels,
    groups: ProcessGroupCollection,
    vp_stage: int | None,
) -> TransformerBlockSubmodules:
    """The specs of the layers of this chunk. config.json says for each index whether the layer is dense or MoE."""
    make = {
        is_moe: ModuleSpec(
            module=DeepstackLayer,
            submodules=layer_submodules(kernels, rms_norm=True, qk_norm=True, causal=True, moe=is_moe),
        )
        for is_moe in {shapes.text.is_moe_layer(i) for i in range(shapes.text.layers)}
    }
    first = get_transformer_layer_offset(config, vp_stage, groups.pp.rank())
    count = get_num_layers_to_build(config, vp_stage, groups.pp.rank())
    return TransformerBlockSubmodules(
        layer_specs=[make[shapes.text.is_moe_layer(i)] for i in range(first, first + count)],
        layer_norm=kernels.layer_norm(rms_norm=True, for_qk=False),
    )
