"""Writes a tiny random Qwen3-VL in Hugging Face format: weights, config, tokenizer, processor and chat template.

Nothing is downloaded: the tokenizer is a byte-level BPE trained here on a few sentences, and the weights are drawn with
a seed. The folder is smaller than that of a released model, but it has the same files and behaviour, so all code that
reads a released folder can be run on it.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Regex as TokenizerRegex
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from megavlm.base.new_output import new_folder
from megavlm.demo.chat_template import CHAT_TEMPLATE

# In the order of the released vocabulary, where <|endoftext|> is 151643 and <|vision_start|> 151652.
SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
# Added tokens that are not special: `skip_special_tokens` keeps them.
MARKUP_TOKENS = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
    "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>",
)  # fmt: skip
VOCABULARY_MULTIPLE = 128  # as in released models, so that tensor-parallel sizes up to 128 divide it

TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    # The sections [24, 20, 20] of the 64 frequencies of released models, scaled to the 16 of this head dimension.
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5_000_000,
        "mrope_section": [6, 5, 5],
        "mrope_interleaved": True,
    },
}
TEXT_MOE = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}
VISION = {
    "depth": 4,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_heads": 2,
    "patch_size": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "num_position_embeddings": 2304,
    "deepstack_visual_indexes": [0, 1, 2],
}
SENTENCES = (
    "Which digit is this?", "What number do you see in the picture?", "The picture shows the digit 7.",
    "Describe the picture.", "A photograph of a cat, a cup of coffee, a rocket and the moon.",
    "The first picture is larger than the second one; the video shows a person walking through the garden.",
)  # fmt: skip


def make_model_folder(
    out: str | os.PathLike,
    *,
    text: dict | None = None,
    vision: dict | None = None,
    moe: bool = False,
    tied: bool = True,
    seed: int = 0,
    corpus: Iterable[str] = SENTENCES,
    vocab_size: int = 512,
    norm_noise: float = 0.0,
    dtype: str = "float32",
    min_pixels: int = 32 * 32,
    max_pixels: int = 256 * 256,
    max_shard_size: str = "5GB",
) -> Path:
    """Write the folder of a random Qwen3-VL that the Auto classes of transformers can load, and return its path.

    The same arguments give the same bytes.

    Args:
        out: the new folder.
        text: overrides single fields of `TEXT`, for example `{"initializer_range": 0.2}` (default: 1 / sqrt of the
            hidden size).
        vision: overrides single fields of `VISION`.
        moe: write a Qwen3-VL-MoE.
        tied: whether the output layer shares the weights of the embedding.
        seed: seed of the weights.
        corpus: texts from which the tokenizer learns its merges.
        vocab_size: maximum number of tokens, including the 26 added ones. The model's vocabulary is the actual number,
            rounded up to a multiple of 128.
        norm_noise: standard deviation of noise that is added to all one-dimensional weights. Without it, norms are 1
            and biases are 0, so that tests would not notice a missing one.
        dtype: name of the dtype of the weights.
        min_pixels: minimum size of a picture in the processor's configuration; for all frames of a video together, the
            minimum is 2 times this number.
        max_pixels: maximum size of a picture; for all frames of a video together, 16 times this number.
        max_shard_size: maximum size of a file of weights.

    Raises:
        UserError: `out` exists already.
    """
    out = Path(out)
    with new_folder(out, overwrite=False, mark="config.json") as unfinished:
        tokenizer = _tokenizer(corpus, vocab_size)
        config = _config(tokenizer, {**(TEXT_MOE if moe else {}), **(text or {})}, vision or {}, moe, tied)
        model = _random_model(config, moe, seed, norm_noise).to(getattr(torch, dtype))
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        _processor(tokenizer, config, min_pixels, max_pixels).save_pretrained(unfinished)
    return out


def _tokenizer(corpus: Iterable[str], vocab_size: int) -> Qwen2Tokenizer:
    """A byte-level BPE with Qwen's splitting rule, and with Qwen's added tokens after the trained vocabulary."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(TokenizerRegex(PRETOKENIZE_REGEX), behavior="isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS) - len(MARKUP_TOKENS),
        min_frequency=1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    # Added before the tokenizer class is built, so that they get their ids in this order.
    bpe.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in MARKUP_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        additional_special_tokens=list(SPECIAL_TOKENS[3:]),
        model_max_length=262144,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _config(tokenizer: Qwen2Tokenizer, text: dict, vision: dict, moe: bool, tied: bool) -> Qwen3VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    # The value 0.02 of released models suits widths around 2048; in a narrow model, almost no signal would remain.
    text = {**TEXT, **text}
    text.setdefault("initializer_range", text["hidden_size"] ** -0.5)
    text.setdefault("vocab_size", -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE)
    text |= {"bos_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    text |= {"pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": tied}
    vision = {**VISION, "out_hidden_size": text["hidden_size"], **vision}
    vision.setdefault("initializer_range", vision["hidden_size"] ** -0.5)
    return (Qwen3VLMoeConfig if moe else Qwen3VLConfig)(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=tied,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )


def _random_model(config: Qwen3VLConfig, moe: bool, seed: int, norm_noise: float) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = (Qwen3VLMoeForConditionalGeneration if moe else Qwen3VLForConditionalGeneration)(config)
        if norm_noise:
            with torch.no_grad():
                for weight in model.parameters():
                    if weight.ndim == 1:
                        weight += norm_noise * torch.randn_like(weight)
    text = config.text_config
    model.generation_config = GenerationConfig(
        bos_token_id=text.bos_token_id,
        eos_token_id=[text.eos_token_id, text.pad_token_id],
        pad_token_id=text.pad_token_id,
        do_sample=False,
    )
    return model


def _processor(tokenizer: Qwen2Tokenizer, config: Qwen3VLConfig, min_pixels: int, max_pixels: int) -> Qwen3VLProcessor:
    vision = config.vision_config
    patches = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.spatial_merge_size,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    image_size = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    # For a video, the limits apply to all frames together.
    video_size = {"shortest_edge": min_pixels * vision.temporal_patch_size, "longest_edge": max_pixels * 16}
    return Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(size=image_size, **patches),
        tokenizer=tokenizer,
        video_processor=Qwen3VLVideoProcessor(size=video_size, fps=2, **patches),
        chat_template=CHAT_TEMPLATE,
    )
