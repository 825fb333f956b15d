"""What the tabs share: controls, states, error messages, and components."""

from __future__ import annotations

import functools
import inspect
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from tempfile import gettempdir
from typing import Any

import gradio as gr

from mole_diffusers.app.actions import Actions, Picture, Progress
from mole_diffusers.app.interrupted import Interrupted, Offer
from mole_diffusers.app.jobs import Job, Jobs, Work
from mole_diffusers.app.mixer_cards import MixerCard, cards_of
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.recipe import OPEN, Recipe

PRIVATE: dict[str, Any] = {"api_visibility": "private"}  # the API has endpoints of its own
BUTTONS: Any = ["fullscreen", "download"]  # on pictures; Gradio's own "share" would send them to the network
USER_ERRORS = (ValueError, FileNotFoundError)  # raised for bad input; anything else is a bug and gets logged
NUMBERS = {"seed": int, "steps": int, "guidance": float, "width": int, "height": int, "strength": float, "hires": float,
           "hires_strength": float}  # fmt: skip


@dataclass
class Page:
    """What the tabs share.

    Attributes:
        jobs: which visitor's job is running.
        defaults: the recipe of a fresh page.
        controls: field of a Recipe -> its component.
        cards: state: the mixer's cards.
        shown: state: the cards as last drawn; a change redraws the mixer, see `redraw`.
        locks, masks: states: gates set by hand, and painted regions, as in a Recipe.
        base: the choice of the base model.
        over, over_panel: the editor of a picture that is drawn over, see `draw_over`, and the panel around it.
        axes: across and down, of a grid.
        visitor: in the browser: who owns jobs, across reloads.
        fields: further components that survive a reload.
        lists: components that change with the base model and the LoRAs, each with a function for `gr.update`.
        added: events after which there may be other LoRAs.
        line: below the prompt: what is wrong with it.
        pictures: the gallery of what was composed.
        tabs, tab: all of them; the one that is being built.
        blocks: the whole page.
        interrupted: jobs that an earlier run of the app has left.
        watched: (session, kind of job) -> the job that a page shows.
        resumed: what pages do first after a reload: a function of the visitor, and its outputs.
    """

    actions: Actions
    jobs: Jobs
    defaults: Recipe
    blocks: gr.Blocks
    interrupted: Interrupted
    controls: dict[str, Any] = field(default_factory=dict)
    cards: Any = None
    shown: Any = None
    locks: Any = None
    masks: Any = None
    base: Any = None
    over: Any = None
    over_panel: Any = None
    axes: list[Any] = field(default_factory=list)
    visitor: Any = None
    line: Any = None
    pictures: Any = None
    tabs: Any = None
    tab: Any = None
    fields: list[Any] = field(default_factory=list)
    lists: list[tuple[Any, Callable[[], dict[str, Any]]]] = field(default_factory=list)
    added: list[Any] = field(default_factory=list)
    watched: dict[tuple[str, str], Job] = field(default_factory=dict)
    resumed: list[tuple[Callable[..., Any], list[Any]]] = field(default_factory=list)

    @property
    def inputs(self) -> list[Any]:
        """The components whose values `recipe` takes."""
        return [*self.controls.values(), self.locks, self.masks, self.base]

    def recipe(self, *values: Any) -> Recipe:
        """The recipe in the controls. Raises ValueError for values out of range, and for another base model than is here."""
        *given, locks, masks, base = values
        self.actions.check_base(base, "wait until it is changed, or reload the page")
        named = dict(zip(self.controls, given, strict=True))
        named |= {name: named[name] or 0 for name in OPEN}
        for name, kind in NUMBERS.items():
            if named[name] is None:
                raise ValueError(f"{name} must be a number")
            named[name] = kind(named[name])
        named["sampler"] = "" if named["sampler"] == "default" else named["sampler"]
        return Recipe(**named, locks=locks, masks=masks)

    def values(self, recipe: Recipe) -> list[Any]:
        """The values of `inputs` for a recipe."""
        shown = {name: getattr(recipe, name) for name in self.controls} | self.shown_size(recipe)
        own = dict(recipe.locks), dict(recipe.masks), self.actions.base
        return [*(shown | {"sampler": recipe.sampler or "default"}).values(), *own]

    @property
    def filled_fields(self) -> list[Any]:
        """The components whose values `filled` gives."""
        return [*self.inputs, self.cards, self.shown, *self.axes]

    def filled(self, asked: Recipe, axes: Sequence[str]) -> tuple[Recipe, list[Any], list[str]]:
        """What puts a recipe into a page: the recipe as it is here, values for `filled_fields`, and what its visitor should
        know.

        Args:
            axes: of a grid; for anything else there are none, and the page's stay.
        """
        try:
            recipe = self.actions.studio.complete(asked)
            notes = self.actions.studio.notes(asked, recipe)
        except ValueError as error:
            unknown = self.unknown_choices(asked)
            recipe = replace(asked, **unknown)
            notes = [f"mend this first: {error}", *(f"without its {name} {getattr(asked, name)!r}" for name in unknown)]
        if asked.base and (other := self.actions.other_base(asked.base)) is not None:
            notes.append(f"it was drawn with the base {other!r}, and here is {self.actions.base!r}")
        if recipe.arm != "gates":
            notes.append(f"it was drawn as {recipe.arm!r}, which has no field here: a grid draws it with arm={recipe.arm}")
        if not recipe.weights and re.search(r"[()\[\]]", recipe.prompt + recipe.negative):
            notes.append("its brackets were plain text, and are weights here")
        if recipe.prompt_2 or recipe.negative_2:
            notes.append("it has another prompt for the second text encoder")
        if asked.image:
            mask = " and paint again what is to change" if asked.mask else ""
            notes.append(f'it was drawn over a picture: put that one into "Draw over a picture"{mask}')
        cards = self.cards_for(recipe.prompt)
        return recipe, [*self.values(recipe), cards, redraw(cards), *(axes or [gr.skip()] * len(self.axes))], notes

    def cards_for(self, prompt: str) -> list[MixerCard]:
        """The cards of a prompt that fills the page; none where it cannot be read or has a LoRA that is not here, which
        composing says."""
        try:
            return cards_of(prompt, [], self.actions.studio.catalog.loras)
        except ValueError:
            return []

    def unknown_choices(self, recipe: Recipe) -> dict[str, Any]:
        """The choices of a recipe that are not here, each with what the page has by default."""
        known = {"gates": self.gates(), "sampler": ["", *self.actions.studio.samplers]}
        fresh = self.fresh()
        return {name: getattr(fresh, name) for name, names in known.items() if getattr(recipe, name) not in names}

    def fresh(self) -> Recipe:
        """The recipe of a fresh page: the defaults, at the size and guidance of a base model that has come since."""
        return replace(self.defaults, **self.actions.settings_of_base())

    def shown_size(self, recipe: Recipe) -> dict[str, int]:
        """Width and height as the controls show them: 0 where they are what the prompt asks for, and follow it."""
        try:
            usual = self.actions.usual_size(recipe.text)
        except ValueError:  # a prompt that cannot be read
            usual = None
        follows = not recipe.image and (recipe.width, recipe.height) == usual
        return {"width": 0, "height": 0} if follows else {"width": recipe.width, "height": recipe.height}

    def drawn(self, request: gr.Request) -> list[Picture]:
        """The last pictures that a page composed."""
        job = self.watched.get((session(request), "compose"))
        return [] if job is None or job.event is None else job.event.pictures

    def gates(self) -> list[str]:
        """The gates that can be chosen."""
        return ["auto", *UNTRAINED, *self.actions.studio.catalog.gates]

    def said(self, job: Job) -> str:
        """What the status line says about a job."""
        if job.state == "waiting":
            ahead = self.jobs.ahead(job)
            return f"waiting: {ahead} job{'' if ahead == 1 else 's'} before this one"
        if job.state == "failed":
            return problem(job.error)
        if job.is_asked_to_stop and not job.is_over:
            return "stopping"
        if job.event is None:
            return "cancelled before it began" if job.state == "stopped" else "starting"
        if job.state == "stopped" and isinstance(job.event, Progress):
            return f"stopped after {len(job.event.pictures)} of {job.event.count} pictures"
        words = markdown(str(job.event))
        return f"stopped: {words}" if job.state == "stopped" else words


