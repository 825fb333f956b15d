"""LoraLibrary: an indexed folder of LoRAs that finds the ones a prompt asks for."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from mole_diffusers.binding.finding import Match, Phrase, Phrases, Tokens
from mole_diffusers.lora import Expert
from mole_diffusers.lora.families import fits
from mole_diffusers.lora.metadata import as_read
from mole_diffusers.retrieval import store
from mole_diffusers.retrieval.encoders import Encoder, phrases
from mole_diffusers.retrieval.modes import THRESHOLD
from mole_diffusers.retrieval.store import LibraryEntry, read_entry, stamps


@dataclass(frozen=True)
class RetrievedLora:
    """A LoRA that a prompt asks for.

    Attributes:
        name: of its library entry.
        score: cosine of the LoRA's mean sample and the most similar phrase of the prompt, -1..1.
        phrase: that phrase.
        trigger: the trigger word in the prompt; None if only the score decided.
        passed_over: LoRAs that share a trigger in the prompt with it, are less similar to the prompt, and were not found
            otherwise.
    """

    name: str
    score: float
    phrase: str
    trigger: str | None = None
    passed_over: tuple[str, ...] = ()

    @property
    def why(self) -> str:
        """The reason in words, and the LoRAs that it was preferred to."""
        if self.trigger is not None:
            others = f"; passed over, less like the prompt: {', '.join(self.passed_over)}" if self.passed_over else ""
            return f"the prompt says its trigger {self.trigger!r}{others}"
        return f"{self.phrase!r} is like its samples ({self.score:.2f})"


class LoraLibrary:
    """LoraRetriever's index (Zhao et al., 2024): a mean text embedding per LoRA; triggers come first.

    `LoraLibrary.index(folder, encoder)` creates an index and saves it in the folder. `LoraLibrary.open` reads it.

    Attributes:
        entries: what is known about each LoRA.
        embeddings: [N, D], in the order of `entries`.
        skipped: file -> why it is not an entry.
    """

    def __init__(
        self, folder: str | Path, index: store.Index, encoder: Encoder, *, names: Mapping[str, Sequence[str]] | None = None
    ):
        """`names` (file -> words) select a LoRA as its triggers do."""
        self.folder, self.encoder = Path(folder), encoder
        self.entries, self.embeddings, self.skipped = index.entries, index.embeddings, index.skipped
        self._rows = {entry.name: row for row, entry in enumerate(self.entries)}
        called = names or {}
        self._triggers = [(*as_read(entry.triggers), *called.get(entry.file, ())) for entry in self.entries]
        self._searched = Phrases(self._triggers)

    @classmethod
    def index(cls, folder: str | Path, encoder: Encoder) -> LoraLibrary:
        """Index every LoRA of a folder and its subfolders. Files unchanged since the last time are not read again.

        A file that is not a readable LoRA is left out and named in `skipped`.
        """
        folder = Path(folder)
        index = _build_index(folder, store.lora_files(folder), _known_before(folder, encoder), encoder)
        store.save(folder, index)
        return cls(folder, index, encoder)

    @classmethod
    def open(cls, folder: str | Path, encoder: Encoder) -> LoraLibrary:
        """Read a folder's index. Files that were added or have changed since it was made are read again, each time.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it was made with another encoder, or it fails its checks.
        """
        folder = Path(folder)
        known = _known(store.load(folder, encoder))
        return cls(folder, _build_index(folder, store.lora_files(folder), known, encoder), encoder)

    @classmethod
    def of(cls, files: Mapping[str, Path], encoder: Encoder) -> LoraLibrary:
        """A library in memory: LoRAs from anywhere, under names that also act as triggers. Nothing is written.

        A file with several names, for example through links, is one LoRA under the first name, and all its names select
        it. Entries come from the indexes of the files' folders if there are any.

        Raises ValueError if no file can be read.
        """
        paths: dict[Path, list[str]] = {}
        for name, path in files.items():
            paths.setdefault(Path(path).resolve(), []).append(name)
        root = Path(os.path.commonpath([path.parent for path in paths])) if paths else Path()
        names = {path.relative_to(root).as_posix(): own for path, own in paths.items()}
        around = {folder for path in paths for folder in path.parents if (folder / store.FOLDER).is_dir()}
        known = {
            path.relative_to(root).as_posix(): pair
            for folder in sorted(around, key=lambda folder: len(folder.parts))  # the nearest index wins
            for file, pair in _known_before(folder, encoder).items()
            if (path := folder / file) in paths
        }
        index = _build_index(root, list(names), known, encoder)
        entries = tuple(replace(entry, name=names[entry.file][0]) for entry in index.entries)
        return cls(root, replace(index, entries=entries), encoder, names=names)

    def retrieve(
        self, prompt: str, *, k: int = 3, threshold: float = THRESHOLD, base: str | None = None
    ) -> list[RetrievedLora]:
        """The LoRAs that a prompt asks for: first those whose trigger it contains, in its order, then the most similar.

        A trigger is found as binding finds the words of a LoRA: in upper or lower case, and in the plural.

        If several LoRAs share a trigger, the one most similar to the prompt is selected, and it lists the others as
        passed over. A trigger that more than k LoRAs share ("1girl") selects none. Triggers are then removed from the
        prompt, and each remaining phrase is compared with every LoRA.

        Args:
            k: how many at most, 1 or more. Triggers always count, so a prompt with more than k of them gets them all.
            threshold: lowest cosine for LoRAs without a trigger; higher finds fewer.
            base: the pipeline's family, for example "SDXL". LoRAs known to be for another family are skipped.
        """
        if k < 1:
            raise ValueError(f"k must be 1 or more, got {k}")
        allowed = [base is None or fits(entry.base, base) for entry in self.entries]

        def selects(triggers: Sequence[Phrase]) -> bool:
            return 1 <= len({row for row, _ in triggers if allowed[row]}) <= k

        tokens = Tokens(prompt)
        triggers = self._searched.find(tokens.words, selects)
        found = self._by_trigger(prompt, triggers, allowed)
        free = torch.tensor(allowed)
        free[[self._rows[each.name] for each in found]] = False
        left = phrases(_without(tokens, triggers))
        if left and len(found) < k:
            scores, best = similarity(self.encoder(left), self.embeddings)
            rows = top(scores, free, k - len(found), threshold)
            found += [RetrievedLora(self.entries[i].name, scores[i].item(), left[int(best[i])]) for i in rows]
        names = {each.name for each in found}
        return [replace(each, passed_over=tuple(n for n in each.passed_over if n not in names)) for each in found]

    def _by_trigger(self, prompt: str, triggers: Sequence[Match], allowed: Sequence[bool]) -> list[RetrievedLora]:
        """The LoRA for each trigger, the most similar one if several have it."""
        if not triggers:
            return []
        spoken = phrases(prompt) or [prompt]
        scores, best = similarity(self.encoder(spoken), self.embeddings)
        found: dict[str, RetrievedLora] = {}
        for trigger in triggers:
            called = {row: self._triggers[row][i] for row, i in reversed(trigger.of) if allowed[row]}  # the first of each
            row = max(sorted(called), key=lambda i: scores[i].item())
            name, others = self.entries[row].name, [self.entries[i].name for i in sorted(called) if i != row]
            first = found.get(name) or RetrievedLora(name, scores[row].item(), spoken[int(best[row])], called[row])
            found[name] = replace(first, passed_over=tuple(dict.fromkeys((*first.passed_over, *others))))
        return list(found.values())

    def file_triggers(self, name: str) -> set[str]:
        """The trigger words in a LoRA's file, in the form that `RetrievedLora` uses."""
        return set(as_read(self.entries[self._rows[name]].triggers))

    def expert(self, name: str) -> Expert:
        """Read a LoRA of the library; ValueError if the name is unknown or the file has changed since it was indexed."""
        if name not in self._rows:
            raise ValueError(f"the library {self.folder} has no LoRA {name!r}")
        entry = self.entries[self._rows[name]]
        now, expert = read_entry(self.folder, entry.file)
        if not now.same_content(entry):
            raise store.reindex_error(self.folder, f"is stale: {entry.file!r} has changed")
        return expert


