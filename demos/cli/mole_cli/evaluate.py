"""`mole evaluate`: compare composers on many cases and seeds, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from typer import Context, Option

from mole_app.studio.names import WORLD
from mole_cli import options
from mole_cli.common import experts_for, grouped_values, lora_files, named_values, opened
from mole_cli.console import note, show

if TYPE_CHECKING:
    from accelerate import PartialState

    from mole_world.evaluation.methods import KnownMethod
    from mole_world.evaluation.report import EvaluationReport
    from mole_world.evaluation.rows import Row, Rows
    from mole_world.evaluation.runner import Case, Method, Metrics, Setup

NEEDED = ("jinja2", "krippendorff", "matplotlib", "open_clip", "pandas", "scipy", "timm", "torchmetrics", "torchvision")
DEFAULT_METHODS = ("base", "alone", "sum", "bound", "tiles")  # on a checkpoint, where pictures take long
LIMIT = 24  # cases of each kind on a checkpoint
MEASURING = ("clip", "dino", "detector", "lpips")  # options that are models
FOR_CHECKPOINTS = ("loras", "expert", "protocol", "cases", "images", "own", "kind", "subject", *MEASURING, "base_config")


def evaluate(
    ctx: Context,
    seeds: Annotated[int, Option(min=1, help="pictures per case.")] = 8,
    seed: Annotated[int, Option(help="the first seed.")] = 1000,
    steps: Annotated[int, Option(min=1, help="steps of the sampler: more take longer.")] = 20,
    guidance: Annotated[float, Option(help="how strictly to follow the prompt.")] = 3.0,
    out: Annotated[Path, Option(metavar="FOLDER", help="pictures, rows, tables and figures go here.")] = Path("evaluation"),
    base: options.Base = "emoji",
    sheet: Annotated[bool, Option("--sheet", help="write a sheet on which people choose between two methods.")] = False,
    judged: Annotated[bool, Option("--judged", help="count the answers on the sheet in --out, and stop.")] = False,
    method: Annotated[
        list[str],
        Option(
            metavar="NAME",
            show_default=False,
            help="a composer, such as alone, sum, 'words only' or a method of merge; a wrong name lists all. Default: "
            "all of "
            "them; on a checkpoint base, alone, sum, bound, tiles, and with --gates also gates and 'bound gates'. "
            "Repeatable.",
        ),
    ] = [],
    methods_from: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            help="a Python file or folder with further methods, all of which are drawn without --method. It is run.",
        ),
    ] = None,
    gates: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            help="trained gates, one folder per case, named a+b. The emoji world has its own.",
        ),
    ] = None,
    split: Annotated[
        Literal["validation", "test"], Option(help="which cases of the emoji world. Choose on validation; run test once.")
    ] = "validation",
    limit: Annotated[
        int | None,
        Option(min=1, show_default=False, help="cases per kind. Default: all; of prompts made from trigger words, 24."),
    ] = None,
    attached: Annotated[
        list[int], Option(metavar="N", help="attach N LoRAs, some of which the prompt does not name. Repeatable.")
    ] = [],
    share: Annotated[
        list[float],
        Option(metavar="SHARE", help="move strength from subjects, 0, to styles, 1. For sum, gates and merges. Repeatable."),
    ] = [],
    weights: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            help="strengths for the method 'grid search', in the format of weights.json.",
        ),
    ] = None,
    search: Annotated[bool, Option("--search", help="find the best strengths on validation, for weights.json.")] = False,
    loras: Annotated[
        Path | None,
        Option(
            metavar="FOLDER",
            exists=True,
            file_okay=False,
            rich_help_panel="A checkpoint of your own",
            help="the LoRAs, in subfolders too. A subfolder or the start of a name may say what one draws: character, "
            "object, clothing, style or background.",
        ),
    ] = None,
    expert: Annotated[
        list[str],
        Option(
            metavar="NAME=FILE[:STRENGTH]",
            rich_help_panel="A checkpoint of your own",
            help="a LoRA file and the name you give it. Repeatable.",
        ),
    ] = [],
    protocol: Annotated[
        list[str],
        Option(
            metavar="NAME",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="prompts made from the trigger words: composlora, pairs, triples, styles, neutral, occlusion, interaction, "
            "scenes, contact. Default: all that the LoRAs allow. Repeatable.",
        ),
    ] = [],
    cases: Annotated[
        Path | None,
        Option(
            metavar="FILE",
            exists=True,
            dir_okay=False,
            rich_help_panel="A checkpoint of your own",
            help='prompts of your own, as JSON lines: {"concepts": ["a", "b"], "prompt": ".."}.',
        ),
    ] = None,
    images: Annotated[
        list[str],
        Option(
            metavar="NAME=FOLDER",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="pictures of a concept. Default: pictures that its LoRA draws alone. Repeatable.",
        ),
    ] = [],
    own: Annotated[
        list[str],
        Option(
            metavar="NAME=PROMPT",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="a prompt for one concept alone. Default: one from its trigger words. Repeatable.",
        ),
    ] = [],
    kind: Annotated[
        list[str],
        Option(
            metavar="NAME=KIND",
            rich_help_panel="A checkpoint of your own",
            help="what a LoRA draws, if neither folder nor name says it. Repeatable.",
        ),
    ] = [],
    subject: Annotated[
        list[str],
        Option(
            metavar="NAME=WORDS",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="what the detector looks for. Default: the trigger words. Repeatable.",
        ),
    ] = [],
    clip: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="a CLIP of open_clip, a folder or hf-hub:NAME. Default: ViT-B-32 of LAION.",
        ),
    ] = None,
    dino: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="a DINO of timm, a name or folder. Default: vit_base_patch14_dinov2.lvd142m.",
        ),
    ] = None,
    detector: Annotated[
        str | None,
        Option(
            metavar="MODEL",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="an open-vocabulary detector, a folder or hub id. Default: google/owlv2-base-patch16-ensemble.",
        ),
    ] = None,
    lpips: Annotated[
        Literal["alex", "vgg", "squeeze"] | None,
        Option(
            metavar="NETWORK",
            show_default=False,
            rich_help_panel="A checkpoint of your own",
            help="alex, vgg or squeeze. Default: alex.",
        ),
    ] = None,
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Compare ways to compose LoRAs on many prompts and seeds, with intervals.

    An interrupted run continues where it stopped. `accelerate launch` and `torchrun` divide it over processes.
    """
    wanted = SimpleNamespace(**ctx.params)
    _check_read(ctx, wanted)
    lora_files(named_values(expert, "--expert"))
    _check_installed()
    from datetime import timedelta

    from accelerate import PartialState

    from mole_world.evaluation import judging_sheet, runner
    from mole_world.evaluation.methods import METHODS, check_names
    from mole_world.evaluation.methods import methods_from as read_methods
    from mole_world.evaluation.rows import Rows
    from mole_world.evaluation.strength_search import search_methods

    if judged:
        show(judging_sheet.votes(out), judging_sheet.count_answers(out), as_json=as_json)
        return
    if search:
        _check_search(base, wanted)
    others = read_methods(methods_from)
    check_names(method, METHODS | others)
    # Processes wait for one another, and their shares of the work differ by more than torch's usual half an hour.
    state = PartialState(cpu=device == "cpu", timeout=timedelta(days=30))
    call = {"num_inference_steps": steps, "guidance_scale": guidance}
    work = _world(wanted, call) if base == WORLD else _checkpoint(wanted, call, base)
    setup, examples = work.setup, work.cases
    if attached:
        examples = runner.add_idle_experts(examples, sorted(setup.experts), attached)
    methods = search_methods(setup) if search else _methods(wanted, work, examples, others)
    if sheet and all(sum(method.covers(case) for method in methods) < 2 for case in examples):
        raise ValueError("a sheet needs two methods or more that draw the same case")
    if state.is_main_process:
        count = seeds * sum(method.covers(case) for method in methods for case in examples)
        note(f"{count} pictures: {len(methods)} methods, {len(examples)} cases, {seeds} seeds")
    asked: Any = {"seeds": range(seed, seed + seeds), "rows": Rows(out, state.process_index)}
    runner.evaluate(setup, methods, examples, work.metrics, **asked, processes=state.num_processes)
    state.wait_for_everyone()
    rows = work.measured(runner.requested_rows(setup, methods, examples, **asked), asked["rows"], state)
    if not state.is_main_process:
        return
    text = _written(out, rows, work, methods, examples, wanted)
    if sheet:
        note(f"{judging_sheet.write_sheet(out, rows)} questions in {out / 'sheet'}")
    show(rows, text, as_json=as_json)


