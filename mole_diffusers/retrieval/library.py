"""LoraLibrary: an indexed folder of LoRAs, and which of them a prompt asks for."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mole_diffusers.lora import Expert
from mole_diffusers.lora.families import FAMILIES
from mole_diffusers.retrieval.encoders import Encoder
from mole_diffusers.retrieval.entries import LibraryEntry, read_entry, stamps
from mole_diffusers.retrieval.phrases import find_triggers, phrases, tokenize
from mole_diffusers.retrieval.ranking import centroid, similarity, top
from mole_diffusers.retrieval.store import FOLDER, PROBE, Index, again, check, check_encoder, files_of, load, save

Known = dict[str, tuple[LibraryEntry, torch.Tensor]]  # file -> its card and embedding
THRESHOLD = 0.7  # the least that finds nothing for the emoji world's validation prompts that ask for nothing


@dataclass(frozen=True)
class RetrievedLora:
    """A LoRA that a prompt asks for.

    Attributes:
        name: the card's.
        score: cosine of the LoRA's mean sample and the phrase of the prompt that is most like it, -1..1.
        phrase: that phrase.
        trigger: the trigger word that the prompt says; None where the score alone decided.
    """

    name: str
    score: float
    phrase: str
    trigger: str | None = None

    @property
    def why(self) -> str:
        """The reason in words."""
        if self.trigger is not None:
            return f"the prompt says its trigger {self.trigger!r}"
        return f"{self.phrase!r} is like its samples ({self.score:.2f})"


class LoraLibrary:
    """LoraRetriever's index (Zhao et al., 2024): a mean text embedding per LoRA, and the triggers before it.

    `LoraLibrary.index(folder, encoder)` makes one and keeps it in the folder, `LoraLibrary.open` reads it.

    Attributes:
        cards: what is known of each LoRA.
        embeddings: [N, D], their rows.
        skipped: file -> why it is not a card.
    """

    def __init__(self, folder: str | Path, index: Index, encoder: Encoder):
        self.folder, self.encoder = Path(folder), encoder
        self.entries, self.embeddings, self.skipped = index.entries, index.embeddings, index.skipped
        self._rows = {card.name: row for row, card in enumerate(self.entries)}
        self._claims: dict[tuple[str, ...], list[int]] = {}  # a trigger's words -> rows of the LoRAs that claim it
        for row, card in enumerate(self.entries):
            for trigger in card.triggers:
                self._claim(trigger, row)

    def _claim(self, trigger: str, row: int) -> None:
        """Have the words of a trigger call the LoRA of a row."""
        if (spoken := tokenize(trigger)) and row not in (rows := self._claims.setdefault(spoken, [])):
            rows.append(row)

    @classmethod
    def index(cls, folder: str | Path, encoder: Encoder) -> LoraLibrary:
        """Index every LoRA of a folder and its subfolders. Those unchanged since the last time are not read again.

        A file that is no readable LoRA is left out and named in `skipped`.
        """
        folder = Path(folder)
        index = _gathered(folder, files_of(folder), _known(folder, encoder), encoder)
        save(folder, index)
        return cls(folder, index, encoder)

    @classmethod
    def open(cls, folder: str | Path, encoder: Encoder) -> LoraLibrary:
        """Read a folder's index.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with another encoder, files have come, gone or changed since, or it cannot be trusted.
        """
        index = load(Path(folder))
        check(Path(folder), index, encoder)
        return cls(folder, index, encoder)

    @classmethod
    def of(cls, files: Mapping[str, Path], encoder: Encoder) -> LoraLibrary:
        """LoRAs from anywhere under names of your own, which call them as triggers do. Nothing is written.

        What the index of a folder that holds a file knows of it is not read again. Raises ValueError where no file can
        be read.
        """
        paths = {Path(path).resolve(): name for name, path in files.items()}
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
        names = {path.relative_to(root).as_posix(): name for path, name in paths.items()}
        known = {
            path.relative_to(root).as_posix(): pair
            for folder in _indexed(paths)
            for file, pair in _known(folder, encoder).items()
            if (path := folder / file) in paths
        }
        index = _gathered(root, list(names), known, encoder)
        cards = tuple(replace(card, name=names[card.file]) for card in index.entries)
        library = cls(root, replace(index, cards=cards), encoder)
        for row, card in enumerate(cards):
            library._claim(card.name, row)
        return library

    def retrieve(
        self,
        prompt: str,
        *,
        k: int = 3,
        threshold: float = THRESHOLD,
        without: Collection[str] = (),
        base: str | None = None,
    ) -> list[RetrievedLora]:
        """The LoRAs that a prompt asks for: first those whose trigger it says, in its order, then the most similar.

        A trigger that several LoRAs claim calls the one most like the prompt; one that more than k claim ("1girl") calls
        none. What triggers name is taken out of the prompt; its phrases that are left are each compared with every LoRA.

        Args:
            k: so many at most, 1 or more; triggers all count, so that a prompt that says more than k gets them all.
            threshold: least cosine of those without a trigger; higher finds fewer.
            without: names that are left out; the next ones take their place.
            base: the pipeline's family, "SDXL" say; LoRAs that are known to be for another one are passed over.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        if unknown := set(without) - set(self._rows):
            raise ValueError(f"unknown LoRAs {sorted(unknown)} in `without`; the library has {len(self.entries)} others")
        others = FAMILIES - {base} if base is not None else ()
        allowed = [card.name not in without and card.base not in others for card in self.entries]
        spoken = tokenize(prompt)
        triggers, rest = find_triggers(spoken, lambda run: 1 <= sum(allowed[i] for i in self._claims.get(run, ())) <= k)
        found = self._called(triggers, phrases(spoken), allowed)
        free = torch.tensor(allowed)
        free[[self._rows[each.name] for each in found]] = False
        return found + self._similar(phrases(rest), free, k=k - len(found), threshold=threshold)

    def expert(self, name: str) -> Expert:
        """Read a LoRA of the library; ValueError for an unknown name, or a file that changed since it was indexed."""
        if name not in self._rows:
            raise ValueError(f"the library {self.folder} has no LoRA {name!r}")
        card = self.entries[self._rows[name]]
        now, expert = read_entry(self.folder, card.file)
        if not now.same(card):
            raise again(self.folder, f"is stale: {card.file!r} has changed")
        return expert

    def _called(
        self, triggers: Sequence[tuple[str, ...]], spoken: list[str], allowed: Sequence[bool]
    ) -> list[RetrievedLora]:
        if not triggers:
            return []
        scores, best = similarity(self.encoder(spoken or [" ".join(triggers[0])]), self.embeddings)
        found: dict[str, RetrievedLora] = {}
        for trigger in triggers:
            row = max((i for i in self._claims[trigger] if allowed[i]), key=lambda i: scores[i].item())
            name = self.entries[row].name
            found.setdefault(name, RetrievedLora(name, scores[row].item(), spoken[int(best[row])], " ".join(trigger)))
        return list(found.values())

    def _similar(self, left: list[str], free: torch.Tensor, *, k: int, threshold: float) -> list[RetrievedLora]:
        if not left or k < 1:
            return []
        scores, best = similarity(self.encoder(left), self.embeddings)
        rows = top(scores, free, k, threshold)
        return [RetrievedLora(self.entries[i].name, scores[i].item(), left[int(best[i])]) for i in rows]


