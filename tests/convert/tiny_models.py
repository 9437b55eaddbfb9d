"""Small random Hugging Face folders, written by transformers itself."""

import torch
from transformers import (
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

VISION = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 48,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 2],
}
TEXT = {
    "vocab_size": 64,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e6,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
# layer 1 stays dense, as `mlp_only_layers` allows; 2 × 20 rows and 48 columns, so a transpose is noticed
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [1]}


def make_config(moe=False, tied=False, vision=None, **text):
    kind = Qwen3VLMoeConfig if moe else Qwen3VLConfig
    text = {**TEXT, **(MOE if moe else {}), **text}
    return kind(text_config=text, vision_config={**VISION, **(vision or {})}, tie_word_embeddings=tied)


def make_folder(path, moe=False, tied=False, dtype=torch.float32, shards=True, **text):
    """A model whose weights are all random, including norms and biases. ``shards``: in several files with an index."""
    torch.manual_seed(0)
    kind = Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration
    model = kind(make_config(moe, tied, **text)).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.save_pretrained(path, max_shard_size="100KB" if shards else "1GB")
    (path / "preprocessor_config.json").write_text('{"patch_size": 4}')
    (path / "chat_template.jinja").write_text("{{ messages }}")
    return path