def _written(
    out: Path, rows: list[Row], work: Task, methods: Sequence[Method], cases: Sequence[Case], wanted: SimpleNamespace
) -> str:
    """Write tables, figures and the page. Returns the tables."""
    from mole_diffusers.whole_files import write_text
    from mole_world.evaluation.page import write_page
    from mole_world.evaluation.strength_search import best_weights

    text = work.report.text(rows)
    write_text(out / "table.md", text + "\n")
    if wanted.search:
        (out / "weights.json").write_text(json.dumps(best_weights(rows), indent=1) + "\n")
    _figures(out, rows, work.report, attached=bool(wanted.attached), share=bool(wanted.share))
    _heat_map(out / "gates.png", work.setup, methods, cases)
    note(f"the page: {write_page(out, rows, work.report, work.about)}")
    return text


def _check_read(ctx: Context, wanted: SimpleNamespace) -> None:
    """Raises ValueError for options on the command line that would be ignored."""
    given = [name for name in ctx.params if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE"]
    if wanted.judged and (unread := sorted({*given} - {"judged", "out", "as_json", "verbose"})):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in unread)
        raise ValueError(f"--judged counts answers and draws nothing: leave out {flags}")
    if wanted.base != WORLD and "split" in given:
        raise ValueError("--split chooses cases of the embedded world; a --base has prompts of --protocol or --cases")


