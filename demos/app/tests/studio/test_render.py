"""What a studio draws: sizes, seeds, tiles, pictures that are drawn over, other hosts, second prompts."""

import dataclasses
import warnings

import hosts
import numpy as np
import pytest
import torch
from PIL import Image
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

from mole_app.studio.base_models import usual_size
from mole_app.studio.catalog import Catalog
from mole_app.studio.detail_pass import enlarged, put_back, subjects
from mole_app.studio.memory import Memory, place
from mole_app.studio.picture_notes import PictureNotes
from mole_app.studio.picture_passes import (
    drawable,
    drawing_with,
    fitted,
    on_white,
    pixels_hash,
    steps_drawn,
    with_pictures,
)
from mole_app.studio.prompt_weights import call_arguments, chunks_of
from mole_app.studio.recipe import READ_WITH, Recipe
from mole_app.studio.render import Studio
from mole_diffusers import attach, attached, detach
from mole_diffusers.binding.who_acts import INACTIVE

RECIPE = Recipe("a fox in ink <lora:fox:0.8> <lora:ink:1>", seed=7, steps=4, width=32, height=32)


@pytest.fixture(scope="module")
def studio(loras):
    return Studio(tiny_pipeline(), Catalog(loras, {}), "tiny")


@pytest.fixture
def photo():
    """A picture of noise, 48 x 32."""
    values = np.random.default_rng(0).integers(0, 256, (32, 48, 3), dtype=np.uint8)
    return Image.fromarray(values)


def array(image):
    return np.asarray(image, int)


def of_16_bits(grey):
    return Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)


def far(a, b):
    """The largest difference of two pictures, in 0..255."""
    return np.abs(array(a) - array(b)).max()


# ---- seeds, sizes


def test_a_random_seed_is_in_the_recipe(studio):
    asked = dataclasses.replace(RECIPE, seed=-1)
    first, second = studio.complete(asked), studio.complete(asked)
    assert first.seed != second.seed
    assert min(first.seed, second.seed) >= 0
    assert studio.complete(first).seed == first.seed


@pytest.mark.parametrize(("tag", "last"), [("start=30", 2), ("stop=0", 0), ("start=1", None)])
def test_a_tag_that_never_acts_is_said(studio, tag, last):
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt=f"a fox <lora:fox:1:{tag}>", steps=2))
    start = tag.removeprefix("start=") if "start" in tag else 0
    said = f"'fox' acts in no step: it starts at {start}, and ends before {last}"
    assert studio.notes(recipe, recipe) == ([] if last is None else [said])


@pytest.mark.parametrize("name", READ_WITH)
def test_a_setting_that_nothing_reads_is_said(studio, name):
    plain = studio.complete(RECIPE)
    recipe = dataclasses.replace(plain, **{name: 0.3})
    assert studio.notes(recipe, recipe) == [f"{name} does nothing without {READ_WITH[name]}".replace("_", " ")]
    assert np.array_equal(studio.draw(recipe), studio.draw(plain))
    other = 2.0 if READ_WITH[name] == "hires" else "given"
    assert dataclasses.replace(recipe, **{READ_WITH[name]: other}).unread == {}


@pytest.mark.parametrize("syntax", ["{day|night}", "__time__", "AND"])
def test_what_other_programs_do_not_read_as_words_is_said(studio, syntax):
    plain = studio.complete(dataclasses.replace(RECIPE, prompt="A FOX AND (AN OWL)", negative="fog and_AND __ {a}"))
    assert studio.notes(plain, plain) == []
    said = f"{syntax} is read as words: nothing is chosen or combined here"
    for given in ({"prompt": f"a fox {syntax} an owl"}, {"negative": f"fog {syntax} rain"}):
        recipe = studio.complete(dataclasses.replace(RECIPE, **given))
        assert studio.notes(recipe, recipe) == [said]


def test_a_lora_at_strength_0_takes_no_words_from_another(studio):
    prompt = "a fox beside an owl <lora:fox:1:word=fox:region=left>"
    prompts = (prompt, f"{prompt} <lora:ink:0:word=owl>")
    alone, both = (studio.complete(dataclasses.replace(RECIPE, prompt=each)) for each in prompts)
    assert far(studio.draw(both), studio.draw(alone)) == 0
    assert studio.explain(both).experts["ink"].place == INACTIVE
    on = studio.complete(dataclasses.replace(RECIPE, prompt=f"{prompt} <lora:ink:0@0,1@1:word=owl>"))
    assert studio.explain(on).experts["ink"].place != INACTIVE


