"""Which things of a call are drawn apart, in which windows and from which step on; and why a call is drawn as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations, product

import torch

from mole_diffusers.binding.sentence import together
from mole_diffusers.binding.who_acts import OWN_TILE, Explanation, read_prompt, roles
from mole_diffusers.binding.words import keys
from mole_diffusers.patching.host.cropping import Cropping
from mole_diffusers.patching.subjects.things import SINCE, PictureCall, PromptThings, Tiling
from mole_diffusers.patching.subjects.windows import Window, border_of, window_around, windows_of_two_that_touch

# Arguments of calls that only ask for pictures of a prompt. Tiles do not support anything else, such as an input image.
OF_A_PROMPT = {
    "prompt", "negative_prompt", "negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds", "height",
    "width", "num_inference_steps", "guidance_scale", "guidance_rescale", "num_images_per_prompt", "eta", "generator",
    "latents", "output_type", "return_dict", "clip_skip", "callback_on_step_end", "callback_on_step_end_tensor_inputs",
    "cross_attention_kwargs",
}  # fmt: skip
OF_STATES = {"prompt_embeds", "pooled_prompt_embeds"}  # the same for a call with the text states of a known prompt
# What models are told besides the prompt. Each tile is told its own part of the prompt, and in SDXL its place.
OF_WHOLE_PICTURE = {"prompt_2", "prompt_3"} | {
    f"{of}{name}" for of in ("", "negative_") for name in ("original_size", "crops_coords_top_left", "target_size")
}
SINCE_OVERLAPPING = 0.2  # of tiles that overlap: each sees much of the other, so they agree on a scene earlier
ONE_PROMPT = "each tile has a prompt and a size of its own: draw without {}"
OTHER_THINGS = "the text encoder reads other things in this prompt than {}: shorten or reword it"
SCALE_ONLY = "of arguments for attention, tiles only know the scale of LoRAs, not {!r}"


def begin_of_tiles(call: PictureCall) -> float | None:
    """The share of the steps after which the pictures of a call, which includes their size, are drawn in tiles; None if they
    never are.
    """
    things = things_for_tiles(call)
    if things is None or call.for_processors:
        return None
    windows = _windows_in(call, things)
    if not call.tiling.always and not have_room(call.cropping, windows):
        return None
    return since_of(call.tiling, border(call.cropping, things, windows))


def explain(call: PictureCall, texts: Sequence[str]) -> Explanation:
    """Who acts on the prompt of a call, where and why, and the prompts of its tiles. See `Mixture.explain`.

    Args:
        texts: what the denoiser's text is made of: the prompt, or what is read of it, its chunks, a second prompt.
    """
    things, on = PromptThings(call.given["prompt"], call.bound, call.acting), [name in call.acting for name in call.bound]
    read = together([read_prompt(text, things.bound, on) for text in dict.fromkeys(texts)])
    found = roles(list(call.bound), things.bound, on, read)
    why = _why_no_tiles(call)
    if not why and len(texts) > 1:
        why = f"tiles read a prompt of one part, and this one is read in {len(texts)}: shorten it"
    elif not why and {*keys(read.things)} != {*things.keys}:
        why = OTHER_THINGS.format(" and ".join(repr(thing.name) for thing, _ in things.apart))
    tiles = None if why else [part.text for _, part in things.apart]
    for thing, other in () if tiles is None or things.contact is None else permutations(things.contact.things):
        for name in (things.names[k] for k in thing.experts):
            found[name] = replace(found[name], place=OWN_TILE, why=f"it touches {other.name!r}")
    return Explanation(found, tiles, why, read.contacts)


def _why_no_tiles(call: PictureCall) -> str:
    """Why the picture of a call is drawn as one; "" if it is drawn in tiles. Without a size, as if there were room."""
    things, always = call.things, call.tiling.always
    if call.tiling.until == 0:
        return "tiles are off"
    if things is not None and things.why_not_apart and not (always and len(things.apart) > 1):
        return things.why_not_apart
    if things is None or call.obstacle:
        return call.obstacle
    if lost := [name for name in sorted(OF_WHOLE_PICTURE) if call.given.get(name) is not None]:
        return ONE_PROMPT.format(" and ".join(lost))
    if always:
        return ""
    if not call.cropping.by_itself:
        return f"a {type(call.denoiser).__name__} draws in tiles inside `mixture.tiled()` alone"
    if call.given.get("width") is None or have_room(call.cropping, _windows_in(call, things)):
        return ""
    size = f"{call.given['width']} x {call.given['height']} pixels"
    if things.contact is None:
        return f"{size} are too small to draw each thing apart"
    return f"{size} have no room for one thing {'above' if things.contact.is_stacked else 'beside'} the other"


def size_for_tiles(call: PictureCall, most: int) -> tuple[int, int] | None:
    """The smallest width and height in pixels at which a call is drawn in tiles, in whole pictures of the size that the
    denoiser was trained at; None if there is none with sides of at most `most` pixels."""
    things = things_for_tiles(call)
    if things is None or call.for_processors or not (side := call.cropping.trained):
        return None
    pixels = side * _token(call)
    times = range(1, min(len(things.apart), most // pixels) + 1)
    for width, height in sorted(product(times, times), key=lambda size: (size[0] * size[1], max(size), size[1])):
        if have_room(call.cropping, windows_of(call.cropping, things, height * side, width * side)):
            return width * pixels, height * pixels
    return None


def things_for_tiles(call: PictureCall) -> PromptThings | None:
    """The things that a call is drawn of, in tiles if there is room; None if its picture is drawn as one.

    Raises ValueError if tiles are always wanted and not possible, see `Mixture.tiled`.
    """
    things, always, reason = call.things, call.tiling.always, call.obstacle
    if reason and always:
        raise ValueError(reason)
    if reason or things is None or len(things.apart) < 2:
        return None
    given = {name for name, value in call.given.items() if value is not None}
    if always and (lost := sorted(given & OF_WHOLE_PICTURE)):
        raise ValueError(ONE_PROMPT.format(" and ".join(lost)))
    if always and call.for_processors:
        raise ValueError(f"{SCALE_ONLY.format(call.for_processors[0])}: draw without it, or without tiles")
    allowed = OF_A_PROMPT | OF_STATES if call.gives_states else OF_A_PROMPT
    by_itself = call.cropping.by_itself and not things.why_not_apart and given <= allowed
    return things if always or by_itself else None


def windows_of(cropping: Cropping, things: PromptThings, height: int, width: int) -> list[Window]:
    """The windows of the things of a prompt in a picture of so many tokens."""
    trained, step = cropping.trained, cropping.multiple
    if things.contact is not None:
        return windows_of_two_that_touch(height, width, trained, step, things.contact.is_stacked)
    return [window_around(mask, trained, step) for mask in things.masks(height, width)]


def have_room(cropping: Cropping, windows: Sequence[Window]) -> bool:
    """Whether the denoiser was trained with pictures that are as large as each window."""
    return cropping.trained > 0 and all(window.has_room(cropping.trained) for window in windows)


def _token(call: PictureCall) -> int:
    """The side of a token of the denoiser, in pixels."""
    return int(call.pipe.vae_scale_factor) * call.cropping.patch


def _windows_in(call: PictureCall, things: PromptThings) -> list[Window]:
    """The windows of the things of a call in its picture."""
    height, width = (call.given[side] // _token(call) for side in ("height", "width"))
    return windows_of(call.cropping, things, height, width)


def border(cropping: Cropping, things: PromptThings, windows: Sequence[Window]) -> torch.Tensor | None:
    """[H, W] bool, where silhouettes divide two windows, see `border_of`; None where the user did."""
    if len(windows) != 2 or any(things.is_given(thing) for thing, _ in things.apart):
        return None
    return border_of(windows[0], windows[1], cropping.trained)


def since_of(tiling: Tiling, border: torch.Tensor | None) -> float:
    """The share of the steps before the tiles."""
    if tiling.since is not None:
        return tiling.since
    return min(SINCE if border is None else SINCE_OVERLAPPING, tiling.until / 2)
