"""Can gates be trained once, for LoRAs that they never saw? They learn on validation and are tested on the test split.

    python demos/emoji/experiments/shared_gate.py [--kind "two subjects + style"] [--rounds 2] [--per-kind 8] [--seeds 4]

There are two gates, on top of binding. "scores" has ten numbers that all layers share. They weigh an expert by things that
exist for any expert: its kind, the layer, the noise level, and how large its output is compared to the others'. "retrieval"
is RAMoLE's gate, which compares the experts' outputs for the input. Both begin as the bound sum and learn from the
validation compositions in turn. The lesson is to draw collages of the subjects, each drawn alone by its own LoRAs, under
the composed prompt and with each LoRA in its place. Trained gates are kept in work/shared/, and rows are appended below
work/shared/rows.
"""

import argparse
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ladder
import torch
from compose import SEEDS, SPLITS, measured, rivals
from loop import WORK, device, multiplies_bf16, note, small_attention
from packing import pack
from sampling import GUIDANCE, STEPS
from torch import nn

from mole_diffusers import Mixture, attach, detach
from mole_diffusers.gates import Gate, GateBank
from mole_diffusers.training import GateTraining, TrainingData, cells, train_gates
from mole_world.evaluation import emoji_protocol, methods
from mole_world.evaluation.rows import Rows, digest_files
from mole_world.evaluation.runner import Case, Method, Setup
from mole_world.evaluation.tables import as_frame, success_table
from mole_world.scenes import Scene
from mole_world.world import emoji_world

Lessons = Sequence[tuple[Case, Scene]]
FOLDER = WORK / "shared"
NUMBERS = FOLDER / "numbers.pt"
SCORES = ("kind", "kind, by noise", "kind, in cross-attention", "kind, on the way up")  # for subjects, then for styles
OF_SIZE = ("log of the output's size, less the mean of all", "share of the outputs' sizes, less the mean")
UPDATES = 25  # per composition, before the next one's turn
LR = 4e-3  # of the ten numbers; at 2e-2 they move at random
TRAINING = GateTraining(terms={"collage": {"batch": 8, "seeds": 8}}, steps=UPDATES, warmup=0)


class Clock:
    """The noise level at which the denoiser runs."""

    def __init__(self) -> None:
        self.time = torch.zeros(1)

    @contextmanager
    def of(self, pipe: Any) -> Iterator[None]:
        """Watch a denoiser while the block runs."""
        steps = pipe.scheduler.config.num_train_timesteps

        def before(_: nn.Module, args: tuple, kwargs: dict) -> None:
            time = args[1] if len(args) > 1 else kwargs["timestep"]
            self.time = torch.as_tensor(time).float().reshape(-1) / steps  # [B] or [1]

        with rivals.before_forward(pipe.unet, before):
            yield


class ScoreGate(Gate):
    """Weights exp(scores . numbers) of the experts at one layer, on top of the sum. All layers share the numbers."""

    def __init__(self, numbers: nn.Parameter, down: Any, up: Any, *, name: str, is_style: torch.Tensor, clock: Clock):
        super().__init__()
        self.numbers, self.clock = numbers, clock
        self.expert_index = down.expert_index  # [R]
        self.lengths = up.weight.detach().flatten(1).norm(dim=0)  # [R], of the columns of B
        here = torch.tensor([1.0, 0.0, "attn2" in name, name.startswith("up_blocks")])
        self.kinds = torch.stack([~is_style, is_style], -1).float()[..., None] * here  # [N, 2, 4]
        down.register_forward_hook(lambda _, __, low: self(low))

    def forward(self, low: torch.Tensor) -> torch.Tensor:
        """A x, [B, T, R] or [B, R, H, W] -> the same, weighted."""
        axis = 1 if low.dim() == 4 else -1
        rows = low.movedim(axis, -1)  # [B, ..., R]
        weights = self.weights(rows)  # [B, ..., N]
        return (rows * weights.index_select(-1, self.expert_index).to(rows)).movedim(-1, axis)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """Weights [..., N] for A x [..., R]."""
        experts = len(self.kinds)
        energy = rows.new_zeros(*rows.shape[:-1], experts, dtype=torch.float32)
        # |B_k A_k x|^2, column by column
        energy = energy.index_add(-1, self.expert_index, (rows * self.lengths).float() ** 2)
        size = 0.5 * (energy + 1e-8).log()  # [..., N]
        of_size = torch.stack([(size - size.mean(-1, keepdim=True)).clamp(-3, 3), size.softmax(-1) - 1 / experts], -1)
        time = self.clock.time.expand(len(rows)) - 0.5  # [B]
        kinds = self.kinds.expand(len(rows), -1, -1, -1).clone()  # [B, N, 2, 4]
        kinds[..., 1] = kinds[..., 0] * time[:, None, None]
        known = kinds.flatten(2) @ self.numbers[:8]  # [B, N]
        known = known.view(len(rows), *[1] * (rows.dim() - 2), experts)
        return torch.exp(known + of_size @ self.numbers[8:])


def put_gates(pipe: Any, mixture: Mixture, numbers: nn.Parameter, *, styles: Collection[str], clock: Clock) -> None:
    """Put score gates at every layer of the denoiser that has experts. `detach` removes them."""
    is_style = torch.tensor([name in styles for name in mixture.experts])
    gates = {
        name: ScoreGate(numbers, down, up, name=name, is_style=is_style, clock=clock)
        for part, name, down, up in ladder.layers(pipe)
        if part == "unet"
    }
    mixture.banks["scores"] = GateBank(gates)


