"""A picture in tiles against the pictures of its parts, drawn one by one."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import diffusers
import pytest
import torch
from hosts import HOSTS, draw, sd3, sdxl
from PIL import Image
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline
from waits import waits_of_a_step

import mole_diffusers as mole
from mole_diffusers.binding import AUTO, INACTIVE, Bound, PictureWarning
from mole_diffusers.inspection import contributions
from mole_diffusers.lora import read_expert
from mole_diffusers.patching.subjects.prompt_subjects import PromptSubjects
from mole_diffusers.patching.subjects.windows import silhouette

PROMPT = "a fox+a hen"  # a token per letter
WORDS = {"fox": "fox", "hat": "hen", "ink": "ink", "owl": "owl"}


@pytest.fixture
def experts(loras):
    """fox and hat, and ink, which is a style."""
    return {name: replace(read_expert(path, name), triggers=(WORDS[name],)) for name, path in loras.items()}


def tiled(pipe, prompt=None, until=0.8, since=0.0):
    return mole.attached(pipe).tiled(until, since=since, prompt=prompt)


def asked_gates(mixture):
    """A list that grows by a gate of the UNet whenever it is asked."""
    asked = []
    for gate in mixture.banks["unet"]:
        gate.register_forward_pre_hook(lambda gate, _: asked.append(gate))
    return asked


def noise(height=16, width=16):
    return torch.randn(1, 4, height, width, generator=torch.Generator().manual_seed(0))


def latent(pipe, prompt=PROMPT, x=None, steps=2, **options):
    """The latents after so many steps, [1, 4, H, W]."""
    x = noise() if x is None else x
    call = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": "latent"} | options
    return pipe(prompt, latents=x, height=2 * x.shape[2], width=2 * x.shape[3], **call).images


def alone(pipe, experts, names, prompt, x, empty, **options):
    """A part of the picture drawn by itself, by these LoRAs everywhere; the unconditional text is the base's."""
    mole.attach(pipe, {name: experts[name] for name in names}, binding=None)
    return latent(pipe, prompt, x, negative_prompt_embeds=empty, **options)


def empty_of(pipe, experts):
    """The states of no words, which all LoRAs of a mixture read."""
    mole.attach(pipe, experts, binding=None)
    return pipe.encode_prompt("", "cpu", 1, False)[0]


def test_a_picture_in_tiles_is_the_pictures_of_its_parts_side_by_side(pipe, experts):
    x, empty = noise(), empty_of(pipe, {name: experts[name] for name in ("fox", "hat")})
    fox = alone(pipe, experts, ["fox"], "a fox", x[..., :8], empty)
    hat = alone(pipe, experts, ["hat"], "a hen", x[..., 8:], empty)
    mole.attach(pipe, {name: experts[name] for name in ("hat", "fox")})  # in whatever order
    with tiled(pipe, PROMPT, 1.0):
        found = latent(pipe)
    torch.testing.assert_close(found, torch.cat([fox, hat], -1), rtol=0, atol=1e-4)
    assert (found - latent(pipe)).abs().max() > 1e-2


def test_a_lora_of_two_subjects_draws_each_in_a_tile(pipe, experts):
    """As two LoRAs that are the same file do, each with its own words."""
    prompt, fox = "a fox and a hen", experts["fox"]
    alone = {"guidance_scale": 1.0}  # without a text that both LoRAs of two read
    mole.attach(pipe, {"one": replace(fox, triggers=("fox",)), "other": replace(fox, triggers=("hen",))})
    with tiled(pipe, prompt, 1.0):
        two = latent(pipe, prompt, **alone)
    mixture = mole.attach(pipe, {"both": replace(fox, triggers=("fox", "hen"))})
    with tiled(pipe, prompt, 1.0):
        torch.testing.assert_close(latent(pipe, prompt, **alone), two, rtol=0, atol=1e-5)
    assert mixture.layouts[0].regions["both"].min() == 1  # it acts in both places
    assert latent(pipe, prompt, **alone).sub(two).abs().max() > 1e-3


def test_what_one_subject_has_draws_in_its_tile_alone(pipe, experts):
    experts = experts | {"ink": replace(experts["ink"], triggers=("cap",))}
    x, empty, prompt = noise(), empty_of(pipe, experts), "fox in a cap&hen"
    assert len(pipe.tokenizer(prompt).input_ids) <= 16
    fox = alone(pipe, experts, ["fox", "ink"], "fox in a cap", x[..., :8], empty)
    hat = alone(pipe, experts, ["hat"], "hen", x[..., 8:], empty)
    mole.attach(pipe, experts)
    with tiled(pipe, prompt, 1.0):
        torch.testing.assert_close(latent(pipe, prompt), torch.cat([fox, hat], -1), rtol=0, atol=1e-4)


def test_a_style_draws_in_every_tile_and_the_rest_is_that_of_the_bound_picture(pipe, experts):
    x, empty = noise(), empty_of(pipe, experts)
    prompt = "a fox+a hen,ink"
    regions = {"fox": (0.0, 0.0, 0.5, 0.5), "hat": "bottom", "ink": "everywhere"}
    mixture = mole.attach(pipe, experts)
    mixture.bind({name: (None, region) for name, region in regions.items()})
    with tiled(pipe, prompt, 1.0):
        found = latent(pipe, prompt, steps=1)
    mole.attach(pipe, {"ink": experts["ink"]}, binding=None)
    for names, own, (rows, columns) in (
        (("ink", "fox"), "a fox,ink", (slice(0, 8), slice(0, 8))),
        (("ink", "hat"), "a hen,ink", (slice(8, 16), slice(0, 16))),
    ):
        mole.attach(pipe, {name: experts[name] for name in names}, binding=None)
        wanted = latent(pipe, own, x[:, :, rows, columns], steps=1, negative_prompt_embeds=empty)
        torch.testing.assert_close(found[:, :, rows, columns], wanted, rtol=0, atol=1e-4)
    mixture = mole.attach(pipe, experts)
    mixture.bind({name: (None, region) for name, region in regions.items()})
    with mixture.tiled(0):
        rest = latent(pipe, prompt, x, steps=1)
    assert torch.equal(found[:, :, :8, 8:], rest[:, :, :8, 8:])


