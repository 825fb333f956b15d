"""Gate training for the app: data-free, watched, stopped and gone on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusers.app.gate_files import checked_name
from mole_diffusers.app.jobs import Stopped, Tell, watched
from mole_diffusers.gates import FAMILIES, GateConfig
from mole_diffusers.inspection import gate_figures
from mole_diffusers.inspection.compare import sample
from mole_diffusers.mixture import Mixture, attach
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio
from mole_diffusers.training.loop import GateTraining, Lesson, train_gates

MAX_STEPS, PICTURES = 2000, 4  # updates, and validation pictures of a run
TRAINED = tuple(family for family in FAMILIES if family not in UNTRAINED)
WAYS = ("collage", "blend")
REDRAW = 0.55  # of a collage's noise levels, under the plain sum, where a style has to come over it
SHOWN_CALLS = 25  # denoiser calls from one word about them to the next


@dataclass(frozen=True)
class Wanted:
    """What to train.

    Attributes:
        name: of the gates; they can be chosen by it afterwards.
        singles: LoRA -> prompts that name it and no other.
        composed: prompts that name all.
        styles: LoRAs that act on the whole picture.
        steps, seed: updates in all, also where a run is gone on with.
        family: of the gates, one of `TRAINED`.
        way: of `WAYS`: "collage" sets the subjects side by side, each as its own LoRA draws it; "blend" blends the LoRAs'
            predictions under masks.
    """

    name: str
    singles: dict[str, list[str]]
    composed: list[str]
    styles: list[str] = field(default_factory=list)
    steps: int = 60
    seed: int = 0
    family: str = "flow"
    way: str = "collage"

    def __post_init__(self) -> None:
        checked_name(self.name)
        if not isinstance(self.singles, dict) or not all(_texts(lines) for lines in self.singles.values()):
            raise ValueError("the prompts of one LoRA each map a LoRA's name to a list of texts")
        if not _texts(self.composed) or not _texts(self.styles):
            raise ValueError("prompts with all LoRAs, and styles, are lists of texts")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 1 <= self.steps <= MAX_STEPS:
            raise ValueError(f"the number of updates must be in 1..{MAX_STEPS}, got {self.steps}")
        for what, known in (("family", TRAINED), ("way", WAYS)):
            if getattr(self, what) not in known:
                raise ValueError(f"unknown {what} {getattr(self, what)!r}; known: {', '.join(known)}")
        if self.way == "collage" and not (self._parts and self.composed):
            raise ValueError("a collage needs a prompt for each subject alone, and one with all of them")

    @property
    def _parts(self) -> list[str]:
        """The first prompt of each subject."""
        return [prompts[0] for name, prompts in self.singles.items() if name not in self.styles and prompts]

    def lesson(self) -> Lesson:
        """What `train_gates` learns from."""
        if self.way == "collage":
            return Lesson(composed=self.composed, parts=dict.fromkeys(self.composed, self._parts), styles=self.styles)
        return Lesson(singles=self.singles, composed=self.composed, styles=self.styles)

    def training(self) -> GateTraining:
        """How."""
        collage = {"collage": {"redraw": REDRAW if self.styles else 0.0}}
        terms = collage if self.way == "collage" else {"single": 1.0, "composed": 1.0}
        return GateTraining(terms, steps=self.steps, seed=self.seed, every=5)


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


@dataclass
class Lessons:
    """How far a training has come: one row per update, and a picture now and then."""

    rows: list[dict[str, float]]
    total: int
    pictures: list[tuple[Image.Image, str]]
    calls: int = 0  # of the denoiser
    finished: bool = False

    def __str__(self) -> str:
        if not self.rows:
            return f"the LoRAs are watched alone first: {self.calls} denoiser calls so far"
        loss = f"loss {self.rows[-1]['loss']:.4f}"
        return f"{loss}, {'done' if self.finished else f'update {len(self.rows)} of {self.total}'}"


def teach(studio: Studio, recipe: Recipe, wanted: Wanted, *, home: Path, stopped: Stopped) -> Iterator[Lessons]:
    """Train gates for the LoRAs of a recipe; the same name and settings go on where a run was stopped.

    The strengths of the recipe's tags count. Once finished, the gates are on the catalog and in `home / name`.
    """
    recipe = studio.complete(replace(recipe, gates="sum", gates_sha256="", locks={}, arm="gates"))
    if len(recipe.experts) < 2:
        raise ValueError("gates weigh two LoRAs or more: put their tags into the prompt")
    folder, lessons = home / wanted.name, Lessons([], wanted.steps, [])

    def work(tell: Tell) -> None:
        def called(*_: Any) -> None:  # the one place that is passed all the time, so that a stop is heard at once
            lessons.calls += 1
            tell(lessons if lessons.calls % SHOWN_CALLS == 0 else None)

        with studio.lock, _hooked(studio.pipe, called):
            mixture = _mixture(studio, recipe, wanted.family)

            def report(row: dict) -> None:
                lessons.rows.append(row)
                if (row["step"] + 1) % max(wanted.steps // PICTURES, 1) == 0:
                    lessons.pictures.append((_validation(studio, recipe), f"after {row['step'] + 1}"))
                tell(lessons)

            log = train_gates(
                studio.pipe, mixture, wanted.lesson(), config=wanted.training(), folder=folder,
                resume_from="latest", report=report,
            )  # fmt: skip
            mixture.save_pretrained(folder)
            studio.catalog.add_gates(wanted.name, folder)
            lessons.rows, lessons.finished = log, True

    yield lessons
    try:
        yield from (event for event in watched(work, stopped) if event is not None)
    except ValueError as error:  # of a run with other settings, say: visitors need not know where gates are kept
        raise ValueError(str(error).replace(f"{home}/", "")) from error
    yield lessons


@contextmanager
def _hooked(pipe: Any, called: Callable[..., None]) -> Iterator[None]:
    """`called` before every call of the denoiser."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(called)
    try:
        yield
    finally:
        handle.remove()


def _mixture(studio: Studio, recipe: Recipe, family: str) -> Mixture:
    experts: dict[str, Any] = {tag.name: (studio.catalog.expert(tag.name), tag.unet(0, 1)) for tag in recipe.tags}
    studio.forget()
    return attach(studio.pipe, {name: experts[name] for name in sorted(experts)}, GateConfig(family))


def _validation(studio: Studio, recipe: Recipe) -> Image.Image:
    options: dict[str, Any] = {"width": recipe.width, "height": recipe.height, "guidance_scale": recipe.guidance}
    return sample(studio.pipe, recipe.text, [recipe.seed], num_inference_steps=min(recipe.steps, 10), **options)[0]


def curve(rows: Sequence[dict[str, float]]) -> Image.Image | None:
    """The loss so far, once there is any."""
    return gate_figures.losses(rows) if rows else None
