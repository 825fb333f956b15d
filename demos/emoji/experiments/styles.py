"""Do the subjects' LoRAs dilute a style, and do other strengths, or gates by noise level, help?

    python demos/emoji/experiments/styles.py [--split validation] [--per-kind 8] [--seeds 4] [--ways ...]
    python demos/emoji/experiments/styles.py fox+chalk koala+chalk

The second command draws the named compositions. `make_loras.py` must have made LoRAs for their subjects and styles. All
LoRAs are bound, and subjects are drawn in tiles if they have room. Besides success, this reports the judge's margins, in
logits: how much surer it is of the style than of any other, and of the least visible subject than of the likeliest one that
is not there. Trained gates and rows are kept in work/styles, so you can continue an interrupted run. `--pack` also writes
the rows to docs/results/.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import train_gates
from compose import SEEDS, SPLITS, measured, rivals
from ladder import layers
from loop import WORK, device
from packing import pack
from PIL import Image
from sampling import GUIDANCE, STEPS

from mole_app.studio.prompt_syntax import parse
from mole_app.studio.strength_schedule import StrengthSchedule
from mole_diffusers import GateConfig, Mixture
from mole_world.evaluation import emoji_protocol, methods
from mole_world.evaluation.rows import Row, Rows
from mole_world.evaluation.runner import Case, Method, Setup
from mole_world.evaluation.tables import as_frame, by_kind
from mole_world.world import emoji_world

KINDS = ("subject x style", "two subjects + style")
MARGINS = ("style margin", "subject margin")


@dataclass(frozen=True)
class Way:
    """How strong the LoRAs are, as in their tags in a prompt: <lora:NAME:1@0,1@0.4,1.2@0.4>.

    Attributes:
        subjects, style: what such a tag says after the name.
        deviation: the style's LoRA adds something to each token in a layer. This is a factor of each token's difference
            from the mean over tokens.
        gates: gates by noise level, trained for each composition, on top of the strengths.
    """

    subjects: str = "1"
    style: str = "1"
    deviation: float = 1
    gates: GateConfig | None = None


def later(strength: float, since: float, *, first: float = 1) -> str:
    """Another strength from a share of the steps on."""
    return f"{first}@0,{first}@{since},{strength}@{since}"


# Block weights of the world's UNet: BASE, IN03, IN05, M00, OUT00, OUT01, OUT02, OUT03. It has half the size in IN03, OUT02
# and OUT03, and a quarter of it in between.
DEEP, LAST = "1,1,{0},{0},{0},{0},1,1", "1,1,1,1,1,1,{0},{0}"
WAYS = {
    "bound": Way(),
    "subjects at .8": Way("0.8"),
    "subjects at .6 after .4": Way(later(0.6, 0.4)),
    "style at 1.2": Way(style="1.2"),
    "style at 1.2 after .4": Way(style=later(1.2, 0.4)),
    "style at 1.4 after .6": Way(style=later(1.4, 0.6)),
    "subjects at 1.2 until .4, then style at 1.2": Way(later(1, 0.4, first=1.2), later(1.2, 0.4)),
    "subjects at 1.2 until .3, then style at 1.3": Way(later(1, 0.3, first=1.2), later(1.3, 0.3)),
    "style after .2": Way(style=later(1, 0.2, first=0)),
    "subjects at .6 in the last blocks": Way(f"1:lbw={LAST.format(0.6)}"),
    "style at 1.3 in the last blocks": Way(style=f"1:lbw={LAST.format(1.3)}"),
    "subjects at .6 in the deep blocks": Way(f"1:lbw={DEEP.format(0.6)}"),
    "style at 1.3 in the deep blocks": Way(style=f"1:lbw={DEEP.format(1.3)}"),
    "the style's deviation at 1.3": Way(deviation=1.3),
    "trained gates by noise level": Way(gates=GateConfig("static", granularity="matrix", total="linear", bins=4)),
}
UPDATES = 60  # of these gates


def kept(case: Case) -> Path:
    """The folder of a case's trained gates."""
    return WORK / "styles" / case.name


