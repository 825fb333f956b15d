"""Can gates be trained once, for LoRAs that they never saw? On validation compositions, then drawn on those of the test.

    python demos/experiments/emoji/shared_gate.py [--kind "two subjects + style"] [--rounds 4] [--per-kind 8] [--seeds 4]

Two gates, on top of binding. "scores": ten numbers that all layers share weigh an expert by what belongs to no expert: its
kind, the layer, the noise level, and how large its output is beside the others'. "retrieval": RAMoLE's gate, which compares
what the experts make of the input. Both begin as the bound sum and learn what the rungs of `ladder.py` learn, from
each validation composition in turn. What is trained is kept in work/shared/, rows are appended below work/shared/rows.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ladder
import torch
from compose import ARMS, SEEDS, SPLITS
from loop import WORK, device, mixed_precision, multiplies_bf16, note, small_attention
from sampling import GUIDANCE, STEPS
from torch import nn

from mole_diffusers import attach, detach
from mole_diffusers.emoji.world import emoji_world
from mole_diffusers.evaluation import arms, emoji_protocol
from mole_diffusers.evaluation.rows import Rows, digest_files
from mole_diffusers.evaluation.runner import Arm, Case, Setup, evaluate
from mole_diffusers.evaluation.tables import as_frame, paired_table, success_table
from mole_diffusers.gates import GateBank
from mole_diffusers.mixture import Mixture
from mole_diffusers.patching.gated_linear import ADAPTER
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.gate_trainer import train_gates

FOLDER = WORK / "shared"
NUMBERS = FOLDER / "numbers.pt"
SCORES = ("kind", "kind, by noise", "kind, in cross-attention", "kind, on the way up")  # of subjects, then of styles
OF_SIZE = ("log of the output's size, less the mean of all", "share of the outputs' sizes, less the mean")
UPDATES = 10  # of a composition, before the next has its turn
LR = {"scores": 2e-2, "retrieval": None}


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

        handle = pipe.unet.register_forward_pre_hook(before, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


class ScoreGate(nn.Module):
    """Weights exp(scores . numbers) of the experts at one layer, on top of the sum; the numbers are all layers' own."""

    def __init__(self, numbers: nn.Parameter, layer: Any, name: str, is_style: torch.Tensor, clock: Clock):
        super().__init__()
        self.numbers, self.clock = numbers, clock
        down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].weight.detach()
        self.segment = down._buffers["segment"]  # [R]
        self.lengths = up.flatten(1).norm(dim=0)  # [R], of the columns of B
        here = torch.tensor([1.0, 0.0, "attn2" in name, name.startswith("up_blocks")])
        self.kinds = torch.stack([~is_style, is_style], -1).float()[..., None] * here  # [N, 2, 4]
        down.register_forward_hook(lambda _, __, low: self(low))

    def forward(self, low: torch.Tensor) -> torch.Tensor:
        """A x, [B, T, R] or [B, R, H, W] -> the same, weighed."""
        axis = 1 if low.dim() == 4 else -1
        rows = low.movedim(axis, -1)  # [B, ..., R]
        weights = self.weights(rows)  # [B, ..., N]
        return (rows * weights.index_select(-1, self.segment).to(rows)).movedim(-1, axis)

    def weights(self, rows: torch.Tensor) -> torch.Tensor:
        """[..., N] of A x [..., R]."""
        experts = len(self.kinds)
        energy = rows.new_zeros(*rows.shape[:-1], experts, dtype=torch.float32)
        energy = energy.index_add(-1, self.segment, (rows * self.lengths).float() ** 2)  # |B_k A_k x|^2, columns apart
        size = 0.5 * (energy + 1e-8).log()  # [..., N]
        of_size = torch.stack([(size - size.mean(-1, keepdim=True)).clamp(-3, 3), size.softmax(-1) - 1 / experts], -1)
        time = self.clock.time.expand(len(rows)) - 0.5  # [B]
        kinds = self.kinds.expand(len(rows), -1, -1, -1).clone()  # [B, N, 2, 4]
        kinds[..., 1] = kinds[..., 0] * time[:, None, None]
        known = kinds.flatten(2) @ self.numbers[:8]  # [B, N]
        known = known.view(len(rows), *[1] * (rows.dim() - 2), experts)
        return torch.exp(known + of_size @ self.numbers[8:])


def put_gates(pipe: Any, mixture: Mixture, numbers: nn.Parameter, styles: Any, clock: Clock) -> None:
    """Score gates at every layer of the denoiser that has experts; they end with `detach`."""
    is_style = torch.tensor([name in styles for name in mixture.experts])
    gates = {
        f"{part}.{name}": ScoreGate(numbers, layer, name, is_style, clock)
        for part, name, layer in ladder.layers(pipe)
        if part == "unet"
    }
    mixture.banks["scores"] = GateBank(gates)


