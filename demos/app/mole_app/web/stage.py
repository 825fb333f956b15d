"""The large picture: while it is drawn, when it is done, and any other one that is chosen. All have one frame."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mole_app.web.actions import Progress
from mole_app.web.mixer_cards import MixerCard, shades
from mole_app.web.page import Page
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.style import BUTTONS, Values, figure, status_line
from mole_diffusers.inspection import overlay

RECENT = 30  # pictures of the strip
NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a file that the app wrote


class Stage:
    """The large picture, the strip of the newest ones, and the map of places. Each is laid out where it belongs.

    Attributes:
        picture: the large picture.
        frame: gives it the shape of the picture, also before there is one (CSS).
        map: where each LoRA acted in it.
        strip: the newest pictures of the gallery, small.
        names: their file names (state).
        outputs: the components that `shows` and `first` have values for.
    """

    def __init__(self, page: Page):
        self.page = page
        self.picture = gr.Image(
            format="jpeg", interactive=False, buttons=BUTTONS, show_label=False, label="The picture", elem_id="picture",
            container=False, render=False,
        )  # fmt: skip
        self.frame = gr.HTML(framed((1, 1)), elem_id="frame", render=False)
        self.map = figure(label="Where each LoRA acted", visible=False, buttons=[], elem_id="found", render=False)
        self.strip = gr.Gallery(
            columns=2, height="auto", object_fit="cover", buttons=[], interactive=False, allow_preview=False,
            show_label=False, label="Newest pictures", elem_id="strip", render=False,
        )  # fmt: skip
        self.names = gr.State([])
        self.status = status_line(elem_id="picture-status", render=False)
        self._seen: tuple[int, Values] = (-1, {})  # when the gallery was changed last, and what the strip shows of it
        self.outputs = [self.picture, self.frame, page.showing, self.strip, self.names]

    def shows(self, progress: Progress | None, is_over: bool) -> Values:
        """What is seen of a job. Until it has a picture of its own, and if it ends without one, that is `first`."""
        values = self.newest()
        if progress is not None and not is_over and len(progress.pictures) < progress.count and progress.preview is not None:
            return values | {self.picture: progress.preview, self.frame: framed(progress.size)}
        done = [picture.path for picture in progress.pictures if picture.path.exists()] if progress is not None else []
        if done:
            return values | self.put(done[-1])
        return self.first() if progress is None or is_over else values | {self.frame: framed(progress.size)}

    def first(self) -> Values:
        """What a page shows before the first job: the newest picture of the gallery, if there is one."""
        newest = self.newest()
        path = self.page.actions.gallery.folder / next(iter(newest[self.names]), "")
        nothing = {self.picture: None, self.frame: framed((1, 1)), self.page.showing: ""}
        return newest | (self.put(path) if path.is_file() else nothing)

    def put(self, path: Path) -> Values:
        """Show a finished picture."""
        with Image.open(path) as image:
            size = image.size
        return {self.picture: str(path), self.frame: framed(size) + marked(path), self.page.showing: path.name}

    def newest(self) -> Values:
        """The newest pictures of the gallery, in the strip."""
        kept = self.page.actions.gallery
        changed = kept.folder.stat().st_mtime_ns if kept.folder.exists() else 0
        if self._seen[0] != changed:
            entries = kept.entries()[:RECENT]
            small = [(str(self.page.actions.small(entry.path)), entry.label) for entry in entries]
            self._seen = changed, {self.strip: small, self.names: [entry.path.name for entry in entries]}
        return dict(self._seen[1])

    # ---- laying out

    def build_tools(self) -> Any:
        """Lay out the buttons that use the picture. Returns the one that opens the editor of regions."""
        page, kept = self.page, self.page.actions.gallery
        with gr.Row(elem_id="tools"):
            paint = gr.Button("Paint regions", size="sm", min_width=100, elem_id="paint-regions")
            over = gr.Button("Draw over this", size="sm", min_width=100, elem_id="draw-over-this")
            use = gr.Button("Use its settings", size="sm", min_width=100, elem_id="use-settings")
            seed = gr.Button("Use its seed", size="sm", min_width=90, elem_id="use-seed")
            star = gr.Button("★ Favourite", size="sm", min_width=90, elem_id="star-this")
        self.status.render()

        @errors_to(self.status)
        def use_seed(name: str) -> Values:
            return {page.form.controls["seed"]: kept.entry(chosen_picture(name)).recipe.seed}

        @errors_to(self.status)
        def favour(name: str) -> Values:
            on = not kept.entry(chosen_picture(name)).favourite
            kept.favour(name, on)
            return self.newest() | {self.status: "a favourite" if on else "no favourite any more"}

        connect_use(page, page.showing, use, over, self.status)
        seed.click(use_seed, page.showing, [page.form.controls["seed"], self.status])
        star.click(favour, page.showing, [self.strip, self.names, self.status])
        return paint

    def connect(self) -> None:
        """Let a click in the strip show that picture, and the map follow the picture."""
        page = self.page

        @errors_to(self.status)
        def chosen(event: gr.SelectData, names: list[str]) -> Values:
            return self.put(page.actions.gallery.entry(names[event.index]).path)

        def acted(request: gr.Request, visitor: str, name: str, cards: list[MixerCard]) -> Any:
            picture = next((each for each in page.visits.drawn(request, visitor) if each.path.name == name), None)
            if picture is None or picture.layout is None or not picture.layout.regions:
                return gr.update(visible=False)
            found = overlay(Image.open(picture.path), picture.layout, shades=shades(cards))
            return gr.update(value=found, visible=True)

        self.strip.select(chosen, self.names, [self.picture, self.frame, page.showing, self.status], trigger_mode="multiple")
        page.showing.change(acted, [page.visits.visitor, page.showing, page.prompt.cards], self.map, show_progress="hidden")


def framed(size: tuple[int, int]) -> str:
    """CSS that gives the frame of the large picture a shape."""
    width, height = map(int, size)
    return f"<style>:root {{ --wide: {width}; --high: {height}; }}</style>"


def marked(path: Path) -> str:
    """CSS that marks a picture of the gallery in the strip. Files with names that the app did not give have none."""
    if not NAME.fullmatch(path.stem):
        return ""
    return (
        f'<style>#strip img[src*="/{path.stem}."] {{ outline: 4px solid var(--primary-600); outline-offset: -4px; }}</style>'
    )


def connect_use(page: Page, chosen: gr.State, use: gr.Button, over: gr.Button, status: gr.Markdown) -> None:
    """Let buttons use the settings of the picture with the chosen file name, and draw over it."""
    kept = page.actions.gallery

    @errors_to(status)
    def reuse(name: str) -> Values:
        entry = kept.entry(chosen_picture(name))
        recipe, values, notes = page.filled(entry.contents)
        tab = "Compare" if entry.contents.axes else "Compose"  # the tab with the button for it
        words = [
            f"its settings are in all fields, seed {recipe.seed}",
            entry.sheet and f"it shows {entry.sheet_in_words}",
            *notes,
        ]
        return values | {page.tabs: gr.update(selected=tab), status: markdown("; ".join(filter(None, words)))}

    @errors_to(status)
    def draw_over_it(name: str) -> Values:
        put = page.over.put(kept.entry(chosen_picture(name)).path)
        return put | {page.tabs: gr.update(selected="Compose"), status: 'it is in "Draw over a picture"'}

    use.click(reuse, chosen, [*page.filled_fields, page.tabs, status], **ORDERED)
    over.click(draw_over_it, chosen, [page.over.picture, page.over.panel, page.tabs, status])


def chosen_picture(name: str) -> str:
    """The file name of the chosen picture. Raises ValueError if there is none."""
    if not name:
        raise ValueError("choose a picture first")
    return name
