"""The whole page with its tabs, and serving it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from secrets import token_urlsafe
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from mole_diffusers.app import base_choice
from mole_diffusers.app.actions import Actions
from mole_diffusers.app.api import add as add_api
from mole_diffusers.app.compose_tab import build as compose_tab
from mole_diffusers.app.gallery_tab import build as gallery_tab
from mole_diffusers.app.interrupted import Interrupted
from mole_diffusers.app.jobs import Jobs
from mole_diffusers.app.keep_tab import axes
from mole_diffusers.app.keep_tab import build as keep_tab
from mole_diffusers.app.own_pages import OwnPagesOnly
from mole_diffusers.app.page import PRIVATE, Page, redraw
from mole_diffusers.app.see_tab import build as see_tab
from mole_diffusers.app.style import CSS, HEAD, theme
from mole_diffusers.app.train_tab import build as train_tab
from mole_diffusers.studio.recipe import Recipe

TABS = {"Compose": compose_tab, "See": see_tab, "Train": train_tab, "Gallery": gallery_tab, "Keep": keep_tab}
STORED: dict[str, Any] = {"secret": "mole"}  # a fixed one: what a browser keeps outlives the app


def build(actions: Actions, defaults: Recipe) -> gr.Blocks:
    """The whole app; `launch` shows it."""
    # Visitors' files are deleted after an hour, checked every ten minutes.
    with gr.Blocks(title="mole", delete_cache=(600, 3600), analytics_enabled=False) as blocks:
        page = Page(actions, Jobs(), defaults, blocks, Interrupted(actions.home / ".jobs"))
        add_api(page)  # first, while its endpoint names are free
        gr.Markdown("# mole\nSeveral LoRAs in one picture, each on its own words and in its own place.", elem_id="title")
        page.cards, page.shown = gr.State([]), gr.State({"cards": []})
        page.locks, page.masks = gr.State({}), gr.State({})
        page.axes = axes()
        page.visitor = gr.BrowserState("", storage_key="mole-visitor", **STORED)
        status = base_choice.build(page)
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as page.tabs:
            for name, tab in TABS.items():
                with gr.Tab(name, elem_id=f"tab-{name.lower()}", id=name) as page.tab:
                    tab(page)
        base_choice.connect(page, status)
        _remember(page)
    return blocks


def _remember(page: Page) -> None:
    """Fields and jobs survive a reload of the page."""
    fields = [*page.inputs, *page.fields]
    saved = gr.BrowserState(None, storage_key="mole-fields", **STORED)
    changes = [field.change for field in fields]
    gr.on(changes, lambda *values: list(values), fields, saved, queue=False, show_progress="hidden", **PRIVATE)

    def enter(visitor: Any, values: Any, prompt: str) -> Any:
        """Fill a page that is opened; `prompt` is what stands in it by now, where somebody types at once."""
        visitor, fresh = visitor if isinstance(visitor, str) and visitor else token_urlsafe(16), page.fresh()
        if (kept := _kept(page, fields, values)) is not None:
            values, prompt = kept, page.recipe(*kept[: len(page.inputs)]).prompt
        else:
            values = [gr.skip()] * len(fields)
            if fresh != page.defaults:
                values[: len(page.inputs)], prompt = page.values(fresh), fresh.prompt
        cards = page.cards_for(prompt)
        return visitor, *values, cards, redraw(cards)

    lists, updates = zip(*page.lists, strict=True)

    def now() -> list[Any]:
        return [gr.update(**each()) for each in updates]

    for event in page.added:
        event.then(now, None, list(lists), show_progress="hidden", **PRIVATE)
    listed = page.blocks.load(lambda: [page.actions.base, *now()], None, [page.base, *lists], **PRIVATE)
    filled = [page.visitor, *fields, page.cards, page.shown]
    entered = listed.then(enter, [page.visitor, saved, page.controls["prompt"]], filled, **PRIVATE)
    for resume, outputs in page.resumed:
        entered.then(resume, page.visitor, outputs, concurrency_limit=None, **PRIVATE)


def _kept(page: Page, fields: Sequence[Any], values: Any) -> list[Any] | None:
    """The fields as a browser kept them, and as on a fresh page those that do not fit and the sizes of another base; None
    where they are those of another release."""
    if not isinstance(values, list) or len(values) != len(fields):
        return None
    entered = dict(zip(fields, values, strict=True))
    fresh = dict(zip(page.inputs, page.values(page.fresh()), strict=True))
    if entered[page.base] != page.actions.base:  # it was changed meanwhile
        of_base = [page.base, *(page.controls[name] for name in ("width", "height", "guidance"))]
        entered |= {field: fresh[field] for field in of_base}
    bad = [field for field in fresh if not _fits(page, fresh | {field: entered[field]})]
    return list((entered | {field: fresh[field] for field in bad}).values())


def _fits(page: Page, inputs: dict[Any, Any]) -> bool:
    """Whether a recipe can be made of these, with choices that are here."""
    try:
        return not page.unknown_choices(page.recipe(*inputs.values()))
    except Exception:  # whatever a browser has there
        return False


def launch(blocks: gr.Blocks, *, gallery: Path | None = None, sites: Collection[str] = (), **options: Any) -> Any:
    """Serve the app, to this machine only unless `options` say otherwise. It sends nothing to the network by itself.

    With `mcp_server=True` every endpoint is also an MCP tool.

    Args:
        gallery: the folder of the pictures, which the page shows.
        sites: names under which a server in front shows the app; see `own_pages`.
    """
    blocks.queue(max_size=64)
    return blocks.launch(
        share=False,
        show_error=False,
        max_file_size="512mb",
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=["api"],
        theme=theme(),
        css=CSS,
        head=HEAD,
        allowed_paths=[str(gallery.resolve())] if gallery else None,
        app_kwargs={"middleware": [Middleware(OwnPagesOnly, sites=sites)]},
        **{"mcp_server": False, **options},
    )
