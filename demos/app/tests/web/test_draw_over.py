"""Drawing over a picture and larger, from the page to the file."""

import asyncio
import base64
import dataclasses
import re
from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
import torch
from app_client import PROMPT, QueueVisit, plain
from PIL import Image
from safetensors.torch import load_file
from tiers import thorough
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.picture_passes import with_pictures
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions
from mole_app.web.jobs import ignore
from mole_diffusers import attach, detach
from mole_diffusers.binding.as_text import mask_text, read_mask

pytest.importorskip("gradio")
from mole_app.web import draw_over, paint

RECIPE = Recipe(PROMPT, seed=3, steps=4, width=32, height=32, gates="sum")
PICTURE = Image.effect_noise((64, 32), 90).convert("RGB")


@pytest.fixture(scope="module")
def actions(loras, tmp_path_factory):
    return Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"), gallery=tmp_path_factory.mktemp("pictures"))


def painted_over(*boxes):
    """What the page draws with if these boxes of the picture are painted."""
    painted = Image.new("L", PICTURE.size)
    for box in boxes:
        painted.paste(255, box)
    return draw_over.pictures(PICTURE, mask_text(painted))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"), int)


def drawn(actions, recipe, *args):
    (picture,) = actions.compose(recipe, 1, *args)(ignore).pictures
    return picture


def test_what_is_painted_is_the_mask_of_the_picture():
    assert draw_over.pictures(None, "") == draw_over.pictures(None, mask_text(Image.new("L", (8, 8), 255))) == {}
    assert set(painted_over()) == set(draw_over.pictures(PICTURE, "")) == {"image"}
    found = painted_over((0, 0, 32, 32))
    assert np.array_equal(np.asarray(found["image"]), np.asarray(PICTURE))
    mask = np.asarray(found["mask"])
    assert mask[:, :28].min() == 255
    assert mask[:, 36:].max() == 0
    larger = draw_over.pictures(PICTURE, mask_text(Image.new("L", (128, 64), 255)))  # the sheet has a size of its own
    assert larger["mask"].size == PICTURE.size


@pytest.mark.parametrize("at", range(8))
def test_thin_strokes_change_the_picture(at):
    """Diffusers reads one pixel of a mask for each latent."""
    painted = Image.new("L", (1024, 1024))
    painted.paste(153, (500 + at, 200, 504 + at, 800))
    mask = np.asarray(draw_over.pictures(Image.new("RGB", painted.size), mask_text(painted))["mask"])
    assert mask[200:800, 500 + at : 504 + at].min() == 255
    assert (mask[::8, ::8] > 127).sum() >= 600 // 8
    assert (mask > 0).sum() <= 12 * 608


def test_transparent_pictures_are_drawn_over_on_white(actions, tmp_path):
    clear = PICTURE.convert("RGBA")
    clear.paste((0, 0, 0, 0), (0, 0, 32, 32))
    white = PICTURE.copy()
    white.paste("white", (0, 0, 32, 32))
    found = draw_over.pictures(clear, "")
    assert found["image"].tobytes() == white.tobytes()
    of_file = actions.studio.complete(with_pictures(RECIPE, clear))
    of_page = actions.studio.complete(with_pictures(RECIPE, white))
    assert np.array_equal(actions.studio.draw(of_file, image=clear), actions.studio.draw(of_page, image=white))


def test_a_picture_is_the_same_one_however_its_file_has_its_pixels(actions, client, tmp_path):
    """Transparent for white, with a palette, a mask in colours: on the page, from a file and through the API."""
    from gradio_client import handle_file

    page = {"image": Image.new("RGB", (64, 32), "white"), "mask": Image.new("L", (64, 32), 255)}
    page["image"].paste("red", (0, 0, 32, 32))
    clear = Image.new("RGBA", (64, 32))
    clear.paste("red", (0, 0, 32, 32))
    whole = drawn(actions, RECIPE, page)
    files = {"image": clear, "mask": page["mask"].convert("RGB")}
    palette = page | {"image": page["image"].convert("P", palette=Image.Palette.ADAPTIVE)}
    for over in (files, palette):
        assert with_pictures(RECIPE, **over) == with_pictures(RECIPE, **page)
        assert np.array_equal(actions.studio.draw(whole.recipe, **over), pixels(whole.path))
    for name, picture in files.items():
        picture.save(tmp_path / f"{name}.png")
    sent = {name: handle_file(tmp_path / f"{name}.png") for name in files}
    assert np.array_equal(pixels(client.predict(whole.recipe.to_dict(), **sent, api_name="/redraw")), pixels(whole.path))


