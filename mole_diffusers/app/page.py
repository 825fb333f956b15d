"""What the tabs share: the components of a recipe, and restoring the fields when a page is opened again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import gradio as gr

from mole_diffusers.app import draw_over
from mole_diffusers.app.actions import MAX_COUNT, Actions, Picture
from mole_diffusers.app.fields import CONTROLS, TRAINING
from mole_diffusers.app.jobs import Job, Jobs
from mole_diffusers.app.mixer_cards import MixerCard, cards_of, edit, newest, without_bad_tags
from mole_diffusers.app.sentences import problem
from mole_diffusers.app.style import status_line
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.found_recipe import FoundRecipe
from mole_diffusers.studio.prompt_weights import prompts_read
from mole_diffusers.studio.recipe import OPEN, Recipe

# For events that change the prompt or the cards, and for drawing the cards: one at a time, in the order they were sent.
ORDERED: dict[str, Any] = {"concurrency_id": "prompt", "concurrency_limit": 1}
STORED: dict[str, Any] = {"secret": "mole"}  # fixed, since what the browser keeps outlives the app
MOST_SEED = 2**53  # browsers keep numbers as doubles
MAX_UNDONE = 50  # texts of the prompt that can be brought back
MAX_WATCHED = 256  # jobs that pages show; of pages that were closed, some are among them
OF_BASE = ("width", "height", "guidance")  # fields that change with the base model
Values = dict[Any, Any]  # component -> its value, or a `gr.update`
# For events whose functions take values as the browser has them: a component refuses what is not among its choices yet.
RAW: dict[str, Any] = {"preprocess": False, "show_progress": "hidden"}


class Page:
    """The components that several tabs use. Each is laid out (`render`) by the tab that it belongs to.

    Attributes:
        defaults: the recipe of a fresh page.
        jobs: the queue.
        controls: field of a Recipe -> its component.
        cards: the mixer's cards (state).
        shown: the cards as last drawn (state). A change redraws the mixer, see `redraw`.
        of_cards: the components that `cards_for` has values for.
        rewrites: the texts that the prompt has had, the present one last (state), for undoing, and for events that were sent
            with an older one.
        written: the prompt, its cards and rewrites: inputs and outputs of the events that edit the prompt.
        filled_fields: the components that `filled` has values for.
        locks, masks: gates set by hand, and painted regions, as in a Recipe. They are hidden components in the browser.
        base: the choice of the base model.
        inputs: the components whose values `recipe` takes.
        over, over_panel, over_status: the editor of a picture to draw over, its panel, and a status line in it.
        has_over: whether a picture is in the editor (hidden). The browser keeps this, but not the picture.
        count: the number of pictures to compose.
        training: field of a TrainingRequest -> its component.
        axes: the two axes of a grid, across and down.
        second: the panel with the prompts of the second text encoder.
        add, trained: the choice of a LoRA to add, and of gates to download.
        problem: the line below the prompt that says what is wrong with it.
        showing: the file name of the picture that is shown large (state).
        to_paint: the LoRA whose card was switched to a painted region last (state).
        tabs, tab: all tabs, and the one that is being laid out.
        choices: field -> function that lists its choices now, if these change with the base model, LoRAs and gates.
        lists: the fields of `choices`, and `second`.
        visitor: who owns jobs. It is kept in the browser, so that a reload does not change it.
        entered: the event that fires when an opened page has its fields.
    """

    def __init__(self, actions: Actions, defaults: Recipe, blocks: gr.Blocks):
        self.actions, self.defaults, self.blocks = actions, defaults, blocks
        self.jobs = Jobs()
        self._watched: dict[tuple[str, str], Job] = {}  # (session, kind of job) -> the job that the page shows
        catalog, first = actions.studio.catalog, self._shown(defaults)
        known: dict[str, Callable[[], list[Any]]] = {
            "sampler": lambda: ["default", *actions.studio.samplers],
            "gates": lambda: ["auto", *UNTRAINED, *catalog.gates],
            "styles": lambda: list(catalog.loras),
            "add": actions.choices,
            "trained": lambda: list(catalog.gates),
        }

        def field(name: str, make: Callable[..., Any], **options: Any) -> Any:
            return make(*([known[name]()] if name in known else []), render=False, **options)

        self.controls = {name: field(name, make, value=first[name], elem_id=name) for name, make in CONTROLS.items()}
        self.training = {name: field(name, make, elem_id=f"train-{name}") for name, make in TRAINING.items()}
        self.cards, self.shown, self.rewrites = gr.State([]), gr.State({"cards": []}), gr.State([])
        self.written = [self.controls["prompt"], self.cards, self.rewrites]
        self.locks, self.masks = gr.JSON({}, visible=False), gr.JSON({}, visible=False)
        self.base = gr.Dropdown(
            list(actions.bases), value=actions.base, label="Base model", visible=len(actions.bases) > 1,
            show_label=False, container=False, min_width=160, scale=0, elem_id="base", render=False,
        )  # fmt: skip
        self.inputs = [*self.controls.values(), self.locks, self.masks, self.base]
        sources = ("upload", "clipboard")
        self.over = draw_over.editor(label="To draw over", sources=sources, elem_id="over-picture", render=False)
        self.over_status = status_line(elem_id="over-status", render=False)
        self.has_over = gr.Checkbox(False, visible="hidden", elem_id="has-over")
        self.over.upload(None, None, [self.has_over, self.over_status], js="() => [true, '']")
        self.over.clear(None, None, self.has_over, js="() => false")
        panel = partial(gr.Accordion, open=False, render=False)
        self.over_panel = panel("Draw over a picture, or larger", elem_id="over")
        self.second = panel("Another prompt for the second text encoder", elem_id="second", visible="hidden")
        self.count = gr.Slider(1, MAX_COUNT, 1, step=1, label="Pictures", elem_id="count", render=False)
        text = partial(gr.Textbox, max_length=500, render=False)
        across = text("arm=base,sum,gates", label="Across", elem_id="axis-x")
        self.axes = [across, text("seed=0,1", label="Down", elem_id="axis-y")]
        self.add = field("add", gr.Dropdown, value=None, label="Add a LoRA by name", elem_id="add", min_width=120)
        self.trained = field("trained", gr.Dropdown, value=None, label="Gates to download", elem_id="which-gates")
        named = {**self.training, **self.controls, "add": self.add, "trained": self.trained}
        self.choices = {named[name]: choices for name, choices in known.items()}
        self.problem = status_line(elem_id="problem", render=False)
        self.showing, self.to_paint = gr.State(""), gr.State("")
        self.tab: Any = None
        self.tabs = gr.Tabs(elem_id="tabs", overflow_behavior="wrap", render=False)
        self.lists = [self.second, *self.choices]
        self.of_cards = [self.cards, self.shown, self.rewrites, self.problem]
        self.filled_fields = [*self.inputs, *self.of_cards]
        self.filled_fields += [self.over, self.has_over, self.over_panel, *self.axes]
        self.visitor = gr.BrowserState("", storage_key="mole-visitor", **STORED)
        self._fields = [*self.inputs, self.count, *self.training.values(), *self.axes, self.has_over]  # stored in this order
        self.entered = self._remember()

    def now(self) -> Values:
        """Updates for `lists`."""
        has_second = "prompt_2" in prompts_read(self.actions.studio.pipe)
        seen = gr.update(visible=True if has_second else "hidden")  # not False: its fields would lose their values
        return {field: gr.update(choices=choices()) for field, choices in self.choices.items()} | {self.second: seen}

    def chosen(self, field: Any, value: Any) -> Any:
        """An update that chooses in a field of `choices`, also what was not there when this page was opened."""
        return gr.update(choices=self.choices[field](), value=value)

    # ---- a recipe in the components

    def recipe(self, *values: Any) -> Recipe:
        """The recipe in the controls. Raises ValueError for values out of range, or if another base model is open."""
        *given, locks, masks, base = values
        self.actions.check_base(base, "wait until it is changed, or reload the page")
        named = dict(zip(self.controls, given, strict=True))
        named |= {name: named[name] or 0 for name in OPEN}
        named["seed"] = -1 if named["seed"] is None else named["seed"]
        named["sampler"] = "" if named["sampler"] == "default" else named["sampler"]
        return Recipe(**named, locks=locks, masks=masks, base=self.actions.studio.base)

    def asked(self, *values: Any) -> tuple[Any, ...]:
        """Values of `inputs`, any further components, and `over` -> the recipe, the further values, and the pictures to draw
        over."""
        *given, editor = values
        recipe = self.recipe(*given[: len(self.inputs)])
        return recipe, *given[len(self.inputs) :], draw_over.pictures(editor)

    def values(self, recipe: Recipe) -> Values:
        """The values of `inputs` for a recipe."""
        locks = {site: dict(row) for site, row in recipe.locks.items()}
        own = {self.locks: locks, self.masks: dict(recipe.masks), self.base: self.actions.base}
        return {self.controls[name]: value for name, value in self._shown(recipe).items()} | own

    def _shown(self, recipe: Recipe) -> dict[str, Any]:
        """The values of `controls` for a recipe. Width and height are 0 if they are the usual size for the prompt, so that
        they follow the prompt."""
        shown = {name: getattr(recipe, name) for name in CONTROLS} | {"sampler": recipe.sampler or "default"}
        try:
            usual = self.actions.size_of(replace(recipe, width=0, height=0))
        except ValueError:  # a prompt that cannot be read, or whose LoRAs are not here
            return shown
        follows = not recipe.image and (recipe.width, recipe.height) == usual
        return shown | (dict.fromkeys(OPEN, 0) if follows else {})

    def fresh(self) -> Recipe:
        """The recipe of a fresh page: the defaults, with the size and guidance of the base model if that was changed."""
        return replace(self.defaults, **self.actions.settings_of_base())

    def filled(self, found: FoundRecipe) -> tuple[Recipe, Values, list[str]]:
        """Put a recipe into a page. Returns the completed recipe, the values of the page, and notes for the visitor.

        If it is not the recipe of a grid, the page's axes stay as they are. If it was drawn over no picture, the editor for
        that is emptied. Its panel opens if the recipe uses it.
        """
        asked = found.recipe
        try:
            recipe = self.actions.studio.complete(asked)
            notes = self.actions.notes(found, recipe)
        except ValueError as error:
            unknown = self.unknown_choices(asked)
            recipe = replace(asked, **unknown)
            notes = [f"mend this first: {error}", *(f"without its {name} {getattr(asked, name)!r}" for name in unknown)]
            notes += self.actions.notes(found, None)
        if recipe.seed > MOST_SEED:
            notes.append(f"browsers round seeds above {MOST_SEED}: draw it with the API or `mole redraw`")
        if recipe.arm != "gates":
            notes.append(f"it was drawn as {recipe.arm!r}, which has no field here: a grid draws it with arm={recipe.arm}")
        if recipe.prompt_2 or recipe.negative_2:
            notes.append("it has another prompt for the second text encoder")
        if asked.image:
            mask = " and paint again what is to change" if asked.mask else ""
            notes.append(f'it was drawn over a picture: put that one into "Draw over a picture"{mask}')
        values = self.values(recipe) | self.cards_for(recipe.prompt)
        values |= {} if asked.image else {self.over: None, self.has_over: False}
        values |= {self.over_panel: gr.update(open=True)} if asked.image or recipe.hires > 1 else {}
        values |= {field: self.chosen(field, values[field]) for field in self.choices if field in values}
        return recipe, values | dict(zip(self.axes, found.axes, strict=False)), notes

    def put_over(self, path: Path) -> Values:
        """Updates that put a picture into the editor for drawing over, and open its panel. Raises ValueError if its file is
        gone."""
        if not path.exists():
            raise ValueError("this picture is not in the gallery any more")
        return {self.over: draw_over.put(path), self.over_panel: gr.update(open=True)}

    def cards_for(self, prompt: str) -> Values:
        """Updates for a prompt that fills the page: its cards, and what is wrong with it.

        A tag that cannot be read, or whose LoRA is not here, has no card.
        """
        return self.cards_now(prompt, []) | {self.rewrites: [prompt]}

    def cards_now(self, prompt: str, cards: list[MixerCard]) -> Values:
        """Updates for the cards after the prompt has changed, and what is wrong with it."""
        catalog = self.actions.studio.catalog
        try:
            new, said = cards_of(prompt, cards, catalog.loras, catalog.preferred_weight), ""
        except ValueError as error:
            readable = without_bad_tags(prompt, catalog.loras)
            new, said = cards_of(readable, cards, catalog.loras, catalog.preferred_weight), problem(error)
        return ({} if new == cards != [] else self.redraw(new)) | {self.problem: said}

    def rewrite(self, given: str, new: str, rewrites: list[str]) -> Values:
        """Updates that put a new text into the prompt, if it differs. `given` is the prompt that the event was sent with."""
        if new == newest(given, rewrites):
            return {}
        before = rewrites if given in rewrites else [*rewrites, given]
        return {self.controls["prompt"]: new, self.rewrites: [*before, new][-MAX_UNDONE:]}

    def typed(self, prompt: str, rewrites: list[str]) -> list[str]:
        """`rewrites` after the prompt was typed."""
        return rewrites if rewrites[-1:] == [prompt] else [*rewrites, prompt][-MAX_UNDONE:]

    def undo(self, prompt: str, rewrites: list[str]) -> Values:
        """Updates that put the text before the present one back into the prompt, and its cards."""
        before = [*self.typed(prompt, rewrites)[:-1]]
        if not before:
            return {}
        return {self.controls["prompt"]: before[-1]} | self.cards_for(before[-1]) | {self.rewrites: before}

    def edited(self, names: Iterable[str], text: str, cards: list[MixerCard], rewrites: list[str], **edits: Any) -> Values:
        """Updates that edit these LoRAs in the prompt and the cards, from values of `written`; see `mixer_cards.edit`."""
        new, catalog = newest(text, rewrites), self.actions.studio.catalog
        for name in names:
            weight = None if any(card["name"] == name for card in cards) else catalog.preferred_weight(name)
            first = {} if weight is None else {"te": f"{weight:g}", "unet": f"{weight:g}"}
            new, cards = edit(new, cards, name, catalog.loras, **first | edits)
        return self.rewrite(text, new, rewrites) | self.redraw(cards)

    def redraw(self, cards: list[MixerCard]) -> Values:
        """Updates that redraw the mixer's cards, even if they are the same as before."""
        return {self.cards: cards, self.shown: {"cards": cards, "at": time.monotonic_ns()}}

    def unknown_choices(self, recipe: Recipe) -> dict[str, Any]:
        """{field: the page's default} for the choices in a recipe that are not available here."""
        fresh, shown = self.fresh(), self._shown(recipe)
        listed = {name: self.choices[self.controls[name]]() for name in ("gates", "sampler")}
        return {name: getattr(fresh, name) for name, names in listed.items() if shown[name] not in names}

    # ---- the jobs that a page shows

    def watch(self, request: gr.Request, kind: str, job: Job) -> Iterator[Job]:
        """Yield the job while it makes progress, until the page starts another one of this kind."""
        key = session(request), kind
        self._watched.pop(key, None)
        self._watched[key] = job  # the newest is last
        over = [shown for shown, watched in [*self._watched.items()] if watched.is_over]
        for shown in over[: max(len(self._watched) - MAX_WATCHED, 0)]:
            self._watched.pop(shown, None)
        for _ in self.jobs.follow(job):
            if self._watched.get(key) is not job:
                return
            yield job
        job.is_shown = True

    def watched(self, request: gr.Request, kind: str) -> Job | None:
        """The job of a kind that the page shows."""
        return self._watched.get((session(request), kind))

    def owners(self, request: gr.Request | None, visitor: str) -> set[str]:
        """Under which names a visitor's jobs run: a job that began while the page opened is its session's."""
        return {visitor or session(request), session(request)}

    def drawn(self, request: gr.Request | None, visitor: str) -> list[Picture]:
        """The pictures that the visitor's jobs composed and whose files are still there, oldest first."""
        events = [job.event for job in self.jobs.of(self.owners(request, visitor), "compose")]
        return [picture for event in events if event is not None for picture in event.pictures if picture.path.exists()]

    # ---- a page that is opened again

    def _remember(self) -> Any:
        """Keep the fields in the browser, and fill a page when it is opened. Returns the event of filling."""
        fields, kept = self._fields, gr.BrowserState(None, storage_key="mole-fields", **STORED)
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
            return [shown, *updates]

        changes = [field.change for field in fields]
        gr.on(changes, keep, [filling, *fields], kept, trigger_mode="always_last", queue=False, **RAW)

        def listed() -> Values:
            return {self.base: self.actions.base} | self.now()

        def enter(visitor: Any, values: Any) -> tuple[str, list[Any]]:
            visitor, fresh = visitor if isinstance(visitor, str) and visitor else token_urlsafe(16), self.fresh()
            filled = self._kept(values) or (self.values(fresh) if fresh != self.defaults else {})
            return visitor, [filled.get(field) for field in fields]

        loaded = self.blocks.load(listed, None, [self.base, *self.lists])
        known = loaded.then(enter, [self.visitor, kept], [self.visitor, filling])
        filled = known.then(fill, [filling, *fields], [kept, *fields], **RAW, **ORDERED)
        filled.then(self.cards_for, self.controls["prompt"], self.of_cards, **ORDERED)

        def reopened(had_over: Any, hires: float) -> Values:
            lost = "the picture to draw over is gone: put it there again" if had_over else ""
            opened = {self.over_panel: gr.update(open=True)} if had_over or hires > 1 else {}
            return opened | {self.over_status: lost, self.has_over: False}

        filled.then(reopened, [self.has_over, self.controls["hires"]], [self.over_panel, self.over_status, self.has_over])
        return filled

    def _kept(self, values: Any) -> Values:
        """The fields as a browser kept them, with the defaults for values that do not fit, and for sizes of another base.
        Styles that are gone are left out. {} if another release of the app stored them."""
        if not isinstance(values, list) or len(values) != len(self._fields):
            return {}
        entered, fresh = dict(zip(self._fields, values, strict=True)), self.values(self.fresh())
        if entered[self.base] != self.actions.base:  # the base was changed meanwhile
            entered |= {field: fresh[field] for field in (self.base, *(self.controls[name] for name in OF_BASE))}
        styles = self.training["styles"]
        chosen = entered[styles] if isinstance(entered[styles], list) else []
        entered[styles] = [name for name in chosen if name in self.choices[styles]()]
        return entered | {field: value for field, value in fresh.items() if not self._fits(fresh | {field: entered[field]})}

    def _fits(self, inputs: Values) -> bool:
        """Whether these values make a recipe whose choices are available here."""
        try:
            return not self.unknown_choices(self.recipe(*inputs.values()))
        except Exception:  # the browser may have anything there
            return False


def session(request: gr.Request | None) -> str:
    """The visitor's session; "" for calls without one."""
    return str(getattr(request, "session_hash", "") or "")
