"""Initial weights of gates: equal ones, or the best constant ones by least squares on the experts' own activations."""

from __future__ import annotations

import torch

from mole_diffusers.merging.activations import Activations
from mole_diffusers.merging.layers import layers_of, merge_key
from mole_diffusers.merging.regression import best_router, own_answers, scalar_equations, solved
from mole_diffusers.training.context import TrainingContext

RIDGE = 0.01  # of SSR-Merge, its own default


def initialize(context: TrainingContext, initial: str) -> None:
    """Set every gate to the constant weights that are best on the inputs X_k that its layers get from each expert k alone.

    "uniform" changes nothing. "scalars" are min_a sum_k |sum_j a_j delta_j X_k - delta_k X_k|^2 over all layers of a
    gate: LoRA Soups' CAT, solved exactly. "ssr" replaces delta_k X_k by the output of SSR-Merge, which gives the weights
    nearest to that merge. Without its ridge the two are the same, as SSR solves the same problem over more matrices; the
    ridge pulls towards the mean.

    The experts run the single prompts of the training data, 4 steps each. An expert that changes nothing keeps weight 1.

    Raises ValueError for an expert without single prompts, or for gates that can only start at equal weights.
    """
    if initial == "uniform":
        return
    gates = context.mixture.parts.layers_by_gate()
    if not gates or not all(gate.starts_anywhere for gate, _ in gates):
        raise ValueError(f"gates of type {context.mixture.config.gate_type!r} can only start 'uniform', not {initial!r}")
    equations = _equations(context, initial)
    for gate, layers in gates:
        parts = [equations[key] for key in map(merge_key, layers)]
        normal, wanted = (torch.stack(sums).sum(0) for sums in zip(*parts, strict=True))
        idle = normal.diagonal() == 0
        weights = torch.where(idle, torch.ones_like(wanted), solved(normal, wanted))
        gate.begin(weights.float(), ~idle)


def _equations(context: TrainingContext, initial: str) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Layer key -> normal equations (H [N, N], g [N]) over all experts; zeros where an expert lacks the layer."""
    weighed, singles = context.mixture.parts.weighed(), context.data.singles
    if missing := [name for name in weighed if not singles.get(name)]:
        raise ValueError(f"weights to start at need single prompts of every expert, and {missing[0]!r} has none")
    activations = Activations(context.pipe, singles)
    experts = context.bar(weighed.items(), "activations of each expert")
    own = [activations.own(name, expert, strength) for name, (expert, strength) in experts]
    found = {}
    for key, layer in layers_of(weighed).items():
        there = [i for i, pair in enumerate(layer) if pair is not None and key in own[i]]
        pairs = [pair.folded() for i in there if (pair := layer[i]) is not None]
        inputs = [own[i][key].double() for i in there]
        normal, wanted = torch.zeros(len(layer), len(layer)).double(), torch.zeros(len(layer)).double()
        if pairs:
            index = torch.tensor(there)
            answers = own_answers(pairs) if initial == "scalars" else [best_router(pairs, inputs, RIDGE)] * len(pairs)
            normal[index[:, None], index], wanted[index] = scalar_equations(pairs, inputs, answers)
        found[key] = (normal, wanted)
    return found