def test_a_picture_is_drawn_over_and_its_recipe_says_so(actions):
    plain, whole = drawn(actions, RECIPE), drawn(actions, RECIPE, painted_over())
    part = drawn(actions, RECIPE, painted_over((0, 0, 32, 32)))
    assert len({pixels(one.path).tobytes() for one in (plain, whole, part)}) == 3
    read = infotext.read(part.path)
    assert (read.image == whole.recipe.image != "", read.mask != "", whole.recipe.mask) == (True, True, "")
    redrawn = actions.studio.draw(read, **painted_over((0, 0, 32, 32)))
    assert np.abs(np.asarray(redrawn, int) - pixels(part.path)).max() <= 1


@pytest.mark.parametrize("boxes", [*thorough(((),)), ((0, 0, 32, 32),)])
def test_comparing_watching_and_grids_draw_over_it_too(actions, boxes):
    over = painted_over(*boxes)
    whole, said = drawn(actions, RECIPE, over), []
    wanted = pixels(whole.path)
    compared = {picture.label: picture for picture in actions.compare(RECIPE, (), over)(ignore).pictures}
    assert {picture.recipe.image for picture in compared.values()} == {whole.recipe.image}
    assert np.array_equal(pixels(compared["bound"].path), wanted)
    assert not np.array_equal(pixels(compared["base"].path), wanted)
    assert np.array_equal(pixels(actions.look(RECIPE, None, over)(said.append).picture), wanted)
    assert str(said[-2]).startswith("2 of 2 steps")  # 0.6 of 4
    words = f"drawn over {'the painted part of ' if boxes else ''}your picture"
    for work in (
        actions.compose(RECIPE, 1, over),
        actions.look(RECIPE, None, over),
        actions.grid(RECIPE, "seed=1", "steps=4", over),
    ):
        assert words in str(work(ignore))
    sheet = actions.grid(RECIPE, "arm=gates", "seed=3", over)(ignore).sheet
    assert infotext.read(sheet).mask == whole.recipe.mask
    cells = [path for path in actions.unkept.folder.glob("*.png") if infotext.read(path).arm == "gates"]
    assert np.array_equal(pixels(max(cells, key=lambda path: path.stat().st_mtime_ns)), wanted)


def test_a_merge_that_is_asked_for_twice_is_compared_once(actions, monkeypatch):
    monkeypatch.setattr(actions, "_draw", lambda wanted, *_, **__: wanted)
    assert actions.compare(RECIPE, ["mean", "svd", *["mean"] * 30]) == actions.compare(RECIPE, ["mean", "svd"])


@pytest.mark.parametrize("boxes", [((0, 0, 32, 32),), *thorough(((),))])
def test_the_api_draws_over_what_the_page_does(actions, client, tmp_path, boxes):
    from gradio_client import handle_file

    over = painted_over(*boxes)
    sent = {}
    for name, picture in over.items():
        picture.save(tmp_path / f"{name}.png")
        sent[name] = handle_file(tmp_path / f"{name}.png")
    whole = drawn(actions, RECIPE, over)
    wanted, recipe = pixels(whole.path), dataclasses.replace(RECIPE, base="tiny").to_dict()
    own = {name: recipe[name] for name in ("seed", "steps", "width", "height", "gates", "strength")}
    (file,), (told,), _ = client.predict(recipe["prompt"], **own, **sent, api_name="/compose")
    assert (told["image"], told["mask"]) == (whole.recipe.image, whole.recipe.mask)
    assert np.array_equal(pixels(file), wanted)
    assert np.array_equal(pixels(client.predict(told, **sent, api_name="/redraw")), wanted)
    labels, files, _ = client.predict(recipe, **sent, api_name="/compare")
    compared = {picture.label: picture for picture in actions.compare(RECIPE, (), over)(ignore).pictures}
    assert labels == list(compared)
    assert all(np.array_equal(pixels(f), pixels(compared[label].path)) for label, f in zip(labels, files, strict=True))
    _, (heat, *_), _ = client.predict(recipe, **sent, api_name="/look")
    report = actions.look(RECIPE, None, over)(ignore)  # of half the steps
    assert np.array_equal(pixels(heat), np.asarray(report.heat.convert("RGB")))
    sheet = client.predict(recipe, "arm=base,gates", "seed=3", **sent, api_name="/grid")
    assert np.array_equal(pixels(sheet), pixels(actions.grid(RECIPE, "arm=base,gates", "seed=3", over)(ignore).sheet))
    assert infotext.read(sheet).image == whole.recipe.image


