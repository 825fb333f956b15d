"""The runner: draws every method on every case, resumably, and divides the work among processes."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mole_diffusers.binding import Bound, files_bindings, to_json
from mole_diffusers.inspection import sample
from mole_diffusers.lora import Expert
from mole_diffusers.merging import Activations
from mole_world.evaluation.rows import Row, Rows, digest_texts, key, picture_path, save_picture

ByKind = Mapping[str, Mapping[str, float]]  # kind of case -> {"subject": strength, "style": strength}


@dataclass(frozen=True)
class Case:
    """One composition to draw: the concepts of the experts, and a prompt that names all of them.

    Attributes:
        idle: experts that are also attached although the prompt does not name them.
        size: width and height of its pictures in pixels; None takes the setup's options.
    """

    concepts: tuple[str, ...]
    kind: str
    prompt: str
    idle: tuple[str, ...] = ()
    size: tuple[int, int] | None = None

    @property
    def experts(self) -> tuple[str, ...]:
        return self.concepts + self.idle

    @property
    def name(self) -> str:
        size = f" {self.size[0]}x{self.size[1]}" if self.size else ""
        return "+".join(self.concepts) + "".join(f" ({name})" for name in self.idle) + size


def add_idle_experts(cases: Sequence[Case], pool: Sequence[str], counts: Sequence[int]) -> list[Case]:
    """The cases once per number in `counts`, with idle experts from `pool` attached up to that number.

    Numbers below a case's own number of concepts, or that the pool cannot fill, are left out.

    Raises ValueError if that leaves no case.
    """
    out: list[Case] = []
    for case in cases:
        others = [name for name in pool if name not in case.concepts]
        for count in counts:
            idle = count - len(case.concepts)
            if 0 <= idle <= len(others):
                start = len(out) % max(1, len(others))  # start with another expert each time
                out.append(replace(case, idle=tuple((others[start:] + others[:start])[:idle])))
    if not out:
        raise ValueError(f"no case can have {sorted(counts)} experts attached: it has more, or there are only {len(pool)}")
    return out


@dataclass
class Setup:
    """What methods work with, and how every picture is drawn.

    Attributes:
        experts: concept -> its LoRA.
        options: of the pipeline call: num_inference_steps, guidance_scale, ...
        base: name of the base model, for the rows.
        prompts: concept -> prompts for it alone.
        styles: the concepts that are styles.
        strengths: the user's own, by concept, 1 by default; multiplied with the method's weights.
        gates: a folder with one folder of trained gates per case, see `methods.gates_of`.
        searched: the result of a search, see `methods.searched`.
    """

    pipe: Any
    experts: Mapping[str, Expert]
    options: Mapping[str, Any]
    base: str = ""
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    styles: frozenset[str] = frozenset()
    strengths: Mapping[str, float] = field(default_factory=dict)
    gates: Path | None = None
    searched: ByKind | None = None

    @cached_property
    def activations(self) -> Activations:
        """What each expert does alone, for the merges that need it. Recorded once."""
        return Activations(self.pipe, self.prompts)

    def call_of(self, case: Case) -> dict[str, Any]:
        """Options of the pipeline call that draws a case."""
        return {**self.options, **(dict(zip(("width", "height"), case.size, strict=True)) if case.size else {})}

    def weighted_experts(self, weights: Mapping[str, float]) -> dict[str, tuple[Expert, float]]:
        """Concept -> its LoRA and strength, the user's own times the weight."""
        return {name: (self.experts[name], weight * self.strengths.get(name, 1.0)) for name, weight in weights.items()}

    def expert_settings(self, weights: Mapping[str, float], *, words: bool = False) -> dict[str, Any]:
        """A row's description of the experts behind its picture, with strengths and a method's weights if one is not 1.

        Args:
            words: also describe the words that the experts' files give, if one has others than its own name. Unlike
                weights, notes and headers can be edited between two runs.
        """
        found: dict[str, Any] = {"experts": digest_texts(*(self.experts[name].sha256 for name in weights))}
        strengths = {name: self.strengths.get(name, 1.0) for name in weights}
        factors = {"strengths": strengths, "expert_weights": dict(weights)}
        found |= {key: values for key, values in factors.items() if set(values.values()) - {1.0}}
        own = files_bindings({name: self.experts[name] for name in weights}) if words else {}
        others = {name: to_json(said) for name, said in own.items() if said != Bound((name,))}
        return found | ({"words": others} if others else {})


