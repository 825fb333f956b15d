"""The page: its parts, filling it from a recipe, and restoring its fields when it is opened again."""

from __future__ import annotations

from dataclasses import replace
from secrets import token_urlsafe
from typing import Any

import gradio as gr

from mole_app.studio.infotext import FoundRecipe
from mole_app.studio.recipe import Recipe
from mole_app.web.actions import Actions
from mole_app.web.draw_over import OverPanel
from mole_app.web.form import OF_BASE, Form
from mole_app.web.prompt_box import ORDERED, PromptBox
from mole_app.web.style import Values
from mole_app.web.visits import STORED, Visits, session

TABS = ("Compose", "Compare", "Gallery", "Recipe", "Train")
MOST_SEED = 2**53  # browsers keep numbers as doubles
# For events whose functions take values as the browser has them: a component refuses what is not among its choices yet.
RAW: dict[str, Any] = {"preprocess": False, "show_progress": "hidden"}


class Page:
    """The parts of the page that several tabs use.

    Attributes:
        form: the fields.
        prompt: the prompt and its cards.
        over: the panel of a picture to draw over.
        visits: the jobs of all visitors, and which of them each page shows.
        showing: the file name of the picture that is shown large (state).
        tabs, tab: all tabs, and each by its name.
        entered: the event that fires when an opened page has its fields.
    """

    def __init__(self, actions: Actions, defaults: Recipe, blocks: gr.Blocks):
        self.actions, self.blocks = actions, blocks
        self.form = Form(actions, defaults)
        self.prompt = PromptBox(self.form.controls["prompt"], actions.studio.catalog)
        self.over, self.visits = OverPanel(), Visits()
        self.showing = gr.State("")
        self.tabs = gr.Tabs(elem_id="tabs", overflow_behavior="wrap", render=False)
        self.tab = {name: gr.Tab(name, elem_id=f"tab-{name.lower()}", id=name, render=False) for name in TABS}
        self.entered = remember(self)

    @property
    def filled_fields(self) -> list[Any]:
        """The components that `filled` has values for."""
        over = self.over
        panels = [over.picture, over.has, over.panel, *self.form.pictures.values(), self.form.more["given"]]
        return [*self.form.inputs, *self.prompt.of_cards, *panels, *self.form.axes]

    @property
    def pictures(self) -> list[Any]:
        """The components whose values `Form.asked` takes last."""
        return [self.over.picture, self.over.mask, *self.form.pictures.values()]

    def filled(self, found: FoundRecipe) -> tuple[Recipe, Values, list[str]]:
        """Put a recipe into a page. Returns the completed recipe, the values of the page, and notes for the visitor.

        If it is not the recipe of a grid, the page's axes stay as they are. If it was drawn over no picture, that of the
        page is taken out. Its panel opens if the recipe uses it.
        """
        asked, actions = found.recipe, self.actions
        try:
            recipe = actions.studio.complete(asked)
            notes = actions.notes(found, recipe)
        except ValueError as error:
            unknown = self.form.unknown_choices(asked)
            recipe = replace(asked, **unknown)
            notes = [f"mend this first: {error}", *(f"without its {name} {getattr(asked, name)!r}" for name in unknown)]
            notes += actions.notes(found, None)
        if recipe.seed > MOST_SEED:
            notes.append(f"browsers round seeds above {MOST_SEED}: draw it with the API or `mole redraw`")
        if recipe.arm != "gates":
            notes.append(f"it was drawn as {recipe.arm!r}, which has no field here: a grid draws it with arm={recipe.arm}")
        if recipe.prompt_2 or recipe.negative_2:
            notes.append("it has another prompt for the second text encoder")
        if asked.image:
            mask = " and paint again what is to change" if asked.mask else ""
            notes.append(f'it was drawn over a picture: put that one into "Draw over a picture"{mask}')
        for name, field in self.form.pictures.items():
            if getattr(asked, name):
                notes.append(f'it was drawn with a picture that it does not hold: put that one into "{field.label}"')
        form, over = self.form, self.over
        values = form.values(recipe) | self.prompt.cards_for(recipe.prompt)
        values |= {} if asked.image else {over.picture: None, over.has: False}
        values |= {over.panel: gr.update(open=True)} if asked.image or recipe.hires > 1 else {}
        values |= {field: None for name, field in form.pictures.items() if not getattr(asked, name)}
        values |= {form.more["given"]: gr.update(open=True)} if asked.controlnet or asked.ip_adapter else {}
        values |= {field: form.chosen(field, values[field]) for field in form.choices if field in values}
        return recipe, values | dict(zip(form.axes, found.axes, strict=False)), notes