def test_pictures_are_read_and_written_while_others_get_answers(client, tmp_path, monkeypatch):
    """Not in the event loop, in which every visitor would wait."""
    from gradio_client import handle_file

    from mole_app.web import api

    PICTURE.save(tmp_path / "image.png")
    in_loop = []

    def noting(method):
        def call(*args, **kwargs):
            with suppress(RuntimeError):
                in_loop.append((method.__name__, asyncio.get_running_loop()))
            return method(*args, **kwargs)

        return call

    monkeypatch.setattr(api, "read_picture", noting(api.read_picture))
    monkeypatch.setattr(Image.Image, "save", noting(Image.Image.save))
    recipe = dataclasses.replace(RECIPE, base="tiny").to_dict()
    client.predict(recipe, image=handle_file(tmp_path / "image.png"), api_name="/look")
    assert in_loop == []


def test_the_api_draws_over_no_other_picture_than_the_recipes(client, tmp_path, monkeypatch):
    from gradio_client import handle_file

    PICTURE.save(tmp_path / "image.png")
    PICTURE.rotate(90).save(tmp_path / "other.png")
    (tmp_path / "text.png").write_text("no picture")
    right, wrong, text = (handle_file(tmp_path / f"{name}.png") for name in ("image", "other", "text"))
    _, (told,), _ = client.predict(PROMPT, steps=4, image=right, api_name="/compose")
    axes = ("seed=1", "steps=4")
    for name, rest in (("redraw", ()), ("compare", ()), ("look", ()), ("grid", axes)):
        for given, said in (({}, "needs the picture"), ({"image": wrong}, "made with another picture")):
            with pytest.raises(Exception, match=said):
                client.predict(told, *rest, **given, api_name=f"/{name}")
        with pytest.raises(Exception, match=r"^text.png cannot be read as a picture"):
            client.predict(told, *rest, image=text, api_name=f"/{name}")
    with pytest.raises(Exception, match="a mask needs a picture"):
        client.predict(PROMPT, mask=right, api_name="/compose")
    monkeypatch.setattr(infotext, "MAX_PIXELS", 2047)
    with pytest.raises(Exception, match=r"^image.png has 2048 pixels, more than 2047"):
        client.predict(PROMPT, image=right, api_name="/compose")


def test_open_sizes_are_those_of_the_picture_on_the_page_and_in_the_api(actions, client, tmp_path):
    """It was cut to the size of the prompt's own pictures."""
    from gradio_client import handle_file

    from mole_app.web.build import build

    odd = PICTURE.resize((70, 40))
    is_open = dataclasses.replace(RECIPE, width=0, height=0)
    visit = QueueVisit(build(actions, is_open), Width=0, Height=0, **{"To draw over": odd.convert("RGBA")})
    assert visit.press() == ""
    said = visit.done()["compose-status"]
    assert said.replace("\\", "") == "done; drawn over your picture; 70 x 40 is rounded to 72 x 40 pixels"
    newest = actions.gallery.entries()[0]
    assert pixels(newest.path).shape == (40, 72, 3)
    odd.save(tmp_path / "odd.png")
    sent = {"width": 0, "height": 0, "image": handle_file(tmp_path / "odd.png")}
    own = {name: newest.recipe.to_dict()[name] for name in ("seed", "steps", "guidance", "gates", "strength")}
    (file,), (told,), _ = client.predict(newest.recipe.prompt, **own, **sent, api_name="/compose")
    assert (told["width"], told["height"]) == (72, 40)
    assert np.array_equal(pixels(file), pixels(newest.path))


def test_what_was_drawn_over_a_picture_asks_for_it_and_is_code_with_it(actions):
    from mole_app.web.build import build

    kept = drawn(actions, RECIPE, painted_over((0, 0, 32, 32)))
    functions = {event.fn.__name__: event for event in build(actions, RECIPE).fns.values() if event.fn}
    *_, said = plain(functions["load"])(str(kept.path))
    assert "put that one into" in said
    values = [component.value for component in functions["script"].inputs[:-4]]
    code, said = plain(functions["script"])(*values, PICTURE, mask_text(Image.new("L", (8, 8), 255)), None, None)
    assert (said, 'Image.open("mask.png")' in code["value"]) == ("", True)
    assert "image.png" not in plain(functions["script"])(*values, None, "", None, None)[0]["value"]


def test_photos_are_upright(tmp_path):
    from mole_diffusers.safe_files import read_picture

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    PICTURE.save(tmp_path / "photo.png", exif=exif)
    assert np.array_equal(np.asarray(read_picture(tmp_path / "photo.png", "it")), np.rot90(np.asarray(PICTURE), -1))


