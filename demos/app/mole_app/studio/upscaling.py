"""Models that enlarge pictures, such as ESRGAN's, as spandrel (https://github.com/chaiNNer-org/spandrel) reads them."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from mole_diffusers.safe_files import read_header


def enlarged(picture: Image.Image, file: Path, device: torch.device) -> Image.Image:
    """A picture in RGB, as many times larger as the model in a safetensors file makes it.

    Raises ValueError if spandrel is not installed, and for a file that is no such model.
    """
    read_header(file)  # raises ValueError for what is no safetensors file
    try:
        from spandrel import ImageModelDescriptor, ModelLoader, UnsupportedModelError
    except ImportError as error:
        raise ValueError(f"upscalers need {error.name}: pip install 'mole-diffusers[upscalers]'") from error
    try:
        model = ModelLoader(device).load_from_file(file)
    except UnsupportedModelError as error:
        raise ValueError(f"{file.name} is no upscaler that spandrel knows") from error
    if not isinstance(model, ImageModelDescriptor) or (model.input_channels, model.output_channels) != (3, 3):
        raise ValueError(f"{file.name} does not make a picture in colour of one")
    pixels = VaeImageProcessor.numpy_to_pt(VaeImageProcessor.pil_to_numpy(picture))  # [1, 3, H, W] in 0..1
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(model(pixels.to(device))))[0]
