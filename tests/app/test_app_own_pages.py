"""Requests of web pages that are not the app's own are refused, whatever name they came by."""

from urllib.parse import quote

import httpx
import pytest
from app_client import built, launched, served
from PIL import Image

from mole_diffusers.app.own_pages import OwnPagesOnly

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def address(loras, tmp_path_factory):
    with served(loras, tmp_path_factory.mktemp("app"), sites=["Studio.example"], server_name="0.0.0.0") as client:
        yield client.src.replace("0.0.0.0", "127.0.0.1").rstrip("/")


def status(address, method="GET", path="/config", **headers):
    return httpx.request(method, address + path, headers=headers).status_code


def test_a_name_that_was_pointed_here_is_refused(address):
    port = address.rpartition(":")[2]
    for host in (
        "evil.example",
        f"evil.example:{port}",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "[::",
        "0x7f.1",
    ):
        assert status(address, Host=host) == 403, host
        assert status(address, "POST", "/gradio_api/queue/join", Host=host) == 403, host
    assert "--site evil.example" in httpx.get(f"{address}/config", headers={"Host": "evil.example"}).text


def test_addresses_of_the_machine_and_its_site_are_served(address):
    port = address.rpartition(":")[2]
    for host in (f"127.0.0.1:{port}", f"192.168.1.7:{port}", f"[::1]:{port}", f"LOCALHOST:{port}", "studio.example"):
        assert status(address, Host=host) == 200, host


def test_posts_of_other_pages_are_refused(address):
    upload, host = "/gradio_api/upload", address.removeprefix("http://")
    for origin in (
        "https://evil.example",
        "null",
        "http://localhost:1",
        "http://127.0.0.1:1",
        "x",
        "http://[",
        f"http://{host}.x",
    ):
        assert status(address, "POST", upload, Origin=origin) == 403, origin
        assert status(address, "GET", Origin=origin) == 200, origin  # which such a page cannot read: nothing allows it
    for origin in (f"http://{host}", "https://studio.example"):
        assert status(address, "POST", upload, Origin=origin) not in (403, 404), origin
    assert status(address, "POST", upload) not in (403, 404)  # programs are no pages


def test_of_the_gallery_only_the_pictures_are_shown(loras, tmp_path, monkeypatch):
    gallery, beside = tmp_path / "pictures", tmp_path / "beside"
    hidden = ["secret.txt", "favourites.json", ".new-1.png", "trash/a.png", ".ssh/id.png", "a.png/../secret.txt"]
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
    with launched(built(loras, tmp_path / "gates"), tmp_path, gallery=gallery) as client:
        address = client.src.rstrip("/") + "/gradio_api/file"
        for name in ("a.png", "é 1.png"):
            assert httpx.get(f"{address}={quote(str(gallery / name))}").status_code == 200, name
        for name in hidden:
            for file in (f"={gallery}/{name}", f"={gallery}/{quote(name, safe='').replace('.', '%2e')}", f"/{name}"):
                assert httpx.get(address + file).status_code == 403, file
        assert httpx.get(f"{address}/a.png").status_code == 200
        uploaded = httpx.post(f"{client.src}gradio_api/upload", files={"files": b"words"}).json()
        assert httpx.get(f"{address}={uploaded[0]}").text == "words"


def test_the_apps_own_files_may_be_below_the_gallery(tmp_path, monkeypatch):
    monkeypatch.setattr("mole_diffusers.app.own_pages.gettempdir", lambda: str(tmp_path / "tmp"))
    pages = OwnPagesOnly(None, gallery=tmp_path)
    assert [pages.shows(str(tmp_path / name)) for name in ("tmp/a.txt", "a.txt", "a.png")] == [True, False, True]


def test_nothing_allows_other_pages_to_read(address):
    answer = httpx.get(f"{address}/config", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers
