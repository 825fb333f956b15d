"""`mole evaluate`: compare composers on many cases and seeds, with intervals."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from mole_diffusers.cli import options
from mole_diffusers.cli.commands import Group, Result
from mole_diffusers.cli.common import experts_for, grouped_values, named_values, opened
from mole_diffusers.cli.console import hide_loading_bars, note
from mole_diffusers.studio.names import WORLD

if TYPE_CHECKING:
    from mole_diffusers.evaluation.report import EvaluationReport
    from mole_diffusers.evaluation.rows import Row
    from mole_diffusers.evaluation.runner import Arm, Case, Setup


@dataclass
class ArmOptions(Group):
    """What to draw, and with which arms.

    Attributes:
        arm (NAME): a composer: base, alone, sum, mean, bound, 'words only', tiles, 'grid search', the methods of merge,
            switch, composite, k-lora, 'masked blend', freefuse, gates, 'bound gates', 'gates uniform', 'gates random',
            'gates hardened', 'gates averaged'. Default: all of them.
        gates (FOLDER): trained gates, one folder per case, named a+b. The emoji world has its own.
        split: which cases of the emoji world. Choose on validation; run test once.
        limit: cases per kind. Default: all.
        attached (N): attach N LoRAs, some of which the prompt does not name.
        share (SHARE): move strength from subjects, 0, to styles, 1. For sum, gates and merges.
        weights (FILE): strengths for the arm 'grid search', in the format of weights.json.
        search: find the best strengths on validation, for weights.json.
    """

    arm: Sequence[str] = ()
    gates: Path | None = None
    split: Literal["validation", "test"] = "validation"
    limit: Annotated[int | None, Option(min=1)] = None
    attached: Sequence[int] = ()
    share: Sequence[float] = ()
    weights: Path | None = None
    search: bool = False


@dataclass
class CheckpointOptions(Group):
    """Data to evaluate a checkpoint on; the emoji world has its own.

    Attributes:
        cases (FILE): JSON lines: {"concepts": ["a", "b"], "prompt": ".."}.
        images (NAME=FOLDER): pictures of a concept.
        own (NAME=PROMPT): a prompt for one concept alone.
        style (NAME): a concept that is a style.
        clip (MODEL): a CLIP to measure with.
        dino (MODEL): a DINO to measure with.
    """

    panel = "A checkpoint of your own"
    expert: options.Experts = ()
    cases: Path | None = None
    images: Sequence[str] = ()
    own: Sequence[str] = ()
    style: Sequence[str] = ()
    clip: str | None = None
    dino: str | None = None


def evaluate(
    seeds: options.AtLeastOne = 8,
    seed: int = 1000,
    steps: options.Steps = 20,
    guidance: float = 3.0,
    out: Path = Path("evaluation"),
    base: options.Base = WORLD,
    sheet: bool = False,
    judged: bool = False,
    *,
    wanted: ArmOptions,
    own: CheckpointOptions,
    machine: options.Machine,
) -> Result | None:
    """Compare ways to compose LoRAs on many prompts and seeds, with intervals.

    An interrupted run continues where it stopped. `accelerate launch` and `torchrun` divide it over processes.

    Args:
        seeds: pictures per case.
        seed: the first seed.
        guidance: how strictly to follow the prompt.
        out (FOLDER): pictures, rows, tables and figures go here.
        sheet: write a sheet on which people choose between two arms.
        judged: count the answers on the sheet in --out, and stop.
    """
    _check_pandas()
    from accelerate import PartialState

    from mole_diffusers import emoji
    from mole_diffusers.evaluation import checkpoint_protocol, emoji_protocol, judging_sheet, runner
    from mole_diffusers.evaluation.arms import check_names
    from mole_diffusers.evaluation.rows import Rows
    from mole_diffusers.evaluation.strength_search import best_weights, search_arms
    from mole_diffusers.lora.whole_files import write_text

    if judged:
        return Result(judging_sheet.votes(out), judging_sheet.count_answers(out))
    hide_loading_bars()
    if wanted.search:
        _check_search(base, wanted)
    check_names(wanted.arm)
    state = PartialState(cpu=machine.device == "cpu")
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    if base == WORLD:
        setup, cases, metrics = _world(wanted, own, call, machine)
        wanted = replace(wanted, gates=wanted.gates or emoji.default_folder() / "gates")
    else:
        setup, cases, metrics = _checkpoint(wanted, own, call, base, machine)
    if wanted.attached:
        cases = runner.add_idle_experts(cases, sorted(setup.experts), wanted.attached)
    arms = search_arms(setup) if wanted.search else _arms(wanted, setup, cases)
    if sheet and all(sum(arm.covers(case) for arm in arms) < 2 for case in cases):
        raise ValueError("a sheet needs two arms or more that draw the same case")
    asked: Any = {"seeds": range(seed, seed + seeds), "rows": Rows(out, state.process_index)}
    runner.evaluate(setup, arms, cases, metrics, **asked, processes=state.num_processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    rows = runner.requested_rows(setup, arms, cases, **asked)
    report = emoji_protocol.REPORT if base == WORLD else checkpoint_protocol.report(setup.styles)
    text = report.text(rows)
    write_text(out / "table.md", text + "\n")
    if wanted.search:
        (out / "weights.json").write_text(json.dumps(best_weights(rows), indent=1) + "\n")
    if sheet:
        note(f"{judging_sheet.write_sheet(out, rows)} questions in {out / 'sheet'}")
    if find_spec("matplotlib") is None:
        note("figures need matplotlib: pip install 'mole-diffusers[evaluation]'")
    else:
        _figures(out, rows, report, attached=bool(wanted.attached), share=bool(wanted.share))
        _heat_map(out / "gates.png", setup, arms, cases)
    return Result(rows, text)


def _check_pandas() -> None:
    if find_spec("pandas") is None:
        raise ValueError("this needs pandas: pip install 'mole-diffusers[evaluation]'")


def _check_search(base: str, wanted: ArmOptions) -> None:
    """Raises ValueError if --search would not count successes, would choose by the test split, or would draw other arms."""
    if given := [f"--{name}" for name in ("arm", "share", "weights") if getattr(wanted, name)]:
        raise ValueError(f"--search draws arms of its own: leave out {', '.join(given)}")
    if base != WORLD:
        raise ValueError("--search counts successes, which only the judge of the embedded world tells")
    if wanted.split == "test":
        raise ValueError("--search chooses strengths, and nothing is chosen on the test split: use --split validation")


def _world(
    wanted: ArmOptions, own: CheckpointOptions, call: dict[str, Any], machine: options.Machine
) -> tuple[Setup, list[Case], Any]:
    """Experts, cases and judge of the emoji world. Raises ValueError for options that are for another base."""
    from mole_diffusers import emoji
    from mole_diffusers.emoji.world import emoji_world
    from mole_diffusers.evaluation import emoji_protocol

    others = {**vars(own), "base-config": machine.base_config}
    if ignored := [f"--{name}" for name, value in others.items() if value]:
        raise ValueError(f"{', '.join(ignored)}: the embedded world has its own; give a --base to evaluate another")
    world = emoji_world(device=_device(machine))
    groups = emoji.TEST if wanted.split == "test" else emoji.VALIDATION
    found = emoji_protocol.cases({kind: group[: wanted.limit] for kind, group in groups.items()})
    metrics = emoji_protocol.JudgeMetrics(world.judge(), found)
    return emoji_protocol.setup(world, call), [case for case, _ in found], metrics


def _device(machine: options.Machine) -> str:
    """The device of --device; by default the GPU, if there is one. ValueError if this machine does not have it."""
    from mole_diffusers.studio.memory import Memory

    memory = Memory(machine.device)
    memory.check_device()
    return memory.completed("").device or "cpu"


def _checkpoint(
    wanted: ArmOptions, own: CheckpointOptions, call: dict[str, Any], base: str, machine: options.Machine
) -> tuple[Setup, list[Case], Any]:
    """Experts, cases and measures of the user's own checkpoint."""
    from mole_diffusers.evaluation.checkpoint_protocol import ClipDinoMetrics, read_cases
    from mole_diffusers.evaluation.runner import Setup

    chosen = experts_for(base, named_values(own.expert, "--expert"), "")
    cases = read_cases(own.cases, list(chosen)) if own.cases is not None else []
    if own.cases is None or own.clip is None or own.dino is None:
        missing = [f"--{name}" for name in ("cases", "clip", "dino") if getattr(own, name) is None]
        raise ValueError(f"evaluating a real checkpoint needs {', '.join(missing)}")
    folders = {name: Path(folder) for name, folder in named_values(own.images, "--images", chosen).items()}
    prompts = grouped_values(own.own, "--own", chosen)
    metrics = ClipDinoMetrics(own.clip, own.dino, folders, device=_device(machine))
    if unknown := set(own.style) - set(chosen):
        raise ValueError(f"--style {sorted(unknown)}: no such experts; known: {sorted(chosen)}")
    experts = {name: expert for name, (expert, _) in chosen.items()}
    about: dict[str, Any] = {"prompts": prompts, "styles": frozenset(own.style), "metrics": metrics.settings}
    about["strengths"] = {name: strength for name, (_, strength) in chosen.items() if strength != 1}
    setup = Setup(opened(base, machine).pipe, experts, call, base, **about)
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return setup, [case for group in kinds.values() for case in group[: wanted.limit]], metrics