def _without(tokens: Tokens, triggers: Sequence[Match]) -> str:
    """A prompt with a comma for each trigger in it."""
    pieces, at = list[str](), 0
    for match in triggers:  # they may overlap
        begin, end = tokens.span(match.begin, match.end)
        pieces.append(tokens.text[at : max(at, begin)])
        at = end
    return ",".join([*pieces, tokens.text[at:]])


Known = Mapping[str, tuple[LibraryEntry, torch.Tensor]]  # file -> its entry and its embedding [D]


def _build_index(folder: Path, files: Sequence[str], known: Known, encoder: Encoder) -> store.Index:
    """The index of a folder's files; those that are known with the stamps that they have now are not read."""
    entries: list[LibraryEntry] = []
    rows: list[torch.Tensor] = []
    skipped: dict[str, str] = {}
    for file in tqdm(files, desc="LoRAs", delay=2, leave=False):
        if (name := store.shown(file)) != file:
            skipped[name] = "its name is not UTF-8: rename it"
            continue
        before = known.get(file)
        try:
            is_same = before is not None and before[0].stamps == stamps(folder, file)
            entry = before[0] if before and is_same else read_entry(folder, file)[0]
        except (ValueError, OSError) as error:  # such as a broken link
            skipped[file] = str(error)
            continue
        entries.append(replace(entry, file=file))
        rows.append(before[1] if before and before[0].same_content(entry) else embedding(entry.samples, encoder))
    if not entries:
        raise ValueError(f"{folder} holds no LoRA that can be read; {len(skipped)} files were skipped")
    return store.Index(encoder.id, encoder(store.PROBE), tuple(entries), torch.stack(rows), skipped)


