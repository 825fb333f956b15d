"""Drawing with given pictures and the models of a text-to-image pipeline: img2img, inpainting, a larger second pass, and
ControlNets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from PIL import Image, ImageOps

from mole_app.studio.recipe import PICTURES, Recipe
from mole_diffusers.binding import checked_region, region_picture

LONGEST = 2048  # pixels; larger pictures are made smaller before they are drawn over, see `own_size`

CONTROLLED = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")  # ControlNets and IP-Adapters are for these
DRAWN_OVER = (*CONTROLLED, "StableDiffusion3Pipeline", "FluxPipeline")


def drawing_with(pipe: Any, *, over: bool = False, masked: bool = False, controlnet: Any = None) -> Any:
    """A pipeline with the same models, and with a ControlNet if one is given, that draws `over` a picture (img2img) or over
    the `masked` part of one (inpainting). For none of these it is the pipeline itself.

    Raises ValueError if there is no such pipeline for this class.
    """
    if not (over or masked or controlnet):
        return pipe
    own = kind_in(pipe, DRAWN_OVER if controlnet is None else CONTROLLED)
    does = "ControlNet" * (controlnet is not None) + ("Inpaint" if masked else "Img2Img" * over)
    kind = getattr(diffusers, own.replace("Pipeline", f"{does}Pipeline"))
    names = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in {**pipe.components, "controlnet": controlnet}.items() if name in names}
    settings = {name: value for name, value in pipe.config.items() if name in names and name not in parts}
    made = (_any_channels(kind) if masked and hasattr(pipe, "unet") else kind)(**parts, **settings)
    made.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    return made


def kind_in(pipe: Any, known: Sequence[str]) -> str:
    """The one of these classes that a pipeline is of. Raises ValueError if there is none."""
    own = next((cls.__name__ for cls in type(pipe).__mro__ if cls.__name__ in known), None)
    if own is None:
        raise ValueError(f"{type(pipe).__name__} cannot draw with such pictures here; those that can: {', '.join(known)}")
    return own


def _any_channels(kind: Any) -> Any:
    """An inpainting class for UNets that read nothing but latents, with any number of channels. diffusers expects four."""

    class Inpaint(kind):  # type: ignore[misc]
        @functools.wraps(kind.__call__)
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            own = self.unet.config.in_channels
            if own == self.vae.config.latent_channels:
                self.unet.register_to_config(in_channels=4)
            try:
                return super().__call__(*args, **kwargs)
            finally:
                self.unet.register_to_config(in_channels=own)

    Inpaint.__name__ = Inpaint.__qualname__ = kind.__name__
    return Inpaint


def steps_drawn(pipe: Any, steps: int, strength: float) -> int:
    """The number of steps, out of `steps`, that draw over a picture at this strength, as diffusers counts them.

    Raises ValueError if it is 0.
    """
    is_flow = hasattr(pipe, "transformer")
    drawn = steps - int(steps - steps * strength) if is_flow else int(steps * strength)
    if drawn < 1:
        raise ValueError(f"{steps} steps at strength {strength:g} are none: use more steps or a larger strength")
    return drawn


def drawable(pipe: Any, width: int, height: int) -> tuple[int, int]:
    """The nearest size in pixels that a pipeline can draw."""
    unit = max(8, pipe.vae_scale_factor * (2 if hasattr(pipe, "transformer") else 1))
    rounded = [max(16, unit, round(side / unit) * unit) for side in (width, height)]
    return rounded[0], rounded[1]


def own_size(image: Image.Image) -> tuple[int, int]:
    """The size at which a picture is drawn over by default: its own, or a smaller one if that is too large."""
    scale = min(1.0, LONGEST / max(image.size))
    return max(16, round(image.width * scale)), max(16, round(image.height * scale))


def size_arguments(pipe: Any, width: int, height: int) -> dict[str, int]:
    """The size as arguments of the pipeline; {} if the pipeline takes it from the picture that it draws over."""
    takes = "height" in inspect.signature(type(pipe).__call__).parameters
    return {"width": width, "height": height} if takes else {}


def on_white(image: Image.Image) -> Image.Image:
    """The picture in RGB, with white where it is transparent."""
    if image.mode.startswith("I;16"):  # Pillow's `convert` takes all from 255 on for white
        image = region_picture(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def fitted(image: Image.Image, width: int, height: int) -> Image.Image:
    """The picture in this size, with its edges cut off if its proportions differ."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def pixels_hash(image: Image.Image) -> str:
    """sha256 of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{image.mode} {image.size}".encode() + image.tobytes()).hexdigest()


def with_pictures(
    recipe: Recipe,
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    control: Image.Image | None = None,
    reference: Image.Image | None = None,
) -> Recipe:
    """The recipe for drawing over a picture, or over the part of it that is white in a mask, and with a control map and a
    reference picture.

    An open size becomes that of the picture or the map. Without pictures the recipe is unchanged. A recipe that already
    names its pictures keeps their hashes, and `Studio.draw` refuses others.

    Raises ValueError for a mask without a picture, of another size, or of a mode in which no number is white, and for a map
    or a reference picture if the recipe does not say what for.
    """
    if image is not None and mask is not None and image.size != mask.size:
        sizes = [f"{width} x {height}" for width, height in (mask.size, image.size)]
        raise ValueError(f"the mask has {sizes[0]} pixels and its picture {sizes[1]}")
    if (shape := control if image is None else image) is not None:
        width, height = own_size(shape)
        recipe = dataclasses.replace(recipe, width=recipe.width or width, height=recipe.height or height)
    if any(getattr(recipe, name) for name in PICTURES):
        return recipe
    return dataclasses.replace(recipe, **_hashes({"image": image, "mask": mask, "control": control, "reference": reference}))


def _hashes(pictures: Mapping[str, Image.Image | None]) -> dict[str, Any]:
    """The hashes of a recipe's pictures, "" for none. They are of the pixels that are drawn with, not of the files."""
    if (mask := pictures.get("mask")) is not None:
        checked_region(mask, "mask")
    read = {"mask": region_picture}  # the others are in colour
    given = {name: pictures.get(name) for name in PICTURES}
    return {n: "" if each is None else pixels_hash(read.get(n, on_white)(each)) for n, each in given.items()}


def check_pictures(recipe: Recipe, pictures: Mapping[str, Image.Image | None]) -> None:
    """Raises ValueError if these are not the recipe's pictures, or if they are missing."""
    for name, what, by in (("control", "control map", "controlnet"), ("reference", "reference picture", "ip_adapter")):
        if (asked := getattr(recipe, by)) and not getattr(recipe, name):
            raise ValueError(f"{asked!r} needs its {what}: give one as {name}")
    for name, digest in _hashes(pictures).items():
        given, wanted = pictures.get(name), getattr(recipe, name)
        if wanted != digest:
            other = "was made with another picture" if wanted else "was made without a picture"
            missing = "needs the picture that it was made with" if given is None else other
            raise ValueError(f"the recipe {missing} as its {name}")
