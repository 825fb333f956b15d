"""Muon for the matrices and convolutions of a network, and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import AdamW, Muon


class MuonAndAdamW:
    """Muon and AdamW with a common learning rate: Muon's steps are as long as AdamW's.

    Muon (Jordan et al. 2024) steps along the orthogonalised momentum of each hidden layer's weight. For a convolution, this
    is a matrix [outputs, inputs x height x width]. The step length follows Liu et al. 2025, section 2.2.

    Args:
        ends: parts of the names of layers that are not hidden: the first, the last and embeddings.
    """

    def __init__(self, module: nn.Module, lr: float, ends: Sequence[str]):
        named = dict(module.named_parameters())
        hidden = [n for n, p in named.items() if p.ndim >= 2 and not any(end in n for end in ends)]
        self._hidden = [named[n] for n in hidden]
        self._matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self._hidden]  # the same memory
        self._adam = AdamW([p for n, p in named.items() if n not in hidden], lr, weight_decay=0.01, fused=True)
        self._muon = Muon(self._matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw", ns_steps=3)
        self.param_groups = self._adam.param_groups + self._muon.param_groups

    def step(self) -> None:
        for matrix, p in zip(self._matrices, self._hidden, strict=True):
            matrix.grad = p.grad.view_as(matrix)
        self._adam.step()
        self._muon.step()

    def zero_grad(self) -> None:
        for p in self._hidden:
            p.grad = None
        self._adam.zero_grad()

    def state_dict(self) -> dict:
        return {"adam": self._adam.state_dict(), "muon": self._muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self._adam.load_state_dict(state["adam"])
        self._muon.load_state_dict(state["muon"])
        self.param_groups = self._adam.param_groups + self._muon.param_groups
