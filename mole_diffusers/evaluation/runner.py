"""The runner: every arm on every case, resumable, its work divided over processes."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from mole_diffusers.evaluation.digests import of_texts
from mole_diffusers.evaluation.rows import Row, Rows, key
from mole_diffusers.inspection.compare import sample
from mole_diffusers.lora import Expert
from mole_diffusers.merging.activations import Activations


@dataclass(frozen=True)
class Case:
    """One thing to draw: the concepts that experts bring, and the prompt that asks for all of them.

    `idle` are experts that are attached beside them and not asked for.
    """

    concepts: tuple[str, ...]
    kind: str
    prompt: str
    idle: tuple[str, ...] = ()

    @property
    def experts(self) -> tuple[str, ...]:
        return self.concepts + self.idle

    @property
    def name(self) -> str:
        return "+".join(self.concepts) + "".join(f" ({name})" for name in self.idle)


def crowded(found: Sequence[Case], pool: Sequence[str], counts: Sequence[int]) -> list[Case]:
    """The cases with further experts of `pool` attached that the prompt does not ask for, `counts` experts in all.

    Counts that a case's own concepts exceed, or that the pool cannot fill, are left out.

    Raises ValueError where that leaves no case.
    """
    out: list[Case] = []
    for case in found:
        others = [name for name in pool if name not in case.concepts]
        for count in counts:
            idle = count - len(case.concepts)
            if 0 <= idle <= len(others):
                start = len(out) % max(1, len(others))  # another stranger each time
                strangers = tuple((others[start:] + others[:start])[:idle])
                out.append(replace(case, idle=strangers))
    if not out:
        raise ValueError(f"no case has {sorted(counts)} experts attached: it asks for more, or there are but {len(pool)}")
    return out


@dataclass
class Bench:
    """What arms work with, and how every picture is drawn.

    Attributes:
        experts: concept -> its LoRA.
        options: of the pipeline call: num_inference_steps, guidance_scale, ...
        base: what the pipeline is, for the rows.
        measured: by what pictures are measured, for the rows.
        prompts: concept -> prompts of it alone.
        styles: the concepts that are styles.
        strengths: the user's own, by concept, on top of what an arm weighs with; 1 where not given.
    """

    pipe: Any
    experts: Mapping[str, Expert]
    options: Mapping[str, Any]
    base: str = ""
    prompts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    styles: frozenset[str] = frozenset()
    strengths: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def activations(self) -> Activations:
        """What each expert does alone, for the merges that need it; found once."""
        return Activations(self.pipe, self.prompts)

    def weighed(self, weights: Mapping[str, float]) -> dict[str, tuple[Expert, float]]:
        """Concept -> its LoRA and strength, the user's own times the weight."""
        return {name: (self.experts[name], weight * self.strengths.get(name, 1.0)) for name, weight in weights.items()}

    def used(self, names: Sequence[str]) -> dict[str, Any]:
        """What a row says of the experts that it was drawn with; strengths where one is not 1."""
        said: dict[str, Any] = {"experts": of_texts(*(self.experts[name].sha256 for name in names))}
        strengths = {name: self.strengths.get(name, 1.0) for name in names}
        return said if set(strengths.values()) <= {1.0} else said | {"strengths": strengths}


@dataclass(frozen=True)
class Arm:
    """A composer under test: inside `draws(bench, case)` the pipeline draws the case by it.

    Attributes:
        settings: all that its pictures of a case depend on beside the seed and the bench's base and options, ready for JSON.
        covers: whether it can draw a case; one without trained gates, say, is left out of this arm.
    """

    name: str
    draws: Callable[[Bench, Case], AbstractContextManager[Any]]
    settings: Callable[[Bench, Case], Mapping[str, Any]] = lambda bench, case: bench.used(case.experts)
    covers: Callable[[Case], bool] = lambda _: True


Look = Callable[[Case, Sequence[Image.Image]], list[Row]]  # what is measured in each picture of a case


def evaluate(
    bench: Bench,
    arms: Sequence[Arm],
    cases: Sequence[Case],
    look: Look,
    *,
    seeds: Sequence[int],
    rows: Rows,
    processes: int = 1,
) -> list[Row]:
    """Draw and measure what `rows` does not hold yet; returns what `found` does.

    Pictures are kept beside the rows, see `picture_path`.

    Args:
        processes: how many share the work; `rows` says which this one is.
    """
    done = {key(row) for row in rows.read()}
    work = [(arm, case) for case in cases for arm in arms if arm.covers(case)]
    for arm, case in tqdm(_share(work, rows.process, processes), desc="evaluate", mininterval=5):
        missing = [row for row in _asked(bench, arm, case, seeds=seeds) if key(row) not in done]
        if missing:
            with arm.draws(bench, case):
                images = sample(bench.pipe, case.prompt, [row["seed"] for row in missing], **bench.options)
            seen = look(case, images)
            for row, image in zip(missing, images, strict=True):
                keep(image, picture_path(rows.folder, row))
            rows.append([{**row, **measured} for row, measured in zip(missing, seen, strict=True)])
    return found(bench, arms, cases, seeds=seeds, rows=rows)


def found(bench: Bench, arms: Sequence[Arm], cases: Sequence[Case], *, seeds: Sequence[int], rows: Rows) -> list[Row]:
    """The rows that these arms, cases, seeds and settings ask for, of every process, as far as they are there.

    Arm by arm in the order given, and nothing else that the folder may hold. What an older row does not say of what was
    asked for is filled in.
    """
    there = {key(row): row for row in rows.read()}
    wanted = [row for arm in arms for case in cases if arm.covers(case) for row in _asked(bench, arm, case, seeds=seeds)]
    return [row | there[key(row)] for row in wanted if key(row) in there]


def _asked(bench: Bench, arm: Arm, case: Case, *, seeds: Sequence[int]) -> list[Row]:
    """A row per seed, without what is measured."""
    facts = {
        "case": case.name,
        "concepts": list(case.concepts),
        "kind": case.kind,
        "arm": arm.name,
        "prompt": case.prompt,
        "idle": list(case.idle),
        "settings": {"base": bench.base, **bench.measured, **bench.options, **arm.settings(bench, case)},
    }
    return [{**facts, "seed": seed} for seed in seeds]


def picture_path(folder: Path, row: Row) -> Path:
    """Where a row's picture lies: pictures/ARM/CASE/SEED-DIGEST.png, the digest of all that was asked for, so that other
    settings or prompts have other files; characters that files do not take are cleaned from names."""
    clean = [re.sub(r"[^\w+@.-]+", "_", name) for name in (row["arm"], row["case"])]
    return folder / "pictures" / clean[0] / clean[1] / f"{row['seed']}-{of_texts(key(row))}.png"


def keep(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _share(work: Sequence[tuple[Arm, Case]], process: int, processes: int) -> list[tuple[Arm, Case]]:
    """This process's part: by a hash of the names, so that it stays the same when arms are added."""
    return [(arm, case) for arm, case in work if zlib.crc32(f"{arm.name}/{case.name}".encode()) % processes == process]
