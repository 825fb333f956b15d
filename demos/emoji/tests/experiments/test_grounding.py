"""The loss of demos/emoji/experiments/grounding.py, by hand and on the world's own UNet."""

import math

import pytest
import torch

from mole_world import emoji_world
from mole_world.scenes import Scene

PLACED = [("koala", (32, 0, 0)), ("tomato", (32, 32, 0))]  # on 64 x 32 pixels


@pytest.fixture(scope="module")
def grounding(script):
    return script("grounding")


@pytest.fixture(scope="module")
def pipe():
    return emoji_world().pipe


def tokens(pipe, caption):
    return pipe.tokenizer([caption], padding="max_length", return_tensors="pt").input_ids


def looks_at(ids, here, there):
    """Attention [1, 2 x 4 places, T] that pays half to one token on the left and half to another one on the right."""
    looks = torch.full((1, 8, ids.shape[1]), 0.5 / ids.shape[1])
    looks[0, [0, 1, 4, 5], here] += 0.5
    looks[0, [2, 3, 6, 7], there] += 0.5
    return looks


def test_places_that_look_at_their_own_words_cost_least(grounding, pipe):
    ids = tokens(pipe, Scene(("koala", "tomato"), "noto").caption)
    koala, tomato = (grounding.tokens_of(ids[0].tolist(), name, pipe.tokenizer)[0] for name, _ in PLACED)
    own, other, even = (
        grounding.grounding_loss([looks_at(ids, *way)], ids, [PLACED], pipe.tokenizer, (32, 64)).item()
        for way in ((koala, tomato), (tomato, koala), (0, 0))
    )
    assert own < even < other
    low = 0.5 / ids.shape[1]
    assert own == pytest.approx(-math.log((0.5 + low) / (0.5 + 2 * low)))
    assert even == pytest.approx(math.log(2))


def test_the_front_one_owns_what_two_boxes_share(grounding):
    assert grounding.owners([(32, 0, 0), (32, 16, 0)], (32, 64), 8).tolist() == [0, 1, 1, -1] * 2


def test_a_subject_in_another_ones_name_is_not_taken_for_it(grounding, pipe):
    ids = tokens(pipe, "noto drawing of a hot dog and a dog")[0].tolist()
    (dog,) = grounding.tokens_of(ids, "dog", pipe.tokenizer)
    assert dog not in grounding.tokens_of(ids, "hot dog", pipe.tokenizer)


@torch.no_grad()
def test_watched_attention_is_that_of_diffusers(grounding, pipe):
    ids = tokens(pipe, "noto drawing of a koala and a tomato")
    x, context = torch.randn(1, 20, 16, 32), pipe.text_encoder(ids)[0]
    before = dict(pipe.unet.attn_processors)
    plain = pipe.unet(x, 500, context).sample
    with grounding.watched(pipe.unet) as looks:
        watched = pipe.unet(x, 500, context).sample
    torch.testing.assert_close(watched, plain, rtol=1e-4, atol=1e-5)
    assert len(looks) == sum("attn2" in name for name in before)
    assert all(torch.allclose(each.sum(-1), torch.ones(())) for each in looks)
    assert pipe.unet.attn_processors == before
