"""The embedded world: complete, judged, and the plugin's promises on a trained model."""

import numpy as np
import pytest
import torch

import mole_diffusers as mole
from mole_diffusers import emoji
from mole_diffusers.lora import read_expert


@pytest.fixture(scope="module")
def world():
    return mole.emoji_world()


def pixels(image):
    return torch.from_numpy(np.asarray(image, np.float32) / 255)


def test_everything_is_there_and_small(world):
    assert set(emoji.HELD_OUT_SUBJECTS) | set(emoji.HELD_OUT_STYLES) <= set(world.loras)
    assert {"+".join(c) for c in emoji.COMPOSITIONS} <= set(world.gates)
    assert sum(p.stat().st_size for p in world.folder.rglob("*") if p.is_file()) <= 40e6


def test_loras_mix_formats_ranks_and_layers(world):
    experts = {name: read_expert(path) for name, path in world.loras.items()}
    assert [e.format for e in experts.values()].count("kohya") == 2
    assert {e.ranks[0] for e in experts.values()} == {4, 8, 16}
    assert {"text_encoder", "unet"} == {part for e in experts.values() for part in e.layers}
    assert {any("ff_net" in k for k in e.layers["unet"]) for e in experts.values()} == {True, False}
    assert all(e.triggers == (name,) for name, e in experts.items())
    scales = {w.scale for e in experts.values() if e.format == "kohya" for w in e.layers["unet"].values()}
    assert scales == {0.5}


def test_sum_equals_set_adapters_on_the_trained_base(world):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline(**world.pipe.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "pt"}

    def draw():
        return pipe("blueprint drawing of a fox", generator=torch.Generator().manual_seed(3), **options).images

    base = draw()
    concepts = {name: world.loras[name] for name in ("fox", "octopus", "blueprint")}
    mole.attach(pipe, concepts, "sum", binding=None)
    ours = draw()
    mole.detach(pipe)
    assert torch.equal(draw(), base)
    for name, path in concepts.items():
        pipe.load_lora_weights(path, adapter_name=name)
    pipe.set_adapters(list(concepts), [1.0] * 3)
    theirs = draw()
    pipe.unload_lora_weights()
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_judge_is_right_on_real_drawings(world):
    judge, rng = world.judge(), np.random.default_rng(5)
    scenes = [emoji.draw_scene(emoji.SUBJECTS, emoji.STYLES, rng, pairs=0.3) for _ in range(200)]
    verdicts = [judge.verdict([world.drawings.picture(s, rng)]) for s in scenes]
    pairs = list(zip(verdicts, scenes, strict=True))
    assert np.mean([bool(judge.sees(v, s.subjects).all()) for v, s in pairs]) >= 0.97
    assert np.mean([bool(judge.is_style(v, s.style)) for v, s in pairs]) >= 0.95
    assert np.mean([bool(judge.is_background(v, s.background)) for v, s in pairs]) >= 0.97


def test_clip_finds_its_own_captions(world):
    clip, rng = world.clip(), np.random.default_rng(6)
    scenes = list(
        {(s := emoji.draw_scene(emoji.SUBJECTS, emoji.STYLES, rng, pairs=0.3)).caption: s for _ in range(64)}.values()
    )
    x = torch.stack([pixels(world.drawings.picture(s, rng)) for s in scenes]).permute(0, 3, 1, 2) * 2 - 1
    ids = world.pipe.tokenizer([s.caption for s in scenes], padding="max_length", return_tensors="pt")
    with torch.no_grad():
        logits = clip(pixel_values=x, **ids).logits_per_image
    assert (logits.argmax(1) == torch.arange(len(scenes))).float().mean() > 0.8


def test_filters_are_exact_functions_of_the_drawing(world):
    noto = np.asarray(world.drawings.drawing("fox", "noto"), np.float32)
    negative = np.asarray(world.drawings.drawing("fox", "negative"), np.float32)
    assert np.array_equal(noto[..., :3] + negative[..., :3], np.full((64, 64, 3), 255))
    tiles = np.asarray(world.drawings.drawing("fox", "mosaic")).reshape(8, 8, 8, 8, 4)
    assert np.array_equal(tiles, np.broadcast_to(tiles[:, :1, :, :1], tiles.shape))
    with pytest.raises(KeyError, match="no drawing of 'yeti'"):
        world.drawings.drawing("yeti", "noto")


def test_captions_and_places():
    scene = emoji.Scene(("octopus", "fox"), "ink", "blue")
    assert scene.caption == "ink drawing of an octopus and a fox on a blue background"
    assert emoji.composition_scene(("fox", "ink")).caption == "ink drawing of a fox"
    assert emoji.composition_scene(("fox", "octopus")).style == "noto"
    rng = np.random.default_rng(0)
    for count in (1, 2, 3):
        for _ in range(50):
            for size, x, y in emoji.places(count, rng):
                assert x >= 0 <= y
                assert x + size <= 64 >= y + size


def test_no_composition_was_seen_and_splits_are_apart():
    assert not set(emoji.BASE_SUBJECTS) & set(emoji.HELD_OUT_SUBJECTS)
    assert not set(emoji.BASE_STYLES) & set(emoji.HELD_OUT_STYLES)
    chosen, judged = (
        {concept for group in split.values() for c in group for concept in c} for split in (emoji.VALIDATION, emoji.TEST)
    )
    assert not chosen & judged
    assert chosen | judged == set(emoji.HELD_OUT_SUBJECTS + emoji.HELD_OUT_STYLES)
    assert {kind: len(set(group)) for kind, group in emoji.TEST.items()} == {
        "subject x style": 24,
        "subject + subject": 12,
        "two subjects + style": 12,
        "three subjects": 8,
    }
    assert set(emoji.COMPOSITIONS) <= {c for group in emoji.TEST.values() for c in group}
