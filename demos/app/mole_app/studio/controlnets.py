"""ControlNets: a control map, such as edges, depths or a pose, says what stands where in a picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from safetensors.torch import load_file

from mole_app.studio.model_folders import SAVED
from mole_diffusers.safe_files import read_header

HINT = "controlnet_cond_embedding."  # the layers that read the map
OF_XL = {"label_emb.0.0.": "add_embedding.linear_1.", "label_emb.0.2.": "add_embedding.linear_2."}  # which diffusers omits
SAME = ("block_out_channels", "cross_attention_dim", "addition_embed_type", "in_channels")  # of a UNet and its ControlNets


def open_controlnet(pipe: Any, path: Path) -> ControlNetModel:
    """A ControlNet for the UNet of a pipeline.

    Args:
        path: a safetensors file in diffusers' or the original names, or a folder that diffusers saved.

    Raises ValueError for anything else, and for a ControlNet for another kind of model.
    """
    unet = pipe.unet
    try:
        if path.is_dir():
            read_header(path / SAVED)
            found = ControlNetModel.from_pretrained(path, torch_dtype=unet.dtype, use_safetensors=True)
        else:
            read_header(path)
            found = _of_tensors(_named(load_file(path), unet), unet)
    except (LookupError, RuntimeError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{path.name} is no ControlNet for the kind of model that {type(pipe).__name__} has") from error
    if any(json.dumps(found.config[name]) != json.dumps(unet.config[name]) for name in SAME):  # with lists or tuples
        raise ValueError(f"{path.name} is a ControlNet for another kind of model")
    return found.to(pipe._execution_device).eval()


def _named(tensors: dict[str, torch.Tensor], unet: Any) -> dict[str, torch.Tensor]:
    """Tensors of a ControlNet with the names of diffusers. Raises what diffusers raises for others."""
    found = convert_controlnet_checkpoint(tensors, unet.config)
    for name, tensor in tensors.items():
        for theirs, ours in OF_XL.items():
            if name.removeprefix("control_model.").startswith(theirs):
                found[ours + name.rpartition(".")[2]] = tensor
    return found


def _of_tensors(tensors: dict[str, torch.Tensor], unet: Any) -> ControlNetModel:
    """It is built as the UNet is. Only how it reads the map differs. Raises what torch raises for other tensors."""
    firsts = [key for key in tensors if key.startswith(f"{HINT}blocks.") and key.endswith(".weight")]
    steps = sorted(int(key.split(".")[2]) for key in firsts)[1::2]  # the second of two layers is wider
    widths = [tensors[f"{HINT}conv_in.weight"].shape[0], *(tensors[f"{HINT}blocks.{i}.weight"].shape[0] for i in steps)]
    with torch.device("meta"):
        network = ControlNetModel.from_unet(
            unet, conditioning_embedding_out_channels=tuple(widths), load_weights_from_unet=False
        )
    network.load_state_dict({key: tensor.to(unet.dtype) for key, tensor in tensors.items()}, assign=True)
    return network
