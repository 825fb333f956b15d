"""Training: gates over finished LoRAs, from prompts or pictures, and concept LoRAs from pictures."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mole_diffusers.training.clip import Clip, read_clip
    from mole_diffusers.training.config import GateTraining, LoraTraining, Validation
    from mole_diffusers.training.data import Samples, TrainingData, read_folder
    from mole_diffusers.training.gate_trainer import mean_losses, train_gates
    from mole_diffusers.training.latents import encode
    from mole_diffusers.training.lora_adapter import save_lora
    from mole_diffusers.training.lora_trainer import class_samples, train_lora

# Those with the fewest imports come first.
_FILES = ("config", "data", "latents", "clip", "lora_adapter", "gate_trainer", "lora_trainer")
__all__ = [
    "Clip",
    "GateTraining",
    "LoraTraining",
    "Samples",
    "TrainingData",
    "Validation",
    "class_samples",
    "encode",
    "mean_losses",
    "read_clip",
    "read_folder",
    "save_lora",
    "train_gates",
    "train_lora",
]


def __getattr__(name: str) -> Any:
    """Import names on first use, so that a config is read without loading diffusers."""
    modules = (import_module(f"{__name__}.{file}") for file in _FILES) if name in __all__ else ()
    for module in modules:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
