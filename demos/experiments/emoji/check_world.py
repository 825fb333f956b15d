"""Is the emoji world fit to tell composers apart? This measures every row of its acceptance table, and says which pass.

    python demos/experiments/emoji/check_world.py [--rows judge base loras joint] [--pictures 96]

It writes work/gate.json after every row, prints the table as Markdown, and puts sheets of samples into work/sheets/, each
sample above its true drawing. Joint LoRAs are kept in work/joint/. A joint LoRA is trained on all concepts of a composition,
but on no picture of them together.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

import make_loras
import numpy as np
import train_base
from diffusers.utils import logging
from loop import WORK
from random_scenes import draw_scene, is_unseen
from sampling import Share, generate, sheet
from train_judge import read_right

from mole_diffusers import attach, detach
from mole_diffusers.emoji import TEST, words
from mole_diffusers.emoji.drawings import Drawings, default_folder
from mole_diffusers.emoji.judge import Judge
from mole_diffusers.emoji.scenes import Scene
from mole_diffusers.evaluation.emoji_protocol import scene_of
from mole_diffusers.training.lora_adapter import save_lora

GATE = WORK / "gate.json"
JOINT = make_loras.Recipe(rank=16, lr=3e-3)  # as many updates per concept as a single LoRA; at its rate, concepts mix
JOINT_ROWS = {  # kind -> required share
    "subject x style": 0.85,
    "two subjects": 0.95,
    "two subjects + style": 0.75,
    "three subjects": 0.75,
}


@dataclass
class World:
    """What is measured: the latest base, the drawings and the judge."""

    pipe: object
    drawings: Drawings
    judge: Judge

    def look(
        self, name: str, scenes: list[Scene], *, concepts: Collection[str] | None = None, batched: bool = True
    ) -> Share:
        """The share of pictures of these scenes that are right. Prints what the others miss; saves a sheet of the first 24.

        Args:
            concepts: the style counts only if it is one of these; None means that it always counts.
            batched: draw several prompts in one call. Tiles cannot do that.
        """
        if batched:
            pictures = generate(self.pipe, scenes)
        else:
            pictures = [generate(self.pipe, [scene], seed=i)[0] for i, scene in enumerate(scenes)]
        folder = WORK / "sheets"
        folder.mkdir(parents=True, exist_ok=True)
        first = scenes[:24]
        true = [self.drawings.picture(s) for s in first]
        sheet(first, [pictures[:24], true], columns=8).save(folder / f"{name.replace(' ', '_')}.png")
        missed: Counter[str] = Counter()
        for scene, verdict in zip(scenes, (self.judge.verdict([picture]) for picture in pictures), strict=True):
            wants_style = concepts is None or scene.style in concepts
            if not self.judge.sees(verdict, scene.subjects).all():
                missed["a subject"] += 1
            elif wants_style and not self.judge.is_style(verdict, scene.style):
                missed[f"{scene.style}, taken for {self.judge.styles[int(verdict.style.argmax())]}"] += 1
        print(f"{name} misses {dict(missed.most_common())}", flush=True)
        return Share(len(scenes) - missed.total(), len(scenes))


def keep(row: str, share: Share, wanted: float) -> None:
    """Add a row to work/gate.json and print it."""
    table = json.loads(GATE.read_text()) if GATE.exists() else {}
    low, high = share.interval
    table[row] = {"share": round(share.share, 4), "low": round(low, 3), "high": round(high, 3), "of": share.count}
    table[row] |= {"wanted": wanted, "met": share.share >= wanted}
    WORK.mkdir(exist_ok=True)
    GATE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"{row}: {share}; wanted {wanted}", flush=True)


def judge_rows(world: World, pictures: int) -> None:
    """The judge on clean, true drawings, in arrangements that it was not trained on."""
    of_style: list[bool] = []
    for count, wanted in ((1, 0.99), (2, 0.98), (3, 0.95)):
        subjects, style, _ = read_right(world.drawings, world.judge, count, pictures=pictures).tolist()
        of_style += style
        keep(f"judge: {count} subject{'s' * (count > 1)}", Share(sum(subjects), len(subjects)), wanted)
    keep("judge: style", Share(sum(of_style), len(of_style)), 0.98)


def base_scenes(count: int, number: int, allowed: Callable[[str, str], bool]) -> list[Scene]:
    """Random scenes of base words. All their cells (subject and style) are allowed."""
    rng = np.random.default_rng([7, count])
    styles = [y for y in words.BASE_STYLES if sum(allowed(s, y) for s in words.BASE_SUBJECTS) >= count]
    return [draw_scene(words.BASE_SUBJECTS, styles, rng, count=count, allowed=allowed) for _ in range(number)]


def base_rows(world: World, pictures: int) -> None:
    """The base on cells that it was trained on, and on cells that it never saw."""
    for count, seen, unseen in ((1, 0.97, 0.90), (2, 0.95, 0.85)):
        name = f"{count} subject{'s' * (count > 1)}"
        scenes = base_scenes(count, pictures, lambda s, y: not is_unseen(s, y))
        keep(f"base, seen: {name}", world.look(f"base seen {name}", scenes), seen)
        keep(f"base, unseen: {name}", world.look(f"base unseen {name}", base_scenes(count, pictures, is_unseen)), unseen)


def lora_file(concept: str) -> Path:
    return default_folder() / "loras" / f"{concept.replace(' ', '_')}.safetensors"


def lora_rows(world: World, pictures: int) -> None:
    """Each LoRA alone: a subject in base styles, a style on base subjects."""
    for concept in (*words.HELD_OUT_SUBJECTS, *words.HELD_OUT_STYLES):
        if not lora_file(concept).exists():
            continue
        rng = np.random.default_rng(11)
        scenes = [make_loras.concept_scene(concept, "one", rng) for _ in range(pictures // 2)]
        world.pipe.load_lora_weights(str(lora_file(concept)), adapter_name="one")
        keep(f"alone: {concept}", world.look(f"alone {concept}", scenes), 0.90)
        world.pipe.unload_lora_weights()


def joint_file(concepts: tuple[str, ...]) -> Path:
    """The file of the joint LoRA for these concepts."""
    return WORK / "joint" / f"{'+'.join(concepts).replace(' ', '_')}.safetensors"


def joint_rows(world: World, pictures: int, per_kind: int) -> None:
    """Joint LoRAs, trained on all concepts of a composition but on no picture of them together: acting everywhere, and bound
    to their words, in tiles."""
    for kind, wanted in JOINT_ROWS.items():
        hits = {"joint": 0, "joint, in tiles": 0}
        count = 0
        for concepts in TEST[kind][:per_kind]:
            path = joint_file(concepts)
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                samples = make_loras.concept_samples(world.pipe, world.drawings, concepts)
                chosen = replace(JOINT, steps=JOINT.steps * len(concepts))
                tensors = make_loras.train(world.pipe, samples, chosen, JOINT.rank)
                save_lora(tensors, path, alpha=JOINT.rank)
            scenes = [scene_of(concepts, i) for i in range(pictures // 4)]
            for way, binding in (("joint", None), ("joint, in tiles", {"joint": list(concepts)})):
                attach(world.pipe, {"joint": path}, binding=binding)
                share = world.look(f"{way} {path.stem}", scenes, concepts=concepts, batched=binding is None)
                detach(world.pipe)
                print(kind, way, concepts, share, flush=True)
                hits[way] += share.hits
            count += len(scenes)
        for way, right in hits.items():
            keep(f"{way}: {kind}", Share(right, count), wanted)


def table() -> str:
    """work/gate.json as Markdown."""
    rows = json.loads(GATE.read_text()).items() if GATE.exists() else []
    lines = []
    for name, row in rows:
        measured = f"{row['share']:.3f} [{row['low']:.2f}, {row['high']:.2f}] of {row['of']}"
        lines.append(f"| {name} | {row['wanted']:.2f} | {measured} | {'yes' if row['met'] else 'no'} |")
    return "\n".join(["| row | at least | measured, 95 % interval | met |", "|---|---|---|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=("judge", "base", "loras", "joint"), default=["judge", "base", "loras"])
    parser.add_argument("--pictures", type=int, default=96, help="pictures per row; the judge's rows have ten times as many")
    parser.add_argument("--per-kind", type=int, default=4, help="compositions of each kind with a joint LoRA")
    args = parser.parse_args()
    logging.set_verbosity_error()
    world = World(train_base.trained(), Drawings(default_folder()), Judge.load(default_folder() / "judge"))
    for row in args.rows:
        if row == "judge":
            judge_rows(world, 10 * args.pictures)
        elif row == "base":
            base_rows(world, args.pictures)
        elif row == "loras":
            lora_rows(world, args.pictures)
        else:
            joint_rows(world, args.pictures, args.per_kind)
    print(table())


if __name__ == "__main__":
    main()