def test_the_rest_of_the_picture_is_bound_to_the_places_of_the_tiles_from_the_first_step(pipe, experts, tmp_path):
    """Of three subjects in four quarters the last quarter is nobody's."""
    owl = replace(read_expert(tiny_lora(pipe, tmp_path / "owl.safetensors", seed=7)), triggers=("owl",))
    names = {"fox": experts["fox"], "hat": experts["hat"], "owl": owl}
    mixture = mole.attach(pipe, names)
    with mixture.tiled(until=1.0, since=0):
        found = latent(pipe, "fox+hen+owl", steps=1)
    places = [(0, 0, 0.5, 0.5), (0.5, 0, 1, 0.5), (0, 0.5, 0.5, 1)]
    mixture.bind({name: (None, box) for name, box in zip(names, places, strict=True)})
    with mixture.tiled(0):
        rest = latent(pipe, "fox+hen+owl", steps=1)
    assert torch.equal(found[:, :, 8:, 8:], rest[:, :, 8:, 8:])
    assert not torch.equal(found[:, :, :8, :8], rest[:, :, :8, :8])


def test_a_trace_counts_a_step_once_however_many_tiles_it_has(pipe, experts):
    mixture = mole.attach(pipe, {"fox": experts["fox"], "hat": (experts["hat"], 0.5)})
    steps = {}
    for share in (0.0, 0.8):
        with tiled(pipe, until=share), mixture.trace() as trace:
            latent(pipe, steps=4)
        steps[share] = sorted({step for place, step, _ in trace.records if place.startswith("unet")})
        for place in trace.locations:
            if place.startswith("unet.") and place[-1] != ")":
                assert torch.equal(trace.weights(place), torch.tensor([[1.0, 0.5]]).expand(4, 2)), place
    assert steps[0.8] == steps[0.0] == [0, 1, 2, 3]


def test_while_a_tile_is_drawn_the_mixture_says_what_the_user_set(pipe, experts):
    mixture, seen = mole.attach(pipe, experts), []
    before = mixture.binding
    hook = pipe.unet.conv_in.register_forward_hook(lambda *_: seen.append((mixture.binding, len(mixture.layouts))))
    with tiled(pipe, PROMPT, 1.0):
        latent(pipe)
    hook.remove()
    assert len(seen) == 4
    assert all(each == (before, 1) for each in seen)


@pytest.mark.parametrize("gate_type", ["sum", *thorough("factors")])
def test_gates_that_read_nothing_are_asked_once_for_each_tile(pipe, experts, gate_type):
    """And again if a strength changes between two steps."""
    mixture = mole.attach(pipe, experts, gate_type)
    asked = asked_gates(mixture)
    strong = {"fox": 3.0, "hat": 0.5}

    def change(pipe, step, timestep, kwargs):
        for name, strength in strong.items() if step == 2 else ():
            mixture.strength(name, strength)
        return kwargs

    with tiled(pipe, PROMPT, 1.0):
        latent(pipe, steps=6)
        once = Counter(asked)
        assert set(once.values()) in ({2}, {2, 4})  # once for each tile, and for each set of LoRAs that its layers have
        asked.clear()
        changed = latent(pipe, steps=6, callback_on_step_end=change)
        assert Counter(asked) == {gate: 2 * times for gate, times in once.items()}
    x = latent(pipe, steps=6)  # with the strengths that were set
    assert (changed - x).abs().max() > 1e-3


def test_a_callback_that_changes_the_prompt_ends_the_tiles(pipe, experts):
    """Another negative prompt acts in them."""
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    other, negative = pipe.encode_prompt("a hen+a fox", "cpu", 1, True, "an owl")

    def drawn(texts, after=5):
        def change(pipe, step, timestep, kwargs):
            return {"prompt_embeds": texts(*kwargs["prompt_embeds"].chunk(2))} if step == after else {}

        inputs = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return latent(pipe, steps=10, callback_on_step_end=change, **inputs)

    def changed(empty, prompt):
        return torch.cat([empty, other])

    with pytest.warns(PictureWarning, match="were changed between two steps"):
        found = drawn(changed)
    with tiled(pipe, until=0.6, since=0.4):
        assert torch.equal(drawn(changed), found)
    with mixture.tiled(), pytest.raises(ValueError, match="tiles have prompts of their own"):
        drawn(changed)
    assert not torch.equal(drawn(lambda empty, prompt: torch.cat([empty, prompt])), found)
    early, late = (drawn(lambda empty, prompt: torch.cat([negative, prompt]), after) for after in (5, 7))
    assert not torch.equal(early, late)


