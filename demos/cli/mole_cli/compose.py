"""`mole compose`: a prompt with several LoRAs, next to their plain sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from errno import ENOENT
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.commands import Result
from mole_cli.common import check_base, completed, experts_for, first_recipe, named_values, once, opened, target

if TYPE_CHECKING:
    from PIL import Image

    from mole_diffusers.mixture import Mixture


@dataclass
class SheetOptions(options.Opening, options.Drawing, options.Output):
    """How pictures of one prompt are drawn side by side.

    Attributes:
        seed: seed of the first row, -1 for a random one; each further row adds 1.
        rows: pictures per column, each with its own seed.
    """

    base: options.Base = WORLD
    seed: options.Seed = 0
    rows: options.AtLeastOne = 4


def compose(
    prompt: Annotated[str, Argument()] = "noto drawing of a sunflower and a doughnut",
    expert: options.Experts = (),
    gates: str = "sum",
    bind: Sequence[str] = (),
    unbound: bool = False,
    alone: bool = False,
    arm: Sequence[str] = (),
    arms_from: options.FileOrFolder = None,
    *,
    sheet: SheetOptions,
) -> Result:
    """Draw a prompt with several LoRAs, next to their plain sum.

    Each LoRA acts on its own words of the prompt and in its own place. If every place has room for a picture of the size
    that the model was trained at, each LoRA's subject is also drawn by itself in some steps, in tiles.

    Without --expert, mole takes the LoRAs of the emoji world that the prompt names.

    Args:
        prompt: what to draw.
        gates: one more column: trained gates (a folder or a hub id), or a family such as mean.
        bind (NAME=WORDS[@REGION]): the words of the prompt that a LoRA acts on, and where it acts: fox=a fox@left,
            fox=@0,0,0.5,1, fox=everywhere, fox=fox@mask.png. Default: the file's trigger words, and places found from
            attention.
        unbound: let every LoRA act on every word and in the whole picture.
        alone: more columns: the base without LoRAs, and each LoRA alone.
        arm (NAME): one more column, by a composer of mole evaluate, such as mean or np; a wrong name lists all.
        arms_from (FILE): a Python file or folder with further composers, all of which are drawn without --arm. It is run.
    """
    from tqdm import tqdm

    if "<lora:" in prompt:
        raise ValueError("a prompt with <lora:...> tags is for mole draw; name the files with --expert here")
    if unbound and bind:
        raise ValueError("--bind and --unbound exclude each other")
    path = target(sheet, "grid.png")
    for mask in (Path(text.partition("@")[2]) for text in bind):
        if mask.suffix.isascii() and mask.suffix[1:].isalpha() and not mask.exists():  # not a box, nor a name such as "left"
            raise FileNotFoundError(ENOENT, "there is no mask", str(mask))
    check_base(sheet.base)
    experts = experts_for(sheet.base, named_values(expert, "--expert"), prompt)
    from mole_app.studio.prompt_weights import plain_texts, tiled_prompt
    from mole_app.studio.weight_syntax import plain_text
    from mole_diffusers.binding import parse_binding
    from mole_diffusers.inspection import columns
    from mole_diffusers.mixture import attach

    binding = None if unbound else once((parse_binding(text, "--bind") for text in bind), "--bind")
    page = PromptSheet(prompt, sheet)
    mixture = attach(page.pipe, experts, gates, binding=binding)
    texts = plain_texts(page.pipe, **page.recipe.call)
    has_tiles = (
        texts is not None and mixture.explain(plain_text(prompt), page.call["width"], page.call["height"]).tiles is not None
    )
    tiles = tiled_prompt(page.pipe, **page.recipe.call) if has_tiles else None
    hashes = {name: expert.sha256 for name, expert in mixture.experts.items()}
    strengths = {name: strength for name, (_, strength) in mixture.weighed().items()}
    ways = columns(mixture, tiles)
    if not alone:
        ways = {label: drawn for label, drawn in ways.items() if label not in ("base", *(f"alone {n}" for n in hashes))}
    ways |= {name: context for name, context in _composers(page, mixture, arm, arms_from).items() if name not in ways}
    for label, context in tqdm(ways.items(), desc="columns", delay=2, leave=False):
        with context():
            page.draw(label)
    if sheet.base == WORLD and (drawing := _true_drawing(plain_text(prompt))):
        page.columns["true drawing"] = [drawing] * sheet.rows
    about = {"gates": mixture.config.to_dict(), "bind": bind, "unbound": unbound, "alone": alone, "arm": arm}
    facts = page.save(path, experts=list(hashes), sha256=hashes, strengths=strengths, **about)
    return Result(facts, f"{prompt}: {path}")


def _composers(
    page: PromptSheet, mixture: Mixture, names: Sequence[str], file: Path | None
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Composers of the evaluation by their names there. They attach the LoRAs of the mixture in their own way.

    Raises ValueError for an unknown one, and for one that cannot draw this prompt.
    """
    from mole_world.evaluation.arms import ARMS, arms_from, chosen_arms
    from mole_world.evaluation.runner import Case, Setup

    strengths = {name: strength for name, (_, strength) in mixture.weighed().items()}
    setup = Setup(page.pipe, mixture.experts, page.call, strengths=strengths)
    case = Case(tuple(strengths), "prompt", page.recipe.plain_text)
    others = arms_from(file)
    arms, lacking = chosen_arms(names or list(others), setup, known=ARMS | others)
    if lacking:
        raise ValueError("; ".join(lacking))
    if unfit := [arm.name for arm in arms if not arm.covers(case)]:
        raise ValueError(f"the composer {unfit[0]!r} does not draw {len(strengths)} LoRAs")
    return {arm.name: partial(arm.draws, setup, case) for arm in arms}


