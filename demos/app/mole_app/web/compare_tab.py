"""The Compare tab: one seed with every way to combine the LoRAs, grids, what the gates did, and setting gates by hand."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import gradio as gr

from mole_app.studio import xy_grid
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import MERGES
from mole_app.web.actions import SourcePictures
from mole_app.web.gate_report import GateReport
from mole_app.web.jobs import Job, Work
from mole_app.web.mixer_cards import MixerCard, parse_lock, parse_named, shades
from mole_app.web.page import Page
from mole_app.web.page_jobs import buttons, connect_job
from mole_app.web.sentences import errors_to, markdown, way_in_words
from mole_app.web.style import BUTTONS, Values, figure, gallery, gallery_items, row, status_line

COMPARED = ("sum", "bound")  # initially left and right of the slider, if there are no trained gates
NO_LOCKS = "nothing: every gate decides"


def build(page: Page) -> None:
    """Lay out the tab and connect it."""
    _comparison(page)
    with gr.Accordion("Grid of pictures", open=False, elem_id="xy-grid"):
        _grid(page)
    with gr.Accordion("Advanced: what the gates did", open=False, elem_id="gate-report"):
        _gate_report(page)


def _buttons(page: Page, kind: str, label: str) -> tuple[Any, Any, Any]:
    """Lay out `page_jobs.buttons`. Returns the event that starts a job, the status line, and the seed of the page's last
    picture (state) at that event."""
    start, status = buttons(page, kind, label)
    last = gr.State(None)

    def last_seed(request: gr.Request, visitor: str) -> int | None:
        return next((picture.recipe.seed for picture in reversed(page.visits.drawn(request, visitor))), None)

    pressed = start.click(last_seed, page.visits.visitor, last, trigger_mode="multiple", concurrency_limit=None)
    return pressed.then, status, last


def at_seed(recipe: Recipe, last: int | None) -> tuple[Recipe, list[str]]:
    """A recipe with the seed of the last picture in place of a random one, and a note if that changed it."""
    if recipe.seed != -1 or last is None:
        return recipe, []
    return replace(recipe, seed=last), [f"with the seed of your last picture, {last}"]


def _comparison(page: Page) -> None:
    gr.Markdown(
        "Draws your prompt at one seed without LoRAs, with each alone, with all added up, and with each in its place."
    )
    with gr.Column():
        compare, status, last = _buttons(page, "compare", "Compare at this seed")
        arms = gallery(label="The same seed", columns=4, visible=False, elem_id="arms")
        with gr.Column(visible=False, elem_id="sides") as sides_panel:
            with gr.Row():
                left = gr.Dropdown(_choices(COMPARED), value=COMPARED[0], label="Left", elem_id="left")
                right = gr.Dropdown(_choices(COMPARED), value=COMPARED[1], label="Right", elem_id="right")
            slider = gr.ImageSlider(
                label="Left and right", format="png", interactive=False, buttons=BUTTONS, elem_id="slider"
            )  # fmt: skip
        with gr.Accordion("Advanced", open=False):
            gr.Markdown("Gates that you have trained for these LoRAs, in the tab Train, are one more picture.")
            merges = gr.Dropdown(
                MERGES, value=[], multiselect=True, label="Merges to compare as well",
                info="training-free, one LoRA from all", elem_id="merges",
            )  # fmt: skip
        drawn = gr.State({})  # label -> picture file

    def work_of(recipe: Recipe, merges: list[str], last: int | None, pictures: SourcePictures) -> Work:
        recipe, notes = at_seed(recipe, last)
        return page.actions.compare(recipe, merges, pictures, notes=notes)

    def sides(drawn: dict[str, str], left: str, right: str) -> Any:
        return (drawn[left], drawn[right]) if left in drawn and right in drawn else gr.skip()

    def show(job: Job) -> Values:
        files = {picture.label: str(picture.path) for picture in job.event.pictures}
        first, second = COMPARED if "gates" not in files else ("sum", "gates")
        items = [(path, way_in_words(label)) for path, label in gallery_items(job.event.pictures)]
        shown: Values = {arms: gr.update(value=items, visible=True), drawn: files}
        if {first, second} <= set(files):
            shown |= {slider: (files[first], files[second]), left: gr.update(choices=_choices(files), value=first)}
            shown |= {right: gr.update(choices=_choices(files), value=second), sides_panel: gr.update(visible=True)}
        return shown

    gr.on([left.input, right.input], sides, [drawn, left, right], slider, trigger_mode="always_last")
    outputs = [status, arms, slider, left, right, sides_panel, drawn]
    connect_job(page, "compare", [compare], work_of, show, outputs, more=[merges, last])


def _choices(ways: Iterable[str]) -> list[tuple[str, str]]:
    return [(way_in_words(way), way) for way in ways]


def _gate_report(page: Page) -> None:
    with gr.Column():
        look, status, last = _buttons(page, "look", "Watch the gates")
        places = gallery(label="Where each LoRA acts", columns=3, visible=False, elem_id="places", elem_classes=None)
        shares = figure(label="Share over the steps", visible=False, elem_id="shares")
        heat = figure(label="Weights by block and step", visible=False, elem_id="heat")
        # short name of a block -> gate location, -> the gate's weights as text
        locations, gates = gr.State({}), gr.State({})
        block = _by_hand(page, locations, gates)

    def work_of(recipe: Recipe, cards: list[MixerCard], last: int | None, pictures: SourcePictures) -> Work:
        recipe, notes = at_seed(recipe, last)
        return page.actions.look(recipe, shades(cards), pictures, notes=notes)

    def show(job: Job) -> Values:
        report = job.event
        if not isinstance(report, GateReport):
            return {}
        return {
            heat: gr.update(value=report.heat, visible=True),
            shares: gr.update(value=report.shares, visible=True),
            places: gr.update(value=[(image, label) for label, image in report.places.items()], visible=True),
            locations: report.labels,
            gates: {label: _typed(dict(zip(report.experts, row, strict=True))) for label, row in report.gates.items()},
            block: gr.update(choices=list(report.labels), value=next(iter(report.labels))),
        }

    outputs = [status, heat, shares, places, locations, gates, block]
    connect_job(page, "look", [look], work_of, show, outputs, more=[page.prompt.cards, last])


def _by_hand(page: Page, locations: Any, gates: Any) -> Any:
    """Lay out the fields for weights that replace a gate. Returns the choice of the block."""
    with gr.Accordion("Change it by hand", open=True):
        with gr.Row():
            block = gr.Dropdown([], label="Block", info="watch the gates first", elem_id="block")
            weights = gr.Textbox(label="Weights", info="as they are now", placeholder="fox=1, ink=0.2", max_length=500,
                                 elem_id="weights")  # fmt: skip
            factor = gr.Number(1.0, label="Times", info="all of them", step=0.1, min_width=80, elem_id="times")
        with gr.Row():
            lock = gr.Button("Set the block", size="sm", elem_id="lock")
            free = gr.Button("Free all", size="sm", elem_id="free")
        locked = gr.Textbox(NO_LOCKS, label="Set by hand", interactive=False, lines=1, max_lines=12, elem_id="held")
        why = status_line(elem_id="by-hand-status")
    catalog, prompt = page.actions.studio.catalog, page.prompt.text

    @errors_to(why)
    def set_lock(block: str | None, weights: str, factor: float | None, locations: dict, text: str, locks: dict) -> Values:
        if block not in locations:
            raise ValueError("watch the gates first, then choose a block")
        names = [tag.name for tag in parse_named(text, catalog.loras).tags]
        row = {name: weight * (1.0 if factor is None else factor) for name, weight in parse_lock(weights, names).items()}
        return {page.form.locks: {**locks, locations[block]: row}}

    def held(locks: dict[str, dict[str, float]], locations: dict[str, str]) -> str:
        labels = {location: label for label, location in locations.items()}
        return "\n".join(f"{labels.get(location, location)}: {_typed(row)}" for location, row in locks.items()) or NO_LOCKS

    lock.click(set_lock, [block, weights, factor, locations, prompt, page.form.locks], [page.form.locks, why])
    free.click(lambda: {}, None, page.form.locks)
    gr.on([page.form.locks.change, locations.change], held, [page.form.locks, locations], locked, show_progress="hidden")
    block.change(lambda block, gates: gates.get(block, ""), [block, gates], weights)
    return block


def _typed(row: dict[str, float]) -> str:
    """Weights as text, in the form in which you type them."""
    return ", ".join(f"{name}={weight:.3g}" for name, weight in row.items())


def _grid(page: Page) -> None:
    others = ", ".join(kind for kind in xy_grid.AXES if kind not in ("seed", "weight", "arm"))
    gr.Markdown(
        "An axis is `seed=1,2,3`, `weight fox=0,0.5,1` or `arm=base,sum,gates`. An arm is a way to combine the "
        f"LoRAs: base (none of them), alone NAME, sum, merge METHOD or gates. The others are {markdown(others)}."
    )
    row(*page.form.axes)
    make, status = buttons(page, "grid", "Make the grid")
    sheet = figure(label="Grid", visible=False, elem_id="sheet")

    def show(job: Job) -> Values:
        return {sheet: gr.update(value=job.event.sheet, visible=True)} if job.event.sheet else {}

    connect_job(page, "grid", [make.click], page.actions.grid, show, [status, sheet], more=page.form.axes)
