"""LoRA files and gates by name: the one place where a name from outside becomes a path."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from mole_diffusers.gates import FAMILIES, checkpoint
from mole_diffusers.lora import Expert, read_expert

UNTRAINED = ("sum", "mean")  # families that need no training


class Catalog:
    """What can be used by name. Files are read when asked for, and kept."""

    def __init__(self, loras: Mapping[str, Path], gates: Mapping[str, Path]):
        self.loras, self.gates = dict(loras), dict(gates)
        self._read: dict[str, Expert] = {}

    def expert(self, name: str) -> Expert:
        """Raises ValueError for an unknown name, and all that `read_expert` raises."""
        if name not in self.loras:
            raise ValueError(f"there is no LoRA {name!r}; known: {', '.join(self.loras) or 'none'}")
        if name not in self._read:
            self._read[name] = read_expert(self.loras[name], name)
        return self._read[name]

    def add_lora(self, name: str, path: Path) -> Expert:
        """Put a file on the catalog under a name that is free; it is read at once, and refused if it is bad."""
        expert = read_expert(path, name)
        if name in self.loras:
            raise ValueError(f"there is already a LoRA {name!r}")
        self.loras[name], self._read[name] = path, expert
        return expert

    def gates_source(self, name: str) -> str | Path:
        """What `attach` takes for a family's name or that of trained gates."""
        if name in UNTRAINED:
            return name
        if name not in self.gates:
            raise ValueError(f"there are no gates {name!r}; known: {', '.join((*UNTRAINED, *self.gates))}")
        return self.gates[name]

    def gates_for(self, experts: Iterable[str]) -> str:
        """The first trained gates that weigh exactly these files, else LoRAs of these names, else "sum"."""
        wanted = {name: self.expert(name).sha256 for name in experts}
        same = [g for g, found in self._weighed.items() if set(found.values()) == set(wanted.values())]
        named = [g for g, found in self._weighed.items() if set(found) == set(wanted)]
        return next(iter(same + named), "sum")

    def other_files(self, gates: str, experts: Iterable[str]) -> list[str]:
        """LoRAs of these whose file is not the one that the gates were trained with; they act, but not as trained."""
        if gates not in self.gates:
            return []
        found = checkpoint.load(self.gates[gates])
        known = found.experts if found.config.of_experts else {}
        return [name for name in experts if name in known and known[name]["sha256"] != self.expert(name).sha256]

    def add_gates(self, name: str, folder: Path) -> None:
        """Put trained gates on the catalog; a name in use is replaced."""
        if name in FAMILIES:
            raise ValueError(f"{name!r} is the name of a family; choose another")
        self.gates[name] = folder
        self.__dict__.pop("_weighed", None)

    def named(self, name: str, sha256: str) -> str:
        """The name under which a recipe's LoRA is here: by hash, else by name where the recipe has no hash.

        A hash may be the first 10 digits or more, as pictures of other tools hold it. Raises ValueError where it is missing.
        """
        if not sha256:
            self.expert(name)
            return name
        hits = (n for n in sorted(self.loras, key=lambda n: n != name) if self.expert(n).sha256.startswith(sha256.lower()))
        if (found := next(hits, None)) is None:
            raise ValueError(f"the LoRA {name!r} with hash {sha256[:12]} is not here; known: {', '.join(self.loras)}")
        return found

    @cached_property
    def _weighed(self) -> dict[str, dict[str, str]]:
        """Gates -> {LoRA that they weigh: its hash}."""
        loaded = {name: checkpoint.load(folder).experts for name, folder in self.gates.items()}
        return {name: {n: expert["sha256"] for n, expert in experts.items()} for name, experts in loaded.items()}


def folder_loras(folder: str | Path) -> dict[str, Path]:
    """{file stem: path} of the safetensors files below a folder. Raises ValueError where there are none."""
    found = {path.stem: path for path in sorted(Path(folder).rglob("*.safetensors"), reverse=True)}
    if not found:
        raise ValueError(f"no .safetensors files in {folder}")
    return dict(sorted(found.items()))


def folder_gates(folder: str | Path) -> dict[str, Path]:
    """{name: folder} of the gates saved in a folder."""
    return {p.parent.name: p.parent for p in sorted(Path(folder).glob(f"*/{checkpoint.CONFIG}"))}


def gates_hash(folder: Path) -> str:
    """sha256 of the gates' weights as they lie in the file."""
    return hashlib.sha256((folder / checkpoint.WEIGHTS).read_bytes()).hexdigest()