def session(request: gr.Request | None) -> str:
    """The visitor's session, "" for calls without one."""
    return str(getattr(request, "session_hash", "") or "")


# ---- errors


def problem(error: Exception | None) -> str:
    """An error in a status line, as Markdown; one that is no visitor's fault is not told, but logged elsewhere."""
    words = str(error) if isinstance(error, USER_ERRORS) else "something went wrong; the terminal of the app says what"
    return f"**{markdown(without_folders(words))}**"


def without_folders(text: str) -> str:
    """A message without the temporary folders that files of visitors are in."""
    return re.sub(rf"{re.escape(gettempdir())}/(?:[^\s/'\"]+/)*", "", text)


def with_errors(fn: Callable[..., Any]) -> Callable[..., Any]:
    """For functions and coroutines of the API: an error of bad input is one sentence to the client."""

    @contextmanager
    def sentences() -> Iterator[None]:
        try:
            yield
        except USER_ERRORS as error:
            raise gr.Error(without_folders(str(error)), print_exception=False) from error

    @functools.wraps(fn)
    def call(*args: Any, **kwargs: Any) -> Any:
        with sentences():
            return fn(*args, **kwargs)

    @functools.wraps(fn)
    async def wait(*args: Any, **kwargs: Any) -> Any:
        with sentences():
            return await fn(*args, **kwargs)

    return wait if inspect.iscoroutinefunction(fn) else call


