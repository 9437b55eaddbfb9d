"""Converts between Hugging Face folders and Megatron checkpoints, with one table of names."""

from megavlm.convert.compare import Difference, compare
from megavlm.convert.convert import hf_layout, hf_to_mcore, mcore_to_hf
from megavlm.convert.hf_folder import HF_LAYOUT
from megavlm.convert.tensor_order import SHARDED_METADATA

__all__ = ["HF_LAYOUT", "SHARDED_METADATA", "Difference", "compare", "hf_layout", "hf_to_mcore", "mcore_to_hf"]
