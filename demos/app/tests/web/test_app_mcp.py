"""The endpoints as MCP tools: described, called, and refusing in a sentence. And the server only where it is asked for."""

import asyncio
from base64 import b64decode

import pytest
from app_client import RECIPE, served

from mole_cli.mole import main

pytest.importorskip("gradio")
mcp = pytest.importorskip("mcp")


@pytest.fixture(scope="module")
def url(loras, tmp_path_factory):
    with served(loras, tmp_path_factory.mktemp("app"), mcp_server=True) as client:
        yield f"{client.src}gradio_api/mcp/"


def asked(url, question):
    """What a coroutine function gives for an MCP session."""
    from mcp.client.streamable_http import streamablehttp_client

    async def ask():
        async with streamablehttp_client(url) as (read, write, _), mcp.ClientSession(read, write) as session:
            await session.initialize()
            return await question(session)

    return asyncio.run(ask())


def test_every_tool_says_what_it_takes(url):
    tools = {tool.name: tool for tool in asked(url, lambda session: session.list_tools()).tools}
    assert {"loras", "find", "compose", "redraw", "compare", "look", "grid", "train", "upload_gates"} <= set(tools)
    for name, tool in tools.items():
        assert len(tool.description) > 20, name
        for key, about in tool.inputSchema["properties"].items():
            assert about.get("description"), f"{name} does not say what {key} is"
    assert tools["compose"].inputSchema["required"] == ["prompt"]
    assert '"prompt"' in tools["redraw"].inputSchema["properties"]["recipe"]["description"]


def test_a_tool_draws_and_refuses(url):
    async def calls(session):
        yes = await session.call_tool("redraw", {"recipe": RECIPE}), await session.call_tool("find", {"prompt": "a fox"})
        return *yes, await session.call_tool("redraw", {"recipe": {"prompt": "<lora:owl:1>"}})

    drawn, found, refused = asked(url, calls)
    assert b64decode(drawn.content[0].data).startswith(b"\x89PNG")
    assert "'name': 'fox'" in found.content[0].text
    assert refused.isError
    assert refused.content[0].text.startswith("there is no LoRA 'owl'; known: fox")


def test_tools_are_served_only_where_they_are_asked_for(monkeypatch, tmp_path):
    from mole_app.web import build

    class Page:
        def queue(self, **options):
            pass

        def launch(self, **options):
            served = [middleware.kwargs for middleware in options["app_kwargs"]["middleware"]]
            return options["mcp_server"], options["share"], options["server_port"], options["allowed_paths"], served

    monkeypatch.setenv("GRADIO_MCP_SERVER", "true")  # which Gradio would follow
    launch = build.launch
    assert launch(Page(), server_port=1) == (False, False, 1, None, [{"sites": ()}, {}])  # the last compresses
    served_with = {}
    monkeypatch.setattr(build, "launch", lambda blocks, **options: served_with.update(options))
    pictures = tmp_path / "pictures"
    assert main(["app", "--mcp", "--port", "7999", "--gallery", str(pictures), "--site", "studio.example"]) == 0
    served = [{"sites": ["studio.example"]}, {}, {"gallery": pictures}]
    assert launch(Page(), **served_with) == (True, False, 7999, [str(pictures)], served)
    assert main(["app"]) == 0
    assert launch(Page(), **served_with)[0] is False
