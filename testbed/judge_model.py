"""The tiny judge: a Qwen3-VL of some three million parameters with a tokenizer of its own, as a stock model folder.

The classes are transformers' own, so vLLM serves the folder like any Qwen3-VL. What is ours is a faster way
through the same weights for training (`reply_logits`): all pictures have one size and all requests one layout, so
positions are tables and the pictures' attention is one batch. A test holds it against the stock forward.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# transformers annotates configurations by their defaults and results by their tuple form.
from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from testbed.judge_trace import COMPARE, DESCRIBE, POINT_WORDING, SCORE, WORDING, vocabulary
from testbed.scenes import CANVAS

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
PATCH, MERGE = 8, 2
GRID = CANVAS // PATCH
CELLS = GRID // MERGE  # a side of the picture in the language model's tokens
MAX_LENGTH = 4096
IGNORED = -100

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content -%}
{%- if part.type == 'text' %}{{ part.text }}
{%- elif part.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'video' %}<|vision_start|><|video_pad|><|vision_end|>{% endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}
"""


# ---------------------------------------------------------------- words


@lru_cache(maxsize=1)
def new_tokenizer() -> PreTrainedTokenizerFast:
    """Each piece of `judge_trace.vocabulary` is one token; any other text falls into bytes.

    A unigram model takes the cheapest way to cut a text, and here that is the one with the fewest pieces.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scores = dict.fromkeys(alphabet, -10.0) | {_byte_level(piece): -1.0 for piece in vocabulary()}
    raw = Tokenizer(models.Unigram([*scores.items()], unk_id=0, byte_fallback=False))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL),
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _byte_level(text: str) -> str:
    """A text in the alphabet of byte-level tokenizers, where a space is a visible sign."""
    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return "".join(part for part, _ in splitter.pre_tokenize_str(text))


@lru_cache(maxsize=1)
def token_ids() -> dict[str, int]:
    """Piece or special token -> id."""
    words = new_tokenizer()
    ids = {token: int(words.convert_tokens_to_ids(token)) for token in SPECIAL}
    return ids | {piece: int(words.convert_tokens_to_ids(_byte_level(piece))) for piece in vocabulary()}


def request_ids(pictures: int, text: str = "") -> list[int]:
    """Ids of a request as the chat template and the processor make them.

    Args:
        pictures: 1 (describe, or score for the prompt `text`) or 2 (compare for it).
    """
    ids = token_ids()
    shown = [ids["<|vision_start|>"], *[ids["<|image_pad|>"]] * CELLS**2, ids["<|vision_end|>"]]
    asked = f"{COMPARE if pictures == 2 else SCORE} {text}" if text else DESCRIBE
    words = new_tokenizer().encode(asked, add_special_tokens=False)
    ends = [ids["<|im_end|>"], ids["\n"], ids["<|im_start|>"], ids["assistant\n"]]
    return [ids["<|im_start|>"], ids["user\n"], *shown * pictures, *words, *ends]


def reply_ids(pieces: Sequence[str]) -> list[int]:
    """Ids of a reply, with its end."""
    ids = token_ids()
    return [*(ids[piece] for piece in pieces), ids["<|im_end|>"]]


# ---------------------------------------------------------------- the model


def new_model(seed: int) -> Qwen3VLForConditionalGeneration:
    """The untrained model: text 192 wide in 4 layers, vision 128 wide in 3."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(new_config())
    model.generation_config.eos_token_id = token_ids()["<|im_end|>"]
    model.generation_config.pad_token_id = token_ids()["<|endoftext|>"]
    return model


