"""Which subjects of a call are drawn apart, in which windows and from which step on; and why a call is drawn as one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations, product
from typing import Any, Literal

import torch

from mole_diffusers.binding.config import Bound, bound
from mole_diffusers.binding.regions import GridSize
from mole_diffusers.binding.sentence import together
from mole_diffusers.binding.who_acts import EVERY_PLACE, INACTIVE, OWN_TILE, Explanation, read_prompt, roles
from mole_diffusers.binding.words import keys
from mole_diffusers.patching.host.denoiser_inputs import is_one_graph, text_read
from mole_diffusers.patching.subjects.prompt_subjects import SINCE, PictureCall, PromptSubjects, Tiling
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
MOST_SIDE = 2048  # pixels of a size that is proposed
SINCE_OVERLAPPING = 0.2  # of tiles that overlap: each sees much of the other, so they agree on a scene earlier
ONE_PROMPT = "each tile has a prompt and a size of its own: draw without {}"
OTHER_SUBJECTS = "the text encoder reads other subjects in this prompt than {}: shorten or reword it"
SCALE_ONLY = "of arguments for attention, tiles only know the scale of LoRAs, not {!r}"


def why_unbound(denoiser: Any) -> str:
    """Why a denoiser that is compiled as one graph keeps no LoRA to its words or place, and what to do."""
    by_blocks = "compile its blocks one by one, with compile_repeated_blocks()"
    how = by_blocks if getattr(denoiser, "_repeated_blocks", None) else "leave it uncompiled"
    return f"the {type(denoiser).__name__} is compiled as one graph, where LoRAs have no words or places of their own: {how}"


def why_one_picture(call: PictureCall) -> str:
    """Why the prompts or the pipeline of a call make its picture be drawn as one; "" if it may be drawn in tiles.

    The call's other arguments (`subjects_for_tiles`) and the size (`cut`) decide about the rest.
    """
    subjects, always = call.subjects, call.tiling.always
    if call.tiling.until == 0:
        return "tiles are off"
    if subjects is not None and subjects.why_not_per_subject and not (always and len(subjects.apart) > 1):
        return subjects.why_not_per_subject
    if call.obstacle:
        return call.obstacle
    if lost := sorted(_given(call) & OF_WHOLE_PICTURE):
        return ONE_PROMPT.format(" and ".join(lost))
    if always or call.cropping.by_itself:
        return ""
    return f"a {type(call.denoiser).__name__} draws in tiles inside `mixture.tiled()` alone"


def subjects_for_tiles(call: PictureCall) -> PromptSubjects | None:
    """The subjects that a call is drawn of, in tiles if there is room; None if its picture is drawn as one.

    Raises ValueError if tiles are always wanted and not possible, see `Mixture.tiled`, or are of another prompt.
    """
    own, said = call.given.get("prompt"), call.tiling.prompt
    if said is not None and own is not None and any(each != said for each in ([own] if isinstance(own, str) else own)):
        raise ValueError(f"the tiles' prompt is {said!r}, and that of the call is {own!r}: say one of them")
    subjects, always = call.subjects, call.tiling.always and call.tiling.until > 0
    if always and call.obstacle:
        raise ValueError(call.obstacle)
    if subjects is None or len(subjects.apart) < 2:
        return None
    why = why_one_picture(call)
    if always and call.for_processors and not why:
        why = f"{SCALE_ONLY.format(call.for_processors[0])}: draw without it, or without tiles"
    if always and why:
        raise ValueError(why)
    allowed = OF_A_PROMPT | OF_STATES if call.gives_states else OF_A_PROMPT
    return subjects if always or not why and _given(call) <= allowed else None


def _given(call: PictureCall) -> set[str]:
    """The names of a call's arguments."""
    return {name for name, value in call.given.items() if value is not None}


@dataclass(frozen=True)
class Cut:
    """How a picture is cut into tiles.

    Attributes:
        windows: one for each subject.
        border: [H, W] bool, where silhouettes divide two windows, see `border_of`; None where nothing or the user does.
        since: the share of the steps before the tiles.
    """

    windows: Sequence[Window]
    border: torch.Tensor | None
    since: float


