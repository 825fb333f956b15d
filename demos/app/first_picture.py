"""Measure how long the app takes to its page and to the first picture: embedded world, two bound LoRAs, 20 steps.

    python demos/app/first_picture.py [--runs 5]

Each run is a new process. Prints medians in seconds, with the fastest and the slowest run.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import subprocess
import sys
import time
from tempfile import TemporaryDirectory

import httpx
from gradio_client import Client

PROMPT = "noto drawing of a sunflower and a doughnut <lora:sunflower:1> <lora:doughnut:1>"


def run() -> tuple[float, float]:
    """Seconds from the start of `mole app` until its page answers, and until the first picture is done."""
    with TemporaryDirectory() as folder:
        port = _free_port()
        address = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "mole_cli", "app", "--port", str(port), "--keep", folder, "--gallery", folder]
        begun = time.monotonic()
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as app:
            try:
                while not _answers(address):
                    time.sleep(0.05)
                page = time.monotonic() - begun
                Client(address, verbose=False).predict(PROMPT, steps=20, api_name="/compose")
                return page, time.monotonic() - begun
            finally:
                app.kill()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _answers(address: str) -> bool:
    try:
        return httpx.get(address).status_code == 200
    except httpx.TransportError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    runs = [run() for _ in range(parser.parse_args().runs)]
    for name, seconds in zip(("page", "first picture"), zip(*runs, strict=True), strict=True):
        print(f"{name}: {statistics.median(seconds):.1f} s [{min(seconds):.1f}, {max(seconds):.1f}]")


if __name__ == "__main__":
    main()
