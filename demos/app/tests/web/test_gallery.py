"""The gallery: what is kept, found again, marked and thrown away, on disk alone."""

import dataclasses
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from app_client import plain
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.studio.xy_grid import sheet
from mole_app.web.actions import Actions
from mole_app.web.gallery import Gallery
from mole_app.web.jobs import StoppedError, ignore

PICTURE = Image.new("RGB", (8, 8), "red")


@pytest.fixture
def gallery(tmp_path):
    return Gallery(tmp_path / "new" / "pictures")


def found(gallery, **what):
    return [entry.recipe.prompt for entry in gallery.entries(**what)]


def test_pictures_outlive_the_app_and_are_found(gallery):
    assert gallery.entries() == []
    for prompt in ("a fox <lora:fox:1>", "a Red fox in ink <lora:fox:1> <lora:Ink:0.5>", "a lemon"):
        gallery.add(PICTURE, Recipe(prompt))
    other = Gallery(gallery.folder)  # after a restart
    assert found(other) == ["a lemon", "a Red fox in ink <lora:fox:1> <lora:Ink:0.5>", "a fox <lora:fox:1>"]
    assert found(other, text="red FOX") == found(other, lora="ink") == ["a Red fox in ink <lora:fox:1> <lora:Ink:0.5>"]
    assert found(other, text="a", lora="fox") == found(other)[1:]
    assert found(other, lora="FO") == found(other, lora="fox")
    assert found(other, lora="lemon") == []
    assert infotext.read(other.entries()[0].path) == Recipe("a lemon")


def test_no_file_is_overwritten_or_half_written(gallery):
    paths = [gallery.add(PICTURE, Recipe("x")) for _ in range(3)]
    assert len(set(paths)) == 3
    (gallery.folder / "other").touch()
    assert {path.stat().st_mode for path in gallery.folder.iterdir()} == {(gallery.folder / "other").stat().st_mode}
    (gallery.folder / "other").unlink()
    with pytest.raises(AttributeError):
        gallery.add(None, Recipe("x"))
    assert sorted(gallery.folder.iterdir()) == sorted(paths)


def test_favourites(gallery):
    kept, _ = gallery.add(PICTURE, Recipe("keep")), gallery.add(PICTURE, Recipe("other"))
    gallery.favour(kept.name, True)
    assert found(Gallery(gallery.folder), favourites=True) == ["keep"]
    assert gallery.entries(favourites=True)[0].label.startswith("★ keep")
    gallery.favour(kept.name, False)
    assert found(gallery, favourites=True) == []
    for name in ("none.png", "../up.png", "favourites.json", ""):
        with pytest.raises(ValueError, match="there is no picture"):
            gallery.favour(name, True)


def test_files_that_are_no_pictures_of_ours_are_left_alone(gallery):
    ours = gallery.add(PICTURE, Recipe("ours"))
    (gallery.folder / "broken.png").write_bytes(b"x")
    (gallery.folder / "notes.txt").write_text("x")
    PICTURE.save(gallery.folder / "plain.png")
    (gallery.folder / "favourites.json").write_text("[[1")
    if sys.platform == "linux":  # others have no names that are not UTF-8
        shutil.copy(ours, gallery.folder / "caf\udce9.png")
    assert found(gallery) == ["ours"]
    assert (gallery.folder / "broken.png").exists()


def test_a_folder_of_its_own_is_kept_small(tmp_path):
    gallery = Gallery(tmp_path, most=2)
    first = gallery.add(PICTURE, Recipe("favourite"))
    gallery.favour(first.name, True)
    for prompt in ("old", "new", "newer"):
        gallery.add(PICTURE, Recipe(prompt))
    assert found(gallery) == ["newer", "new", "favourite"]


RECIPE = Recipe("a fox <lora:fox:1:region=left>", seed=3, steps=2, width=32, height=48, gates="sum")


