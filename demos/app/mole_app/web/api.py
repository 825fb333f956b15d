"""The API: named endpoints for gradio_client and MCP, which call the same functions as the page.

A recipe is a dict with the fields of `mole_app.studio.recipe.Recipe`. "prompt" is required, the rest has defaults.
Notes are sentences that the page shows in its status lines. `redraw` and `grid` return only a file, which MCP then shows as
a picture; beside notes it would be text.

Gradio shows the endpoints' docstrings. Of an argument, it shows only the first line.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, get_origin, get_type_hints

import gradio as gr
from gradio.utils import get_upload_folder
from PIL import Image

from mole_app.studio import infotext
from mole_app.studio.as_code import as_code
from mole_app.studio.recipe import PICTURES, Recipe
from mole_app.web.files import describe_all_gates, export_gates, uploaded
from mole_app.web.gate_training import TRAINED, TrainingRequest
from mole_app.web.jobs import Work
from mole_app.web.page import Page
from mole_app.web.sentences import USER_ERRORS, without_folders
from mole_app.web.visits import session
from mole_diffusers.options import check_kinds, described
from mole_diffusers.safe_files import read_picture

WORDS = {  # in the endpoints' docstrings -> what they are replaced by
    "RECIPE": 'an object with the fields of a recipe, for example {"prompt": "a fox <lora:fox:1>", "seed": 3}. The defaults '
    "are: no negative prompt, seed 0, the app's steps and guidance, the usual size for the prompt or that of the picture to "
    'draw over, the model\'s own sampler, gates "auto", arm "gates", no locks.',
    "FAMILIES": f"one of {', '.join(TRAINED)}",
}
WHOLE = ("arm", "locks", "masks", "experts", "embeddings", "base", *PICTURES)  # what only endpoints with a RECIPE take


class Part(NamedTuple):
    """An argument that clients send, one of several in the place of one argument of a method."""

    kind: str
    about: str
    is_needed: bool = False


def _fields(kind: Any) -> dict[str, Part]:
    """The fields of a dataclass, as arguments."""
    hints, about, found = get_type_hints(kind), described(kind), dict[str, Part]()
    for field in (field for field in fields(kind) if field.name in about):
        of, is_needed = hints[field.name], field.default is MISSING and field.default_factory is MISSING
        text = "dict" if get_origin(of) is Mapping else of.__name__ if of in (str, int, float) else str(of)
        found[field.name] = Part(text, about[field.name][1], is_needed)
    return found


PARTS = {  # argument of a method -> those that clients send in its place
    "pictures": {
        "image": Part("gr.FileData", "a picture to draw over. A recipe that names its pictures needs these again."),
        "mask": Part(
            "gr.FileData", "a picture of the same size, white where the image is redrawn; by default all of it is."
        ),
        "control": Part("gr.FileData", "a control map: edges, depths, a pose, ... as the ControlNet reads them."),
        "reference": Part("gr.FileData", "a picture that the IP-Adapter reads."),
    },
    "fields": {n: part for n, part in _fields(Recipe).items() if n not in WHOLE and not n.endswith("_sha256")},
    "training": _fields(TrainingRequest),
}
Parts = dict[str, Any] | None  # of a method: the `PARTS` that were sent, by their names


def add(page: Page) -> None:
    """Add every endpoint to the app."""
    endpoints = Endpoints(page)
    words = {
        f"{whole}: PARTS": "\n            ".join(f"{n}: {p.about}" for n, p in parts.items())
        for whole, parts in PARTS.items()
    }
    for name in (name for name in vars(Endpoints) if not name.startswith("_")):
        endpoint = _endpoint(method := getattr(endpoints, name))
        for word, about in (words | WORDS).items():
            endpoint.__doc__ = (endpoint.__doc__ or "").replace(word, about)
        limit = None if inspect.iscoroutinefunction(method) else 1  # jobs wait in our own queue, and `find` need not wait
        gr.api(endpoint, api_name=name, concurrency_limit=limit)


def _endpoint(method: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a method for clients: check what they send by its annotations, and turn errors of bad input into a sentence.

    Clients send `PARTS` one by one.
    """
    hints, signature, parameters = get_type_hints(method), inspect.signature(method), list[inspect.Parameter]()
    apart = [name for name in signature.parameters if name in PARTS]
    kinds = {name: kind for name, kind in hints.items() if name not in apart and kind is not gr.FileData}
    for each in signature.parameters.values():  # with annotations as text
        for name, part in PARTS.get(each.name, {}).items():
            kind, default = (part.kind, each.empty) if part.is_needed else (f"{part.kind} | None", None)
            parameters.append(each.replace(name=name, annotation=kind, default=default))
        parameters += [] if each.name in PARTS else [each]
    signature = signature.replace(parameters=parameters)

    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        try:
            check_kinds({name: value for name, value in given.items() if name in kinds}, kinds, method.__name__)
            for whole in apart:
                parts = {name: given.pop(name, None) for name in PARTS[whole]}
                given[whole] = {name: value for name, value in parts.items() if value is not None}
            if inspect.iscoroutinefunction(method):
                return await method(**given)
            return await asyncio.to_thread(method, **given)
        except USER_ERRORS as error:
            raise gr.Error(without_folders(str(error)), print_exception=False) from error

    vars(call)["__signature__"] = signature
    call.__annotations__ = {each.name: each.annotation for each in parameters} | {"return": signature.return_annotation}
    return call


