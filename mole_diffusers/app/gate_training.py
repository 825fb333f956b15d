"""Gate training in the app: from prompts alone, with its progress shown; it can be stopped and continued."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from mole_diffusers.app.files import check_gates_name
from mole_diffusers.app.jobs import IsStopped, Report, run_job
from mole_diffusers.gates import FAMILIES, GateConfig
from mole_diffusers.inspection import gate_figures
from mole_diffusers.inspection.compare import sample
from mole_diffusers.mixture import attach
from mole_diffusers.studio.catalog import UNTRAINED
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.data import TrainingData
from mole_diffusers.training.gate_trainer import train_gates

MAX_UPDATES, VALIDATION_PICTURES = 2000, 4  # of a run
TRAINED = tuple(family for family in FAMILIES if family not in UNTRAINED)
WAYS = ("collage", "blend")
REDRAW = 0.55  # fraction of a collage's noise levels to draw again under the plain sum, so that a style covers all of it
REPORTED_CALLS = 25  # denoiser calls from one report to the next, before the first update


@dataclass(frozen=True)
class TrainingRequest:
    """What to train.

    Attributes:
        name: of the gates; they can be chosen by it afterwards.
        singles: LoRA -> prompts that name it and no other.
        composed: prompts that name all.
        styles: LoRAs that act on the whole picture.
        steps: total number of updates, including those of a run that is continued.
        seed: of the run.
        family: of the gates, one of `TRAINED`.
        way: of `WAYS`: "collage" puts the subjects side by side, each as its own LoRA draws it; "blend" blends the LoRAs'
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
        check_gates_name(self.name)
        if not isinstance(self.singles, dict) or not all(_is_texts(lines) for lines in self.singles.values()):
            raise ValueError("the prompts of one LoRA each map a LoRA's name to a list of texts")
        if not _is_texts(self.composed) or not _is_texts(self.styles):
            raise ValueError("prompts with all LoRAs, and styles, are lists of texts")
        if not isinstance(self.steps, int) or isinstance(self.steps, bool) or not 1 <= self.steps <= MAX_UPDATES:
            raise ValueError(f"the number of updates must be in 1..{MAX_UPDATES}, got {self.steps}")
        for what, known in (("family", TRAINED), ("way", WAYS)):
            if getattr(self, what) not in known:
                raise ValueError(f"unknown {what} {getattr(self, what)!r}; known: {', '.join(known)}")
        if self.way == "collage" and not (self._subject_prompts and self.composed):
            raise ValueError("a collage needs a prompt for each subject alone, and one with all of them")

    @property
    def _subject_prompts(self) -> list[str]:
        """The first prompt of each subject."""
        return [prompts[0] for name, prompts in self.singles.items() if name not in self.styles and prompts]

    def data(self) -> TrainingData:
        """The data for `train_gates`."""
        if self.way == "collage":
            parts = dict.fromkeys(self.composed, self._subject_prompts)
            return TrainingData(composed=self.composed, parts=parts, styles=self.styles)
        return TrainingData(singles=self.singles, composed=self.composed, styles=self.styles)

    def config(self) -> GateTraining:
        """The settings for `train_gates`."""
        collage = {"collage": {"redraw": REDRAW if self.styles else 0.0}}
        terms = collage if self.way == "collage" else {"single": 1.0, "composed": 1.0}
        return GateTraining(terms, steps=self.steps, seed=self.seed, every=5)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


@dataclass
class TrainingProgress:
    """How far a training is: one row of losses per update, and a picture now and then."""

    rows: list[dict[str, float]]
    total: int
    pictures: list[tuple[Image.Image, str]]
    calls: int = 0  # of the denoiser
    finished: bool = False

    def __str__(self) -> str:
        if not self.rows:
            return f"first each LoRA is drawn alone: {self.calls} denoiser calls so far"
        loss = f"loss {self.rows[-1]['loss']:.4f}"
        return f"{loss}, {'done' if self.finished else f'update {len(self.rows)} of {self.total}'}"

    def curve(self) -> Image.Image | None:
        """The losses so far, as a figure; None before the first update."""
        return gate_figures.losses(self.rows) if self.rows else None


def train(
    studio: Studio, recipe: Recipe, request: TrainingRequest, *, home: Path, is_stopped: IsStopped
) -> Iterator[TrainingProgress]:
    """Train gates for the LoRAs of a recipe, at the strengths of its tags.

    A stopped run is continued by the same name and settings. Once finished, the gates are in the catalog and in
    `home / name`.
    """
    recipe = studio.complete(replace(recipe, gates="sum", gates_sha256="", locks={}, arm="gates"))
    if len(recipe.experts) < 2:
        raise ValueError("gates weigh two LoRAs or more: put their tags into the prompt")
    folder, progress = home / request.name, TrainingProgress([], request.steps, [])
    options = {"width": recipe.width, "height": recipe.height, "guidance_scale": recipe.guidance}

    def work(report: Report) -> None:
        def on_call(*_: Any) -> None:  # every phase calls the denoiser, so a stop is noticed at once
            progress.calls += 1
            report(progress if progress.calls % REPORTED_CALLS == 0 else None)

        with studio.lock, _before_denoiser(studio.pipe, on_call):
            experts = {tag.name: (studio.catalog.expert(tag.name), tag.unet(0, 1)) for tag in recipe.tags}
            studio.forget_attached()
            mixture = attach(studio.pipe, dict(sorted(experts.items())), GateConfig(request.family))

            def on_update(row: dict) -> None:
                progress.rows.append(row)
                if (row["step"] + 1) % max(request.steps // VALIDATION_PICTURES, 1) == 0:
                    steps = min(recipe.steps, 10)
                    (picture,) = sample(studio.pipe, recipe.text, [recipe.seed], num_inference_steps=steps, **options)
                    progress.pictures.append((picture, f"after {row['step'] + 1}"))
                report(progress)

            log = train_gates(
                studio.pipe, mixture, request.data(), config=request.config(), folder=folder,
                resume_from="latest", report=on_update,
            )  # fmt: skip
            mixture.save_pretrained(folder)
            studio.catalog.add_gates(request.name, folder)
            progress.rows, progress.finished = log, True

    yield progress
    try:
        yield from (event for event in run_job(work, is_stopped) if event is not None)
    except ValueError as error:  # for example a run with other settings; visitors need not know the folder
        raise ValueError(str(error).replace(f"{home}/", "")) from error
    yield progress


@contextmanager
def _before_denoiser(pipe: Any, on_call: Callable[..., None]) -> Iterator[None]:
    """Call `on_call` before every call of the denoiser."""
    denoiser = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    handle = denoiser.register_forward_pre_hook(on_call)
    try:
        yield
    finally:
        handle.remove()