def remember(page: Page) -> Any:
    """Keep the fields in the browser, and fill a page when it is opened. Returns the event of filling."""
    form, over, visitor = page.form, page.over, page.visits.visitor
    fields = [*form.inputs, form.more["count"], *form.training.values(), *form.axes, over.has]  # stored in this order
    kept = gr.BrowserState(None, storage_key="mole-fields", **STORED)
    filling = gr.JSON(None, visible=False)  # values for the fields of an opened page; None leaves a field as it is
    first = [field.value for field in fields]

    def keep(filling: Any, *now: Any) -> Any:
        return gr.skip() if filling is None else list(now)

    def fill(filling: list[Any], *now: Any) -> list[Any]:
        shown, updates = list(now), [gr.skip()] * len(now)
        for i, value in enumerate(filling):
            is_typed = (now[i] or "") != (first[i] or "")  # while the page opened
            if value is not None and not is_typed:
                shown[i] = updates[i] = value
        cards = page.prompt.cards_for(shown[fields.index(page.prompt.text)])
        return [shown, *updates, *(cards[each] for each in page.prompt.of_cards)]

    changes = [field.change for field in fields]
    gr.on(changes, keep, [filling, *fields], kept, trigger_mode="always_last", queue=False, **RAW)

    def listed() -> Values:
        return {form.base: page.actions.bases.open} | form.now()

    def enter(request: gr.Request, visitor: Any, values: Any) -> tuple[str, list[Any]]:
        visitor, fresh = visitor if isinstance(visitor, str) and visitor else token_urlsafe(16), form.fresh()
        page.visits.jobs.hand_over(session(request), visitor)  # those that began while the page opened
        filled = restored(form, fields, values) or (form.values(fresh) if fresh != form.defaults else {})
        return visitor, [filled.get(field) for field in fields]

    def reopened(had_over: Any, hires: float) -> Values:
        lost = "the picture to draw over is gone: put it there again" if had_over else ""
        opened = {over.panel: gr.update(open=True)} if had_over or hires > 1 else {}
        return opened | {over.status: lost, over.has: False}

    loaded = page.blocks.load(listed, None, [form.base, *form.lists])
    known = loaded.then(enter, [visitor, kept], [visitor, filling])
    filled = known.then(fill, [filling, *fields], [kept, *fields, *page.prompt.of_cards], **RAW, **ORDERED)
    filled.then(reopened, [over.has, form.controls["hires"]], [over.panel, over.status, over.has])
    return filled


def restored(form: Form, fields: list[Any], values: Any) -> Values:
    """The fields as a browser kept them, with the defaults for values that do not fit, and for sizes of another base.
    Styles that are gone are left out. {} if another release of the app stored them."""
    if not isinstance(values, list) or len(values) != len(fields):
        return {}
    entered, fresh = dict(zip(fields, values, strict=True)), form.values(form.fresh())
    if entered[form.base] != form.actions.bases.open:  # the base was changed meanwhile
        entered |= {field: fresh[field] for field in (form.base, *(form.controls[name] for name in OF_BASE))}
    styles = form.training["styles"]
    chosen = entered[styles] if isinstance(entered[styles], list) else []
    entered[styles] = [name for name in chosen if name in form.choices[styles]()]

    def fits(inputs: Values) -> bool:
        try:
            return not form.unknown_choices(form.recipe(*inputs.values()))
        except Exception:  # the browser may have anything there
            return False

    return entered | {field: value for field, value in fresh.items() if not fits(fresh | {field: entered[field]})}
