"""The input of each layer while one LoRA alone runs its own prompts: the data for merges by least squares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from mole_diffusers import functional
from mole_diffusers.lora import Expert, layer_key
from mole_diffusers.lora.host_names import with_host_names
from mole_diffusers.lora.stacking import match
from mole_diffusers.mixture import attach, attached, detach
from mole_diffusers.patching.gating.prompt_tokens import PromptTokens, TextHook
from mole_diffusers.patching.host.denoiser_inputs import DENOISERS, DenoiserInputs, denoiser, models_of, tokenizers_of
from mole_diffusers.patching.host.denoisers import record
from mole_diffusers.patching.host.placement import token_type_of
from mole_diffusers.patching.undo import Undo, undoing

WITH_TEXT = {"encoding", "text", "joint"}  # what layers read that read a text, see `token_type_of`


@dataclass(eq=False)
class Activations:
    """Runs experts on a pipeline and records the inputs of their layers. Each expert is run once, then cached.

    Only conditional rows are recorded, since the unconditional prompt is the same for every expert. Of a text, only the
    tokens up to its end are recorded, since padding is the same, too.

    Args:
        pipe: the pipeline to run. A mixture on it is attached again afterwards.
        prompts: expert name -> prompts for it, without the other experts' concepts.
        steps: sampling steps from pure noise, without guidance.
        rows: at most this many of a layer's tokens are recorded per step, evenly spaced.
        seed: of the noise.
        call: further arguments of the pipeline's calls, such as a width and a height.
    """

    pipe: Any
    prompts: Mapping[str, Sequence[str]]
    _: KW_ONLY
    steps: int = 4
    rows: int = 256
    seed: int = 42
    call: Mapping[str, Any] = field(default_factory=dict)
    _own: dict[tuple[str, str, float], dict[str, torch.Tensor]] = field(default_factory=dict, init=False)

    def own(self, name: str, expert: Expert, strength: float = 1.0) -> dict[str, torch.Tensor]:
        """ "component.layer" -> [n, Cin]: the inputs of the expert's layers while it runs alone."""
        key = (name, expert.sha256, strength)
        if key not in self._own:
            self._own[key] = self.run(name, expert, expert, strength)
        return self._own[key]

    def run(self, name: str, expert: Expert, running: Expert, strength: float = 1.0) -> dict[str, torch.Tensor]:
        """The same while another LoRA (such as a merge) runs the expert's prompts from the same noise.

        Raises ValueError if the expert has no prompts.
        """
        self.check_prompts([name])
        before = attached(self.pipe)
        with nullcontext() if before is None else before.lifted(), self._recording(name, expert) as found:
            attach(self.pipe, {name: (running, strength)}, "sum", binding=None)
            prompts = list(self.prompts[name])
            generators = [torch.Generator().manual_seed(self.seed + i) for i in range(len(prompts))]
            unguided = record(denoiser(self.pipe)).pipelines.unguided
            options = {"num_inference_steps": self.steps, "guidance_scale": unguided, "output_type": "latent", **self.call}
            try:
                self.pipe(prompts, generator=generators, **options)
            finally:
                detach(self.pipe)
        return {key: torch.cat(pieces) for key, pieces in found.items()}

    def check_prompts(self, names: Iterable[str]) -> None:
        """Raises ValueError if one of these experts has no prompts."""
        if lacking := [name for name in names if not self.prompts.get(name)]:
            known = sorted(filter(self.prompts.get, self.prompts))
            raise ValueError(f"no prompts for expert {', '.join(map(repr, lacking))}; there are some for {known}")

    @contextmanager
    def _recording(self, name: str, expert: Expert) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Record the inputs of the layers that `expert` changes, while the block runs."""
        models, texts = models_of(self.pipe), RecordedTokens(self.pipe)
        found: dict[str, list[torch.Tensor]] = {}

        def keep(key: str, part: str, token_type: str | None, module: nn.Module, args: tuple) -> None:
            x = as_rows(module, args[0].detach())  # [B, T, Cin]
            flat = x[texts.kept(part, token_type, x).to(x.device)]  # [n, Cin]
            at = torch.linspace(0, len(flat) - 1, min(self.rows, len(flat))).round().long()
            found.setdefault(key, []).append(flat[at.to(flat.device)].float().cpu())

        with undoing() as undo:
            texts.watch_encoders(models, undo)
            for part, modules in match(with_host_names(expert, self.pipe, models), models).layers.items():
                token_types = {module: token_type_of(part, models[part], module) for module in modules}
                if part in DENOISERS and not WITH_TEXT.isdisjoint(token_types.values()):
                    undo.before_forward(models[part], partial(texts.denoises, name, part), with_kwargs=True)
                for module, token_type in token_types.items():
                    keeper = partial(keep, f"{part}.{layer_key(module)}", part, token_type)
                    undo.before_forward(models[part].get_submodule(module), keeper)
            yield found


class RecordedTokens:
    """Which tokens of the texts that a pipeline's models read are recorded: those from a text's start to its end."""

    def __init__(self, pipe: Any):
        self._encoded, self._record = PromptTokens(tokenizers_of(pipe)), record(denoiser(pipe))
        self._own: dict[str, torch.Tensor] = {}  # model -> [B, S] bool, for the text that it reads

    def watch_encoders(self, models: Mapping[str, nn.Module], undo: Undo) -> None:
        for part in (part for part in models if part not in DENOISERS):
            TextHook(part, self._encoded, self._record.pipelines.text_layers, self._encodes).register(models[part], undo)

    def _to_end(self, encoder: str, ids: torch.Tensor) -> torch.Tensor:
        """Token ids [P, S] -> bool [P, S]: the tokens up to the end token, included."""
        tokenizer, ids = self._encoded.tokenizers[encoder], ids.cpu()
        ends = ids == tokenizer.eos_token_id
        return (ids != tokenizer.bos_token_id) & (ends.cumsum(1) - ends.long() == 0)

    def _encodes(self, encoder: str, ids: torch.Tensor) -> None:
        self._own[encoder] = self._to_end(encoder, ids)

    def denoises(self, expert: str, part: str, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Before a denoiser runs: find the encoders' texts that its text consists of.

        Raises ValueError if it consists of something else.
        """
        states = DenoiserInputs(model).text(args, kwargs)  # [B, S, C]
        kept = self._encoded.of(states, lambda run: self._to_end(run.encoder, run.ids))
        if kept is None:
            raise ValueError(
                f"{expert!r} cannot be recorded: {type(model).__name__} reads a text that is not as its encoders return "
                f"it, so what is padding in it is not known"
            )
        self._own[part] = kept

    def kept(self, part: str, token_type: str | None, x: torch.Tensor) -> torch.Tensor:
        """[B, T] bool: which tokens of a layer's input [B, T, C] are recorded; `token_type` is what it reads."""
        kept = torch.ones(x.shape[:2], dtype=torch.bool)
        if token_type in WITH_TEXT:
            text = functional.rows_for_layer(self._own[part], len(x))
            # A second attention of the picture (SD 3.5) has the name that cross-attention has elsewhere.
            if token_type == "joint":
                where = self._record.blocks.apart(x.shape[1] - text.shape[1], text.shape[1])[1]
                kept[:, where] = text
            elif x.shape[1] == text.shape[1]:
                kept[:] = text
        return kept


def as_rows(module: Any, x: torch.Tensor) -> torch.Tensor:
    """A layer's input as its flattened weight multiplies it: [B, T, Cin]; the patches for a convolution."""
    if isinstance(module, nn.Conv2d):
        sizes: list[Any] = [module.kernel_size, module.dilation, module.padding, module.stride]
        return F.unfold(x, *sizes).transpose(1, 2)
    return x if x.dim() == 3 else x.reshape(len(x), -1, x.shape[-1])
