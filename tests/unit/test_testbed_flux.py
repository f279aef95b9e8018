"""The tokenizers and the form of the tiny pipeline."""

import pytest
import torch

from testbed import scenes as world

train_flux = pytest.importorskip("testbed.train_flux")


@pytest.mark.parametrize("make", [train_flux.new_clip_tokenizer, train_flux.new_t5_tokenizer])
def test_each_word_is_one_token_also_after_saving(make, tmp_path):
    tokenizer = make()
    tokenizer.save_pretrained(tmp_path)
    again = type(tokenizer).from_pretrained(tmp_path)
    words = list(dict.fromkeys(world.WORDS))
    pieces = again.tokenize(" ".join(words))
    assert [piece.replace("</w>", "").replace("\u2581", "") for piece in pieces] == words
    assert again(" ".join(words)).input_ids == tokenizer(" ".join(words)).input_ids
    assert again.model_max_length == train_flux.TOKENS


def test_every_prompt_fits():
    tokenizers = train_flux.new_clip_tokenizer(), train_flux.new_t5_tokenizer()
    texts = [record["text"] for record in world.load_prompts("shapes_heldout")]
    for tokenizer in tokenizers:
        assert max(map(len, tokenizer(texts).input_ids)) <= train_flux.TOKENS


def test_the_flow_has_the_form_of_the_stock_pipeline():
    flow = train_flux.Flow()
    assert sum(p.numel() for p in flow.transformer.parameters()) <= 2.5e6
    ids = torch.zeros(2, train_flux.TOKENS, dtype=torch.long)
    latents = train_flux.pack(torch.randn(2, 8, 8, 8))
    assert flow(latents, torch.rand(2), ids, ids).shape == latents.shape == (2, 16, 32)