@pytest.mark.parametrize("name", ["add_text_embeds", "add_time_ids"])
def test_a_callback_that_changes_what_sdxl_reads_beside_the_text_ends_the_tiles(tmp_path, name):
    pipe = sdxl()
    pipe.unet.register_to_config(sample_size=8)
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hen"))}
    mole.attach(pipe, {name: replace(read_expert(file, name), triggers=(name,)) for name, file in files.items()})

    def change(pipe, step, timestep, kwargs):
        return {name: kwargs[name] + 1.0} if step == 5 else {}

    inputs = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [name]}
    with pytest.warns(PictureWarning, match="were changed between two steps"):
        latent(pipe, steps=10, **inputs)


def test_tiles_give_way_to_the_bound_picture(pipe, experts):
    """A layout of the whole may come before them; with no steps in tiles the picture is the bound one, bit for bit."""
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    bound = latent(pipe)
    with tiled(pipe, PROMPT, 0.0):
        assert torch.equal(latent(pipe), bound)
    with mixture.tiled(0):
        fox = latent(pipe, "a fox")
    with tiled(pipe, until=1.0):  # one thing
        assert torch.equal(latent(pipe, "a fox"), fox)
    seen = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    with tiled(pipe, PROMPT, 0.5):
        mixed = latent(pipe, steps=4)
    assert seen == [8, 8, 8, 8, 16, 16]
    seen.clear()
    with mixture.tiled():
        latent(pipe, steps=10)
    assert seen == [*[16] * 4, *[8, 8] * 4, *[16] * 2]
    assert [*mixture.layouts[0].regions] == ["fox", "hat"]  # planned when the picture is drawn as one
    assert not torch.equal(mixed, latent(pipe, steps=4))


def test_rows_of_a_batch_and_their_guidance_are_drawn_as_alone(pipe, experts):
    mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    x = torch.cat([noise(), -noise()])
    with tiled(pipe, PROMPT):
        both = latent(pipe, [PROMPT] * 2, x)
        each = torch.cat([latent(pipe, PROMPT, row[None]) for row in x])
        torch.testing.assert_close(both, each, rtol=0, atol=1e-4)
        plain = latent(pipe, guidance_scale=1.0)  # no unconditional rows
    assert torch.isfinite(plain).all()


def test_four_subjects_share_a_square_and_words_of_place_decide(pipe, experts, tmp_path):
    names = ("a", "b", "c")
    made = {
        n: replace(read_expert(tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i), n), triggers=(f"x{n}",))
        for i, n in enumerate(names)
    }
    mole.attach(pipe, made)
    with tiled(pipe, "xa+xb+xc+an ox"):
        assert torch.isfinite(latent(pipe, "xa+xb+xc+an ox")).all()
    mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    states = {"prompt_embeds": pipe.encode_prompt("hen below fox", "cpu", 1, False)[0]}
    with tiled(pipe, "a hen below a fox", 1.0):
        below = latent(pipe, None, **states)
    with tiled(pipe, "a fox above a hen", 1.0):
        torch.testing.assert_close(latent(pipe, None, **states), below)


def test_a_unet_for_inpainting_predicts_fewer_channels_than_it_reads(pipe, experts):
    """The mask and the picture under it are cut as the latents are."""
    reads = pipe.unet.conv_in
    pipe.unet.conv_in = torch.nn.Conv2d(9, reads.out_channels, 3, padding=1)
    pipe.unet.register_to_config(in_channels=9)
    painting = diffusers.StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    painting.set_progress_bar_config(disable=True)
    mole.attach(painting, {name: experts[name] for name in ("fox", "hat")})
    picture, mask = Image.effect_noise((32, 32), 90).convert("RGB"), Image.new("L", (32, 32), 255)
    call = {"image": picture, "mask_image": mask, "height": 32, "width": 32, "num_inference_steps": 2, "strength": 1.0}
    with tiled(painting, PROMPT, 1.0):
        found = painting(PROMPT, generator=torch.Generator().manual_seed(0), output_type="latent", **call).images
    assert found.shape == (1, 4, 16, 16)
    assert torch.isfinite(found).all()


def test_where_experts_act_is_measured_when_the_picture_is_drawn_as_one(pipe, experts):
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    x = noise(16, 32)
    with contributions(pipe, mixture, (32, 64)) as found, tiled(pipe, PROMPT, 0.5):
        latent(pipe, x=x, steps=2)
    assert found.finest()[0] == (16, 32)
    assert {height / width for height, width in found.sums} == {0.5}


def test_the_pipeline_is_given_back(pipe, experts):
    mole.attach(pipe, experts)
    before = latent(pipe)
    with pytest.raises(RuntimeError, match="stop"), tiled(pipe, PROMPT):
        raise RuntimeError("stop")
    assert "forward" not in vars(pipe.unet)
    assert torch.equal(latent(pipe), before)


def test_a_call_says_what_takes_its_prompt_the_tiles(pipe, experts):
    """Several prompts, or states: in such a call they are refused if they were asked for, and otherwise missed aloud."""
    pipe.unet.register_to_config(sample_size=8)
    mixture, two = mole.attach(pipe, experts), torch.cat([noise()] * 2)
    states = {"prompt": None, "prompt_embeds": pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]}
    several = {"prompt": ["an ink", PROMPT], "x": two}
    for call, why in ((several, "several prompts: call the pipeline once for each"), (states, "states of its prompt: give")):
        with pytest.warns(PictureWarning, match=f"'a fox.* is drawn as one picture, and not in tiles, since .*{why}"):
            latent(pipe, **call)
        assert sum("not in tiles" in warning for warning in mixture.binding_warnings) == 1
        with mixture.tiled(), pytest.raises(ValueError, match="tiles are drawn of one prompt"):
            latent(pipe, **call)
        with mixture.tiled(0):
            latent(pipe, **call)
        assert not any("not in tiles" in warning for warning in mixture.binding_warnings)
    for call in (  # which are drawn in tiles, or would be drawn as one in any case
        {"prompt": [PROMPT] * 2, "x": two},
        {"prompt": ["an ink", "a fox"], "x": two},
        several | {"x": two[..., :8, :8]},
        states | {"x": noise(8, 8)},
    ):
        latent(pipe, **call)
        assert not any("not in tiles" in warning for warning in mixture.binding_warnings), call
    with mixture.tiled(prompt=PROMPT, always=False):
        found = latent(pipe, **states)
    assert torch.equal(found, latent(pipe))


