"""What the app does, without a page: the page, the API and the tests call these."""

from __future__ import annotations

import dataclasses
import hashlib
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from mole_diffusers.app.finding import Finder
from mole_diffusers.app.gate_files import gates_report, taken_in
from mole_diffusers.app.jobs import Stopped, Tell, watched
from mole_diffusers.app.looking import Look, Made, looked
from mole_diffusers.app.previews import Previews
from mole_diffusers.inspection.contributions import contributions
from mole_diffusers.lora import COMPONENTS
from mole_diffusers.lora.stacking import match
from mole_diffusers.mixture import Mixture
from mole_diffusers.retrieval.library import RetrievedLora
from mole_diffusers.studio import infotext, xy_grid
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio

KEPT_FILES = 400  # pictures that stay in the app's own folder; the browser has copies
MAX_COUNT, MAX_SIDE, MAX_THUMBNAIL = 16, 2048, 4 << 20

Thumbnail = Callable[[str], Image.Image | None]


@dataclass
class Progress:
    """How far some work has come."""

    done: int
    total: int
    seconds_left: float | None = None
    preview: Image.Image | None = None
    made: list[Made] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = "" if self.seconds_left is None else f", about {self.seconds_left:.0f} s left"
        state = f"{self.done} of {self.total} steps{left}" if self.done < self.total else "done"
        return "; ".join([state, *self.doubts])


