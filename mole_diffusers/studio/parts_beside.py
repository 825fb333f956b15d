"""The VAE and the text encoders that a checkpoint lacks, from the files of the program that it belongs to.

ComfyUI, Forge and SwarmUI keep them in folders of their own, and files of Flux often contain only the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders import single_file_utils
from safetensors.torch import load_file

from mole_diffusers.lora.safe_files import read_header
from mole_diffusers.studio.checkpoint_config import CLIP_L, LACKS, PIPELINES, T5_XXL, Encoder, Shapes, text_encoders
from mole_diffusers.studio.model_folders import around

VAE = "first_stage_model."
SCALED = "scaled_fp8"  # of files whose weights are stored divided by scales, which are not read here
VAE_NAMES = {  # pipeline class -> what names of its VAE contain; files of several classes have the same shapes
    "StableDiffusionPipeline": ("mse", "ema", "sd15", "840000", "560000", "kl-f8", "blessed", "anime", "clearvae"),
    "StableDiffusionXLPipeline": ("xl",),
    "StableDiffusion3Pipeline": ("sd3", "sd35"),
    "FluxPipeline": ("ae", "flux"),
}


@dataclass(frozen=True)
class Part:
    """A part of a pipeline in a file of its own.

    Attributes:
        file: where it is.
        keys: how its tensors' names begin in a whole checkpoint, before the names in the file.
        shapes: of its tensors, by their names in a whole checkpoint.
    """

    file: Path
    keys: str
    shapes: Shapes

    def load(self, name: str, encoder: Encoder | None, config: Path, dtype: torch.dtype) -> Any:
        """The model, which is the VAE if it is no text encoder. `config` is a folder of `write_configs`."""
        if encoder is None:
            own = {"config": str(config), "subfolder": name, "torch_dtype": dtype}
            return diffusers.AutoencoderKL.from_single_file(str(self.file), **own)
        tensors = {self.keys + key: tensor for key, tensor in load_file(self.file).items()}
        make = (
            single_file_utils.create_diffusers_t5_model_from_checkpoint
            if self.keys == T5_XXL
            else single_file_utils.create_diffusers_clip_model_from_ldm
        )
        kind = getattr(transformers, encoder.model)
        return make(kind, checkpoint=tensors, config=str(config), subfolder=name, torch_dtype=dtype)


def parts_beside(checkpoint: Path, shapes: Shapes, kind: str) -> dict[str, Part]:
    """The parts that a checkpoint lacks, by their names in the pipeline, as far as there are files that fit.

    Of text encoders that fit, the largest file is taken, which has the most bits; of several VAEs, the one with a name as
    those of its kind have. Raises ValueError if none or several of them have such a name.
    """
    found: dict[str, Part] = {}
    if not any(key.startswith(VAE) for key in shapes) and (vae := _vae(checkpoint, shapes, kind)):
        found["vae"] = vae
    for name, encoder in text_encoders(kind).items():
        is_apart = encoder.keys.startswith("text_encoders.") and not any(key.startswith(encoder.keys) for key in shapes)
        if is_apart and (part := _encoder(checkpoint, encoder, _width(encoder, shapes))):
            found[name] = part
    return found


def _vae(checkpoint: Path, shapes: Shapes, kind: str) -> Part | None:
    channels = _latents(shapes)

    def fits(own: Shapes) -> bool:
        return own.get("decoder.conv_in.weight", (0, 0))[1] == channels and "encoder.conv_in.weight" in own

    files = _fitting(around(checkpoint, "vae"), fits)
    pipeline = PIPELINES[kind]
    named = {file: own for file, own in files.items() if any(word in file.stem.casefold() for word in VAE_NAMES[pipeline])}
    fitting = named or files
    if len(fitting) > 1:
        raise ValueError(f"{LACKS.format('VAE')}; several beside it may fit: {', '.join(file.name for file in fitting)}")
    return next((Part(file, VAE, _under(VAE, own)) for file, own in fitting.items()), None)


def _encoder(checkpoint: Path, encoder: Encoder, width: int | None) -> Part | None:
    is_t5 = encoder.keys == T5_XXL
    key = "shared.weight" if is_t5 else "text_model.embeddings.token_embedding.weight"
    above = encoder.keys if is_t5 else encoder.keys.removesuffix("text_model.")

    def fits(own: Shapes) -> bool:
        return key in own and SCALED not in own and (width is None or own[key][1] == width)

    files = _fitting(around(checkpoint, "text_encoder"), fits)
    largest = max(files, key=lambda file: file.stat().st_size, default=None)
    return None if largest is None else Part(largest, above, _under(above, files[largest]))


def _width(encoder: Encoder, shapes: Shapes) -> int | None:
    """The width that a text encoder must have, if the transformer says it."""
    net = {key.removeprefix("model.diffusion_model."): shape for key, shape in shapes.items()}
    if encoder.keys == T5_XXL:
        return net.get("txt_in.weight", net.get("context_embedder.weight", (0, None)))[1]
    if "vector_in.in_layer.weight" in net:
        return net["vector_in.in_layer.weight"][1]
    both = net.get("y_embedder.mlp.0.weight", (0, None))[1]  # of SD 3's two, 768 and 1280
    return None if both is None else both * (3 if encoder.keys == CLIP_L else 5) // 8


def _latents(shapes: Shapes) -> int | None:
    """The channels of the latents that a denoiser reads."""
    net = {key.removeprefix("model.diffusion_model."): shape for key, shape in shapes.items()}
    if "img_in.weight" in net:  # Flux reads patches of 2 x 2
        return net["img_in.weight"][1] // 4
    return net.get("x_embedder.proj.weight", net.get("input_blocks.0.0.weight", (0, None)))[1]


def _fitting(files: Mapping[str, Path], fits: Callable[[Shapes], bool]) -> dict[Path, Shapes]:
    found: dict[Path, Shapes] = {}
    for file in files.values():
        try:
            shapes, _ = read_header(file)
        except (ValueError, OSError):
            continue
        if fits(shapes):
            found[file] = shapes
    return found


def _under(start: str, shapes: Shapes) -> Shapes:
    return {start + key: shape for key, shape in shapes.items()}
