"""The tiny judges: a Qwen3-VL of some three million parameters with a tokenizer of its own, as a stock model folder.

There is one for pictures and one for clips; what tells them apart is a `Form`. The classes are transformers' own, so vLLM serves the folder like any Qwen3-VL. What is ours is a faster way
through the same weights, by which the judge of clips is trained (`reply_logits`): all pictures of a judge have one size and all requests one layout, so
positions are tables and the pictures' attention is one batch. A test holds it against the stock forward.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalMemberAccess=false, reportCallIssue=false
# transformers annotates configurations by their defaults and results by their tuple form.
from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from reward_server.families.flex import Flex
from testbed import clips, judge_trace, scenes, video_judge_trace

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MAX_LENGTH = 4096

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


@dataclass(frozen=True, kw_only=True, eq=False)
class Form:
    """What tells one tiny judge from another: its language, and how its pictures are cut.

    `side` is a picture's width and height and `patch` that of its patches, both in pixels; `merge` x `merge` patches are
    one token of the language model. `pictures` is how many show one candidate, `max_tokens` how long a reply may be.
    `wordings` are the files with the families' wordings that are saved beside the weights.
    """

    pieces: Sequence[str]
    side: int
    patch: int
    merge: int
    pictures: int
    max_tokens: int
    describe: str
    compare: str
    score: str
    wordings: Mapping[str, str]

    @property
    def grid(self) -> int:
        """A picture's side in patches."""
        return self.side // self.patch

    @property
    def cells(self) -> int:
        """A picture's side in the language model's tokens."""
        return self.grid // self.merge

    @property
    def grid_thw(self) -> list[int]:
        """A picture's grid as the processor gives it."""
        return [1, self.grid, self.grid]


PICTURES = Form(
    pieces=judge_trace.vocabulary(),
    side=scenes.CANVAS,
    patch=8,
    merge=2,
    pictures=1,
    max_tokens=64,
    describe=judge_trace.DESCRIBE,
    compare=judge_trace.COMPARE,
    score=judge_trace.SCORE,
    wordings={"prompt.txt": judge_trace.WORDING, "prompt_point.txt": judge_trace.POINT_WORDING},
)
"""The judge of pictures: 64 x 64 pixels, 16 tokens."""
CLIPS = Form(
    pieces=video_judge_trace.vocabulary(),
    side=clips.SIDE,
    patch=12,
    merge=2,
    pictures=Flex(medium="video").frames,
    max_tokens=128,
    describe=video_judge_trace.DESCRIBE,
    compare=video_judge_trace.COMPARE,
    score="",
    wordings={"prompt.txt": video_judge_trace.WORDING},
)
"""The judge of clips: 8 frames of 48 x 48 pixels, 4 tokens each."""


# ---------------------------------------------------------------- words


@lru_cache
def new_tokenizer(form: Form = PICTURES) -> PreTrainedTokenizerFast:
    """Each of the form's pieces is one token; any other text falls into bytes.

    A unigram model takes the cheapest way to cut a text, and here that is the one with the fewest pieces.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    scores = dict.fromkeys(alphabet, -10.0) | {_byte_level(piece): -1.0 for piece in form.pieces}
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


@lru_cache
def token_ids(form: Form = PICTURES) -> dict[str, int]:
    """Piece or special token -> id."""
    words = new_tokenizer(form)
    ids = {token: int(words.convert_tokens_to_ids(token)) for token in SPECIAL}
    return ids | {piece: int(words.convert_tokens_to_ids(_byte_level(piece))) for piece in form.pieces}


def request_ids(candidates: int, text: str = "", form: Form = PICTURES) -> list[int]:
    """Ids of a request as the chat template and the processor make them.

    Args:
        candidates: 1 (describe, or score for the prompt `text`) or 2 (compare for it).
    """
    ids = token_ids(form)
    shown = [ids["<|vision_start|>"], *[ids["<|image_pad|>"]] * form.cells**2, ids["<|vision_end|>"]]
    asked = f"{form.compare if candidates == 2 else form.score} {text}" if text else form.describe
    words = new_tokenizer(form).encode(asked, add_special_tokens=False)
    ends = [ids["<|im_end|>"], ids["\n"], ids["<|im_start|>"], ids["assistant\n"]]
    return [ids["<|im_start|>"], ids["user\n"], *shown * (candidates * form.pictures), *words, *ends]


def reply_ids(pieces: Sequence[str], form: Form = PICTURES) -> list[int]:
    """Ids of a reply, with its end."""
    ids = token_ids(form)
    return [*(ids[piece] for piece in pieces), ids["<|im_end|>"]]


# ---------------------------------------------------------------- the model


def new_model(seed: int, form: Form = PICTURES) -> Qwen3VLForConditionalGeneration:
    """The untrained model: text 192 wide in 4 layers, vision 128 wide in 3."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(new_config(form))
    model.generation_config.eos_token_id = token_ids(form)["<|im_end|>"]
    model.generation_config.pad_token_id = token_ids(form)["<|endoftext|>"]
    return model