def _arms(wanted: ArmOptions, setup: Setup, cases: Sequence[Case]) -> list[Arm]:
    """The arms of --arm, or all that can be drawn; a note lists those that are left out."""
    from mole_diffusers.evaluation import arms as known
    from mole_diffusers.evaluation.strength_search import read_weights

    gates, shares, strengths = wanted.gates, wanted.share, read_weights(wanted.weights) if wanted.weights else None
    names = list(wanted.arm) or (["sum", "gates"] if shares else list(known.ARMS))
    if strengths and "grid search" not in names:
        raise ValueError("--weights are for the arm 'grid search', which is not drawn here")
    if not wanted.arm:
        blocked = known.obstacles(names, setup, gates, weights=strengths)
        for reason in blocked.values():
            note(f"left out: {reason}")
        names = [name for name in names if name not in blocked]
    arms = known.chosen_arms(names, setup, gates, weights=strengths, shares=shares)
    if idle := [a.name for a in arms if not any(map(a.covers, cases)) and not a.name.startswith("alone ")]:
        first = known.gates_of(Path())(cases[0])
        reason = f"{idle} can draw none of the cases (gates: {gates}, where {first} is the first's folder)"
        if wanted.arm:
            raise ValueError(reason)
        note(f"left out: {reason}")
    return arms