def test_tiles_that_are_asked_for_and_not_drawn_are_said(studio):
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1:word=fox>", binding="tiles"))
    assert studio.notes(recipe, recipe) == [f"no tiles are drawn: {studio.explain(recipe).why_no_tiles}"]
    assert studio.explain(recipe).why_no_tiles


def test_sizes_are_rounded_to_what_can_be_drawn(studio):
    asked = dataclasses.replace(RECIPE, width=37, height=43)
    recipe = studio.complete(asked)
    assert studio.draw(recipe).size == (recipe.width, recipe.height) == (40, 40)
    assert studio.notes(asked, recipe) == ["37 x 43 is rounded to 40 x 40 pixels"]
    assert studio.notes(recipe, recipe) == []


# ---- drawing over pictures


@pytest.mark.parametrize("masked", [*thorough(False), True])
def test_drawing_over_a_picture_is_diffusers_call_with_the_mixture_on(studio, photo, masked):
    """The LoRAs as `attach` puts them on the other pipeline; without a LoRA it is the plain call."""
    mask = Image.linear_gradient("L").resize(photo.size) if masked else None
    recipe = with_pictures(dataclasses.replace(RECIPE, width=48, strength=0.5), photo, mask)
    recipe = studio.complete(recipe)
    drawn = studio.draw(recipe, image=photo, mask=mask)
    plain = studio.draw(studio.complete(dataclasses.replace(recipe, prompt="a fox in ink")), image=photo, mask=mask)
    pipe = drawing_with(tiny_pipeline(), over=True, masked=masked)
    extra = {"mask_image": mask, "width": 48, "height": 32} if masked else {}

    def call():
        generator = torch.Generator().manual_seed(7)
        given = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": generator} | extra
        made = pipe("a fox in ink", image=photo, strength=0.5, **given).images[0]
        return Image.composite(made, photo, mask) if masked else made

    assert far(plain, call()) == 0
    files = {"fox": (studio.catalog.loras["fox"], 0.8), "ink": studio.catalog.loras["ink"]}
    attach(pipe, files)
    assert far(drawn, call()) <= 1
    detach(pipe)
    assert far(drawn, plain) > 2
    assert far(studio.draw(studio.complete(RECIPE)), photo.resize((32, 32))) > 2


@pytest.mark.thorough
def test_binding_acts_where_a_picture_is_drawn_over(studio, photo):
    prompt = "a fox in ink <lora:fox:1:word=fox:region=left> <lora:ink:1:word=ink:region=right>"
    recipe = studio.complete(with_pictures(dataclasses.replace(RECIPE, prompt=prompt, strength=0.5), photo))
    bound = studio.draw(recipe, image=photo)
    assert far(studio.draw(dataclasses.replace(recipe, binding="none"), image=photo), bound) > 0
    studio.draw(recipe, image=photo)
    (layout,) = attached(studio.base.pipe).layouts
    assert layout is not None
    swapped = dataclasses.replace(recipe, prompt=prompt.replace("left", "top"))
    assert far(studio.draw(swapped, image=photo), bound) > 0


@pytest.fixture
def room_for_tiles(studio):
    """Sets the size in the latents that the UNet counts as trained at."""
    own = studio.base.pipe.unet.config.sample_size
    yield lambda size: studio.base.pipe.unet.register_to_config(sample_size=size)
    studio.base.pipe.unet.register_to_config(sample_size=own)


