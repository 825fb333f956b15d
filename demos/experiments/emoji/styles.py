"""Is a style diluted by the subjects' LoRAs, and do other strengths, early or late, help?

    python demos/experiments/emoji/styles.py [--split validation] [--per-kind 8] [--seeds 4]
    python demos/experiments/emoji/styles.py fox+chalk koala+chalk

The second draws these, of any subjects and styles that `make_loras.py` has made LoRAs of. All LoRAs are bound, subjects in
tiles where they have room. Beside success, the judge's margins: by how much, in logits, it is surer of the style than of any
other, and of the least visible subject than of the likeliest that is not there.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from compose import SEEDS, SPLITS
from loop import device, mixed_precision, small_attention
from PIL import Image
from sampling import GUIDANCE, STEPS

from mole_diffusers import attach, detach
from mole_diffusers.emoji import Scene, words
from mole_diffusers.emoji.judge import Judge, Verdict
from mole_diffusers.emoji.world import EmojiWorld, emoji_world
from mole_diffusers.evaluation import emoji_protocol
from mole_diffusers.evaluation.runner import Case
from mole_diffusers.evaluation.tables import differences, interval, markdown
from mole_diffusers.inspection.compare import sample

KINDS = ("subject x style", "two subjects + style")
MEASURED = ("success", "style", "subject")


@dataclass(frozen=True)
class Way:
    """Strengths of the subjects' and the style's LoRAs, before and from a share of the steps on."""

    early: tuple[float, float] = (1, 1)
    late: tuple[float, float] = (1, 1)
    since: float = 0

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
    "style after .2": Way(early=(1, 0), since=0.2),
}


def draw(world: EmojiWorld, case: Case, way: Way, seed: int) -> Image.Image:
    """A picture of a case in one of these ways."""
    mixture = attach(world.pipe, {name: world.loras[name] for name in case.concepts})

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
    """The least of the wanted logits less the greatest of the others."""
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


def rows(world: EmojiWorld, found: list[tuple[Case, Scene]], seeds: range) -> Iterator[dict]:
    judge = world.judge()
    for case, scene in found:
        for name, way in WAYS.items():
            for seed in seeds:
                verdict = judge.verdict([draw(world, case, way, seed)])
                about = {"arm": name, "case": case.name, "prompt": case.prompt, "seed": seed, "concepts": case.concepts}
                yield about | {"group": case.kind} | measured(judge, verdict, scene)
        print(case.name, flush=True)


def table(frame: pd.DataFrame) -> str:
    """Success of each way, and both margins; of the others less those of the first."""
    less = differences(frame, "bound", MEASURED)
    body = []
    for name, own in frame.groupby("arm", sort=False):
        of_way = less[less["arm"] == name]
        changes = ["" if of_way.empty else interval(of_way, value, digits=1) for value in MEASURED[1:]]
        body.append([name, interval(own, "success"), f"{own['style'].mean():.1f}", f"{own['subject'].mean():.1f}", *changes])
    return markdown(["way", "success", "style", "subject", "style, less bound", "subject, less bound"], body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="SUBJECT+STYLE", help="draw these instead of a split's")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=KINDS)
    parser.add_argument("--per-kind", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    seeds = range(SEEDS[args.split], SEEDS[args.split] + args.seeds)
    chosen = {kind: SPLITS[args.split][kind][: args.per_kind] for kind in args.kinds}
    if args.names:
        chosen = {"subject x style": [tuple(name.split("+")) for name in args.names]}
    for kind, group in chosen.items():
        found = emoji_protocol.cases({kind: group})
        print(
            f"{kind}, {len(found)} compositions, {args.seeds} seeds:\n\n{table(pd.DataFrame(rows(world, found, seeds)))}\n"
        )


if __name__ == "__main__":
    main()