@torch.no_grad()
def extended(
    model: Qwen3VLForConditionalGeneration, form: Form, folder: Path, before: Form
) -> Qwen3VLForConditionalGeneration:
    """An untrained model of a form, with all that fits of a saved judge's weights, whose form is `before`; in place.

    Pieces that both languages have keep their vectors. Patches and places are interpolated: a filter then sees what it saw,
    larger, and answers as strongly.
    """
    known = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).state_dict()
    old, new = token_ids(before), token_ids(form)
    shared = sorted(old.keys() & new.keys())
    for name, weight in model.state_dict().items():  # which shares its memory with the model
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            weight[[new[piece] for piece in shared]] = known[name][[old[piece] for piece in shared]]
        elif name.endswith("patch_embed.proj.weight"):
            weight.copy_(_resized(known[name].flatten(0, 2)[:, None], form.patch).reshape(weight.shape))
            weight.mul_((before.patch / form.patch) ** 2)
        elif name.endswith("visual.pos_embed.weight"):
            places = known[name].T.reshape(1, -1, before.grid, before.grid)
            weight.copy_(_resized(places, form.grid).flatten(2)[0].T)
        else:
            weight.copy_(known[name])
    return model


def _resized(maps: torch.Tensor, side: int) -> torch.Tensor:
    return nn.functional.interpolate(maps, size=(side, side), mode="bilinear", antialias=True)