@pytest.fixture
def actions(loras, tmp_path):
    return Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"), gallery=tmp_path / "pictures")


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_sheets_of_comparisons_and_grids_outlive_the_app(actions):
    """Each is one picture of the gallery, with the recipe that its cells have in common, and shows what that draws."""
    actions.compare(RECIPE)(ignore)
    actions.grid(RECIPE, "weight fox=0,0.5", "seed=1,2,3")(ignore)
    recipe, other = actions.studio.complete(RECIPE), Gallery(actions.gallery.folder)  # after a restart
    grid, compared = other.entries()
    assert [entry.recipe for entry in (grid, compared)] == [recipe, recipe]
    assert other.entries(text="COMPARISON bound", lora="fox") == [compared]
    assert other.entries(text="grid 0,0.5") == [grid]
    assert grid.label == "weight fox=0,0.5 by seed=1,2,3: a fox · seed 3"
    words = ["without LoRAs", "fox alone", "all added up (sum)", "each in its place (bound)"]
    assert (compared.sheet, compared.label) == ("base, alone fox, sum, bound", f"{', '.join(words)}: a fox · seed 3")
    assert other.entries(text="comparison alone fox added") == [compared]

    def drawn(**changed):
        return actions.studio.draw(actions.studio.complete(dataclasses.replace(recipe, **changed)))

    arms = {arm: drawn(arm=arm) for arm in ("base", "alone fox", "sum")} | {"bound": drawn()}
    pictures = list(arms.values())
    rows = [np.asarray(sheet(pictures[i : i + 2], words[i : i + 2], [""])) for i in (0, 2)]
    assert np.array_equal(pixels(compared.path), np.concatenate(rows))  # about as wide as it is high
    at = [recipe.prompt.replace(":1:", f":{strength}:") for strength in ("0", "0.5")]
    cells = [drawn(prompt=prompt, seed=seed) for seed in (1, 2, 3) for prompt in at]
    wanted = sheet(cells, ["fox 0", "fox 0.5"], ["seed 1", "seed 2", "seed 3"])
    assert np.array_equal(pixels(grid.path), np.asarray(wanted))


@pytest.mark.thorough
def test_a_comparison_has_a_column_in_tiles_where_there_is_room(actions):
    recipe = dataclasses.replace(RECIPE, prompt="a fox <lora:fox:1:word=fox> and an ink <lora:ink:1:word=ink>")
    labels = ["base", "alone fox", "alone ink", "sum", "bound"]
    assert [picture.label for picture in actions.compare(recipe)(ignore).pictures] == labels
    actions.studio.base.pipe.unet.register_to_config(sample_size=8)  # as if trained on pictures of 16 pixels
    assert [picture.label for picture in actions.compare(recipe)(ignore).pictures] == [*labels, "tiles"]


def test_names_of_loras_may_have_a_colon(loras):
    studio = Studio(tiny_pipeline(), Catalog({"Style: fox": loras["fox"]}, {}), "tiny")
    recipe = Recipe("a fox <lora:Style: fox:0.5>", steps=1, width=32, height=32, seed=3)
    actions = Actions(studio)
    drawn = actions.compare(recipe)(ignore)
    assert [picture.label for picture in drawn.pictures] == ["base", "alone Style: fox", "sum", "bound"]
    assert infotext.read(drawn.pictures[-1].path).prompt == recipe.prompt
    plain = Studio(tiny_pipeline(), Catalog({"fox": loras["fox"]}, {}), "tiny")
    wanted = plain.draw(plain.complete(dataclasses.replace(recipe, prompt="a fox <lora:fox:0.5>")))
    assert np.array_equal(pixels(drawn.pictures[-1].path), np.asarray(wanted))


def test_a_comparison_of_a_recipe_from_where_names_are_swapped_has_the_names_of_here(loras, tmp_path):
    recipe = Recipe("a <lora:fox:1> <lora:ink:1>", steps=1, width=32, height=32)
    there, here = (
        Actions(Studio(tiny_pipeline(), Catalog(files, {}), "tiny"), gallery=tmp_path / "pictures")
        for files in ({n: loras[n] for n in ("fox", "ink")}, {"fox": loras["ink"], "ink": loras["fox"]})
    )
    swapped = here.compare(there.studio.complete(recipe))(ignore).pictures
    for first, second in (("fox", "ink"), ("ink", "fox")):
        (alone,) = [each for each in swapped if each.label == f"alone {first}"]
        assert alone.recipe.arm == alone.label
        (own,) = there.compose(dataclasses.replace(recipe, arm=f"alone {second}"), 1)(ignore).pictures
        assert np.array_equal(np.asarray(Image.open(alone.path)), np.asarray(Image.open(own.path)))


