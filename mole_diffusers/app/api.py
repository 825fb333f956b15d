"""The API: named endpoints for gradio_client and MCP, on the functions behind the page.

A recipe is a dict with the fields of `mole_diffusers.studio.recipe.Recipe`; "prompt" is needed, the rest has defaults.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import gradio as gr
from gradio.utils import get_upload_folder

from mole_diffusers.app.files import describe_all_gates, export_gates, uploaded
from mole_diffusers.app.gate_training import TrainingRequest
from mole_diffusers.app.jobs import Work
from mole_diffusers.app.page import Page, session
from mole_diffusers.app.sentences import USER_ERRORS, without_folders
from mole_diffusers.options import check_kinds
from mole_diffusers.studio import infotext
from mole_diffusers.studio.as_code import as_code
from mole_diffusers.studio.picture_passes import read_picture
from mole_diffusers.studio.recipe import Recipe

RECIPE_FIELDS = (
    'an object with the fields of a recipe, for example {"prompt": "a fox <lora:fox:1>", "seed": 3}. Defaults: no negative '
    "prompt, seed 0, the app's steps and guidance, the size that the prompt or the picture that is drawn over asks for, its "
    'own sampler, gates "auto", arm "gates", no locks.'
)

IMAGE = "a picture to draw over, as much as the recipe's strength says; one that the recipe names must be this one."
MASK = "a picture of that size, white where it is drawn over; by default everywhere."


File = gr.FileData | None


def add(page: Page) -> None:
    """Add every endpoint to the app. "RECIPE" in an endpoint's docstring stands for RECIPE_FIELDS, "IMAGE" and "MASK" for
    what is said of pictures to draw over."""
    endpoints = Endpoints(page)
    for name in (name for name in vars(Endpoints) if not name.startswith("_")):
        endpoint = _endpoint(method := getattr(endpoints, name))
        for word, about in (("RECIPE", RECIPE_FIELDS), ("IMAGE", IMAGE), ("MASK", MASK)):
            endpoint.__doc__ = (endpoint.__doc__ or "").replace(word, about)
        limit = None if inspect.iscoroutinefunction(method) else 1  # a job waits in our queue, and finding for nothing
        gr.api(endpoint, api_name=name, concurrency_limit=limit)


def _endpoint(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method for clients: what they send is checked by its annotations, and an error of bad input is one sentence."""
    kinds = {name: kind for name, kind in get_type_hints(method).items() if kind not in (gr.FileData, File)}

    @functools.wraps(method)
    async def call(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(method).bind(*args, **kwargs).arguments
        try:
            check_kinds({name: value for name, value in given.items() if name in kinds}, kinds, method.__name__)
            if inspect.iscoroutinefunction(method):
                return await method(*args, **kwargs)
            return await asyncio.to_thread(method, *args, **kwargs)
        except USER_ERRORS as error:
            raise gr.Error(without_folders(str(error)), print_exception=False) from error

    return call


class Endpoints:
    """Each public method is an endpoint of its name."""

    def __init__(self, page: Page):
        self.page, self.actions = page, page.actions

    def bases(self) -> tuple[str, list[str]]:
        """The name of the base model that is open, "" where none is, and of all that can be."""
        return self.actions.base or "", list(self.actions.bases)

    async def base(self, request: gr.Request, name: str) -> str:
        """Open another base model, for everyone, after the jobs that are there; in the end its name.

        Args:
            name: one of `bases`.
        """
        await self._job(request, "base", self.actions.change_base, name)
        return self.actions.base or ""

    def loras(self) -> list[dict]:
        """What every LoRA's file says about itself, and how many of its layers the pipeline has."""
        return [self.actions.report(name) for name in self.actions.studio.catalog.loras]

    async def find(self, prompt: str) -> list[dict]:
        """LoRAs that a prompt asks for, best first: {"name", "why", "score", "passed_over"}, a similarity in -1..1, and the
        names of those that share a trigger with it and are less like the prompt.

        Args:
            prompt: any text; tags in it are ignored.
        """
        hits = await asyncio.to_thread(self.actions.find, prompt)
        return [{name: getattr(hit, name) for name in ("name", "why", "score", "passed_over")} for hit in hits]

    def upload(self, file: gr.FileData) -> dict:
        """Add a LoRA file; a bad one is refused with one sentence.

        Args:
            file: a .safetensors file with a plain LoRA.
        """
        return self.actions.report(self.actions.add_lora(_uploaded(file)))

    async def compose(
        self,
        request: gr.Request,
        prompt: str,
        negative: str = "",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        gates: str = "auto",
        count: int = 1,
        width: int | None = None,
        height: int | None = None,
        sampler: str = "",
        image: File = None,
        mask: File = None,
        strength: float | None = None,
        hires: float | None = None,
        hires_strength: float | None = None,
        prompt_2: str = "",
        negative_2: str = "",
        binding: str | None = None,
        clip_skip: int | None = None,
    ) -> tuple[list[gr.FileData], list[dict]]:
        """Draw pictures; every PNG has its recipe inside. Returns the files, and their recipes.

        Args:
            prompt: with a <lora:name:strength> tag for every LoRA; te=, unet=, lbw=, start=, stop=, step= are read.
            negative: the negative prompt.
            seed: of the first picture; the others have the next ones. -1 is a random one.
            steps: 1..150; by default those of the app.
            guidance: 0..50; 1 is none. By default that of the base model.
            gates: "auto", "sum", "mean" or the name of trained gates.
            count: number of pictures, 1..16.
            width: in pixels, rounded to what the model can draw; by default the base model's own, or the image's.
            height: likewise.
            sampler: its usual name, for example "DPM++ 2M Karras"; "" is the model's own.
            image: a picture to draw over.
            mask: MASK
            strength: how much of that picture is drawn anew, 0..1.
            hires: above 1, the picture is made so many times as large and drawn over once more; at most 4.
            hires_strength: how much of it is drawn anew then, 0..1.
            prompt_2: what the second text encoder reads instead, where the model has two, without tags.
            negative_2: likewise.
            binding: "bound", each LoRA on its own words and in its own place; "tiles", and drawn there by itself at first;
                "auto", tiles where each has room, else bound; "none", every LoRA everywhere.
            clip_skip: the last layer of the text encoder that is read, counted from the end; 1, the default, is all layers.
        """
        fields = {"prompt": prompt, "negative": negative, "prompt_2": prompt_2, "negative_2": negative_2, "seed": seed}
        fields |= {"steps": steps, "guidance": guidance, "width": width, "height": height, "sampler": sampler}
        fields |= {"gates": gates, "binding": binding, "clip_skip": clip_skip}
        fields |= {"strength": strength, "hires": hires, "hires_strength": hires_strength}
        recipe = {name: value for name, value in fields.items() if value is not None}
        done = await self._drawing(request, "compose", self.actions.compose, recipe, count, image=image, mask=mask)
        return [_file(each.path) for each in done.pictures], [each.recipe.to_dict() for each in done.pictures]

    async def redraw(self, request: gr.Request, recipe: dict, image: File = None, mask: File = None) -> gr.FileData:
        """Draw exactly one recipe, as it is in a picture or with fields left out.

        Args:
            recipe: RECIPE
            image: IMAGE
            mask: MASK
        """
        done = await self._drawing(request, "compose", self.actions.compose, recipe, 1, image=image, mask=mask)
        return _file(done.pictures[0].path)

    async def compare(
        self, request: gr.Request, recipe: dict, merges: list[str] | None = None, image: File = None, mask: File = None
    ) -> tuple[list[str], list[gr.FileData]]:
        """The same seed from the base, each LoRA alone, the plain sum, merges, bound, in tiles where there is room, and with
        trained gates where there are any. The gallery keeps a sheet of them. Returns labels and files.

        Args:
            recipe: RECIPE
            merges: names of training-free merges, for example "ties".
            image: IMAGE
            mask: MASK
        """
        done = await self._drawing(request, "compare", self.actions.compare, recipe, merges or (), image=image, mask=mask)
        return [each.label for each in done.pictures], [_file(each.path) for each in done.pictures]

    async def look(
        self, request: gr.Request, recipe: dict, image: File = None, mask: File = None
    ) -> tuple[dict, list[gr.FileData]]:
        """What the gates did: {"experts", "weights": block -> mean weight of each}, and figures of it.

        Args:
            recipe: RECIPE
            image: IMAGE
            mask: MASK
        """
        report = await self._drawing(request, "look", self.actions.look, recipe, None, image=image, mask=mask)
        figures = {"heat": report.heat, "shares": report.shares, **report.places}
        files = [self.actions.folder / f"{report.picture.stem}-{i}.png" for i in range(len(figures))]
        for file, figure in zip(files, figures.values(), strict=True):
            figure.save(file)
        about = {"experts": report.experts, "weights": report.weights, "pictures": list(figures)}
        return about, [_file(file) for file in files]

    async def grid(
        self, request: gr.Request, recipe: dict, x: str, y: str, image: File = None, mask: File = None
    ) -> gr.FileData:
        """An XY grid of one recipe, which the gallery keeps.

        Args:
            recipe: RECIPE
            x: what varies across: "arm=base,sum,gates", "weight fox=0,0.5,1", "seed=1,2,3", ...
            y: what varies down, likewise.
            image: IMAGE
            mask: MASK
        """
        done = await self._drawing(request, "grid", self.actions.grid, recipe, x, y, image=image, mask=mask)
        return _file(done.sheet)

    def read(self, file: gr.FileData) -> dict:
        """The recipe in a picture (ours or A1111's) or a recipe file, with the LoRAs' names in this app and the base model
        that it was drawn with.

        Args:
            file: a PNG, or a JSON file.
        """
        with uploaded(_uploaded(file)) as path:
            asked = infotext.read(path)
        recipe = self.actions.studio.complete(asked)
        return replace(recipe, base=asked.base or recipe.base).to_dict()

    def code(self, recipe: dict) -> str:
        """Python code that draws a recipe with diffusers.

        Args:
            recipe: RECIPE
        """
        return as_code(self.actions.studio.complete(self._recipe(recipe)))

    async def export(self, request: gr.Request, recipe: dict, rank: int | None = None) -> tuple[gr.FileData, float]:
        """One ordinary LoRA with the gates' average weights, and the relative error of cutting it to a rank.

        Args:
            recipe: RECIPE
            rank: None keeps everything: the ranks add up.
        """
        done = await self._job(request, "export", self.actions.export, self._recipe(recipe), rank)
        return _file(done.path), done.error

    def gallery(self, text: str = "", lora: str = "", favourites: bool = False) -> tuple[list[gr.FileData], list[dict]]:
        """The newest pictures and sheets that were kept, at most 100: files, and for each {"name", "favourite", "recipe",
        "sheet"}, which says what a sheet shows.

        Args:
            text: words of the prompt, each of them, of the file's name, or of what a sheet shows.
            lora: a LoRA that they were drawn with.
            favourites: only those.
        """
        found = self.actions.gallery.entries(text=text, lora=lora, favourites=favourites)[:100]
        about = [
            {"name": e.path.name, "favourite": e.favourite, "recipe": e.recipe.to_dict(), "sheet": e.sheet} for e in found
        ]
        return [_file(entry.path) for entry in found], about

    def favourite(self, name: str, on: bool = True) -> bool:
        """Mark a picture of the gallery as a favourite, or no longer.

        Args:
            name: of its file.
            on: whether it is one.
        """
        self.actions.gallery.favour(name, on)
        return on

    def trash(self, name: str) -> str:
        """Move a picture of the gallery to the folder "trash" beside the others; its name there.

        Args:
            name: of its file.
        """
        return self.actions.gallery.trash(name).name

    async def train(
        self,
        request: gr.Request,
        recipe: dict,
        name: str,
        singles: dict,
        composed: list[str],
        steps: int = 60,
        styles: list[str] | None = None,
        family: str = "factors",
        way: str = "collage",
        again: str = "",
    ) -> list[dict]:
        """Train gates for the LoRAs of a recipe, from prompts alone. Returns a row of losses per update.

        Args:
            recipe: RECIPE Its tags say which LoRAs.
            name: of the gates; `compose` takes it afterwards. The same name and settings go on with a run that was stopped.
            singles: LoRA -> list of prompts that name it and no other; for a collage, subjects with the style.
            composed: prompts that name all.
            steps: total number of updates.
            styles: the LoRAs that act on the whole picture.
            family: of the gates: "static", "mole", "flow", "prompt", "retrieval", "rank" or "factors".
            way: "collage" puts the subjects side by side, each as its own LoRA draws it; "blend" blends what LoRAs predict.
            again: what to do if there are gates of this name with other settings: "continue" from them, or "overwrite".
        """
        wanted = TrainingRequest(name, singles, composed, styles or [], steps=steps, family=family, way=way)
        return (await self._job(request, "train", self.actions.train, self._recipe(recipe), wanted, again)).rows

    def gates(self) -> list[dict]:
        """All trained gates: name, family, the LoRAs they weigh, and which of these are another file here or missing; or, of
        gates that cannot be read, name and why."""
        return describe_all_gates(self.actions.studio.catalog)

    def download_gates(self, name: str) -> list[gr.FileData]:
        """Trained gates as two files, the weights and their config.

        Args:
            name: of the gates, as `gates` lists them.
        """
        return [_file(path) for path in export_gates(self.actions.studio.catalog, name, self.actions.downloads)]

    def upload_gates(self, weights: gr.FileData, about: gr.FileData, name: str = "") -> dict:
        """Add trained gates from their two files; bad ones are refused with one sentence.

        Args:
            weights: the .safetensors file.
            about: the .json file.
            name: of the gates from now on; by default that of their LoRAs, for example "fox+ink".
        """
        return self.actions.add_gates([_uploaded(weights), _uploaded(about)], name)

    # ---- what they share

    def _recipe(self, given: dict) -> Recipe:
        first = {**self.page.fresh().to_dict(), "prompt": None, "seed": 0, "base": ""}
        recipe = Recipe.from_dict({**first, **given})
        if recipe.base:
            self.actions.check_base(recipe.base, "change it first")
        return recipe

    async def _drawing(
        self, request: gr.Request, kind: str, plan: Callable[..., Work], recipe: dict, *more: Any, image: Any, mask: Any
    ) -> Any:
        """What a job gives that draws a recipe, over uploaded pictures where there are any."""
        over = {}
        for name, file in (("image", image), ("mask", mask)):
            if file is not None:
                with uploaded(_uploaded(file)) as path:
                    over[name] = read_picture(path, path.name)
        return await self._job(request, kind, plan, self._recipe(recipe), *more, over)

    async def _job(self, request: gr.Request, kind: str, plan: Callable[..., Work], *given: Any) -> Any:
        """What a job gives in the end. It is stopped once its client is gone, or cancels it (`submit(...).cancel()`)."""
        work = await asyncio.to_thread(plan, *given)
        owner = session(request)
        job = self.page.jobs.submit(owner or f"call {id(request)}", kind, work)
        try:
            while not job.is_over:
                await asyncio.sleep(0.05)
                if owner and is_gone(self.page.blocks, owner):
                    break
        finally:
            self.page.jobs.stop(job)
        if job.error is not None:
            raise job.error
        if job.state != "done":
            raise ValueError("stopped")
        return job.event


# ---- reading arguments, returning files


def _uploaded(file: Any) -> Path:
    """The path of an uploaded file. Raises ValueError for any other path: clients cannot name files of this machine."""
    path = Path(str(file.get("path", ""))).resolve() if isinstance(file, dict) else Path()
    if not path.is_relative_to(Path(get_upload_folder()).resolve()) or not path.is_file():
        raise ValueError("send the file itself, by gradio_client.handle_file")
    return path


def is_gone(blocks: gr.Blocks, session: str) -> bool:
    """Whether the client of a session has closed its connection while calls of it run."""
    events = [event for events in blocks._queue.active_jobs for event in events or ()]
    return any(not event.alive for event in events if event.session_hash == session)


def _file(path: Path) -> Any:
    """A file for the client."""
    return gr.FileData(path=str(path), orig_name=path.name).model_dump()
