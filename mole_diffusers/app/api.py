"""The API: named endpoints for gradio_client and MCP, on the functions behind the page.

A recipe is a dict with the fields of `mole_diffusers.studio.recipe.Recipe`; "prompt" is needed, the rest has defaults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from mole_diffusers.app.actions import Progress, never
from mole_diffusers.app.gate_files import gates_report, given_out
from mole_diffusers.app.looking import Look
from mole_diffusers.app.page import QUEUE, Page, say
from mole_diffusers.app.teaching import Wanted, teach
from mole_diffusers.studio import infotext
from mole_diffusers.studio.as_code import as_code
from mole_diffusers.studio.prompt_syntax import parse
from mole_diffusers.studio.recipe import FORMAT, VERSION, Recipe

FIELDS = (
    'an object with the fields of a recipe, {"prompt": "a fox <lora:fox:1>", "seed": 3} say. Left out: no negative prompt, '
    'seed 0, the app\'s steps, guidance, width and height, its own sampler, gates "auto", arm "gates", no locks.'
)


def add(page: Page) -> None:
    """Add every endpoint to the app."""
    for endpoint in (*_shelved(page), *_drawing(page), *_comparing(page), *_keeping(page), *_taught(page)):
        endpoint.__doc__ = (endpoint.__doc__ or "").replace("RECIPE", FIELDS)
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


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be text, got {value!r}")
    return value


def _whole(value: Any, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{what} must be a whole number, got {value!r}")
    return value


def _last(states: Iterable[Any]) -> Any:
    *_, last = states
    return last


def _shelved(page: Page) -> Iterator[Callable[..., Any]]:
    actions = page.actions

    def loras() -> list[dict]:
        """What every LoRA's file says of itself, and how much of it the pipeline has."""
        return [actions.report(name) for name in actions.studio.catalog.loras]

    def find(prompt: str) -> list[dict]:
        """LoRAs that a prompt asks for, best first: {"name", "why", "score"}, a likeness of -1..1.

        Args:
            prompt: any text; tags in it are passed over.
        """
        text = parse(_text(prompt, "the prompt"), actions.studio.catalog.loras).text
        return [{"name": found.name, "why": found.why, "score": found.score} for found in actions.find(text)]

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
        number = _whole(count, "the number of pictures")
        state = _last(actions.compose(_recipe(page, {"prompt": prompt, **wanted}), number, never))
        return [_file(one.path) for one in state.made], [one.recipe.to_dict() for one in state.made]

    def redraw(recipe: dict) -> gr.FileData:
        """Draw exactly one recipe, as a picture holds it or with fields left out.

        Args:
            recipe: RECIPE
        """
        state = _last(actions.draw_all([("picture", _recipe(page, recipe))], never))
        return _file(state.made[0].path)

    yield from (compose, redraw)


def _comparing(page: Page) -> Iterator[Callable[..., Any]]:
    actions = page.actions

    def compare(recipe: dict, merges: list[str] | None = None) -> tuple[list[str], list[gr.FileData]]:
        """The same seed from the base, each LoRA alone, the plain sum, the gates and merges. Returns labels and files.

        Args:
            recipe: RECIPE
            merges: names of training-free merges, "ties" say.
        """
        if merges is not None and not isinstance(merges, list):
            raise ValueError(f"merges are a list of names, got {merges!r}")
        made = _last(actions.compare(_recipe(page, recipe), never, merges or ())).made
        return [one.label for one in made], [_file(one.path) for one in made]

    def look(recipe: dict) -> tuple[dict, list[gr.FileData]]:
        """What the gates did: {"experts", "weights": block -> mean weight of each}, and pictures of it.

        Args:
            recipe: RECIPE
        """
        found: Look = _last(actions.look(_recipe(page, recipe), never))
        pictures = {"heat": found.heat, "shares": found.shares, **found.places}
        files = [_file(_saved(page, image, f"{found.made.path.stem}-{i}")) for i, image in enumerate(pictures.values())]
        return {"experts": found.experts, "weights": found.weights, "pictures": list(pictures)}, files

    def grid(recipe: dict, x: str, y: str) -> gr.FileData:
        """An XY grid of one recipe.

        Args:
            recipe: RECIPE
            x: what changes across: "arm=base,sum,gates", "weight fox=0,0.5,1", "seed=1,2,3", ...
            y: what changes down, alike.
        """
        axes = _text(x, "an axis"), _text(y, "an axis")
        states = actions.grid(_recipe(page, recipe), *axes, never)
        sheet = _last(event for event in states if not isinstance(event, Progress))
        return _file(_saved(page, sheet, "grid"))

    yield from (compare, look, grid)


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
            recipe: RECIPE
        """
        return as_code(actions.studio.complete(_recipe(page, recipe)))

    def export(recipe: dict, rank: int | None = None) -> tuple[gr.FileData, float]:
        """One ordinary LoRA at the gates' average weights, and the relative error of cutting it to a rank.

        Args:
            recipe: RECIPE
            rank: None keeps everything: the ranks add up.
        """
        path, error = actions.export(_recipe(page, recipe), None if rank is None else _whole(rank, "the rank"))
        return _file(path), error

    yield from (read, code, export)


def _taught(page: Page) -> Iterator[Callable[..., Any]]:
    actions, catalog = page.actions, page.actions.studio.catalog

    def train(
        recipe: dict,
        name: str,
        singles: dict,
        composed: list[str],
        steps: int = 60,
        styles: list[str] | None = None,
        family: str = "flow",
        way: str = "collage",
    ) -> list[dict]:
        """Train gates for the LoRAs of a recipe, from prompts alone. Returns a row of losses per update.

        Args:
            recipe: RECIPE Its tags say which LoRAs.
            name: of the gates; `compose` takes it afterwards. The same name and settings go on with a run.
            singles: LoRA -> list of prompts that name it and no other.
            composed: prompts that name all.
            steps: updates in all.
            styles: those of the LoRAs that act on the whole picture.
            family: of the gates: "static", "mole", "flow", "prompt", "retrieval" or "rank".
            way: "collage" sets the subjects side by side, each as its own LoRA draws it; "blend" blends what LoRAs predict.
        """
        styles = [] if styles is None else styles
        wanted = Wanted(_text(name, "the name"), singles, composed, styles, steps=steps, family=family, way=way)
        return _last(teach(actions.studio, _recipe(page, recipe), wanted, home=actions.home, stopped=never)).rows

    def gates() -> list[dict]:
        """Every trained gates: name, family, the LoRAs they weigh, and which of these are another file here or missing."""
        return [gates_report(catalog, name) for name in catalog.gates]

    def download_gates(name: str) -> list[gr.FileData]:
        """Trained gates as two files, the weights and what they weigh.

        Args:
            name: of the gates, as `gates` lists them.
        """
        return [_file(path) for path in given_out(catalog, _text(name, "the name"), actions.folder)]

    def upload_gates(weights: gr.FileData, about: gr.FileData, name: str = "") -> dict:
        """Add trained gates from their two files; they are refused with one sentence where they are not good ones.

        Args:
            weights: the .safetensors file.
            about: the .json file.
            name: of the gates from now on; by default that of their LoRAs, "fox+ink" say.
        """
        return actions.add_gates([_uploaded(weights), _uploaded(about)], _text(name, "the name"))

    yield from (train, gates, download_gates, upload_gates)