def cut(call: PictureCall, subjects: PromptSubjects, height: int, width: int) -> Cut | None:
    """How the subjects of a call are cut in a picture of so many tokens; None if tiles need more room."""
    trained, step, contact = call.cropping.trained, call.cropping.multiple, subjects.contact
    if contact is not None:
        windows = windows_of_two_that_touch(height, width, trained, step, contact.is_stacked)
    else:
        windows = [window_around(mask, trained, step) for mask in subjects.masks(height, width)]
    if not call.tiling.always and not (trained > 0 and all(window.has_room(trained) for window in windows)):
        return None
    is_given = any(subjects.is_given(subject) for subject, _ in subjects.apart)
    border = None if len(windows) != 2 or is_given else border_of(windows[0], windows[1], trained)
    usual = min(SINCE if border is None else SINCE_OVERLAPPING, call.tiling.until / 2)
    return Cut(windows, border, usual if call.tiling.since is None else call.tiling.since)


def begin_of_tiles(call: PictureCall) -> float | None:
    """The share of the steps after which the pictures of a call, which includes their size, are drawn in tiles; None if they
    never are.
    """
    subjects = subjects_for_tiles(call)
    if subjects is None or call.for_processors:
        return None
    found = cut(call, subjects, *_tokens(call))
    return None if found is None else found.since


def lost_tiles(call: PictureCall, encoded: Sequence[str]) -> str:
    """A sentence for a call that is not drawn in tiles, if one of its prompts, given alone as a text, would be; else "".

    Args:
        encoded: the prompts of the states that it gives, as far as they are known.
    """
    given, own = call.given, call.given.get("prompt")
    if call.subjects is not None or call.tiling.always or given.get("height") is None or given.get("width") is None:
        return ""
    others = {name: value for name, value in given.items() if name not in OF_STATES}
    for prompt in dict.fromkeys(encoded if own is None else own):
        if begin_of_tiles(replace(call, given={**others, "prompt": prompt})) is not None:
            why, how = "call has several prompts", "call the pipeline once for each"
            if own is None:
                why, how = "call gives states of its prompt", "give the text, or draw inside `mixture.tiled(prompt=...)`"
            return f"{prompt!r} is drawn as one picture, and not in tiles, since the {why}: {how}"
    return ""