# ---- training


@contextmanager
def taught(setup: Setup, case: Case, scene: Scene, gates: Any) -> Iterator[tuple[Mixture, Callable[..., None]]]:
    """Attach the LoRAs of a composition, each in its place. Gives the mixture, and a function that trains its gates with
    the given settings."""
    experts = {name: setup.experts[name] for name in case.concepts}
    subjects = methods.subjects_of(setup, case)
    boxes = dict(zip(subjects, cells(len(subjects), *scene.size), strict=True))
    data = TrainingData(
        composed=[case.prompt],
        styles=[name for name in case.concepts if name in setup.styles],
        parts={case.prompt: [replace(scene, subjects=(name,)).caption for name in scene.subjects]},
    )
    width, height = scene.size
    precision = "bf16" if multiplies_bf16() else "no"

    def train(**settings: Any) -> None:
        config = replace(TRAINING, width=width, height=height, precision=precision, **settings)
        log = train_gates(setup.pipe, mixture, data, config=config)
        print(case.name, ladder.reached(log), flush=True)

    mixture = attach(setup.pipe, experts, gates, binding={name: (None, box) for name, box in boxes.items()})
    try:
        yield mixture, train
    finally:
        detach(setup.pipe)


def train_scores(setup: Setup, lessons: Lessons) -> None:
    """Train the ten numbers of the score gates."""
    numbers, clock = nn.Parameter(torch.zeros(2 * len(SCORES) + len(OF_SIZE))), Clock()
    for turn, (case, scene) in enumerate(lessons):
        with taught(setup, case, scene, "sum") as (mixture, train), clock.of(setup.pipe):
            put_gates(setup.pipe, mixture, numbers, styles=setup.styles, clock=clock)
            train(lr=LR, seed=turn)
        print([round(value, 2) for value in numbers.tolist()], flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(numbers.detach(), NUMBERS)
    names = [f"{kind}: {score}" for kind in ("subjects", "styles") for score in SCORES] + list(OF_SIZE)
    note("shared scores", **{name: round(value, 3) for name, value in zip(names, numbers.tolist(), strict=True)})


def train_retrieval(setup: Setup, lessons: Lessons) -> None:
    """Train the retrieval gates. They get their name only after the last lesson."""
    folder = FOLDER / "retrieval.part"
    for turn, (case, scene) in enumerate(lessons):
        with taught(setup, case, scene, folder if turn else "retrieval") as (mixture, train):
            train(seed=turn)
            mixture.save_pretrained(folder)
    folder.rename(FOLDER / "retrieval")


# ---- drawing


def by_scores() -> Method:
    """Every LoRA on its own words and in its own place, weighted by the shared numbers."""
    clock = Clock()

    @contextmanager
    def draws(setup: Setup, case: Case) -> Iterator[None]:
        experts = setup.weighted_experts(methods.ones(setup, case))
        with methods.attached_to(setup, experts, "sum", {}) as mixture, mixture.tiled(0), clock.of(setup.pipe):
            numbers = nn.Parameter(torch.load(NUMBERS, weights_only=True))
            put_gates(setup.pipe, mixture, numbers, styles=setup.styles, clock=clock)
            yield

    def settings(setup: Setup, case: Case) -> dict[str, Any]:
        return setup.expert_settings(methods.ones(setup, case)) | {"trained": digest_files(NUMBERS)}

    return Method("shared scores", draws, settings)


def by_retrieval(folder: Path) -> Method:
    """Every LoRA on its own words and in its own place, weighted by the retrieval gates."""
    return methods.weighted("shared retrieval", gates=lambda case: folder, binding=methods.from_files)


TRAIN = {"scores": train_scores, "retrieval": train_retrieval}
DRAWN = {"scores": by_scores, "retrieval": partial(by_retrieval, FOLDER / "retrieval")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SPLITS["test"], default="two subjects + style")
    parser.add_argument("--gates", nargs="*", choices=TRAIN, default=list(TRAIN))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--per-kind", type=int, default=8, help="compositions of the test; training uses all of validation")
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--pack", action="store_true", help="write the verdicts to docs/results/, too")
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    splits = {name: {args.kind: split[args.kind][: args.per_kind]} for name, split in SPLITS.items()}
    cases = {name: emoji_protocol.cases(split) for name, split in splits.items()}
    for name in args.gates:
        if not (FOLDER / ("numbers.pt" if name == "scores" else name)).exists():
            with small_attention():
                TRAIN[name](setup, cases["validation"] * args.rounds)
    for split, found in cases.items():
        drawn = [methods.bound(), *(DRAWN[name]() for name in args.gates)]
        seeds, rows = range(SEEDS[split], SEEDS[split] + args.seeds), Rows(FOLDER / "rows" / split)
        metrics = emoji_protocol.JudgeMetrics(world.judge(), world.drawings, found)
        table = as_frame(measured(setup, drawn, found, metrics, seeds=seeds, rows=rows))
        print(split, success_table(table), success_table(table, against="bound"), sep="\n", flush=True)
        if args.pack:
            pack("shared", table.assign(split=split), ["split", "kind", "concepts", "method", "seed"])


if __name__ == "__main__":
    main()
