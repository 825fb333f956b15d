"""Drop-in pipelines: code written for diffusers' LoRA calls works as it is, and gates compose what it loads."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from mole_diffusers.lora_files import Expert, read_expert
from mole_diffusers.mixture import Gates, Mixture, attach, attached, detach


class MoLEStableDiffusionPipeline(StableDiffusionPipeline):
    """StableDiffusionPipeline whose `load_lora_weights` adds an expert to a mixture.

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

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Save the base pipeline; experts and gates have files of their own and are put back afterwards."""
        with nullcontext() if self.mixture is None else self.mixture.lifted():
            super().save_pretrained(*args, **kwargs)

    def _experts(self) -> dict[str, tuple[Expert, float]]:
        mixture = self.mixture
        return {} if mixture is None else {n: (e, mixture.strength(n)) for n, e in mixture.experts.items()}

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