def explain(
    pipe: Any,
    prompt: str,
    binding: Mapping[str, Any],
    *,
    width: int | None = None,
    height: int | None = None,
    prompt_2: str | None = None,
    acting: Collection[str] | None = None,
    texts: Sequence[str] | None = None,
    tiling: Tiling | None = None,
) -> Explanation:
    """Who acts on a prompt, where and why, and the prompts of its tiles, before anything is attached or drawn. Print it.

    Args:
        pipe: the pipeline.
        prompt: as the pipeline gets it, the only one of the call. Several prompts in one call, and states of a prompt,
            are not drawn in tiles.
        binding: name -> the LoRA's words and place, as `Mixture.bind` takes them. Of LoRAs that are not named, nothing is
            known; `binding.files_bindings` has what files say.
        width: of the picture in pixels. Without a size, tiles are explained as if there were room.
        height: of the picture in pixels.
        prompt_2: what a second text encoder reads, if that is another prompt.
        acting: the LoRAs that are on, by default all.
        texts: what the denoiser's text is made of, such as the chunks of a long prompt; by default as much of the prompt as
            a text encoder reads.
        tiling: whether tiles are drawn, and in which steps; by default where there is room for them.

    Raises ValueError if only one side is given, or one that no picture has, for several prompts, for a binding that is none,
    and for names in `acting` that have no binding.
    """
    if not isinstance(prompt, str):
        raise ValueError(f"one prompt is explained at a time, given as a text, got {prompt!r}")
    if (width is None) != (height is None) or not all(pixels is None or pixels > 0 for pixels in (width, height)):
        raise ValueError("a picture has a width and a height of 1 or more: give both, or none")
    binding = {name: bound(each, name, Bound()) for name, each in binding.items()}
    acting = list(binding) if acting is None else acting
    if unknown := [name for name in acting if name not in binding]:
        raise ValueError(f"unknown expert {unknown[0]!r} in acting; bound: {list(binding)}")
    given = {"prompt": prompt, "prompt_2": prompt_2 or None, "width": width, "height": height}
    call, subjects = PictureCall(pipe, tiling or Tiling(), given, binding, acting), PromptSubjects(prompt, binding, acting)
    encoded = [text_read(pipe, prompt)] if texts is None else list(dict.fromkeys(texts))
    on = [name in acting for name in binding]
    read = together([read_prompt(text, subjects.bound, on) for text in encoded])
    found = roles(list(binding), subjects.bound, on, read)
    if is_one_graph(pipe):
        own = {name: role for name, role in found.items() if role.place not in (EVERY_PLACE, INACTIVE)}
        found |= {name: replace(role, place=EVERY_PLACE, why=why_unbound(call.denoiser)) for name, role in own.items()}
    why, how, room = why_one_picture(call), None, None
    if not why and len(encoded) > 1:
        why = f"tiles read a prompt of one part, and this one is read in {len(encoded)}: shorten it"
    elif not why and {*keys(read.subjects)} != {*subjects.keys}:
        why = OTHER_SUBJECTS.format(" and ".join(repr(subject.name) for subject, _ in subjects.apart))
    elif not why and width is not None and (how := cut(call, subjects, *_tokens(call))) is None:
        why, room = _no_room(call, subjects), _size_for_tiles(call, subjects)
    tiles = None if why else [part.text for _, part in subjects.apart]
    for subject, other in () if tiles is None or subjects.contact is None else permutations(subjects.contact.subjects):
        for name in (subjects.names[k] for k in subject.experts):
            found[name] = replace(found[name], place=OWN_TILE, why=f"it touches {other.name!r}")
    tiled = None if how is None else (how.since, call.tiling.until)
    unread = prompt[len(encoded[0]) :] if texts is None else ""
    return Explanation(found, tiles, why, read.contacts, unread, tiled, room)


def _no_room(call: PictureCall, subjects: PromptSubjects) -> str:
    size = f"{call.given['width']} x {call.given['height']} pixels"
    if subjects.contact is None:
        return f"{size} are too small to draw each subject apart"
    return f"{size} have no room for one thing {'above' if subjects.contact.is_stacked else 'beside'} the other"


def _size_for_tiles(call: PictureCall, subjects: PromptSubjects) -> tuple[int, int] | None:
    """The smallest width and height in pixels at which subjects are drawn in tiles, in whole pictures of the size that the
    denoiser was trained at; None if there is none with sides of at most `MOST_SIDE`."""
    if not (side := call.cropping.trained):
        return None
    pixels = side * _token(call)
    times = range(1, min(len(subjects.apart), MOST_SIDE // pixels) + 1)
    for width, height in sorted(product(times, times), key=lambda size: (size[0] * size[1], max(size), size[1])):
        if cut(call, subjects, height * side, width * side) is not None:
            return width * pixels, height * pixels
    return None


def part_of_step(step: float, total: int, tiling: Tiling, since: float) -> Literal["layout", "tiles", "whole"]:
    """What a step, from 1, of `total` draws if tiles begin after the share `since` of them; the first is usually no tile."""
    before = since * total if tiling.since is not None else max(1, since * total)
    if step > tiling.until * total + 1e-5:
        return "whole"
    return "layout" if step <= before + 1e-5 else "tiles"


def _token(call: PictureCall) -> int:
    """The side of a token of the denoiser, in pixels."""
    return int(call.pipe.vae_scale_factor) * call.cropping.patch


def _tokens(call: PictureCall) -> GridSize:
    """The height and width of a call's picture in tokens."""
    return call.given["height"] // _token(call), call.given["width"] // _token(call)
