"""Everything the app does, without a page. The page, the API and the tests call it."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

import torch
from PIL import Image

from mole_app.studio import infotext, xy_grid
from mole_app.studio.base_models import Base, open_base
from mole_app.studio.catalog import UNTRAINED
from mole_app.studio.infotext import FoundRecipe
from mole_app.studio.picture_notes import PictureNotes
from mole_app.studio.picture_passes import check_pictures, with_pictures
from mole_app.studio.prompt_syntax import LoraTag
from mole_app.studio.prompt_weights import prompts_read
from mole_app.studio.recipe import BOUND, TILES, Recipe
from mole_app.studio.render import DETAILS, MixtureContext, Studio, check_size
from mole_app.studio.strength_schedule import StrengthSchedule
from mole_app.studio.weight_syntax import plain_text
from mole_app.web import files
from mole_app.web.bases import Bases
from mole_app.web.gallery import Gallery
from mole_app.web.gate_report import GateReport, gate_report
from mole_app.web.gate_training import TrainingRequest, train
from mole_app.web.jobs import ReportProgress, StoppedError, Work
from mole_app.web.loras import THUMBNAIL, Loras
from mole_app.web.presets import Presets
from mole_app.web.preview import PreviewDecoder
from mole_app.web.sentences import way_in_words
from mole_diffusers import Mixture, denoiser
from mole_diffusers.binding import Layout
from mole_diffusers.inspection import contributions, ways
from mole_diffusers.safe_files import read_picture

MAX_PICTURES, MAX_FOLDERS = 400, 16  # kept in the app's own folder; the browser has copies
MAX_COUNT = 16
MAX_WORK = 2000 << 20  # pixels x steps of one job: 100 pictures of 1024 x 1024 in 20 steps

SourcePictures = Mapping[str, Image.Image]  # that a picture is made with, see `Actions.compose`
NOTHING: SourcePictures = {}
FOLDED = "folded experts act on every word and in the whole picture: weights cannot hold words or places"


@dataclass(frozen=True)
class Picture:
    """A picture file, the recipe it was drawn from, and where each LoRA acted in it, if the LoRAs had places."""

    label: str
    path: Path
    recipe: Recipe
    layout: Layout | None = None


SaveSheet = Callable[[Sequence[Image.Image]], Path]


@dataclass
class Progress:
    """How far a job is: steps done and in total, the number of pictures, and at the end their sheet, if one is made.

    Attributes:
        size: width and height in pixels of the picture that is drawn now.
        part: what of it is drawn now, if not all of it at once.
        preview: what it will look like, as predicted now.
    """

    done: int
    total: int
    count: int
    size: tuple[int, int]
    seconds_left: float | None = None
    part: str = ""
    preview: Image.Image | None = None
    pictures: list[Picture] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    sheet: Path | None = None

    def __str__(self) -> str:
        now = [f"{self.done} of {self.total} steps"]
        now += [] if self.seconds_left is None else [f"about {self.seconds_left:.0f} s left"]
        now += [f"picture {len(self.pictures) + 1} of {self.count}"] if self.count > 1 else []
        state = ", ".join([*now, *filter(None, [self.part])]) if len(self.pictures) < self.count else "done"
        return "; ".join([state, *self.warnings])


@dataclass(frozen=True)
class Exported:
    """An exported ordinary LoRA: its file, the error of cutting its rank, and a sentence on what else is lost or ""."""

    path: Path
    error: float
    lost: str

    def __str__(self) -> str:
        words = f"written with the gates' average weights; error of the cut {self.error:.3f}"
        return f"{words}; {self.lost}" if self.lost else words


class Actions:
    """Everything the app can do with one studio.

    Methods for long work check their arguments at once and return the work, which `jobs` then runs.

    Attributes:
        folder: temporary files, deleted when the app ends.
        unkept: pictures that are not kept, namely those of comparisons and grids. The gallery keeps a sheet of them.

    Args:
        home: folder of the trained gates, the uploaded LoRAs, the styles and the presets. By default they are deleted when
            the app ends.
        gallery: folder of the composed pictures. By default they are deleted when the app ends.
        thumbnail: see `Loras`.
        bases, opening: see `Bases`.
    """

    def __init__(
        self,
        studio: Studio,
        *,
        home: Path | None = None,
        gallery: Path | None = None,
        thumbnail: Callable[[str], Image.Image | None] | None = None,
        bases: Mapping[str, str] | None = None,
        opening: Callable[[str], Base] = open_base,
    ):
        self.studio, self._preview = studio, PreviewDecoder()
        self._temporary = TemporaryDirectory(prefix="mole_app_")
        self.folder = Path(self._temporary.name)
        self.home = home or self.folder / "gates"
        self.unkept = Gallery(self.folder / "drawn", most=MAX_PICTURES)
        self.gallery = Gallery(gallery) if gallery else Gallery(self.folder / "gallery", most=MAX_PICTURES)
        self.loras = Loras(studio, self.home / ".loras", thumbnail)  # gates cannot have this name
        self.presets = Presets(self.home / ".presets")
        self.bases = Bases(studio, self.loras, bases, opening)

    def notes(self, found: FoundRecipe, recipe: Recipe | None) -> list[str]:
        """What a user should know about a recipe that was read from a file.

        Args:
            recipe: the completed recipe; None if it cannot be completed.
        """
        asked = found.recipe
        notes = [] if recipe is None else self.studio.notes(asked, recipe)
        if asked.base and (other := self.bases.other(asked.base)) is not None:
            notes.append(f"it was drawn with the base {other!r}, and here is {self.bases.open!r}")
        return notes + found.notes(self.studio.base.name)

    def size_of(self, recipe: Recipe) -> tuple[int, int]:
        """Width and height in pixels that a recipe is drawn at. Raises what `Studio.complete` raises."""
        drawn = self.studio.complete(recipe)
        return drawn.width, drawn.height

    def add_gates(self, paths: Sequence[Path], name: str) -> dict[str, Any]:
        """Add uploaded gates and return their description, see `files.import_gates`."""
        name = files.import_gates(self.studio.catalog, paths, name, home=self.home)
        return files.describe_gates(self.studio.catalog, name)

    # ---- pictures

    def small(self, path: Path) -> Path:
        """A small copy of a picture of the gallery, for a list of many; the picture itself if it cannot be read."""
        small = self.folder / "small" / f"{path.stem}.jpg"
        try:
            return small if small.exists() else _saved_small(read_picture(path, path.name, most=infotext.MAX_PIXELS), small)
        except ValueError:
            return path

    def small_lora(self, name: str, picture: Callable[[str], Image.Image]) -> Path:
        """The file of a small picture of a LoRA, for a list of many; `picture` makes it."""
        small = self.folder / "small" / f"lora-{hashlib.sha256(name.encode()).hexdigest()[:16]}.jpg"
        return small if small.exists() else _saved_small(picture(name), small)

    def compose(self, recipe: Recipe, count: int, pictures: SourcePictures = NOTHING) -> Work:
        """Draw `count` pictures with consecutive seeds into the gallery. If stopped, the finished ones stay.

        Args:
            pictures: the "image" to draw over, the "mask" of what changes, the "control" map and the "reference" picture.
        """
        if count not in range(1, MAX_COUNT + 1):
            raise ValueError(f"the number of pictures must be in 1..{MAX_COUNT}, got {count}")
        recipe, _ = self._with_a_seed(recipe, pictures)
        recipes = [replace(recipe, seed=recipe.seed + i) for i in range(count)]
        return self._draw([(f"seed {r.seed}", r) for r in recipes], pictures, gallery=self.gallery)

    def compare(
        self, recipe: Recipe, merges: Sequence[str] = (), pictures: SourcePictures = NOTHING, notes: Sequence[str] = ()
    ) -> Work:
        """Draw the same seed in several ways, and put a sheet of them into the gallery.

        The ways are those of `inspection.compare.ways`, in tiles if there is room, with trained gates if there are any, and
        at last the given `merges`.

        Args:
            merges: any of `render.MERGES`.
            pictures: as in `compose`.
            notes: further sentences for the progress.
        """
        recipe, whole = self._with_a_seed(replace(recipe, arm="gates"), pictures)
        if not whole.experts:
            raise ValueError("there is nothing to compare: the prompt has no <lora:...> tag")
        summed = replace(whole, gates="sum", gates_sha256="", locks={})
        drawn = {"gates": whole} | {binding: replace(summed, binding=binding) for binding in (BOUND, TILES)}
        trained = "" if whole.gates in UNTRAINED else "gates"
        labels = ways(whole.experts, tiles=self.studio.draws_in_tiles(whole), trained=trained)
        labels += [f"merge {method}" for method in dict.fromkeys(merges)]
        for arm in (label for label in labels if label not in drawn):  # "alone" has the names of here
            drawn[arm] = replace(whole if arm.startswith("alone ") else recipe, arm=arm)
        wanted = [(label, drawn[label]) for label in labels]

        def sheet(images: Sequence[Image.Image]) -> Path:
            return self.gallery.add(xy_grid.labelled(images, [*map(way_in_words, labels)]), whole, {"columns": labels})

        return self._draw(wanted, pictures, notes=notes, sheet=sheet, says_which=True)

    def _draw(
        self,
        wanted: Sequence[tuple[str, Recipe]],
        pictures: SourcePictures,
        *,
        gallery: Gallery | None = None,
        notes: Sequence[str] = (),
        sheet: SaveSheet | None = None,
        inside: MixtureContext = nullcontext,
        says_which: bool = False,
    ) -> Work:
        """Draw labelled recipes one after the other. Reports a Progress after each step, and returns the last.

        Args:
            gallery: keeps the pictures, and turns on previews while they are drawn. By default there are no previews, and
                the pictures go to the app's own folder.
            notes: further sentences for the progress.
            sheet: puts a sheet of the pictures into the gallery. If stopped, of those that are finished.
            inside: as in `Studio.draw`.
            says_which: whether what is warned of a picture has its label.
        """
        recipes = [self._completed(recipe) for _, recipe in wanted]
        for recipe in recipes:
            check_pictures(recipe, pictures)
        self._check_budget(recipes)
        part = "the painted part of " if "mask" in pictures else ""
        # The panel that shows these may be closed.
        warnings = [f"drawn over {part}your picture"] if "image" in pictures else []
        warnings += [f"{hires:g} times larger" for hires in dict.fromkeys(r.hires for r in recipes) if hires > 1]
        warnings += notes
        for (_, asked), recipe in zip(wanted, recipes, strict=True):
            warnings += self.studio.notes(asked, recipe, pictures.get("image"))
        steps, size = sum(map(self.studio.total_steps, recipes)), (recipes[0].width, recipes[0].height)
        state = Progress(0, steps, len(recipes), size, warnings=[*dict.fromkeys(warnings)])

        def work(report: ReportProgress) -> Progress:
            begun, drawn = time.monotonic(), list[Image.Image]()

            def on_step(recipe: Recipe, before: int, _: int, latents: torch.Tensor) -> None:
                state.done += 1
                state.part = self.studio.part_of_step(recipe, state.done - before)
                state.seconds_left = (time.monotonic() - begun) / state.done * (state.total - state.done)
                is_whole = state.part != DETAILS  # else only a part would fill the frame
                preview = self._preview(self.studio.base.pipe, latents) if gallery and is_whole else None
                report(replace(state, preview=preview))

            try:
                for (label, _), recipe in zip(wanted, recipes, strict=True):
                    state.size, noted = (recipe.width, recipe.height), PictureNotes()
                    report(replace(state))
                    told = partial(on_step, recipe, state.done)
                    image = self.studio.draw(recipe, **pictures, on_step=told, inside=inside, noted=noted)
                    recipe, by_hand = _with_locks_of(recipe, noted.locations)
                    warned = [f"{label}: {each}" if says_which else each for each in noted.warnings]
                    state.warnings = list(dict.fromkeys([*state.warnings, *warned, *by_hand]))
                    path = (gallery or self.unkept).add(image, recipe)
                    state.pictures = [*state.pictures, Picture(label, path, recipe, noted.layout)]
                    drawn.append(image)
                    report(replace(state))
            finally:
                if sheet is not None and drawn:
                    state.sheet = sheet(drawn)
                    with suppress(StoppedError):
                        report(replace(state))
            return state

        return work

    def look(
        self,
        recipe: Recipe,
        shades: Mapping[str, str] | None = None,
        pictures: SourcePictures = NOTHING,
        notes: Sequence[str] = (),
    ) -> Work:
        """Draw again and trace the gates. The work returns a GateReport.

        If the picture is made larger, the first pass is traced.

        Args:
            shades: LoRA -> its colour in the figures.
            pictures: as in `compose`.
            notes: further sentences for the report.
        """
        recipe = self._completed(with_pictures(replace(recipe, arm="gates"), **pictures))
        if not recipe.experts:
            raise ValueError("there is nothing to see: the prompt has no <lora:...> tag")
        seen: dict[str, Any] = {}

        @contextmanager
        def tracing(mixture: Mixture) -> Iterator[None]:
            acted = contributions(self.studio.base.pipe, mixture, (recipe.height, recipe.width))
            with mixture.trace() as seen["trace"], acted as seen["acted"]:
                yield

        drawing = self._draw([("", recipe)], pictures, notes=notes, inside=tracing)

        def work(report: ReportProgress) -> GateReport:
            state = drawing(report)
            return gate_report(self.studio, recipe, state.pictures[0].path, state.warnings, shades=shades, **seen)

        return work

    def grid(self, recipe: Recipe, x: str, y: str, pictures: SourcePictures = NOTHING) -> Work:
        """Draw an XY grid and put its sheet into the gallery; `pictures` as in `compose`."""
        recipe, whole = self._with_a_seed(recipe, pictures)
        across, down = xy_grid.parse_axis(x), xy_grid.parse_axis(y)
        wanted = [("", cell) for cell in xy_grid.cells(recipe, across, down)]

        def sheet(images: Sequence[Image.Image]) -> Path:
            return self.gallery.add(xy_grid.sheet(images, across.labels, down.labels), whole, {"x": x, "y": y})

        return self._draw(wanted, pictures, sheet=sheet)

    def new_folder(self) -> Path:
        """A folder for files that a visitor downloads. Only the newest `MAX_FOLDERS` of these stay."""
        made = self.folder / "made"
        made.mkdir(exist_ok=True)
        for old in sorted(made.iterdir())[: 1 - MAX_FOLDERS]:
            shutil.rmtree(old, ignore_errors=True)  # another thread may delete it, too
        return Path(mkdtemp(prefix=f"{time.time_ns()}-", dir=made))

    def export(self, recipe: Recipe, rank: int | None = None) -> Work:
        """Write one ordinary LoRA with the gates' average weights for this prompt, or the weights set by hand. The work
        returns an Exported.

        The recipe's arm is ignored. Raises ValueError if strengths vary over steps or blocks: one LoRA cannot do that.
        """
        recipe = self._completed(replace(recipe, arm="gates"))
        strengths = recipe.constant_strengths()
        if not strengths:
            raise ValueError("there is nothing to export: the prompt has no <lora:...> tag")
        name = "+".join(sorted(strengths)).replace("/", "_").encode()[:100].decode(errors="ignore")
        call: dict[str, Any] = {"width": recipe.width, "height": recipe.height}

        def work(report: ReportProgress) -> Exported:
            report("writing")
            path = self.new_folder() / f"{name}.safetensors"  # others may export the same LoRAs with other weights
            with self.studio.base.lock:
                self.studio.base.check_for(recipe)
                if recipe.prompt_2 and "prompt_2" in prompts_read(self.studio.base.pipe):
                    call["prompt_2"] = plain_text(recipe.prompt_2)
                mixture = self.studio.base.attachment.to(self.studio.base.pipe, recipe)
                assert mixture is not None  # there are tags
                if not mixture.config.options.reads_prompt:  # gates that do read it alone, without guidance's empty one
                    call["guidance_scale"] = recipe.guidance
                names = list(mixture.experts)
                tags = [LoraTag(name) for name in names]
                by_hand = StrengthSchedule(names, tags, unet=denoiser(self.studio.base.pipe), steps=1, locks=recipe.locks)
                with mixture.strengths(strengths), mixture.planned(by_hand):
                    error = mixture.export_lora(path, recipe.plain_text, rank=rank, **call)
                return Exported(path, error, FOLDED if mixture.is_bound else "")

        return work

    def train(self, recipe: Recipe, request: TrainingRequest, again: str = "") -> Work:
        """Train gates for the LoRAs of a recipe, see `gate_training.train`."""
        return train(self.studio, recipe, request, home=self.home, again=again)

    def _with_a_seed(self, recipe: Recipe, pictures: SourcePictures) -> tuple[Recipe, Recipe]:
        """The recipe with only a random seed filled in, so that several pictures share it, and the hashes, which say what is
        a name in its tags; and the completed recipe."""
        recipe = with_pictures(recipe, **pictures)
        whole = self._completed(recipe)
        return replace(recipe, seed=whole.seed, experts={**whole.experts, **recipe.experts}), whole

    def _completed(self, recipe: Recipe) -> Recipe:
        recipe = self.studio.complete(recipe)
        recipe.tag_bindings()  # raises ValueError if a painted region has no mask
        check_size(recipe.width, recipe.height, recipe.hires)
        return recipe

    def _check_budget(self, recipes: Sequence[Recipe]) -> None:
        """Raises ValueError if drawing these takes more than `MAX_WORK`."""
        work = sum(r.width * r.height * r.hires**2 * self.studio.total_steps(r) for r in recipes)
        if work > MAX_WORK:
            first = recipes[0]
            raise ValueError(
                f"this is {work / MAX_WORK:.1f} times what one job may take: {len(recipes)} pictures of {first.width} x "
                f"{first.height} pixels in {first.steps} steps; take fewer or smaller pictures, or fewer steps"
            )


def _saved_small(image: Image.Image, path: Path) -> Path:
    """Save a small copy of a picture. Returns its path."""
    path.parent.mkdir(exist_ok=True)
    image = image.convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    part = path.with_suffix(f".{token_hex(4)}")  # others may save it at once
    image.save(part, "jpeg", quality=88)
    return part.replace(path)


def _with_locks_of(recipe: Recipe, locations: Collection[str]) -> tuple[Recipe, list[str]]:
    """A recipe with only those weights set by hand whose gates were there when it was drawn, and what to say about them."""

    def blocks(count: int) -> str:
        return f"{count} block{'' if count == 1 else 's'}"

    if recipe.arm != "gates":
        return recipe, []
    here, said = {location: row for location, row in recipe.locks.items() if location in locations}, []
    if gone := len(recipe.locks) - len(here):
        said.append(f"weights set by hand for {blocks(gone)} that these gates do not have are left out")
    if here:
        said.append(f"the weights of {blocks(len(here))} are set by hand, see the tab Compare")
    return replace(recipe, locks=here), said
