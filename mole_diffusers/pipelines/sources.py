"""What the arguments of diffusers' loading calls name, here or on the hub: a LoRA, a saved pipeline, its mixture."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from diffusers.loaders import FluxLoraLoaderMixin
from huggingface_hub import hf_hub_download, list_repo_files, snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
)

from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.metadata import PEFT_CONFIG, PEFT_FILE
from mole_diffusers.lora.writing import save_atomically
from mole_diffusers.safe_files import read_header
from mole_diffusers.whole_files import whole_folder

KEPT = "mole"  # folder of a saved pipeline that holds its mixture
# Parts of the names of norms in Control LoRAs, and the layer that reads the channels
NORMS = (*FluxLoraLoaderMixin._control_lora_supported_norm_keys, "query_norm.scale", "key_norm.scale")
CHANNELS = re.compile(r"(?:^|[._])(?:x_embedder|img_in)\.(?:lora_A|lora_down)\b.*weight$")
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token", "proxies")


def read_lora(source: Any, name: str | None, **options: Any) -> Expert:
    """The LoRA that these diffusers arguments name."""
    if isinstance(source, Expert):
        return source
    if not isinstance(source, Mapping):
        return read_expert(_lora_file(source, **options), name)
    with TemporaryDirectory() as folder:
        save_atomically(
            {key: tensor.contiguous() for key, tensor in source.items()}, file := Path(folder, "dict.safetensors"), {}
        )
        return replace(read_expert(file, name), source="a state dict")


class ControlLora(NamedTuple):
    """A Control LoRA of Flux: it also has norms, or reads another number of channels than the model.

    Attributes:
        source: a file or a state dict.
        widens: whether it reads more of them.
    """

    source: Any
    widens: bool


def control_lora(source: Any, transformer: Any, **options: Any) -> ControlLora | None:
    """The Control LoRA that these diffusers arguments name, if it is one for this transformer."""
    if isinstance(source, Expert):
        return None
    if isinstance(source, Mapping):
        shapes = {key: tuple(tensor.shape) for key, tensor in source.items()}
    else:
        source = str(_lora_file(source, **options))
        shapes = read_header(source)[0]
    norms = [key for key in shapes if "lora" not in key and any(norm in key for norm in NORMS)]
    widths = {shape[1] for key, shape in shapes.items() if CHANNELS.search(key)}
    if not norms and widths <= {transformer.x_embedder.in_features}:
        return None
    return ControlLora(source, max(widths, default=0) > transformer.x_embedder.in_features)


def _lora_file(source: str | Path, *, weight_name: str | None = None, **hub: Any) -> Path:
    """The file that these diffusers arguments name: a file, one inside a folder, or one fetched from the hub."""
    path, name = Path(source), weight_name or "pytorch_lora_weights.safetensors"
    if path.is_file() or path.suffix == ".safetensors":
        return path
    if path.is_dir():
        folder = path / (hub.get("subfolder") or "")
        if weight_name is None and not (folder / name).exists():
            others = sorted(file for file in folder.glob("*.safetensors"))
            if len(others) != 1:
                raise FileNotFoundError(f"{folder} has {len(others)} LoRA files and none called {name}; give a weight_name")
            return others[0]
        return folder / name
    try:
        try:
            file = Path(hf_hub_download(str(source), name, **hub))
        except RemoteEntryNotFoundError:
            if weight_name is not None:
                raise
            file = Path(hf_hub_download(str(source), _only_file(str(source), **hub), **hub))
        if file.name == PEFT_FILE:
            with suppress(RemoteEntryNotFoundError):
                hf_hub_download(str(source), PEFT_CONFIG, **hub)  # next to it, where `read_expert` finds it
        return file
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source} is no file, no folder and no hub repository that can be reached") from error


def _only_file(repo: str, *, subfolder: str | None = None, revision: str | None = None, token: Any = None, **_: Any) -> str:
    """The name of the only LoRA file in a folder of a hub repository."""
    paths = map(PurePosixPath, list_repo_files(repo, revision=revision, token=token))
    names = [path.name for path in paths if path.parent == PurePosixPath(subfolder or "") and path.suffix == ".safetensors"]
    if len(names) != 1:
        raise FileNotFoundError(f"{repo} has {len(names)} LoRA files; give a weight_name of {sorted(names)}")
    return names[0]


def saved_pipeline(name: str | Path) -> str:
    """The folder of a saved pipeline; any other name as it is, for the hub."""
    folder = whole_folder(Path(name))
    return str(folder if folder.is_dir() else name)


def kept_folder(source: str, **hub: Any) -> Path | None:
    """The folder with the mixture of a saved pipeline, here or on the hub; None if it has none."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(source, allow_patterns=[f"{KEPT}/*"], **hub))
    return folder / KEPT if (folder / KEPT).is_dir() else None