def test_a_sheet_that_was_stopped_has_what_was_drawn(actions):
    def stop(after):
        def report(state):
            if len(state.pictures) >= after:
                raise StoppedError

        return report

    for work in (actions.compare(RECIPE), actions.grid(RECIPE, "seed=1,2", "steps=1,2")):
        with pytest.raises(StoppedError):
            work(stop(0))
        assert actions.gallery.entries() == []  # of nothing there is no sheet
        with pytest.raises(StoppedError):
            work(stop(1))
        (entry,) = actions.gallery.entries()
        colours = {tuple(colour) for colour in pixels(entry.path).reshape(-1, 3)}
        assert (221, 221, 221) in colours
        assert len(colours) > 100
        entry.path.unlink()


def test_cells_of_a_grid_with_a_random_seed_share_it(actions):
    done = actions.grid(dataclasses.replace(RECIPE, seed=-1), "weight fox=0,1", "steps=1,2")(ignore)
    assert len({picture.recipe.seed for picture in done.pictures} | {infotext.read(done.sheet).seed}) == 1


def test_a_grid_finds_a_lora_with_a_colon_in_its_name(loras):
    actions = Actions(Studio(tiny_pipeline(), Catalog({"fo:x": loras["fox"]}, {}), "tiny"))
    done = actions.grid(dataclasses.replace(RECIPE, prompt="a fox <lora:fo:x:1>"), "weight fo:x=0,2", "seed=1")(ignore)
    assert [picture.recipe.prompt for picture in done.pictures] == ["a fox <lora:fo:x:0>", "a fox <lora:fo:x:2>"]


def test_the_page_shows_more_pictures_when_asked(actions, monkeypatch):
    gallery_tab = pytest.importorskip("mole_app.web.gallery_tab")
    from mole_app.web.build import build

    monkeypatch.setattr(gallery_tab, "AT_ONCE", 2)
    files = [actions.gallery.add(PICTURE, Recipe(f"owl{i}", seed=i)).name for i in range(5)][::-1]
    functions = {event.fn.__name__: plain(event) for event in build(actions, Recipe("a fox")).fns.values() if event.fn}
    everything, shown = ("", "", False), []
    names = lambda found: [Path(file).name for file, _ in found[0]["value"]]  # noqa: E731
    for call in ("search", "show_more", "show_more"):
        most = (shown[-1][1],) if shown else ()
        shown.append(functions[call]("", *everything, *most))
    assert list(map(names, shown)) == [files[:2], files[:4], files]
    assert [more["visible"] for *_, more, _, _ in shown] == [True, True, False]
    assert [status for *_, status in shown] == [
        "5 pictures, the newest 2 of them shown", "5 pictures, the newest 4 of them shown", "5 pictures"
    ]  # fmt: skip
    found = functions["favour"](files[3], *everything, 4)  # and goes on showing them
    _, most, _, chosen, status = found
    assert (names(found), most, chosen, status[:8]) == (files[:4], 4, files[3], "marked; ")
    found = functions["search"](files[3], "owl4", "", False)  # a new search begins anew
    assert (names(found), found[1], found[3]) == (files[:1], 2, "")
    found = functions["search"](files[0], "owl4", "", False)  # but keeps what is chosen
    chosen = files[0].replace("-", "\\-").replace(".", "\\.")
    assert found[3:] == (files[0], f"chosen: {chosen}; 1 picture")