# ---- training


def train_scores(setup: Setup, cases: list[Case], rounds: int, config: GateTraining) -> None:
    """Ten numbers, by turns."""
    numbers, clock = nn.Parameter(torch.zeros(2 * len(SCORES) + len(OF_SIZE))), Clock()
    for turn in range(rounds):
        for case in cases:
            experts = {name: setup.experts[name] for name in case.concepts}
            mixture = ladder.begin(setup.pipe, experts, ladder.Rung())
            try:
                put_gates(setup.pipe, mixture, numbers, setup.styles, clock)
                with clock.of(setup.pipe):
                    log = train_gates(
                        setup.pipe, mixture, ladder.lesson(case), config=replace(config, lr=LR["scores"], seed=turn)
                    )
            finally:
                detach(setup.pipe)
            said = ", ".join(f"{value:+.2f}" for value in numbers.tolist())
            print(turn, case.name, ladder.reached(log), said, flush=True)
    FOLDER.mkdir(parents=True, exist_ok=True)
    torch.save(numbers.detach(), NUMBERS)
    names = [f"{kind}: {score}" for kind in ("subjects", "styles") for score in SCORES] + list(OF_SIZE)
    note("shared scores", **{name: round(value, 3) for name, value in zip(names, numbers.tolist(), strict=True)})


def train_retrieval(setup: Setup, cases: list[Case], rounds: int, config: GateTraining) -> None:
    """Retrieval gates, by turns."""
    folder = FOLDER / "retrieval"
    for turn in range(rounds):
        for case in cases:
            experts = {name: setup.experts[name] for name in case.concepts}
            mixture = attach(setup.pipe, experts, folder if folder.exists() else "retrieval")
            try:
                mixture.bind({name: replace(own, required=False) for name, own in mixture.binding.items()})
                log = train_gates(setup.pipe, mixture, ladder.lesson(case), config=replace(config, seed=turn))
                mixture.save_pretrained(folder)
            finally:
                detach(setup.pipe)
            print(turn, case.name, ladder.reached(log), flush=True)


# ---- drawing


def by_scores() -> Arm:
    """Every LoRA on its own words and in its own place, weighed by the shared numbers."""
    clock = Clock()

    @contextmanager
    def draws(setup: Setup, case: Case) -> Iterator[None]:
        experts = setup.weighted_experts(arms.ones(setup, case))
        with arms.attached_to(setup, experts, "sum", {}) as mixture, mixture.tiled(0), clock.of(setup.pipe):
            put_gates(setup.pipe, mixture, nn.Parameter(torch.load(NUMBERS, weights_only=True)), setup.styles, clock)
            yield

    def settings(setup: Setup, case: Case) -> dict[str, Any]:
        return setup.expert_settings(case.experts) | {"trained": digest_files(NUMBERS)}

    return Arm("shared scores", draws, settings)


def by_retrieval(folder: Path) -> Arm:
    """The same, weighed by the retrieval gates."""
    return arms.weighted("shared retrieval", gates=lambda case: folder, binding=lambda setup, case: {})


TRAIN = {"scores": train_scores, "retrieval": train_retrieval}
DRAWN = {"scores": by_scores, "retrieval": partial(by_retrieval, FOLDER / "retrieval")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=SPLITS["test"], default="two subjects + style")
    parser.add_argument("--gates", nargs="*", choices=TRAIN, default=list(TRAIN))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--per-kind", type=int, default=8, help="compositions of the test; all of validation teach")
    parser.add_argument("--seeds", type=int, default=4)
    args = parser.parse_args()
    world = emoji_world(device=device().type)
    setup = emoji_protocol.setup(world, {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE})
    splits = {name: {args.kind: split[args.kind][: args.per_kind]} for name, split in SPLITS.items()}
    cases = {name: emoji_protocol.cases(split) for name, split in splits.items()}
    config = replace(ladder.TRAINING, steps=UPDATES, warmup=0, precision="bf16" if multiplies_bf16() else "no")
    for name in args.gates:
        if not (FOLDER / ("numbers.pt" if name == "scores" else name)).exists():
            with small_attention():
                TRAIN[name](setup, [case for case, _ in cases["validation"]], args.rounds, config)
    for split, found in cases.items():
        metrics = emoji_protocol.JudgeMetrics(world.judge(), {(case.prompt, case.size): scene for case, scene in found})
        with small_attention(), mixed_precision():
            rows = evaluate(
                setup,
                [ARMS["bound"](), *(DRAWN[name]() for name in args.gates)],
                [case for case, _ in found],
                metrics,
                seeds=range(SEEDS[split], SEEDS[split] + args.seeds),
                rows=Rows(FOLDER / "rows" / split),
            )
        table = as_frame(rows)
        print(split, success_table(table), paired_table(table, "bound"), sep="\n", flush=True)


if __name__ == "__main__":
    main()