def _strengths(wanted: SimpleNamespace) -> Mapping[str, Mapping[str, float]] | None:
    """The content of --weights."""
    from mole_world.evaluation.strength_search import read_weights

    return read_weights(wanted.weights) if wanted.weights else None


def _check_search(base: str, wanted: SimpleNamespace) -> None:
    """Raises ValueError if --search would not count successes, would choose by the test split, or draw other
    methods.
    """
    taken = ("method", "methods_from", "gates", "share", "weights")
    if given := [f"--{name.replace('_', '-')}" for name in taken if vars(wanted)[name]]:
        raise ValueError(f"--search draws methods of its own: leave out {', '.join(given)}")
    if base != WORLD:
        raise ValueError("--search counts successes, which only the judge of the embedded world tells")
    if wanted.split == "test":
        raise ValueError("--search chooses strengths, and nothing is chosen on the test split: use --split validation")


@dataclass(frozen=True)
class Task:
    """What is evaluated: the embedded world, or a checkpoint.

    Attributes:
        metrics: measures pictures as they are drawn.
        measured: the rows with what is measured once all are drawn.
        default: methods that are drawn if none is named.
        about: what measures the pictures, for the page.
    """

    setup: Setup
    cases: list[Case]
    metrics: Metrics
    measured: Callable[[list[Row], Rows, PartialState], list[Row]]
    report: EvaluationReport
    default: Sequence[str]
    about: Mapping[str, Any]


