"""IP-Adapters: a reference picture is read like a second prompt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

from mole_diffusers.safe_files import read_header

Shapes = Mapping[str, tuple[int, ...]]
CLASS, PATCH = "vision_model.embeddings.class_embedding", "vision_model.embeddings.patch_embedding.weight"
POSITIONS, PROJECTION = "vision_model.embeddings.position_embedding.weight", "visual_projection.weight"
LAYER = "vision_model.encoder.layers."


class Reference:
    """What an IP-Adapter reads in a reference picture. The last one is remembered, since its encoder is large."""

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._read: list[torch.Tensor] = []

    @contextmanager
    def acting(
        self, pipe: Any, file: Path, encoders: Mapping[str, Path], picture: Image.Image, *, scale: float, is_guided: bool
    ) -> Iterator[dict[str, Any]]:
        """A block in which an IP-Adapter is loaded: the arguments with which to call the pipeline.

        Args:
            encoders: image encoders by name, of which one that fits is taken.
            scale: how much the picture counts.
            is_guided: whether the call has guidance.

        Raises ValueError if the file is no IP-Adapter for this pipeline, or if it has no image encoder.
        """
        shapes, _ = read_header(file)
        _check(shapes, file.name, pipe)
        key = (file, picture.tobytes(), picture.size, is_guided)
        encoder = _encoder(shapes, file.name, encoders) if key != self._key else None
        unet, before = pipe.unet, {name: getattr(pipe, name) for name in ("image_encoder", "feature_extractor")}
        processors = dict(unet.attn_processors)
        pipe.register_modules(image_encoder=encoder, feature_extractor=None)
        try:
            pipe.load_ip_adapter(str(file.parent), subfolder="", weight_name=file.name, image_encoder_folder=None)
            pipe.set_ip_adapter_scale(scale)
            if encoder is not None:
                cpu = torch.device("cpu")  # where it takes a second, and no memory of a GPU
                self._read = pipe.prepare_ip_adapter_image_embeds(picture, None, cpu, 1, is_guided)
                self._key = key
                pipe.register_modules(image_encoder=None)
            given = [each.to(pipe._execution_device, unet.dtype) for each in self._read]
            yield {"ip_adapter_image_embeds": given}
        finally:
            pipe.unload_ip_adapter()
            unet.set_attn_processor(processors)
            pipe.register_modules(**before)


def _check(shapes: Shapes, name: str, pipe: Any) -> None:
    """Raises ValueError if an IP-Adapter with tensors of these shapes cannot act in a pipeline."""
    unet = pipe.unet
    if any("Sliced" in type(processor).__name__ for processor in unet.attn_processors.values()):
        raise ValueError("an IP-Adapter and attention slicing exclude each other: start without --slicing")
    places = [place.removesuffix(".processor") for place in unet.attn_processors if "attn2" in place]
    wanted = {f"ip_adapter.{2 * i + 1}.to_k_ip.weight": unet.get_submodule(p).to_k.weight for i, p in enumerate(places)}
    if any(shapes.get(key) != tuple(weight.shape) for key, weight in wanted.items()):
        raise ValueError(f"{name} is no IP-Adapter for the kind of model that {type(pipe).__name__} has")


def _encoder(shapes: Shapes, name: str, encoders: Mapping[str, Path]) -> CLIPVisionModelWithProjection:
    """The first image encoder, by name, that an IP-Adapter with tensors of these shapes can read."""
    if (projected := shapes.get("image_proj.proj.weight")) is not None:
        key, width = PROJECTION, projected[1]
    elif "image_proj.proj_in.weight" in shapes:
        key, width = CLASS, shapes["image_proj.proj_in.weight"][1]
    elif "image_proj.proj.3.weight" in shapes:  # "full face"
        key, width = CLASS, shapes["image_proj.proj.0.weight"][0]
    else:
        raise ValueError(f"{name} reads faces with another program, or is built in another way than is known here")
    for file in encoders.values():
        if read_header(file)[0].get(key, (0,))[0] == width:
            return open_image_encoder(file)
    known = f"; these do not fit: {', '.join(encoders)}" if encoders else ""
    raise ValueError(f"{name} needs its image encoder, a .safetensors file in the folder clip_vision{known}")


def open_image_encoder(file: Path) -> CLIPVisionModelWithProjection:
    """An image encoder of CLIP's kind from its file, whose config is read from the shapes of its tensors."""
    tensors = load_file(file)
    width, (projected, _) = len(tensors[CLASS]), tensors[PROJECTION].shape
    patch, patches = tensors[PATCH].shape[-1], len(tensors[POSITIONS]) - 1
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors[f"{LAYER}0.mlp.fc1.bias"]),
        num_hidden_layers=len({key.split(".")[3] for key in tensors if key.startswith(LAYER)}),
        num_attention_heads=16 if width > 1024 else max(width // 64, 1),
        image_size=patch * round(patches**0.5),
        patch_size=patch,
        projection_dim=projected,
        hidden_act="gelu" if width > 1024 else "quick_gelu",  # of OpenCLIP and of OpenAI's
    )
    return CLIPVisionModelWithProjection.from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32).eval()
