"""Merges by least squares on the experts' own activations: SSR-Merge, RegMean, IterIS, scalars. They share a core in
float64.

All solve, per layer, min_W sum_k lambda_k |W X~_k - delta_k X_k|^2 with a ridge. X_k [n, Cin] are the layer's inputs
while expert k alone runs its own prompts. The methods differ in the form of W, in X~_k and in the ridge. A layer that
only one expert has passes through unchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from mole_diffusers.merging.factors import Layer, Layers, Merged, Pair, concatenated, present

Inputs = Mapping[str, Sequence[torch.Tensor | None]]  # layer -> X_k [n_k, Cin] per expert


def ssr(layers: Layers, *, inputs: Inputs, ridge: float = 0.01) -> Merged:
    """SSR-Merge (arXiv 2606.10617): up @ R @ down, with the router R [R, R] that best separates the experts' ranks.

    R = (Q + eta I / N) (G + eta I)^-1, so that a ridge shrinks to the mean of the experts. The paper's fixed 1e-4
    shrinks to 0, and depends on how a LoRA divides its size between down and up.

    Args:
        ridge: eta as a share of G's mean diagonal: 0.01 with many more rows than ranks, 0.1 to 1 with fewer. 0 or more.
    """
    _check_ridge(ridge)

    def merged(pairs: list[Pair], inputs: list[torch.Tensor]) -> Pair:
        whole = concatenated(pairs)
        return whole._replace(down=best_router(pairs, inputs, ridge) @ whole.down)

    return _each(layers, merged, inputs)


def best_router(pairs: Sequence[Pair], inputs: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    """R [R, R] of SSR-Merge, see `ssr`: maps all experts' A x to the A x of the expert whose inputs they are."""
    whole = concatenated(pairs)
    eye = torch.eye(whole.rank, dtype=whole.down.dtype)
    picks = list(eye.split([p.rank for p in pairs]))  # z_k = picks[k] @ z
    squares = [_squares(x @ whole.down.T) for x in inputs]  # [R, R]
    eta = ridge * torch.stack(squares).sum(0).diagonal().mean() / len(pairs)
    ridged = [s + eta * eye for s in squares]
    return least_squares(picks, ridged, ridged)


def regmean(layers: Layers, *, inputs: Inputs, diagonal: float = 0.9, ridge: float = 0.0) -> Merged:
    """RegMean (Jin et al., 2022): (sum delta_k C_k) (sum C_k)^-1 with C_k = X_k^T X_k; exact at rank R, up unchanged.

    Args:
        diagonal: factor for the entries of C_k off its diagonal, 0 to 1; below 1 the inverse exists even with few rows.
        ridge: added to each C_k's diagonal, as a share of its Frobenius norm: shrinks to the mean of the experts. 0 or
            more.
    """
    _check_ridge(ridge)
    if not 0 <= diagonal <= 1:
        raise ValueError(f"RegMean's diagonal must be at least 0 and at most 1, got {diagonal}")

    def merged(pairs: list[Pair], inputs: list[torch.Tensor]) -> Pair:
        squares = [_squares(x) for x in inputs]  # [Cin, Cin]
        squares = [diagonal * s + (1 - diagonal) * s.diagonal().diag() for s in squares]
        squares = [_ridged(s, ridge) for s in squares]
        return concatenated(pairs)._replace(down=least_squares([p.down for p in pairs], squares, squares))

    return _each(layers, merged, inputs)


def iteris(
    layers: Layers, *, rerun: Callable[[Merged], Inputs], inputs: Inputs, rounds: int = 6, ridge: float = 0.01
) -> Merged:
    """IterIS (arXiv 2411.15231): RegMean whose inputs X~_k come from the merged model itself, found by iteration.

    Experts are weighted by |delta_k|^2 / |delta_k X_k|^2. (The authors' code takes the norms with the base weight added.)

    Args:
        rerun: a merge -> the inputs on each expert's prompts when the merge runs them, row by row as in `inputs`.
        rounds: 1 is RegMean with these weights and this ridge.
        ridge: of both factors, as a share of their Frobenius norms: shrinks to the weighted mean of the experts. 0 or
            more. The authors take 1e-7 to 1e-4 with many samples. But layers that read text get fewer different tokens
            from some prompts than they have channels. With such a small ridge they answer other prompts worse than the
            mean does. 0.01 was chosen on the embedded world's validation split.
    """
    if rounds < 1:
        raise ValueError(f"rounds of IterIS must be 1 or more, got {rounds}")
    _check_ridge(ridge)

    def merged(pairs: list[Pair], own: list[torch.Tensor], now: list[torch.Tensor]) -> Pair:
        changes = [_energy(x @ p.down.T @ p.up.T).clamp_min(1e-30) for p, x in zip(pairs, own, strict=True)]
        weights = [_energy(p.delta()) / change for p, change in zip(pairs, changes, strict=True)]
        cross = [_ridged(w * x.T @ y, ridge) for w, x, y in zip(weights, own, now, strict=True)]
        squares = [_ridged(w * _squares(y), ridge) for w, y in zip(weights, now, strict=True)]
        return concatenated(pairs)._replace(down=least_squares([p.down for p in pairs], cross, squares))

    out: Merged = {}
    for number in range(rounds):
        out = _each(layers, merged, inputs, rerun(out) if number else inputs)
    return out