class Actions:
    """Everything on one studio. `folder` holds what was made, until the app ends.

    Args:
        home: where trained gates are kept; by default they end with the app.
        thumbnail: a small picture of a LoRA by name; by default the PNG beside its file, as other tools keep it.
    """

    def __init__(self, studio: Studio, *, home: Path | None = None, thumbnail: Thumbnail | None = None):
        self.studio, self.thumbnail = studio, thumbnail or self._beside
        self._temporary = TemporaryDirectory(prefix="mole_app_")
        self.folder = Path(self._temporary.name)
        self.home = home or self.folder / "gates"
        self._previews, self._finder = Previews(studio.pipe), Finder(studio)

    # ---- what there is

    def report(self, name: str) -> dict[str, Any]:
        """What a LoRA's file says of itself, and how much of it this pipeline has."""
        expert = self.studio.catalog.expert(name)
        hosts = {part: model for part in COMPONENTS if (model := getattr(self.studio.pipe, part, None)) is not None}
        total = sum(len(layers) for layers in expert.layers.values())
        low, high = expert.ranks
        facts: dict[str, Any] = {"name": name, "base": expert.base, "format": expert.format, "sha256": expert.sha256}
        facts |= {"ranks": f"{low}" if low == high else f"{low}..{high}", "triggers": list(expert.triggers), "layers": total}
        try:
            return facts | {"matched": total - len(match(expert, hosts).unmatched), "problem": ""}
        except ValueError as error:
            return facts | {"matched": 0, "problem": str(error).replace(f"{Path(expert.source).parent}/", "")}

    def find(self, prompt: str) -> list[RetrievedLora]:
        """LoRAs that a prompt asks for, and why: it says their name or a trigger, or is like what they were made from."""
        return self._finder(prompt)

    def add_file(self, path: Path) -> str:
        """Put an uploaded file on the catalog under its own name; raises ValueError for anything but a good LoRA file."""
        stem = re.sub(r"[^\w .+-]", "_", path.name.removesuffix(".safetensors")).strip(" .")[:80] or "lora"
        kept = self.folder / f"{stem}.safetensors"
        data = path.read_bytes()
        kept.write_bytes(data)
        try:
            self.studio.catalog.add_lora(stem, kept)
        except ValueError as error:
            raise ValueError(str(error).replace(f"{self.folder}/", "")) from error
        return stem

    def add_gates(self, files: Sequence[Path], name: str) -> dict[str, Any]:
        """Put uploaded gates on the catalog; what they are. See `gate_files.taken_in`."""
        name = taken_in(self.studio.catalog, files, name, home=self.home)
        return gates_report(self.studio.catalog, name)

    # ---- what can be made

    def compose(self, recipe: Recipe, count: int, stopped: Stopped) -> Iterator[Progress]:
        """`count` pictures of seeds that follow one another; where it is stopped, those that are done stay."""
        if not 1 <= count <= MAX_COUNT:
            raise ValueError(f"the number of pictures must be in 1..{MAX_COUNT}, got {count}")
        recipes = [dataclasses.replace(recipe, seed=recipe.seed + i) for i in range(count)]
        return self.draw_all([(f"seed {r.seed}", r) for r in recipes], stopped)

    def compare(self, recipe: Recipe, stopped: Stopped, merges: Sequence[str] = ()) -> Iterator[Progress]:
        """The same seed from the base, each LoRA alone, the plain sum, the gates and any of `drawing.MERGES`."""
        arms = ["base", *(f"alone {tag.name}" for tag in recipe.tags), "sum", "gates"]
        arms += [f"merge {method}" for method in merges if recipe.tags]
        return self.draw_all([(arm, dataclasses.replace(recipe, arm=arm)) for arm in arms], stopped)

    def draw_all(self, wanted: Sequence[tuple[str, Recipe]], stopped: Stopped) -> Iterator[Progress]:
        """Draw one after the other. The last progress holds what was done, also where it was stopped."""
        recipes = [(label, self._completed(recipe)) for label, recipe in wanted]
        total, begun, made = sum(r.steps for _, r in recipes), time.monotonic(), list[Made]()
        doubts = [doubt for doubt in dict.fromkeys(self.studio.doubt(recipe) for _, recipe in recipes) if doubt]
        state = Progress(0, total, made=made, doubts=doubts)

        def work(tell: Tell) -> None:
            for label, recipe in recipes:
                image = self.studio.draw(recipe, on_step=lambda _, latents: step(tell, latents))
                made.append(self.keep(image, label, recipe))
                tell(dataclasses.replace(state, preview=None))

        def step(tell: Tell, latents: torch.Tensor) -> None:
            state.done += 1
            state.seconds_left = (time.monotonic() - begun) / state.done * (total - state.done)
            tell(dataclasses.replace(state, preview=self._previews(latents)))

        for event in watched(work, stopped):
            if event is not None:
                yield event
        yield dataclasses.replace(state, preview=None)

    def look(self, recipe: Recipe, stopped: Stopped, shades: Mapping[str, str] | None = None) -> Iterator[Progress | Look]:
        """Draw once more and watch the gates: last comes the Look, in the LoRAs' colours where `shades` has them."""
        recipe = self._completed(dataclasses.replace(recipe, arm="gates"))
        if not recipe.experts:
            raise ValueError("there is nothing to see: the prompt has no <lora:...> tag")
        seen: dict[str, Any] = {}
        state = Progress(0, recipe.steps)

        @contextmanager
        def inside(mixture: Mixture) -> Iterator[None]:
            with ExitStack() as stack:
                seen["trace"] = stack.enter_context(mixture.trace())
                size = (recipe.height, recipe.width)
                seen["found"] = stack.enter_context(contributions(mixture, self.studio.pipe.unet, size))
                yield

        def work(tell: Tell) -> None:
            def step(done: int, _: torch.Tensor) -> None:
                state.done = done
                tell(dataclasses.replace(state))

            seen["image"] = self.studio.draw(recipe, on_step=step, inside=inside)

        yield from (event for event in watched(work, stopped) if event is not None)
        if "image" in seen:
            yield looked(self.studio, self.keep(seen["image"], "gates", recipe), shades, **seen)

    def grid(self, recipe: Recipe, x: str, y: str, stopped: Stopped) -> Iterator[Progress | Image.Image]:
        """An XY grid; last comes the sheet, with grey cells where it was stopped."""
        across, down = xy_grid.parse_axis(x), xy_grid.parse_axis(y)
        rows = xy_grid.cells(recipe, across, down)
        wanted = [(f"{r},{c}", cell) for r, row in enumerate(rows) for c, cell in enumerate(row)]
        made: dict[str, Path] = {}
        for state in self.draw_all(wanted, stopped):
            made = {one.label: one.path for one in state.made}
            yield state
        pictures = [[_opened(made.get(f"{r},{c}")) for c in range(len(row))] for r, row in enumerate(rows)]
        yield xy_grid.sheet(pictures, across, down)

    def export(self, recipe: Recipe, rank: int | None = None) -> tuple[Path, float]:
        """One ordinary LoRA at the gates' average weights for this prompt; its file, and the error of the cut.

        Raises ValueError where strengths change over steps or blocks, which one LoRA cannot hold.
        """
        recipe = self._completed(recipe)
        wanted = recipe.constant_strengths()
        path = self.folder / f"{'+'.join(sorted(recipe.experts)) or 'none'}.safetensors"
        with self.studio.lock:
            mixture = self.studio.prepared(recipe)
            if mixture is None:
                raise ValueError("there is nothing to export: the prompt has no <lora:...> tag")
            with strengths(mixture, wanted):
                return path, mixture.export_lora(path, recipe.text, rank=rank, guidance_scale=recipe.guidance)

    def keep(self, image: Image.Image, label: str, recipe: Recipe) -> Made:
        """Write a picture with its recipe inside."""
        for old in sorted(self.folder.glob("*.png"), key=lambda p: p.stat().st_mtime)[:-KEPT_FILES]:
            old.unlink(missing_ok=True)
        digest = hashlib.sha256(repr(recipe).encode()).hexdigest()[:10]
        path = self.folder / f"{recipe.seed}-{digest}.png"
        infotext.save(image, path, recipe)
        return Made(label, path, recipe)

    def _beside(self, name: str) -> Image.Image | None:
        path = self.studio.catalog.loras[name].with_suffix(".png")
        if not path.is_file() or path.stat().st_size > MAX_THUMBNAIL:
            return None
        with Image.open(path, formats=["PNG"]) as image:
            if image.width * image.height > MAX_SIDE**2:
                return None
            image.thumbnail((128, 128), Image.Resampling.NEAREST)
            return image.convert("RGB")

    def _completed(self, recipe: Recipe) -> Recipe:
        if max(recipe.width, recipe.height) > MAX_SIDE:
            raise ValueError(f"width and height are at most {MAX_SIDE} here, got {recipe.width} x {recipe.height}")
        return self.studio.complete(recipe)


@contextmanager
def strengths(mixture: Mixture, wanted: dict[str, float]) -> Iterator[None]:
    """Set strengths while the block runs."""
    before = {name: mixture.strength(name) for name in wanted}
    try:
        for name, value in wanted.items():
            mixture.strength(name, value)
        yield
    finally:
        for name, value in before.items():
            mixture.strength(name, value)


def _opened(path: Path | None) -> Image.Image | None:
    if path is None:
        return None
    with Image.open(path) as image:
        return image.convert("RGB")


def never() -> bool:
    """For work that nobody can stop."""
    return False
