"""LoRA files and trained gates by name: the one place where a name from outside becomes a path."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import cache
from itertools import product
from pathlib import Path

import torch

from mole_app.studio.model_folders import SAVED
from mole_app.studio.names import is_text, known_names, matching, matching_lora
from mole_diffusers.gates import GATE_CONFIG, GATE_TYPES, GATE_WEIGHTS, load_gates
from mole_diffusers.lora import Expert, LoraWeights, base_of, parse_key, preferred_weight, read_expert
from mole_diffusers.safe_files import read_header

UNTRAINED = tuple(name for name, gate_type in GATE_TYPES.items() if not gate_type.learns)
OTHERS = {  # kind of file -> what people call one
    "embedding": "embedding", "upscaler": "upscaler", "controlnet": "ControlNet", "ip_adapter": "IP-Adapter",
    "clip_vision": "image encoder",
}  # fmt: skip
PREVIEWS = (".png", ".jpg", ".jpeg", ".webp")  # suffixes of preview pictures next to LoRA files
FEWEST, MOST_BYTES = 8, 2 << 30  # LoRAs that are always cached, such as those of one picture; bytes of all that are


class Catalog:
    """The LoRAs and gates that can be used by name. LoRA files are read on first use, then cached within limits.

    Threads may share it: `loras` and `gates` are replaced, never changed in place, so you can iterate over them meanwhile.

    Attributes:
        loras: name -> file.
        gates: name -> folder of trained gates.
        examples: names of gates that are used only if you name them. "auto" never picks them, even for LoRAs that they fit.
        files: kind of the others, see `model_folders.KINDS` -> name -> file.
    """

    def __init__(
        self,
        loras: Mapping[str, Path],
        gates: Mapping[str, Path],
        *,
        examples: Iterable[str] = (),
        files: Mapping[str, Mapping[str, Path]] | None = None,
    ):
        self.loras, self.gates, self.examples = dict(loras), dict(gates), set(examples)
        self.files = {kind: dict((files or {}).get(kind, {})) for kind in OTHERS}
        self._keeping, self._experts = threading.Lock(), dict[str, Expert]()  # the one that was used last is the last
        self._family_of, self._hash_of = cache(family_of_file), cache(file_hash)
        self._trained: dict[str, dict[str, str]] = {}

    # ---- LoRAs

    def expert(self, name: str, *, keep: bool = True) -> Expert:
        """A LoRA by name, in any case. Raises ValueError for an unknown name, and what `read_expert` raises.

        Args:
            keep: whether a file that is read now is cached.
        """
        name = self.name(name)
        expert = self._experts.get(name) or read_expert(self.loras[name], name)
        if keep:
            self._keep(name, expert)
        return expert

    def _keep(self, name: str, expert: Expert) -> None:
        """Cache a LoRA. If they become too many, those that were used longest ago go."""
        with self._keeping:
            is_new = self._experts.pop(name, None) is None
            self._experts[name] = expert  # the last
            while is_new and len(self._experts) > FEWEST and sum(map(_bytes, self._experts.values())) > MOST_BYTES:
                del self._experts[next(iter(self._experts))]

    def name(self, name: str) -> str:
        """The catalog's name of a LoRA, given in any case and with _ for spaces. Raises ValueError if it is unknown."""
        found = matching_lora(name, self.loras)
        if found is None:
            raise ValueError(f"there is no LoRA {name!r}; {known_names(name, self.loras)}")
        return found

    def family(self, name: str) -> str:
        """The model family that a LoRA is made for, like `Expert.base`.

        It reads only the file's header, so hundreds of files take seconds.

        Raises ValueError for an unknown name, and what `read_header` raises.
        """
        name = self.name(name)
        known = self._experts.get(name)
        return self._family_of(self.loras[name]) if known is None else known.base

    def preferred_weight(self, name: str) -> float | None:
        """The strength at which the notes beside a LoRA say it is used; None if they do not, or for an unknown name."""
        found = matching_lora(name, self.loras)
        return None if found is None else preferred_weight(self.loras[found])

    def add_lora(self, name: str, path: Path, expert: Expert | None = None) -> None:
        """Add a file. It is read at once, and refused if it is not a good LoRA or the name is taken.

        Args:
            expert: what is in the file, if it was read already.
        """
        expert = expert or read_expert(path, name)
        if name in self.loras:
            raise ValueError(f"there is already a LoRA {name!r}")
        self._keep(name, expert)
        self.loras = self.loras | {name: path}

    def find_loras(self, folders: Iterable[Path]) -> list[str]:
        """Add the LoRA files of folders that are not here yet.

        Returns their names, with as much of the folder as tells them apart.
        """
        added: dict[str, Path] = {}
        known = {file.absolute() for file in self.loras.values()}
        for path in sorted(path for folder in set(folders) for path in folder.glob("[!.]*.safetensors")):
            if path.absolute() not in known and is_text(path.name):
                short, whole = (path.stem, f"{path.parent.name}/{path.stem}"), path.absolute().with_suffix("").as_posix()
                added[next((name for name in short if matching(name, self.loras | added) is None), whole)] = path
        self.loras = self.loras | added
        return list(added)

    def local_name(self, name: str, sha256: str) -> str:
        """The name of a recipe's LoRA in this catalog, found by its hash, or by its name if the recipe has no hash.

        A hash may be cut to its first digits, as other tools write it, and be of the whole file, as in Forge. Raises
        ValueError if the LoRA is not here.
        """
        if not sha256:
            return self.name(name)
        tries = sorted(product((False, True), self.loras), key=lambda each: each[1].casefold() != name.casefold())
        hits = (n for whole, n in tries if self._hash(n, whole=whole).startswith(sha256.lower()))
        if (found := next(hits, None)) is None:
            here = matching_lora(name, self.loras)
            known = known_names(name, self.loras) if here is None else f"{here!r} has {self._hash(here)[:12]}"
            raise ValueError(f"the LoRA {name!r} with hash {sha256[:12]} is not here; {known}")
        return found

    def found(self, kind: str, name: str, sha256: str) -> tuple[str, str]:
        """The name here of a file of a kind of `files`, given in any case, and the hash of its tensors; "" for "".

        Raises ValueError if it is unknown, or not the file with this hash; "" is any.
        """
        known, what = self.files[kind], OTHERS[kind]
        if not name:
            return "", ""
        if (here := matching(name, known)) is None:
            raise ValueError(f"there is no {what} {name!r}; {known_names(name, known)}")
        if sha256 not in ("", own := self._hash_of(known[here], whole=False)):
            raise ValueError(f"the {what} {here!r} here is another file than the recipe's")
        return here, own

    def _hash(self, name: str, *, whole: bool = False) -> str:
        """The hash of a LoRA's tensors or of its whole file."""
        known = None if whole else self._experts.get(name)
        return self._hash_of(self.loras[name], whole=whole) if known is None else known.sha256

    # ---- gates

    def gates_source(self, name: str) -> str | Path:
        """The `gates` argument of `attach` for the name of a gate type or of trained gates; ValueError for an unknown
        name.
        """
        if name in UNTRAINED:
            return name
        if name not in self.gates:
            raise ValueError(f"there are no gates {name!r}; known: {', '.join((*UNTRAINED, *self.gates))}")
        return self.gates[name]

    def gates_for(self, experts: Iterable[str], *, unfit: Collection[str] = ()) -> str:
        """The first gates trained with exactly these files, else with LoRAs of these names, else "sum".

        Examples are never taken. Gates that cannot be read are skipped with a warning.

        Args:
            unfit: hashes of gates that are passed over.
        """
        wanted = {name: self.expert(name).sha256 for name in experts}
        trained = {g: hashes for g in self.gates if g not in self.examples and (hashes := self._trained_with(g))}
        same_files = [g for g, hashes in trained.items() if set(hashes.values()) == set(wanted.values())]
        same_names = [g for g, hashes in trained.items() if set(hashes) == set(wanted)]
        fitting = (g for g in same_files + same_names if not unfit or gates_hash(self.gates[g]) not in unfit)
        return next(fitting, "sum")

    def other_files(self, gates: str, experts: Iterable[str]) -> list[str]:
        """The LoRAs whose file is not the one that the gates were trained with."""
        if gates not in self.gates:
            return []
        saved = load_gates(self.gates[gates])
        known = saved.experts if saved.config.options.of_experts else {}
        return [name for name in experts if name in known and known[name]["sha256"] != self.expert(name).sha256]

    def add_gates(self, name: str, folder: Path) -> None:
        """Add trained gates, replacing any of the same name. Raises ValueError if the name is a gate type's."""
        if name in GATE_TYPES:
            raise ValueError(f"{name!r} is the name of a gate type; choose another")
        self.examples.discard(name)
        self._trained.pop(name, None)
        self.gates = self.gates | {name: folder}

    def _trained_with(self, name: str) -> dict[str, str]:
        """{LoRA that gates were trained with: its hash}, read once; {} and a warning for gates that cannot be read."""
        if name not in self._trained:
            try:
                experts = load_gates(self.gates[name]).experts
            except (ValueError, OSError) as error:
                warnings.warn(f"the gates {name!r} are passed over: {error}", stacklevel=3)
                experts = {}
            self._trained[name] = {expert: about["sha256"] for expert, about in experts.items()}
        return self._trained[name]