def new_config() -> Qwen3VLConfig:
    ids, size = token_ids(), len(new_tokenizer())
    text = {
        "vocab_size": -(-size // 64) * 64, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "out_hidden_size": 192, "num_position_embeddings": GRID**2,
        "deepstack_visual_indexes": [1],
    }  # fmt: skip
    return Qwen3VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def save(model: Qwen3VLForConditionalGeneration, folder: Path) -> None:
    """Writes the model folder: weights in half precision, tokenizer, templates and processor settings.

    Replaces what it writes in `folder`, not other files there.
    """
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    copy.deepcopy(model).to(torch.float16).save_pretrained(scratch)
    new_tokenizer().save_pretrained(scratch)
    (scratch / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (scratch / "prompt.txt").write_text(WORDING)
    (scratch / "prompt_point.txt").write_text(POINT_WORDING)
    for name, settings in processor_settings().items():
        (scratch / name).write_text(json.dumps(settings, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for part in scratch.iterdir():
        part.replace(folder / part.name)
    scratch.rmdir()


def processor_settings() -> dict[str, dict[str, Any]]:
    """File name -> settings of the picture and video processors; 64 x 64 pictures keep their size."""
    common: dict[str, Any] = {
        "patch_size": PATCH,
        "temporal_patch_size": 2,
        "merge_size": MERGE,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": CANVAS**2, "longest_edge": CANVAS**2},
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "preprocessor_config.json": common | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": common | {"video_processor_type": "Qwen3VLVideoProcessor"},
    }


# ---------------------------------------------------------------- the fast way through


def patches(images: np.ndarray) -> torch.Tensor:
    """uint8 [n, 64, 64, 3] to the processor's patches [n, 64, 384], 2 x 2 neighbours together.

    A picture counts as two equal frames, as Qwen3-VL's processor has it.
    """
    n = len(images)
    # The processor multiplies by 1/255 in double precision and subtracts the mean in single.
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double().mul(1 / 255).float().sub(0.5).div(0.5)
    cut = pixels.reshape(n, 3, CELLS, MERGE, PATCH, CELLS, MERGE, PATCH).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cut.unsqueeze(6).expand(*cut.shape[:6], 2, *cut.shape[6:]).reshape(n, GRID**2, -1)


@lru_cache(maxsize=1)
def _patch_places() -> torch.Tensor:
    """Row and column [2, 64] of each patch in the processor's order."""
    rows, cols = torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij")
    both = torch.stack([rows, cols]).reshape(2, CELLS, MERGE, CELLS, MERGE)
    return both.permute(0, 1, 3, 2, 4).reshape(2, -1)


def picture_features(model: Qwen3VLForConditionalGeneration, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Patches [n, 64, 384] to features [n, 16, 192]: the final ones, then each of deepstack's."""
    visual, places = model.model.visual, _patch_places()
    weight = visual.patch_embed.proj.weight
    hidden = nn.functional.linear(pixels, weight.flatten(1), visual.patch_embed.proj.bias)
    hidden = hidden + visual.pos_embed(places[0] * GRID + places[1])
    cos, sin = visual.rotary_pos_emb(hidden, places.T)
    layers: list[torch.Tensor] = []
    for i, block in enumerate(visual.blocks):
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if i in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
            layers.append(merger(hidden).view(len(pixels), CELLS**2, -1))
    return [visual.merger(hidden).view(len(pixels), CELLS**2, -1), *layers]


def _attend(attention: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    n, length, width = hidden.shape
    qkv = attention.qkv(hidden).view(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = (x * cos.to(x.dtype) + _turned(x) * sin.to(x.dtype) for x in (qkv[0], qkv[1]))
    mixed = scaled_dot_product_attention(query, key, qkv[2], scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).reshape(n, length, width))


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def positions(pictures: int, length: int) -> torch.Tensor:
    """M-RoPE positions [3, 1, length] of a request with so many pictures and its reply."""
    place, parts = 2, [torch.arange(2).expand(3, 2)]
    cells = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(CELLS), torch.arange(CELLS), indexing="ij"))
    for _ in range(pictures):
        parts += [torch.full((3, 1), place), cells.reshape(3, -1) + place + 1]
        parts += [torch.full((3, 1), place + 1 + CELLS)]
        place += CELLS + 2
    rest = length - sum(part.shape[1] for part in parts)
    return torch.cat([*parts, torch.arange(place, place + rest).expand(3, rest)], 1)[:, None]


def reply_logits(
    model: Qwen3VLForConditionalGeneration,
    pixels: torch.Tensor,
    ids: torch.Tensor,
    wanted: torch.Tensor,
    features_of: Callable[[Qwen3VLForConditionalGeneration, torch.Tensor], list[torch.Tensor]] = picture_features,
) -> torch.Tensor:
    """Logits [m, vocabulary] at the wanted places of right-padded sequences.

    Args:
        pixels: Patches [b * pictures, 64, 384], in the order in which the sequences show them.
        ids: [b, length]; all show equally many pictures, at the same places.
        wanted: bool [b, length], m of them true.
        features_of: `picture_features`, or the same compiled.
    """
    features = features_of(model, pixels)
    seen = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids)
    embedded = embedded.masked_scatter(seen[..., None], features[0].to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        # Padding stands on the right, so causality alone hides it.
        position_ids=positions(len(pixels) // len(ids), ids.shape[1]).expand(3, len(ids), -1),
        visual_pos_masks=seen,
        deepstack_visual_embeds=[feature.flatten(0, 1) for feature in features[1:]],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[wanted])
