"""`mole compose`: a prompt with several LoRAs, next to their plain sum."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from errno import ENOENT
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.common import check_base, completed, experts_for, first_recipe, named_values, once, opened, target
from mole_cli.console import show

if TYPE_CHECKING:
    from PIL import Image

    from mole_diffusers.mixture import Mixture


def compose(
    prompt: options.Prompt = "noto drawing of a sunflower and a doughnut",
    expert: options.Experts = [],
    gates: Annotated[
        str, Option(help="one more column: trained gates (a folder or a hub id), or a gate type such as mean.")
    ] = "sum",
    bind: Annotated[
        list[str],
        Option(
            metavar="NAME=WORDS[@REGION]",
            show_default=False,
            help="the words of the prompt that a LoRA acts on, and where it acts: fox=a fox@left, fox=@0,0,0.5,1, "
            "fox=everywhere, fox=fox@mask.png. Default: the file's trigger words, and places found from attention. "
            "Repeatable.",
        ),
    ] = [],
    unbound: Annotated[bool, Option("--unbound", help="let every LoRA act on every word and in the whole picture.")] = False,
    alone: Annotated[bool, Option("--alone", help="more columns: the base without LoRAs, and each LoRA alone.")] = False,
    method: Annotated[
        list[str],
        Option(
            metavar="NAME",
            help="one more column, by a composer of mole evaluate, such as mean or np; a wrong name lists all. Repeatable.",
        ),
    ] = [],
    methods_from: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            help="a Python file or folder with further composers, all of which are drawn without --method. It is run.",
        ),
    ] = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    negative: options.Negative = None,
    prompt_2: options.Prompt2 = None,
    negative_2: options.Negative2 = None,
    steps: options.Steps = None,
    guidance: options.Guidance = None,
    width: options.Width = None,
    height: options.Height = None,
    sampler: options.Sampler = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    compiled: options.Compiled = False,
    dtype: options.Dtype = None,
    offload: options.Offload = None,
    slicing: options.Slicing = None,
    tiling: options.Tiling = None,
    base: options.Base = "emoji",
    seed: options.FirstSeed = 0,
    rows: options.Rows = 4,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Draw a prompt with several LoRAs, next to their plain sum.

    Each LoRA acts on its own words of the prompt and in its own place. If every place has room for a picture of the size
    that the model was trained at, each LoRA's subject is also drawn by itself in some steps, in tiles.

    Without --expert, mole takes the LoRAs of the emoji world that the prompt names.
    """
    how = dict(locals())
    from tqdm import tqdm

    if "<lora:" in prompt:
        raise ValueError("a prompt with <lora:...> tags is for mole draw; name the files with --expert here")
    if unbound and bind:
        raise ValueError("--bind and --unbound exclude each other")
    path = target(out, "grid.png", overwrite=overwrite)
    for mask in (Path(text.partition("@")[2]) for text in bind):
        if mask.suffix.isascii() and mask.suffix[1:].isalpha() and not mask.exists():  # not a box, nor a name such as "left"
            raise FileNotFoundError(ENOENT, "there is no mask", str(mask))
    check_base(base)
    experts = experts_for(base, named_values(expert, "--expert"), prompt)
    from mole_app.studio.prompt_weights import plain_texts, tiled_prompt
    from mole_app.studio.weight_syntax import plain_text
    from mole_diffusers.binding import parse_binding
    from mole_diffusers.inspection import columns
    from mole_diffusers.mixture import attach

    binding = None if unbound else once((parse_binding(text, "--bind") for text in bind), "--bind")
    page = PromptSheet(prompt, how)
    mixture = attach(page.pipe, experts, gates, binding=binding)
    texts = plain_texts(page.pipe, **page.recipe.call)
    tiles = None
    if texts is not None and "prompt_2" not in texts:  # of which tiles would know nothing
        size = {"width": page.recipe.width, "height": page.recipe.height}
        if mixture.explain(texts["prompt"], **size).tiles is not None:
            tiles = tiled_prompt(page.pipe, **page.recipe.call)
    hashes = {name: expert.sha256 for name, expert in mixture.experts.items()}
    strengths = {name: strength for name, (_, strength) in mixture.weighed().items()}
    ways = columns(mixture, tiles)
    if not alone:
        ways = {label: drawn for label, drawn in ways.items() if label not in ("base", *(f"alone {n}" for n in hashes))}
    ways |= {name: context for name, context in _composers(page, mixture, method, methods_from).items() if name not in ways}
    for label, context in tqdm(ways.items(), desc="columns", delay=2, leave=False):
        with context():
            page.draw(label)
    if base == WORLD and (drawing := _true_drawing(plain_text(prompt))):
        page.columns["true drawing"] = [drawing] * rows
    about = {
        "gates": mixture.config.to_dict(),
        "bind": list(bind),
        "unbound": unbound,
        "alone": alone,
        "method": list(method),
    }
    facts = page.save(path, experts=list(hashes), sha256=hashes, strengths=strengths, **about)
    show(facts, f"{prompt}: {path}", as_json=as_json)


def _composers(
    page: PromptSheet, mixture: Mixture, names: Sequence[str], file: Path | None
) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Composers of the evaluation by their names there. They attach the LoRAs of the mixture in their own way.

    Raises ValueError for an unknown one, and for one that cannot draw this prompt.
    """
    from mole_world.evaluation.methods import METHODS, chosen_methods, methods_from
    from mole_world.evaluation.runner import Case, Setup

    strengths = {name: strength for name, (_, strength) in mixture.weighed().items()}
    setup = Setup(page.pipe, mixture.experts, page.call, strengths=strengths)
    case = Case(tuple(strengths), "prompt", page.recipe.plain_text)
    others = methods_from(file)
    methods, lacking = chosen_methods(names or list(others), setup, known=METHODS | others)
    if lacking:
        raise ValueError("; ".join(lacking))
    if unfit := [method.name for method in methods if not method.covers(case)]:
        raise ValueError(f"the composer {unfit[0]!r} does not draw {len(strengths)} LoRAs")
    return {method.name: partial(method.draws, setup, case) for method in methods}


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

    def __init__(self, prompt: str, how: Mapping[str, Any]):
        from mole_app.studio.catalog import Catalog
        from mole_app.studio.render import Studio
        from mole_app.studio.samplers import sampler

        base = opened(how["base"], how, says=True)
        studio = Studio(base.pipe, Catalog({}, {}), base.name)
        drawing = {name: how[name] for name in options.DRAWING}
        recipe = completed(studio, first_recipe(studio, prompt=prompt, seed=how["seed"], gates="sum", **drawing))
        self.pipe, self.recipe, self.seeds = base.pipe, recipe, list(range(recipe.seed, recipe.seed + how["rows"]))
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