def test_larger_pictures_are_counted_and_bounded(actions):
    larger = dataclasses.replace(RECIPE, hires=2.0)
    done = []
    state = actions.compose(larger, 1)(lambda state: done.append((state.done, state.total)))
    (picture,) = state.pictures
    assert str(state) == "done; 2 times larger"
    assert pixels(picture.path).shape == (64, 64, 3)
    assert done[-1] == (6, 6)  # 4 steps, and 2 of the half that is drawn over
    with pytest.raises(ValueError, match="at most 2048"):
        actions.compose(dataclasses.replace(RECIPE, width=1024, height=1024, hires=4.0), 1)


def test_what_was_changed_is_said_and_a_random_seed_is_shared(actions):
    odd = dataclasses.replace(RECIPE, width=33, seed=-1)
    state = actions.compose(odd, 2)(ignore)
    assert str(state) == "done; 33 x 32 is rounded to 32 x 32 pixels"
    first, second = (picture.recipe.seed for picture in state.pictures)
    assert (first >= 0, second) == (True, first + 1)
    assert len({picture.recipe.seed for picture in actions.compare(odd)(ignore).pictures}) == 1


def test_what_binding_warns_of_is_said_of_every_job(actions):
    """Python gives each of these warnings once, on the terminal."""
    silent = dataclasses.replace(RECIPE, prompt="a hen <lora:fox:1:word=fox>", steps=1)
    unplaced = dataclasses.replace(RECIPE, prompt="a fox and a hen <lora:fox:1:word=fox> <lora:hat:1:word=hen>", steps=1)
    for recipe, wanted in (
        (silent, "expert 'fox' acts everywhere: the prompt has none"),
        (unplaced, "got no places of their own"),
    ):
        for _ in range(2):
            said = str(actions.compose(recipe, 2)(ignore))
            assert said.startswith("done; ")
            assert said.count(wanted) == 1
        (seen,) = [each for each in str(actions.look(recipe)(ignore)).split("; ") if wanted in each]
        assert seen in said
    assert str(actions.compose(RECIPE, 1)(ignore)) == "done"  # nothing of the jobs before
    with pytest.raises(ValueError, match=r"nothing to compare: the prompt has no <lora:...> tag"):
        actions.compare(dataclasses.replace(RECIPE, prompt="a fox"))


def test_what_one_lora_cannot_hold_is_said(actions):
    bound = dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1:region=left>", steps=1)
    with pytest.warns(UserWarning, match="every word and in the whole picture") as warned:
        lost = actions.export(bound)(ignore).lost
    assert [str(each.message) for each in warned if "folded" in str(each.message)] == [lost]
    assert actions.export(dataclasses.replace(bound, binding="none"))(ignore).lost == ""


def test_an_exported_lora_stays_as_it_was_written(actions):
    """A page shows it again after a reload, whatever others export meanwhile."""
    first, second = (dataclasses.replace(RECIPE, prompt=f"a fox <lora:fox:{weight}>", steps=1) for weight in (1, 0.5))
    path = actions.export(first)(ignore).path
    content = path.read_bytes()
    assert actions.export(second)(ignore).path.name == path.name == "fox.safetensors"
    assert path.read_bytes() == content


def test_exports_are_few_and_their_names_short_enough_for_a_file(loras, monkeypatch):
    monkeypatch.setattr("mole_app.web.actions.MAX_FOLDERS", 2)
    names = [40 * character for character in "狐墨帽"]
    actions = Actions(Studio(tiny_pipeline(), Catalog(dict.fromkeys(names, loras["fox"]), {}), "tiny"))
    recipe = dataclasses.replace(RECIPE, prompt=" ".join(["a fox", *(f"<lora:{name}:1>" for name in names)]), steps=1)
    first, second, third = (actions.export(recipe)(ignore).path for _ in range(3))
    assert second.name == third.name == f"{min(names)[:33]}.safetensors"
    assert [path.exists() for path in (first, second, third)] == [False, True, True]


def test_an_exported_lora_has_the_weights_that_are_set_by_hand(actions):
    place = "unet.mid_block.attentions.0.transformer_blocks.0"
    plain = dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1> <lora:ink:1>", binding="none")

    def exported(recipe):
        return load_file(actions.export(recipe)(ignore).path)

    both, by_hand = exported(plain), exported(dataclasses.replace(plain, locks={place: {"fox": 3.0}}))
    three = exported(dataclasses.replace(plain, prompt="a fox <lora:fox:3>"))
    wanted = {key: value for key, value in three.items() if key.startswith(place)}
    assert wanted
    wanted |= {key: value for key, value in both.items() if not key.startswith(place)}
    assert by_hand.keys() == wanted.keys()
    assert all(torch.equal(by_hand[key], wanted[key]) for key in wanted)