def _known(index: store.Index) -> Known:
    return {entry.file: (entry, row) for entry, row in zip(index.entries, index.embeddings, strict=True)}


def _known_before(folder: Path, encoder: Encoder) -> Known:
    """What the folder's present index knows; nothing if it is missing, broken or has another encoder."""
    try:
        return _known(store.load(folder, encoder))
    except (FileNotFoundError, ValueError):
        return {}


def embedding(samples: Sequence[str], encoder: Encoder) -> torch.Tensor:
    """[D]: LoraRetriever's E(phi) over the phrases of a LoRA's samples, split as prompts are.

    Each phrase is weighted by the square of the number of samples that contain it; the paper takes a plain mean. What
    the samples share is what the LoRA is about. What few contain just happened to be in the picture.
    """
    parts = [phrase for sample in samples for phrase in dict.fromkeys(phrases(sample))] or list(samples)
    texts = list(dict.fromkeys(parts))
    return centroid(encoder(texts), torch.tensor([float(parts.count(text) ** 2) for text in texts]))


# ---- the maths: N LoRAs, P phrases, D width of the embedding


def centroid(vectors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """LoraRetriever's E(phi), the mean embedding of a LoRA's samples, at unit length: [P, D] and weights [P] -> [D]."""
    return F.normalize((vectors * weights[:, None]).sum(0) / weights.sum(), dim=0)


def similarity(queries: torch.Tensor, loras: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine of each LoRA with its most similar phrase: [P, D] and [N, D] -> scores [N], index of that phrase [N].

    Each sum runs over one LoRA's row only. So adding LoRAs does not change the other scores by a single bit, unlike in a
    blocked matrix product.
    """
    scores = torch.stack([(loras * query).sum(-1) for query in queries])  # [P, N]
    best = scores.max(0)
    return best.values, best.indices


def top(scores: torch.Tensor, allowed: torch.Tensor, k: int, threshold: float) -> list[int]:
    """Indices of at most k allowed LoRAs that score `threshold` or more, best first; ties keep their order.

    scores [N], allowed [N] bool.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    return order[allowed[order] & (scores[order] >= threshold)][:k].tolist()