def _gathered(folder: Path, files: Sequence[str], known: Known, encoder: Encoder) -> Index:
    """The index of a folder's files; those that are `known` and have not changed since are not read."""
    cards: list[LibraryEntry] = []
    rows: list[torch.Tensor] = []
    skipped: dict[str, str] = {}
    for file in files:
        try:
            old = known.get(file)
            card, row = old if old and old[0].stamps == stamps(folder, file) else _read(folder, file, encoder)
        except ValueError as error:
            skipped[file] = str(error)
            continue
        cards.append(replace(card, file=file))
        rows.append(row)
    if not cards:
        raise ValueError(f"{folder} holds no LoRA that can be read; {len(skipped)} files were skipped")
    return Index(encoder.id, encoder(PROBE), tuple(cards), torch.stack(rows), skipped)


def _indexed(paths: Collection[Path]) -> list[Path]:
    """The folders around files that have an index, the nearest last."""
    around = {folder for parent in {path.parent for path in paths} for folder in (parent, *parent.parents)}
    return sorted((folder for folder in around if (folder / FOLDER).is_dir()), key=lambda folder: len(folder.parts))


def _known(folder: Path, encoder: Encoder) -> Known:
    """file -> card and embedding of the index that is there, where the same encoder made it."""
    try:
        index = load(folder)
        check_encoder(folder, index, encoder)
    except (FileNotFoundError, ValueError):
        return {}  # it is about to be made anew
    return {card.file: (card, row) for card, row in zip(index.entries, index.embeddings, strict=True)}


def _read(folder: Path, file: str, encoder: Encoder) -> tuple[LibraryEntry, torch.Tensor]:
    card, _ = read_entry(folder, file)
    return card, embedding(card.samples, encoder)


def embedding(samples: Sequence[str], encoder: Encoder) -> torch.Tensor:
    """[D]: LoraRetriever's E(phi) over the phrases of a LoRA's samples, cut as prompts are.

    A phrase counts by the square of how many samples say it, where the paper has a plain mean: what they share is what
    the LoRA is about, what few say is what stood beside it.
    """
    parts = [phrase for sample in samples for phrase in phrases(tokenize(sample))] or list(samples)
    texts = list(dict.fromkeys(parts))
    return centroid(encoder(texts), torch.tensor([float(parts.count(text) ** 2) for text in texts]))
