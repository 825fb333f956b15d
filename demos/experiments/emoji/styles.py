"""Do the subjects' LoRAs dilute a style, and do other strengths, or gates by noise level, help?

    python demos/experiments/emoji/styles.py [--split validation] [--per-kind 8] [--seeds 4]
    python demos/experiments/emoji/styles.py fox+chalk koala+chalk

The second command draws the named compositions. `make_loras.py` must have made LoRAs for their subjects and styles. All
LoRAs are bound, and subjects are drawn in tiles if they have room. Besides success, this reports the judge's margins, in
logits: how much surer it is of the style than of any other, and of the least visible subject than of the likeliest one that
is not there. Trained gates are kept in work/styles.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import pandas as pd
import torch
import train_gates
from compose import SEEDS, SPLITS
from ladder import layers
from loop import WORK, device, mixed_precision, small_attention
from PIL import Image
from sampling import GUIDANCE, STEPS

from mole_diffusers import GateConfig, attach, detach
from mole_diffusers.emoji import Scene, words
from mole_diffusers.emoji.judge import Judge, Verdict
from mole_diffusers.emoji.world import EmojiWorld, emoji_world
from mole_diffusers.evaluation import emoji_protocol
from mole_diffusers.evaluation.runner import Case
from mole_diffusers.evaluation.tables import differences, interval, markdown
from mole_diffusers.inspection.compare import sample
from mole_diffusers.patching.gated_linear import ADAPTER

KINDS = ("subject x style", "two subjects + style")
MEASURED = ("success", "style", "subject")


@dataclass(frozen=True)
class Way:
    """Strengths of the subjects' LoRAs and of the style's, in the early and in the late steps.

    Attributes:
        early, late: (subjects, style) strengths.
        since: the share of the steps after which `late` is used.
        mean, deviation: the style's LoRA adds something to each token in a layer. These are factors of its mean over tokens,
            and of each token's difference from the mean.
        gates: gates by noise level, trained for each composition, on top of the strengths.
    """

    early: tuple[float, float] = (1, 1)
    late: tuple[float, float] = (1, 1)
    since: float = 0
    mean: float = 1
    deviation: float = 1
    gates: GateConfig | None = None

    def at(self, step: int) -> tuple[float, float]:
        return self.late if step >= self.since * STEPS else self.early


WAYS = {
    "bound": Way(),
    "subjects at .8": Way(late=(0.8, 1)),
    "subjects at .7 after .4 of the steps": Way(late=(0.7, 1), since=0.4),
    "subjects at .6 after .4": Way(late=(0.6, 1), since=0.4),
    "subjects at .5 after .5": Way(late=(0.5, 1), since=0.5),
    "style at 1.2": Way(late=(1, 1.2)),
    "style at 1.2 after .4": Way(late=(1, 1.2), since=0.4),
    "style at 1.4 after .6": Way(late=(1, 1.4), since=0.6),
    "subjects at 1.2 until .4": Way(early=(1.2, 1), since=0.4),
    "subjects at 1.2 until .4, then style at 1.2": Way(early=(1.2, 1), late=(1, 1.2), since=0.4),
    "subjects at 1.2 until .3, then style at 1.3": Way(early=(1.2, 1), late=(1, 1.3), since=0.3),
    "style after .2": Way(early=(1, 0), since=0.2),
    "the style's mean at 1.3": Way(mean=1.3),
    "the style's mean at .7": Way(mean=0.7),
    "the style's deviation at 1.3": Way(deviation=1.3),
    "the style's deviation at .7": Way(deviation=0.7),
    "trained gates by noise level": Way(gates=GateConfig("static", granularity="matrix", total="linear", bins=4)),
}
UPDATES = 60  # of these gates


def parted(down: torch.nn.Module, ranks: torch.Tensor, way: Way) -> None:
    """Scale the mean over tokens, and the difference from it, of some ranks of A x, [B, T, R] or [B, R, H, W]."""

    def after(_: object, __: object, low: torch.Tensor) -> torch.Tensor:
        own, tokens = (ranks[:, None, None], (2, 3)) if low.dim() == 4 else (ranks, (1,))
        mean = low.mean(tokens, keepdim=True)
        return torch.where(own, way.mean * mean + way.deviation * (low - mean), low)

    down.register_forward_hook(after)


def draw(world: EmojiWorld, case: Case, way: Way, seed: int) -> Image.Image:
    """A picture of a case in one of these ways."""
    experts, folder = {name: world.loras[name] for name in case.concepts}, WORK / "styles" / case.name
    if way.gates is not None:
        train_gates.train(world, case.concepts, way.gates, folder, updates=UPDATES)
    mixture = attach(world.pipe, experts, "sum" if way.gates is None else folder)
    if (way.mean, way.deviation) != (1, 1):  # the hooks end with `detach`
        style = [name in words.STYLES for name in mixture.experts].index(True)
        for part, _, layer in layers(world.pipe):
            if part == "unet":
                down = layer.lora_A[ADAPTER]
                parted(down, down.segment == style, way)

    def put(step: int) -> None:
        for name in case.concepts:
            mixture.strength(name, way.at(step)[name in words.STYLES])

    def after_step(pipe: object, step: int, timestep: torch.Tensor, state: dict) -> dict:
        put(step + 1)
        return state

    put(0)
    width, height = case.size
    call = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE, "width": width, "height": height}
    with small_attention(), mixed_precision():
        (picture,) = sample(world.pipe, case.prompt, [seed], callback_on_step_end=after_step, **call)
    detach(world.pipe)
    return picture


def margin(logits: torch.Tensor, wanted: list[int]) -> float:
    """The least of the wanted logits, minus the largest of the others."""
    others = torch.ones(len(logits), dtype=torch.bool)
    others[wanted] = False
    return (logits[wanted].min() - logits[others].max()).item()


def measured(judge: Judge, verdict: Verdict, scene: Scene) -> dict[str, float]:
    style, subjects = judge.styles.index(scene.style), [judge.subjects.index(name) for name in scene.subjects]
    return {
        "success": float(judge.is_right(verdict, scene)),
        "style": margin(verdict.style[0], [style]),
        "subject": margin(verdict.subjects[0], subjects),
    }


def rows(world: EmojiWorld, found: list[tuple[Case, Scene]], ways: Iterable[str], seeds: range) -> Iterator[dict]:
    judge = world.judge()
    for case, scene in found:
        for name in ways:
            for seed in seeds:
                verdict = judge.verdict([draw(world, case, WAYS[name], seed)])
                about = {"arm": name, "case": case.name, "prompt": case.prompt, "seed": seed, "concepts": case.concepts}
                yield about | {"group": case.kind} | measured(judge, verdict, scene)
        print(case.name, flush=True)


def table(frame: pd.DataFrame) -> str:
    """Success and both margins of each way; for the others, as differences from the first."""
    less = differences(frame, "bound", MEASURED)
    body = []
    for name, own in frame.groupby("arm", sort=False):
        of_way = less[less["arm"] == name]
        changes = ["" if of_way.empty else interval(of_way, value, digits=1) for value in MEASURED[1:]]
        body.append([name, interval(own, "success"), f"{own['style'].mean():.1f}", f"{own['subject'].mean():.1f}", *changes])
    return markdown(["way", "success", "style", "subject", "style, less bound", "subject, less bound"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SUBJECT+STYLE", help="draw these instead of a split")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--per-kind", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="ways to compare to bound")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    seeds = range(SEEDS[args.split], SEEDS[args.split] + args.seeds)
    chosen = {kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds}
    if args.names:
        chosen = {"subject x style": [tuple(name.split("+")) for name in args.names]}
    for kind, group in chosen.items():
        found, ways = emoji_protocol.cases({kind: group}), dict.fromkeys(["bound", *args.ways])
        frame = pd.DataFrame(rows(world, found, ways, seeds))
        print(f"{kind}, {len(found)} compositions, {args.seeds} seeds:\n\n{table(frame)}\n")


if __name__ == "__main__":
    main()
