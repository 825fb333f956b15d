"""The VAE and the text encoders that a checkpoint lacks, from the files of the program that it belongs to.

ComfyUI, Forge and SwarmUI keep them in folders of their own, and files of Flux often contain only the transformer.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mole_app.studio.checkpoint_config import (
    CLIP_L,
    LACKS,
    PIPELINES,
    T5_XXL,
    Shapes,
    TextEncoder,
    text_encoders,
    transformer,
)
from mole_app.studio.model_folders import around
from mole_diffusers.safe_files import read_header

VAE = "first_stage_model."
SCALED = "scaled_fp8"  # of files whose weights are stored divided by scales, which are not read here
VAE_NAMES = {  # pipeline class -> what names of its VAE contain; files of several classes have the same shapes
    "StableDiffusionPipeline": ("mse", "ema", "sd15", "840000", "560000", "kl-f8", "blessed", "anime", "clearvae"),
    "StableDiffusionXLPipeline": ("xl",),
    "StableDiffusion3Pipeline": ("sd3", "sd35"),
    "FluxPipeline": ("ae", "flux"),
}


def parts_beside(checkpoint: Path, shapes: Shapes, kind: str) -> dict[str, Path]:
    """The parts that a checkpoint lacks, as far as there are files that fit: how the names of a part's tensors begin in a
    whole checkpoint, before those in the file -> the file.

    Of text encoders that fit, the largest file is taken, which has the most bits; of several VAEs, the one with a name as
    those of its kind have. Raises ValueError if none or several of them have such a name.
    """
    found: dict[str, Path] = {}
    if not any(key.startswith(VAE) for key in shapes) and (vae := _vae(checkpoint, shapes, kind)):
        found[VAE] = vae
    for encoder in text_encoders(kind).values():
        is_apart = encoder.keys.startswith("text_encoders.") and not any(key.startswith(encoder.keys) for key in shapes)
        if is_apart and (file := _encoder(checkpoint, encoder, _width(encoder, shapes))):
            found[encoder.keys if encoder.keys == T5_XXL else encoder.keys.removesuffix("text_model.")] = file
    return found


def _vae(checkpoint: Path, shapes: Shapes, kind: str) -> Path | None:
    channels = _latents(shapes)

    def fits(own: Shapes) -> bool:
        return own.get("decoder.conv_in.weight", (0, 0))[1] == channels and "encoder.conv_in.weight" in own

    files = _fitting(checkpoint, "vae", fits)
    fitting = [f for f in files if any(word in f.stem.casefold() for word in VAE_NAMES[PIPELINES[kind]])] or files
    if len(fitting) > 1:
        raise ValueError(f"{LACKS.format('VAE')}; several beside it may fit: {', '.join(file.name for file in fitting)}")
    return next(iter(fitting), None)


def _encoder(checkpoint: Path, encoder: TextEncoder, width: int | None) -> Path | None:
    key = "shared.weight" if encoder.keys == T5_XXL else "text_model.embeddings.token_embedding.weight"

    def fits(own: Shapes) -> bool:
        return key in own and SCALED not in own and (width is None or own[key][1] == width)

    files = _fitting(checkpoint, "text_encoder", fits)
    return max(files, key=lambda file: file.stat().st_size, default=None)


def _width(encoder: TextEncoder, shapes: Shapes) -> int | None:
    """The width that a text encoder must have, if the transformer says it."""
    net = transformer(shapes)
    if encoder.keys == T5_XXL:
        return net.get("txt_in.weight", net.get("context_embedder.weight", (0, None)))[1]
    if "vector_in.in_layer.weight" in net:
        return net["vector_in.in_layer.weight"][1]
    both = net.get("y_embedder.mlp.0.weight", (0, None))[1]  # of SD 3's two, 768 and 1280
    return None if both is None else both * (3 if encoder.keys == CLIP_L else 5) // 8


def _latents(shapes: Shapes) -> int | None:
    """The channels of the latents that a denoiser reads."""
    net = transformer(shapes)
    if "img_in.weight" in net:  # Flux reads patches of 2 x 2
        return net["img_in.weight"][1] // 4
    return net.get("x_embedder.proj.weight", net.get("input_blocks.0.0.weight", (0, None)))[1]


def _fitting(checkpoint: Path, kind: str, fits: Callable[[Shapes], bool]) -> list[Path]:
    """The files of a kind in the program of a checkpoint whose shapes fit."""
    found = []
    for file in around(checkpoint, kind).values():
        try:
            shapes, _ = read_header(file)
        except (ValueError, OSError):
            continue
        if fits(shapes):
            found.append(file)
    return found
