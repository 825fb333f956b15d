"""Block weights: the argument `lbw=` of a LoRA tag -> one weight per block of the UNet.

Blocks have the names of the sd-webui-lora-block-weight extension: IN00, IN01, ... for the way down, M00 for the middle,
OUT00, OUT01, ... for the way up, and BASE for the text encoder and everything outside the blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mole_app.studio.prompt_syntax import number

BASE = "BASE"


def block_names(unet: Any) -> dict[str, str]:
    """{module name of a resnet, attention or sampler of a UNet: block name}; modules of one block share a name.

    Raises ValueError for a denoiser without down and up blocks.
    """
    if not hasattr(unet, "down_blocks"):
        raise ValueError(f"block weights are for UNets; {type(unet).__name__} has no down and up blocks")
    names = {"conv_in": "IN00", "mid_block": "M00"}
    for side, start, sampler in (("down", 1, "downsamplers"), ("up", 0, "upsamplers")):
        label, number = "IN" if side == "down" else "OUT", start
        for i, block in enumerate(getattr(unet, f"{side}_blocks")):
            for j in range(len(block.resnets)):
                for kind in ("resnets", "attentions"):
                    names[f"{side}_blocks.{i}.{kind}.{j}"] = f"{label}{number:02}"
                number += 1
            if getattr(block, sampler, None):  # going down, the sampler is a block of its own
                names[f"{side}_blocks.{i}.{sampler}.0"] = f"{label}{number - (side == 'up'):02}"
                number += side == "down"
    return names


def layouts(unet: Any) -> tuple[list[str], list[str]]:
    """The block names that a list of weights may follow: those with attention (17 for SD 1.x), or all (26)."""
    names, modules = block_names(unet), {name for name, _ in unet.named_modules()}
    attention = {names["mid_block"]} | {
        label for module, label in names.items() if ".attentions." in module and module in modules
    }
    every = sorted(set(names.values()))
    return [BASE, *(label for label in every if label in attention)], [BASE, *every]


# The blocks that each preset of the extension leaves at 1: attention blocks going down, the middle or not, those going up.
PRESETS: dict[str, tuple[slice, bool, slice]] = {
    "ALL": (slice(None), True, slice(None)),
    "NONE": (slice(0, 0), False, slice(0, 0)),
    "INS": (slice(0, 2), False, slice(0, 0)),
    "IND": (slice(-3, None), False, slice(0, 0)),
    "INALL": (slice(None), False, slice(0, 0)),
    "MIDD": (slice(-3, None), True, slice(0, 4)),
    "OUTD": (slice(0, 0), False, slice(0, 4)),
    "OUTS": (slice(0, 0), False, slice(4, None)),
    "OUTALL": (slice(0, 0), False, slice(None)),
}


def block_weights(lbw: str, unet: Any) -> dict[str, float]:
    """{block name: weight} for block weights as typed; empty if they are 1 everywhere.

    Args:
        lbw: a preset of `PRESETS`, which may have a factor ("ALL0.5"); one number for all blocks; or one number per block,
            separated by commas, for one of the two `layouts`. As in the extension, presets and the shorter list mean
            blocks with attention, and LoRAs of convolutions do not act in other blocks. "" means 1 everywhere.

    Raises:
        ValueError: for anything else. The message names the presets and the blocks.
    """
    if not lbw:
        return {}
    short, every = layouts(unet)
    preset = next((name for name in sorted(PRESETS, key=len, reverse=True) if lbw.upper().startswith(name)), None)
    try:
        if preset is not None:
            factor = number(lbw[len(preset) :] or "1", "lbw")
            return {label: factor * (label in _on(preset, short)) for label in every}
        values = [number(word, "lbw") for word in lbw.split(",")]
    except ValueError:
        values = []
    if len(values) == 1:
        return dict.fromkeys(every, values[0])
    for labels in (short, every):
        if len(values) == len(labels):
            return dict.fromkeys(every, 0.0) | dict(zip(labels, values, strict=True))
    raise ValueError(
        f"lbw={lbw} is not a preset ({', '.join(PRESETS)}), one number, or a number for each of {', '.join(short)}"
        f" ({len(short)}) or {', '.join(every)} ({len(every)})"
    )


def _on(preset: str, labels: Sequence[str]) -> set[str]:
    """The blocks that a preset leaves at 1, of those with attention."""
    going_down, middle, going_up = PRESETS[preset]
    down = [label for label in labels if label.startswith("IN")]
    up = [label for label in labels if label.startswith("OUT")]
    return {*down[going_down], *up[going_up], *(["M00"] if middle else []), *([] if preset == "NONE" else [BASE])}
