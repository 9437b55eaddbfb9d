"""Importing this imports TE with the answers of this package, then all that other tests' processes have."""
# ruff: noqa: E402 (imports in the order in which they must happen)

import dataclasses
import importlib
import os
from contextlib import nullcontext

import torch  # first: it has loaded the CUDA libraries that TE's need, so LD_LIBRARY_PATH can stay as it is

from te_cpu import counted, permutation

os.environ["NVTE_PLUGIN"] = "te_cpu"  # see te_cpu.load_plugins; to be set before the next lines

from transformer_engine.pytorch import distributed
from transformer_engine.pytorch.attention.dot_product_attention import backends, context_parallel, utils
from transformer_engine.pytorch.module import grouped_linear, layernorm_linear, linear
from transformer_engine.pytorch.triton import permutation as triton_permutation

extension = importlib.import_module("transformer_engine_torch")
assert not hasattr(extension.generic_gemm, "__self__"), "TE ignores NVTE_PLUGIN: is it older than 2.20?"

for answer in permutation.ANSWERS:
    assert hasattr(triton_permutation, answer.__name__)
    setattr(triton_permutation, answer.__name__, counted(answer))

choose, communicate = utils.get_attention_backend, context_parallel.flash_attn_p2p_communicate
coalesce = torch.distributed._coalescing_manager


def as_in_bf16(parameters):
    """TE's choice for bfloat16. Tests compare in float32, for which TE has only attention of memory S × S."""
    return choose(dataclasses.replace(parameters, qkv_dtype=torch.bfloat16))


class Once:
    """A request that may be waited for again, as TE does with those of NCCL. With those of gloo it would never end."""

    def __init__(self, request):
        self.request = request

    def wait(self):
        if self.request is not None:
            self.request.wait()
            self.request = None


def one_by_one(group=None, device=None, async_ops=False):
    """For collectives that NCCL would send as one: TE gathers blocks in FP8 and their scales in this way."""
    return coalesce(group, device, async_ops) if device is None else nullcontext(Once(None))


def stand_in(shape, dtype, zero=False):
    """For a gradient that is in the buffer already: NaN, as nobody may use it. (TE's own asks for a GPU.)"""
    return torch.full(shape, 0.0 if zero else torch.nan, dtype=dtype)


for module in (grouped_linear, layernorm_linear, linear):
    assert hasattr(module, "get_dummy_wgrad")
    module.get_dummy_wgrad = stand_in
for name, on_cpu in (("_get_cuda_rng_state", torch.get_rng_state), ("_set_cuda_rng_state", torch.set_rng_state)):
    assert hasattr(distributed, name)  # TE's recomputation, with which Megatron recomputes layers in FP8
    setattr(distributed, name, lambda *args, on_cpu=on_cpu, **kwargs: on_cpu(*args))
torch.distributed._coalescing_manager = one_by_one
utils.get_attention_backend = as_in_bf16
backends.all = lambda checks: True  # in that module: FusedAttention asserts in this way that all have 16 bits
context_parallel.flash_attn_p2p_communicate = lambda *args: [Once(request) for request in communicate(*args)]

import preload  # noqa: F401 (Megatron and megavlm, once TE is there)

from megavlm.model import kernels
from megavlm.platform import cpu

kernels.on_gpu = lambda: True  # so model.kernels may be te
without_transformer_engine = cpu.without_transformer_engine
cpu.without_transformer_engine = lambda: []  # TE's, whose kernels have answers here
