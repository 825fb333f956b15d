"""docs/families.md: every family of gates beside its controls, how decided they are, what they cost, and LoRAs never seen.

    python demos/experiments/emoji/studies/families.py

Reads the rows of `evaluate.py test`; entropy and cost are measured here, once, and kept.
"""

import json
import math
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "training"))

import pandas as pd
from compose import name_of
from composers import unseen
from evaluate import DOCS, FOLDER, OPTIONS
from kept_rows import KEPT, unpacked
from loop import WORK, device, in_bf16
from pages import fill
from report import TRAINED, named, of_cases, ordered
from train_gates import FAMILIES, RATES, TRAINING

from mole_diffusers import GateConfig, emoji, emoji_world
from mole_diffusers.evaluation import arms, emoji_protocol, tables
from mole_diffusers.evaluation.rows import Rows
from mole_diffusers.evaluation.runner import Arm, Case
from mole_diffusers.inspection.compare import sample

ROUNDS = 5


def gates_arm(world, family: str) -> Arm:
    """A family's trained gates of every composition that has some."""
    root = world.folder / "gates" if family == "flow" else WORK / "gates" / family
    return arms.gated(family, arms.gates_of(root))


def entropy(world, family: str, cases: list[Case]) -> float:
    """Mean entropy of the gates over compositions, places and steps, over ln N, its maximum."""
    setup, arm = emoji_protocol.setup(world, OPTIONS), gates_arm(world, family)
    covered = [case for case in cases if arm.covers(case)]
    return statistics.mean(arms.traced(setup, arm, c).entropy() / math.log(len(c.experts)) for c in covered)


def costs(world, case: Case) -> dict[str, float]:
    """Time of a picture with each family's gates over that with the plain sum: medians of interleaved rounds."""
    setup, seconds = emoji_protocol.setup(world, OPTIONS), {}
    wanted = {"sum": arms.summed()} | {family: gates_arm(world, family) for family in FAMILIES}
    for _ in range(ROUNDS):
        for name, arm in wanted.items():
            with arm.draws(setup, case):
                sample(world.pipe, case.prompt, [0], num_inference_steps=1)
                start = time.perf_counter()
                sample(world.pipe, case.prompt, [0, 1], **setup.options)
                seconds.setdefault(name, []).append(time.perf_counter() - start)
    return {name: statistics.median(took) / statistics.median(seconds["sum"]) for name, took in seconds.items()}


def measured(world, cases: list[Case]) -> dict[str, dict[str, float]]:
    """Entropy and cost by family, kept in rows/families.json."""
    path = KEPT / "families.json"
    if not path.exists():
        two = next(case for case in cases if name_of(case.concepts) == "sunflower+doughnut")
        found = {"entropy": {family: entropy(world, family, cases) for family in FAMILIES}, "cost": costs(world, two)}
        path.write_text(json.dumps(found, indent=1) + "\n")
    return json.loads(path.read_text())


def gates_table() -> str:
    """What was trained, and at which rate."""
    body = []
    for name, config in FAMILIES.items():
        usual = GateConfig(config.family).to_dict()
        options = ", ".join(f"{key} {value}" for key, value in config.to_dict().items() if value != usual[key])
        body.append([name, f"`{config.family}`", options or "-", f"{RATES.get(name, TRAINING.lr):g}"])
    return tables.markdown(["name", "family", "options that are not the default", "rate"], body)


def family_tables(rows: pd.DataFrame) -> str:
    """One table per family: its gates and their controls, by kind."""
    parts = []
    for family, gates in zip(FAMILIES, TRAINED, strict=True):
        root = "gates" if family == "flow" else family
        wanted = [gates, *(f"{root} {control}" for control in ("uniform", "random", "hardened", "averaged"))]
        own = named(rows, wanted).sort_values("arm", key=lambda arms, order=wanted: arms.map(order.index), kind="stable")
        parts.append(f"### {family}\n\n{tables.success_table(own)}")
    return "\n\n".join(parts)


def unseen_table(rows: pd.DataFrame) -> str:
    """Retrieval gates on LoRAs that they were not trained with, beside sum and mean on the same compositions."""
    cases = named(rows, [unseen().name])["case"]
    own = named(rows, ["sum", "mean", "unseen"])
    return tables.success_table(own[own["case"].isin(cases)])


def document(test: pd.DataFrame, found: dict[str, dict[str, float]]) -> str:
    """families.md, from the rows of the test and what was measured."""
    body = [[f, f"{found['entropy'][f]:.2f}", f"{found['cost'][f]:.2f}"] for f in FAMILIES]
    parts = {
        "gates": gates_table(),
        "families": family_tables(of_cases(test, emoji.COMPARED)),
        "decided": tables.markdown(["family", "entropy, share of ln N", "time of a picture, sum = 1"], body),
        "unseen": unseen_table(test),
    }
    return fill((KEPT.parent / "families_text.md").read_text(), parts)


def main() -> None:
    world = emoji_world(device=str(device()))
    in_bf16(world.pipe.unet)
    test = ordered(Rows(unpacked(FOLDER / "test")).read())
    cases = [case for case, _ in emoji_protocol.cases(emoji.TEST) if case.concepts in emoji.COMPARED[:16]]  # two concepts
    (DOCS / "families.md").write_text(document(test, measured(world, cases)))


if __name__ == "__main__":
    main()