def test_a_prompt_is_explained_before_anything_is_attached(pipe, experts):
    pipe.unet.register_to_config(sample_size=8)
    mixture, size = mole.attach(pipe, experts), {"width": 32, "height": 16}
    bound, wanted = mixture.binding, mixture.explain(PROMPT, **size)
    mole.detach(pipe)
    assert mole.explain(pipe, PROMPT, bound, **size) == wanted
    assert wanted.tiles is not None
    assert wanted.tiled == (0.4, 0.8)
    assert wanted.room is None
    small = mole.explain(pipe, PROMPT, bound, width=16, height=16)
    assert (small.tiles, small.tiled, small.room) == (None, None, (32, 16))
    always = mole.explain(pipe, PROMPT, bound, width=16, height=16, tiling=mole.Tiling(always=True))
    assert always.tiles == wanted.tiles
    assert always.room is None
    assert mole.explain(pipe, PROMPT, bound, **size, prompt_2="a fox").tiles is None
    assert mole.explain(pipe, PROMPT, bound, **size, texts=[PROMPT, "a hat"]).tiles is None
    off = mole.explain(pipe, PROMPT, bound, **size, acting=[])
    assert {role.place for role in off.experts.values()} == {INACTIVE}
    said = {name: WORDS[name] for name in experts}  # words and places as `attach` takes them
    assert mole.explain(pipe, PROMPT, said, **size).tiles == wanted.tiles
    for other, place in (("a hat", "own"), (PROMPT, "own"), ("a fox and an ink", "everywhere")):
        found = mole.explain(pipe, PROMPT, bound, **size, texts=[PROMPT, other])
        assert [found.experts[name].place for name in ("fox", "hat")] == [place] * 2, other
    assert found.experts["fox"].why == "the texts that are read list different subjects"
    with pytest.raises(ValueError, match="unknown expert 'owl' in acting; bound: "):
        mole.explain(pipe, PROMPT, bound, acting=["owl"])
    with pytest.raises(ValueError, match="'lefft'"):
        mole.explain(pipe, PROMPT, {"fox": ("fox", "lefft")})


@pytest.mark.parametrize("more", [{}, {"timesteps": [750, 500, 250, 1]}, {"prompt_2": "a fox"}, {"original_size": (64, 64)}])
def test_a_call_that_says_more_than_its_prompt_and_size_is_not_in_tiles_by_itself(tmp_path, more):
    pipe = sdxl()
    pipe.unet.register_to_config(sample_size=8)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    file, widths = tiny_lora(pipe, tmp_path / "fox.safetensors"), []
    mole.attach(pipe, {"fox": file, "hen": file}, binding={"fox": "fox", "hen": "hen"})
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    latent(pipe, steps=None if "timesteps" in more else 4, **more)
    assert (8 in widths) == (not more)


def test_a_mixture_draws_in_tiles_by_itself_where_each_subject_has_room(pipe, experts):
    """Room for pictures of the size that the UNet was trained at; and subjects are listed, not doing something together."""
    assert pipe.unet.config.sample_size == 16
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, experts)
    with mixture.tiled():
        wanted = latent(pipe)
    assert torch.equal(latent(pipe), wanted)
    assert torch.equal(latent(pipe, [PROMPT]), wanted)
    with mixture.tiled(0):
        bound = latent(pipe)
    assert not torch.equal(bound, wanted)
    assert mixture.explain(PROMPT, 32, 32).tiles == ["a fox", "a hen"]
    for narrower in (
        {"prompt": "a fox eats a hen"},
        {"prompt": "an ox and a cow"},  # which are nobody's
        {"prompt": "fox, hen"},
        {"prompt": "a fox and an ox"},  # one LoRA
        {"x": noise(8, 8)},
        {"prompt": [PROMPT, "a fox+a hen,ink"], "x": torch.cat([noise()] * 2)},
    ):
        with mixture.tiled(0):
            alone = latent(pipe, **narrower)
        assert torch.equal(latent(pipe, **narrower), alone), narrower
        if isinstance(prompt := narrower.get("prompt", PROMPT), str):
            assert mixture.explain(prompt, *((16, 16) if "x" in narrower else (32, 32))).tiles is None
    for other in ("fox and hen", "a fox, a hen", "a fox,a hen&an ox"):  # the ox is nobody's, and has a tile too
        with mixture.tiled():
            wanted = latent(pipe, other)
        assert torch.equal(latent(pipe, other), wanted), other
        assert mixture.explain(other, 32, 32).tiles
    with mixture.only("fox"):
        one = latent(pipe)
    with mixture.only("fox"), mixture.tiled(0):
        assert torch.equal(latent(pipe), one)
    mixture.bind({"fox": (None, (0.0, 0.0, 0.3, 0.3))})
    assert mixture.explain(PROMPT, 32, 32).tiles is None
    mixture.bind(None)
    plain = latent(pipe)
    with mixture.tiled(0):
        assert torch.equal(latent(pipe), plain)


