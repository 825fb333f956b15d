"""Is the emoji world fit to tell composers apart? This measures every row of its acceptance table, and says which pass.

    python demos/emoji/experiments/check_world.py [--rows judge base wording loras neighbours] [--pictures 96]

It writes work/gate.json after every row, prints the table as Markdown, keeps the pictures in work/pictures/, so that another
judge can look at them, and puts sheets of samples into work/sheets/, each sample above its true drawing.
"""

import argparse
import json
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import make_loras
import numpy as np
import train_base
from diffusers.utils import logging
from loop import WORK
from PIL import Image
from random_scenes import draw_scene, is_unseen
from sampling import Share, generate, sheet
from train_judge import read_right

from mole_world import words
from mole_world.captions import FORMS
from mole_world.drawings import Drawings, default_folder
from mole_world.judge import Judge
from mole_world.measures import touches_as_said
from mole_world.scenes import CONTACTS, Scene
from mole_world.words import OPEN

GATE = WORK / "gate.json"


@dataclass
class World:
    """What is measured: the latest base, the drawings and the judge."""

    pipe: object
    drawings: Drawings
    judge: Judge

    def drawn(
        self, name: str, scenes: list[Scene], captions: Sequence[str] = (), *, batched: bool = True
    ) -> list[Image.Image]:
        """Pictures of these scenes, drawn once and kept. Saves a sheet of the first 24.

        Args:
            captions: see `sampling.generate`.
            batched: draw several prompts in one call. Tiles cannot do that.
        """
        kept = [WORK / "pictures" / name.replace(" ", "_") / f"{i}.png" for i in range(len(scenes))]
        if all(path.exists() for path in kept):
            pictures = [Image.open(path) for path in kept]
        elif batched:
            pictures = generate(self.pipe, scenes, captions)
        else:
            pictures = [generate(self.pipe, [scene], seed=i)[0] for i, scene in enumerate(scenes)]
        kept[0].parent.mkdir(parents=True, exist_ok=True)
        for path, picture in zip(kept, pictures, strict=True):
            picture.save(path)
        folder = WORK / "sheets"
        folder.mkdir(parents=True, exist_ok=True)
        first = scenes[:24]
        true = [self.drawings.picture(s, seed=i) for i, s in enumerate(first)]
        sheet(first, [pictures[:24], true], columns=8).save(folder / f"{name.replace(' ', '_')}.png")
        return pictures

    def look(
        self,
        name: str,
        scenes: list[Scene],
        *,
        captions: Sequence[str] = (),
        concepts: Collection[str] | None = None,
        named: bool = False,
    ) -> Share:
        """The share of pictures of these scenes that are right. Prints what the others miss.

        A picture is right if it shows every subject, the style and one scene.

        Args:
            captions: see `sampling.generate`.
            concepts: the style counts only if it is one of these; None means that it always counts.
            named: whether the background and the light that captions name count, too.
        """
        pictures = self.drawn(name, scenes, captions)
        missed = Counter(
            self.misses(scene, picture, concepts, named) for scene, picture in zip(scenes, pictures, strict=True)
        )
        right = missed.pop("", 0)
        print(f"{name} misses {dict(missed.most_common())}", flush=True)
        return Share(right, len(scenes))

    def misses(self, scene: Scene, picture: Image.Image, concepts: Collection[str] | None, named: bool = False) -> str:
        """What of a scene a picture misses first; "" if it is right."""
        verdict = self.judge.verdict([picture])
        if not self.judge.sees(verdict, scene.subjects).all():
            return "a subject"
        if (concepts is None or scene.style in concepts) and not self.judge.is_style(verdict, scene.style):
            return f"{scene.style}, taken for {self.judge.labels.styles[int(verdict.style.argmax())]}"
        if not self.judge.is_one_scene(verdict):
            return "one scene"
        if scene.relation in CONTACTS and not touches_as_said(picture, self.drawings, scene):
            return "the order of contact"
        if named and scene.background != OPEN and not self.judge.is_background(verdict, scene.background):
            return f"{scene.background}, taken for {self.judge.labels.backgrounds[int(verdict.background.argmax())]}"
        if named and scene.light and scene.light != (light := self.judge.labels.lights[int(verdict.light.argmax())]):
            return f"{scene.light}, taken for {light}"
        return ""


def latest() -> World:
    """The base as it was trained last, with the world's own drawings and judge."""
    return World(train_base.trained(), Drawings(default_folder()), Judge.load(default_folder() / "judge"))


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
    others: dict[str, list[bool]] = {}
    for count, wanted in ((1, 0.98), (2, 0.97), (3, 0.94)):
        right = read_right(world.drawings, world.judge, count, pictures=pictures)
        subjects = right.pop("subjects")
        keep(f"judge: {count} subject{'s' * (count > 1)}", Share(sum(subjects), len(subjects)), wanted)
        for name, hits in right.items():
            others[name] = others.get(name, []) + hits
    rows = {"in contact": 0.0, "style": 0.97, "background": 0.98, "light": 0.98, "one scene": 0.99, "pasted": 0.97}
    for name, wanted in rows.items():
        keep(f"judge: {name}", Share(sum(others[name]), len(others[name])), wanted)