def test_subjects_are_drawn_in_tiles_in_the_first_pass(studio, loras, photo, room_for_tiles):
    """With gates alone, and not over a picture; what is brought to a larger size is drawn over as one."""
    prompt = "a fox and a (hen:1.0) <lora:fox:0.8:word=fox> <lora:ink:1:word=hen>"
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt=prompt, binding="tiles", steps=2))
    pipe = tiny_pipeline()
    attach(pipe, {"fox": (loras["fox"], 0.8), "ink": loras["ink"]}, binding={"fox": "fox", "ink": "hen"})
    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    with attached(pipe).tiled(prompt="a fox and a hen"):
        (wanted,) = pipe("a fox and a hen", generator=torch.Generator().manual_seed(7), **call).images
    assert far(studio.draw(recipe), wanted) <= 1
    bound = dataclasses.replace(recipe, binding="bound")
    assert far(studio.draw(bound), wanted) > 1
    plain = dataclasses.replace(bound, prompt=prompt.replace("(hen:1.0)", "hen"))
    automatic = dataclasses.replace(plain, binding="auto")
    assert not studio.draws_in_tiles(automatic)
    assert far(studio.draw(automatic), studio.draw(plain)) == 0
    room_for_tiles(8)
    assert studio.draws_in_tiles(automatic)
    assert studio.notes(automatic, automatic) == []
    assert far(studio.draw(automatic), wanted) <= 1
    assert far(studio.draw(plain), studio.draw(bound)) <= 1
    in_tiles, as_one = (dataclasses.replace(r, negative="an ink hat, " * 40) for r in (automatic, plain))
    assert studio.draws_in_tiles(in_tiles)
    assert far(studio.draw(in_tiles), studio.draw(as_one)) > 1
    assert not studio.notes(recipe, recipe)
    over = with_pictures(recipe, photo)
    assert "tiles are drawn from noise" in " ".join(studio.notes(over, over, photo))
    for changes, pictures in (({"arm": "sum"}, {}), ({}, {"image": photo})):
        each = [
            studio.draw(with_pictures(dataclasses.replace(r, **changes), **pictures), **pictures) for r in (recipe, bound)
        ]
        assert far(*each) == 0


def of_room(width, height, own=(32, 32)):
    beyond = f"the base was trained at {own[0]} x {own[1]}, and may draw subjects twice there"
    return f"at {width} x {height} pixels, each subject is drawn by itself in some steps; {beyond}"


@pytest.mark.parametrize("host", ["sd15", *thorough("sdxl")])
def test_a_recipe_of_several_subjects_without_a_size_is_drawn_at_the_size_of_diffusers(host, tmp_path):
    pipe, options = hosts.HOSTS[host]()
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    studio = Studio(pipe, Catalog(files, {}), "tiny")
    recipe = studio.complete(Recipe("a fox and a hen <lora:fox:1:word=fox> <lora:hat:1:word=hen>", steps=1))
    alone = {name: value for name, value in options.items() if name not in ("width", "height")}
    assert pipe("a fox", num_inference_steps=1, **alone).images[0].size == (recipe.width, recipe.height)
    assert studio.notes(recipe, recipe) == [of_room(2 * recipe.width, recipe.height, (recipe.width, recipe.height))]


def test_two_subjects_in_sdxl_are_shown_a_size_that_it_was_trained_at(tmp_path):
    pipe, _ = hosts.HOSTS["sdxl"]()
    pipe.default_sample_size = 1024 // pipe.vae_scale_factor
    pipe.unet.register_to_config(sample_size=pipe.default_sample_size)
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    studio = Studio(pipe, Catalog(files, {}), "tiny")
    for region, room, two in (("", (2048, 1024), "1344 x 768"), (":region=top", (1024, 2048), "768 x 1344")):
        tags = f"<lora:fox:1:word=fox{region}> <lora:hat:1:word=hen{region.replace('top', 'bottom')}>"
        recipe = studio.complete(Recipe(f"a fox and a hen {tags}"))
        assert (recipe.width, recipe.height) == (1024, 1024)
        said = f"{of_room(*room, (1024, 1024))}: two have more room at {two}, which it was trained at, too"
        assert studio.notes(recipe, recipe) == [said]


THREE = "fox, hen & elk <lora:fox:1:word=fox> <lora:hat:1:word=hen> <lora:ink:1:word=elk>"


