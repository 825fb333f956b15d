"""How robust is composition outside the conditions of the LoRAs' training? The sum, binding and tiles along seven axes.

    python demos/emoji/experiments/robustness.py [--split validation] [--per-kind 6] [--seeds 4] [--kinds ...] [--axes ...]
    python demos/emoji/experiments/robustness.py --figure docs/robustness.png

The axes are: further LoRAs attached ("strangers"), subjects without a LoRA, strength of all LoRAs, guidance, sampler,
wording, and size of the picture. One changes at a time, and the others stay as in `compose.py`. For comparison, the base is
measured on compositions of its own words, to show what it can do at all. Rows are appended below work/robustness/, so you
can continue an interrupted run. `--figure` draws the same rows.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from compose import SEEDS, SPLITS, measured
from loop import WORK, device
from packing import pack
from sampling import GUIDANCE, STEPS

from mole_app.studio.samplers import sampler
from mole_world import TEST, Scene, words
from mole_world.captions import FORMS, article
from mole_world.compositions import Concepts, compositions
from mole_world.evaluation import emoji_protocol, methods
from mole_world.evaluation.plots import curves
from mole_world.evaluation.rows import Row, Rows
from mole_world.evaluation.runner import Case, Method, Setup, add_idle_experts
from mole_world.evaluation.tables import as_frame, grid_table
from mole_world.world import EmojiWorld, emoji_world

ATTACHED = (2, 3, 4, 6, 8)  # number of LoRAs; the prompt names two or three of them
STRENGTHS = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)
GUIDANCES = (2.0, 3.0, 4.0, 5.0, 7.0)
SAMPLERS = ("DPM++ 2M", "Euler a")  # compared to the world's own, DDIM
SIZES = (1.0, 1.25, 1.5)  # factors of a side; 1 is the canvas that the base was trained on
BESIDE = 2 * words.BASE_SUBJECTS[2::8]  # subjects that replace those of the LoRAs
KNOWN = words.BASE_SUBJECTS[::16], words.BASE_STYLES[2::3]  # words that the base is measured on


@dataclass(frozen=True)
class Point:
    """One setting: these methods draw these compositions."""

    setup: Setup
    methods: Sequence[Method]
    found: Sequence[tuple[Case, Scene]]

    def worded(self, prompt: Callable[[Scene], str]) -> "Point":
        """This setting with its compositions in another wording."""
        return replace(self, found=[(replace(case, prompt=prompt(scene)), scene) for case, scene in self.found])

    def scaled(self, factor: float) -> "Point":
        """This setting with its compositions on canvases whose sides are `factor` times as long."""
        sizes = [(round(factor * scene.size[0]), round(factor * scene.size[1])) for _, scene in self.found]
        return replace(self, found=[(replace(c, size=size), s) for (c, s), size in zip(self.found, sizes, strict=True)])

    def rows(self, world: EmojiWorld, seeds: range, rows: Rows) -> list[Row]:
        """A row per picture. Missing pictures are drawn."""
        metrics = emoji_protocol.JudgeMetrics(world.judge(), world.drawings, self.found)
        return measured(self.setup, self.methods, self.found, metrics, seeds=seeds, rows=rows)


Axis = Callable[[Point], Mapping[float | str, Point]]  # the default setting -> the settings along an axis


def strangers(point: Point) -> dict[int, Point]:
    """Attach LoRAs that the prompt does not name. The axis is the number of all LoRAs."""
    cases = add_idle_experts([case for case, _ in point.found], list(point.setup.experts), ATTACHED)
    scenes = {case.prompt: scene for case, scene in point.found}
    return {n: replace(point, found=[(c, scenes[c.prompt]) for c in cases if len(c.experts) == n]) for n in ATTACHED}


def base_words(point: Point) -> dict[int, Point]:
    """This many subjects have no LoRA, since the base knows them. At least one concept still has a LoRA."""

    def changed(i: int, count: int, case: Case, scene: Scene) -> tuple[Case, Scene]:
        known = dict(zip(scene.subjects[:count], BESIDE[i:], strict=False))
        scene = replace(scene, subjects=tuple(known.get(name, name) for name in scene.subjects))
        concepts = tuple(known.get(name, name) for name in case.concepts)
        return replace(case, concepts=concepts, prompt=scene.caption), scene

    points = {0: point}
    for count in (1, 2):
        found = [changed(i, count, *each) for i, each in enumerate(point.found)]
        found = [(c, s) for c, s in found if len(s.subjects) >= count and set(c.concepts) & set(point.setup.experts)]
        if found:
            points[count] = replace(point, methods=[with_its_loras(method) for method in point.methods], found=found)
    return points


def with_its_loras(method: Method) -> Method:
    """A method that attaches the LoRAs of the concepts that have one."""

    def own(setup: Setup, case: Case) -> Case:
        return replace(case, concepts=tuple(name for name in case.concepts if name in setup.experts))

    return replace(
        method,
        draws=lambda setup, case: method.draws(setup, own(setup, case)),
        settings=lambda setup, case: method.settings(setup, own(setup, case)),
    )


def strength(point: Point) -> dict[float, Point]:
    """The strength of all LoRAs together."""
    strengths = {value: dict.fromkeys(point.setup.experts, value) for value in STRENGTHS}
    return {value: replace(point, setup=replace(point.setup, strengths=found)) for value, found in strengths.items()}


def guidance(point: Point) -> dict[float, Point]:
    options = {value: {**point.setup.options, "guidance_scale": value} for value in GUIDANCES}
    return {value: replace(point, setup=replace(point.setup, options=found)) for value, found in options.items()}


def samplers(point: Point) -> dict[str, Point]:
    others = {name: [drawn_by(name, method) for method in point.methods] for name in SAMPLERS}
    return {"DDIM": point} | {name: replace(point, methods=found) for name, found in others.items()}


def drawn_by(name: str, method: Method) -> Method:
    """A method with another sampler."""

    @contextmanager
    def draws(setup: Setup, case: Case) -> Iterator[None]:
        before = setup.pipe.scheduler
        setup.pipe.scheduler = sampler(name, before)
        try:
            with method.draws(setup, case):
                yield
        finally:
            setup.pipe.scheduler = before

    return replace(method, draws=draws, settings=lambda setup, case: {**method.settings(setup, case), "sampler": name})


def wording(point: Point) -> dict[str, Point]:
    return {name: point.worded(prompt) for name, prompt in WORDINGS.items()}


def other_words(scene: Scene) -> str:
    """A wording with "style", "showing" and "beside", which were in no caption."""
    things = " beside ".join(map(article, scene.subjects))
    return f"a drawing in the style of {scene.style} showing {things}"


def other_order(scene: Scene) -> str:
    return replace(scene, subjects=scene.subjects[::-1]).caption


def places_said(scene: Scene) -> str:
    """A caption that says places, as a fifth of the base's captions do, for the same canvas."""
    relation = "above" if scene.size[1] > scene.size[0] else "left of"
    return replace(scene, relation=relation if len(scene.subjects) > 1 else None).caption


