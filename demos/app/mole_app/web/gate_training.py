"""Gate training in the app, from prompts alone. It shows its progress, and can be stopped, continued and repeated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, get_type_hints

from PIL import Image

from mole_app.studio.base_models import usual_size
from mole_app.studio.clip_skip import clip_skip
from mole_app.studio.picture_passes import drawable
from mole_app.studio.prompt_syntax import MAX_PROMPT
from mole_app.studio.recipe import BOUND, TILES, Recipe
from mole_app.studio.render import Studio, check_size
from mole_app.web import held_out
from mole_app.web.files import check_gates_name
from mole_app.web.jobs import ReportProgress, Work
from mole_app.web.training_runs import TrainingRun
from mole_diffusers import attach
from mole_diffusers.gates import GATE_TYPES, RECOMMENDED
from mole_diffusers.inspection import sample
from mole_diffusers.options import check_options
from mole_diffusers.training import GateTraining, TrainingData, train_gates, unet_of

MAX_UPDATES, MAX_PROMPTS, VALIDATION_PICTURES = 2000, 64, 4  # per run
SHOWN = 2  # seeds whose pictures are shown before and after training
WAYS = ("collage", "blend")
TRAINED = tuple(name for name, gate_type in GATE_TYPES.items() if gate_type.learns)


@dataclass(frozen=True)
class TrainingRequest:
    """What to train.

    Attributes:
        name: the name of the gates, by which you choose them later.
        singles: LoRA -> prompts that name it and no other; for a collage, a subject in the style.
        composed: prompts that name all LoRAs.
        steps: the total number of updates, including earlier ones of a run that is continued.
        styles: LoRAs that act on the whole picture.
        gate_type: the kind of gates: FAMILIES.
        way: "collage" puts the subjects side by side, each drawn by its own LoRA. "blend" blends the LoRAs' predictions
            under masks.
    """

    name: str
    singles: Mapping[str, list[str]]
    composed: list[str]
    steps: int = 60
    styles: list[str] = field(default_factory=list)
    gate_type: str = RECOMMENDED
    way: str = "collage"

    def __post_init__(self) -> None:
        check_options(vars(self), get_type_hints(TrainingRequest), "a training")
        check_gates_name(self.name)
        prompts = [*chain(*self.singles.values()), *self.composed]
        if len(prompts) > MAX_PROMPTS or max(map(len, prompts), default=0) > MAX_PROMPT:
            raise ValueError(f"a training has at most {MAX_PROMPTS} prompts, of at most {MAX_PROMPT} characters each")
        if not 1 <= self.steps <= MAX_UPDATES:
            raise ValueError(f"the number of updates must be in 1..{MAX_UPDATES}, got {self.steps}")
        for what, known in (("gate_type", TRAINED), ("way", WAYS)):
            if getattr(self, what) not in known:
                raise ValueError(f"unknown {what.replace('_', ' ')} {getattr(self, what)!r}; known: {', '.join(known)}")
        if self.way == "collage" and not (self._subject_prompts and self.composed):
            raise ValueError("a collage needs a prompt for each subject alone, and one with all of them")

    @property
    def _subject_prompts(self) -> list[str]:
        """The prompt of each subject."""
        own = (prompt for name, prompts in self.singles.items() if name not in self.styles for prompt in prompts)
        return list(dict.fromkeys(own))  # two LoRAs with the same prompt share one subject

    def teachers(self) -> tuple[int, int]:
        """The number of pictures that the teachers draw, and of calls of the denoiser for them."""
        terms, n = self.config().parsed, len(self.singles)
        if self.way == "collage":
            term: Any = terms["collage"]
            subjects = len(self._subject_prompts)
            return len(self.composed) * subjects * term.seeds, len(self.composed) * subjects * term.steps
        one: Any = terms["single"]
        counts = [max(one.seeds, len(prompts)) for prompts in self.singles.values()]
        # A step of a single prompt calls it with and without its LoRA, one of a composed prompt with each and with none.
        return sum(counts) + max(one.seeds, len(self.composed)), one.steps * (2 * n + 1 + n)

    def data(self) -> TrainingData:
        """The data for `train_gates`."""
        if self.way == "collage":
            parts = dict.fromkeys(self.composed, self._subject_prompts)
            return TrainingData(composed=self.composed, parts=parts, styles=self.styles)
        return TrainingData(singles=self.singles, composed=self.composed, styles=self.styles)

    def config(self) -> GateTraining:
        """The settings for `train_gates`."""
        terms = {"collage": 1.0} if self.way == "collage" else {"single": 1.0, "composed": 1.0}
        return GateTraining(terms, steps=self.steps, every=5)


@dataclass
class TrainingProgress:
    """How far a training is.

    Attributes:
        rows: the losses, one row per update.
        pictures: pictures of the prompt before, during and after training, with labels.
        doing: what happens now, before and after the updates.
        called: the number of calls of the denoiser so far.
        verdict: how much the gates help, once that is measured.
    """

    request: TrainingRequest
    rows: list[dict[str, float]] = field(default_factory=list)
    pictures: list[tuple[Image.Image, str]] = field(default_factory=list)
    doing: str = "starting"
    called: int = 0
    verdict: str = ""

    def __str__(self) -> str:
        if self.verdict:
            return f"done: {self.verdict}"
        if self.doing:
            return self.doing
        if self.rows:
            return f"update {self.rows[-1]['step'] + 1} of {self.request.steps}, loss {self.rows[-1]['loss']:.4f}"
        count, calls = self.request.teachers()
        return f"drawing the teachers' pictures, {min(self.called * count // calls, count)} of {count}"


def train(studio: Studio, recipe: Recipe, request: TrainingRequest, *, home: Path, again: str = "") -> Work:
    """Train gates for the LoRAs of a recipe. Afterwards they are in `home / name` and in the catalog.

    Training uses the strengths, words and regions of the recipe's tags, its binding, its clip skip, and its size. If that is
    open, it is the usual one for the prompts with all LoRAs. The work reports a TrainingProgress. A run that was stopped
    continues if you start it again with the same name and settings.

    Args:
        again: what to do if there are gates of this name with other settings: "continue" from them, or "overwrite".

    Raises ValueError for bad settings, for strengths that vary over components, blocks or steps, and for a base that cannot
    be trained on, and GatesExistError if `again` is needed.
    """
    unet_of(studio.base.pipe, "training on this page")
    width, height = _canvas(studio, recipe, request.composed)
    check_size(width, height)
    recipe = studio.complete(replace(recipe, gates="sum", gates_sha256="", locks={}, arm="gates"))
    if len(recipe.experts) < 2:
        raise ValueError("gates weigh two LoRAs or more: put their tags into the prompt")
    config = replace(request.config(), width=width, height=height)
    settings = {**asdict(request), "prompt": recipe.prompt, "experts": recipe.experts, "base": recipe.base}
    settings |= {"width": width, "height": height, "masks": recipe.masks, "clip_skip": recipe.clip_skip}
    settings["is_bound"] = recipe.binding != "none"  # in whatever way: all teach the same
    recipe.constant_strengths()  # raises ValueError if one varies over components, blocks or steps
    recipe.tag_bindings()  # raises ValueError if a painted region has no mask
    run = TrainingRun(studio.catalog, home, request.name, request.gate_type, settings)
    run.check(again)

    def work(report: ReportProgress) -> TrainingProgress:
        studio.base.check_for(recipe)
        progress = TrainingProgress(request)
        report(progress)
        run.prepare(again)
        with studio.base.lock:
            try:
                _train(studio, recipe, config, run, progress, report)
            except ValueError as error:  # hide the folder from visitors
                raise ValueError(str(error).replace(f"{home}/", "")) from error
            finally:
                studio.base.attachment.forget()
        return progress

    return work


def _canvas(studio: Studio, recipe: Recipe, composed: Sequence[str]) -> tuple[int, int]:
    """Width and height in pixels to train at: the recipe's.

    If they are open, this is the largest usual size of any of the composed prompts, or of the recipe's prompt if there are
    none.
    """
    widths, heights = zip(
        *(usual_size(studio.base.pipe, studio.base.name, text) for text in composed or [recipe.text]), strict=True
    )
    return drawable(studio.base.pipe, recipe.width or max(widths), recipe.height or max(heights))


def _train(
    studio: Studio,
    recipe: Recipe,
    config: GateTraining,
    run: TrainingRun,
    progress: TrainingProgress,
    report: ReportProgress,
) -> None:
    pipe, request, seeds = studio.base.pipe, progress.request, held_out.seeds(config.seed)[:SHOWN]
    options = {"width": recipe.width, "height": recipe.height, "guidance_scale": recipe.guidance}

    def on_call(*_: Any) -> None:  # every phase calls the denoiser, so a stop is noticed at once
        progress.called += 1
        report(progress)

    def show(when: str, *seeds: int) -> None:
        for seed in seeds:
            with tiled.get(recipe.binding, nullcontext)():
                (picture,) = sample(pipe, recipe.plain_text, [seed], num_inference_steps=min(recipe.steps, 10), **options)
            progress.pictures = [*progress.pictures, (picture, when.format(seed))]

    def on_update(row: dict) -> None:
        progress.rows = [*progress.rows, row]
        if (row["step"] + 1) % max(request.steps // VALIDATION_PICTURES, 1) == 0:
            show(f"after {row['step'] + 1} updates, seed {{}}", recipe.seed)
        report(progress)

    strengths = recipe.constant_strengths()
    experts = {name: (studio.catalog.expert(name), strength) for name, strength in strengths.items()}
    binding = None if recipe.binding == "none" else recipe.tag_bindings()
    mixture = attach(pipe, dict(sorted(experts.items())), run.first_gates, binding=binding)
    tiled: dict[str, Any] = {BOUND: partial(mixture.tiled, 0), TILES: mixture.tiled}
    with ExitStack() as stack, clip_skip(pipe, recipe.clip_skip):
        stack.callback(pipe.unet.register_forward_pre_hook(on_call).remove)
        progress.doing = "drawing on seeds that the training will not see, before it"
        show("before, seed {}", *seeds, recipe.seed)  # the last begins the series of the updates
        losses = held_out.losses(pipe, mixture, request.data(), config)
        before = [loss() for loss in losses]
        progress.doing, progress.called = "", 0
        report(progress)
        progress.rows = train_gates(
            pipe, mixture, request.data(), config=config, folder=run.folder, resume_from="latest", report=on_update,
            progress=False,
        )  # fmt: skip
        progress.doing = "drawing on seeds that the training has not seen"
        show("after, seed {}", *seeds)
        progress.verdict = held_out.verdict(before, [loss() for loss in losses])
    run.publish(mixture)