TOUCHING = "a fox on a hen"  # one above the other, and the first is in front


def upright():
    return noise(12, 8)


@pytest.fixture
def small(pipe, experts):
    """A pipeline whose UNet was trained with latents of 8 x 8, with fox and hat."""
    pipe.unet.register_to_config(sample_size=8)
    return mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})


def test_two_that_touch_are_pictures_of_each_that_overlap(pipe, small, experts):
    """Without guidance each ends in the middle. With it, the silhouette of the one in front decides near the middle."""
    x, both = upright(), {name: experts[name] for name in ("fox", "hat")}
    empty = empty_of(pipe, both)
    own = {"fox": ("a fox", x[:, :, :8]), "hat": ("a hen", x[:, :, 4:])}

    def parts(**options):
        found = [
            alone(pipe, experts, [name], prompt, part, empty, steps=1, **options) for name, (prompt, part) in own.items()
        ]
        mole.attach(pipe, both)
        return found

    fox, hat = parts(guidance_scale=1.0)
    with mole.attached(pipe).tiled(1.0, since=0):
        plain = latent(pipe, TOUCHING, x, steps=1, guidance_scale=1.0)
    torch.testing.assert_close(plain, torch.cat([fox[:, :, :6], hat[:, :, 2:]], 2), rtol=0, atol=1e-4)

    guided_fox, guided_hat = parts()
    share = silhouette(guided_fox - fox)  # a step is linear in the prediction, and a silhouette has no scale
    wanted = torch.cat([guided_fox[:, :, :6], guided_hat[:, :, 2:]], 2)
    near = slice(6 - 2, 6 + 2)  # two latent pixels: three sixteenths of 8, rounded
    wanted[:, :, near] = share[:, None, near] * guided_fox[:, :, near] + (1 - share[:, None, near]) * guided_hat[:, :, 0:4]
    with mole.attached(pipe).tiled(1.0, since=0):
        found = latent(pipe, TOUCHING, x, steps=1, negative_prompt_embeds=empty)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert 0 < share[:, near].mean() < 1


def test_two_that_touch_are_laid_out_by_the_base(pipe, small, experts):
    after = {}

    def kept(pipe, step, timestep, given):
        after[step] = given["latents"]
        return given

    call = {"x": upright(), "steps": 5, "guidance_scale": 1.0, "callback_on_step_end": kept}
    by_itself = latent(pipe, TOUCHING, **call)
    first, second = after[0], after[1]
    with small.tiled():
        assert torch.equal(latent(pipe, TOUCHING, **call), by_itself)
    mole.detach(pipe)
    latent(pipe, TOUCHING, **call)
    torch.testing.assert_close(first, after[0], rtol=0, atol=1e-5)
    assert (second - after[1]).abs().max() > 1e-3


def test_two_that_touch_are_drawn_as_one_beside_others_or_in_given_regions_or_without_room(pipe, experts):
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, experts)

    def is_apart(prompt=TOUCHING, x=None):
        x = upright() if x is None else x
        with mixture.tiled(0):
            as_one = latent(pipe, prompt, x)
        return not torch.equal(latent(pipe, prompt, x), as_one)

    assert is_apart()
    with mixture.bound({"ink": "ant"}):
        assert not is_apart(f"{TOUCHING},ant")  # nothing says that this is a style
    assert not is_apart(x=noise(8, 12))  # no room for one above the other
    assert not is_apart(x=noise(8, 8))
    assert "no room for one thing above the other" in mixture.explain(TOUCHING, 24, 16).why_no_tiles
    assert {role.place for role in mixture.explain(TOUCHING, 24, 16).experts.values()} == {"everywhere"}
    apart = mixture.explain(TOUCHING, 16, 24)
    assert apart.tiles == ["a fox", "a hen"]
    roles = [(apart.experts[name].place, apart.experts[name].why) for name in ("fox", "hat")]
    assert roles == [("own tile", "it touches 'hen'"), ("own tile", "it touches 'fox'")]
    mixture.bind({"fox": (None, "top")})
    assert not is_apart()


@pytest.mark.parametrize(
    "prompt",
    ["a fox riding an owl and a bear", "a bear watches a fox riding an owl", "a bear and a fox riding an owl, night"],
)
def test_a_third_lora_keeps_two_that_touch_in_one_picture(prompt):
    bound = {name: Bound((name,), AUTO) for name in ("fox", "owl", "bear")}
    assert PromptSubjects(prompt, bound, list(bound)).contact is None
    style = {**bound, "ink": Bound(("ink",), AUTO)}
    assert PromptSubjects("ink drawing of a fox riding an owl", style, list(style)).contact is not None
    said = PromptSubjects("a fox riding an owl, she smiles", bound, list(bound))
    assert (said.contact, said.why_not_per_subject) == (None, "the prompt says 'she' of one of them")


@pytest.mark.parametrize("regions", [None, ((0.0, 0.0, 0.45, 1.0), (0.55, 0.0, 1.0, 1.0)), ("left", "right")])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_tiles_share_every_place(pipe, experts, regions, guidance, monkeypatch):
    """A UNet that always predicts 1 predicts 1 in tiles."""
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    if regions is not None:
        mixture.bind({name: (None, region) for name, region in zip(("fox", "hat"), regions, strict=True)})
    seen, step = [], pipe.scheduler.step

    def stepped(given, *args, **options):
        seen.append(given)
        return step(given, *args, **options)

    monkeypatch.setattr(pipe.scheduler, "step", stepped)
    monkeypatch.setattr(pipe.unet, "forward", lambda sample, *args, **options: (torch.ones_like(sample),))
    with mixture.tiled(1.0, since=0, always=False):
        latent(pipe, x=noise(8, 12), steps=1, guidance_scale=guidance)
    torch.testing.assert_close(seen[0], torch.ones_like(seen[0]))


