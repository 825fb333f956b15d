"""Drop-in pipelines: code written for diffusers' LoRA calls works as it is, and gates compose what it loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import StableDiffusionPipeline

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
        """Add a LoRA file (or an `Expert`) as expert `adapter_name`; `weight_name` names the file inside a folder.

        Raises ValueError for a name that is taken, and all that `attach` raises; the mixture stays as it was.
        """
        weight_name = kwargs.pop("weight_name", None)
        if kwargs:
            raise ValueError(f"unknown arguments {sorted(kwargs)}; known: adapter_name, weight_name")
        expert = source if isinstance(source, Expert) else self._read(Path(source), weight_name, adapter_name)
        name = adapter_name or expert.name
        if name in self.get_active_adapters():
            raise ValueError(f"adapter name {name!r} is in use; loaded: {self.get_active_adapters()}")
        self._attach({**self._experts(), name: (expert, 1.0)})

    def set_adapters(self, adapter_names: str | list[str], adapter_weights: float | list[float] | None = None) -> None:
        """Set the strength of the named experts; those not named get strength 0."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = adapter_weights if isinstance(adapter_weights, list) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(f"{len(names)} adapters but {len(weights)} weights")
        mixture = self._require()
        strengths = {name: 1.0 if w is None else float(w) for name, w in zip(names, weights, strict=True)}
        for name in strengths:
            mixture.strength(name)
        for name in mixture.experts:
            mixture.strength(name, strengths.get(name, 0.0))

    def load_gates(self, gates: Gates) -> None:
        """Weigh the loaded experts by `gates`: a folder, a hub id, a family name or a GateConfig."""
        self._require()
        self._attach(self._experts(), gates)

    def get_active_adapters(self) -> list[str]:
        """The experts' names."""
        return list(self._experts())

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
            self._attach(left)
        else:
            detach(self)

    def unload_lora_weights(self, reset_to_overwritten_params: bool = False) -> None:
        """Take all experts and gates out: the original pipeline, bit for bit."""
        detach(self)

    def _experts(self) -> dict[str, tuple[Expert, float]]:
        mixture = self.mixture
        return {} if mixture is None else {n: (e, mixture.strength(n)) for n, e in mixture.experts.items()}

    def _require(self) -> Mixture:
        if self.mixture is None:
            raise ValueError("no LoRA is loaded; call load_lora_weights first")
        return self.mixture

    def _attach(self, experts: dict[str, tuple[Expert, float]], gates: Gates = "sum") -> None:
        attach(self, experts, gates)

    @staticmethod
    def _read(source: Path, weight_name: str | None, adapter_name: str | None) -> Expert:
        path = source / (weight_name or "pytorch_lora_weights.safetensors") if source.is_dir() else source
        return read_expert(path, adapter_name)