def _check_installed() -> None:
    """Raises ValueError naming what this command needs and is not there."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(f"this needs {', '.join(missing)}: pip install 'mole-diffusers[evaluate]'")


def _world(wanted: SimpleNamespace, call: dict[str, Any]) -> Task:
    """The emoji world with its judge. Raises ValueError for options that are for another base."""
    import mole_world
    from mole_world.evaluation import emoji_protocol
    from mole_world.evaluation.methods import METHODS
    from mole_world.world import emoji_world

    if ignored := [f"--{name.replace('_', '-')}" for name in FOR_CHECKPOINTS if vars(wanted)[name]]:
        raise ValueError(f"{', '.join(ignored)}: the embedded world has its own; give a --base to evaluate another")
    world = emoji_world(device=_device(wanted))
    groups = mole_world.TEST if wanted.split == "test" else mole_world.VALIDATION
    found = emoji_protocol.cases({kind: group[: wanted.limit] for kind, group in groups.items()})
    metrics = emoji_protocol.JudgeMetrics(world.judge(), world.drawings, found)
    gates = wanted.gates or mole_world.default_folder() / "gates"
    setup = emoji_protocol.setup(world, call, gates=gates, searched=_strengths(wanted))
    cases, about = [case for case, _ in found], {"judge": "the world's own"}
    return Task(setup, cases, metrics, lambda rows, store, state: rows, emoji_protocol.REPORT, list(METHODS), about)


def _device(wanted: SimpleNamespace) -> str:
    """The device of --device; by default the GPU, if there is one. ValueError if this machine does not have it."""
    from mole_app.studio.memory import Memory

    memory = Memory(wanted.device)
    memory.check_device()
    return memory.completed("").device or "cpu"


def _checkpoint(
    wanted: SimpleNamespace,
    call: dict[str, Any],
    base: str,
) -> Task:
    """The user's own checkpoint. What measures the pictures is loaded first, so that a wrong name is known at once."""
    from mole_app.studio.model_folders import files_of
    from mole_diffusers.training import read_folder
    from mole_world.evaluation import checkpoint_protocol, prompts, runner
    from mole_world.evaluation import methods as known
    from mole_world.evaluation.measures import Models
    from mole_world.evaluation.rows import Rows

    files = {name: str(path) for name, path in files_of(wanted.loras, "lora").items()} if wanted.loras is not None else {}
    chosen = experts_for(base, files | named_values(wanted.expert, "--expert"), "")
    kinds, subjects = (named_values(vars(wanted)[name], f"--{name}", chosen) for name in ("kind", "subject"))
    concepts = {
        name: prompts.concept_of(expert, kind=kinds.get(name, ""), subject=subjects.get(name, ""))
        for name, (expert, _) in chosen.items()
    }
    if wanted.cases is None:
        cases = prompts.cases(list(concepts.values()), wanted.protocol, limit=wanted.limit or LIMIT)
    elif wanted.protocol:
        raise ValueError("--cases and --protocol exclude each other")
    else:
        cases = _limited(checkpoint_protocol.read_cases(wanted.cases, list(chosen)), wanted.limit)
    folders = named_values(wanted.images, "--images", chosen)
    pictures = {name: read_folder(Path(folder), prompt=name)[0] for name, folder in folders.items()}
    own_prompts = {name: [prompts.own_prompt(concept)] for name, concept in concepts.items()}
    own_prompts |= grouped_values(wanted.own, "--own", chosen)
    named = {name: value for name, value in vars(wanted).items() if name in MEASURING and value is not None}
    models = Models(**named, device=_device(wanted))
    about: dict[str, Any] = {"prompts": own_prompts}
    about["styles"] = frozenset(name for name, concept in concepts.items() if concept.kind not in prompts.SUBJECTS)
    about["strengths"] = {name: strength for name, (_, strength) in chosen.items() if strength != 1}
    about |= {"gates": wanted.gates, "searched": _strengths(wanted)}
    setup = runner.Setup(
        opened(base, vars(wanted)).pipe, {name: expert for name, (expert, _) in chosen.items()}, call, base, **about
    )

    def measured(rows: list[Row], store: Rows, state: PartialState) -> list[Row]:
        used = {name for row in rows for name in row["concepts"]}
        drawn = [name for name in concepts if name in used and name not in pictures]
        seen = checkpoint_protocol.References(setup, drawn, store)
        seen.draw(state.num_processes)
        state.wait_for_everyone()
        measures = checkpoint_protocol.Measures(models, concepts, pictures | seen.pictures())
        found = Rows(store.folder, store.process, name="measures", fields=checkpoint_protocol.MEASURED)
        checkpoint_protocol.measure(rows, measures, found, processes=state.num_processes)
        state.wait_for_everyone()
        return checkpoint_protocol.measured(rows, measures, found)

    default = [*DEFAULT_METHODS, *(("gates", known.BOUND_GATES) if wanted.gates else ())]
    measures = models.names | {"pictures of each concept alone": "given" if pictures else "drawn by its LoRA"}
    report, metrics = checkpoint_protocol.report(setup.styles), checkpoint_protocol.unmeasured
    return Task(setup, cases, metrics, measured, report, default, measures)