@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({}, (64, 32)),
        ({"prompt": THREE}, (96, 32)),
        ({"prompt": THREE, "width": 64}, (96, 32)),
        ({"prompt": "a fox and a hen <lora:fox:1:word=fox:region=top> <lora:ink:1:word=hen:region=bottom>"}, (32, 64)),
        ({"prompt": "a fox and a hen <lora:fox:1:word=fox:region=0,0,0.1,1> <lora:ink:1:word=hen>"}, None),  # at no size
        ({"prompt": "a fox riding a hen <lora:fox:1:word=fox> <lora:ink:1:word=hen>"}, (32, 64)),
        ({"prompt": "a fox <lora:fox:1:word=fox>"}, None),
        ({"binding": "bound"}, None),
        ({"arm": "sum"}, None),
        ({"image": "0" * 64}, None),
    ],
)
def test_the_size_from_which_there_is_room_for_tiles_is_said(studio, changes, room):
    asked = {"prompt": "a fox and a hen <lora:fox:1:word=fox> <lora:ink:1:word=hen>", "gates": "sum", **changes}
    recipe = studio.complete(Recipe(**{"width": 32, "height": 32, **asked}))
    assert studio.notes(recipe, recipe) == ([] if room is None else [of_room(*room)])
    if room is not None:
        assert studio.draws_in_tiles(dataclasses.replace(recipe, width=room[0], height=room[1]))
        assert not studio.draws_in_tiles(dataclasses.replace(recipe, width=room[0] // 2, height=room[1]))


def test_tiles_that_are_asked_for_are_explained_without_room(studio):
    recipe = studio.complete(Recipe(THREE, width=32, height=32))
    assert "too small" in studio.explain(recipe).why_no_tiles
    assert len(studio.explain(dataclasses.replace(recipe, binding="tiles")).tiles) == 3


def test_no_size_is_said_that_the_app_does_not_draw(studio, monkeypatch):
    recipe = studio.complete(Recipe(THREE, width=32, height=32))
    monkeypatch.setattr("mole_diffusers.patching.subjects.per_subject.MOST_SIDE", 95)
    assert studio.notes(recipe, recipe) == [of_room(64, 64)]
    monkeypatch.setattr("mole_diffusers.patching.subjects.per_subject.MOST_SIDE", 63)
    assert studio.notes(recipe, recipe) == []


def test_a_painted_region_without_its_mask_is_said(studio):
    recipe = studio.complete(Recipe("a fox <lora:fox:1:word=fox:region=painted>", width=32, height=32))
    assert "the region of 'fox' is painted, but the recipe has no mask for it" in " ".join(studio.notes(recipe, recipe))


def _without_weights(recipe):
    return dataclasses.replace(recipe, prompt=recipe.prompt.replace("(ink:1.2)", "ink").replace("((hat))", "hat"))


def test_with_a_second_prompt_weights_bring_no_tiles(tmp_path):
    """As without them: tiles would not read it."""
    pipe, _ = hosts.HOSTS["sdxl"]()
    pipe.unet.register_to_config(sample_size=8)
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    studio = Studio(pipe, Catalog(files, {}), "tiny")
    prompt = "a (fox:1.2) and a hen <lora:fox:1:word=fox> <lora:hat:1:word=hen>"
    for prompt_2, tiled in (("", True), ("ink", False)):
        recipe = studio.complete(dataclasses.replace(RECIPE, prompt=prompt, prompt_2=prompt_2, steps=2))
        assert studio.draws_in_tiles(recipe) == tiled
        bound = studio.draw(dataclasses.replace(recipe, binding="bound"))
        assert (far(studio.draw(recipe), bound) > 1) == tiled


LONG = ["fox and hen, in the far, far, far east", "far, far, far, far, far, far, fox and hen", "a fox BREAK a hen"]


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize(
    ("host", "prompt", "second"),
    [
        ("sdxl", "hat", "fox and hen"),
        ("sdxl", "fox and hen BREAK a tree", ""),
        ("flux", "fox and hen", "fox"),
        *thorough(*((host, "fox and hen", second) for host in ("sdxl", "flux") for second in ("", "hen and fox", "ink"))),
        *thorough(*((host, prompt, "") for host in ("sd15", "sdxl") for prompt in LONG)),
    ],
)
def test_what_is_explained_is_what_is_drawn(host, prompt, second, tmp_path):
    """Also of a second prompt, and of a prompt that is read in several chunks: words, places, tiles."""
    pipe, _ = hosts.HOSTS[host]()
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    studio, seen, noted = Studio(pipe, Catalog(files, {}), host), [], PictureNotes()
    prompt = f"{prompt} <lora:fox:1:word=fox> <lora:hat:1:word=hen>"
    recipe = studio.complete(Recipe(prompt, prompt_2=second, steps=2, width=32, height=32, gates="sum"))

    def look(*_):
        picture = attached(pipe).parts.settings.binding.now.text.picture
        seen.append(picture.readings[picture.picture_rows[0]])

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        studio.draw(recipe, on_step=look, noted=noted)
    said = studio.explain(recipe).experts
    assert [bool(role.words) for role in said.values()] == list(seen[-1].mentioned)
    placed = {name for name, role in said.items() if role.place == "own"}
    assert placed == (set(noted.layout.regions) if seen[-1].subjects else set())
    tiled = dataclasses.replace(recipe, binding="tiles")
    if second or len(chunks_of(pipe, recipe.text)) > 1:
        assert studio.explain(tiled).tiles is None
        if "and" in recipe.text:  # it lists two, so that the wish is refused
            with pytest.raises(ValueError, match=r"draw without prompt_2|shorten"):
                studio.draw(tiled)


@pytest.mark.thorough
def test_a_part_of_a_prompt_has_the_weights_of_its_words_in_tiles(studio, loras, room_for_tiles):
    """By itself, where there is room, as without weights; each tile's prompt is the part with its brackets."""
    prompt = "(ink:1.2), a fox, a ((hen)) <lora:fox:0.8:word=fox> <lora:ink:1:word=hen>"
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt=prompt, binding="tiles", steps=2))
    pipe = tiny_pipeline()
    attach(pipe, {"fox": (loras["fox"], 0.8), "ink": loras["ink"]}, binding={"fox": "fox", "ink": "hen"})
    written = {"ink, a fox": "(ink:1.2), a fox", "ink, a hen": "(ink:1.2), a ((hen))"}

    def encode(part):
        return call_arguments(pipe, written[part.text], guided=False)["prompt_embeds"], None

    call = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    with attached(pipe).tiled(prompt="ink, a fox, a hen", encode=encode):
        states = call_arguments(pipe, "(ink:1.2), a fox, a ((hen))")
        (wanted,) = pipe(**states, generator=torch.Generator().manual_seed(7), **call).images
    assert far(studio.draw(recipe), wanted) <= 1
    automatic = dataclasses.replace(recipe, binding="auto")
    assert not studio.draws_in_tiles(automatic)
    bound = studio.draw(dataclasses.replace(recipe, binding="bound"))
    assert far(studio.draw(automatic), bound) == 0
    assert far(bound, wanted) > 1
    room_for_tiles(8)
    assert studio.draws_in_tiles(automatic)
    assert far(studio.draw(automatic), wanted) <= 1
    plain = _without_weights(automatic)
    against = {
        words: studio.draw(dataclasses.replace(plain, negative=words)) for words in ("blur", "(blur:1)", "(blur:1.5)")
    }
    assert far(against["blur"], against["(blur:1)"]) == 0
    assert far(against["blur"], against["(blur:1.5)"]) > 0
    bound = studio.draw(dataclasses.replace(plain, negative="(blur:1.5)", binding="bound"))
    assert far(against["(blur:1.5)"], bound) > 1
    in_parts = dataclasses.replace(automatic, prompt=prompt.replace("hen))", "hen)) BREAK ink"))
    assert not studio.draws_in_tiles(in_parts)
    assert far(studio.draw(in_parts), studio.draw(dataclasses.replace(in_parts, binding="bound"))) == 0


