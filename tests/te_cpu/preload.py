"""Importing this imports TE with the answers of this package, then all that other tests' processes have."""

import dataclasses
import importlib
import os

import torch  # first: it has loaded the CUDA libraries that TE's need, so LD_LIBRARY_PATH can stay as it is

from te_cpu import counted, permutation

os.environ["NVTE_PLUGIN"] = "te_cpu"  # see te_cpu.load_plugins

from transformer_engine.pytorch.attention.dot_product_attention import backends, utils
from transformer_engine.pytorch.triton import permutation as triton_permutation

extension = importlib.import_module("transformer_engine_torch")
assert not hasattr(extension.generic_gemm, "__self__"), "TE ignores NVTE_PLUGIN: is it older than 2.20?"

for answer in permutation.ANSWERS:
    assert hasattr(triton_permutation, answer.__name__)
    setattr(triton_permutation, answer.__name__, counted(answer))

choose = utils.get_attention_backend


def as_in_bf16(parameters):
    """TE's choice for bfloat16. Tests compare in float32, for which TE has only attention of memory S × S."""
    return choose(dataclasses.replace(parameters, qkv_dtype=torch.bfloat16))


utils.get_attention_backend = as_in_bf16
backends.all = lambda checks: True  # in its own module: FusedAttention asserts in this way that all have 16 bits

import preload  # noqa: E402, F401 (Megatron and megavlm, once TE is there)

from megavlm.model import kernels  # noqa: E402

kernels.on_gpu = lambda: True  # so model.kernels may be te
