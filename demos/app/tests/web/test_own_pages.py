"""Requests of web pages that are not the app's own are refused, whatever name they came by."""

import httpx
import pytest
from app_client import served

pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def address(loras, tmp_path_factory):
    with served(loras, tmp_path_factory.mktemp("app"), sites=["Studio.example"], server_name="0.0.0.0") as client:
        yield client.src.replace("0.0.0.0", "127.0.0.1").rstrip("/")


def status(address, method="GET", path="/config", **headers):
    return httpx.request(method, address + path, headers=headers, verify=False).status_code  # reads no certificates


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


def test_nothing_allows_other_pages_to_read(address):
    answer = httpx.get(f"{address}/config", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in answer.headers


def test_the_page_itself_is_sent_compressed(address):
    """It has the settings of every field, and is larger than any file."""
    answer = httpx.get(f"{address}/", headers={"Accept-Encoding": "gzip"}, timeout=600)
    assert answer.headers["content-encoding"] == "gzip"
    assert answer.num_bytes_downloaded < 0.25 * len(answer.content)