def test_binding_knows_which_text_is_the_negative_one_where_a_picture_is_drawn_over(studio, photo):
    """As a mixture that is attached to that pipeline: its call says so, where both texts have words of LoRAs."""
    prompt = "a fox in ink <lora:fox:1:word=fox:region=left> <lora:ink:1:word=ink:region=right>"
    recipe = dataclasses.replace(RECIPE, prompt=prompt, negative="ink", strength=0.5, width=48)
    recipe = studio.complete(with_pictures(recipe, photo))
    drawn = studio.draw(recipe, image=photo)
    pipe = drawing_with(tiny_pipeline(), over=True)
    files = {name: studio.catalog.loras[name] for name in ("fox", "ink")}
    attach(pipe, files, binding={"fox": ("fox", "left"), "ink": ("ink", "right")})
    given = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    assert far(drawn, pipe("a fox in ink", negative_prompt="ink", image=photo, strength=0.5, **given).images[0]) == 0
    detach(pipe)


def test_a_mask_is_read_as_a_region_whatever_its_mode(studio, photo):
    grey = Image.linear_gradient("L").resize(photo.size)
    deep = of_16_bits(grey)
    clear = Image.new("LA", photo.size, 255)
    clear.putalpha(grey)
    wanted = with_pictures(RECIPE, photo, grey)
    assert wanted.mask == pixels_hash(grey)
    for mask in (deep, clear, clear.convert("RGBA")):
        assert with_pictures(RECIPE, photo, mask) == wanted
    with pytest.raises(ValueError, match="'mask' is a picture of mode 'F'; make it one of mode 'L'"):
        with_pictures(RECIPE, photo, grey.convert("F"))
    recipe = studio.complete(dataclasses.replace(wanted, width=48, strength=0.5))
    assert far(*(studio.draw(recipe, image=photo, mask=mask) for mask in (deep, grey))) == 0


