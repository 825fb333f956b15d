"""`mole compose`: a prompt with several LoRAs, beside what each of them does alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mole_diffusers.cli.common import (
    NONE,
    WORLD,
    BaseOption,
    DeviceOption,
    ExpertOption,
    GuidanceOption,
    JsonOption,
    StepsOption,
    VerboseOption,
    experts_for,
    named_values,
    pipeline,
)

if TYPE_CHECKING:
    from mole_diffusers.mixture import Mixture

FirstSeedOption = Annotated[int, Option(help="Seed of the first row; each further row adds 1.")]
RowsOption = Annotated[int, Option(help="Pictures per column, each with its own seed.")]
SheetOption = Annotated[Path, Option(metavar="PNG", help="Where the pictures go, side by side.")]


def compose(
    prompt: Annotated[str, Argument(help="What to draw.")] = "noto drawing of a sunflower and a doughnut",
    expert: ExpertOption = NONE,
    gates: Annotated[
        str | None,
        Option(help="Trained gates, a folder or a hub id, or a family such as mean. Default: the world's own, else sum."),
    ] = None,
    bind: Annotated[
        list[str],
        Option(
            metavar="NAME=WORDS[@REGION]",
            help="Words of the prompt that are a LoRA's, and where it acts: fox=a fox@left, fox=@0,0,0.5,1, fox=everywhere, "
            "fox=fox@mask.png. Default: the file's trigger words, and places found from attention. Repeatable.",
        ),
    ] = NONE,
    unbound: Annotated[bool, Option("--unbound", help="Let every LoRA act on every word and in the whole picture.")] = False,
    base: BaseOption = WORLD,
    device: DeviceOption = None,
    seed: FirstSeedOption = 0,
    rows: RowsOption = 4,
    steps: StepsOption = 20,
    guidance: GuidanceOption = 3.0,
    out: SheetOption = Path("grid.png"),
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw a prompt with several LoRAs, beside the base, each LoRA alone and the plain sum.

    Each LoRA is bound to its own words of the prompt and to a place of its own.

    Without --expert, the LoRAs of the emoji world that the prompt names are taken.
    """
    from tqdm import tqdm

    if "<lora:" in prompt:
        raise ValueError("a prompt with <lora:...> tags is for mole draw; name the files with --expert here")
    seeds = row_seeds(seed, rows)
    experts = experts_for(base, dict(named_values(expert, "--expert")), prompt)
    from mole_diffusers.binding.config import parse_binding
    from mole_diffusers.inspection.compare import columns, sample
    from mole_diffusers.mixture import attach

    own = _world_gates(experts) if base == WORLD and not expert else "sum"
    pipe = pipeline(base, device)
    if unbound and bind:
        raise ValueError("--bind and --unbound exclude each other")
    binding = None if unbound else dict(parse_binding(text, "--bind") for text in bind)
    mixture: Mixture = attach(pipe, experts, gates or own, binding=binding)
    pictures = {}
    for label, context in tqdm(columns(mixture).items(), desc="columns", delay=2, leave=False):
        with context():
            pictures[label] = sample(pipe, prompt, seeds, num_inference_steps=steps, guidance_scale=guidance)
    write_sheet(pictures, seeds, out)
    facts = {"out": str(out), "prompt": prompt, "experts": list(mixture.experts), "gates": mixture.config.to_dict()}
    print(json.dumps(facts) if as_json else f"{prompt}: {out}")


def _world_gates(experts: Mapping[str, Any]) -> str | Path:
    """The emoji world's gates for these experts, where it has them."""
    from mole_diffusers.emoji.world import gate_folders

    return next((folder for name, folder in gate_folders().items() if set(name.split("+")) == set(experts)), "sum")


def row_seeds(seed: int, rows: int) -> list[int]:
    """The seed of each row."""
    if rows < 1:
        raise ValueError(f"--rows must be 1 or more, got {rows}")
    return list(range(seed, seed + rows))


def write_sheet(columns: Mapping[str, Sequence[Any]], seeds: Sequence[int], path: Path) -> None:
    """Write pictures by column label, one per seed, as one sheet."""
    from mole_diffusers.inspection.compare import image_grid

    rows = [[images[i] for images in columns.values()] for i in range(len(seeds))]
    path.parent.mkdir(parents=True, exist_ok=True)
    image_grid(rows, list(columns), [f"seed {s}" for s in seeds]).save(path)