class Endpoints:
    """Each public method is an endpoint of the same name."""

    def __init__(self, page: Page):
        self.page, self.actions = page, page.actions

    def bases(self) -> tuple[str, list[str]]:
        """The name of the open base model ("" if none is open), and the names of all that you can open."""
        return self.actions.bases.open or "", list(self.actions.bases.sources)

    async def base(self, request: gr.Request, name: str) -> str:
        """Open another base model, for everyone, once the jobs before it are done. Returns its name.

        Args:
            name: one of `bases`.
        """
        await self._job(request, "base", self.actions.bases.change, name)
        return self.actions.bases.open or ""

    def loras(self) -> list[dict]:
        """What the file of each LoRA says about it, how many of its layers match the pipeline, and what is wrong with it."""
        return [self.actions.loras.report(name, keep=False) for name in self.actions.studio.catalog.loras]

    async def find(self, prompt: str) -> list[dict]:
        """Find LoRAs that a prompt asks for, best first, as {"name", "why", "score", "passed_over"}. The score is a
        similarity in -1..1. "passed_over" names LoRAs that share a trigger with this one but are less like the prompt.

        Args:
            prompt: any text. Tags in it are ignored.
        """
        hits = await asyncio.to_thread(self.actions.loras.find, prompt)
        return [{name: getattr(hit, name) for name in ("name", "why", "score", "passed_over")} for hit in hits]

    def upload(self, file: gr.FileData) -> dict:
        """Add a LoRA file. A bad one is refused with a sentence that says why.

        Args:
            file: a .safetensors file with a plain LoRA.
        """
        return self.actions.loras.report(self.actions.loras.add(_uploaded(file)))

    async def compose(
        self,
        request: gr.Request,
        fields: Parts,
        count: int = 1,
        pictures: Parts = None,
    ) -> tuple[list[gr.FileData], list[dict], list[str]]:
        """Draw pictures. Every PNG has its recipe inside. Returns the files, their recipes, and notes.

        Args:
            fields: PARTS
            count: the number of pictures with consecutive seeds, 1..16.
            pictures: PARTS
        """
        done = await self._drawing(request, "compose", self.actions.compose, fields or {}, pictures, count)
        recipes = [each.recipe.to_dict() for each in done.pictures]
        return [_file(each.path) for each in done.pictures], recipes, done.warnings

    async def redraw(
        self,
        request: gr.Request,
        recipe: dict,
        pictures: Parts = None,
    ) -> gr.FileData:
        """Draw one recipe: a complete one from a picture, or one with some fields left out.

        Args:
            recipe: RECIPE
            pictures: PARTS
        """
        done = await self._drawing(request, "compose", self.actions.compose, recipe, pictures, 1)
        return _file(done.pictures[0].path)

    async def compare(
        self,
        request: gr.Request,
        recipe: dict,
        merges: list[str] | None = None,
        pictures: Parts = None,
    ) -> tuple[list[str], list[gr.FileData], list[str]]:
        """Draw the same seed in several ways: the base, each LoRA alone, the plain sum, bound, in tiles if there is room,
        with trained gates if there are any, and merges. The gallery keeps a sheet of them. Returns labels, files, and notes.

        Args:
            recipe: RECIPE
            merges: names of training-free merges, for example "ties".
            pictures: PARTS
        """
        done = await self._drawing(request, "compare", self.actions.compare, recipe, pictures, merges or ())
        return [each.label for each in done.pictures], [_file(each.path) for each in done.pictures], done.warnings

    async def look(
        self,
        request: gr.Request,
        recipe: dict,
        pictures: Parts = None,
    ) -> tuple[dict, list[gr.FileData], list[str]]:
        """Show what the gates did. Returns {"experts", "weights": block -> mean weight of each, "pictures"}, the figures,
        and notes.

        Args:
            recipe: RECIPE
            pictures: PARTS
        """
        report = await self._drawing(request, "look", self.actions.look, recipe, pictures, None)
        figures = {"heat": report.heat, "shares": report.shares, **report.places}

        def save() -> list[Any]:
            folder = self.actions.new_folder()
            files = [folder / f"{report.picture.stem}-{i}.png" for i in range(len(figures))]
            for file, figure in zip(files, figures.values(), strict=True):
                figure.save(file)
            return [_file(file) for file in files]

        about = {"experts": report.experts, "weights": report.weights, "pictures": list(figures)}
        return about, await asyncio.to_thread(save), report.notes

    async def grid(
        self,
        request: gr.Request,
        recipe: dict,
        x: str,
        y: str,
        pictures: Parts = None,
    ) -> gr.FileData:
        """Draw an XY grid of one recipe. The gallery keeps it.

        Args:
            recipe: RECIPE
            x: what varies across: "arm=base,sum,gates", "weight fox=0,0.5,1", "seed=1,2,3", ...
            y: what varies down, in the same form.
            pictures: PARTS
        """
        done = await self._drawing(request, "grid", self.actions.grid, recipe, pictures, x, y)
        return _file(done.sheet)

    def read(self, file: gr.FileData) -> tuple[dict, list[str]]:
        """Read the recipe in a picture (ours or A1111's) or in a recipe file. The LoRAs have their names in this app, and
        the base model is the one that the picture was drawn with. Returns it, and notes.

        Args:
            file: a PNG, or a JSON file.
        """
        with uploaded(_uploaded(file)) as path:
            found = infotext.contents(path)
        recipe = self.actions.studio.complete(found.recipe)
        return replace(recipe, base=found.recipe.base or recipe.base).to_dict(), self.actions.notes(found, recipe)

    def code(self, recipe: dict) -> str:
        """Write Python code that draws a recipe.

        Args:
            recipe: RECIPE
        """
        studio = self.actions.studio
        return as_code(studio.complete(self._recipe(recipe)), studio.base.config)

    async def export(
        self, request: gr.Request, recipe: dict, rank: int | None = None
    ) -> tuple[gr.FileData, float, list[str]]:
        """Export one ordinary LoRA with the gates' average weights. Returns it, the relative error of cutting its rank, and
        notes.

        Args:
            recipe: RECIPE
            rank: the rank to cut to. None keeps everything: the ranks add up.
        """
        done = await self._job(request, "export", self.actions.export, self._recipe(recipe), rank)
        return _file(done.path), done.error, [done.lost] if done.lost else []

    def gallery(self, text: str = "", lora: str = "", favourites: bool = False) -> tuple[list[gr.FileData], list[dict]]:
        """The newest 100 pictures and sheets in the gallery. Returns files, and for each of them {"name", "favourite",
        "recipe", "sheet"}, where "sheet" says what a sheet shows.

        Args:
            text: words that must all be in the prompt, in the file name or in what a sheet shows.
            lora: part of the name of a LoRA that they were drawn with.
            favourites: whether to return only favourites.
        """
        found = self.actions.gallery.entries(text=text, lora=lora, favourites=favourites)[:100]
        about = [
            {"name": e.path.name, "favourite": e.favourite, "recipe": e.recipe.to_dict(), "sheet": e.sheet} for e in found
        ]
        return [_file(entry.path) for entry in found], about

    def favourite(self, name: str, on: bool = True) -> bool:
        """Mark a picture in the gallery as a favourite, or remove the mark.

        Args:
            name: the name of its file.
            on: whether it is a favourite from now on.
        """
        self.actions.gallery.favour(name, on)
        return on

    async def train(
        self,
        request: gr.Request,
        recipe: dict,
        training: Parts,
        again: str = "",
    ) -> tuple[list[dict], list[str]]:
        """Train gates for the LoRAs of a recipe, from prompts alone. Returns a row of losses per update, and as a note what
        the gates are worth on seeds that the training did not use. The same name and settings continue a run that was
        stopped.

        Args:
            recipe: RECIPE Its tags name the LoRAs.
            training: PARTS
            again: what to do if there are gates of this name with other settings: "continue" from them, or "overwrite".
        """
        wanted = TrainingRequest(**training or {})
        done = await self._job(request, "train", self.actions.train, self._recipe(recipe), wanted, again)
        return done.rows, [done.verdict]

    def gates(self) -> list[dict]:
        """All trained gates: their name, gate type and LoRAs, and which of these are missing here or are another file. For
        gates that cannot be read: their name, and why."""
        return describe_all_gates(self.actions.studio.catalog)

    def download_gates(self, name: str) -> list[gr.FileData]:
        """Download trained gates as two files, the weights and their config.

        Args:
            name: the name of the gates, as listed by `gates`.
        """
        return [_file(path) for path in export_gates(self.actions.studio.catalog, name, self.actions.new_folder())]

    def upload_gates(self, weights: gr.FileData, about: gr.FileData, name: str = "") -> dict:
        """Add trained gates from their two files. Bad ones are refused with a sentence that says why.

        Args:
            weights: the .safetensors file.
            about: the .json file.
            name: the new name of the gates; by default their LoRAs' names, for example "fox+ink".
        """
        return self.actions.add_gates([_uploaded(weights), _uploaded(about)], name)

    # ---- what they share

    def _recipe(self, given: dict) -> Recipe:
        first = {**self.page.form.fresh().to_dict(), "prompt": None, "seed": 0, "base": ""}
        recipe = Recipe.from_dict({**first, **given})
        if recipe.base:
            self.actions.bases.check(recipe.base, "change it first")
        return recipe

    async def _drawing(
        self, request: gr.Request, kind: str, work_of: Callable[..., Work], recipe: dict, pictures: Parts, *more: Any
    ) -> Any:
        """The result of a job that draws a recipe, with uploaded pictures if there are any."""
        read = {name: await asyncio.to_thread(_picture, file) for name, file in (pictures or {}).items()}
        return await self._job(request, kind, work_of, self._recipe(recipe), *more, read)

    async def _job(self, request: gr.Request, kind: str, work_of: Callable[..., Work], *given: Any) -> Any:
        """The result of a job. The job is stopped if its client goes away or cancels it (`submit(...).cancel()`)."""
        work = await asyncio.to_thread(work_of, *given)
        owner = session(request)
        job = self.page.visits.jobs.submit(owner or f"call {id(request)}", kind, work)
        try:
            while not job.is_over:
                await asyncio.sleep(0.05)
                if owner and is_gone(self.page.blocks, owner):
                    break
        finally:
            self.page.visits.jobs.stop(job)
        if job.error is not None:
            raise job.error
        if job.state != "done":
            raise ValueError("stopped")
        return job.event


# ---- reading arguments, returning files


def _uploaded(file: Any) -> Path:
    """The path of an uploaded file. Raises ValueError for any other path: clients may not name files of this machine."""
    path = Path(str(file.get("path", ""))).resolve() if isinstance(file, dict) else Path()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise ValueError("send the file itself, by gradio_client.handle_file")
    return path


def _picture(file: Any) -> Image.Image:
    """An uploaded picture. A large one takes a second: call this in a thread of its own."""
    with uploaded(_uploaded(file)) as path:
        return read_picture(path, path.name, most=infotext.MAX_PIXELS)


def is_gone(blocks: gr.Blocks, session: str) -> bool:
    """Whether the client of a session has closed its connection while its calls are still running."""
    events = [event for events in blocks._queue.active_jobs for event in events or ()]
    return any(not event.alive for event in events if event.session_hash == session)


def _file(path: Path) -> Any:
    """A file for the client."""
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()
