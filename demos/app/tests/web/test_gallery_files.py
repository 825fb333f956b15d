"""Of the gallery's folder, only the pictures can be read through the app."""

from urllib.parse import quote

import httpx
import pytest
from app_client import built, launched
from PIL import Image

from mole_app.web.gallery_files import GalleryPicturesOnly

pytest.importorskip("gradio")


def test_of_the_gallery_only_the_pictures_are_shown(loras, tmp_path, monkeypatch):
    gallery, beside = tmp_path / "pictures", tmp_path / "beside"
    hidden = ["secret.txt", "favourites.json", ".new-1.png", "below/a.png", ".ssh/id.png", "a.png/../secret.txt"]
    for name in ("a.png", "é 1.png", *hidden[:-1]):
        path = gallery / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path, "PNG")
    (beside / "inside").mkdir(parents=True)
    (gallery / "link").symlink_to(beside / "inside")
    (gallery / "link.png").symlink_to(gallery / "secret.txt")
    (beside / "secret.txt").touch()  # where the link's parent is, which is not what is read
    (gallery / "round.png").symlink_to(gallery / "round.png")
    hidden += ["link.png", "link/../secret.txt", "round.png", "x" * 999, ""]
    monkeypatch.chdir(gallery)
    with launched(built(loras, tmp_path / "gates"), tmp_path, gallery=gallery) as client, httpx.Client() as web:
        address = client.src.rstrip("/") + "/gradio_api/file"
        for name in ("a.png", "é 1.png"):
            assert web.get(f"{address}={quote(str(gallery / name))}").status_code == 200, name
        for name in hidden:
            for file in (f"={gallery}/{name}", f"={gallery}/{quote(name, safe='').replace('.', '%2e')}", f"/{name}"):
                assert web.get(address + file).status_code == 403, file
        assert web.get(f"{address}/a.png").status_code == 200
        uploaded = web.post(f"{client.src}gradio_api/upload", files={"files": b"words"}).json()
        assert web.get(f"{address}={uploaded[0]}").text == "words"


def test_the_apps_own_files_may_be_below_the_gallery(tmp_path, monkeypatch):
    monkeypatch.setattr("mole_app.web.gallery_files.gettempdir", lambda: str(tmp_path / "tmp"))
    files = GalleryPicturesOnly(None, gallery=tmp_path)
    assert [files.shows(str(tmp_path / name)) for name in ("tmp/a.txt", "a.txt", "a.png")] == [True, False, True]