def method(name: str) -> Method:
    """One of `WAYS`. Subjects are drawn in tiles if they have room."""
    way = WAYS[name]

    @contextmanager
    def context(setup: Setup, case: Case, mixture: Mixture) -> Iterator[None]:
        tags = [f"<lora:{name}:{way.style if name in setup.styles else way.subjects}>" for name in mixture.experts]
        schedule = StrengthSchedule(list(mixture.experts), parse("".join(tags)).tags, unet=setup.pipe.unet, steps=STEPS)
        steps = rivals.StepCounter()

        def before(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
            schedule.step = steps.at(args, kwargs)

        for part, _, down, _ in layers(setup.pipe):
            if part == "unet" and way.deviation != 1:
                scale_deviation(down, [name in setup.styles for name in mixture.experts], way.deviation)
        watched = rivals.before_forward(setup.pipe.unet, before)
        with watched, mixture.planned(schedule), mixture.tiled(prompt=case.prompt):
            yield

    strengths = {"subjects": way.subjects, "style": way.style, "deviation": way.deviation}
    return methods.weighted(
        name, gates=kept if way.gates else "sum", binding=methods.from_files, context=context, **strengths
    )


def scale_deviation(down: torch.nn.Module, is_style: Sequence[bool], factor: float) -> None:
    """Scale each token's difference from the mean over tokens, of a style's ranks of A x, [B, T, R] or [B, R, H, W].

    The hook ends with `detach`.
    """
    ranks = torch.tensor(is_style)[down.segment]  # [R]

    def after(_: object, __: object, low: torch.Tensor) -> torch.Tensor:
        own, tokens = (ranks[:, None, None], (2, 3)) if low.dim() == 4 else (ranks, (1,))
        mean = low.mean(tokens, keepdim=True)
        return torch.where(own, mean + factor * (low - mean), low)

    down.register_forward_hook(after)


def margin(logits: torch.Tensor, wanted: list[int]) -> float:
    """The least of the wanted logits [C], minus the largest of the others."""
    others = torch.ones(len(logits), dtype=torch.bool)
    others[wanted] = False
    return (logits[wanted].min() - logits[others].max()).item()


class Margins(emoji_protocol.JudgeMetrics):
    """Success, and `MARGINS`."""

    def __call__(self, case: Case, images: Sequence[Image.Image]) -> list[Row]:
        scene, verdict = self.scenes[case.prompt, case.size], self.judge.verdict(images)
        styles = [self.judge.labels.styles.index(scene.style)]
        subjects = [self.judge.labels.subjects.index(name) for name in scene.subjects]
        of_style = [margin(logits, styles) for logits in verdict.style]
        of_subjects = [margin(logits, subjects) for logits in verdict.subjects]
        found = zip(super().__call__(case, images), of_style, of_subjects, strict=True)
        return [row | dict(zip(MARGINS, margins, strict=True)) for row, *margins in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SUBJECT+STYLE", help="draw these instead of a split")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--per-kind", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="ways to compare to bound")
    parser.add_argument("--pack", action="store_true", help="write the rows to docs/results/, too")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    split = {kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds}
    if args.names:
        args.split, split = "other", {"subject x style": [tuple(name.split("+")) for name in args.names]}
    found, ways = emoji_protocol.cases(split), dict.fromkeys(["bound", *args.ways])
    for way in (WAYS[name] for name in ways):
        for case, _ in found:
            if way.gates is not None:
                train_gates.train(world, case.concepts, way.gates, kept(case), updates=UPDATES)
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    seeds, rows = range(SEEDS[args.split], SEEDS[args.split] + args.seeds), Rows(WORK / "styles" / "rows" / args.split)
    metrics = Margins(world.judge(), world.drawings, found)
    table = as_frame(measured(setup, [method(name) for name in ways], found, metrics, seeds=seeds, rows=rows))
    columns = ("success", *MARGINS)
    print(by_kind(table, columns, head="way", digits=2))
    print(by_kind(table, columns, head="way", against="bound"))
    if args.pack:
        request = ["split", "kind", "concepts", "method", "seed"]
        pack("styles", table.assign(split=args.split).round(dict.fromkeys(MARGINS, 2)), request, measured=columns)


if __name__ == "__main__":
    main()
