"""Draw a sheet of samples, each above its true drawing, and print the captions in reading order.

python demos/emoji/experiments/show_world.py OUT.png [--what base|unseen|loras] [--count 24]
"""

import argparse
from pathlib import Path

import make_loras
import numpy as np
import train_base
from check_world import lora_file
from PIL import Image
from random_scenes import draw_scene, is_unseen
from sampling import generate, sheet

from mole_world import words
from mole_world.drawings import Drawings, default_folder
from mole_world.scenes import Scene


def scenes_to_show(count: int, *, unseen: bool) -> list[Scene]:
    """Half have one subject, the rest two to four, in cells that the base has seen, or (`unseen`) has never seen."""
    rng = np.random.default_rng(21)
    sizes = [1, 1, 2, 1, 2, 3] if not unseen else [1, 1, 1, 2]
    styles = [y for y in words.BASE_STYLES if not unseen or y != "noto"]  # noto is always seen
    return [
        draw_scene(
            words.BASE_SUBJECTS,
            styles,
            rng,
            count=sizes[i % len(sizes)],
            allowed=lambda s, y: is_unseen(s, y) == unseen,
        )
        for i in range(count)
    ]


def of_every_lora(pipe) -> tuple[list[Scene], list[Image.Image]]:
    """A scene and a sample for each LoRA alone."""
    scenes, samples = [], []
    for i, concept in enumerate((*words.HELD_OUT_SUBJECTS, *words.HELD_OUT_STYLES)):
        scene = make_loras.concept_scene(concept, "one", np.random.default_rng([33, i]))
        pipe.load_lora_weights(str(lora_file(concept)), adapter_name="one")
        scenes.append(scene)
        samples += generate(pipe, [scene])
        pipe.unload_lora_weights()
    return scenes, samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--what", choices=("base", "unseen", "loras"), default="base")
    parser.add_argument("--count", type=int, default=24, help="number of samples of the base")
    args = parser.parse_args()
    pipe, drawings = train_base.trained(), Drawings(default_folder())
    if args.what == "loras":
        scenes, samples = of_every_lora(pipe)
    else:
        scenes = scenes_to_show(args.count, unseen=args.what == "unseen")
        samples = generate(pipe, scenes)
    columns = 9 if args.what == "loras" else 6
    page = sheet(scenes, [samples, [drawings.picture(s) for s in scenes]], columns=columns)
    page.quantize(256).save(args.out, optimize=True)  # to keep the file small
    print("\n".join(s.caption for s in scenes))


if __name__ == "__main__":
    main()