def _figures(out: Path, rows: list[Row], report: EvaluationReport, *, attached: bool, share: bool) -> None:
    """Draw every figure that the rows allow, and note each one that was asked for but is not possible."""
    from mole_diffusers.evaluation import plots

    plots.sample_grid(rows, out, out / "samples.png")
    report.draw_bars(rows, out / "bars.png")
    asked = {"experts": (attached, report.draw_count), "frontier": (share, report.draw_frontier)}
    for name, (wanted, draw) in asked.items():
        try:
            if wanted:
                draw(rows, out / f"{name}.png")
        except ValueError as error:
            note(f"no {name}.png: {error}")


def _heat_map(path: Path, setup: Setup, arms: Sequence[Arm], cases: Sequence[Case]) -> None:
    """The weights of trained gates, for the first case that has them."""
    from mole_diffusers.inspection.compare import sample
    from mole_diffusers.inspection.gate_figures import block_places, heat_map

    seen = next(((arm, case) for arm in arms for case in cases if arm.name == "gates" and arm.covers(case)), None)
    if seen is not None:
        arm, case = seen
        with arm.draws(setup, case) as mixture, mixture.trace() as trace:
            sample(setup.pipe, case.prompt, [0], **setup.call_of(case))
        heat_map(trace, block_places(trace)).save(path)
