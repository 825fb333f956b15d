"""Figures of what the gates did: weights by block and step, shares over the steps, places in the picture. Need matplotlib.

Colours are Okabe and Ito's, safe for colour blindness. Each expert has the same colour everywhere, with its name next to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor

from mole_diffusers.inspection.contributions import Contributions
from mole_diffusers.patching.gating.trace import Trace
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
DPI, OPACITY, MOST_ROWS = 110, 0.65, 40


def colours(names: Collection[str], shades: Mapping[str, str] | None = None) -> dict[str, str]:
    """A colour per name, the same in any order; `shades` are colours that are already chosen."""
    free = [colour for colour in COLOURS if colour not in (shades or {}).values()] or list(COLOURS)
    others = sorted(name for name in names if name not in (shades or {}))
    return {name: free[i % len(free)] for i, name in enumerate(others)} | dict(shades or {})


def block_places(trace: Trace, names: Mapping[str, str] | None = None) -> dict[str, str]:
    """{place: label} of the denoiser's gates that were evaluated at every step, in the order of the network.

    Args:
        names: module name of a block -> its short name, see `block_weights.block_names`. By default module names are the
            labels.
    """
    table = {place: rows for place, rows in trace.all_weights().items() if place.partition(".")[0] in DENOISERS}
    several = {place.partition("transformer_blocks.1")[0] for place in table}  # with a second transformer block
    steps, names, found = max(map(len, table.values()), default=0), names or {}, {}
    for place, rows in table.items():
        fewer_experts = place.endswith(")")  # layers of a gate that lack an expert
        if fewer_experts or len(rows) != steps:
            continue
        module = place.partition(".")[2]
        block = next((block for block in names if f"{module}.".startswith(f"{block}.")), None)
        if block is None:
            found[place] = module or "outside blocks"
            continue
        inner = module[len(block) + 1 :].rpartition("transformer_blocks.")[2]
        if "transformer_blocks." in module and place.rpartition("transformer_blocks.")[0] not in several:
            inner = inner.partition(".")[2]  # the number of the only one says nothing
        found[place] = f"{names[block]} {inner}".strip()
    return found


def heat_map(
    trace: Trace, labels: Mapping[str, str], *, locked: Collection[str] = (), shades: Mapping[str, str] | None = None
) -> Image.Image:
    """Applied weights, block by step, one panel per expert on a common scale around 1. Blocks that were set by hand are
    marked. Where an expert does not act, it is grey.

    With more than MOST_ROWS labels, there is one row for all gates of a block, with their mean.

    Args:
        labels: see `block_places`.
        locked: places set by hand.
        shades: expert -> its colour; see `colours`.
    """
    table, rows = trace.all_weights(), dict[str, list[str]]()
    for place, label in labels.items():
        rows.setdefault(label if len(labels) <= MOST_ROWS else _block(label), []).append(place)
    stacks = [torch.stack([table[place] for place in places]) for places in rows.values()]  # [places, steps, N] each
    cells = np.stack([(stack.sum(0) / (stack != 0).sum(0).clamp_min(1)).numpy() for stack in stacks])
    seen = np.append(cells[cells != 0], (0.95, 1.05))  # less than this is not worth a colour
    texts = [f"{row}{' (set)' if any(place in locked for place in places) else ''}" for row, places in rows.items()]
    from matplotlib.colors import CenteredNorm

    figure, panels = _figure(1.3 + 2.6 * len(trace.experts), 1.1 + 0.24 * len(texts), len(trace.experts))
    shades = colours(trace.experts, shades)
    norm = CenteredNorm(1, np.abs(seen - 1).max())
    for n, (name, axes) in enumerate(zip(trace.experts, panels, strict=True)):
        axes.set_facecolor("#cccccc")
        shown = axes.imshow(np.ma.masked_equal(cells[..., n], 0), aspect="auto", cmap="RdBu_r", norm=norm)
        axes.set_title(name, color=_readable(shades[name]), fontsize=11, fontweight="bold")
        axes.set_xlabel("step")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_yticks(range(len(texts)), texts if n == 0 else [""] * len(texts), fontsize=8)
    figure.colorbar(shown, ax=list(panels), label="weight (1: as by itself, grey: off)").ax.set_ylim(seen.min(), seen.max())
    return _picture(figure)


def _block(label: str) -> str:
    """The block in a label of `block_places`: its short name, or its module's name."""
    found = re.match(r".*transformer_blocks\.\d+|(IN|M|OUT)\d\d", label)
    return found[0] if found else label