def test_an_exported_lora_has_what_the_prompt_says_whatever_the_guidance(loras, pipe, awake, tmp_path):
    awake(attach(pipe, {name: loras[name] for name in ("fox", "ink")}, "prompt")).save_pretrained(tmp_path / "gates")
    detach(pipe)
    actions = Actions(Studio(pipe, Catalog(dict(loras), {"read": tmp_path / "gates"}), "tiny"))
    recipe = dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1> <lora:ink:1>", gates="read", binding="none", steps=1)
    one, five = (
        load_file(actions.export(dataclasses.replace(recipe, guidance=guidance))(ignore).path) for guidance in (1.0, 5.0)
    )
    assert one.keys() == five.keys()
    assert all(torch.equal(one[key], five[key]) for key in one)


def test_painted_masks_keep_soft_edges():
    paint_on = Image.new("L", (512, 256))
    with pytest.raises(ValueError, match="nothing is painted"):
        paint.painted_mask(mask_text(paint_on), 0.0)
    with pytest.raises(ValueError, match="a mask begins with"):
        paint.painted_mask("data:image/png;base64,AAAA", 0.0)
    paint_on.paste(128, (0, 0, 256, 256))
    hard, blurred = (np.asarray(paint.painted_mask(mask_text(paint_on), edge)) for edge in (0.0, 0.1))
    assert (hard.shape, np.unique(hard).tolist()) == ((64, 128), [0, 128])
    assert len(np.unique(blurred)) > 10


def on_sheet(sheet):
    """What is painted on a sheet, and the attributes of its canvas."""
    found = dict(re.findall(r'([a-z-]+)="([^"]*)"', sheet))
    with Image.open(BytesIO(base64.b64decode(found["data-paint"].removeprefix("data:image/png;base64,")))) as picture:
        return picture.copy(), found


def test_the_sheet_shows_what_a_lora_has():
    tags = Recipe("<lora:fox:1:region=0,0,0.5,1> <lora:ink:1>").tags
    box = paint.current_region(tags, "fox", {}, None)
    shown, about = on_sheet(paint.sheet('"fox"', (64, 32), box, "#010203"))
    assert (about["width"], about["height"], about["aria-label"]) == ("512", "256", "Paint where &quot;fox&quot; acts")
    assert np.array_equal(np.asarray(shown)[..., 3], np.asarray(box))
    assert np.asarray(shown)[0, 0].tolist() == [1, 2, 3, 255]  # in the LoRA's own colour
    assert paint.current_region(tags, "ink", {}, None) is None
    assert on_sheet(paint.sheet("ink", (64, 32), None, "#010203"))[0].getbbox() is None
    painted = Recipe("<lora:fox:1:region=painted>").tags
    text = mask_text(box)
    assert np.array_equal(np.asarray(paint.current_region(painted, "fox", {"fox": text}, None)), np.asarray(read_mask(text)))


def test_a_region_is_painted_on_the_picture_in_the_colour_of_its_lora(actions):
    from mole_app.web.build import build
    from mole_diffusers.inspection.gate_figures import COLOURS

    event = next(event for event in build(actions, RECIPE).fns.values() if event.fn and event.fn.__name__ == "opened")
    request = type("Request", (), {"session_hash": "page"})()
    cards = [{"name": "fox", "colour": 0}, {"name": "ink", "colour": 3}]
    for name, colour in (("ink", 3), (None, 0), ("gone", 0)):
        sheet, *_ = plain(event)(request, "me", name, "", cards, {}, PROMPT, 64, 32)
        assert on_sheet(sheet)[1]["data-colour"] == COLOURS[colour]
    *_, said = plain(event)(request, "me", None, "", [], {}, PROMPT, 64, 32)
    assert said.startswith("**add a LoRA first")


def test_regions_that_were_found_can_be_taken_over(actions, decided):
    picture = drawn(
        actions, dataclasses.replace(RECIPE, prompt="a fox and a hen <lora:fox:1:word=fox> <lora:hat:1:word=hen>")
    )
    assert set(picture.layout.regions) == {"fox", "hat"}
    found = paint.current_region(picture.recipe.tags, "fox", {}, picture)
    assert np.array_equal(np.asarray(found), (picture.layout.regions["fox"].numpy() * 255).round().astype(np.uint8))


def test_regions_of_loras_without_words_are_shown_too(actions):
    picture = drawn(actions, dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1:region=left>"))
    assert picture.layout.regions["fox"].tolist() == [[1, 1, 0, 0]] * 4
    assert drawn(actions, dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1>")).layout is None
