"""Pictures from folders, and the random batch of an update."""

import pytest
import torch
from PIL import Image

from mole_cli.train import samples
from mole_diffusers.training import RandomBatch, default_side, encode, read_folder
from mole_diffusers.training.data import square


def pictures(folder, count=3):
    folder.mkdir()
    for i in range(count):
        Image.new("RGB", (32, 32), (80 * i, 10, 200)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i}")
    return folder


def test_a_folder_of_pictures(pipe, tmp_path):
    folder = pictures(tmp_path / "p")
    (folder / "0.txt").unlink()
    with pytest.raises(ValueError, match=r"0\.png has no caption"):
        read_folder(folder)
    (folder / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "one"}\n')
    images, captions = read_folder(folder, prompt="none")
    assert captions == ["none", "one", "picture 2"]
    found = encode(pipe, images, captions, batch=2)
    assert found.latents.shape == (3, 4, 16, 16)
    (folder / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png cannot be read as a picture"):
        read_folder(folder)
    with pytest.raises(ValueError, match="no pictures in"):
        read_folder(tmp_path / "empty")


def test_photos_are_turned_and_cut_square(pipe, tmp_path):
    photo = Image.new("RGB", (80, 40), "red")
    photo.paste((0, 0, 255), (0, 0, 10, 40))
    held = Image.Exif()
    held[0x0112] = 6  # the camera was turned: right is down
    photo.save(tmp_path / "p.jpg", exif=held)
    (image,), _ = read_folder(tmp_path, prompt="a photo")
    assert image.size == (40, 80)
    assert image.getpixel((20, 2))[2] > 200  # what was left is on top
    cut = square(image, default_side(pipe))
    assert cut.size == (32, 32)
    assert cut.getpixel((16, 1))[2] < 60  # the ends are gone
    assert read_folder(tmp_path, prompt="a photo", side=32)[0] == [cut]
    assert encode(pipe, [cut], ["a photo"]).latents.shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="must be 8 pixels or more, got 0"):
        samples(pipe, [tmp_path], prompt="a photo", side=0)


def test_a_draw_is_divided_among_shares():
    whole = RandomBatch(torch.Generator().manual_seed(0), 6)
    rows = whole.normal(2), whole.choice(100), whole.uniform()
    parts = []
    for index in range(3):
        part = RandomBatch(torch.Generator().manual_seed(0), 6, index, 3)
        parts.append((part.normal(2), part.choice(100), part.uniform()))
    for index, (normal, choice, uniform) in enumerate(parts):
        assert torch.equal(normal, rows[0][index::3])
        assert choice == rows[1][index::3]
        assert torch.equal(uniform, rows[2][index::3])


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "line 2, is not JSON"),
        ("[1]", "line 2, is not {'file_name'"),
        ('{"file_name": "1.png"}', "line 2, is not {'file_name'"),
        ('{"file_name": "1.png", "text": 3}', "line 2, is not {'file_name'"),
        ("\udcff", "line 2, is not JSON: it is not valid UTF-8"),
    ],
)
@pytest.mark.shows("Training")
def test_a_broken_table_of_captions_is_named(tmp_path, line, why):
    folder = pictures(tmp_path / "p")
    text = f'{{"file_name": "0.png", "text": "zero"}}\n{line}\n'
    (folder / "metadata.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"metadata\.jsonl, {why}"):
        read_folder(folder)


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    folder = pictures(tmp_path / "p")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # of 32 x 32: an error beyond twice that
    with pytest.raises(ValueError, match=r"0\.png cannot be read as a picture: .*decompression bomb"):
        read_folder(folder)
