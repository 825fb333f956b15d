"""The whole page with its tabs, and serving it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import gradio as gr
from starlette.middleware import Middleware

from mole_diffusers.app.actions import Actions
from mole_diffusers.app.api import add as add_api
from mole_diffusers.app.compose_tab import build as compose_tab
from mole_diffusers.app.compose_tab import first_cards
from mole_diffusers.app.jobs import RunningJobs
from mole_diffusers.app.keep_tab import build as keep_tab
from mole_diffusers.app.own_pages import OwnPagesOnly
from mole_diffusers.app.page import PRIVATE, Page
from mole_diffusers.app.see_tab import build as see_tab
from mole_diffusers.app.style import CSS, HEAD, theme
from mole_diffusers.app.train_tab import build as train_tab
from mole_diffusers.studio.recipe import Recipe


def build(actions: Actions, defaults: Recipe) -> gr.Blocks:
    """The whole app; `launch` shows it."""
    # Visitors' files are deleted after an hour, checked every ten minutes.
    with gr.Blocks(title="mole", delete_cache=(600, 3600), analytics_enabled=False) as blocks:
        page = Page(actions, RunningJobs(), defaults)
        add_api(page)  # first, while its endpoint names are free
        gr.Markdown("# mole\nSeveral concept LoRAs in one picture, weighed by learned gates.", elem_id="title")
        page.cards, page.shown = gr.State([]), gr.State({"cards": []})
        page.locks = gr.State({})
        with gr.Tabs(elem_id="tabs"):
            for name, tab in (("Compose", compose_tab), ("See", see_tab), ("Train", train_tab), ("Keep", keep_tab)):
                with gr.Tab(name, elem_id=f"tab-{name.lower()}", id=name):
                    tab(page)
        blocks.load(first_cards(page), None, [page.cards, page.shown], **PRIVATE)
    return blocks


def launch(blocks: gr.Blocks, *, sites: Collection[str] = (), **options: Any) -> Any:
    """Serve the app, to this machine only unless `options` say otherwise. It sends nothing to the network by itself.

    With `mcp_server=True` every endpoint is also an MCP tool.

    Args:
        sites: names under which a server in front shows the app; see `own_pages`.
    """
    blocks.queue(max_size=32)
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
        app_kwargs={"middleware": [Middleware(OwnPagesOnly, sites=sites)]},
        **{"mcp_server": False, **options},
    )
