"""The panel of styles and presets."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from mole_app.studio.recipe import Recipe
from mole_app.studio.styles import SETTINGS, Style, preset, styled
from mole_app.web.page import Page
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import errors_to, markdown
from mole_app.web.style import Values, status_line


def build(page: Page) -> None:
    """Lay out the panel and connect it."""
    kept, form, prompt = page.actions.presets, page.form, page.prompt
    with gr.Accordion("Styles and presets", open=False, elem_id="presets") as panel:
        style = gr.Dropdown([], label="Style", info="puts its words around the prompt", elem_id="style")
        chosen = gr.Dropdown([], label="Preset", info="fills in its settings", elem_id="preset")
        name = gr.Textbox(label="Name", info="of a new one", max_length=60, elem_id="preset-name")
        with gr.Row():
            of_prompt = gr.Button("Save the words", size="sm", min_width=90, elem_id="save-style")
            of_settings = gr.Button("Save the settings", size="sm", min_width=90, elem_id="save-preset")
        with gr.Row():
            kinds = [".csv", ".json", ".png"]
            file = gr.UploadButton("Add a file", file_types=kinds, size="sm", min_width=90, elem_id="preset-file")
            share = gr.DownloadButton(
                "Share as a file", size="sm", min_width=90, interactive=False, elem_id="preset-share"
            )  # fmt: skip
        status = status_line(elem_id="preset-status")
    settings = [form.controls[field] for field in SETTINGS]

    def kept_now(words: str = "") -> Values:
        lists = {style: gr.update(choices=list(kept.styles)), chosen: gr.update(choices=list(kept.presets))}
        return lists | {status: markdown(words)}

    def shared(path: Path) -> Any:
        return gr.update(value=shutil.copy(path, page.actions.new_folder()), interactive=True)

    @errors_to(status)
    def put_around(which: str, negative: str, *now: Any) -> Values:
        text, cards, rewrites = now
        new = styled(Recipe(text, negative), [which], kept.styles)
        changed = prompt.replaced(text, new.prompt, cards, rewrites)
        return changed | {form.controls["negative"]: new.negative, share: shared(kept.file)}

    @errors_to(status)
    def fill_in(which: str) -> Values:
        recipe = Recipe("", **preset(path := kept.presets[which]))
        unknown = form.unknown_choices(recipe)
        values = form.values(replace(recipe, **unknown))
        said = "; ".join(f"without its {field} {getattr(recipe, field)!r}" for field in unknown)
        return {field: values[field] for field in settings} | {share: shared(path), status: markdown(said)}

    @errors_to(status)
    def save_words(new: str, text: str, negative: str) -> Values:
        if not new.strip():
            raise ValueError("give it a name")
        kept.add_styles([Style(new.strip(), text, negative)])
        return kept_now(f"the style {new.strip()} is kept")

    @errors_to(status)
    def save_settings(new: str, *values: Any) -> Values:
        return kept_now(f"the preset {kept.add_preset(new, form.recipe(*values))} is kept")

    @errors_to(status)
    def added(path: str) -> Values:
        return kept_now(f"added {', '.join(kept.add(Path(path)))}")

    lists = [style, chosen, status]
    panel.expand(kept_now, None, lists)
    outputs = [prompt.text, *prompt.of_cards, form.controls["negative"], share, status]
    style.input(put_around, [style, form.controls["negative"], *prompt.written], outputs, **ORDERED)
    chosen.input(fill_in, chosen, [*settings, share, status])
    of_prompt.click(save_words, [name, prompt.text, form.controls["negative"]], lists)
    of_settings.click(save_settings, [name, *form.inputs], lists)
    file.upload(added, file, lists)
