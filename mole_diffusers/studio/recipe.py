"""A recipe: everything that determines one picture, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from mole_diffusers.binding.regions import AUTO
from mole_diffusers.lora.safe_files import parse_json, read_json
from mole_diffusers.studio.prompt_syntax import LoraTag, constant, parse

FORMAT, VERSION = "mole_diffusers.studio.recipe", 2
RANGES = {"seed": (0, 2**63 - 1), "steps": (1, 150), "guidance": (0.0, 50.0), "width": (16, 4096), "height": (16, 4096)}
BINDINGS = (AUTO, "none")
ARMS = ("gates", "sum", "base", "alone", "merge")


@dataclass(frozen=True)
class Recipe:
    """What determines a picture; the same recipe gives the same pixels on the same machine.

    Attributes:
        prompt: with a `<lora:...>` tag for every LoRA.
        negative: the negative prompt.
        seed: of a generator on the CPU, whatever the device.
        steps, guidance, width, height: arguments of the pipeline call; sizes in pixels.
        sampler: a name in `render.SAMPLERS`; "" is the pipeline's own.
        gates: an untrained family ("sum", "mean"), the name of trained gates, or "auto" before it is completed.
        arm: how the LoRAs are combined: "gates"; for comparison "sum", "base" (no LoRA), "alone NAME", or "merge METHOD"
            (see `merging.merge`).
        locks: gate site -> {LoRA: weight}, used instead of the gate there.
        experts: LoRA -> sha256 of its tensors, by which a file is found again under any name.
        gates_sha256: of the trained gates, "" for a family.
        base: the base pipeline's name.
        binding: "auto", each LoRA on its own words and in its own place, or "none".
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    steps: int = 20
    guidance: float = 3.0
    width: int = 64
    height: int = 64
    sampler: str = ""
    gates: str = "sum"
    arm: str = "gates"
    locks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    experts: Mapping[str, str] = field(default_factory=dict)
    gates_sha256: str = ""
    base: str = ""
    binding: str = AUTO

    def __post_init__(self) -> None:
        for name in ("prompt", "negative", "sampler", "gates", "arm", "gates_sha256", "base"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        for name, (low, high) in RANGES.items():
            value, whole = getattr(self, name), name != "guidance"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not low <= value <= high:
                raise ValueError(
                    f"{name} must be {'a whole number' if whole else 'a number'} in {low}..{high}, got {value!r}"
                )
        if len(self.prompt) > 5000 or len(self.negative) > 5000:
            raise ValueError("a prompt has at most 5000 characters")
        if self.arm.partition(" ")[0] not in ARMS or self.binding not in BINDINGS:
            arms = f"{list(ARMS[:3])}, 'alone NAME', 'merge METHOD'"
            raise ValueError(f"unknown arm {self.arm!r} or binding {self.binding!r}; known: {arms}; {list(BINDINGS)}")
        if not _maps_to(self.locks, Mapping) or not all(_maps_to(row, int | float) for row in self.locks.values()):
            raise ValueError("locks must map gate sites to weights by LoRA")
        if not all(math.isfinite(weight) for row in self.locks.values() for weight in row.values()):
            raise ValueError("a locked weight must be a finite number")
        if not _maps_to(self.experts, str):
            raise ValueError("experts must map LoRA names to hashes")

    @property
    def tags(self) -> tuple[LoraTag, ...]:
        """The LoRA tags of the prompt."""
        return parse(self.prompt, self.experts).tags

    @property
    def text(self) -> str:
        """The prompt without its tags."""
        return parse(self.prompt, self.experts).text

    def constant_strengths(self) -> dict[str, float]:
        """LoRA -> its one strength. Raises ValueError if a tag varies it over components, blocks or steps."""
        tags = self.tags
        plain = [tag for tag in tags if len(tag.te.points) == len(tag.unet.points) == 1 and tag.te == tag.unet]
        if len(plain) != len(tags) or any(t.lbw or t.start or t.stop is not None for t in tags):
            raise ValueError("one LoRA has one strength: take te=, unet=, lbw=, start=, stop= and step= out of the tags")
        return {tag.name: tag.unet(0, 1) for tag in tags}

    def tag_bindings(self) -> dict[str, Any]:
        """LoRA -> what its tag says about words and region, as `Mixture.bind` takes it."""
        return {tag.name: tag.binding for tag in self.tags if tag.binding is not None}

    def to_dict(self) -> dict[str, Any]:
        """As plain data with format and version, for a file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any, where: str = "the recipe") -> Recipe:
        """The inverse of `to_dict`.

        Raises ValueError for another format, an unknown or missing field, or a value out of range.
        """
        versions = range(1, VERSION + 1)
        if not isinstance(values, Mapping) or values.get("format") != FORMAT or values.get("version") not in versions:
            raise ValueError(f"{where} is not a {FORMAT} of version {VERSION}")
        given = {key: value for key, value in values.items() if key not in ("format", "version")}
        if values["version"] == 1:  # before LoRAs could be bound
            given["binding"] = "none"
        if unknown := set(given) - {f.name for f in fields(cls)}:
            raise ValueError(f"{where} has unknown fields {sorted(unknown)}; known: {[f.name for f in fields(cls)]}")
        if "prompt" not in given:
            raise ValueError(f"{where} has no prompt")
        try:
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")


def load(path: str | Path) -> Recipe:
    """Read what `Recipe.save` wrote. Raises ValueError naming the file and what is wrong."""
    return Recipe.from_dict(read_json(path), str(Path(path).name))


def loads(text: str, where: str) -> Recipe:
    """A recipe from its JSON text; errors begin with `where`."""
    return Recipe.from_dict(parse_json(text, where), where)


def with_strength(prompt: str, name: str, strength: float, known: Iterable[str] = ()) -> str:
    """The prompt with one LoRA at a constant strength; a tag is added if there is none, its blocks and steps are kept."""
    parsed = parse(prompt, known)
    tags = {tag.name: tag for tag in parsed.tags}
    tags[name] = replace(tags.get(name, LoraTag(name)), te=constant(strength), unet=constant(strength))
    return str(replace(parsed, tags=tuple(tags.values())))


def _maps_to(values: Any, kind: Any) -> bool:
    """Whether this is a mapping from texts to values of this type."""
    return isinstance(values, Mapping) and all(isinstance(k, str) and isinstance(v, kind) for k, v in values.items())
