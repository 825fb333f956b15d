"""Drop-in pipelines: code written for diffusers' LoRA calls works as it is, and gates compose what it loads.

A drop-in saves its mixture beside the pipeline: experts, gates and strengths in one folder, see `keep` and `attach_kept`.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
    StableDiffusionXLControlNetInpaintPipeline,
    StableDiffusionXLControlNetPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
)
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mole_diffusers.binding.config import Bound, from_json, to_json
from mole_diffusers.binding.regions import AUTO
from mole_diffusers.gates import checkpoint
from mole_diffusers.gates.hub import model_card, upload
from mole_diffusers.lora import Expert, read_expert
from mole_diffusers.lora.safe_files import RefusedFileError, read_json
from mole_diffusers.lora.writing import save_expert
from mole_diffusers.mixture import Gates, Mixture, attach, attached, detach

KEPT = "mole"  # folder of a saved pipeline that holds its mixture
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
CUSTOM = """\
\"\"\"For `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`.\"\"\"

from mole_diffusers import {name} as Pipeline# noqa: F401
"""  # one name for every kind: diffusers runs all of a process's files called pipeline.py in one module
VERSION = 1
INDEX, EXPERTS, GATES_FOLDER = "mixture.json", "experts", "gates"
FILE = re.compile(r"[0-9]{1,4}\.safetensors")  # as `keep` names them; a name may hold what no path can


class DropIn:
    """Put before a diffusers pipeline class: `load_lora_weights` adds an expert to a mixture.

    Each expert acts on its own words and in its own place, see `Mixture.bind`. All weigh 1 until
    `load_gates` is called; with `pipe.mixture.bind(None)` they are summed as `set_adapters` does.
    """

    @property
    def mixture(self) -> Mixture | None:
        """The experts and gates loaded so far."""
        return attached(self)

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, **kwargs: Any) -> None:
        """Add a LoRA as expert `adapter_name`, by default "default_0", "default_1", ...

        Trained gates weigh a fixed set of experts, so one more means that all are summed until gates are loaded again.

        Args:
            source: a file, a folder or hub id (with `weight_name`, else pytorch_lora_weights.safetensors), or an Expert.
            kwargs: `weight_name`, and `subfolder`, `revision`, `token`, `cache_dir`, ... for the hub.

        Raises ValueError for a name that is taken, and all that `attach` raises; the mixture stays as it was.
        """
        experts = self._experts()
        free = next(name for i in range(len(experts) + 1) if (name := f"default_{i}") not in experts)
        name = adapter_name or free
        if name in experts:
            raise ValueError(f"adapter name {name!r} is in use; loaded: {list(experts)}")
        expert = source if isinstance(source, Expert) else read_expert(_lora_file(source, **kwargs), name)
        if self.mixture is not None and self.mixture.parameters():
            warnings.warn("the gates do not know the new expert; all experts are summed until load_gates", stacklevel=2)
        attach(self, {**experts, name: (expert, 1.0)}, binding=self._binding())

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """Set the strength of the named experts; those not named get strength 0.

        One number per expert; diffusers' per-block dicts are the gates' business here and raise ValueError.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters but {len(weights)} weights")
        if bad := [w for w in weights if not isinstance(w, int | float | None)]:
            raise ValueError(f"a weight is one number per adapter, got {bad[0]!r}")
        mixture = self._require()
        strengths = {name: 1.0 if w is None else float(w) for name, w in zip(names, weights, strict=True)}
        for name in strengths:
            mixture.strength(name)
        for name in mixture.experts:
            mixture.strength(name, strengths.get(name, 0.0))

    def load_gates(self, gates: Gates) -> None:
        """Weigh the loaded experts by `gates`: a folder, a hub id, a family name or a GateConfig."""
        self._require()
        attach(self, self._experts(), gates, binding=self._binding())

    def get_active_adapters(self) -> list[str]:
        """The experts of a strength other than 0."""
        return [name for name, (_, strength) in self._experts().items() if strength != 0]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Part -> experts that have layers in it."""
        parts: dict[str, list[str]] = {}
        for name, (expert, _) in self._experts().items():
            for part in expert.layers:
                parts.setdefault(part, []).append(name)
        return parts

    def delete_adapters(self, adapter_names: str | list[str]) -> None:
        """Take experts out. Trained gates weigh a fixed set of experts, so those left are summed."""
        gone = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        experts = self._experts()
        if unknown := gone - set(experts):
            raise ValueError(f"unknown adapters {sorted(unknown)}; loaded: {list(experts)}")
        left = {name: expert for name, expert in experts.items() if name not in gone}
        if left:
            binding = self._binding()
            kept = {name: bound for name, bound in binding.items() if name in left} if isinstance(binding, dict) else binding
            attach(self, left, binding=kept)
        else:
            detach(self)

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        """Take all experts and gates out: the original pipeline, bit for bit."""
        detach(self)

    def load_mixture(self, folder: str | Path) -> None:
        """Take the experts, gates and strengths that a saved drop-in pipeline has in its folder `mole`."""
        attach_kept(self, folder)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the pipeline as diffusers reads it, and beside it experts, gates and strengths.

        Any diffusers pipeline of the kind opens the folder without them. Its pipeline.py is what
        `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)` asks for.
        """
        folder, mixture = Path(save_directory), self.mixture
        if mixture is not None:
            keep(mixture, folder / KEPT)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(CUSTOM.format(name=type(self).__name__))
        with nullcontext() if mixture is None else mixture.lifted():
            super().save_pretrained(str(folder), *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """As in diffusers; what `save_pretrained` kept of a mixture is attached."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]
        folder = _kept(pretrained_model_name_or_path, **{k: v for k, v in kwargs.items() if k in HUB})
        if folder is not None:
            pipe.load_mixture(folder)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers, but the shared models keep their precision, where diffusers casts them to float32.

        A mixture on the models is shared with them.

        Raises ValueError where the models are in several precisions and `torch_dtype` does not say which to take.
        """
        if not {"torch_dtype", "dtype"} & set(kwargs):
            dtypes = {model.dtype for model in pipeline.components.values() if hasattr(model, "dtype")}
            if len(dtypes) > 1:
                raise ValueError(f"the models are in {sorted(map(str, dtypes))}; give the torch_dtype to cast them all to")
            kwargs["torch_dtype"] = dtypes.pop()
        return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes, with a model card; `options` are those of `gates.hub.upload`."""
        mixture = self._require()
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            Path(folder, "README.md").write_text(model_card(mixture.weighed(), mixture.config, repo_id, pipeline=True))
            return upload(folder, repo_id, **options)

    def to_json_string(self) -> str:
        """The configuration, under the class name that diffusers knows."""
        config = json.loads(super().to_json_string())  # type: ignore[misc]
        config["_class_name"] = next(kind.__name__ for kind in type(self).__mro__ if not issubclass(kind, DropIn))
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _experts(self) -> dict[str, tuple[Expert, float]]:
        return {} if self.mixture is None else self.mixture.weighed()

    def _binding(self) -> dict[str, Bound] | str | None:
        """How the experts are bound, for attaching them again."""
        return AUTO if self.mixture is None else self.mixture.binding

    def _require(self) -> Mixture:
        if self.mixture is None:
            raise ValueError("no LoRA is loaded; call load_lora_weights first")
        return self.mixture


class MoLEStableDiffusionPipeline(DropIn, StableDiffusionPipeline):
    """`StableDiffusionPipeline` that composes what it loads."""


class MoLEStableDiffusionImg2ImgPipeline(DropIn, StableDiffusionImg2ImgPipeline):
    """`StableDiffusionImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionInpaintPipeline(DropIn, StableDiffusionInpaintPipeline):
    """`StableDiffusionInpaintPipeline` that composes what it loads."""


class MoLEStableDiffusionControlNetPipeline(DropIn, StableDiffusionControlNetPipeline):
    """`StableDiffusionControlNetPipeline` that composes what it loads."""


class MoLEStableDiffusionControlNetImg2ImgPipeline(DropIn, StableDiffusionControlNetImg2ImgPipeline):
    """`StableDiffusionControlNetImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionControlNetInpaintPipeline(DropIn, StableDiffusionControlNetInpaintPipeline):
    """`StableDiffusionControlNetInpaintPipeline` that composes what it loads."""


class MoLEStableDiffusionXLPipeline(DropIn, StableDiffusionXLPipeline):
    """`StableDiffusionXLPipeline` that composes what it loads."""


class MoLEStableDiffusionXLImg2ImgPipeline(DropIn, StableDiffusionXLImg2ImgPipeline):
    """`StableDiffusionXLImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionXLInpaintPipeline(DropIn, StableDiffusionXLInpaintPipeline):
    """`StableDiffusionXLInpaintPipeline` that composes what it loads."""


class MoLEStableDiffusionXLControlNetPipeline(DropIn, StableDiffusionXLControlNetPipeline):
    """`StableDiffusionXLControlNetPipeline` that composes what it loads."""


class MoLEStableDiffusionXLControlNetImg2ImgPipeline(DropIn, StableDiffusionXLControlNetImg2ImgPipeline):
    """`StableDiffusionXLControlNetImg2ImgPipeline` that composes what it loads."""


class MoLEStableDiffusionXLControlNetInpaintPipeline(DropIn, StableDiffusionXLControlNetInpaintPipeline):
    """`StableDiffusionXLControlNetInpaintPipeline` that composes what it loads."""


KINDS = {kind.__bases__[1].__name__: kind for kind in DropIn.__subclasses__()}


class MoLEPipeline:
    """Chooses the drop-in pipeline of the right kind."""

    @staticmethod
    def from_pipe(pipe: Any, **kwargs: Any) -> Any:
        """The drop-in pipeline of `pipe`'s kind over the same models; `kwargs` as in diffusers.

        Raises ValueError for a kind that has none; `attach` takes any.
        """
        return _kind(cls.__name__ for cls in type(pipe).__mro__).from_pipe(pipe, **kwargs)

    @staticmethod
    def from_pretrained(source: str | Path, **kwargs: Any) -> Any:
        """The drop-in pipeline of the kind that lies in a folder or hub repository; `kwargs` as in diffusers."""
        config = DiffusionPipeline.load_config(source, **{k: v for k, v in kwargs.items() if k in HUB})
        return _kind([config["_class_name"]]).from_pretrained(source, **kwargs)


def _kind(names: Iterable[str]) -> Any:
    """The drop-in for the first name that has one."""
    names = list(names)
    for name in names:
        if name in KINDS:
            return KINDS[name]
    raise ValueError(f"{names[0]} has no drop-in pipeline; those that have one: {list(KINDS)}")


def _lora_file(source: str | Path, *, weight_name: str | None = None, **hub: Any) -> Path:
    """The file that diffusers' arguments mean: a file, one inside a folder, or one fetched from the hub."""
    path, name = Path(source), weight_name or "pytorch_lora_weights.safetensors"
    if path.is_file() or path.suffix == ".safetensors":
        return path
    if path.is_dir():
        return path / hub.get("subfolder", "") / name
    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise FileNotFoundError(f"{source} is no file, no folder and no hub repository that can be reached") from error


def _kept(source: str | Path, **hub: Any) -> Path | None:
    """The folder with the mixture of a saved pipeline, here or on the hub; None where it has none."""
    folder = Path(source)
    if not folder.is_dir():
        folder = Path(snapshot_download(str(source), allow_patterns=[f"{KEPT}/*"], **hub))
    return folder / KEPT if (folder / KEPT).is_dir() else None


def keep(mixture: Mixture, folder: str | Path) -> None:
    """Write what `attach_kept` reads: mixture.json, experts/ and gates/.

    An expert's file is copied as it is. One that is in memory alone, or was changed since, is written in fp32.
    """
    folder = Path(folder)
    (folder / EXPERTS).mkdir(parents=True, exist_ok=True)
    kept, rows = {}, []
    for i, (name, (expert, strength)) in enumerate(mixture.weighed().items()):
        file = f"{i}.safetensors"
        kept[name] = _keep_expert(expert, folder / EXPERTS / file)
        rows.append({"name": name, "file": file, "strength": strength})
        if mixture.binding is not None:
            rows[-1]["binding"] = to_json(mixture.binding[name])
    checkpoint.save(folder / GATES_FOLDER, mixture.banks, mixture.config, experts=kept)
    about = {"format": "mole_diffusers.mixture", "version": VERSION, "experts": rows}
    (folder / INDEX).write_text(json.dumps(about, indent=1) + "\n")


def _keep_expert(expert: Expert, path: Path) -> Expert:
    if Path(expert.source).is_file():
        shutil.copyfile(expert.source, path)
        if (copy := read_expert(path, expert.name)).sha256 == expert.sha256:
            return copy
    save_expert(expert, path, dtype=torch.float32)
    return read_expert(path, expert.name)


def attach_kept(pipe: Any, folder: str | Path) -> Mixture:
    """Attach the mixture that `keep` wrote.

    Raises FileNotFoundError or RefusedFileError for what is no such folder, and all that `attach` raises.
    """
    folder = Path(folder)
    experts, binding = _kept_experts(folder)
    return attach(pipe, experts, folder / GATES_FOLDER, binding=binding)


def _kept_experts(folder: Path) -> tuple[dict[str, tuple[str | Path | Expert, float]], dict[str, Bound] | None]:
    """name -> (file, strength), and name -> binding (None where nothing is bound), from mixture.json."""
    if not (folder / INDEX).is_file():
        raise FileNotFoundError(f"{folder} is no kept mixture: it has no {INDEX}")
    about = read_json(folder / INDEX)
    if not isinstance(about, dict) or (about.get("format"), about.get("version")) != ("mole_diffusers.mixture", VERSION):
        raise RefusedFileError(f"{folder / INDEX} is not of format mole_diffusers.mixture, version {VERSION}")
    found: dict[str, tuple[str | Path | Expert, float]] = {}
    binding: dict[str, Bound] = {}
    rows = about.get("experts")
    for row in rows if isinstance(rows, list) and rows else [{}]:
        try:
            name, file, strength = str(row["name"]), row["file"], float(row["strength"])
            if "binding" in row:
                binding[name] = from_json(row["binding"], name)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise RefusedFileError(f"{folder / INDEX} is not complete: {error!r}") from error
        if not isinstance(file, str) or not FILE.fullmatch(file):
            raise RefusedFileError(f"{folder / INDEX}: {file!r} is not the name of a file in {EXPERTS}/")
        if name in found or not math.isfinite(strength) or not (folder / EXPERTS / file).is_file():
            raise RefusedFileError(
                f"{folder / INDEX}: expert {name!r} must come once, with a finite strength and a file in {EXPERTS}/"
            )
        found[name] = folder / EXPERTS / file, strength
    return found, binding or None
