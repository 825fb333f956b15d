"""The places of a prompt's subjects in the pictures of one batch: collects maps, then decides the layout and keeps it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mole_diffusers.binding import layout
from mole_diffusers.binding.config import Bound, given_region
from mole_diffusers.binding.regions import GridSize, region_mask
from mole_diffusers.binding.sentence import Mention, Sentence
from mole_diffusers.binding.words import Marks, Reading, Subject, SubjectKey, keys
from mole_diffusers.functional import onto

UNDECIDED = 0.02  # share of attention by which the best layout should be better than the next


@dataclass(frozen=True)
class Layout:
    """The places in one picture.

    Attributes:
        regions: name of an expert, or a noun without an expert -> [H, W] in 0..1, in latent pixels. Experts that act in
            the whole picture are not included.
        maps: the same names -> [h, w], the attention to their words from which the layout was decided.
    """

    regions: dict[str, torch.Tensor]
    maps: dict[str, torch.Tensor]


class PictureLayout:
    """The layout of the pictures of a batch. Rows are those of the denoiser's text. All tensors except maps are on the CPU.

    Args:
        bound: each expert's binding, in the order of the gates' columns.
        readings: of each row's text; empty if it is not known.
        guidance_layout: for the groups of rows that guidance combines, in their order: whether they are prompts. The first
            group of prompts says what is in the pictures.
        frames: rows of one video, which share one layout.
        latent_size: of the latents; None if it is not known, and nothing has a place.
    """

    def __init__(
        self,
        bound: Mapping[str, Bound],
        readings: Sequence[Reading],
        *,
        guidance_layout: Sequence[bool],
        frames: int,
        latent_size: GridSize | None,
    ):
        self.names, self.bound = list(bound), list(bound.values())
        self.readings, self.latent_size = readings, latent_size
        pictures = max(1, len(readings) // len(guidance_layout))
        first = guidance_layout.index(True) * pictures
        # For each row, the row whose prompt says what is in the picture; unconditional rows borrow it.
        self.prompt_of = [first + row % pictures // frames * frames for row in range(len(readings))]
        self.picture_rows = sorted(set(self.prompt_of))  # for each picture, the row whose prompt says what is in it
        self._is_prompt = [guidance_layout[min(row // pictures, len(guidance_layout) - 1)] for row in range(len(readings))]
        self._maps: dict[int, torch.Tensor] = {}  # row -> [K, h, w], attention to each subject's words
        self._decided: dict[int, torch.Tensor | None] = {}  # row -> [K, H, W], the places of its subjects; None: without any

    # ---- deciding

    @property
    def wants_maps(self) -> bool:
        """Whether there is something to place that no decision was made about."""
        return not self._decided and any(map(self._to_place, self.picture_rows))

    @property
    def can_decide(self) -> bool:
        """Whether maps have been read and the layout has not been decided."""
        return bool(self._maps) and not self._decided

    def add_maps(self, shares: torch.Tensor, latent_size: GridSize) -> None:
        """Add what a layer of this height and width attends to in each picture: shares [P, T, S] of its text's tokens."""
        for share, row in zip(shares, self.picture_rows, strict=True):
            if subjects := self._to_place(row):
                maps = _attended(share, [subject.tokens for subject in subjects], latent_size)
                self._maps[row] = self._maps.get(row, torch.zeros_like(maps)) + maps

    @property
    def has_words(self) -> bool:
        """Whether the text of any picture has words that belong to somebody or have a place."""
        return any(map(self._spoken, self.picture_rows))

    def named_maps(self, shares: torch.Tensor, latent_size: GridSize) -> list[dict[str, torch.Tensor]]:
        """The maps of all words in one layer, from the arguments of `add_maps`: per picture, name -> [h, w] on the CPU."""
        named = []
        for share, row in zip(shares, self.picture_rows, strict=True):
            spoken = self._spoken(row)
            maps = _attended(share, list(spoken.values()), latent_size).cpu() if spoken else ()
            named.append(dict(zip(spoken, maps, strict=True)))
        return named

    def _spoken(self, row: int) -> dict[str, Marks]:
        """The tokens of each expert's words in a row's text, and of each noun with a place that belongs to nobody."""
        reading = self.readings[row]
        spoken = {name: own for name, own in zip(self.names, reading.own, strict=True) if any(own)}
        return spoken | {self._label(subject): subject.tokens for subject in reading.subjects if not subject.experts}

    def decide(self) -> list[str]:
        """Decide the layout of every picture. What is not decided for sure has no place. Returns warnings."""
        warned = []
        for row, maps in self._maps.items():
            if self.latent_size is not None:
                subjects = self._to_place(row)
                regions, margin = regions_of_subjects(self.readings[row], subjects, maps.cpu(), self.bound, self.latent_size)
                named, self._decided[row] = _listed([subject.name for subject in subjects]), None
                if not regions.flatten(1).any(1).all():
                    warned.append(f"the given regions leave {named} no place: they act in the whole picture")
                elif margin < UNDECIDED and len(subjects) > 1:
                    some = next(self.names[k] for subject in subjects for k in subject.experts)
                    warned.append(
                        f"the places of {named} are undecided, since attention in the first step does not tell them apart, "
                        f"so they act in the whole picture: give a region, as in mixture.bind({{{some!r}: (None, 'left')}})"
                    )
                else:
                    self._decided[row] = regions
        return warned

    def set_places(self, regions: Mapping[SubjectKey, torch.Tensor]) -> bool:
        """Take places [H, W] that were decided elsewhere, by `words.keys`. Returns whether all subjects have one."""
        found: dict[int, torch.Tensor | None] = {}
        for row in self.picture_rows:
            subjects, placed = self.readings[row].subjects, self._to_place(row)
            given = [regions.get(key) for key, subject in zip(keys(subjects), subjects, strict=True) if subject in placed]
            fitting = [region for region in given if region is not None and region.shape == self.latent_size]
            if not fitting or len(fitting) < len(given):
                return False
            found[row] = torch.stack(fitting)
        self._decided = found
        return True

    def names_only(self, wanted: Collection[SubjectKey]) -> bool:
        """Whether each picture's text names exactly these subjects, by `words.keys`."""
        return all(set(keys(self.readings[row].subjects)) == set(wanted) for row in self.picture_rows)

    def keep(self, before: PictureLayout) -> None:
        """Keep the layouts of the previous text if it names the same things: the prompt may change while drawing."""
        rows, others = self.picture_rows, before.picture_rows
        if self.latent_size != before.latent_size or len(rows) != len(others):
            return
        for row, other in zip(rows, others, strict=True):
            if other in before._decided and self._named(row) == before._named(other):
                self._decided[row] = before._decided[other]
                if other in before._maps:
                    self._maps[row] = before._maps[other]

    def _named(self, row: int) -> list[str]:
        return [subject.name for subject in self.readings[row].subjects]

    @property
    def unplaced(self) -> list[str]:
        """The subjects that should have their own place, and that nothing was decided about."""
        rows = [row for row in self.picture_rows if row not in self._decided]
        return list(dict.fromkeys(subject.name for row in rows for subject in self._to_place(row)))

    def crowded(self, acting: Sequence[bool]) -> list[str]:
        """Warnings if several of the acting experts, [N], have one place.

        They then share words, or have the same given region.
        """
        warned = []
        for row in self.picture_rows:
            subjects = [subject for subject in self.readings[row].subjects if any(acting[k] for k in subject.experts)]
            for subject in subjects:
                place = given_region(subject, self.bound)
                own = [self.names[k] for k in subject.experts if acting[k] and (self.bound[k].given or place) == place]
                if len(own) > 1:
                    warned.append(
                        f"{_listed(own)} share the words {subject.name!r} and a place: their strengths add up there"
                    )
            given = [
                (subject.name, region) for subject in subjects if (region := given_region(subject, self.bound)) is not None
            ]
            for i, (_, region) in enumerate(given):
                same = [name for name, other in given if other == region]
                if len(same) > 1 and region not in [other for _, other in given[:i]]:
                    warned.append(f"{_listed(same)} were given the same region: they are drawn there one over the other")
        return list(dict.fromkeys(warned))

    def lost_regions(self, acting: Sequence[bool]) -> list[str]:
        """Warnings of the given regions of acting experts, [N], that cannot act."""
        given = [(n, b.given) for n, b, on in zip(self.names, self.bound, acting, strict=True) if on and b.given is not None]
        if self.latent_size is None:
            return [
                f"the region of {name!r} does not act: where tokens of this model's pictures are is not known"
                for name, _ in given
            ]
        empty = [name for name, region in given if not region_mask(region, *self.latent_size).any()]
        return [f"expert {name!r} acts nowhere: its region is empty" for name in empty]

    def _to_place(self, row: int) -> list[Subject]:
        """The subjects of a row's text that get a place from attention.

        These are the subjects without a given region, if there are several subjects, and at least one has an expert.
        """
        subjects = self.readings[row].subjects
        free = [subject for subject in subjects if given_region(subject, self.bound) is None]
        wanted = len(subjects) > 1 and any(subject.experts for subject in free)
        return free[: layout.MOST_SUBJECTS] if wanted else []

    # ---- what it gives

    def expert_masks(self) -> torch.Tensor | None:
        """[B, N, H, W] in 0..1: where each expert acts; None if all act everywhere."""
        given = {k: b.given for k, b in enumerate(self.bound) if b.given is not None}
        if self.latent_size is None or not (given or any(regions is not None for regions in self._decided.values())):
            return None
        rows = []
        for row in self.prompt_of or [0]:
            mask = torch.ones(len(self.bound), *self.latent_size)
            for k, region in given.items():
                mask[k] = region_mask(region, *self.latent_size)
            found: dict[int, torch.Tensor] = {}
            for subject, place in self._with_places(row):
                for k in (*subject.experts, *subject.attribute_adapters):
                    found[k] = torch.maximum(found[k], place) if k in found else place
            for k, place in found.items():
                if k not in given:
                    mask[k] = place
            rows.append(mask)
        return torch.stack(rows)

    def masked_words(self, latent_size: GridSize) -> torch.Tensor:
        """[B, T, S] in 0..1: how much each word is closed to each place of a layer. Unconditional rows close nothing.

        A word is open at the places of all subjects that it names.
        """
        closed = torch.zeros(len(self.readings), latent_size[0] * latent_size[1], len(self.readings[0].own[0]))
        for row, prompt in enumerate(self.prompt_of):
            if self._is_prompt[row] and (located := self._with_places(prompt)):
                inside = F.adaptive_avg_pool2d(torch.stack([region for _, region in located])[None], latent_size)[0].flatten(
                    1
                )
                own = torch.tensor([subject.tokens for subject, _ in located], dtype=torch.float32)  # [K, S]
                closed[row] = own.amax(0) - (inside[:, :, None] * own[:, None]).amax(0)
        return closed

    def _with_places(self, row: int) -> list[tuple[Subject, torch.Tensor]]:
        """The subjects of a row that have a region, decided or given."""
        regions = self._decided.get(row)
        found = [] if regions is None else list(zip(self._to_place(row), regions, strict=True))
        there = [subject for subject, _ in found]
        for subject in self.readings[row].subjects if self.readings else ():
            if (
                subject not in there
                and self.latent_size is not None
                and (region := given_region(subject, self.bound)) is not None
            ):
                found.append((subject, region_mask(region, *self.latent_size)))
        return found

    def layouts(self) -> list[Layout]:
        """The layout of each picture, in their order."""
        found = []
        for row in self.picture_rows:
            regions = self._by_label(self._with_places(row))
            for name, bound in zip(self.names, self.bound, strict=True):
                if self.latent_size is not None and bound.given is not None:
                    regions.setdefault(name, region_mask(bound.given, *self.latent_size))
            read = zip(self._to_place(row), self._maps.get(row, ()), strict=False)
            found.append(Layout(regions, {label: map_.cpu() for label, map_ in self._by_label(read).items()}))
        return found

    def _by_label(self, found: Iterable[tuple[Subject, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Regions or maps by the experts' names (of all subjects of an expert together), or by the noun.

        A noun is marked if an expert has the same name.
        """
        by_label: dict[str, torch.Tensor] = {}
        for subject, place in found:
            for label in [self.names[k] for k in subject.experts] or [self._label(subject)]:
                by_label[label] = torch.maximum(by_label[label], place) if label in by_label else place
        return by_label

    def _label(self, noun: Subject) -> str:
        return f"{noun.name} (no LoRA)" if noun.name in self.names else noun.name


def _listed(names: Sequence[str]) -> str:
    return " and ".join(map(repr, names))


def regions_of_subjects(
    reading: Reading | Sentence,
    free: Sequence[Subject | Mention],
    maps: torch.Tensor | None,
    bound: Sequence[Bound],
    latent_size: GridSize,
) -> tuple[torch.Tensor, float]:
    """Regions [K, H, W] for the subjects of a text without a given one, and how certain they are.

    See `layout.assigned_regions`.

    Args:
        maps: [K, h, w], what the words of each attend to; None for regions in the order of `free`.
    """
    subjects: Sequence[Subject | Mention] = reading.subjects
    given = [given_region(subject, bound) for subject in subjects]
    taken = [region_mask(region, *latent_size) for region in given if region is not None]
    index = {subjects.index(subject): i for i, subject in enumerate(free)}
    relations = [(index[a], index[b], axis) for a, b, axis in reading.relations if a in index and b in index]
    if maps is None:
        maps = layout.partition(len(free), *latent_size, [axis for _, _, axis in relations])[: len(free)]
    return layout.assigned_regions(maps, *latent_size, relations, taken=taken)


def _attended(share: torch.Tensor, words: Sequence[Marks], latent_size: GridSize) -> torch.Tensor:
    """The attention to some words each, scaled from 0 at the lowest place to 1: share [T, S] -> [K, h, w]."""
    own = onto(torch.tensor(words, dtype=torch.float32), share.device)  # [K, S]
    maps = (own / own.sum(1, keepdim=True)) @ share.float().T  # [K, T]
    low, high = maps.amin(1, keepdim=True), maps.amax(1, keepdim=True)
    return ((maps - low) / (high - low).clamp_min(1e-12)).reshape(-1, *latent_size)


def layer_sizes(latent_size: GridSize | None) -> Iterator[GridSize]:
    """Height and width of the latents, and after each halving."""
    while latent_size is not None:
        yield latent_size
        latent_size = (-(-latent_size[0] // 2), -(-latent_size[1] // 2)) if max(latent_size) > 1 else None


def layer_size(tokens: int, latent_size: GridSize | None) -> GridSize | None:
    """Height and width of a layer with this many tokens, in a picture whose latents have this side. None: it has others."""
    return next(((height, width) for height, width in layer_sizes(latent_size) if height * width == tokens), None)