def test_a_picture_of_16_bits_is_drawn_over_as_one_of_8(photo):
    grey = photo.convert("L")
    deep = of_16_bits(grey)
    assert deep.mode == "I;16"
    assert np.array_equal(array(on_white(deep)), array(grey.convert("RGB")))


def test_the_part_outside_a_mask_stays(studio, photo):
    mask = Image.new("L", photo.size, 0)
    mask.paste(255, (0, 0, 24, 32))
    recipe = studio.complete(with_pictures(dataclasses.replace(RECIPE, width=48, strength=1.0), photo, mask))
    changed = np.abs(array(studio.draw(recipe, image=photo, mask=mask)) - array(photo)).max(-1)
    assert changed[:, 24:].max() == 0
    assert changed[:, :24].mean() > 10


def test_a_hires_pass_draws_over_the_picture_made_larger(studio):
    recipe = studio.complete(dataclasses.replace(RECIPE, hires=1.5, hires_strength=0.5))
    seen = []
    drawn = studio.draw(recipe, on_step=lambda step, _: seen.append(step))
    assert (drawn.size, seen) == ((48, 48), [1, 2, 3, 4, 1, 2])
    assert studio.total_steps(recipe) == len(seen)
    small = studio.draw(dataclasses.replace(recipe, hires=1.0))
    large = small.resize((48, 48), Image.Resampling.LANCZOS)
    over = with_pictures(dataclasses.replace(recipe, hires=1.0, width=48, height=48, strength=0.5), large)
    assert far(studio.draw(over, image=large), drawn) == 0
    assert far(studio.draw(dataclasses.replace(recipe, hires=1.0)), small) == 0  # the next one is as before


TWO = "a fox and a hat <lora:fox:0.8:region=0,0,0.4,1> <lora:hat:1:region=0.6,0,1,1> <lora:ink:1:region=everywhere>"


def test_a_detail_pass_draws_each_subject_again_enlarged_in_its_place_by_the_loras_that_act_there(studio):
    recipe = studio.complete(dataclasses.replace(RECIPE, prompt=TWO, width=64, height=32, detail=0.5))
    plain, noted, seen = dataclasses.replace(recipe, detail=0.0), PictureNotes(), []
    before = studio.draw(plain, noted=noted)
    after = studio.draw(recipe, on_step=lambda step, _: seen.append(step))
    assert seen == [1, 2, 3, 4, 1, 2, 1, 2]
    assert studio.total_steps(recipe) == len(seen)
    found = subjects(studio.explain(recipe), noted.layout.regions, before.size)
    assert [(each.name, each.acting) for each in found] == [("fox", ("fox", "ink")), ("hat", ("hat", "ink"))]
    outside = np.ones((32, 64), bool)
    for left, top, right, bottom in (each.box for each in found):
        outside[top:bottom, left:right] = False
    assert 0 < np.sum(outside.all(0)) < 12  # the columns between them
    assert np.abs(array(after) - array(before))[outside].max() == 0
    theirs = before
    for subject in found:  # the same by img2img with the plain sum of these LoRAs
        size = drawable(studio.base.pipe, *enlarged(subject.box, (32, 32)))
        crop = fitted(theirs.crop(subject.box), *size)
        tags = " ".join(str(tag) for tag in recipe.tags if tag.name in subject.acting)
        over = {"prompt": f"{recipe.text} {tags}", "arm": "sum", "width": size[0], "height": size[1], "strength": 0.5}
        again = studio.complete(with_pictures(dataclasses.replace(RECIPE, **over), crop))
        theirs = put_back(theirs, studio.draw(again, image=crop), subject)
    assert far(after, theirs) <= 1
    assert far(after, before) > 10