def test_few_steps_begin_with_the_whole_picture(pipe, small):
    sizes = []

    def noted(_, args, kwargs):
        sizes.append(tuple((args[0] if args else kwargs["sample"]).shape[2:]))

    pipe.unet.register_forward_pre_hook(noted, with_kwargs=True)
    for steps in (1, 2, 3, 4):
        sizes.clear()
        latent(pipe, TOUCHING, upright(), steps=steps)
        assert sizes[0] == (12, 8), steps
        assert ((8, 8) in sizes) == (steps > 2), steps


def test_two_that_are_listed_and_touch_keep_their_halves(pipe, small, recwarn):
    latent(pipe, "fox+hen hugging", noise(8, 12), steps=5)
    assert not [w for w in recwarn if "places" in str(w.message)]
    left = torch.zeros(8, 12)
    left[:, :6] = 1
    torch.testing.assert_close(small.layouts[0].regions["fox"], left)
    torch.testing.assert_close(small.layouts[0].regions["hat"], 1 - left)


@pytest.mark.parametrize("side", [None, (8, 8)])
def test_a_unet_that_does_not_say_its_size_can_be_made_to_draw_in_tiles(pipe, experts, side):
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    with mixture.tiled(1.0, since=0):
        wanted = latent(pipe)
    pipe.unet.register_to_config(sample_size=side)
    with mixture.tiled(1.0, since=0):
        torch.testing.assert_close(latent(pipe), wanted)
        latent(pipe, TOUCHING, upright())


def test_the_last_steps_are_bound_to_the_places_of_the_tiles(pipe, experts, recwarn):
    """Also where a single one is left, and nobody reads attention."""
    mixture = mole.attach(pipe, {name: experts[name] for name in ("hat", "fox")})
    pipe.unet.register_to_config(sample_size=8)
    found = latent(pipe, steps=4)
    regions = mixture.layouts[0].regions
    assert torch.equal(regions["fox"][:, :8], torch.ones(16, 8))
    assert torch.equal(regions["hat"], 1 - regions["fox"])
    assert mixture.layouts[0].maps == {}
    with mixture.tiled(), mixture.bound({"fox": (None, "left"), "hat": (None, "right")}):
        torch.testing.assert_close(latent(pipe, steps=4), found, rtol=0, atol=1e-5)
    assert not [w for w in recwarn if "places" in str(w.message)]


def test_a_subject_that_the_text_encoder_cuts_off_gets_no_tile(pipe, experts):
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    prompt = "a fox in a long blue sea and a hen"
    with mixture.tiled(0):
        bound = latent(pipe, prompt)
    assert torch.equal(latent(pipe, prompt), bound)
    with mixture.tiled(), pytest.raises(ValueError, match="other subjects in this prompt than 'fox' and 'hen': shorten"):
        latent(pipe, prompt)


@pytest.mark.thorough
def test_prompts_of_tiles_skip_the_layers_that_the_call_skips(pipe, experts):
    mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    x = noise()
    skipped = latent(pipe, clip_skip=1)
    assert not torch.equal(skipped, latent(pipe))
    empty = pipe.encode_prompt("", "cpu", 1, False, clip_skip=1)[0]
    parts = []
    for name, part in (("fox", x[..., :8]), ("hat", x[..., 8:])):
        mole.attach(pipe, {name: experts[name]}, binding=None)
        parts.append(latent(pipe, f"a {WORDS[name]}", part, negative_prompt_embeds=empty, clip_skip=1))
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    with mixture.tiled(1.0, since=0):
        found = latent(pipe, negative_prompt_embeds=empty, clip_skip=1)
    torch.testing.assert_close(found, torch.cat(parts, -1), rtol=0, atol=1e-4)


def test_sdxl_reads_each_prompt_with_both_encoders_and_where_the_tile_is(tmp_path):
    pipe = sdxl()
    pipe.set_progress_bar_config(disable=True)
    experts = {
        name: replace(read_expert(tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i), name), triggers=(name,))
        for i, name in enumerate(("fox", "hen"))
    }
    x = noise()

    def drawn(prompt, x, **size):
        size |= {"height": 2 * x.shape[2], "width": 2 * x.shape[3]}
        call = {"num_inference_steps": 3, "guidance_scale": 3.0, "output_type": "latent", **size}
        states = dict(zip(("negative_prompt_embeds", "negative_pooled_prompt_embeds"), empty, strict=True))
        return pipe(prompt, latents=x, **states, **call).images

    mole.attach(pipe, experts, binding=None)
    states = pipe.encode_prompt("", None, "cpu", 1, False)
    empty = states[0], states[2]
    parts = []
    for name, left in (("fox", 0), ("hen", 8)):
        mole.attach(pipe, {name: experts[name]}, binding=None)
        crop = {"original_size": (32, 32), "crops_coords_top_left": (0, 2 * left), "target_size": (32, 32)}
        parts.append(drawn(f"a {name}", x[..., left : left + 8], **crop))
    mixture = mole.attach(pipe, experts)
    with mixture.tiled(1.0, since=0):
        torch.testing.assert_close(drawn(PROMPT, x), torch.cat(parts, -1), rtol=0, atol=1e-4)
    pipe.unet.register_to_config(sample_size=8)
    with mixture.tiled():
        wanted = drawn(PROMPT, x)
    assert torch.equal(drawn(PROMPT, x), wanted)  # by itself, where there is room


