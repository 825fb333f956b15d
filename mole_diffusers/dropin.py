"""What a drop-in pipeline adds to the diffusers pipeline of its kind: diffusers' LoRA calls, answered by a mixture."""

from __future__ import annotations

import json
import warnings
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mole_diffusers.attaching import Gates, attach, attached, detach
from mole_diffusers.card import model_card, upload
from mole_diffusers.kept import attach_kept, keep
from mole_diffusers.lora_files import Expert, read_expert
from mole_diffusers.mixture import Mixture

KEPT = "mole"  # folder of a saved pipeline that holds its mixture
HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
CUSTOM = """\
\"\"\"For `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`.\"\"\"

from mole_diffusers import {name} as Pipeline  # noqa: F401
"""  # one name for every kind: diffusers runs all of a process's files called pipeline.py in one module


class DropIn:
    """Put before a diffusers pipeline class: `load_lora_weights` adds an expert to a mixture.

    Until `load_gates` is called the experts are summed, as `set_adapters` with weights 1 does.
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
        attach(self, {**experts, name: (expert, 1.0)})

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
        attach(self, self._experts(), gates)

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
            attach(self, left)
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
        """Upload what `save_pretrained` writes, with a model card; `options` are those of `card.upload`."""
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

    def _require(self) -> Mixture:
        if self.mixture is None:
            raise ValueError("no LoRA is loaded; call load_lora_weights first")
        return self.mixture


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
