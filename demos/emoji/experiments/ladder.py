"""Where is the limit? More and more is free to learn composing, from one weight per LoRA to the LoRAs' own matrices.

    python demos/emoji/experiments/ladder.py [--kinds ...] [--per-kind 4] [--seeds 4] [--rungs ...] [--updates 60 200]
    python demos/emoji/experiments/ladder.py --figure docs/ladder.png

Every rung begins as bound LoRAs and learns from prompts alone, with one objective: to draw collages of a composition's
subjects, each drawn by itself, under the composition's prompt and with each LoRA in the place of its drawing. Trained rungs
are kept in work/ladder/RUNG/UPDATES, and rows are appended below work/ladder/rows, so you can continue an
interrupted run.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compose import SEEDS, measured
from loop import WORK, device, note, small_attention
from packing import pack
from sampling import GUIDANCE, STEPS
from torch import nn
from train_gates import gates_for, lesson, recipe

from mole_diffusers import Mixture, attach, detach
from mole_diffusers.gates import GATE_CONFIG, GATE_WEIGHTS, Gate, GateBank, GateConfig, load_gates
from mole_diffusers.lora import Expert
from mole_diffusers.training import GateTraining, TrainingData, mean_losses, train_gates
from mole_world import VALIDATION
from mole_world.evaluation import emoji_protocol, methods
from mole_world.evaluation.plots import curves
from mole_world.evaluation.rows import Row, Rows, digest_files
from mole_world.evaluation.runner import Case, Method, Setup, requested_rows
from mole_world.evaluation.tables import as_frame, success_table
from mole_world.world import emoji_world

UPDATES = (60, 200)


# ---- rungs


class Mixer(nn.Module):
    """The matrix D [R, R] in y = W x + B (g * ((I + D) (A x))). It mixes the ranks of all LoRAs, and is zero at first."""

    def __init__(self, down: nn.Module):
        super().__init__()
        ranks = len(down.weight)
        self.change = nn.Parameter(torch.zeros(ranks, ranks, device=down.weight.device))
        down.register_forward_hook(lambda _, __, low: self(low))

    def forward(self, low: torch.Tensor) -> torch.Tensor:
        """A x, [B, T, R] or [B, R, H, W] -> (I + D) (A x)."""
        axis = 1 if low.dim() == 4 else -1
        return low + F.linear(low.movedim(axis, -1), self.change).movedim(-1, axis)


def mixer(down: nn.Module, up: nn.Module) -> nn.Module:
    return Mixer(down)


def free_a(down: nn.Module, up: nn.Module) -> nn.Module:
    return down


def free_both(down: nn.Module, up: nn.Module) -> nn.Module:
    return nn.ModuleList([down, up])


class Freed(Gate):
    """What a rung frees at one layer. It weighs nothing: among the gates of a mixture it is trained and saved like them."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module


@dataclass(frozen=True)
class Rung:
    """What learns: gates of a type, or what `frees` returns for A and B of each layer with LoRAs.

    Attributes:
        lr: the learning rate; None takes the one that suits each gate.
    """

    gates: str | GateConfig = "sum"
    frees: Callable[[nn.Module, nn.Module], nn.Module] | None = None
    lr: float | None = None


RUNGS = {
    "mole": Rung("mole"),
    "outputs": Rung("outputs"),  # MoLE by its equations
    "static": Rung(GateConfig("static", granularity="matrix", total="linear")),  # a constant per LoRA and layer
    "flow": Rung("flow"),
    "rank": Rung("rank"),  # a gate per rank, for every token
    "factors": Rung("factors"),  # a constant per rank
    "mixer": Rung(frees=mixer, lr=1e-2),
    "A": Rung(frees=free_a, lr=3e-3),
    "A+B": Rung(frees=free_both, lr=1.5e-3),  # both move their product
}