def told(outputs: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For functions of so many outputs, the last of them a status line: an error of bad input is said there, until it is
    mended, and the rest stays as it is."""

    def wrap(fn: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fn)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return fn(*args, **kwargs)
            except USER_ERRORS as error:
                return (*[gr.skip()] * (outputs - 1), problem(error))

        return call

    return wrap


# ---- values and components


def markdown(text: str) -> str:
    """Text from a file or prompt, escaped for Markdown so that it shows as it is."""
    return re.sub(r"([\\`*_{}\[\]()#+.!|<>~$:/&-])", r"\\\1", " ".join(text.split()))


def redraw(cards: list[dict[str, Any]]) -> dict[str, Any]:
    """A value for `Page.shown` that redraws the cards, even if they are the same as before."""
    return {"cards": cards, "at": time.monotonic_ns()}


def gallery_items(pictures: list[Picture]) -> list[tuple[str, str]]:
    """Pictures for a gallery: the files unchanged, so that the recipes stay inside."""
    return [(str(picture.path), picture.label) for picture in pictures]


def gallery(label: str, *, columns: int, elem_id: str, pixel: bool = True) -> Any:
    """A gallery of PNG files.

    Args:
        pixel: show the pixels of small pictures as squares, not smoothed.
    """
    return gr.Gallery(
        label=label,
        format="png",
        columns=columns,
        height="auto",
        object_fit="contain",
        buttons=BUTTONS,
        interactive=False,
        elem_classes="pixel" if pixel else None,
        elem_id=elem_id,
    )


def figure(label: str, *, elem_id: str) -> Any:
    """One figure."""
    return gr.Image(label=label, format="png", interactive=False, buttons=BUTTONS, elem_classes="figure", elem_id=elem_id)


# ---- jobs on the page


def connect_job(
    page: Page,
    kind: str,
    start: Sequence[Callable[..., Any]],
    plan: Callable[..., Work],
    show: Callable[[Job], Sequence[Any]],
    *,
    inputs: Sequence[Any],
    status: Any,
    outputs: Sequence[Any],
    offer: Offer | None = None,
) -> list[Any]:
    """Let events start a job whose progress the page shows, also after a reload; what each event leads to.

    Args:
        start: events, for example `button.click`.
        plan: the values of `inputs` -> the work. A ValueError is shown in the status.
        show: the job, as it is now -> values for `outputs`, None where there is nothing to show yet.
        offer: of jobs that were interrupted; by default they are lost when the app ends.
    """
    nothing = [gr.skip()] * len(outputs)

    def watch(request: gr.Request, job: Job) -> Iterator[Any]:
        key, before = (session(request), kind), [None] * len(outputs)
        page.watched[key] = job
        for _ in page.jobs.follow(job):
            if page.watched.get(key) is not job:  # another one was started on this page
                return
            now = list(show(job)) if job.event is not None else [None] * len(outputs)
            changed = [gr.skip() if new is None or new == old else new for old, new in zip(before, now, strict=True)]
            before = [old if new is None else new for old, new in zip(before, now, strict=True)]
            yield page.said(job), *changed
        job.is_shown = True

    def begin(request: gr.Request, visitor: str, *values: Any) -> Iterator[Any]:
        owner = visitor or session(request)
        kept = None if offer is None else lambda: page.interrupted.keep(owner, kind, offer.keep(*values))
        try:
            job = page.jobs.submit(owner, kind, plan(*values), kept)
        except USER_ERRORS as error:
            yield problem(error), *nothing
            return
        yield from watch(request, job)

    def resume(request: gr.Request, visitor: str) -> Iterator[Any]:
        job = page.jobs.latest(visitor, kind)
        if job is None:
            yield gr.skip(), *nothing
        else:
            yield from watch(request, job)

    shown: dict[str, Any] = {"concurrency_limit": None, **PRIVATE}
    page.resumed.append((resume, [status, *outputs]))
    if offer is not None:
        _connect_offer(page, kind, offer, watch, [status, *outputs])
    return [event(begin, [page.visitor, *inputs], [status, *outputs], **shown) for event in start]


def _connect_offer(page: Page, kind: str, offer: Offer, watch: Callable[..., Iterator[Any]], outputs: list[Any]) -> None:
    """Let the offer of an interrupted job start it again, which `outputs` show, the status first."""

    def begin_again(request: gr.Request, visitor: str, *values: Any) -> Iterator[Any]:
        try:
            if not (left := page.interrupted.left(visitor, kind)):
                raise ValueError("this was started again or forgotten already")
            work = offer.plan(left[0], *values)
            job = page.jobs.submit(visitor, kind, work, lambda: page.interrupted.queued(left[0]))
        except USER_ERRORS as error:
            yield problem(error), *[gr.skip()] * (len(outputs) - 1)
            return
        yield from watch(request, job)

    offered = [offer.row, offer.said]
    page.resumed.append((offer.show, offered))
    hidden = offer.start.click(lambda: gr.update(visible=False), None, offer.row, **PRIVATE)
    again = hidden.then(begin_again, [page.visitor, *offer.inputs], outputs, concurrency_limit=None, **PRIVATE)
    again.then(offer.show, page.visitor, offered, **PRIVATE)


def connect_cancel(page: Page, button: Any, status: Any, kinds: Sequence[str]) -> None:
    """Let a button stop what this page watches of these kinds: a running job at its next step, one that waits at once."""

    def cancel(request: gr.Request) -> Any:
        jobs = [page.watched.get((session(request), kind)) for kind in kinds]
        stopped = [page.jobs.stop(job) for job in jobs if job is not None]
        return gr.skip() if any(stopped) else "nothing of yours is running"  # else the job itself says what becomes of it

    button.click(cancel, None, status, concurrency_limit=None, **PRIVATE)
