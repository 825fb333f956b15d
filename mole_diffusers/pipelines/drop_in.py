"""What a drop-in pipeline adds to diffusers': its LoRA calls load experts into a mixture, which it saves and opens."""

# mypy: disable-error-code="misc"
# `super()` of a drop-in is a diffusers pipeline, which DropIn itself does not extend.

from __future__ import annotations

import functools
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from diffusers.loaders import FluxLoraLoaderMixin

from mole_diffusers.gates.hub import model_card, push
from mole_diffusers.lora import Expert
from mole_diffusers.lora.writing import save_expert
from mole_diffusers.mixture import Gates, Mixture, attach, attached, detach
from mole_diffusers.patching.gating.gated_experts import ADAPTER
from mole_diffusers.patching.host.denoiser_inputs import hosts
from mole_diffusers.patching.install.installation import lock_of_pipeline
from mole_diffusers.patching.install.peft_injection import adapted
from mole_diffusers.patching.install.pipeline_calls import share_calls
from mole_diffusers.pipelines.adapter_weights import weights_by_block
from mole_diffusers.pipelines.kept import attach_kept, choose, keep
from mole_diffusers.pipelines.sources import HUB, KEPT, ControlLora, control_lora, kept_folder, read_lora, saved_pipeline
from mole_diffusers.whole_files import copy_missing, new_folder, whole_folder

Call = TypeVar("Call", bound=Callable[..., Any])
IGNORED = ("low_cpu_mem_usage", "use_safetensors")  # how diffusers loads; no effect here
CUSTOM = """\
\"\"\"For `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`.\"\"\"

from mole_diffusers import {name} as Pipeline  # noqa: F401
"""  # the same name for every kind: diffusers runs all files called pipeline.py of a process in one module


def _one_at_a_time(call: Call) -> Call:
    """Other threads wait while this method reads what is loaded and changes it."""

    @functools.wraps(call)
    def held(self: Any, *args: Any, **kwargs: Any) -> Any:
        with lock_of_pipeline(self):
            return call(self, *args, **kwargs)

    return held  # type: ignore[return-value]