def layers(pipe: Any) -> Iterator[tuple[str, str, Any, Any]]:
    """(part, name in it, A, B) of each layer that attached LoRAs change. A and B are those of all LoRAs."""
    for part in ("unet", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules():
            if getattr(module, "lora_A", None):
                (down,), (up,) = module.lora_A.values(), module.lora_B.values()
                yield part, name, down, up


def set_free(pipe: Any, mixture: Mixture, rung: Rung) -> None:
    """Add what a rung frees to the mixture's gates, so that it is trained and saved. `detach` undoes this."""
    if rung.frees is not None:
        freed = {f"{part}.{name}": Freed(rung.frees(*halves)) for part, name, *halves in layers(pipe)}
        mixture.banks["layers"] = GateBank(freed)


# ---- training


def train(
    pipe: Any, experts: Mapping[str, Expert], rung: Rung, data: TrainingData, folder: Path, *, config: GateTraining
) -> list[dict]:
    """Train a rung on bound experts, write it to `folder` and return the log. The pipeline is left as it was."""
    mixture = attach(pipe, experts, gates_for(rung.gates, tuple(experts)))
    try:
        set_free(pipe, mixture, rung)
        log = train_gates(pipe, mixture, data, config=replace(config, lr=rung.lr))
        mixture.save_pretrained(folder)  # last: if its config is there, everything is
    finally:
        detach(pipe)
    return log


def reached(log: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each term over the last tenth of the updates."""
    return {name: round(value, 3) for name, value in mean_losses(log)[1].items()}


# ---- drawing


def kept(name: str, updates: int) -> Callable[[Case], Path]:
    """The folder of a trained rung, for a case."""
    return methods.gates_of(WORK / "ladder" / name / str(updates))


def bound(name: str, updates: int) -> Method:
    """A trained rung with every LoRA on its own words and in its own place."""
    rung, folder = RUNGS[name], kept(name, updates)

    @contextmanager
    def draws(setup: Setup, case: Case) -> Iterator[None]:
        experts = setup.weighted_experts(methods.ones(setup, case))
        with methods.attached_to(setup, experts, gates_for(rung.gates, case.concepts), {}) as mixture, mixture.tiled(0):
            set_free(setup.pipe, mixture, rung)
            load_gates(folder(case)).fill(mixture.banks)
            yield

    def settings(setup: Setup, case: Case) -> dict[str, Any]:
        return setup.expert_settings(methods.ones(setup, case)) | {"trained": digest_files(folder(case) / GATE_WEIGHTS)}

    return Method(f"{name} @ {updates}", draws, settings, covers=lambda case: (folder(case) / GATE_CONFIG).exists())


def placed(rows: Sequence[Row]) -> Iterator[Row]:
    """Rows for the figure: by rung, with a line per number of updates. Untrained methods are at every rung."""
    parted = [(row, *row["method"].partition(" @ ")[::2]) for row in rows]
    trained = {rung for _, rung, updates in parted if updates}
    for row, rung, updates in sorted(parted, key=lambda found: int(found[2] or 0)):
        line = f"{updates} updates" if updates else rung
        for at in [rung] if updates else [name for name in RUNGS if name in trained]:
            yield row | {"panel": row["kind"], "what is free to learn": at, "line": line}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kinds", nargs="*", choices=VALIDATION, default=["three subjects"])
    parser.add_argument("--per-kind", type=int, default=4, help="compositions of each kind")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rungs", nargs="*", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--updates", nargs="*", type=int, default=UPDATES)
    parser.add_argument("--pack", action="store_true", help="write the verdicts to docs/results/, too")
    parser.add_argument("--figure", type=Path, metavar="PNG", help="draw the figure of every rung trained so far, too")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    found = emoji_protocol.cases({kind: VALIDATION[kind][: args.per_kind] for kind in args.kinds})
    for updates, name, (case, _) in product(args.updates, args.rungs, found):
        folder, start = kept(name, updates)(case), time.time()
        if (folder / GATE_CONFIG).exists():
            continue
        with small_attention():
            experts, config = {c: setup.experts[c] for c in case.concepts}, replace(recipe(case.concepts), steps=updates)
            log = train(world.pipe, experts, RUNGS[name], lesson(case.concepts), folder, config=config)
        note(f"ladder {name} {updates} {case.name}", **reached(log), seconds=round(time.time() - start))
    trained = [bound(name, n) for n in args.updates for name in args.rungs]
    drawn = [methods.summed(), methods.bound(), methods.in_tiles(), *trained]
    seeds = range(SEEDS["validation"], SEEDS["validation"] + args.seeds)
    metrics = emoji_protocol.JudgeMetrics(world.judge(), world.drawings, found)
    rows = Rows(WORK / "ladder" / "rows")
    table = as_frame(measured(setup, drawn, found, metrics, seeds=seeds, rows=rows))
    print(success_table(table))
    print(success_table(table, against="bound"))
    if args.pack:
        pack("ladder", table, ["kind", "concepts", "method", "seed"])
    if args.figure:
        every = [*drawn, *(bound(name, n) for n in UPDATES for name in RUNGS)]
        shown = requested_rows(setup, every, [case for case, _ in found], seeds=seeds, rows=rows)
        curves(as_frame(placed(shown)), args.figure, at="what is free to learn", line="line", panel="panel")


if __name__ == "__main__":
    main()