def test_a_detail_pass_that_has_nothing_to_do_is_said(studio):
    asked = dataclasses.replace(RECIPE, detail=0.3, binding="none")
    recipe = studio.complete(asked)
    assert studio.notes(asked, recipe)[-1].startswith("no subject of the prompt has a place of its own")
    assert far(studio.draw(recipe), studio.draw(dataclasses.replace(recipe, detail=0.0))) == 0
    with pytest.raises(ValueError, match="4 steps at strength 0.1 are none"):
        studio.total_steps(studio.complete(dataclasses.replace(RECIPE, prompt=TWO, detail=0.1)))


@pytest.mark.parametrize(
    ("size", "wide", "drawn", "said"),
    [
        ((64, 32), {}, (64, 32), []),
        ((43, 70), {}, (40, 72), ["43 x 70 is rounded to 40 x 72 pixels"]),
        ((64, 32), {"width": 48}, (48, 32), ["the picture of 64 x 32 is drawn over at 48 x 32 pixels"]),
        ((4096, 512), {}, (2048, 256), ["the picture of 4096 x 512 is drawn over at 2048 x 256 pixels"]),
        ((6, 3000), {}, (16, 2048), ["the picture of 6 x 3000 is drawn over at 16 x 2048 pixels"]),
    ],
)
def test_a_picture_is_drawn_over_at_its_own_size(studio, size, wide, drawn, said):
    image = Image.new("RGB", size)
    asked = with_pictures(Recipe("a fox", **wide), image)
    recipe = studio.complete(asked)
    assert (recipe.width, recipe.height) == drawn
    assert studio.notes(asked, recipe, image) == said


def test_a_recipe_wants_its_own_pictures(studio, photo):
    recipe = studio.complete(with_pictures(RECIPE, photo))
    with pytest.raises(ValueError, match="needs the picture that it was made with as its image"):
        studio.draw(recipe)
    with pytest.raises(ValueError, match="was made with another picture as its image"):
        studio.draw(recipe, image=photo.rotate(90))
    with pytest.raises(ValueError, match="was made without a picture as its mask"):
        studio.draw(recipe, image=photo, mask=photo.convert("L"))
    with pytest.raises(ValueError, match="4 steps at strength 0.2 are none"):
        studio.draw(dataclasses.replace(recipe, strength=0.2), image=photo)
    with pytest.raises(ValueError, match="the mask has 32 x 48 pixels and its picture 48 x 32"):
        with_pictures(RECIPE, photo, Image.new("L", (32, 48)))
    with pytest.raises(ValueError, match="does not close the"):
        studio.complete(dataclasses.replace(RECIPE, negative="(blur"))


@pytest.mark.parametrize("steps", [4, 7, 20])
@pytest.mark.parametrize("host", ["sd15", "flux"])
def test_steps_are_counted_as_diffusers_counts_them(steps, host):
    pipe = drawing_with(hosts.HOSTS[host]()[0], over=True)
    mu = {"mu": 1.0} if host == "flux" else {}
    for strength in (0.3, 0.35, 0.5, 1.0):
        pipe.scheduler.set_timesteps(steps, **mu)
        assert steps_drawn(pipe, steps, strength) == pipe.get_timesteps(steps, strength, "cpu")[1]


# ---- memory and speed


def test_offloaded_models_draw_the_same_in_every_pass(studio, photo):
    """The CPU plays the GPU."""
    recipe = studio.complete(dataclasses.replace(RECIPE, hires=1.5, steps=2))
    pipe = tiny_pipeline()
    place(pipe, Memory("cpu", "float32", "model", tiling=False))
    offloaded = Studio(pipe, studio.catalog, "tiny")
    assert far(offloaded.draw(recipe), studio.draw(recipe)) == 0
    over = studio.complete(with_pictures(dataclasses.replace(RECIPE, steps=2), photo))
    assert far(offloaded.draw(over, image=photo), studio.draw(over, image=photo)) == 0