def scalars(layers: Layers, *, inputs: Inputs, ridge: float = 0.0) -> Merged:
    """The best weight per expert and layer: LoRA Soups' CAT (arXiv 2410.13025) solved exactly and without its data.

    Args:
        ridge: as a share of the mean diagonal of the normal equations: shrinks to weights 1, the sum. 0 or more.
    """
    _check_ridge(ridge)

    def merged(pairs: list[Pair], inputs: list[torch.Tensor]) -> Pair:
        weights = best_scalars(pairs, inputs, ridge)
        return concatenated([p._replace(up=w * p.up) for p, w in zip(pairs, weights, strict=True)])

    return _each(layers, merged, inputs)


def best_scalars(pairs: Sequence[Pair], inputs: Sequence[torch.Tensor], ridge: float) -> torch.Tensor:
    """a [N] of min sum_k |sum_j a_j delta_j X_k - delta_k X_k|^2 + eta |a - 1|^2, by its normal equations in rank space."""
    normal, wanted = scalar_equations(pairs, inputs, own_answers(pairs))
    eta = ridge * normal.diagonal().mean()
    return solved(normal + eta * torch.eye(len(pairs), dtype=normal.dtype), wanted + eta)


def own_answers(pairs: Sequence[Pair]) -> list[torch.Tensor]:
    """M_k [R, R] of `scalar_equations` if each expert should answer as it does alone: with its own ranks only."""
    which = torch.cat([torch.full((p.rank,), k) for k, p in enumerate(pairs)])  # [R]
    return [(which == k).to(pairs[0].down.dtype).diag() for k in range(len(pairs))]


def scalar_equations(
    pairs: Sequence[Pair], inputs: Sequence[torch.Tensor], answers: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal equations (H [N, N], g [N]) of min sum_k |sum_j a_j delta_j X_k - up M_k down X_k|^2, which add over layers.

    Args:
        pairs: with their scales folded in; up [Cout, R] and down [R, Cin] are theirs side by side.
        inputs: X_k [n_k, Cin].
        answers: M_k [R, R].
    """
    whole, ranks = concatenated(pairs), [p.rank for p in pairs]
    outer = whole.up.T @ whole.up  # [R, R]
    squares = [_squares(x @ whole.down.T) for x in inputs]  # Z_k Z_k^T
    # <delta_j X_k, delta_l X_k> are the block sums of outer * Z_k Z_k^T
    normal = torch.stack([_block_sums(outer * s, ranks) for s in squares]).sum(0)
    wanted = torch.stack([_block_sums(outer * (s @ m.T), ranks).sum(1) for s, m in zip(squares, answers, strict=True)])
    return normal, wanted.sum(0)


def solved(normal: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """The smallest a [N] with normal @ a = wanted."""
    return torch.linalg.lstsq(normal, wanted[:, None], driver="gelsd").solution[:, 0]


def least_squares(
    targets: Sequence[torch.Tensor], cross: Sequence[torch.Tensor], squares: Sequence[torch.Tensor]
) -> torch.Tensor:
    """The core: M [R, D], with rows targets_k cross_k (sum squares)^-1 for each k.

    With targets_k = down_k, cross_k = X_k^T X~_k and squares_k = X~_k^T X~_k, up @ M is the W that best matches the
    experts' outputs. If the inputs do not span all directions, it is the smallest such M.

    Args:
        targets: [r_k, D] each.
        cross, squares: [D, D] each.
    """
    numerator = torch.cat([t @ c for t, c in zip(targets, cross, strict=True)])  # [R, D]
    denominator = torch.stack(list(squares)).sum(0)  # [D, D]
    factor, failed = torch.linalg.cholesky_ex(denominator)
    if failed or factor.diagonal().amin() < 1e-7 * factor.diagonal().amax():
        return numerator @ torch.linalg.pinv(denominator, hermitian=True, rtol=1e-12)
    return torch.cholesky_solve(numerator.T, factor).T


def relative_loss(layer: Layer, inputs: Sequence[torch.Tensor | None], merged: Pair) -> float:
    """sum_k |W X_k - delta_k X_k|^2 / sum_k |delta_k X_k|^2: 0 if every expert acts as it does alone, 1 if none acts."""
    lost = whole = 0.0
    for pair, x in zip(present(layer), _recorded(layer, inputs), strict=True):
        want = x @ pair.down.T @ pair.up.T
        lost += _energy(x @ merged.down.T @ (merged.scale * merged.up.T) - want).item()
        whole += _energy(want).item()
    return lost / whole if whole else 0.0


def _check_ridge(ridge: float) -> None:
    if ridge < 0:
        raise ValueError(f"the ridge must be 0 or more, got {ridge}")


def _each(layers: Layers, solve: Callable[..., Pair], *inputs: Inputs) -> Merged:
    """`solve(pairs, X_k, ..)` for each layer, with the X_k of each of `inputs`; a layer of a single expert as it is."""
    out = {}
    for key, layer in layers.items():
        pairs = present(layer)
        out[key] = pairs[0] if len(pairs) == 1 else solve(pairs, *(_recorded(layer, each[key]) for each in inputs))
    return out


def _recorded(layer: Layer, inputs: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """The X_k of the experts that have a layer."""
    return [x.to(p.down.dtype) for p, x in zip(layer, inputs, strict=True) if p is not None and x is not None]


def _squares(x: torch.Tensor) -> torch.Tensor:
    return x.T @ x


def _energy(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum()


def _ridged(square: torch.Tensor, share: float) -> torch.Tensor:
    return square + share * square.norm() * torch.eye(len(square), dtype=square.dtype)


def _block_sums(square: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    rows = torch.stack([b.sum(0) for b in square.split(list(ranks))])  # [N, R]
    return torch.stack([b.sum(1) for b in rows.split(list(ranks), 1)], 1)  # [N, N]