@dataclass(frozen=True)
class Method:
    """A composer under test: inside `draws(setup, case)` the pipeline draws the case with it.

    Attributes:
        settings: everything that its pictures of a case depend on, except the seed, the base and the options; ready for
            JSON.
        covers: whether it can draw a case. For example, it cannot without trained gates for that case.
        needs: raises ValueError for a setup that lacks something; the message goes on after the method's name.
    """

    name: str
    draws: Callable[[Setup, Case], AbstractContextManager[Any]]
    settings: Callable[[Setup, Case], Mapping[str, Any]]
    covers: Callable[[Case], bool] = lambda _: True
    needs: Callable[[Setup], None] = lambda _: None


Metrics = Callable[[Case, Sequence[Image.Image]], list[Row]]  # the measured fields of each picture of a case


def evaluate(
    setup: Setup,
    methods: Sequence[Method],
    cases: Sequence[Case],
    metrics: Metrics,
    *,
    seeds: Sequence[int],
    rows: Rows,
    processes: int = 1,
) -> list[Row]:
    """Draw and measure what `rows` does not have yet, and save each picture at its `picture_path`. Returns `requested_rows`.

    Args:
        processes: how many processes share the work; `rows` knows which one this is.
    """
    done = {key(row) for row in rows.read()}
    work = [(method, case) for case in cases for method in methods if method.covers(case)]
    own = [  # divided by a hash of the names, which stays the same when methods are added
        (method, case)
        for method, case in work
        if zlib.crc32(f"{method.name}/{case.name}".encode()) % processes == rows.process
    ]
    for method, case in tqdm(own, desc="evaluate", mininterval=5):
        missing = [row for row in _unmeasured(setup, method, case, seeds=seeds) if key(row) not in done]
        done |= set(map(key, missing))
        if missing:
            with method.draws(setup, case):
                images = sample(setup.pipe, case.prompt, [row["seed"] for row in missing], **setup.call_of(case))
            measured = metrics(case, images)
            for row, image in zip(missing, images, strict=True):
                save_picture(image, picture_path(rows.folder, row))
            rows.append([row | values for row, values in zip(missing, measured, strict=True)])
    return requested_rows(setup, methods, cases, seeds=seeds, rows=rows)


def requested_rows(
    setup: Setup, methods: Sequence[Method], cases: Sequence[Case], *, seeds: Sequence[int], rows: Rows
) -> list[Row]:
    """The existing rows of these methods, cases, seeds and settings, from all processes.

    They are in the order of the methods, each once, without anything else in the folder. Fields that an older row lacks are
    filled in.
    """
    there, work = (
        {key(row): row for row in rows.read()},
        [(method, case) for method in methods for case in cases if method.covers(case)],
    )
    asked = {key(row): row for method, case in work for row in _unmeasured(setup, method, case, seeds=seeds)}
    return [row | there[name] for name, row in asked.items() if name in there]


def _unmeasured(setup: Setup, method: Method, case: Case, *, seeds: Sequence[int]) -> list[Row]:
    """A row per seed, without measurements."""
    facts = {
        "case": case.name,
        "concepts": list(case.concepts),
        "kind": case.kind,
        "method": method.name,
        "prompt": case.prompt,
        "idle": list(case.idle),
        "settings": {"base": setup.base, **setup.call_of(case), **method.settings(setup, case)},
    }
    return [{**facts, "seed": seed} for seed in dict.fromkeys(seeds)]