@pytest.mark.thorough
def test_a_compiled_model_draws_what_it_draws_without(studio):
    pipe = tiny_pipeline()
    place(pipe, Memory("cpu", "float32", compiled=True))
    compiled = Studio(pipe, studio.catalog, "tiny")
    for prompt in ("a fox in ink <lora:fox:0.8>", "a hat <lora:hat:1>"):
        recipe = studio.complete(dataclasses.replace(RECIPE, prompt=prompt))
        assert far(compiled.draw(recipe), studio.draw(recipe)) <= 1


# ---- other hosts


@pytest.mark.parametrize("host", ["flux", *thorough("sd3", "sdxl")])
def test_other_hosts_draw_and_draw_over(host, photo, tmp_path):
    pipe, _ = hosts.HOSTS[host]()
    loras = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "ink"))}
    studio = Studio(pipe, Catalog(loras, {}), host)
    assert usual_size(studio.base.pipe, host, "")[0] >= 32
    recipe = studio.complete(dataclasses.replace(RECIPE, steps=2, sampler="euler", hires=1.5))
    shapes = []
    drawn = studio.draw(recipe, on_step=lambda _, latents: shapes.append(tuple(latents.shape)))
    assert drawn.size == (48, 48)
    assert shapes[0] == (1, 4, 16, 16)
    assert shapes[-1] == (1, 4, 24, 24)
    assert far(studio.draw(dataclasses.replace(recipe, arm="base")), drawn) > 0
    over = studio.complete(with_pictures(dataclasses.replace(RECIPE, steps=2, width=48, strength=0.5), photo))
    assert studio.draw(over, image=photo).size == (48, 32)
    if host == "flux":
        assert studio.base.samplers == ["Euler"]
        with pytest.raises(ValueError, match="unknown sampler 'DDIM'; known: Euler"):
            studio.complete(dataclasses.replace(RECIPE, sampler="DDIM"))
        noted = dataclasses.replace(recipe, negative="blur", prompt="a fox in ink with a red hat")
        notes = studio.notes(noted, noted)
        assert "the tokenizer reads 14 tokens of the prompt, not 'red hat'" in notes[0]
        assert notes[1] == "FluxPipeline is drawn without the negative prompt"
        with pytest.raises(ValueError, match="block weights are for UNets; FluxTransformer2DModel"):
            studio.draw(studio.complete(dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1:lbw=MIDD>")))


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize("host", ["flux", *thorough("sdxl", "sd3")])
def test_a_second_prompt_is_drawn_and_its_words_are_bound(host, tmp_path):
    """Words that only the second encoder reads have places; the picture is that of the pipeline's own call."""
    pipe, _ = hosts.HOSTS[host]()
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    studio = Studio(pipe, Catalog(files, {}), host)
    tags = "<lora:fox:1:word=fox> <lora:hat:1:word=owl>"
    asked = Recipe(f"a hen {tags}", prompt_2="a fox and an owl", steps=3, width=32, height=32, gates="sum")
    recipe = studio.complete(asked)
    assert studio.notes(asked, recipe) == []
    with warnings.catch_warnings(record=True) as said:
        drawn = studio.draw(recipe)
        assert set(attached(pipe).layouts[0].regions) == {"fox", "hat"}
        weighed = studio.draw(studio.complete(dataclasses.replace(asked, prompt_2="a fox and an (owl:1.2)")))
        assert set(attached(pipe).layouts[0].regions) == {"fox", "hat"}
    assert not [each for each in said if "silent" in str(each.message) or "not known" in str(each.message)]
    assert far(weighed, drawn) > 0
    other, _ = hosts.HOSTS[host]()
    attach(other, files, binding={"fox": "fox", "hat": "owl"})
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = other("a hen", prompt_2="a fox and an owl", width=32, height=32, **given).images[0]
    assert far(drawn, wanted) == 0
    with pytest.raises(ValueError, match="stand in the first prompt"):
        studio.complete(dataclasses.replace(asked, prompt_2="a <lora:fox:1>"))
    with pytest.raises(ValueError, match=r"does not close the \("):
        studio.complete(dataclasses.replace(asked, negative_2="(blur"))
