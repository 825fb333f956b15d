"""A recipe: everything that determines a picture, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from mole_app.studio.names import matching_lora, shared_name
from mole_app.studio.prompt_syntax import MAX_PROMPT, PAINTED, LoraTag, constant, parse
from mole_app.studio.weight_syntax import plain_text
from mole_diffusers.binding import AUTO, parse_phrases, read_mask
from mole_diffusers.options import check_options
from mole_diffusers.safe_files import read_json
from mole_diffusers.whole_files import write_text

FORMAT, VERSION = "mole_diffusers.studio.recipe", 1
PROMPTS = ("prompt", "negative", "prompt_2", "negative_2")
PICTURES = ("image", "mask", "control", "reference")  # that a picture is made with
OPEN = ("width", "height")  # 0 leaves these numbers open
READ_WITH = {  # a setting -> the one without which nothing reads it
    "strength": "image",
    "hires_strength": "hires",
    "control_strength": "controlnet",
    "control_end": "controlnet",
    "ip_scale": "ip_adapter",
}
BOUND, TILES = "bound", "tiles"
BINDINGS = (AUTO, BOUND, TILES, "none")
MAX_MASKS = 512 << 10  # characters of all masks; files with more than 1 MB of text are not read
ARMS = ("gates", "sum", "base", "alone", "merge")


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a picture: the same recipe gives the same pixels on the same machine.

    `Studio.complete` and `picture_passes.with_pictures` fill in a width or height of 0, a seed of -1 and "auto" gates.

    Attributes:
        prompt: the prompt, with a `<lora:...>` tag for every LoRA.
        negative: what should not be in the picture.
        prompt_2: what the second text encoder of SDXL, SD 3 or Flux reads, without tags. Default: the same as the first.
        negative_2: the negative prompt for that encoder.
        seed: the same seed gives the same picture, whatever the device; -1 is a random one.
        steps: steps of the sampler: more take longer.
        guidance: how strictly to follow the prompt.
        width, height: pixels, rounded to what the base can draw. Default: the size that the base was trained
            at (in the embedded world, that for so many subjects), or that of the picture to draw over.
        sampler: Euler a, DPM++ 2M Karras, UniPC, LCM, ...; a wrong name lists all. Default: the base's own.
        gates: an untrained gate type (sum, mean), the name of trained gates, or auto: your own gates for these LoRAs if
            there are any, else sum.
        arm: how the LoRAs are combined: "gates", or for comparison "sum", "base" (no LoRA), "alone NAME" or "merge METHOD"
            (see `merging.merge`).
        locks: gate location -> {LoRA: weight}, used instead of the gate there.
        experts: LoRA -> sha256 of its tensors. A file is found again by it, whatever its name.
        embeddings: embedding that a prompt names as "embedding:NAME" -> sha256 of its tensors.
        gates_sha256: the hash of the trained gates; "" for a gate type.
        base: the base pipeline's name; in a file, its `shared_name`.
        binding: bound: each LoRA acts on its own words and in its own place; tiles: in some steps each subject is also
            drawn by itself in its place; auto: tiles if each has room, else bound; none: every LoRA acts everywhere.
            Default: auto.
        masks: LoRA whose tag says region=painted -> its mask picture, as `binding.as_text.mask_text` writes it.
        image, mask: sha256 of the pixels of the picture that is drawn over and of its mask, which is white where the picture
            is redrawn; "" for none.
        controlnet: the ControlNet that a control map is for, by the name of its file; for Stable Diffusion 1.x, 2.x and XL.
        controlnet_sha256: the hash of that file's tensors.
        control: sha256 of the pixels of the control map: edges, depths, a pose, ... as that ControlNet reads them. Nothing
            is made a map of.
        control_strength: how much the map counts.
        control_end: the share of the steps after which it counts no more.
        ip_adapter: the IP-Adapter that reads a reference picture, by the name of its file; for the same bases.
        ip_adapter_sha256: the hash of that file's tensors.
        reference: sha256 of the pixels of that picture.
        ip_scale: how much the reference picture counts.
        strength: how much of that picture to redraw: the fraction of the steps that run.
        hires: enlarge the picture by this factor, and draw over it once more.
        hires_strength: how much of the enlarged picture to redraw.
        upscaler: the model that enlarges the picture, by the name of its file. Default: its pixels are interpolated.
        upscaler_sha256: the hash of that file's tensors.
        detail: draw each subject's place in the finished picture once more, enlarged, and redraw this much of it: 0.2 to 0.3
            sharpens faces; 0 leaves it out.
        clip_skip: the last layer of the text encoder to read, counted from the end as in A1111; many checkpoints for
            drawings want 2. For Stable Diffusion 1.x and 2.x.
    """

    prompt: str
    negative: str = ""
    prompt_2: str = ""
    negative_2: str = ""
    seed: int = 0
    steps: Annotated[int, 1, 150] = 20
    guidance: Annotated[float, 0.0, 50.0] = 3.0
    width: int = 0
    height: int = 0
    sampler: str = ""
    gates: str = "sum"
    arm: str = "gates"
    locks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    embeddings: Mapping[str, str] = field(default_factory=dict)
    gates_sha256: str = ""
    base: str = ""
    binding: str = AUTO
    masks: Mapping[str, str] = field(default_factory=dict)
    image: str = ""
    mask: str = ""
    controlnet: str = ""
    controlnet_sha256: str = ""
    control: str = ""
    control_strength: Annotated[float, 0.0, 2.0] = 1.0
    control_end: Annotated[float, 0.05, 1.0] = 1.0
    ip_adapter: str = ""
    ip_adapter_sha256: str = ""
    reference: str = ""
    ip_scale: Annotated[float, 0.0, 2.0] = 0.6
    strength: Annotated[float, 0.0, 1.0] = 0.6
    hires: Annotated[float, 1.0, 4.0] = 1.0
    hires_strength: Annotated[float, 0.0, 1.0] = 0.5
    upscaler: str = ""
    upscaler_sha256: str = ""
    detail: Annotated[float, 0.0, 1.0] = 0.0
    clip_skip: Annotated[int, 1, 12] = 1

    def __post_init__(self) -> None:
        check_options(vars(self), FIELD_TYPES, "a recipe")
        if any(len(getattr(self, name)) > MAX_PROMPT for name in PROMPTS):
            raise ValueError(f"a prompt has at most {MAX_PROMPT} characters")
        if self.arm_and_name[0] not in ARMS or self.binding not in BINDINGS:
            arms = f"{list(ARMS[:3])}, 'alone NAME', 'merge METHOD'"
            unknown = f"unknown arm {self.arm!r} or binding {self.binding!r}"
            raise ValueError(f"{unknown}; known arms: {arms}; known bindings: {list(BINDINGS)}")
        if self.upscaler and self.hires == 1:
            raise ValueError(f"the upscaler {self.upscaler!r} enlarges the picture for hires: give hires above 1")
        for picture, other, why in (
            ("mask", "image", "a mask needs a picture that is drawn over"),
            ("control", "controlnet", "a control map is for a ControlNet: choose one"),
            ("reference", "ip_adapter", "a reference picture is read by an IP-Adapter: choose one"),
        ):
            if getattr(self, picture) and not getattr(self, other):
                raise ValueError(why)
        if not all(math.isfinite(weight) for row in self.locks.values() for weight in row.values()):
            raise ValueError("a locked weight must be a finite number")
        if sum(map(len, self.masks.values())) > MAX_MASKS:
            raise ValueError(f"masks are PNGs in base64, of at most {MAX_MASKS >> 10} KiB together")
        for name, (low, high) in RANGES.items():
            value, is_open = getattr(self, name), name in OPEN
            if not (low <= value <= high or is_open and value == 0):
                raise ValueError(f"{name} must be in {low}..{high}{', or 0' if is_open else ''}, got {value!r}")

    @property
    def arm_and_name(self) -> tuple[str, str]:
        """The arm without its argument, and the argument: the LoRA that is drawn alone or the method of the merge."""
        arm, _, name = self.arm.partition(" ")
        return arm, name

    @property
    def tags(self) -> tuple[LoraTag, ...]:
        """The LoRA tags of the prompt."""
        return parse(self.prompt, self.experts).tags

    @property
    def acting(self) -> list[str]:
        """The LoRAs that are not at strength 0 throughout."""
        off = {tag.name for tag in self.tags if tag.is_off}
        return [name for name in self.experts if name not in off]

    @property
    def text(self) -> str:
        """The prompt without its tags."""
        return parse(self.prompt, self.experts).text

    @property
    def plain_text(self) -> str:
        """The prompt without its tags and weights."""
        return plain_text(self.text)

    @property
    def has_pictures(self) -> bool:
        """Whether it is drawn over or with a given picture. These are seen whole, so that there are no tiles."""
        return bool(self.image or self.controlnet or self.ip_adapter)

    def binding_of_pass(self, *, over: bool = False) -> str:
        """How a pass binds the LoRAs, one of `BINDINGS`: "none" without gates, and no tiles with given pictures, or if it
        draws `over` the picture of an earlier pass."""
        if self.arm != "gates":
            return "none"
        return BOUND if (over or self.has_pictures) and self.binding != "none" else self.binding

    @property
    def call(self) -> dict[str, Any]:
        """The prompts without tags and how they are read: the arguments of `prompt_weights.call_arguments`."""
        texts = {name: getattr(self, name) for name in PROMPTS} | {"prompt": self.text}
        return {**texts, "guided": self.guidance > 1}

    @property
    def unread(self) -> dict[str, str]:
        """The settings that are set and that nothing reads -> what is not set and would."""
        is_set = {name: getattr(self, name) != getattr(Recipe, name) for name in (*READ_WITH, *READ_WITH.values())}
        return {name: other for name, other in READ_WITH.items() if is_set[name] and not is_set[other]}

    def constant_strengths(self) -> dict[str, float]:
        """LoRA -> its strength. Raises ValueError if a tag varies it over components, blocks or steps."""
        tags = self.tags
        plain = [tag for tag in tags if len(tag.te.points) == len(tag.unet.points) == 1 and tag.te == tag.unet]
        if len(plain) != len(tags) or any(t.lbw or t.start or t.stop is not None for t in tags):
            raise ValueError("one LoRA has one strength: take te=, unet=, lbw=, start=, stop= and step= out of the tags")
        return {tag.name: tag.unet(0, 1) for tag in tags}

    def tag_bindings(self) -> dict[str, Any]:
        """LoRA -> the words and region in its tag, as `Mixture.bind` takes them.

        Raises ValueError for a painted region if its mask is missing or cannot be read.
        """
        bound = {tag.name: tag.binding for tag in self.tags if tag.binding is not None}
        for tag in self.tags:
            if tag.region == PAINTED:
                if tag.name not in self.masks:
                    raise ValueError(
                        f"the region of {tag.name!r} is painted, but the recipe has no mask for it: paint it in the app, "
                        "give the recipe's masks, or write another region into the tag"
                    )
                bound[tag.name] = parse_phrases(tag.word), read_mask(self.masks[tag.name])
        return bound

    def to_dict(self) -> dict[str, Any]:
        """Plain data for a file, with format and version. The base has its `shared_name`."""
        return {"format": FORMAT, "version": VERSION, **asdict(self), "base": shared_name(self.base)}

    @classmethod
    def from_dict(cls, values: Any, where: str = "the recipe") -> Recipe:
        """The inverse of `to_dict`, except that the base keeps its `shared_name`.

        Raises ValueError for another format, an unknown or missing field, or a value out of range.
        """
        if not isinstance(values, Mapping) or (values.get("format"), values.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{where} is not a {FORMAT} of version {VERSION}")
        given = {key: value for key, value in values.items() if key not in ("format", "version")}
        if unknown := given.keys() - FIELD_TYPES.keys():
            raise ValueError(f"{where} has unknown fields {sorted(unknown)}; known: {list(FIELD_TYPES)}")
        if "prompt" not in given:
            raise ValueError(f"{where} has no prompt")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON."""
        write_text(path, json.dumps(self.to_dict(), indent=1) + "\n")


FIELD_TYPES = get_type_hints(Recipe)  # field -> its type
RANGES = {  # name -> (least, most)
    **{n: get_args(k)[1:] for n, k in get_type_hints(Recipe, include_extras=True).items() if get_origin(k) is Annotated},
    **dict.fromkeys(OPEN, (16, 4096)),
    "seed": (-1, 2**63 - 1),
}


def load(path: str | Path) -> Recipe:
    """Read a file of `Recipe.save`. Raises ValueError that names the file and what is wrong."""
    return Recipe.from_dict(read_json(path), str(Path(path).name))


def with_strength(prompt: str, name: str, strength: float, known: Iterable[str] = ()) -> str:
    """The prompt with one LoRA at a constant strength.

    The LoRA's tag is found in upper or lower case and keeps its blocks and steps. If there is no tag, one is added.
    """
    parsed = parse(prompt, known)
    tags = {tag.name: tag for tag in parsed.tags}
    name = matching_lora(name, tags) or name
    tags[name] = replace(tags.get(name, LoraTag(name)), te=constant(strength), unet=constant(strength))
    return str(replace(parsed, tags=tuple(tags.values())))