@pytest.mark.parametrize("refiner", [False, True])
def test_sdxl_is_refused_what_its_tiles_cannot_be_told(tmp_path, refiner):
    kind = diffusers.StableDiffusionXLImg2ImgPipeline if refiner else diffusers.StableDiffusionXLPipeline
    pipe, image = sdxl(kind, refiner=refiner), {"image": torch.rand(1, 3, 32, 32), "strength": 1.0}
    call = {"prompt": PROMPT, "num_inference_steps": 2} | (image if refiner else {})
    file = tiny_lora(pipe, tmp_path / "fox.safetensors")
    mixture = mole.attach(pipe, {"fox": file, "hen": file}, binding={"fox": "fox", "hen": "hen"})
    for name, given in (("prompt_2", "ink"), ("original_size", (64, 64)), ("negative_target_size", (64, 64))):
        with mixture.tiled(), pytest.raises(ValueError, match=f"a size of its own: draw without {name}$"):
            pipe(**call, **{name: given})
    if refiner:
        with mixture.tiled(), pytest.raises(ValueError, match="in 6 numbers, and this UNet reads 5"):
            pipe(**call)


@pytest.mark.parametrize(("steps", "early"), [(2, 1), *thorough((1, 0), (3, 2), (4, 3), (5, 4), (10, 8))])
def test_the_last_step_joins_the_tiles_however_few_there_are(pipe, experts, steps, early):
    mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    widths = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    with tiled(pipe):
        latent(pipe, steps=steps)
    assert widths == [8] * 2 * early + [16] * (steps - early)


@pytest.mark.parametrize(
    ("sampler", "steps"), [("HeunDiscrete", 2), *thorough(("HeunDiscrete", 3), ("PNDM", 2), ("KDPM2Discrete", 2))]
)
def test_the_last_step_joins_the_tiles_of_samplers_that_repeat_a_timestep(pipe, experts, sampler, steps):
    pipe.scheduler = getattr(diffusers, f"{sampler}Scheduler").from_config(pipe.scheduler.config, skip_prk_steps=True)
    mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    widths = []
    pipe.unet.conv_in.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[-1]))
    with tiled(pipe):
        latent(pipe, steps=steps)
    assert widths[:2] == [8, 8]
    assert widths[-1] == 16


@pytest.mark.filterwarnings("ignore:cross_attention_kwargs:UserWarning")  # of diffusers, for each
def test_what_a_call_gives_attention_is_honoured_or_said(pipe, experts):
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    wanted = latent(pipe)
    for same in (None, {}, {"scale": 1.0}):
        assert torch.equal(latent(pipe, cross_attention_kwargs=same), wanted)
    with mixture.strengths({"fox": 0.5, "hat": 0.5}):
        half = latent(pipe)
    torch.testing.assert_close(latent(pipe, cross_attention_kwargs={"scale": 0.5}), half, rtol=0, atol=1e-5)
    with mixture.tiled(0):
        whole = latent(pipe)
    for _ in range(2):  # it is said of each picture
        with pytest.warns(UserWarning, match="only know the scale of LoRAs, not 'mine', so this is drawn as one picture"):
            assert torch.equal(latent(pipe, cross_attention_kwargs={"mine": 1}), whole)
    with mixture.tiled(), pytest.raises(ValueError, match="not 'mine': draw without it"):
        latent(pipe, cross_attention_kwargs={"mine": 1})


@pytest.mark.parametrize("model", ["sd", *thorough("sdxl")])
def test_the_scale_of_a_call_reaches_the_text_of_each_tile(pipe, experts, tmp_path, model):
    pipe = sdxl() if model == "sdxl" else pipe
    files = {name: tiny_lora(pipe, tmp_path / name, seed=seed) for seed, name in enumerate(("fox", "hat"))}
    mixture = mole.attach(pipe, {name: replace(read_expert(path), triggers=(WORDS[name],)) for name, path in files.items()})
    assert "text_encoder" in mixture.banks
    with mixture.tiled(1.0, since=0):
        scaled = latent(pipe, cross_attention_kwargs={"scale": 0.5})
        with mixture.strengths({"fox": 0.5, "hat": 0.5}):
            wanted = latent(pipe)
    torch.testing.assert_close(scaled, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["DDIMScheduler", *thorough("EulerDiscreteScheduler", "HeunDiscreteScheduler")])
@pytest.mark.parametrize("host", ["sd", "sdxl", "sd3"])
def test_a_step_in_tiles_waits_for_nothing_that_a_step_of_the_base_does_not_wait_for(tmp_path, sampler, host):
    pipe = {"sd": tiny_pipeline, "sdxl": sdxl, "sd3": sd3}[host]()
    pipe.set_progress_bar_config(disable=True)
    if host != "sd3":
        pipe.scheduler = getattr(diffusers, sampler).from_config(pipe.scheduler.config)

    def drawn(steps):
        return latent(pipe, steps=steps)

    base = waits_of_a_step(drawn)
    experts = {
        name: replace(read_expert(tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i), name), triggers=(name,))
        for i, name in enumerate(("fox", "hen"))
    }
    mixture = mole.attach(pipe, experts, "mole")
    with mixture.tiled(1.0, since=0):
        assert waits_of_a_step(drawn) <= base
    with mixture.tiled(0):
        assert waits_of_a_step(drawn) <= base