def new_config(form: Form = PICTURES) -> Qwen3VLConfig:
    ids, size = token_ids(form), len(new_tokenizer(form))
    text = {
        "vocab_size": -(-size // 64) * 64, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": MAX_LENGTH,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "eos_token_id": ids["<|im_end|>"], "pad_token_id": ids["<|endoftext|>"], "tie_word_embeddings": True,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "patch_size": form.patch,
        "spatial_merge_size": form.merge, "out_hidden_size": 192, "num_position_embeddings": form.grid**2,
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


def save(model: Qwen3VLForConditionalGeneration, folder: Path, form: Form = PICTURES) -> None:
    """Writes the model folder: weights in half precision, tokenizer, templates and processor settings.

    Replaces what it writes in `folder`, not other files there.
    """
    scratch = folder.with_name(folder.name + ".new")
    shutil.rmtree(scratch, ignore_errors=True)
    copy.deepcopy(model).to(torch.float16).save_pretrained(scratch)
    new_tokenizer(form).save_pretrained(scratch)
    (scratch / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    for name, wording in form.wordings.items():
        (scratch / name).write_text(wording)
    for name, settings in processor_settings(form).items():
        (scratch / name).write_text(json.dumps(settings, indent=1) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    for part in scratch.iterdir():
        part.replace(folder / part.name)
    scratch.rmdir()


def processor_settings(form: Form = PICTURES) -> dict[str, dict[str, Any]]:
    """File name -> settings of the picture and video processors; pictures of the form's side keep their size."""
    common: dict[str, Any] = {
        "patch_size": form.patch,
        "temporal_patch_size": 2,
        "merge_size": form.merge,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "size": {"shortest_edge": form.side**2, "longest_edge": form.side**2},
        "processor_class": "Qwen3VLProcessor",
    }
    return {
        "preprocessor_config.json": common | {"image_processor_type": "Qwen2VLImageProcessorFast"},
        "video_preprocessor_config.json": common | {"video_processor_type": "Qwen3VLVideoProcessor"},
    }


# ---------------------------------------------------------------- the fast way through


def patches(images: np.ndarray, form: Form = PICTURES) -> torch.Tensor:
    """uint8 [n, side, side, 3] to the processor's patches [n, grid^2, 6 patch^2], `merge` x `merge` neighbours together.

    A picture counts as two equal frames, as Qwen3-VL's processor has it.
    """
    n, cells, merge, patch = len(images), form.cells, form.merge, form.patch
    # The processor multiplies by 1/255 in double precision and subtracts the mean in single.
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).double().mul(1 / 255).float().sub(0.5).div(0.5)
    cut = pixels.reshape(n, 3, cells, merge, patch, cells, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    return cut.unsqueeze(6).expand(*cut.shape[:6], 2, *cut.shape[6:]).reshape(n, form.grid**2, -1)


@lru_cache
def _patch_places(grid: int, merge: int) -> torch.Tensor:
    """Row and column [2, grid^2] of each patch in the processor's order."""
    rows, cols = torch.meshgrid(torch.arange(grid), torch.arange(grid), indexing="ij")
    both = torch.stack([rows, cols]).reshape(2, grid // merge, merge, grid // merge, merge)
    return both.permute(0, 1, 3, 2, 4).reshape(2, -1)


def picture_features(model: Qwen3VLForConditionalGeneration, pixels: torch.Tensor) -> list[torch.Tensor]:
    """Patches [n, grid^2, 6 patch^2] to features [n, cells^2, 192]: the final ones, then each of deepstack's."""
    visual = model.model.visual
    grid, merge = visual.num_grid_per_side, visual.spatial_merge_size
    places, cells = _patch_places(grid, merge), grid // merge
    weight = visual.patch_embed.proj.weight
    hidden = nn.functional.linear(pixels, weight.flatten(1), visual.patch_embed.proj.bias)
    hidden = hidden + visual.pos_embed(places[0] * grid + places[1])
    cos, sin = visual.rotary_pos_emb(hidden, places.T)
    layers: list[torch.Tensor] = []
    for i, block in enumerate(visual.blocks):
        hidden = hidden + _attend(block.attn, block.norm1(hidden), cos, sin)
        hidden = hidden + block.mlp(block.norm2(hidden))
        if i in visual.deepstack_visual_indexes:
            merger = visual.deepstack_merger_list[visual.deepstack_visual_indexes.index(i)]
            layers.append(merger(hidden).view(len(pixels), cells**2, -1))
    return [visual.merger(hidden).view(len(pixels), cells**2, -1), *layers]


def _attend(attention: nn.Module, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    n, length, width = hidden.shape
    qkv = attention.qkv(hidden).view(n, length, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = (x * cos.to(x.dtype) + _turned(x) * sin.to(x.dtype) for x in (qkv[0], qkv[1]))
    mixed = scaled_dot_product_attention(query, key, qkv[2], scale=attention.scaling)
    return attention.proj(mixed.transpose(1, 2).reshape(n, length, width))


def _turned(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), -1)


def positions(pictures: int, cells: int, length: int) -> torch.Tensor:
    """M-RoPE positions [3, 1, length] of a request with so many pictures of cells x cells tokens, and its reply."""
    place, parts = 2, [torch.arange(2).expand(3, 2)]
    within = torch.stack(torch.meshgrid(torch.arange(1), torch.arange(cells), torch.arange(cells), indexing="ij"))
    for _ in range(pictures):
        parts += [torch.full((3, 1), place), within.reshape(3, -1) + place + 1]
        parts += [torch.full((3, 1), place + 1 + cells)]
        place += cells + 2
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
        pixels: Patches [b * pictures, grid^2, 6 patch^2], in the order in which the sequences show them.
        ids: [b, length]; all show equally many pictures, at the same places.
        wanted: bool [b, length], m of them true.
        features_of: `picture_features`, or the same compiled.
    """
    features = features_of(model, pixels)
    places = positions(len(pixels) // len(ids), math.isqrt(features[0].shape[1]), ids.shape[1])
    seen = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids)
    embedded = embedded.masked_scatter(seen[..., None], features[0].to(embedded.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        # Padding stands on the right, so causality alone hides it.
        position_ids=places.expand(3, len(ids), -1),
        visual_pos_masks=seen,
        deepstack_visual_embeds=[feature.flatten(0, 1) for feature in features[1:]],
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[wanted])
