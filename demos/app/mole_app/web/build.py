"""Build the whole page with its tabs, and serve it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import gradio as gr
import matplotlib
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware

from mole_app.studio.recipe import Recipe
from mole_app.web import compare_tab, compose_tab, gallery_tab, recipe_tab, train_tab
from mole_app.web.actions import Actions
from mole_app.web.api import Endpoints, add
from mole_app.web.form import OF_BASE, UNSET
from mole_app.web.gallery_files import GalleryPicturesOnly
from mole_app.web.jobs import Job
from mole_app.web.own_pages import OwnPagesOnly
from mole_app.web.page import TABS, Page
from mole_app.web.page_jobs import follow
from mole_app.web.prompt_box import ORDERED
from mole_app.web.sentences import markdown
from mole_app.web.style import CARDS, Values, status_line, theme

THEME = """() => {
  const dark = document.body.classList.toggle("dark");
  localStorage.setItem("mole-theme", dark ? "dark" : "light");
}"""
THEME_OF_LAST_TIME = """() => {
  const chosen = localStorage.getItem("mole-theme");
  if (chosen) document.body.classList.toggle("dark", chosen === "dark");
}"""


def build(actions: Actions, defaults: Recipe) -> gr.Blocks:
    """Build the whole app; `launch` serves it."""
    # Visitors' files are deleted after an hour, checked every ten minutes.
    with gr.Blocks(title="mole", delete_cache=(600, 3600), analytics_enabled=False) as blocks:
        page = Page(actions, defaults, blocks)
        add(page)  # first, so that its endpoints get their names
        with gr.Row(elem_id="top", equal_height=True):
            _base(page)
            gr.Button("Dark / light", size="sm", min_width=90, scale=0, elem_id="theme").click(None, js=THEME)
        blocks.load(None, js=THEME_OF_LAST_TIME)
        with page.tabs.render():
            for name, module in zip(TABS, (compose_tab, compare_tab, gallery_tab, recipe_tab, train_tab), strict=True):
                with page.tab[name].render():
                    module.build(page)
        for event in blocks.fns.values():
            event.show_progress_on = []  # the page's own lines show it; Gradio goes over all such places at every event
            if event.api_name not in vars(Endpoints):
                event.api_visibility = "private"
    config = blocks.default_config  # of which each visit has a copy
    config.fns, config.blocks = Listed(config.fns), Listed(config.blocks)
    return blocks


class Listed(dict[Any, Any]):
    """A dict that may change while its values are gone through.

    Gradio goes through the events and components of a visit while another thread draws cards, which adds some. The event
    that was answered, such as the one that shows the progress of jobs, ended with an error.
    """

    def values(self) -> Any:
        return list(super().values())

    def items(self) -> Any:
        return list(super().items())


def _base(page: Page) -> None:
    """The choice of the base model, or its name if there is one alone."""
    if len(page.actions.bases.sources) == 1:
        gr.Markdown(f"Base model: {markdown(page.actions.bases.open or '')}", elem_id="base-name")
    page.form.base.render()
    status = status_line(elem_id="base-status")
    sizes = [page.form.controls[name] for name in OF_BASE]

    def show(job: Job) -> Values:
        if not job.is_over or job.is_shown:  # after a reload, keep what was chosen since then
            return {}
        if job.state != "done":
            return {page.form.base: page.actions.bases.open or gr.update(value=None)}
        fresh, now = page.form.fresh(), page.form.now()
        for name, choice in UNSET.items():
            now[page.form.controls[name]]["value"] = choice
        return {page.form.base: page.actions.bases.open} | {size: page.form.values(fresh)[size] for size in sizes} | now

    outputs = [status, page.form.base, *sizes, *page.form.lists]
    (changed,) = follow(page, "base", [page.form.base.select], page.actions.bases.change, [page.form.base], show, outputs)
    changed.then(page.prompt.redraw, page.prompt.cards, [page.prompt.cards, page.prompt.shown], **ORDERED)


class PageCompressed:
    """An ASGI middleware that compresses the page itself. Gradio compresses only its files."""

    def __init__(self, app: Any):
        self.app, self.compressed = app, GZipMiddleware(app)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on."""
        await (self.compressed if scope.get("path") == "/" else self.app)(scope, receive, send)


def launch(blocks: gr.Blocks, *, gallery: Path | None = None, sites: Collection[str] = (), **options: Any) -> Any:
    """Serve the app, only to this machine unless `options` say otherwise. It sends nothing to the network by itself.

    With `mcp_server=True` every endpoint is also an MCP tool.

    Args:
        gallery: the folder of the pictures that the page shows.
        sites: names under which a server in front of the app shows it, see `own_pages`.
    """
    matplotlib.use("agg")  # or Gradio looks for a backend at the first event, while the first visitor waits
    blocks.queue(max_size=64)
    middleware = [Middleware(OwnPagesOnly, sites=sites), Middleware(PageCompressed)]
    middleware += [Middleware(GalleryPicturesOnly, gallery=gallery)] if gallery else []
    return blocks.launch(
        share=False,
        max_file_size="512mb",
        ssr_mode=False,
        run_history=False,
        enable_monitoring=False,
        footer_links=["api"],
        theme=theme(),
        css=CARDS,
        css_paths=Path(__file__).with_name("page.css"),
        head_paths=Path(__file__).with_name("page.html"),
        allowed_paths=[str(gallery.resolve())] if gallery else None,
        app_kwargs={"middleware": middleware},
        **{"mcp_server": False, **options},
    )