def base_scene(count: int, rng: np.random.Generator, background: str = OPEN, **given) -> Scene:
    """A random scene of base words that the base may have seen, before this background."""
    while True:
        scene = draw_scene(
            words.BASE_SUBJECTS, words.BASE_STYLES, rng, count=count, allowed=lambda s, y: not is_unseen(s, y), placed=0
        )
        if count == 3 or "relation" in given or scene.size[1] <= scene.size[0]:
            return replace(scene, **{"background": background, "light": None} | given)


def base_rows(world: World, pictures: int) -> None:
    """The base on subjects that it knows: open and named scenes, contact, other canvases, other wordings."""
    rng = np.random.default_rng(7)
    for count, wanted in ((1, 0.90), (2, 0.85), (3, 0.55)):
        scenes = [base_scene(count, rng) for _ in range(pictures)]
        name = f"base, open scene: {count} subject{'s' * (count > 1)}"
        keep(name, world.look(name, scenes), wanted)
    lit = [
        base_scene(1 + i % 2, rng, str(rng.choice(list(words.PLACES))), light=str(rng.choice(list(words.LIGHTS))))
        for i in range(pictures)
    ]
    keep("base: named scene and light", world.look("base named", lit, named=True), 0.90)
    kinds = list(CONTACTS)
    touching = [base_scene(2, rng, relation=kinds[i % len(kinds)]) for i in range(pictures)]
    keep("base: contact, right order", world.look("base contact", touching), 0.65)
    for size in ((96, 64), (96, 96)):
        scenes = [base_scene(1, rng, canvas=size) for _ in range(pictures)]
        keep(f"base, canvas {size[0]} x {size[1]}", world.look(f"base {size[0]} {size[1]}", scenes), 0.80)
    paper = [base_scene(1 + i % 2, rng, "white") for i in range(pictures)]
    keep("base: on white paper", world.look("base paper", paper, named=True), 0.90)


def wording_rows(world: World, pictures: int) -> None:
    """Scenes of two subjects in each form of captions, with the noise that they have in the others."""
    rng = np.random.default_rng(8)
    scenes = [base_scene(2, rng) for _ in range(pictures)]
    shares = []
    for form in range(len(FORMS)):
        captions = [scene.worded(form, i) for i, scene in enumerate(scenes)]
        shares.append(world.look(f"wording {form}", scenes, captions=captions))
        keep(f"wording: {FORMS[form]}", shares[-1], 0.0)
    best = max(share.share for share in shares)
    for form, share in enumerate(shares):
        keep(f"wording: {FORMS[form]}", share, round(best - 0.08, 3))


def known_pairs(concept: str, number: int) -> list[Scene]:
    """A LoRA's subject beside subjects that the base knows, in an open scene and a base style."""
    rng = np.random.default_rng(12)
    scenes = [base_scene(2, rng) for _ in range(number)]
    return [replace(scene, subjects=(concept, scene.subjects[1])) for scene in scenes]


def neighbour_rows(world: World, pictures: int) -> None:
    """Whether a subject that the base knows survives beside a LoRA taught alone, with the plain sum."""
    for concept in words.VALIDATION_SUBJECTS:
        world.pipe.load_lora_weights(str(lora_file(concept)), adapter_name="one")
        scenes = known_pairs(concept, pictures // 2)
        keep(f"beside a known subject: {concept}", world.look(f"beside {concept}", scenes), 0.0)
        world.pipe.unload_lora_weights()


def lora_file(concept: str) -> Path:
    return default_folder() / "loras" / f"{concept.replace(' ', '_')}.safetensors"


def lora_rows(world: World, pictures: int) -> None:
    """Each LoRA alone: a subject in base styles, a style on base subjects."""
    for concept in (*words.HELD_OUT_SUBJECTS, *words.HELD_OUT_STYLES):
        if not lora_file(concept).exists():
            continue
        rng = np.random.default_rng(11)
        scenes = [replace(make_loras.concept_scene(concept, "one", rng), background=OPEN) for _ in range(pictures // 2)]
        world.pipe.load_lora_weights(str(lora_file(concept)), adapter_name="one")
        keep(f"alone: {concept}", world.look(f"alone {concept}", scenes), 0.85)
        world.pipe.unload_lora_weights()


def table() -> str:
    """work/gate.json as Markdown."""
    rows = json.loads(GATE.read_text()).items() if GATE.exists() else []
    lines = []
    for name, row in rows:
        measured = f"{row['share']:.3f} [{row['low']:.2f}, {row['high']:.2f}] of {row['of']}"
        lines.append(f"| {name} | {row['wanted']:.2f} | {measured} | {'yes' if row['met'] else 'no'} |")
    return "\n".join(["| row | at least | measured, 95 % interval | met |", "|---|---|---|---|", *lines])


ROWS = {"judge": judge_rows, "base": base_rows, "wording": wording_rows, "loras": lora_rows, "neighbours": neighbour_rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="*", choices=ROWS, default=list(ROWS))
    parser.add_argument("--pictures", type=int, default=96, help="pictures per row; the judge's rows have ten times as many")
    args = parser.parse_args()
    logging.set_verbosity_error()
    world = latest()
    for row in args.rows:
        ROWS[row](world, args.pictures * (10 if row == "judge" else 1))
    print(table())


if __name__ == "__main__":
    main()
