"""The size of the picture: shapes and sizes of the base as buttons, and the size at which every subject has room."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import gradio as gr

from mole_app.studio.recipe import Recipe
from mole_app.web.page import Page
from mole_app.web.sentences import errors_to
from mole_app.web.style import Values, status_line

FIT = "the model's own"
SHAPES = {FIT: 0.0, "1:1": 1.0, "3:4": 3 / 4, "4:3": 4 / 3, "9:16": 9 / 16, "16:9": 16 / 9, "2:1": 2.0}
OTHER = "other"  # a shape that is shown while the picture has none of these
SCALES = {"1 ×": 1.0, "1.25 ×": 1.25, "1.5 ×": 1.5, "2 ×": 2.0}


def build(page: Page) -> None:
    """Lay out the buttons and connect them."""
    width, height, prompt = (page.form.controls[name] for name in ("width", "height", "prompt"))
    shape = gr.Radio(list(SHAPES), value=FIT, label="Shape", elem_id="shape", elem_classes="pills")
    scale = gr.Radio(list(SCALES), value=next(iter(SCALES)), label="Size", elem_id="scale", elem_classes="pills")
    with gr.Row(equal_height=True, elem_id="size-now"):
        said = status_line(elem_id="size-said")
        take = gr.Button("", size="sm", visible=False, min_width=110, scale=0, elem_id="take-size")
    roomy = gr.State((0, 0))

    @errors_to(said)
    def chosen(shape: str | None, scale: str | None, prompt: str) -> Values:
        new = size_of(page, prompt, SHAPES.get(shape or FIT, 0.0), SCALES.get(scale or "", 1.0))
        return dict(zip((width, height), new, strict=True))

    def told(*values: Any) -> Values:
        *given, shape_now, scale_now = values
        try:
            recipe = page.form.recipe(*given)
            drawn = page.actions.studio.complete(recipe)
            better = page.actions.studio.size_with_room(drawn)
        except ValueError:  # said where it was typed
            return {said: "", take: gr.update(visible=False)}
        words = f"{drawn.width} × {drawn.height} pixels"
        words += "; a larger size may keep the subjects apart: it has room to draw each by itself" if better else ""
        button = gr.update(visible=better is not None, value=f"Take {better[0]} × {better[1]}" if better else "")
        now, times = choices_for(page, recipe, (shape_now, scale_now))
        shapes = gr.update(choices=[*SHAPES, *([OTHER] if now == OTHER else [])], value=now)
        return {said: words, take: button, roomy: better or (0, 0), shape: shapes, scale: times}

    def took(size: tuple[int, int]) -> Values:
        return {width: size[0], height: size[1]}

    sizes = [width, height]
    gr.on([shape.input, scale.input], chosen, [shape, scale, prompt], [*sizes, said], show_progress="hidden")
    take.click(took, roomy, sizes)
    asking = [page.form.controls[name].change for name in ("width", "height", "binding", "controlnet", "ip_adapter")]
    asking += [page.prompt.shown.change, prompt.change]
    outputs = [said, take, roomy, shape, scale]
    gr.on(asking, told, [*page.form.inputs, shape, scale], outputs, trigger_mode="always_last", show_progress="hidden")


def choices_for(page: Page, recipe: Recipe, chosen: tuple[str | None, str | None]) -> tuple[str, str | None]:
    """The shape and the scale that give a recipe's size: those that are chosen, if they do, else first the shape of exactly
    this ratio. For another size that shape, or `OTHER`, and no scale.

    Of a small base two shapes can have one size: with 64 x 64 pixels both 16:9 and 2:1 are 88 x 48.
    """
    size = recipe.width, recipe.height
    fits: list[tuple[str, str | None]] = [
        (shape, scale)
        for (scale, times), (shape, ratio) in product(SCALES.items(), SHAPES.items())
        if size_of(page, recipe.prompt, ratio, times) == size
    ]
    found = next((fit for fit in fits if fit == chosen), None)
    exact = next((shape for shape, ratio in SHAPES.items() if ratio and ratio * size[1] == size[0] > 0), None)
    if found is None and exact is not None:
        found = next((fit for fit in fits if fit[0] == exact), (exact, None))
    return found or next(iter(fits), (OTHER, None))


def size_of(page: Page, prompt: str, ratio: float, scale: float) -> tuple[int, int]:
    """Width and height for a shape, as width over height, and a scale, at the base's usual number of pixels times the square
    of the scale. (0, 0) leaves them to the prompt."""
    if ratio == 0 and scale == 1:
        return 0, 0
    if ratio == 0:
        wide, high = map(float, page.actions.size_of(Recipe(prompt)))
    else:
        side = math.sqrt(math.prod(page.actions.size_of(Recipe(""))))
        wide, high = side * math.sqrt(ratio), side / math.sqrt(ratio)
    step = 64 if min(wide, high) >= 256 else 8
    return tuple(max(step, round(scale * each / step) * step) for each in (wide, high))  # type: ignore[return-value]
