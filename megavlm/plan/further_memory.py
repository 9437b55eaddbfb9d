"""What is in a GPU's memory besides what is trained: copies of weights, models that only judge, and what samples.

What can be built without memory is built and counted. The copies of weights in FP8 and a server of vLLM cannot; their
sizes are computed here from the formats that Transformer Engine and vLLM document.
"""

import math
from collections.abc import Collection, Iterable

import torch
from torch import nn

from megavlm.align.sampling_checks import with_group_size
from megavlm.config.requirements import required
from megavlm.config.settings import Settings
from megavlm.config.speed_sections import Fp8Settings
from megavlm.convert.names import table
from megavlm.model.configs import DTYPES
from megavlm.model.vlm import VLM
from megavlm.rollout.blocks import blocks_for
from megavlm.rollout.memory import Memory
from megavlm.runtime.session import Session
from megavlm.tracing.static_memory import StaticCount
from megavlm.training.method import Method
from megavlm.training.start_weights import copied_weights

_BLOCK = 128  # numbers along each side of the weights that share a scale in the recipe blockwise
_GROUP = 32  # numbers that share a scale in the recipe mxfp8


def further_memory(session: Session, settings: Settings, method: Method, ranks: Collection[int]) -> int:
    """Bytes that the fullest of some ranks holds all the time besides what ``StaticCount`` counts of trained models.

    Args:
        session: of an absent rank, with the models that are trained.
        settings: the settings of the run, before ``that_can_be_absent``.
        method: the training method.
        ranks: those that are alike but for a server of vLLM, such as all ranks of a pipeline stage.
    """
    waiting = settings.align.offload  # in host memory while the model learns
    total = 0
    if method.keeps_start(settings) and "reference" not in waiting:
        total += sum(weight.nbytes for weight in copied_weights(session))
    if "reward" not in waiting:
        total += sum(_reward_model(session) for reward in settings.reward if reward.model is not None)
    if settings.train.precision == "fp8":
        total += sum(fp8_bytes(weight.shape, settings.train.fp8) for weight in _multiplied(session.vlm))
    return total + (_server_of_vllm(session, settings) if server_among(settings, ranks) else 0)


def sampling_memory(session: Session, settings: Settings, verb: str) -> int:
    """Bytes of keys and values that the built-in engine has at most; 0 if another engine samples, or none.

    A data-parallel rank answers as many prompts as it has at a time. Each may fill the row up to the longest answer.

    Args:
        session: of an absent rank.
        settings: the settings of the run.
        verb: "grpo" or "ppo".
    """
    rollout = with_group_size(settings, verb).rollout
    if rollout.engine != "megatron":
        return 0
    memory = Memory.of(session.vlm, rollout.cache_gib, "rollout.cache_gib")
    ranks = session.groups.dp_size * settings.parallel.context
    prompts = -(-required(rollout.prompts, "rollout.prompts") // ranks)
    answers = min(prompts * (rollout.group_size or 1), rollout.max_sequences)
    prompt = max(settings.data.seq_length - settings.answer_tokens, 1)
    needed = min(prompts, answers) * blocks_for(prompt) + answers * blocks_for(settings.answer_tokens)
    return min(needed, memory.blocks) * memory.block_bytes


def fp8_bytes(shape: Iterable[int], fp8: Fp8Settings) -> int:
    """Bytes of a weight's copies in FP8, with their scales, which exist from its first product of a step to its last.

    One copy is for the product of the forward pass and one, transposed, for that of the backward pass. On GPUs that
    multiply without transposing (Blackwell), the recipes tensorwise and delayed need one copy only.

    Args:
        shape: [out, in] of the weight.
        fp8: the settings.
    """
    out, inner = shape
    if fp8.recipe == "blockwise":  # a float32 for each block; the rows of scales have a multiple of four
        scales = 4 * sum(
            math.ceil(a / _BLOCK) * 4 * math.ceil(math.ceil(b / _BLOCK) / 4) for a, b in ((out, inner), (inner, out))
        )
    elif fp8.recipe == "mxfp8":  # a byte for each group, in tiles of 128 × 4
        scales = sum(
            128 * math.ceil(a / 128) * 4 * math.ceil(math.ceil(b / _GROUP) / 4) for a, b in ((out, inner), (inner, out))
        )
    else:
        scales = 4
    return 2 * out * inner + scales


def _multiplied(vlm: VLM) -> list[nn.Parameter]:
    """The weights of the decoder's linear layers and experts, which FP8 multiplies and keeps.

    Those of the tower, with ``train.fp8.tower``, are quantized for each product and not kept.
    """
    return [
        weight
        for chunk in vlm.language
        for name, weight in chunk.decoder.named_parameters()
        if ".linear_" in name and weight.dim() == 2 and "adapters." not in name and "router" not in name
    ]


def _reward_model(session: Session) -> int:
    """The weights of a reward model, which has the shapes and the layout of the main model."""
    with torch.device("meta"):
        vlm = VLM(session.shapes, session.settings, session.groups, score_head=True)
    return StaticCount()(vlm, None).weights


def server_among(settings: Settings, ranks: Collection[int]) -> bool:
    """Whether a server of vLLM that the run starts is on the GPU of any of these ranks.

    It is on the GPUs that ``rollout.vllm.devices`` names, otherwise on the first ones, of the host of rank 0.
    """
    rollout = settings.rollout
    if rollout.engine != "vllm" or rollout.vllm.url or rollout.prompts is None:
        return False
    devices = rollout.vllm.devices or range(rollout.vllm.servers * rollout.vllm.tensor_parallel)
    return any(device in ranks for device in devices)


def _server_of_vllm(session: Session, settings: Settings) -> int:
    """The weights, keys and values of a server of vLLM on one of its GPUs. Its other memory is not counted."""
    rollout = settings.rollout
    numbers = sum(math.prod(entry.shape) for entry in table(session.shapes))
    size = DTYPES[settings.train.precision].itemsize
    return numbers * size // rollout.vllm.tensor_parallel + int(rollout.cache_gib * 2**30)
