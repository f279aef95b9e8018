"""How the tiny Wan is trained: captions, the autoencoder's folding, and the flow as the stock pipeline runs it."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
# diffusers annotates configurations by their defaults and results by their tuple form.
from dataclasses import replace

import numpy as np
import pytest
import torch

from testbed import clips as world
from testbed import measure_wan, train_wan, train_wan_vae
from testbed.scenes import load_prompts
from testbed.video_oracle import check_clips, score, score_clips, summary

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return train_wan_vae.new_vae().eval()


def test_wrong_captions_stay_in_the_world_and_never_name_a_novel_pair():
    rng, config = np.random.default_rng(0), replace(train_wan.WanConfig(), wrong_count=0.3)
    for clip in world.training_clips(rng, 400):
        told = train_wan.misdescribe(rng, clip.description, config)
        assert world.parse(world.caption(told)) == told
        assert not told.novel


def test_captions_are_true_first_and_wrong_as_often_as_configured_later():
    rng, config = np.random.default_rng(1), train_wan.WanConfig()
    truths = [clip.description for clip in world.training_clips(rng, 2000)]
    never = replace(config, wrong=0.0, wrong_count=0.0)
    assert all(train_wan.misdescribe(rng, truth, never) == truth for truth in truths)
    told = [train_wan.misdescribe(rng, truth, config) for truth in truths]
    wrong = np.mean([t.background != truth.background for t, truth in zip(told, truths, strict=True)])
    assert wrong == pytest.approx(config.wrong, abs=0.04)


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = train_wan.new_tokenizer()
    texts = [world.caption(d) for count in (1, 2) for d in list(world.all_descriptions(count))[::11]]
    ids, mask = train_wan.tokenize(tokenizer, texts)
    assert not (ids == tokenizer.unk_token_id).any()
    assert mask.sum(1).max() < train_wan.TOKENS
    assert [len(text.split()) + 1 for text in texts] == mask.sum(1).tolist()


def test_decoding_without_the_clamp_is_decoding(vae):
    latents = torch.randn(2, train_wan_vae.CHANNELS, 3, 6, 6)
    with torch.no_grad():
        ours, stock = train_wan_vae.decode_unclamped(vae, latents), vae.decode(latents).sample
    assert ours.shape == (2, 3, 9, 48, 48)
    assert torch.equal(ours.clamp(-1, 1), stock)


def test_pixels_and_tensors_are_each_others_inverse():
    frames = world.render_clips(world.training_clips(np.random.default_rng(0), 2))
    assert (train_wan_vae.to_uint8(train_wan_vae.to_tensor(frames)) == frames).all()


def test_the_flow_sees_what_the_stock_pipeline_shows_its_transformer(vae):
    """Text padding, time scale and latents: one Euler step by hand equals the pipeline's."""
    torch.manual_seed(0)
    flow = train_wan.Flow().eval()
    pipeline = train_wan.as_pipeline(flow, vae)
    pipeline.set_progress_bar_config(disable=True)
    text = "a red circle slowly moving right on a white background"
    latents = torch.randn(1, train_wan_vae.CHANNELS, 3, 6, 6)
    with torch.no_grad():
        stock = pipeline(
            text, height=48, width=48, num_frames=9, num_inference_steps=1, guidance_scale=1.0, latents=latents,
            max_sequence_length=train_wan.TOKENS, output_type="latent",
        ).frames  # fmt: skip
        velocity = flow(latents, torch.ones(1), *train_wan.tokenize(pipeline.tokenizer, [text]))
    torch.testing.assert_close(stock, latents - velocity, atol=1e-5, rtol=1e-5)


def test_rotated_colours_stay_in_range_and_leave_the_other_half_alone():
    clips = train_wan_vae.to_tensor(world.render_clips(world.training_clips(np.random.default_rng(0), 8)))
    turned = train_wan_vae.rotate_colours(clips, torch.Generator().manual_seed(0))
    assert turned.abs().max() <= 1
    assert torch.equal(turned[4:], clips[4:])
    lengths, before = turned[:4].norm(dim=1), clips[:4].norm(dim=1)
    torch.testing.assert_close(lengths, 0.6 * before, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def saved():
    """The pipeline in the repository, as users load it."""
    return measure_wan.load(train_wan.OUTPUT)


def test_the_saved_weights_are_small():
    assert sum(path.stat().st_size for path in train_wan.OUTPUT.rglob("*") if path.is_file()) <= 12e6


def test_the_saved_card_says_what_was_measured():
    text = (train_wan.OUTPUT / "README.md").read_text()
    assert text == measure_wan.card_of()  # else: python -m testbed.measure_wan --readme
    assert "shows legible shapes" not in text and "cut to 4,800 at step 3,600" in text


def test_reconstructions_of_true_clips_are_read_right(saved):
    clips = check_clips()[:120]
    again = train_wan_vae.reconstruct(saved.vae, world.render_clips(clips))
    assert summary(score_clips(again, clips))["alignment"] >= 0.95


def test_the_saved_pipeline_shows_motion_and_obeys_badly(saved):
    records = load_prompts("shapes_video_heldout")[:48]
    frames = measure_wan.sample(saved, [record["text"] for record in records])
    found = summary([score(clip, record["reference"]) for clip, record in zip(frames, records, strict=True)])
    assert 0.25 <= found["alignment"] <= 0.65
    assert found["dynamic"] > 3
