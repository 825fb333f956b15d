"""The models of a pipeline, and the inputs of its denoiser. Models name inputs and measure time in different ways."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CLIPTokenizer, ProcessorMixin, T5Tokenizer

from mole_diffusers.binding.regions import GridSize
from mole_diffusers.gates.unchanged import LastTensor
from mole_diffusers.lora import COMPONENTS
from mole_diffusers.patching.host.denoisers import record

DENOISERS = ("unet", "transformer")
CONDITIONER = "text_conditioner"  # makes the denoiser's text: of another tokenizer's tokens, and what the encoder returns
# What pipelines and denoisers call the arguments for attention; LoRAs are multiplied by their "scale".
FOR_ATTENTION = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")
GuidanceLayout = tuple[bool, ...]  # for each group of a text's rows, all of one size: whether its rows are the prompts


def lora_scale(call: Mapping[str, Any]) -> float:
    """What the arguments of a call, of a pipeline or of a denoiser, multiply all LoRAs by."""
    return next((given["scale"] for name in FOR_ATTENTION if "scale" in (given := call.get(name) or {})), 1.0)


class DenoiserInputs:
    """Reads the arguments of a denoiser's forward, given by position or by name; ValueError if its class has no record."""

    def __init__(self, denoiser: nn.Module):
        self.record = record(denoiser)
        self.names = list(inspect.signature(type(denoiser).forward).parameters)[1:]
        self._config = getattr(denoiser, "config", None)
        # Texts as they were given last, and as blocks read them. Guidance may call the denoiser for two in turn.
        self._texts: deque[tuple[list[LastTensor], torch.Tensor]] = deque(maxlen=2)
        # The side that places said last, since reading them waits for the device.
        self._places = LastTensor()
        self._side: GridSize | None = None

    def named(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """All arguments by name."""
        return dict(zip(self.names, args, strict=False)) | kwargs

    def _read(self, name: str, args: tuple, kwargs: dict) -> Any:
        return kwargs[name] if name in kwargs else args[self.names.index(name)]

    def timestep(self, args: tuple, kwargs: dict) -> Any:
        """What the denoiser is given as the time: a tensor or a number."""
        return self._read(self.record.arguments.time, args, kwargs)

    def time(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The noise level [B], 0..1, where 1 is pure noise."""
        sample = self.latents(args, kwargs)
        time = torch.as_tensor(self.timestep(args, kwargs), device=sample.device)
        pure_noise, clean, *_ = self.record.pipelines
        time = time.amax(1) if time.dim() == 2 else time.reshape(-1)  # of each token, 0 in a picture that is given
        time = time.float().expand(sample.shape[0])
        return (time - clean if clean else time) / (pure_noise - clean)

    def latent_size(self, args: tuple, kwargs: dict) -> GridSize | None:
        """Height and width of the latents, in the denoiser's tokens; None if their layout is not known."""
        if self.record.latent_size is None:
            return None
        places = self.record.arguments.places
        if places is None or not self._places.is_again(self._read(places, args, kwargs)):
            self._side = self.record.latent_size(lambda name: self._read(name, args, kwargs), self._config)
        return self._side

    def latents(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The denoiser's input: [B, C, H, W], [B, C, F, H, W] for a video, or tokens [B, T, C].

        Raises ValueError for a list of pictures that are not alike.
        """
        given = self._read(self.record.arguments.latents, args, kwargs)
        if not isinstance(given, list):
            return given
        if any(not isinstance(one, torch.Tensor) or one.shape != given[0].shape for one in given):
            raise ValueError("experts act on pictures of one size that are drawn from a text alone")
        return torch.stack(given)

    def text(self, args: tuple, kwargs: dict) -> torch.Tensor:
        """The text states [B, S, C]. For videos, B may be a multiple of the number of samples.

        The texts of a list are padded with zeros as in the denoiser. Of several layers' states the last are given. The same
        texts give the same tensor again.
        """
        names = self.record.arguments
        given = self._read(names.text, args, kwargs)
        shown = None if names.text_shown is None else self._read(names.text_shown, args, kwargs)
        before = None if names.text_before is None else self._read(names.text_before, args, kwargs)
        if isinstance(given, torch.Tensor) and given.dim() == 3 and shown is None:
            return given
        texts = [*(given if isinstance(given, list) else [given]), *([] if before is None else [before])]
        for lasts, read in self._texts:
            if len(lasts) == len(texts) and all(last.is_it(text) for last, text in zip(lasts, texts, strict=True)):
                return read
        read, lasts = self._in_blocks(given, shown, before), [LastTensor() for _ in texts]
        for last, text in zip(lasts, texts, strict=True):
            last.is_again(text)
        self._texts.append((lasts, read))
        return read

    def _in_blocks(
        self, given: torch.Tensor | list[torch.Tensor], shown: torch.Tensor | None, before: torch.Tensor | None
    ) -> torch.Tensor:
        if isinstance(given, list):
            texts = pad_sequence(given, batch_first=True)
            return nn.functional.pad(texts, (0, 0, 0, self.record.blocks.padded(texts.shape[1]) - texts.shape[1]))
        if before is not None:
            return torch.cat([before, given[-1], given[-1]], 1)
        last = given[:, :, -1] if given.dim() == 4 else given
        return last if shown is None else last[:, : int(shown.sum(1).amax())]


def guidance_layout_of(pipe: Any, text: torch.Tensor, latents: torch.Tensor) -> GuidanceLayout | None:
    """How a call's guidance has combined the rows of a text [B, S, C].

    None if that is not known, or if the denoiser is called separately for each text.
    """
    if isinstance(pipe, StableDiffusionInstructPix2PixPipeline | StableDiffusionXLInstructPix2PixPipeline):
        noisy = latents[:, : latents.shape[1] // 2]
        return (True, False, False) if repeats(noisy, 3) and torch.equal(*text.chunk(3)[1:]) else (True,)
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        return None
    perturbed = bool(getattr(pipe, "do_perturbed_attention_guidance", False))
    guidance_layout = (False,) * bool(guided) + (True,) * (1 + perturbed)
    if record(denoiser(pipe)).pipelines.prompts_first:
        guidance_layout = guidance_layout[::-1]
    return guidance_layout if repeats(latents, len(guidance_layout)) else None


def guides_in_turns(call: Mapping[str, Any]) -> bool:
    """Whether a pipeline's call, given its arguments, calls the denoiser twice in each step: for its prompts, and then for
    its negative prompts.
    """
    states = ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    is_given = call.get("negative_prompt") is not None or all(call.get(name) is not None for name in states)
    return is_given and (call.get("true_cfg_scale") or 1) > 1


def repeats(latents: torch.Tensor, times: int) -> bool:
    """Whether the same pictures are repeated this many times, one batch after the other."""
    first, *others = latents.chunk(times)
    return len(others) == times - 1 and all(torch.equal(first, other) for other in others)


def prompted_rows(pipe: Any, text: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
    """[B] bool: the rows of a text [B, S, C] that are prompts; all if that is not known."""
    guidance_layout = guidance_layout_of(pipe, text, latents) or (True,)
    return torch.tensor(guidance_layout, device=text.device).repeat_interleave(len(text) // len(guidance_layout))


def compiled_from(model: Any) -> Any:
    """The model inside the result of `torch.compile(model)`; any other model itself."""
    return getattr(model, "_orig_mod", model)


def denoisers(pipe: Any) -> list[nn.Module]:
    """The UNet or transformer of a pipeline, if it has one."""
    return [compiled_from(model) for name in DENOISERS if (model := getattr(pipe, name, None)) is not None]


def denoiser(pipe: Any) -> nn.Module:
    """The UNet or transformer of a pipeline; ValueError for anything else."""
    if isinstance(pipe, str | Path):
        raise ValueError(f"a mixture is on a loaded pipeline, such as DiffusionPipeline.from_pretrained({str(pipe)!r})")
    if not (found := denoisers(pipe)):
        raise ValueError(
            f"a mixture is on a diffusers pipeline with a unet or a transformer, and {type(pipe).__name__} has neither"
        )
    return found[0]


def is_one_graph(pipe: Any) -> bool:
    """Whether the denoiser of a pipeline was compiled as a whole, so that no hook of a layer can leave it."""
    return is_compiled_whole(pipe, next(name for name in DENOISERS if getattr(pipe, name, None) is not None))


def is_compiled_whole(pipe: Any, part: str) -> bool:
    """Whether a model of a pipeline was compiled as a whole, by `torch.compile(model)` or `model.compile()`."""
    return is_compiled_module(getattr(pipe, part))


def is_compiled_module(module: Any) -> bool:
    """Whether the forward of a module, as a whole, is compiled."""
    return compiled_from(module) is not module or getattr(module, "_compiled_call_impl", None) is not None


def models_of(pipe: Any) -> dict[str, nn.Module]:
    """Part -> model, for the models of a pipeline that can have LoRAs."""
    return {part: compiled_from(model) for part in COMPONENTS if (model := getattr(pipe, part, None)) is not None}


def readers_of(pipe: Any) -> dict[str, nn.Module]:
    """Part -> model, for the models of a pipeline that read a text's tokens: its text encoders, and Anima's conditioner."""
    encoders = {part: model for part, model in models_of(pipe).items() if part not in DENOISERS}
    conditioner = getattr(pipe, CONDITIONER, None)
    return encoders if conditioner is None else {**encoders, CONDITIONER: conditioner}


def tokenizers_of(pipe: Any) -> dict[str, Any]:
    """Model of `readers_of` -> its tokenizer, or None."""
    given = {part: getattr(pipe, part.replace("text_encoder", "tokenizer"), None) for part in readers_of(pipe)}
    if CONDITIONER in given:
        given[CONDITIONER] = getattr(pipe, "t5_tokenizer", None)
    return {part: words.tokenizer if isinstance(words, ProcessorMixin) else words for part, words in given.items()}


def text_read(pipe: Any, prompt: str) -> str:
    """As much of a prompt as the text encoder reads that reads most: CLIP 75 tokens, T5 as many as the pipeline asks for."""
    return max((_cut(pipe, tokenizer, prompt) for tokenizer in tokenizers_of(pipe).values()), key=len, default=prompt)


def _cut(pipe: Any, tokenizer: Any, prompt: str) -> str:
    """A prompt without the tokens that do not fit. A call of the tokenizer would change its padding for other threads."""
    most = None
    if isinstance(tokenizer, CLIPTokenizer):
        most = tokenizer.model_max_length
    elif isinstance(tokenizer, T5Tokenizer) and hasattr(pipe, "encode_prompt"):
        asked = inspect.signature(pipe.encode_prompt).parameters.get("max_sequence_length")
        most = None if asked is None else asked.default
    if most is None:
        return prompt
    room = most - tokenizer.num_special_tokens_to_add()
    offsets = tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).offsets
    is_long = len(offsets) > room and offsets[room] != (0, 0)  # as padding has
    return prompt[: offsets[room][0]] if is_long else prompt


def hosts(pipe: Any) -> dict[str, nn.Module]:
    """Part -> model, for the models of a pipeline that get experts; ValueError if experts could not act there."""
    unet = denoiser(pipe)
    if getattr(pipe, "transformer_2", None) is not None:
        raise ValueError("a mixture acts in one denoiser, and this pipeline has two: transformer and transformer_2")
    beside = record(unet).pipelines.beside
    if beside is not None and getattr(pipe, beside, None) is None:
        raise ValueError(f"experts can act in a {type(unet).__name__} beside a {beside}, and {type(pipe).__name__} has none")
    if any(_fused(module) for module in unet.modules()):
        raise ValueError("the pipeline's q, k and v are fused, which LoRAs cannot reach; call unfuse_qkv_projections first")
    return models_of(pipe)


def _fused(module: Any) -> bool:
    """Whether an attention multiplies by q, k and v at once. (UNets keep this mark after unfusing.)"""
    marked = getattr(module, "fused_projections", False)
    return marked and (not isinstance(module, Attention) or type(module.processor).__name__.startswith("Fused"))