def _true_drawing(prompt: str) -> Any:
    """The drawing by the emoji world's artists; None if the prompt names nothing of that world."""
    import mole_world

    scene = mole_world.scene_in(prompt)
    return mole_world.Drawings(mole_world.default_folder()).picture(scene) if scene else None


class PromptSheet:
    """Pictures of one prompt side by side: a column for each way of drawing it, a row for each seed.

    Puts the sampler on the pipeline, and notes on stderr which of the given options are changed or ignored.

    Attributes:
        recipe: of the first row, without LoRAs.
        call: options of the pipeline's calls.
        columns: label -> pictures, one per seed.
    """

    def __init__(self, prompt: str, how: SheetOptions):
        from mole_app.studio.catalog import Catalog
        from mole_app.studio.render import Studio
        from mole_app.studio.samplers import sampler

        base = opened(how.base, how, says=True)
        studio = Studio(base.pipe, Catalog({}, {}), base.name)
        drawing = {name: vars(how)[name] for name in options.DRAWING}
        recipe = completed(studio, first_recipe(studio, prompt=prompt, seed=how.seed, gates="sum", **drawing))
        self.pipe, self.recipe, self.seeds = base.pipe, recipe, list(range(recipe.seed, recipe.seed + how.rows))
        self.pipe.scheduler = sampler(recipe.sampler, self.pipe.scheduler, self.seeds)
        self.call = {"num_inference_steps": recipe.steps, "guidance_scale": recipe.guidance}
        self.call |= {"width": recipe.width, "height": recipe.height}
        self.columns: dict[str, Sequence[Image.Image]] = {}

    def draw(self, label: str) -> None:
        """Draw a column: one picture per seed, each with its own generator."""
        import torch

        from mole_app.studio.prompt_weights import call_arguments

        texts = call_arguments(self.pipe, **self.recipe.call)
        count = len(self.seeds)
        rows = {n: [v] * count if isinstance(v, str) else v.repeat_interleave(count, 0) for n, v in texts.items()}
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]
        self.columns[label] = self.pipe(**rows, generator=generators, **self.call).images

    def save(self, path: Path, **facts: Any) -> dict[str, Any]:
        """Write the sheet, with `facts` and a description of its contents in the file. Returns these and the path."""
        from mole_app.studio import infotext
        from mole_diffusers.inspection import image_grid

        recipe = self.recipe.to_dict()
        about = {name: recipe[name] for name in ("prompt", "negative", "prompt_2", "negative_2", "base", "sampler")}
        about |= facts | {"seeds": self.seeds} | self.call
        rows = list(zip(*self.columns.values(), strict=True))
        sheet = image_grid(rows, list(self.columns), [f"seed {seed}" for seed in self.seeds])
        infotext.save(sheet, path, None, {"columns": list(self.columns), **about})
        return {"out": str(path), **about}