def test_where_there_is_no_room_a_step_is_one_call(pipe, experts):
    """What is recorded by steps is as without tiles, and gates are evaluated as often."""
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")}, "mole")

    asked = asked_gates(mixture)

    def told(tiling):
        asked.clear()
        with tiling, mixture.trace(maps=True) as trace, mixture.every(2):
            latent(pipe, steps=4)
        return [*trace.maps], len(asked)

    by_itself = told(nullcontext())
    assert by_itself == told(mixture.tiled(0))
    assert by_itself[0] == [0, 1, 2, 3]


def test_films_are_drawn_as_one(tmp_path):
    pipe, options = HOSTS["animatediff"]()
    pipe.set_progress_bar_config(disable=True)
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    mixture = mole.attach(pipe, {n: replace(read_expert(path, n), triggers=(WORDS[n],)) for n, path in files.items()})
    pipe.unet.config["sample_size"] = 1
    video = draw(pipe, options, PROMPT)
    with mixture.tiled(0):
        assert torch.equal(draw(pipe, options, PROMPT), video)
    with mixture.tiled(), pytest.raises(ValueError, match="this is a video"):
        draw(pipe, options, PROMPT)


@pytest.mark.thorough
def test_a_region_that_is_no_subjects_place_is_kept(pipe, experts):
    """A style in a part of the picture cannot be kept there in tiles."""
    pipe.unet.register_to_config(sample_size=8)
    mixture = mole.attach(pipe, experts)
    mixture.bind({"ink": (None, "left")})
    prompt = "ink art of a fox+a hen"
    found = latent(pipe, prompt)
    with mixture.tiled(0):
        assert torch.equal(latent(pipe, prompt), found)
    with mixture.tiled(), pytest.raises(ValueError, match="'ink' has a region, but is no subject"):
        latent(pipe, prompt)


def test_nouns_keep_the_places_of_their_tiles(pipe, experts):
    """However the tokenizer spells them."""
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    for prompt in ("a fox,a b&a hen", "a fox+a t-x+a hen"):
        with mixture.tiled():
            latent(pipe, prompt, noise(16, 48), steps=2)
        (layout,) = mixture.layouts
        for name, columns in (("fox", slice(0, 16)), ("hat", slice(32, 48))):
            wanted = torch.zeros(16, 48)
            wanted[:, columns] = 1
            assert torch.equal(layout.regions[name], wanted), (prompt, name)
        assert not mixture.binding_warnings


def test_what_cannot_be_drawn_in_tiles_is_said(pipe, experts):
    mixture = mole.attach(pipe, experts)
    with pytest.raises(ValueError, match=r"0 <= since < until <= 1, got since=None, until=1\.5"), mixture.tiled(1.5):
        pass
    with pytest.raises(ValueError, match=r"0 <= since < until <= 1, got since=None, until='all'"), mixture.tiled("all"):
        pass
    with pytest.raises(ValueError, match="give `prompt`, too"), mixture.tiled(encode=lambda part: (part, None)):
        pass
    with pytest.raises(ValueError, match=r"got since=0\.5, until=0\.5"), mixture.tiled(0.5, since=0.5):
        pass
    with mixture.tiled(), pytest.raises(ValueError, match="tiles are drawn of one prompt"):
        latent(pipe, ["a fox", "a hen"], torch.cat([noise()] * 2))
    mixture.bind({"fox": (None, "everywhere"), "hat": (None, "everywhere")})
    with mixture.tiled(1.0, since=0):  # nothing has a place
        assert torch.isfinite(latent(pipe)).all()
    mixture.bind({"fox": (None, (0.0, 0.0, 1.0, 1.0)), "hat": (None, "auto")})
    with mixture.tiled(), pytest.raises(ValueError, match="leave no place for 'hen'"):
        latent(pipe)
    mixture.bind({"fox": (None, "left"), "hat": (None, "right")})
    residual = {"mid_block_additional_residual": torch.zeros(1, 16, 8, 8)}
    pipe.scheduler.set_timesteps(2)
    call = {"prompt": PROMPT}
    with mixture.tiled(), mixture.drawing(call), pytest.raises(ValueError, match="a ControlNet sees the whole picture"):
        pipe.unet(noise(), pipe.scheduler.timesteps[0], torch.zeros(1, 16, 16), **residual)


def test_tiles_of_another_prompt_than_the_calls_are_refused(pipe, experts):
    mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    with tiled(pipe, "a fox+a hen"):
        drawn = latent(pipe, "a fox+a hen")
        with pytest.raises(ValueError, match="the tiles' prompt is 'a fox.a hen', and that of the call is 'a hen'"):
            latent(pipe, "a hen")
        assert torch.equal(latent(pipe, "a fox+a hen"), drawn)


@pytest.mark.parametrize("prompt", ["fox with hen", "fox", "hen fox"])
def test_a_picture_that_should_be_in_tiles_and_is_not_says_why(pipe, experts, prompt):
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    with mixture.tiled():
        latent(pipe, prompt)
    assert any("drawn as one, and not in tiles: " in why for why in mixture.binding_warnings)
    latent(pipe, prompt)
    assert not any("tiles" in why for why in mixture.binding_warnings)


@pytest.mark.parametrize("block", ["fixed", "rows"])
def test_weights_by_hand_say_that_they_are_drawn_as_one_picture(pipe, experts, block):
    mixture = mole.attach(pipe, {name: experts[name] for name in ("fox", "hat")})
    weights = {"fox": 1.0, "hat": 1.0}
    with mixture.fixed(weights) if block == "fixed" else mixture.rows([weights]), mixture.tiled():
        latent(pipe)
    assert any("not in tiles: weights by hand" in why for why in mixture.binding_warnings)
