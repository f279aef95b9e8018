"""A random Qwen3-VL or Qwen3.5 of a million parameters as a model folder: the true classes, for tests that need no skill.

Nothing here imports torchvision: the processors are described by their configuration files, which whoever loads the
folder turns into objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from testbed.judge_model import CHAT_TEMPLATE, SPECIAL

PATCH, MERGE = 8, 2
MAX_LENGTH = 8192
THINKING_TEMPLATE = CHAT_TEMPLATE.replace(
    "<|im_start|>assistant\n",
    "<|im_start|>assistant\n<think>\n{% if enable_thinking is false %}\n\n</think>\n\n{% endif %}",
)
"""As Qwen3.5's: the reply begins with thoughts, unless the request says otherwise. (The line break after a mark of the template's is not text.)"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, and Qwen's special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*alphabet, *SPECIAL])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL),
        model_max_length=MAX_LENGTH,
    )


def qwen3_vl(ids: dict[str, int]) -> Qwen3VLForConditionalGeneration:
    """128 × 2 layers of text, 64 × 2 of vision; a 64×64 picture is 16 tokens."""
    text = {
        "vocab_size": 256 + len(SPECIAL), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "out_hidden_size": 128, "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_marks(ids)))


def qwen3_5(ids: dict[str, int]) -> Qwen3_5ForConditionalGeneration:
    """The same size, with a layer of linear attention before one of full attention."""
    text = {
        "vocab_size": 256 + len(SPECIAL), "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"], "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
        "linear_value_head_dim": 16, "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [4, 2, 2],
            "mrope_interleaved": True,
        },
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "out_hidden_size": 128, "num_position_embeddings": 64,
    }  # fmt: skip
    return Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **_marks(ids)))


def _marks(ids: dict[str, int]) -> dict[str, Any]:
    return {
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "tie_word_embeddings": True,
    }


def save_tiny_vlm(
    folder: Path, seed: int = 0, build: Callable[[dict[str, int]], Any] = qwen3_vl, chat_template: str = CHAT_TEMPLATE
) -> str:
    """Writes weights, tokenizer, chat template and processor settings; returns the folder as a judge takes it."""
    words = tokenizer()
    ids = {token: words.get_vocab()[token] for token in SPECIAL}
    torch.manual_seed(seed)
    model = build(ids).eval()
    model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(chat_template)
    pictures = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"shortest_edge": 32 * 32, "longest_edge": 256 * 256},
    }
    image = pictures | {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"}
    video = pictures | {"video_processor_type": "Qwen3VLVideoProcessor", "processor_class": "Qwen3VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(image))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return str(folder)
