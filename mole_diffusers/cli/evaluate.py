"""`mole evaluate`: composers side by side on many cases and seeds, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import chosen_device, experts_for, grouped_values, named_values, pipeline
from mole_diffusers.cli.console import note
from mole_diffusers.cli.options import NONE, WORLD

if TYPE_CHECKING:
    from mole_diffusers.evaluation.report import Report
    from mole_diffusers.evaluation.rows import Row
    from mole_diffusers.evaluation.runner import Arm, Case, Setup

measured = partial(Option, rich_help_panel="A checkpoint of your own")
choosing = partial(Option, rich_help_panel="Choose and judge")


class Real:
    """What a checkpoint is evaluated with; the emoji world has its own."""

    expert: options.Experts = NONE
    cases: Annotated[Path | None, measured(metavar="FILE", help='JSON lines: {"concepts": ["a", "b"], "prompt": ".."}.')] = (
        None
    )
    images: Annotated[list[str], measured(metavar="NAME=FOLDER", help="A concept's own pictures. Repeatable.")] = NONE
    own: Annotated[list[str], measured(metavar="NAME=PROMPT", help="A prompt of one concept alone. Repeatable.")] = NONE
    style: Annotated[list[str], measured(metavar="NAME", help="A concept that is a style. Repeatable.")] = NONE
    clip: Annotated[str | None, measured(metavar="MODEL", help="A CLIP to measure with.")] = None
    dino: Annotated[str | None, measured(metavar="MODEL", help="A DINO to measure with.")] = None


@options.takes(real=Real)
def evaluate(
    arm: Annotated[
        list[str],
        Option(
            metavar="NAME",
            help="A composer: base, alone, sum, mean, bound, 'words only', tiles, 'grid search', the methods of merge, "
            "switch, composite, k-lora, 'masked blend', freefuse, gates, 'bound gates', 'gates uniform', 'gates random', "
            "'gates hardened', 'gates averaged'. Repeatable. Default: all of them.",
        ),
    ] = NONE,
    gates: Annotated[
        Path | None, Option(metavar="FOLDER", help="Trained gates, one folder per case, named a+b. The world has its own.")
    ] = None,
    split: Annotated[
        Literal["validation", "test"], Option(help="Which cases of the emoji world. Choose on validation; run test once.")
    ] = "validation",
    limit: Annotated[int | None, Option(min=1, help="Cases per kind. Default: all.")] = None,
    attached: Annotated[
        list[int], Option(metavar="N", help="Attach N LoRAs, some of which the prompt does not ask for. Repeatable.")
    ] = [],  # noqa: B006
    share: Annotated[
        list[float],
        Option(metavar="SHARE", help="Move strength from subjects, 0, to styles, 1. For sum, gates and merges. Repeatable."),
    ] = [],  # noqa: B006
    seeds: Annotated[int, Option(min=1, help="Pictures per case.")] = 8,
    seed: Annotated[int, Option(help="The first seed.")] = 1000,
    steps: options.Steps = 20,
    guidance: Annotated[float, Option(help="How strictly the prompt is followed.")] = 3.0,
    device: options.Device = None,
    out: Annotated[Path, Option(metavar="FOLDER", help="Pictures, rows, tables and figures go here.")] = Path("evaluation"),
    as_json: options.Json = False,
    base: options.Base = WORLD,
    base_config: options.BaseConfig = None,
    search: Annotated[bool, choosing("--search", help="Find the best strengths on validation, for weights.json.")] = False,
    weights: Annotated[
        Path | None, choosing(metavar="FILE", help="Strengths for the arm 'grid search', as in weights.json.")
    ] = None,
    sheet: Annotated[bool, choosing("--sheet", help="Write a sheet on which people choose between two arms.")] = False,
    judged: Annotated[bool, choosing("--judged", help="Count the answers on the sheet in --out, and stop.")] = False,
    verbose: options.Verbose = False,
    *,
    real: options.Given,
) -> None:
    """Compare ways to compose LoRAs, on many prompts and seeds, with intervals.

    A run that was cut off goes on where it was. `accelerate launch` and `torchrun` divide it over processes.
    """
    from accelerate import PartialState

    from mole_diffusers.evaluation import checkpoint_protocol, emoji_protocol, judging_sheet, runner
    from mole_diffusers.evaluation.arms import check_names
    from mole_diffusers.evaluation.rows import Rows
    from mole_diffusers.evaluation.strength_search import best_weights, search_arms

    if judged:
        print(json.dumps(judging_sheet.votes(out)) if as_json else judging_sheet.count_answers(out))
        return
    if search:
        _check_search(base, split, {"--arm": arm, "--share": share, "--weights": weights})
    check_names(arm)
    state = PartialState(cpu=device == "cpu")
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    if base == WORLD:
        others = {**real, "base-config": base_config}
        setup, chosen, metrics, gates = _world(others, call, split=split, limit=limit, gates=gates, device=device)
    else:
        setup, chosen, metrics = _checkpoint(real, call, base, base_config, limit=limit, device=device)
    if attached:
        chosen = runner.add_idle_experts(chosen, sorted(setup.experts), attached)
    arms = search_arms(setup) if search else _arms(arm, setup, chosen, gates=gates, shares=share, weights=weights)
    asked: Any = {"seeds": range(seed, seed + seeds), "rows": Rows(out, state.process_index)}
    runner.evaluate(setup, arms, chosen, metrics, **asked, processes=state.num_processes)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    rows = runner.requested_rows(setup, arms, chosen, **asked)
    report = emoji_protocol.REPORT if base == WORLD else checkpoint_protocol.report(setup.styles)
    text = report.text(rows)
    (out / "table.md").write_text(text + "\n")
    print(json.dumps(rows) if as_json else text)
    if search:
        (out / "weights.json").write_text(json.dumps(best_weights(rows), indent=1) + "\n")
    if sheet:
        note(f"{judging_sheet.write_sheet(out, rows)} questions in {out / 'sheet'}")
    if find_spec("matplotlib") is None:
        note("figures need matplotlib: pip install 'mole-diffusers[plot]'")
        return
    _figures(out, rows, report, attached=bool(attached), share=bool(share))
    _heat_map(out / "gates.png", setup, arms, chosen)


def _check_search(base: str, split: str, arms: Mapping[str, Any]) -> None:
    """Raises ValueError where --search would not count successes, choose by the test split, or draw other arms."""
    if given := [option for option, value in arms.items() if value]:
        raise ValueError(f"--search draws arms of its own: leave out {', '.join(given)}")
    if base != WORLD:
        raise ValueError("--search counts successes, which only the judge of the embedded world tells")
    if split == "test":
        raise ValueError("--search chooses strengths, and nothing is chosen on the test split: use --split validation")


def _world(
    others: options.Given, call: dict[str, Any], *, split: str, limit: int | None, gates: Path | None, device: str | None
) -> tuple[Setup, list[Case], Any, Path]:
    """Experts, cases, judge and gates of the embedded world. Raises ValueError for options that are for another base."""
    from mole_diffusers import emoji
    from mole_diffusers.emoji.world import emoji_world
    from mole_diffusers.evaluation import emoji_protocol

    if ignored := [f"--{name}" for name, value in others.items() if value]:
        raise ValueError(f"{', '.join(ignored)}: the embedded world has its own; give a --base to evaluate another")
    world = emoji_world(device=chosen_device(device))
    groups = emoji.TEST if split == "test" else emoji.VALIDATION
    found = emoji_protocol.cases({kind: group[:limit] for kind, group in groups.items()})
    metrics = emoji_protocol.JudgeMetrics(world.judge(), found)
    return emoji_protocol.setup(world, call), [case for case, _ in found], metrics, gates or world.folder / "gates"


def _checkpoint(
    real: options.Given, call: dict[str, Any], base: str, config: str | None, *, limit: int | None, device: str | None
) -> tuple[Setup, list[Case], Any]:
    """Experts, cases and measures of a checkpoint of the user's own."""
    from mole_diffusers.evaluation.checkpoint_protocol import ClipDinoMetrics, read_cases
    from mole_diffusers.evaluation.runner import Setup

    chosen = experts_for(base, named_values(real["expert"], "--expert"), "")
    cases = read_cases(real["cases"], list(chosen)) if real["cases"] is not None else []
    if missing := [f"--{name}" for name in ("cases", "clip", "dino") if real[name] is None]:
        raise ValueError(f"evaluating a real checkpoint needs {', '.join(missing)}")
    folders = {name: Path(folder) for name, folder in named_values(real["images"], "--images", chosen).items()}
    prompts = grouped_values(real["own"], "--own", chosen)
    metrics = ClipDinoMetrics(real["clip"], real["dino"], folders, device=chosen_device(device))
    if unknown := set(real["style"]) - set(chosen):
        raise ValueError(f"--style {sorted(unknown)}: no such experts; known: {sorted(chosen)}")
    setup = Setup(
        pipeline(base, device, config=config),
        {name: expert for name, (expert, _) in chosen.items()},
        call,
        base,
        prompts=prompts,
        styles=frozenset(real["style"]),
        strengths={name: strength for name, (_, strength) in chosen.items() if strength != 1},
        metrics=metrics.settings,
    )
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return setup, [case for group in kinds.values() for case in group[:limit]], metrics