def _limited(cases: Sequence[Case], limit: int | None) -> list[Case]:
    """The first cases of each kind."""
    kinds: dict[str, list[Case]] = {}
    for case in cases:
        kinds.setdefault(case.kind, []).append(case)
    return [case for group in kinds.values() for case in group[:limit]]


def _methods(wanted: SimpleNamespace, work: Task, cases: Sequence[Case], others: dict[str, KnownMethod]) -> list[Method]:
    """The methods of --method, or the usual ones and `others` that can be drawn; a note lists those that are left out."""
    from mole_world.evaluation.methods import BOUND_GATES, CONTROLS, METHODS, chosen_methods, gates_of

    names = list(wanted.method) or [*(("sum", "gates") if wanted.share else work.default), *others]
    if wanted.weights and "grid search" not in names:
        raise ValueError("--weights are for the method 'grid search', which is not drawn here")
    reading = (*CONTROLS, BOUND_GATES)
    if wanted.gates and not {*reading, *others} & {*names}:
        raise ValueError(f"--gates are for the methods {', '.join(reading)}, none of which is drawn here")
    methods, lacking = chosen_methods(names, work.setup, shares=wanted.share, known=METHODS | others)
    if idle := [a.name for a in methods if not any(map(a.covers, cases)) and not a.name.startswith("alone ")]:
        first = gates_of(Path())(cases[0])
        lacking.append(f"{idle} can draw none of the cases (gates: {work.setup.gates}, where {first} is the first's folder)")
    if lacking and wanted.method:
        raise ValueError("; ".join(lacking))
    for reason in lacking:
        note(f"left out: {reason}")
    return methods


def _figures(out: Path, rows: list[Row], report: EvaluationReport, *, attached: bool, share: bool) -> None:
    """Draw every figure that the rows allow, and note each one that was asked for but is not possible."""
    from mole_world.evaluation import plots

    plots.sample_grid(rows, out, out / "samples.png")
    report.draw_bars(rows, out / "bars.png")
    asked = {"experts": (attached, report.draw_count), "frontier": (share, report.draw_frontier)}
    for name, (wanted, draw) in asked.items():
        try:
            if wanted:
                draw(rows, out / f"{name}.png")
        except ValueError as error:
            note(f"no {name}.png: {error}")


def _heat_map(path: Path, setup: Setup, methods: Sequence[Method], cases: Sequence[Case]) -> None:
    """The weights of trained gates, for the first case that has them."""
    from mole_diffusers.inspection import block_places, heat_map, sample

    seen = next(
        ((method, case) for method in methods for case in cases if method.name == "gates" and method.covers(case)), None
    )
    if seen is not None:
        method, case = seen
        with method.draws(setup, case) as mixture, mixture.trace() as trace:
            sample(setup.pipe, case.prompt, [0], **setup.call_of(case))
        heat_map(trace, block_places(trace)).save(path)