def _bytes(expert: Expert) -> int:
    return sum(w.down.nbytes + w.up.nbytes for layers in expert.layers.values() for w in layers.values())


def preview(path: Path) -> Path | None:
    """The preview next to a LoRA file, as A1111, Forge and ComfyUI write them ("fox.preview.png", "fox.png"), or None."""
    names = (path.with_suffix(f"{middle}{end}") for end in PREVIEWS for middle in (".preview", ""))
    return next((name for name in names if name.is_file()), None)


def family_of_file(path: Path) -> str:
    """The model family of a LoRA file, as `read_expert` finds it, but from the header. Raises what `read_header` raises."""
    shapes, metadata = read_header(path)
    halves: dict[tuple[str, str], dict[str, torch.Tensor]] = {}
    for name, shape in shapes.items():
        try:
            key = parse_key(name)
        except ValueError:  # `read_expert` reports it
            continue
        halves.setdefault((key.component, key.layer), {})[key.role] = torch.empty(shape, device="meta")
    layers: dict[str, dict[str, LoraWeights]] = {}
    for (component, layer), roles in halves.items():
        for down, up in (("down", "up"), ("hada_w1_b", "hada_w1_a")):
            if roles.keys() >= {down, up}:
                layers.setdefault(component, {})[layer] = LoraWeights(roles[down], roles[up], 1.0)
    return base_of(layers, metadata)


def file_hash(path: Path, *, whole: bool = False) -> str:
    """sha256 of the bytes after a safetensors file's header, the same as `Expert.sha256`; "" if there is no such file.

    Args:
        whole: of all bytes.
    """
    path = path / SAVED if path.is_dir() else path
    if not path.is_file():  # a broken link
        return ""
    digest, size = hashlib.sha256(), path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > size:
            return ""
        file.seek(0 if whole else start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def folder_gates(folder: str | Path) -> dict[str, Path]:
    """{name: folder} of the gates saved in a folder. If replacing gates was interrupted, the old ones are found."""
    configs = sorted(Path(folder).glob(f"[!.]*/{GATE_CONFIG}"))
    aside = {path.name[1:-4]: path for path in sorted(Path(folder).glob(".*.old")) if (path / GATE_CONFIG).is_file()}
    found = aside | {config.parent.name: config.parent for config in configs}
    return {name: path for name, path in found.items() if is_text(name)}


def gates_hash(folder: Path) -> str:
    """sha256 of the gates' weights file."""
    return hashlib.sha256((folder / GATE_WEIGHTS).read_bytes()).hexdigest()
