"""The API: named endpoints for gradio_client and MCP, on the functions behind the page.

A recipe is a dict with the fields of `mole_diffusers.recipe.Recipe`; "prompt" is needed, the rest has defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from mole_diffusers import infotext
from mole_diffusers.app.actions import Look, Progress, never
from mole_diffusers.app.page import QUEUE, Page, say
from mole_diffusers.app.teaching import Wanted, teach
from mole_diffusers.as_code import as_code
from mole_diffusers.recipe import FORMAT, VERSION, Recipe


def add(page: Page) -> None:
    """Add every endpoint to the app."""
    for endpoint in (*_looking(page), *_drawing(page), *_keeping(page)):
        gr.api(say(endpoint, page=False), api_name=endpoint.__name__, **QUEUE)


def _recipe(page: Page, given: Any) -> Recipe:
    if not isinstance(given, dict):
        raise ValueError(f"a recipe is an object with a prompt and other fields, got {type(given).__name__}")
    return Recipe.from_dict({**page.defaults.to_dict(), "prompt": None, **given, "format": FORMAT, "version": VERSION})


def _file(path: Path) -> Any:
    """A file of ours for a client."""
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()


def _uploaded(file: Any) -> Path:
    """The path of an uploaded file. Raises ValueError for any other: a client names no path of this machine."""
    path = Path(str(file.get("path", ""))).resolve() if isinstance(file, dict) else Path()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise ValueError("send the file itself, by gradio_client.handle_file")
    return path


def _last(states: Iterable[Any]) -> Any:
    *_, last = states
    return last


def _looking(page: Page) -> Iterator[Callable[..., Any]]:
    actions = page.actions

    def loras() -> list[dict]:
        """What every LoRA's file says of itself, and how much of it the pipeline has."""
        return [actions.report(name) for name in actions.studio.shelf.loras]

    def find(prompt: str) -> list[str]:
        """LoRAs whose name or trigger words stand in a prompt.

        Args:
            prompt: any text.
        """
        return actions.find(str(prompt))

    def upload(file: gr.FileData) -> dict:
        """Add a LoRA file; it is refused with one sentence where it is not a good one.

        Args:
            file: a .safetensors file with a plain LoRA.
        """
        return actions.report(actions.add_file(_uploaded(file)))

    yield from (loras, find, upload)


def _drawing(page: Page) -> Iterator[Callable[..., Any]]:
    actions, d = page.actions, page.defaults

    def compose(
        prompt: str,
        negative: str = "",
        seed: int = 0,
        steps: int = d.steps,
        guidance: float = d.guidance,
        gates: str = "auto",
        count: int = 1,
    ) -> tuple[list[gr.FileData], list[dict]]:
        """Draw pictures; every PNG holds its recipe. Returns the files, and their recipes.

        Args:
            prompt: with a <lora:name:strength> tag for every LoRA; te=, unet=, lbw=, start=, stop=, step= are read.
            negative: what guidance goes away from.
            seed: of the first picture; the next ones follow it.
            steps: 1..150.
            guidance: 0..50; 1 is none.
            gates: "auto", "sum", "mean" or the name of trained gates.
            count: pictures, 1..16.
        """
        wanted = {"negative": negative, "seed": seed, "steps": steps, "guidance": guidance, "gates": gates}
        if isinstance(count, bool) or not isinstance(count, int):
            raise ValueError(f"the number of pictures must be a whole number, got {count!r}")
        state = _last(actions.compose(_recipe(page, {"prompt": prompt, **wanted}), count, never))
        return [_file(one.path) for one in state.made], [one.recipe.to_dict() for one in state.made]

    def redraw(recipe: dict) -> gr.FileData:
        """Draw exactly one recipe, as a picture holds it or with fields left out.

        Args:
            recipe: {"prompt": ..., "seed": ..., ...}.
        """
        state = _last(actions.draw_all([("picture", _recipe(page, recipe))], never))
        return _file(state.made[0].path)

    def compare(recipe: dict, merges: list[str] | None = None) -> tuple[list[str], list[gr.FileData]]:
        """The same seed from the base, each LoRA alone, the plain sum, the gates and merges. Returns labels and files.

        Args:
            recipe: {"prompt": ..., "seed": ..., ...}.
            merges: names of training-free merges, "ties" say.
        """
        made = _last(actions.compare(_recipe(page, recipe), never, merges or ())).made
        return [one.label for one in made], [_file(one.path) for one in made]

    def look(recipe: dict) -> tuple[dict, list[gr.FileData]]:
        """What the gates did: {"experts", "weights": block -> mean weight of each}, and pictures of it.

        Args:
            recipe: {"prompt": ..., "seed": ..., ...}.
        """
        found: Look = _last(actions.look(_recipe(page, recipe), never))
        pictures = {"heat": found.heat, "shares": found.shares, **found.places}
        files = [_file(_saved(page, image, f"{found.made.path.stem}-{i}")) for i, image in enumerate(pictures.values())]
        return {"experts": found.experts, "weights": found.weights, "pictures": list(pictures)}, files

    def grid(recipe: dict, x: str, y: str) -> gr.FileData:
        """An XY grid of one recipe.

        Args:
            recipe: {"prompt": ..., "seed": ..., ...}.
            x: what changes across: "arm=base,sum,gates", "weight fox=0,0.5,1", "seed=1,2,3", ...
            y: what changes down, alike.
        """
        sheet = _last(event for event in actions.grid(_recipe(page, recipe), x, y, never) if not isinstance(event, Progress))
        return _file(_saved(page, sheet, "grid"))

    yield from (compose, redraw, compare, look, grid)


def _saved(page: Page, image: Image.Image, stem: str) -> Path:
    path = page.actions.folder / f"{stem}.png"
    image.save(path)
    return path


def _keeping(page: Page) -> Iterator[Callable[..., Any]]:
    actions = page.actions

    def read(file: gr.FileData) -> dict:
        """The recipe in a picture (ours or A1111's) or a recipe file, with the LoRAs as they are called here.

        Args:
            file: a PNG, or a JSON file.
        """
        return actions.studio.complete(infotext.read_any(_uploaded(file))).to_dict()

    def code(recipe: dict) -> str:
        """Lines of Python that draw a recipe with diffusers.

        Args:
            recipe: {"prompt": ..., "seed": ..., ...}.
        """
        return as_code(actions.studio.complete(_recipe(page, recipe)))

    def export(recipe: dict, rank: int | None = None) -> tuple[gr.FileData, float]:
        """One ordinary LoRA at the gates' average weights, and the relative error of cutting it to a rank.

        Args:
            recipe: {"prompt": ..., "seed": ..., ...}.
            rank: None keeps everything: the ranks add up.
        """
        path, error = actions.export(_recipe(page, recipe), rank)
        return _file(path), error

    def train(recipe: dict, name: str, singles: dict, composed: list[str], steps: int = 60) -> list[dict]:
        """Train gates for the LoRAs of a recipe, from prompts alone. Returns a row of losses per update.

        Args:
            recipe: {"prompt": ..., ...}; its tags say which LoRAs.
            name: of the gates; `compose` takes it afterwards. The same name and settings go on with a run.
            singles: LoRA -> list of prompts that name it and no other.
            composed: prompts that name all.
            steps: updates in all.
        """
        wanted = Wanted(name, singles, composed, steps=steps)
        return _last(teach(actions.studio, _recipe(page, recipe), wanted, home=actions.home, stopped=never)).rows

    yield from (read, code, export, train)
