"""Gates for a pair and a triple under every objective, from the command line alone, with success on the way.

    python demos/experiments/emoji/studies/curves.py [OBJECTIVE ...]

Each run is one `mole train --config FILE`, whose files stay under work/curves/; runs that exist are not made again, and a
run that was cut off goes on. Then docs/training_curves.md and its figure are written from the runs that exist.
"""

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1] / "training"))

import numpy as np
import yaml
from compose import lesson, name_of
from evaluate import DOCS
from kept_rows import KEPT
from loop import WORK
from make_loras import scenes
from pages import fill

from mole_diffusers import emoji
from mole_diffusers.emoji.world import concept_files
from mole_diffusers.evaluation import tables
from mole_diffusers.evaluation.plots import save_figure
from mole_diffusers.inspection.gate_figures import COLOURS

CASES = (("fox", "octopus"), ("fox", "octopus", "ink"))
STEPS, EVERY = 60, 20
PICTURES = 96  # of each concept, for the objectives that need some
TERMS = {  # objective -> its terms, the rows of an update, and updates
    "collage": ({"collage": {"guidance": 3.0}}, 6, STEPS),
    "distill": ({"single": 1.0, "composed": 1.0}, 6, STEPS),
    "denoise": ({"denoise": 1.0}, 6, STEPS),
    "clip": ({"clip": 1.0}, 2, STEPS),
    "rollout": ({"rollout": {"steps": 8}}, 2, STEPS // 3),
}
FOLDER = WORK / "curves"


def pictures(concept: str) -> Path:
    """A folder of one concept's pictures with captions, as a user would have it."""
    folder = FOLDER / "pictures" / concept
    if not (folder / "metadata.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        rng, drawings, rows = np.random.default_rng(0), emoji.Drawings(emoji.default_folder()), []
        for i, scene in enumerate(scenes(concept, PICTURES, rng)):
            drawings.picture(scene, rng).save(folder / f"{i}.png")
            rows.append(json.dumps({"file_name": f"{i}.png", "text": scene.caption}))
        (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def settings(objective: str, concepts: Sequence[str]) -> dict:
    """The contents of the file for `mole train --config`."""
    terms, batch, steps = TERMS[objective]
    found = lesson(concepts)
    if "collage" in terms and found.styles:
        terms = {"collage": terms["collage"] | {"redraw": 0.55}}
    validation = {"every": EVERY if steps == STEPS else EVERY // 4, "seeds": 8, "steps": 12, "guidance": 3.0}
    training = {"terms": terms, "steps": steps, "batch": batch, "lr": 1e-2, "precision": "bf16", "validation": validation}
    return {
        "experts": {name: str(concept_files()[name]) for name in concepts},
        "gates": {"family": "flow"},
        "lesson": {name: words for name, words in found.to_dict().items() if name != "pictures"},
        "data": [str(pictures(name)) for name in concepts] if terms.keys() & {"denoise", "clip"} else [],
        "training": training,
    }


def run(objective: str, concepts: Sequence[str]) -> Path:
    """Train, unless that is done; returns the folder of the run, with seconds.json beside its log."""
    out = FOLDER / f"{objective} {name_of(concepts)}"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "seconds.json").exists():
        (out / "run.yaml").write_text(yaml.safe_dump(settings(objective, concepts), sort_keys=False))
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        command = [sys.executable, "-m", "mole_diffusers", "train", "--config", str(out / "run.yaml")]
        subprocess.run([*command, "--out", str(out), "--resume", "latest"], check=True)
        spent = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
        (out / "seconds.json").write_text(json.dumps(spent))
    return out


def curve(folder: Path) -> list[tuple[int, float]]:
    """(updates, success) of every validation."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(row["step"] + 1, row["success"]) for row in rows if "success" in row]


def write() -> None:
    """Write docs/training_curves.md and .png from the runs that exist."""
    found = {
        f"{objective}, {'+'.join(concepts)}": FOLDER / f"{objective} {name_of(concepts)}"
        for concepts in CASES
        for objective in TERMS
    }
    found = {name: folder for name, folder in found.items() if (folder / "seconds.json").exists()}
    curves = {name: curve(folder) for name, folder in found.items()}
    body = [
        [name, *_cells(curves[name]), f"{json.loads((folder / 'seconds.json').read_text()):.0f}"]
        for name, folder in found.items()
    ]
    table = tables.markdown(["objective, concepts", "success (updates)", "seconds"], body)
    (DOCS / "training_curves.md").write_text(fill((KEPT.parent / "curves_text.md").read_text(), {"runs": table}))
    draw(curves, DOCS / "training_curves.png")


def draw(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> Any:
    """Success by updates, one line per run."""
    from matplotlib.figure import Figure

    figure = Figure((7, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, points) in enumerate(curves.items()):
        style = "-" if i < len(COLOURS) else "--"
        axes.plot(*zip(*points, strict=True), style, marker="o", color=COLOURS[i % len(COLOURS)], label=name)
    axes.set(xlabel="updates", ylabel="success", ylim=(-0.02, 1.02))
    figure.legend(loc="outside right upper", fontsize="small")
    return save_figure(figure, path)


def _cells(points: Sequence[tuple[int, float]]) -> list[str]:
    return [", ".join(f"{share:.2f} ({step})" for step, share in points)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="*", default=list(TERMS), help=f"of {list(TERMS)}; default: all")
    what = parser.parse_args().what
    if unknown := set(what) - set(TERMS):
        parser.error(f"unknown {sorted(unknown)}; known: {list(TERMS)}")
    for concepts in CASES:
        for objective in what:
            print(objective, "+".join(concepts), flush=True)
            run(objective, concepts)
    write()


if __name__ == "__main__":
    main()