def test_the_picture_that_was_clicked_last_is_chosen(actions):
    """Whatever a search has found since the page has shown it; and not left out while a click before is answered."""
    gr = pytest.importorskip("gradio")
    from mole_app.web.build import build

    everything = build(actions, Recipe("a fox")).fns.values()
    events = [event for event in everything if "select" in [name for _, name in event.targets]]
    file = {"path": "/cache/owl_2.png", "orig_name": "owl 2.png"}
    click = gr.SelectData(None, {"index": 0, "value": {"image": file, "caption": None}})
    (choose,) = [event for event in events if not event.inputs]
    assert plain(choose)(click) == ("owl 2.png", "chosen: owl 2\\.png")
    assert choose.trigger_mode == "multiple"
    (search,) = [event for event in events if event.fn.__name__ == "search"]
    assert (search.fn.__name__, search.trigger_mode, len(search.targets)) == ("search", "always_last", 4)


@pytest.mark.parametrize("said", ["[1", "[]", '{"x": {"y": [1]}, "columns": 3}', '"x"', "x" * 400_000])
def test_what_others_say_in_a_picture_breaks_no_list(gallery, said):
    mine = gallery.add(PICTURE, Recipe("ours"))
    about = PngInfo()
    about.add_text(infotext.OWN, Image.open(mine).text[infotext.OWN])
    about.add_text(infotext.SHEET, said)
    PICTURE.save(gallery.folder / "theirs.png", pnginfo=about)
    assert "ours" in found(gallery)
    assert all(len(entry.label) < 200 for entry in gallery.entries())


@pytest.mark.parametrize("prompt", ["a cat <hypernet:x:1>", "a cat <lora:x:1> <lora:x:0.5>"])
def test_a_prompt_of_another_program_breaks_no_list(gallery, prompt):
    gallery.add(PICTURE, Recipe("ours <lora:fox:1>"))
    about = PngInfo()
    about.add_text(infotext.PARAMETERS, f"{prompt}\nSteps: 20, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64")
    PICTURE.save(gallery.folder / "theirs.png", pnginfo=about)
    assert found(gallery, lora="fox") == ["ours <lora:fox:1>"]
    assert found(gallery, text="cat") == [prompt]
    assert f"{prompt} · seed 1" in [entry.label for entry in gallery.entries()]


def test_a_thumbnail_is_the_picture_that_other_tools_put_there(loras, tmp_path):
    file = tmp_path / "fox.safetensors"
    file.write_bytes(loras["fox"].read_bytes())
    actions = Actions(Studio(tiny_pipeline(), Catalog({"fox": file}, {}), "tiny"))
    assert actions.loras.thumbnail("fox") is None
    Image.new("RGB", (64, 32), "red").save(tmp_path / "fox.preview.jpg")
    small = actions.loras.thumbnail("fox")
    assert small.size == (64, 32)
    assert np.abs(np.asarray(small)[16, 32].astype(int) - (255, 0, 0)).max() < 9


@pytest.mark.parametrize("broken", [b"version https://git-lfs.github.com/spec/v1\n", b"\x89PNG\r\n\x1a\n\0", b""])
def test_a_picture_that_cannot_be_read_is_no_thumbnail(loras, tmp_path, broken):
    """The page has its card all the same."""
    file = tmp_path / "fox.safetensors"
    file.write_bytes(loras["fox"].read_bytes())
    file.with_suffix(".png").write_bytes(broken)
    actions = Actions(Studio(tiny_pipeline(), Catalog({"fox": file}, {}), "tiny"))
    assert actions.loras.thumbnail("fox") is None
    Image.new("L", (4096, 2048)).save(file.with_suffix(".png"))  # which would take its time
    assert actions.loras.thumbnail("fox") is None


def test_a_thumbnail_is_a_mean_of_pixels(loras, tmp_path):
    """The nearest pixel alone made noise of a photograph."""
    file = tmp_path / "fox.safetensors"
    file.write_bytes(loras["fox"].read_bytes())
    Image.fromarray(np.indices((512, 512)).sum(0).astype(np.uint8) % 2 * 255).save(file.with_suffix(".png"))
    small = Actions(Studio(tiny_pipeline(), Catalog({"fox": file}, {}), "tiny")).loras.thumbnail("fox")
    assert small.size == (256, 256)
    assert np.ptp(np.asarray(small)) < 9
