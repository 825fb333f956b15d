"""How the page shows pictures, and its colours. The rest of its style is in `page.css`, its keys are in `page.html`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from mole_app.web.actions import Picture
from mole_app.web.gallery import Entry
from mole_diffusers.inspection import COLOURS

Values = dict[Any, Any]  # component -> its value, or a `gr.update`
BUTTONS: Any = ["fullscreen", "download"]  # on pictures; without Gradio's "share", which would send them to the network
figure = partial(gr.Image, format="png", interactive=False, buttons=BUTTONS, elem_classes="figure")
gallery = partial(  # of PNG files
    gr.Gallery, format="png", height="auto", object_fit="contain", buttons=BUTTONS, interactive=False
)
status_line = partial(gr.Markdown, "", elem_classes="status")  # takes no room while it says nothing
CARDS = "".join(f".card.c{i} {{ border-left-color: {colour} !important; }}\n" for i, colour in enumerate(COLOURS))


def theme() -> Any:
    """A theme with system fonts, so that nothing is downloaded."""
    plain = gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    return plain.set(  # small text stays readable: a contrast of 7:1 on white, and on black in dark mode
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )


def row(*fields: Any) -> None:
    """Lay out fields next to each other."""
    with gr.Row():
        for field in fields:
            field.render()


def gallery_items(pictures: Sequence[Picture | Entry]) -> list[tuple[str, str]]:
    """Pictures for a gallery: the files that are still there, unchanged, so that the recipes stay inside."""
    return [(str(picture.path), picture.label) for picture in pictures if picture.path.exists()]


def clicked(event: gr.SelectData) -> str:
    """The file name of the picture that was clicked in a gallery, even if the gallery has changed since."""
    return str(event.value["image"]["orig_name"])
