"""Compose several concept LoRAs in one image: learned gates over experts, as a plugin for diffusers.

A public name is imported when it is first used (PEP 562), so that importing the package itself takes no time.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mole_diffusers.binding.picture_warning import PictureWarning
    from mole_diffusers.emoji.world import EmojiWorld, emoji_world
    from mole_diffusers.gates import GateConfig
    from mole_diffusers.gates.transforms import Strongest
    from mole_diffusers.lora import Expert, read_expert
    from mole_diffusers.lora.safe_files import RefusedFileError
    from mole_diffusers.lora.writing import save_expert
    from mole_diffusers.merging.activations import Activations
    from mole_diffusers.merging.merge import merge
    from mole_diffusers.mixture import Mixture, attach, attached, detach
    from mole_diffusers.patching.gating.trace import Trace
    from mole_diffusers.patching.install.gate_inputs import MoLEAttnProcessor
    from mole_diffusers.pipelines.classes import (
        MoLEChromaPipeline,
        MoLEFlux2KleinPipeline,
        MoLEFlux2Pipeline,
        MoLEFluxControlPipeline,
        MoLEFluxPipeline,
        MoLEKrea2Pipeline,
        MoLELTXPipeline,
        MoLELumina2Pipeline,
        MoLEPipeline,
        MoLEQwenImagePipeline,
        MoLEStableDiffusion3Pipeline,
        MoLEStableDiffusionControlNetImg2ImgPipeline,
        MoLEStableDiffusionControlNetInpaintPipeline,
        MoLEStableDiffusionControlNetPipeline,
        MoLEStableDiffusionImg2ImgPipeline,
        MoLEStableDiffusionInpaintPipeline,
        MoLEStableDiffusionPipeline,
        MoLEStableDiffusionXLControlNetImg2ImgPipeline,
        MoLEStableDiffusionXLControlNetInpaintPipeline,
        MoLEStableDiffusionXLControlNetPipeline,
        MoLEStableDiffusionXLImg2ImgPipeline,
        MoLEStableDiffusionXLInpaintPipeline,
        MoLEStableDiffusionXLPipeline,
        MoLEWanPipeline,
        MoLEZImagePipeline,
    )
    from mole_diffusers.pipelines.modular import (
        MoLEFlux2KleinBlocks,
        MoLEFluxBlocks,
        MoLEKrea2Blocks,
        MoLELTXBlocks,
        MoLEQwenImageBlocks,
        MoLEStableDiffusion3Blocks,
        MoLEStableDiffusionXLBlocks,
        MoLEWanBlocks,
        MoLEZImageBlocks,
    )

__version__ = "0.1.0"
__all__ = [
    "Activations",
    "EmojiWorld",
    "Expert",
    "GateConfig",
    "Mixture",
    "MoLEAttnProcessor",
    "MoLEChromaPipeline",
    "MoLEFlux2KleinBlocks",
    "MoLEFlux2KleinPipeline",
    "MoLEFlux2Pipeline",
    "MoLEFluxBlocks",
    "MoLEFluxControlPipeline",
    "MoLEFluxPipeline",
    "MoLEKrea2Blocks",
    "MoLEKrea2Pipeline",
    "MoLELTXBlocks",
    "MoLELTXPipeline",
    "MoLELumina2Pipeline",
    "MoLEPipeline",
    "MoLEQwenImageBlocks",
    "MoLEQwenImagePipeline",
    "MoLEStableDiffusion3Blocks",
    "MoLEStableDiffusion3Pipeline",
    "MoLEStableDiffusionControlNetImg2ImgPipeline",
    "MoLEStableDiffusionControlNetInpaintPipeline",
    "MoLEStableDiffusionControlNetPipeline",
    "MoLEStableDiffusionImg2ImgPipeline",
    "MoLEStableDiffusionInpaintPipeline",
    "MoLEStableDiffusionPipeline",
    "MoLEStableDiffusionXLBlocks",
    "MoLEStableDiffusionXLControlNetImg2ImgPipeline",
    "MoLEStableDiffusionXLControlNetInpaintPipeline",
    "MoLEStableDiffusionXLControlNetPipeline",
    "MoLEStableDiffusionXLImg2ImgPipeline",
    "MoLEStableDiffusionXLInpaintPipeline",
    "MoLEStableDiffusionXLPipeline",
    "MoLEWanBlocks",
    "MoLEWanPipeline",
    "MoLEZImageBlocks",
    "MoLEZImagePipeline",
    "PictureWarning",
    "RefusedFileError",
    "Strongest",
    "Trace",
    "attach",
    "attached",
    "detach",
    "emoji_world",
    "merge",
    "read_expert",
    "save_expert",
]

_MODULES = {
    "emoji.world": ("EmojiWorld", "emoji_world"),
    "gates": ("GateConfig",),
    "gates.transforms": ("Strongest",),
    "lora": ("Expert", "read_expert"),
    "lora.safe_files": ("RefusedFileError",),
    "lora.writing": ("save_expert",),
    "merging.activations": ("Activations",),
    "merging.merge": ("merge",),
    "mixture": ("Mixture", "attach", "attached", "detach"),
    "binding.picture_warning": ("PictureWarning",),
    "patching.install.gate_inputs": ("MoLEAttnProcessor",),
    "patching.gating.trace": ("Trace",),
    "pipelines.classes": tuple(name for name in __all__ if name.endswith("Pipeline")),
    "pipelines.modular": tuple(name for name in __all__ if name.endswith("Blocks")),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

if not TYPE_CHECKING:  # a type checker reads the imports above, and should know an unknown name

    def __getattr__(name: str) -> Any:
        """A public name, or a submodule such as `mole_diffusers.emoji`."""
        path = f"{__name__}.{_HOME.get(name, name)}"
        notices = logging.getLogger("transformers.utils.import_utils")
        notices.addFilter(_is_not_of_torchvision)
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
        finally:
            notices.removeFilter(_is_not_of_torchvision)
        globals()[name] = value = getattr(module, name) if name in _HOME else module
        return value


def _is_not_of_torchvision(record: logging.LogRecord) -> bool:
    """False for the notice that Pillow prepares pictures if torchvision is not installed, which changes nothing."""
    return "requires torchvision (not installed)" not in record.getMessage()


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
