"""How the page looks: colours of LoRAs, a phone's width, and keys that change a weight."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mole_diffusers.gate_figures import COLOURS

CARDS = "".join(f".card.c{i} {{ border-left: 8px solid {colour} !important; }}\n" for i, colour in enumerate(COLOURS))
CSS = (
    CARDS
    + """
.pixel img { image-rendering: pixelated; }
.card { padding: 8px 10px; }
.card .thumb { max-width: 76px; min-width: 76px; }
#title h1 { margin-bottom: 0; }
#status p, #see-status p, #train-status p, #grid-status p { font-variant-numeric: tabular-nums; margin: 4px 0; }
@media (max-width: 640px) {
  .gradio-container { padding: 6px !important; }
  .phone-column { flex-direction: column !important; }
  .phone-column > * { min-width: 100% !important; }
}
"""
)

# Ctrl+Up and Ctrl+Down change the number of the tag under the cursor by 0.05, as artists know it.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  const box = event.target;
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
    """Fonts of the system: nothing is fetched."""
    fonts = ["system-ui", "sans-serif"]
    return gr.themes.Default(primary_hue="blue", font=fonts, font_mono=["ui-monospace", "monospace"])