def _arms(
    asked: Sequence[str],
    setup: Setup,
    cases: Sequence[Case],
    *,
    gates: Path | None,
    shares: Sequence[float],
    weights: Path | None,
) -> list[Arm]:
    """The arms that were asked for, or all that can be drawn; what is left out is said."""
    from mole_diffusers.evaluation import arms as known
    from mole_diffusers.evaluation.strength_search import read_weights

    strengths = read_weights(weights) if weights else None
    names = list(asked) or (["sum", "gates"] if shares else list(known.ARMS))
    if strengths and "grid search" not in names:
        raise ValueError("--weights are for the arm 'grid search', which is not drawn here")
    if not asked:
        blocked = known.obstacles(names, setup, gates, weights=strengths)
        for reason in blocked.values():
            note(f"left out: {reason}")
        names = [name for name in names if name not in blocked]
    arms = known.chosen_arms(names, setup, gates, weights=strengths, shares=shares)
    idle = [a.name for a in arms if not any(map(a.covers, cases)) and not a.name.startswith("alone ")]
    if idle:
        first = known.gates_of(Path())(cases[0])
        reason = f"{idle} can draw none of the cases (gates: {gates}, where {first} is the first's folder)"
        if asked:
            raise ValueError(reason)
        note(f"left out: {reason}")
    return arms


