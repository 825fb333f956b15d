"""The gallery: what is kept, found again, marked and thrown away, on disk alone."""

import pytest
from PIL import Image

from mole_diffusers.app.gallery import Gallery
from mole_diffusers.studio import infotext
from mole_diffusers.studio.recipe import Recipe

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
    assert found(other, lora="fo") == []
    assert infotext.read(other.entries()[0].path) == Recipe("a lemon")


def test_no_file_is_overwritten_or_half_written(gallery):
    paths = [gallery.add(PICTURE, Recipe("x")) for _ in range(3)]
    assert len(set(paths)) == 3
    with pytest.raises(AttributeError):
        gallery.add(None, Recipe("x"))
    assert sorted(gallery.folder.iterdir()) == sorted(paths)


def test_favourites_and_trash(gallery):
    kept, thrown = gallery.add(PICTURE, Recipe("keep")), gallery.add(PICTURE, Recipe("throw"))
    gallery.favour(kept.name, True)
    assert found(Gallery(gallery.folder), favourites=True) == ["keep"]
    assert gallery.entries(favourites=True)[0].label.startswith("★ keep")
    moved = gallery.trash(thrown.name)
    assert found(gallery) == ["keep"]
    assert infotext.read(moved).prompt == "throw"
    gallery.favour(kept.name, False)
    assert found(gallery, favourites=True) == []
    for name in ("none.png", "../up.png", f"trash/{moved.name}", "favourites.json", ""):
        with pytest.raises(ValueError, match="there is no picture"):
            gallery.trash(name)
        with pytest.raises(ValueError, match="there is no picture"):
            gallery.favour(name, True)


def test_files_that_are_no_pictures_of_ours_are_left_alone(gallery):
    gallery.add(PICTURE, Recipe("ours"))
    (gallery.folder / "broken.png").write_bytes(b"x")
    (gallery.folder / "notes.txt").write_text("x")
    PICTURE.save(gallery.folder / "plain.png")
    (gallery.folder / "favourites.json").write_text("[[1")
    assert found(gallery) == ["ours"]
    assert (gallery.folder / "broken.png").exists()


def test_a_folder_of_its_own_is_kept_small(tmp_path):
    gallery = Gallery(tmp_path, most=2)
    first = gallery.add(PICTURE, Recipe("favourite"))
    gallery.favour(first.name, True)
    for prompt in ("old", "new", "newer"):
        gallery.add(PICTURE, Recipe(prompt))
    assert found(gallery) == ["newer", "new", "favourite"]
