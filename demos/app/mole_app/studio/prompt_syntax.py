"""Parse a prompt into its text and its `<lora:...>` tags, whose strengths may vary by component, block and step."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

import numpy as np

from mole_diffusers.binding import AUTO, EVERYWHERE, checked_region, parse_phrases, parse_region
from mole_diffusers.lora import MAX_STRENGTH

TAG = re.compile(r"<(\w+):([^<>]*)>")
MAX_PROMPT = 5000  # characters
PAINTED = "painted"  # a region given as a mask picture next to the prompt
ARGUMENTS = ("te", "unet", "lbw", "start", "stop", "step", "word", "region")


@dataclass(frozen=True)
class Curve:
    """A strength over the steps: (point, value) pairs, linear in between, constant before the first and after the last.

    As in sd-webui-loractl, points are in order. If the last one is at most 1, all are fractions of the run, where 1 is the
    last step. Otherwise all are steps, counted from 0.
    """

    points: tuple[tuple[float, float], ...]

    def __call__(self, step: int, steps: int) -> float:
        """The value at `step` of a run of `steps`."""
        scale = steps - 1 if self.points[-1][0] <= 1 else 1
        return float(np.interp(step, [point * scale for point, _ in self.points], [value for _, value in self.points]))

    def __str__(self) -> str:
        if len(self.points) == 1 and self.points[0][0] == 0:
            return f"{self.points[0][1]:g}"
        return ",".join(f"{value:g}@{point:g}" for point, value in self.points)


def constant(value: float) -> Curve:
    """The same strength at every step."""
    return Curve(((0.0, value),))


@dataclass(frozen=True)
class LoraTag:
    """What one tag asks for.

    Attributes:
        name: the LoRA.
        te, unet: the strength in the text encoders and in the denoiser. Text encoders run once, before the first step.
        lbw: block weights as typed: a preset's name or numbers, see `block_weights`. "" leaves every block at 1.
        start, stop: the denoiser uses the LoRA in steps start <= step < stop, counted from 0; None means to the end.
        word: phrases of the prompt that the LoRA is bound to, separated by |. "" takes those in its file.
        is_weighed: whether it was typed with a strength. If not, its file's note may say one.
        region: where the LoRA acts, see `binding.as_text.parse_region`, or "painted". "" finds the place from attention.
    """

    name: str
    te: Curve = constant(1.0)
    unet: Curve = constant(1.0)
    lbw: str = ""
    start: int = 0
    stop: int | None = None
    word: str = ""
    region: str = ""
    is_weighed: bool = field(default=True, compare=False)

    def strength(self, component: str, step: int, steps: int) -> float:
        """The strength in a component ("unet", "text_encoder", ...) at `step` of `steps`; 0 outside start..stop."""
        if component.startswith("text_encoder"):
            return self.te(0, steps)
        active = self.start <= step < (steps if self.stop is None else self.stop)
        return self.unet(step, steps) if active else 0.0

    @property
    def is_off(self) -> bool:
        """Whether the LoRA has strength 0 in every component at every step."""
        return not any(value for curve in (self.te, self.unet) for _, value in curve.points)

    @property
    def binding(self) -> Any:
        """What `Mixture.bind` takes for this LoRA; None if the tag has neither word nor region."""
        if not self.word and not self.region:
            return None
        if self.region == EVERYWHERE and not self.word:
            return EVERYWHERE
        return parse_phrases(self.word), parse_region(self.region or AUTO)

    def or_at(self, preferred: Callable[[str], float | None]) -> LoraTag:
        """The tag; one that was typed without a strength, at the strength that `preferred` says for its LoRA, if any."""
        if self.is_weighed or (weight := preferred(self.name)) is None:
            return self
        return replace(self, te=constant(weight), unet=constant(weight), is_weighed=True)

    def __str__(self) -> str:
        named = {"unet": None if self.unet == self.te else self.unet, "lbw": self.lbw, "start": self.start or None}
        named |= {"stop": self.stop, "word": self.word, "region": self.region}
        words = [f"{key}={value}" for key, value in named.items() if value not in (None, "")]
        return ":".join([f"<lora:{self.name}", str(self.te), *words]) + ">"


@dataclass(frozen=True)
class Parsed:
    """A parsed prompt: the text for the text encoders, and the tags in order."""

    text: str
    tags: tuple[LoraTag, ...]

    def __str__(self) -> str:
        return " ".join([self.text, *map(str, self.tags)]).strip()


def parse(prompt: str, known: Iterable[str] = ()) -> Parsed:
    """Separate a prompt from its tags.

    Tags look like `<lora:NAME[:TE[:UNET]]>`, as in A1111. They can also have the named arguments te=, unet=, lbw=, start=,
    stop=, step=A-B, word= and region=. A strength is a number or a list such as "0@0,1@0.4" (; and ~ work, too). TE is 1 by
    default, UNET the same as TE.

    Args:
        known: names of LoRAs; needed for names that contain ":" or end in a space.

    Raises:
        ValueError: for more than `MAX_PROMPT` characters, another kind of tag, an unknown argument, a value that is not a
            number, or two tags with the same name.
    """
    if len(prompt) > MAX_PROMPT:
        raise ValueError(f"a prompt has at most {MAX_PROMPT} characters, got {len(prompt)}")
    tags: dict[str, LoraTag] = {}
    for kind, body in TAG.findall(prompt):
        if kind != "lora":
            raise ValueError(f"<{kind}:{body}> is not read; the only tag is <lora:NAME:STRENGTH>")
        tag = _tag(body, known)
        if tag.name in tags:
            raise ValueError(f"the prompt has two tags for {tag.name!r}; use one")
        tags[tag.name] = tag
    text = re.sub(r"\s+", " ", TAG.sub("", prompt)).strip()
    if broken := re.search(r"<\s*lora\b.{,24}", text, re.IGNORECASE):
        raise ValueError(f"the tag {broken[0]!r} is not read; a tag is <lora:NAME:STRENGTH>")
    return Parsed(text, tuple(tags.values()))


def _tag(body: str, known: Iterable[str]) -> LoraTag:
    where = f"<lora:{body}>"
    found = max((k for k in known if body == k or body.startswith(f"{k}:")), key=len, default=None)
    name = body.partition(":")[0] if found is None else found
    words = [word.strip() for word in body.removeprefix(name).removeprefix(":").split(":") if word.strip()]
    bare, named = [w for w in words if "=" not in w], [w.partition("=")[::2] for w in words if "=" in w]
    if len(bare) > 2:
        raise ValueError(f"{where}: {bare[2]!r} is one number too many; other arguments are named: {', '.join(ARGUMENTS)}")
    if twice := [key for key, count in Counter(key for key, _ in named).items() if count > 1]:
        raise ValueError(f"{where}: {twice[0]}= is there twice")
    given = dict(zip(("te", "unet"), bare, strict=False)) | dict(named)
    if unknown := [key for key in given if key not in ARGUMENTS]:
        raise ValueError(f"{where}: unknown argument {unknown[0]!r}; known: {', '.join(ARGUMENTS)}")
    if "step" in given and given.keys() & {"start", "stop"}:
        raise ValueError(f"{where}: step= already says where it starts and stops")
    te = _curve(given.get("te", "1"), where)
    unet = _curve(given["unet"], where) if "unet" in given else te
    if found is None:
        name = name.strip().removesuffix(".safetensors")
    if not name:
        raise ValueError(f"{where} names no LoRA")
    start, stop = _steps(given, where)
    word, region = given.get("word", ""), given.get("region", "")
    if region not in ("", PAINTED):
        checked_region(parse_region(region), name)
    is_weighed = bool(given.keys() & {"te", "unet"})
    return LoraTag(name, te, unet, given.get("lbw", ""), start, stop, word, region, is_weighed)


def _steps(given: dict[str, str], where: str) -> tuple[int, int | None]:
    """The first step and the one after the last that a tag asks for."""
    start, stop = given.get("start", "0"), given.get("stop")
    if "step" in given:
        start, dash, stop = given["step"].partition("-")
        if not dash:
            raise ValueError(f"{where}: step={given['step']} is not FIRST-LAST")
    if not start.isdecimal() or not (stop is None or stop.isdecimal()):
        raise ValueError(f"{where}: a step is a whole number from 0, got {start!r} and {stop!r}")
    return int(start), None if stop is None else int(stop)


def _curve(text: str, where: str) -> Curve:
    points = []
    items = re.split("[,;]", text.replace("~", "@"))
    for item in items:
        value, at, point = item.partition("@")
        if not at and len(items) > 1:
            raise ValueError(f"{where}: {text!r} is not a list of STRENGTH@POINT")
        points.append((number(point, where) if at else 0.0, number(value, where)))
    points.sort(key=itemgetter(0))
    if points[0][0] < 0:
        raise ValueError(f"{where}: a point is 0 or more, got {points[0][0]:g}")
    return Curve(tuple(points))


def number(text: str, where: str) -> float:
    """Parse a number. Raises ValueError if it is not one, or larger than a strength may be."""
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is not a number") from None
    if not abs(value) < float("inf"):
        raise ValueError(f"{where}: {text!r} is not a finite number")
    if abs(value) > MAX_STRENGTH:
        raise ValueError(f"{where}: {text!r} is not in -{MAX_STRENGTH:g}..{MAX_STRENGTH:g}")
    return value