class DropIn:
    """Mixin for a diffusers pipeline class: `load_lora_weights` adds an expert to a mixture.

    Each expert acts on its own words and in its own place, see `Mixture.bind`. All have weight 1 until you call
    `load_gates`. With `pipe.mixture.bind(None)` they are summed, as `set_adapters` does.
    """

    @property
    def mixture(self) -> Mixture | None:
        """The mixture of the experts and gates loaded so far; None if there are none."""
        return attached(self)

    def load_lora_weights(self, source: Any, adapter_name: str | None = None, hotswap: bool = False, **kwargs: Any) -> None:
        """Add a LoRA as expert `adapter_name`, by default "default_0", "default_1", ...

        Trained gates weigh a fixed set of experts. If you add one more, all experts are summed until you load gates again.

        Args:
            source: a file, a folder or hub id (with `weight_name`; otherwise pytorch_lora_weights.safetensors, or the
                only LoRA file there), a state dict, or an Expert.
            hotswap: replace the expert of that name.
            **kwargs: `weight_name`, and for the hub `subfolder`, `revision`, `token`, `cache_dir`, ...

        A Control LoRA of Flux changes more than layers, so it becomes an ordinary adapter, as in diffusers.

        Raises ValueError for a name that is taken, and everything that `attach` raises; the mixture stays as it was.
        """
        if unknown := sorted(set(kwargs) - {*HUB, *IGNORED, "weight_name", "subfolder"}):
            raise TypeError(f"load_lora_weights() has no argument {unknown[0]!r}")
        where = {key: value for key, value in kwargs.items() if key not in IGNORED}
        if isinstance(source, Mapping) and all(tensor.dim() == 0 for tensor in source.values()):
            super().load_lora_weights(source, adapter_name)  # says that it holds nothing for these models
            return
        if isinstance(self, FluxLoraLoaderMixin) and (control := control_lora(source, self.transformer, **where)):
            self._load_control(control, adapter_name, hotswap)
            return
        expert = read_lora(source, adapter_name, **where)
        with lock_of_pipeline(self):
            experts, ordinary, name = self._experts(), self._ordinary(), self._named(adapter_name)
            if name in ordinary or (name in experts) != hotswap:
                what = "is not loaded, so it cannot be swapped" if hotswap else "is in use"
                raise ValueError(f"adapter name {name!r} {what}; loaded: {[*experts, *ordinary]}")
            if self.mixture is not None and self.mixture.parameters():
                warnings.warn("the gates do not know the new expert; all experts are summed until load_gates", stacklevel=2)
            self._attach({**experts, name: (expert if expert is source else replace(expert, name=name), 1.0)})
            if ordinary:  # as in diffusers, the LoRA loaded last is on, and earlier ones are off
                self._ordinary_off()

    @_one_at_a_time
    def _load_control(self, control: ControlLora, adapter_name: str | None, hotswap: bool) -> None:
        mixture, name = self.mixture, self._named(adapter_name)
        if name in self._experts():
            raise ValueError(f"adapter name {name!r} is in use; loaded: {[*self._experts(), *self._ordinary()]}")
        if mixture is not None and control.widens:  # diffusers raises the same for LoRAs that it has loaded
            raise RuntimeError(
                f"size mismatch for x_embedder.lora_A.{name}.weight: a LoRA that widens the model comes before others, and "
                f"{list(mixture.experts)} are loaded"
            )
        with nullcontext() if mixture is None else mixture.lifted():
            super().load_lora_weights(control.source, adapter_name=name, hotswap=hotswap)

    @_one_at_a_time
    def set_adapters(self, adapter_names: str | Sequence[str], adapter_weights: Any = None) -> None:
        """Set which adapters are active, and their weights; all others are switched off.

        Args:
            adapter_names: experts, and adapters that diffusers or peft put on.
            adapter_weights: one number for all, or one per adapter. Weights per model and per block work as in
                diffusers: {"text_encoder": 0.5, "unet": {"down": 0.9, "up": {"block_1": [0.2, 0.3]}}}.

        Raises ValueError for an unknown name or a wrong number of weights; nothing changes then.
        """
        mixture = self.mixture
        if mixture is None:
            super().set_adapters(adapter_names, adapter_weights)
            return
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = list(adapter_weights) if isinstance(adapter_weights, list | tuple) else [adapter_weights] * len(names)
        if len(weights) != len(names):
            raise ValueError(
                f"Length of adapter names {len(names)} is not equal to the length of the weights {len(weights)}"
            )
        experts, ordinary = self._experts(), self._ordinary()
        if missing := set(names) - {*experts, *ordinary}:
            raise ValueError(f"Adapter name(s) {missing} not in the list of present adapters: { {*experts, *ordinary} }.")
        given = dict(zip(names, weights, strict=True))
        per_model = {n: w for n, w in given.items() if n in experts and isinstance(w, Mapping)}
        numbers = {n: 1.0 if w is None or n in per_model else float(w) for n, w in given.items() if n in experts}
        choose(self, numbers, per_model)
        others = [name for name in names if name in ordinary]
        if others:
            super().set_adapters(others, [given[name] for name in others])
        else:
            self._ordinary_off()

    @_one_at_a_time
    def load_gates(self, gates: Gates) -> None:
        """Weigh the loaded experts by `gates`: a folder, a hub id, the name of a gate type or a GateConfig."""
        self._require()
        self._attach(self._experts(), gates)

    def get_active_adapters(self) -> list[str]:
        """The adapters that are on, whatever their weight."""
        mixture = self.mixture
        active = [] if mixture is None else [name for name in mixture.experts if name in mixture.parts.active]
        return [*active, *(name for name in super().get_active_adapters() if name != ADAPTER)]

    def get_list_adapters(self) -> dict[str, list[str]]:
        """Part -> the adapters that have layers in it."""
        listed = super().get_list_adapters()
        parts = {part: [name for name in names if name != ADAPTER] for part, names in listed.items()}
        for name, (expert, _) in self._experts().items():
            for part in expert.layers:
                parts.setdefault(part, []).append(name)
        return {part: names for part, names in parts.items() if names}

    @_one_at_a_time
    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove adapters. As in diffusers, unknown names are ignored.

        Trained gates weigh a fixed set of experts, so the remaining ones are summed.
        """
        gone = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        experts = self._experts()
        left = {name: expert for name, expert in experts.items() if name not in gone}
        if len(left) < len(experts):
            self._attach(left)
        if others := [name for name in self._ordinary() if name in gone]:
            super().delete_adapters(others)

    @_one_at_a_time
    def unload_lora_weights(self, **kwargs: Any) -> None:
        """Remove all experts, gates and other adapters: the original pipeline, bit for bit."""
        detach(self)
        super().unload_lora_weights(**kwargs)

    @_one_at_a_time
    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """Fuse the adapters into the weights, as in diffusers. The experts become ordinary adapters first.

        A single LoRA is fused as in diffusers: it then acts on every prompt. Warns if until now it acted only on prompts
        with its words.

        Raises ValueError if gates depend on the prompt or the picture, or if binding gives LoRAs words or places of their
        own, which fused weights cannot hold; and if an expert has layers of a text encoder that diffusers fuses nothing
        into, such as Flux's T5.
        """
        mixture = self.mixture
        if mixture is None:
            super().fuse_lora(*args, **kwargs)
            return
        if mixture.parameters() or mixture.config.gate_type != "sum" or mixture.is_bound:
            raise ValueError(
                "gates and binding depend on the prompt and the picture, which fused weights cannot hold; call "
                "pipe.mixture.bind(None) and pipe.load_gates('sum') first, or use pipe.mixture.collapsed(prompt)"
            )
        unfusable = set(hosts(self)) - set(self._lora_loadable_modules)  # type: ignore[attr-defined]  # of diffusers' classes
        for name, expert in mixture.experts.items():
            if unfused := sorted(unfusable & set(expert.layers)):
                raise ValueError(f"diffusers fuses nothing into the {unfused[0]} of {name!r}: leave it unfused")
        for name, bound in (mixture.binding or {}).items():
            if bound.needs_words:
                words = " or ".join(map(repr, bound.words))
                warnings.warn(f"fused, {name!r} acts on every prompt; before, only on those with {words}", stacklevel=3)
        if lost := [word for expert in mixture.experts.values() for word in expert.embeddings]:
            words = " and ".join(map(repr, lost))
            warnings.warn(
                f"the trained embeddings of {words} are not fused: load_textual_inversion loads some", stacklevel=3
            )
        before = mixture.parts.persistent_settings()
        try:
            self._hand_over(mixture)
            super().fuse_lora(*args, **kwargs)
        except BaseException:
            if self.mixture is None:  # it was handed over
                super().delete_adapters([name for name in before.experts if name in self._ordinary()])
                attach(self, before.experts, binding=before.binding)
                choose(self, {name: before.experts[name][1] for name in before.active}, weights_by_block(before.plan))
            raise

    def _hand_over(self, mixture: Mixture) -> None:
        """Turn the experts into ordinary diffusers adapters with the same weights."""
        experts, active = mixture.parts.weighed(), self.get_active_adapters()
        by_block = weights_by_block(mixture.parts.settings.plan.now)
        with TemporaryDirectory() as folder:
            files = {name: Path(folder, f"{i}.safetensors") for i, name in enumerate(experts)}
            for name, (expert, _) in experts.items():
                save_expert(replace(expert, embeddings={}), files[name], dtype=torch.float32)
            detach(self)
            for name, file in files.items():
                super().load_lora_weights(str(file), adapter_name=name)
        weighed = [name for name in active if name in experts]
        super().set_adapters(weighed, [by_block.get(name, experts[name][1]) for name in weighed])
        for model in hosts(self).values():
            for layer in adapted(model):
                layer.set_adapter([name for name in active if name in layer.lora_A])

    @_one_at_a_time
    def load_mixture(self, folder: str | Path) -> None:
        """Load experts, gates and strengths from the folder `mole` of a saved drop-in pipeline."""
        attach_kept(self, folder)

    @_one_at_a_time
    def save_pretrained(
        self, save_directory: str | Path, safe_serialization: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Save the pipeline in diffusers' format, together with experts, gates and strengths.

        What holds only inside a `with` block of the mixture is not saved.

        Any diffusers pipeline of this kind opens the folder without them. The folder's pipeline.py is for
        `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`; call `load_mixture` after that.

        Raises ValueError for `safe_serialization=False`: pickled weights are not read by default.
        """
        if not safe_serialization:
            raise ValueError("a drop-in saves safetensors, since it opens no pickled weights: leave safe_serialization out")
        folder, mixture = Path(save_directory), self.mixture
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", folder.name)
        with new_folder(folder) as part:
            if mixture is not None:
                keep(mixture, part / KEPT)
            (part / "pipeline.py").write_text(CUSTOM.format(name=type(self).__name__))
            with nullcontext() if mixture is None else mixture.lifted():
                super().save_pretrained(str(part), safe_serialization, *args, **kwargs)
            if (before := whole_folder(folder)).is_dir():
                copy_missing(before, part, without=KEPT)  # such as the weights in another precision

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Any:
        """Load as in diffusers, and attach the mixture that `save_pretrained` kept, if any.

        Weights are safetensors, unless you give `use_safetensors`: None takes pickled ones, too.
        """
        source = saved_pipeline(pretrained_model_name_or_path)
        try:
            pipe = super().from_pretrained(source, **{"use_safetensors": True, **kwargs})
        except OSError as error:
            if "use_safetensors" in kwargs or "safetensors" not in str(error):
                raise
            raise OSError(f"{error} Pickled weights are read only if you give use_safetensors=None.") from error
        folder = kept_folder(source, **{k: v for k, v in kwargs.items() if k in HUB})
        if folder is not None:
            pipe.load_mixture(folder)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: Any, **kwargs: Any) -> Any:
        """As in diffusers, except that the shared models keep their dtypes; diffusers casts them to float32.

        Both pipelines share a mixture on the models. A call of either draws as if the mixture were attached to it.
        """
        models, dtypes = [], list[torch.dtype]()
        if not {"torch_dtype", "dtype"} & set(kwargs):
            models = [model for model in pipeline.components.values() if hasattr(model, "dtype")]
            dtypes = [model.dtype for model in models]
            kwargs["dtype"] = functools.reduce(torch.promote_types, dtypes, dtypes[0])
        pipe = super().from_pipe(pipeline, **kwargs)
        for model, dtype in zip(models, dtypes, strict=True):
            if model.dtype != dtype:
                model.to(dtype)
        for each in (pipe, pipeline):  # either may load LoRAs
            if isinstance(each, DropIn):
                share_calls(each, each._drawing)
        return pipe

    def _drawing(self, call: Mapping[str, Any]) -> AbstractContextManager[None]:
        """The block that a call with these arguments runs in."""
        mixture = self.mixture
        return nullcontext() if mixture is None else mixture.drawing(call, pipe=self)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes, with a model card; `options` are those of `gates.hub.upload`."""
        mixture = self._require()
        card = model_card(mixture.parts.persistent_settings().experts, mixture.config, repo_id, pipeline=True)
        return push(self.save_pretrained, card, repo_id, **options)

    def to_json_string(self) -> str:
        """The configuration, under the class name that diffusers knows."""
        config = json.loads(super().to_json_string())
        config["_class_name"] = next(kind.__name__ for kind in type(self).__mro__ if not issubclass(kind, DropIn))
        return json.dumps(config, indent=2, sort_keys=True) + "\n"

    def _experts(self) -> dict[str, tuple[Expert, float]]:
        return {} if self.mixture is None else self.mixture.parts.persistent_settings().experts

    def _attach(self, experts: Mapping[str, tuple[Expert, float]], gates: Gates | None = None) -> None:
        """Attach these experts instead of the present ones; bindings and switched-off experts stay. No experts: detach.

        What holds only inside a `with` block of the present mixture goes with it.

        Args:
            gates: None keeps gates that are not trained, and replaces trained ones by the sum.
        """
        mixture = self.mixture
        if gates is None:
            gates = "sum" if mixture is None or mixture.parameters() else mixture.config
        if not experts:
            detach(self)
        elif mixture is None:
            attach(self, experts, gates)
        else:
            now = mixture.parts.persistent_settings()
            off, by_block = set(mixture.experts) - now.active, weights_by_block(now.plan)
            same = {name for name, (expert, _) in experts.items() if expert is mixture.experts.get(name)}
            binding = None if now.binding is None else {n: b for n, b in now.binding.items() if n in same}
            attach(self, experts, gates, binding=binding)
            active = {name: strength for name, (_, strength) in experts.items() if name not in off}
            choose(self, active, {name: weights for name, weights in by_block.items() if name in same})

    def _ordinary_off(self) -> None:
        for model in hosts(self).values():
            for layer in adapted(model):
                layer.set_adapter([])  # the experts' layers keep theirs

    def _ordinary(self) -> list[str]:
        """The names of adapters that diffusers or peft put on."""
        listed = super().get_list_adapters()
        return list(dict.fromkeys(name for names in listed.values() for name in names if name != ADAPTER))

    def _named(self, asked: str | None) -> str:
        """The name of a LoRA that is loaded: the one that is asked for, or the first that is free."""
        taken = [*self._experts(), *self._ordinary()]
        return asked or next(free for i in count() if (free := f"default_{i}") not in taken)

    def _require(self) -> Mixture:
        if self.mixture is None:
            raise ValueError("no LoRA is loaded; call load_lora_weights first")
        return self.mixture
