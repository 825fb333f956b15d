"""The page's style: colours of the LoRAs, layout on a phone, keys that change a weight, and how pictures are shown."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Picture
from mole_diffusers.inspection.gate_figures import COLOURS

BUTTONS: Any = ["fullscreen", "download"]  # on pictures; Gradio's own "share" would send them to the network
figure = partial(gr.Image, format="png", interactive=False, buttons=BUTTONS, elem_classes="figure")
gallery = partial(  # of PNG files; those of few pixels are shown as squares
    gr.Gallery, format="png", height="auto", object_fit="contain", buttons=BUTTONS, interactive=False, elem_classes="pixel"
)
CARDS = "".join(f".card.c{i} {{ border-left-color: {colour} !important; }}\n" for i, colour in enumerate(COLOURS))
CSS = (
    CARDS
    + """
#now img, .pixel .thumbnail-item img { width: 100%; height: 100%; object-fit: contain; }
.figure img { padding-top: 34px; object-fit: contain; }  /* the label and the buttons cover the top */
.grid-wrap.fixed-height { min-height: 0 !important; max-height: none !important; overflow-y: visible !important;
  padding-top: 34px !important; }  /* as high as its pictures plus the label */
.gallery-container:has(.preview) { min-height: 420px; }
.caption-label { white-space: normal !important; max-width: 100% !important; }
.card .thumb img { width: 56px; height: 56px; object-fit: contain; }
.card { border: 1px solid var(--border-color-primary); border-left: 8px solid; border-radius: 8px; padding: 10px 12px;
  gap: 8px; background: var(--background-fill-primary); }
.card .head { align-items: center; flex-wrap: nowrap; }
.card .head label { font-weight: 600; }
.card .strength .tab-like-container { display: none; }  /* the number field beside the slider takes any value */
.card .facts, .card .facts p { font-size: var(--text-sm); margin: 0; }
#title h1 { margin-bottom: 0; }
.status:not(:has(p)) { display: none !important; }  /* no gap where there is nothing to say */
.status p { font-variant-numeric: tabular-nums; margin: 4px 0; }
:focus-visible { outline: 3px solid #0072B2 !important; outline-offset: 1px; }
@media (max-width: 640px) {
  .gradio-container { padding: 6px !important; }
  .phone-column { flex-direction: column !important; }
  .phone-column > * { min-width: 100% !important; max-width: 100%; }
  .card .head { gap: 6px; }
  .card .strength, .card .binding, :is(.card .strength, .card .binding) > * { flex-direction: column; width: 100%; }
  .results { order: -1; }  /* results come right below the button */
}
"""
)

# Small pictures are shown with their pixels as squares.
# As in A1111: Ctrl+Up and Ctrl+Down change the strength of the tag under the cursor by 0.05, Ctrl+Enter composes.
HEAD = """
<script>
document.addEventListener("load", ({ target: image }) => {
  if (image.tagName !== "IMG" || !image.closest(".pixel")) return;
  image.style.imageRendering = Math.max(image.naturalWidth, image.naturalHeight) < 256 ? "pixelated" : "auto";
}, true);
document.addEventListener("keydown", (event) => {
  const box = event.target;
  if ((event.ctrlKey || event.metaKey) && event.key === "Enter" && box.closest("#prompt, #negative, #second")) {
    box.blur();  // which brings the cards in step
    document.querySelector("#compose").click();
    box.focus();
    event.preventDefault();
  }
  if (!event.ctrlKey || !["ArrowUp", "ArrowDown"].includes(event.key) || box.tagName !== "TEXTAREA") return;
  for (const tag of box.value.matchAll(/<lora:[^:<>]+:(-?[0-9.]+)[^<>]*>/g)) {
    if (tag.index <= box.selectionStart && box.selectionStart <= tag.index + tag[0].length) {
      const start = tag.index + tag[0].indexOf(":" + tag[1], 6) + 1;
      const value = Math.round((parseFloat(tag[1]) + (event.key === "ArrowUp" ? 0.05 : -0.05)) * 100) / 100;
      const at = box.selectionStart;
      box.value = box.value.slice(0, start) + value + box.value.slice(start + tag[1].length);
      box.setSelectionRange(at, at);
      box.dispatchEvent(new Event("input", { bubbles: true }));
      event.preventDefault();
    }
  }
});
</script>
"""


def theme() -> Any:
    """A theme with system fonts, so that nothing is downloaded."""
    fonts = ["system-ui", "sans-serif"]
    plain = gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
    return plain.set(  # small text stays readable: a contrast of 7:1 on white, and on black in dark mode
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700",
        block_title_text_color="*neutral_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
    )


def gallery_items(pictures: Sequence[Picture]) -> list[tuple[str, str]]:
    """Pictures for a gallery: the files unchanged, so that the recipes stay inside."""
    return [(str(picture.path), picture.label) for picture in pictures]


def clicked(event: gr.SelectData) -> str:
    """The file name of the picture that was clicked in a gallery, whatever the gallery shows by now."""
    return str(event.value["image"]["orig_name"])