WORDINGS: dict[str, Callable[[Scene], str]] = {
    **{form: partial(Scene.worded, form=i) for i, form in enumerate(FORMS)},
    "other words": other_words,
    "other order": other_order,
    "places said": places_said,
}


def size(point: Point) -> dict[float, Point]:
    return {factor: point.scaled(factor) for factor in SIZES}


AXES: dict[str, Axis] = {
    axis.__name__: axis for axis in (strangers, base_words, strength, guidance, samplers, wording, size)
}


def starts(setup: Setup, split: Mapping[str, Sequence[Concepts]]) -> list[Point]:
    """Compositions of a split by the sum, bound and in tiles; and as many of words that the base knows, without LoRAs."""
    known = compositions(*KNOWN, {kind: len(group) for kind, group in split.items()})
    return [
        Point(setup, [methods.summed(), methods.bound(), methods.in_tiles()], emoji_protocol.cases(split)),
        Point(replace(setup, experts={}), [replace(methods.base(), name="base, own words")], emoji_protocol.cases(known)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=TEST, default=["two subjects", "two subjects + style"])
    parser.add_argument("--axes", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--per-kind", type=int, default=6, help="compositions of each kind")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--pack", action="store_true", help="write the verdicts to docs/results/, too")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the curves, too")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    seeds = range(SEEDS[args.split], SEEDS[args.split] + args.seeds)
    rows, found = Rows(WORK / "robustness" / args.split), []
    for axis in args.axes:
        for start in starts(setup, {kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds}):
            for at, point in AXES[axis](start).items():
                found += [row | {"axis": axis, "setting": at} for row in point.rows(world, seeds, rows)]
    frame = as_frame(found)
    frame["line"] = frame["composer"] + ": " + frame["kind"]
    named = frame.assign(setting=frame["setting"].astype(str).str.removesuffix(".0"))
    print(grid_table(named, ["axis", "setting"], "line"))
    if args.pack:
        pack("robustness", named, ["axis", "setting", "kind", "concepts", "method", "seed"])
    if args.figure:
        curves(frame, args.figure, at="setting", line="line", panel="axis")


if __name__ == "__main__":
    main()
