"""A sheet of the base's samples as it stands, each over its true drawing, and the captions in reading order.

python demos/experiments/second_world/show_base.py OUT.png [--count 24] [--unseen]
"""

import argparse
from pathlib import Path

import numpy as np
import train_base
import words
from drawings import Drawings, default_folder
from sampling import generate, sheet
from scenes import Scene, draw_scene


def scenes_to_show(count: int, *, unseen: bool) -> list[Scene]:
    """Half of one subject, the rest of two to four."""
    rng = np.random.default_rng(21)
    sizes = [1, 1, 2, 1, 2, 3] if not unseen else [1, 1, 1, 2]
    styles = [y for y in words.BASE_STYLES if not unseen or y != "noto"]  # noto is always seen
    return [
        draw_scene(
            words.BASE_SUBJECTS,
            styles,
            rng,
            count=sizes[i % len(sizes)],
            allowed=lambda s, y: words.is_unseen(s, y) == unseen,
        )
        for i in range(count)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--unseen", action="store_true", help="cells that the base was never shown")
    args = parser.parse_args()
    scenes, drawings = scenes_to_show(args.count, unseen=args.unseen), Drawings(default_folder())
    samples = generate(train_base.trained(), scenes)
    sheet(scenes, [samples, [drawings.picture(s) for s in scenes]], columns=6).save(args.out)
    print("\n".join(s.caption for s in scenes))


if __name__ == "__main__":
    main()