def shares(trace: Trace, labels: Mapping[str, str], *, shades: Mapping[str, str] | None = None) -> Image.Image:
    """Each expert's share of all weights, step by step."""
    weights = trace.all_weights()
    table = torch.stack([weights[place].abs() for place in labels]).sum(0)  # [steps, N]
    share = (table / table.sum(-1, keepdim=True).clamp_min(1e-12)).numpy()
    shades = colours(trace.experts, shades)
    styles = {  # later ones are thinner, so that one line on another is seen
        name: {"color": shades[name], "marker": "o", "markersize": 3, "linewidth": 1.2 * (len(trace.experts) - n)}
        for n, name in enumerate(trace.experts)
    }
    curves = dict(zip(trace.experts, share.T, strict=True))
    margin = max(0.02, 0.1 * np.ptp(share))
    shown = {"ylim": (share.min() - margin, share.max() + margin), "ylabel": "share of the weights"}
    return _curves(range(len(share)), curves, styles, xlabel="step", **shown)


def places(image: Image.Image, found: Contributions, *, shades: Mapping[str, str] | None = None) -> dict[str, Image.Image]:
    """Label -> the picture, tinted with one expert's contribution, or with the colour of the expert that acts most."""
    (h, w), maps = found.finest()  # [N, h, w] in 0..1
    shades = colours(found.experts, shades)
    pictures = {}
    for name, values in zip(found.experts, maps, strict=True):
        pictures[f"{name}: {h} x {w} tokens"] = _laid_over(image, _rgb(shades[name])[None, None], values.numpy())
    most, table = maps.argmax(0).numpy(), np.stack([_rgb(shades[name]) for name in found.experts])
    pictures[f"strongest LoRA: {h} x {w} tokens"] = _laid_over(image, table[most], np.full((h, w), 1.0))
    return pictures


def _laid_over(image: Image.Image, colour: np.ndarray, strength: np.ndarray) -> Image.Image:
    """Lay colour [h, w, 3] or [1, 1, 3] over a grey picture by strength [h, w] in 0..1; tokens stay visible as squares."""
    scale = max(1, 256 / image.width)
    side = (round(image.width * scale), round(image.height * scale))
    tint = Image.fromarray(np.broadcast_to(colour, (*strength.shape, 3)).astype(np.uint8))
    alpha = Image.fromarray((strength * OPACITY * 255).round().astype(np.uint8))
    shown = [each.resize(side, Image.Resampling.NEAREST) for each in (tint, image.convert("L").convert("RGB"), alpha)]
    return Image.composite(*shown)


def losses(rows: Sequence[Mapping[str, float]]) -> Image.Image:
    """The loss of a training run by update, its moving mean, and its terms if there are several."""
    terms = [name for name in rows[0] if name not in ("step", "loss")]
    shown = ["loss", *(terms if len(terms) > 1 else [])]
    curves = {name: [row[name] for row in rows] for name in shown}
    styles = {name: {"color": COLOURS[i % 7], "linewidth": 1.0} for i, name in enumerate(shown)}
    count = max(2, len(rows) // 6)
    mean = f"mean of {count} updates"
    curves[mean] = [float(np.mean(curves["loss"][max(0, end - count) : end])) for end in range(1, len(rows) + 1)]
    styles |= {"loss": {"color": "#000000", "linewidth": 0.6}, mean: {"color": "#000000", "linewidth": 2.4}}
    return _curves([row["step"] for row in rows], curves, styles, xlabel="update", ylabel="loss")


def _curves(at: Sequence[float], curves: Mapping[str, Any], styles: Mapping[str, dict], **labels: Any) -> Image.Image:
    """Values by name over `at`; `labels` and limits as matplotlib's `Axes.set` takes them."""
    figure, (axes,) = _figure(6.0, 2.8, 1)
    for name, values in curves.items():
        axes.plot(at, values, label=name, **styles[name])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(**labels)
    axes.legend(fontsize=9)
    return _picture(figure)


def _rgb(colour: str) -> np.ndarray:
    return np.array(ImageColor.getrgb(colour), np.float32)


def _readable(colour: str) -> str:
    """The colour, darkened if it would not be readable as text on white."""
    rgb = _rgb(colour)
    return colour if rgb @ [0.299, 0.587, 0.114] < 130 else "#{:02x}{:02x}{:02x}".format(*(rgb * 0.6).astype(int))


def _figure(width: float, height: float, panels: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained", dpi=DPI)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _picture(figure: Any) -> Image.Image:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
