"""Jobs that ended with the app: each is a small file while it waits or runs, and what an earlier run of the app has left is
offered again."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr

from mole_diffusers.app.jobs import Work
from mole_diffusers.lora.safe_files import RefusedFileError, read_json
from mole_diffusers.lora.whole_files import write_text

T = TypeVar("T")


class Interrupted:
    """The files of a folder. Those that this app has written belong to its queue and are not offered."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._queued: set[Path] = set()

    def keep(self, owner: str, kind: str, about: dict[str, Any]) -> Path:
        """Write what a job needs, as plain data; the file, to be deleted once the job is over."""
        path = self._of(owner) / f"{time.time_ns()}-{kind}.json"
        self._queued.add(path)
        write_text(path, json.dumps(about))
        return path

    def left(self, owner: str, kind: str) -> list[Path]:
        """The visitor's files of a kind that were left, the oldest first."""
        return [path for path in sorted(self._of(owner).glob(f"[!.]*-{kind}.json")) if path not in self._queued]

    def queued(self, path: Path) -> Path:
        """The file, which belongs to a job of this queue from now on."""
        self._queued.add(path)
        return path

    def _of(self, owner: str) -> Path:
        return self.folder / hashlib.sha256(owner.encode()).hexdigest()[:32]  # what a browser says is no file name


def read(path: Path, make: Callable[[dict[str, Any]], T]) -> T:
    """What `make` makes of a file. Raises ValueError if it can make nothing."""
    try:
        return make(read_json(path))
    except (RefusedFileError, FileNotFoundError, TypeError, KeyError, AttributeError, ValueError) as error:
        reason = str(error).replace(f"{path.parent}/", "") if isinstance(error, ValueError) else "it is of another release"
        raise ValueError(f"what was kept of this job cannot be used: {reason}") from error


@dataclass(frozen=True)
class Offer:
    """A row of the page that offers a visitor's oldest job of a kind.

    Attributes:
        start: the button that starts it again.
        row, said: the row and the text in it.
        show: the visitor -> values for both.
        keep: values of the page -> plain data, by which a job can be started again.
        plan: a job's file, and the values of `inputs` -> its work.
    """

    start: Any
    row: Any
    said: Any
    show: Callable[[str], Any]
    keep: Callable[..., dict[str, Any]]
    plan: Callable[..., Work]
    inputs: Sequence[Any] = ()


def offer(
    visitor: Any, interrupted: Interrupted, kind: str, again: str, describe: Callable[[dict[str, Any]], str], **how: Any
) -> Offer:
    """Lay out an Offer.

    Args:
        visitor: the component that says whose jobs.
        again: the label of its button.
        describe: what was kept of a job -> what it is called, as Markdown.
        how: the other attributes of the Offer.
    """
    with gr.Row(visible=False, elem_id=f"{kind}-interrupted", elem_classes="interrupted") as row:
        said = gr.Markdown("", elem_classes="status")
        start = gr.Button(again, size="sm", min_width=100)
        forget = gr.Button("Forget it", size="sm", min_width=100)

    def show(visitor: str) -> Any:
        left = interrupted.left(visitor or "", kind)
        if not left:
            return gr.update(visible=False), ""
        more = f" One of {len(left)}." if len(left) > 1 else ""
        try:
            words = f"{read(left[0], describe)} was interrupted when the app ended.{more}"
        except ValueError as error:
            words = f"A job was interrupted when the app ended, and {error}.{more}"
        return gr.update(visible=True), words

    def drop(visitor: str) -> Any:
        for path in interrupted.left(visitor or "", kind)[:1]:
            path.unlink(missing_ok=True)
        return show(visitor)

    forget.click(drop, visitor, [row, said], api_visibility="private")
    return Offer(start, row, said, show, **how)
