"""Gates on disk: safetensors and a JSON config with named experts and gate locations, checked strictly in both
directions.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mole_diffusers.gates import GATE_TYPES, GateBank, GateConfig
from mole_diffusers.lora import Expert
from mole_diffusers.lora.writing import save_atomically
from mole_diffusers.safe_files import RefusedFileError, parse_json, read_json, read_safetensors
from mole_diffusers.whole_files import check_no_file, write_text

VERSION = 1
GATE_WEIGHTS, GATE_CONFIG = "gates.safetensors", "config.json"


class UnfitGatesError(RefusedFileError):
    """Gates that the experts or the pipeline given are not the right ones for."""


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a gates folder."""

    folder: Path
    config: GateConfig
    experts: dict[str, dict[str, str]]  # name -> {"sha256", "base"}, in the order of the gates' columns
    tensors: dict[str, torch.Tensor]

    def order(self, experts: Mapping[str, Expert]) -> list[str]:
        """The experts' names in the gates' order; UnfitGatesError if the two sets differ.

        Gates without parameters for single experts take any experts, in the order given. Files are matched by their
        hashes, whatever they are called here. A file with an unknown hash is matched by name.
        """
        if not self.config.options.of_experts:
            return list(experts)
        by_hash = {expert.sha256: name for name, expert in experts.items()}
        columns = [about["sha256"] for about in self.experts.values()]
        if len(by_hash) == len(experts) == len(columns) and set(by_hash) == set(columns):
            return [by_hash[sha256] for sha256 in columns]
        if set(experts) != set(self.experts):
            raise UnfitGatesError(
                f"the gates in {self.folder} weigh {sorted(self.experts)}, but the experts given are {sorted(experts)}"
            )
        for name, expert in experts.items():
            if expert.sha256 != self.experts[name]["sha256"]:
                if expert.sha256 in columns:
                    known = next(other for other, about in self.experts.items() if about["sha256"] == expert.sha256)
                    raise UnfitGatesError(f"the gates in {self.folder} know the file of expert {name!r} as {known!r}")
                warnings.warn(
                    f"expert {name!r} is not the file that the gates in {self.folder} were trained with", stacklevel=3
                )
        return list(self.experts)

    def fill(self, banks: Mapping[str, GateBank]) -> None:
        """Copy the weights into `banks`; UnfitGatesError naming the gate locations or shapes that differ.

        Gates without parameters for single experts may hold gate locations that none of the present experts has; these are
        skipped. They may also lack gate locations, if they were trained with experts of fewer layers. All experts have equal
        weight there, and a warning says so.
        """
        wanted = {f"{part}.{k}": v for part, bank in banks.items() for k, v in bank.state_dict().items()}
        if missing := sorted(set(wanted) - set(self.tensors)):
            lack = f"the gates in {self.folder} lack {missing[0]!r} and {len(missing) - 1} more"
            if self.config.options.of_experts or len(missing) == len(wanted):
                raise UnfitGatesError(lack)
            warnings.warn(f"{lack}: experts weigh alike there", stacklevel=3)
            wanted = {name: tensor for name, tensor in wanted.items() if name in self.tensors}
        if self.config.options.of_experts and (foreign := sorted(set(self.tensors) - set(wanted))):
            raise UnfitGatesError(
                f"the gates in {self.folder} hold {foreign[0]!r}, which this pipeline and experts do not have"
            )
        for name, own in wanted.items():
            tensor = self.tensors[name]
            if tensor.shape != own.shape:
                shapes = f"{list(tensor.shape)}, expected {list(own.shape)}"
                raise UnfitGatesError(f"the gates in {self.folder}: {name!r} has shape {shapes}")
            own.copy_(tensor)


def save_gates(
    folder: str | Path,
    banks: Mapping[str, GateBank],
    config: GateConfig,
    *,
    experts: Mapping[str, Expert],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the folder that `load_gates` reads.

    The weights' file repeats the contents of config.json, so gates and config match even if a write was interrupted.
    """
    check_no_file(folder := Path(folder))
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"{part}.{k}": v.to(dtype).contiguous() for part, bank in banks.items() for k, v in bank.state_dict().items()}
    named = {name: {"sha256": e.sha256, "base": e.base} for name, e in experts.items()}
    about = {"format": "mole_diffusers.gates", "version": VERSION, "gates": config.to_dict(), "experts": named}
    save_atomically(tensors, folder / GATE_WEIGHTS, {GATE_CONFIG: json.dumps(about)})
    write_text(folder / GATE_CONFIG, json.dumps(about, indent=1) + "\n")


def load_gates(source: str | Path) -> Checkpoint:
    """Read a gates folder, or fetch it from the hub if there is no such folder.

    Raises:
        FileNotFoundError: neither a folder here nor a hub id that can be reached.
        RefusedFileError: a file that `safe_files` refuses, values that are not finite, another format, a newer version.
    """
    folder = Path(source) if Path(source).is_dir() else _from_hub(str(source))
    for name in (GATE_CONFIG, GATE_WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a gates folder: it has no {name}")
    about, contents = read_json(folder / GATE_CONFIG), read_safetensors(folder / GATE_WEIGHTS)
    found = _about(folder, about)
    if (
        GATE_CONFIG in contents.metadata
        and (own := parse_json(contents.metadata[GATE_CONFIG], str(folder / GATE_WEIGHTS))) != about
    ):
        warnings.warn(f"{folder}: {GATE_CONFIG} is not what {GATE_WEIGHTS} was saved with, which counts", stacklevel=2)
        found = _about(folder, own)
    for name, tensor in contents.tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor.float()).all():
            raise RefusedFileError(f"the gates in {folder}: {name!r} holds values that are not finite numbers")
    return Checkpoint(folder, *found, contents.tensors)


def _about(folder: Path, about: Any) -> tuple[GateConfig, dict[str, dict[str, str]]]:
    """The contents of config.json: the gates' config, and the experts in the order of the columns."""
    if not isinstance(about, dict) or about.get("format") != "mole_diffusers.gates" or about.get("version") != VERSION:
        found = "of another kind" if not isinstance(about, dict) else f"{about.get('format')} version {about.get('version')}"
        raise RefusedFileError(
            f"the gates in {folder} are {found}; this release reads mole_diffusers.gates version {VERSION}"
        )
    try:
        experts = {name: {"sha256": str(e["sha256"]), "base": str(e["base"])} for name, e in about["experts"].items()}
        return GateConfig.from_dict(about["gates"]), experts
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RefusedFileError(f"the gates in {folder}: config.json is not complete: {error!r}") from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    nothing = f"{name!r} is no gate type, no folder here and no hub repository that can be reached"
    if "/" not in name:
        raise FileNotFoundError(f"{nothing}; gate types: {', '.join(GATE_TYPES)}")
    try:
        return Path(snapshot_download(name, allow_patterns=[GATE_WEIGHTS, GATE_CONFIG]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{nothing}; gate types: {', '.join(GATE_TYPES)}") from error
