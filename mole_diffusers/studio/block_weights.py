"""Tags -> a plan that a mixture applies: one strength per expert, part, block and step.

Blocks are named as the sd-webui-lora-block-weight extension names them: IN00.. in the order in which the UNet goes down,
M00, OUT00.. going up, and BASE for the text encoder and what lies outside the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mole_diffusers.studio.prompt_syntax import LoraTag

BASE = "BASE"


def block_names(unet: Any) -> dict[str, str]:
    """{module name of a resnet, attention or sampler of a UNet: block name}; modules that work together share one.

    Raises ValueError for a denoiser without down and up blocks.
    """
    if not hasattr(unet, "down_blocks"):
        raise ValueError(f"block weights are for UNets; {type(unet).__name__} has no down and up blocks")
    names = {"conv_in": "IN00", "mid_block": "M00"}
    for side, start, sampler in (("down", 1, "downsamplers"), ("up", 0, "upsamplers")):
        label, number = "IN" if side == "down" else "OUT", start
        for i, block in enumerate(getattr(unet, f"{side}_blocks")):
            for j in range(len(block.resnets)):
                names |= dict.fromkeys(
                    (f"{side}_blocks.{i}.resnets.{j}", f"{side}_blocks.{i}.attentions.{j}"), f"{label}{number:02}"
                )
                number += 1
            if getattr(block, sampler, None):  # going down, the sampler is a block of its own
                names[f"{side}_blocks.{i}.{sampler}.0"] = f"{label}{number - (side == 'up'):02}"
                number += side == "down"
    return names


def layouts(unet: Any) -> tuple[list[str], list[str]]:
    """The block names that a list of weights may follow: those with attention (17 for SD 1.x), or all (26)."""
    names = block_names(unet)
    attention = {names["mid_block"]} | {
        label for module, label in names.items() if ".attentions." in module and _has(unet, module)
    }
    whole = sorted(set(names.values()), key=lambda label: (("IN", "M0", "OU").index(label[:2]), label))
    return [BASE, *(label for label in whole if label in attention)], [BASE, *whole]


def _has(unet: Any, module: str) -> bool:
    return any(name == module for name, _ in unet.named_modules())


# Shares of the attention blocks going down and up: which are kept by each of the presets that artists know.
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
    """{block name: weight} for block weights as typed; a block that is not named keeps 1.

    Args:
        lbw: a preset of `PRESETS` ("ALL0.5" and the like scale one), one number for every block, or a number per block
            in one of the two `layouts`, by commas; "" is 1 everywhere.

    Raises:
        ValueError: neither; the message names the presets and the blocks.
    """
    if not lbw:
        return {}
    short, whole = layouts(unet)
    preset = next((name for name in sorted(PRESETS, key=len, reverse=True) if lbw.upper().startswith(name)), None)
    try:
        if preset is not None:
            scale = float(lbw[len(preset) :] or 1)
            return {label: scale * weight for label, weight in _preset(preset, short).items()}
        values = [float(word) for word in lbw.split(",")]
    except ValueError:
        values = []
    for labels in (short, whole):
        if len(values) in (1, len(labels)):
            return dict(zip(labels, values * (len(labels) if len(values) == 1 else 1), strict=True))
    raise ValueError(
        f"lbw={lbw} is not a preset ({', '.join(PRESETS)}), one number, or a number for each of {', '.join(short)}"
        f" ({len(short)}) or {', '.join(whole)} ({len(whole)})"
    )


def _preset(name: str, labels: Sequence[str]) -> dict[str, float]:
    going, middle, coming = PRESETS[name]
    down = [label for label in labels if label.startswith("IN")]
    up = [label for label in labels if label.startswith("OUT")]
    kept = {*down[going], *up[coming], *(["M00"] if middle else []), *([] if name == "NONE" else [BASE])}
    return {label: float(label in kept) for label in labels}


class StrengthSchedule:
    """`state.Plan` of a set of tags. `step` says where sampling stands; whoever samples moves it.

    Args:
        experts: names in the order of the mixture; one without a tag is absent.
        tags: what is asked for.
        steps: length of the run.
        locks: place -> {expert: weight} that stand in for the gate there; 0 for those not named.
    """

    def __init__(
        self,
        experts: Sequence[str],
        tags: Sequence[LoraTag],
        *,
        unet: Any,
        steps: int,
        locks: Mapping[str, Mapping[str, float]] | None = None,
    ):
        by_name = {tag.name: tag for tag in tags}
        if unknown := [name for name in by_name if name not in experts]:
            raise ValueError(f"no expert for the tag {by_name[unknown[0]]}; there are {list(experts)}")
        self.tags = [by_name.get(name) for name in experts]
        self.steps, self.step = steps, 0
        self.locks = {place: [row.get(name, 0.0) for name in experts] for place, row in (locks or {}).items()}
        self._weights = [block_weights(tag.lbw, unet) if tag is not None else {} for tag in self.tags]
        self._names = block_names(unet) if any(self._weights) else {}
        self._found: dict[str, list[float]] = {}

    def part(self, part: str) -> list[float]:
        return [0.0 if tag is None else tag.strength(part, self.step, self.steps) for tag in self.tags]

    def block(self, module: str) -> list[float]:
        if module not in self._found:
            label = self._label(module)
            self._found[module] = [weights.get(label, 1.0) for weights in self._weights]
        return self._found[module]

    def gates(self, place: str) -> Sequence[float] | None:
        return self.locks.get(place)

    def _label(self, module: str) -> str:
        """The block of a module of the pipeline, "unet.down_blocks.1.attentions.0..." say."""
        part, _, name = module.partition(".")
        inside = (label for prefix, label in self._names.items() if part == "unet" and f"{name}.".startswith(f"{prefix}."))
        return next(inside, BASE)

    def on_step(self, then: Callable[[Any, int, Any, dict], dict] | None = None) -> Callable[..., dict]:
        """The `callback_on_step_end` that keeps `step`; calls `then`, another such callback, first."""

        def moved(pipe: Any, index: int, timestep: Any, kwargs: dict) -> dict:
            self.step = index + 1
            return kwargs if then is None else then(pipe, index, timestep, kwargs)

        return moved