def _figures(out: Path, rows: list[Row], report: Report, *, attached: bool, share: bool) -> None:
    """Every figure that the rows allow; one that was asked for and is not possible is said."""
    from mole_diffusers.evaluation import plots

    plots.sample_grid(rows, out, out / "samples.png", case=rows[0]["case"])
    report.draw_bars(rows, out / "bars.png")
    asked = {"experts": (attached, report.draw_count), "frontier": (share, report.draw_frontier)}
    for name, (wanted, draw) in asked.items():
        try:
            if wanted:
                draw(rows, out / f"{name}.png")
        except ValueError as error:
            note(f"no {name}.png: {error}")


def _heat_map(path: Path, setup: Setup, arms: Sequence[Arm], cases: Sequence[Case]) -> None:
    """What trained gates decide, for the first case that has them."""
    from mole_diffusers.inspection.compare import sample
    from mole_diffusers.inspection.gate_figures import block_places, heat_map

    seen = next(((arm, case) for arm in arms for case in cases if arm.name == "gates" and arm.covers(case)), None)
    if seen is not None:
        arm, case = seen
        with arm.draws(setup, case) as mixture, mixture.trace() as trace:
            sample(setup.pipe, case.prompt, [0], **setup.call_of(case))
        heat_map(trace, block_places(trace)).save(path)
