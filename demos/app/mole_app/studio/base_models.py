"""`open_base`: load a base model from a checkpoint file, a folder or a hub id, and put it on this machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.loaders.single_file_utils import (
    DIFFUSERS_DEFAULT_PIPELINE_PATHS,
    SingleFileComponentError,
    infer_diffusers_model_type,
)
from safetensors.torch import load_file

from mole_app.studio.checkpoint_config import (
    LACKS,
    PIPELINES,
    T5_FILES,
    T5_XXL,
    Shapes,
    configs,
    holds_t5,
    models,
    scheduler,
    tokenizers,
)
from mole_app.studio.memory import Memory, place
from mole_app.studio.model_folders import INDEX, find_base
from mole_app.studio.names import WORLD
from mole_app.studio.parts_beside import parts_beside
from mole_diffusers import denoiser
from mole_diffusers.safe_files import pipeline_class, read_header

DENOISER = ("model.diffusion_model.", "joint_blocks.", "double_blocks.")  # how the keys of a denoiser begin
# What diffusers and transformers raise for a checkpoint that is built in another way.
BROKEN = (SingleFileComponentError, ValueError, ImportError, RuntimeError, TypeError, LookupError, ZeroDivisionError)
UNCHECKED = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
GUIDANCE = {"StableDiffusion3": 5.0, "Flux": 3.5}  # start of a pipeline class's name -> its usual guidance


@dataclass(frozen=True)
class Base:
    """An open base model.

    Attributes:
        name: the name that it was opened by; for a file in a models folder, its path.
        memory: how the pipeline was put on this machine.
        config: where the config of a checkpoint came from, if that was given.
    """

    pipe: Any
    name: str
    memory: Memory
    config: str | None = None

    def __str__(self) -> str:
        return f"{self.name}: {type(self.pipe).__name__}, {self.memory}"


def open_base(base: str, *, config: str | Path | None = None, memory: Memory | None = None) -> Base:
    """Load a base model.

    Args:
        base: "emoji" for the embedded world, a .safetensors checkpoint, a folder that diffusers saved, or a hub id. A
            models folder of A1111, Forge, ComfyUI or SwarmUI works if it has only one model. Otherwise add the name of a
            checkpoint in it, in any case: "ComfyUI/models/dreamshaper".
        config: only for checkpoints, which hold weights but no config. By default it is read from the shapes of the weights,
            and nothing is downloaded. Give a folder that diffusers saved for the same kind of model (its weights are not
            needed), or a hub id, for a model that is built in another way. If it reads prompts with T5, and is not in the
            folder of ComfyUI, SwarmUI or Forge, give at least the folder of T5's tokenizer.
        memory: how to put it on this machine; by default, whatever fits.

    Raises:
        ValueError: for a pickle, a file that is not a checkpoint or lacks parts, an unknown name, or a config for what has
            its own. The message lists the names that are there.
    """
    memory = memory or Memory()
    memory.check_device()
    found = base if base == WORLD else find_base(base)
    if config is not None and not Path(found).is_file():
        raise ValueError(f"{base} has a config of its own: leave out --base-config, which is for checkpoint files")
    if base == WORLD:
        from mole_world.world import emoji_world

        memory = replace(memory, dtype=memory.dtype or "float32").completed("StableDiffusionPipeline")
        pipe = emoji_world(dtype=memory.torch_dtype).pipe
        return Base(pipe, base, place(pipe, memory))
    if isinstance(found, Path) and found.is_file():
        pipe, memory = _open_file(found, config, memory)
    else:
        pipe, memory = _open_saved(str(found), memory)
    return Base(pipe, str(found), place(pipe, memory), None if config is None else str(config))


def usual_guidance(pipe: Any, name: str) -> float:
    """The guidance that a base model is usually drawn with."""
    kind = type(pipe).__name__
    return 3.0 if name == WORLD else next((value for start, value in GUIDANCE.items() if kind.startswith(start)), 7.0)


def usual_size(pipe: Any, name: str, prompt: str) -> tuple[int, int]:
    """The width and height in pixels at which a base model usually draws a prompt; the prompt may have tags.

    In the embedded world they grow with the number of subjects.
    """
    if name == WORLD:
        from mole_world import canvas

        return canvas(re.sub("<[^>]*>", "", prompt))
    network: Any = denoiser(pipe)
    side = getattr(pipe, "default_sample_size", None) or network.config.sample_size
    return (int(side * pipe.vae_scale_factor),) * 2


def checkpoint_kind(shapes: Mapping[str, tuple[int, ...]], name: str) -> str:
    """The kind of a checkpoint with tensors of these shapes: a key of PIPELINES, which are diffusers' names.

    Raises ValueError for anything else.
    """
    with torch.device("meta"):
        kind = infer_diffusers_model_type({key: torch.empty(shape) for key, shape in shapes.items()})
    if kind not in PIPELINES or not any(key.startswith(DENOISER) for key in shapes):
        is_other = kind != "v1" and kind in DIFFUSERS_DEFAULT_PIPELINE_PATHS
        what = f"it looks like {kind}" if is_other else "it has no denoiser"
        raise ValueError(f"{name} is not a checkpoint of Stable Diffusion 1.5, 2.1, XL, 3 or Flux: {what}")
    return kind


def _open_file(path: Path, config: str | Path | None, memory: Memory) -> tuple[Any, Memory]:
    shapes, metadata = read_header(path)
    kind = checkpoint_kind(shapes, path.name)
    memory = memory.completed(PIPELINES[kind])
    make, t5 = getattr(diffusers, PIPELINES[kind]), None if config is None else Path(config)
    try:
        if t5 is None or (t5.is_dir() and not (t5 / INDEX).is_file()):
            if t5 is not None and not holds_t5(t5):
                neither = f"{t5} is neither a folder that diffusers saved nor one of T5's tokenizer"
                raise ValueError(f"{neither}, with its {' or '.join(T5_FILES)}")
            tensors = load_file(path)
            for keys, file in parts_beside(path, shapes, kind).items():
                tensors |= {keys + key: tensor for key, tensor in load_file(file).items()}
            shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
            pipe = make(
                **_t5_lacking(shapes, kind),
                **(UNCHECKED if kind in ("v1", "v2") else {}),
                **tokenizers(shapes, kind, path, t5),
                **models(tensors, configs(shapes, kind), memory.torch_dtype),
                scheduler=scheduler(shapes, metadata, kind),
            )
        else:
            pipe = make.from_single_file(str(path), dtype=memory.torch_dtype, config=str(t5), **_t5_lacking(shapes, kind))
    except OSError as error:  # also raised if the hub cannot be reached
        source = "it" if config is None else f"its --base-config {config}"
        raise ValueError(f"{path.name} cannot be opened, since {source} cannot be read here: {_why(error)}") from error
    except BROKEN as error:
        raise ValueError(f"{path.name} cannot be opened as a {PIPELINES[kind]}: {_why(error)}") from error
    for part in (each for each in pipe.components.values() if isinstance(each, torch.nn.Module)):
        part.eval()  # diffusers leaves T5 in training mode, and its dropout would change every picture
        if tie := getattr(part, "tie_weights", None):  # T5 has one matrix under two names; a file has only one of them
            tie()  # type: ignore[operator]
    return pipe, memory


def _t5_lacking(shapes: Shapes, kind: str) -> dict[str, None]:
    """T5 and its tokenizer, which a checkpoint of SD 3 may lack."""
    is_whole = not kind.startswith("sd3") or any(key.startswith(T5_XXL) for key in shapes)
    return {} if is_whole else dict.fromkeys(("text_encoder_3", "tokenizer_3"))


def _why(error: Exception) -> str:
    """What an error of opening a checkpoint says, in one line."""
    if isinstance(error, SingleFileComponentError):
        lacking = re.search(r"^(\w+) = ", str(error), re.MULTILINE)
        return LACKS.format(lacking[1] if lacking else "text encoders or the VAE")
    if isinstance(error, NotImplementedError):  # of moving a tensor that has no data
        return "some of its weights are missing"
    if isinstance(error, LookupError):
        return f"it is built in another way ({error})"
    return str(error).strip().partition("\n")[0]


def _open_saved(source: str, memory: Memory) -> tuple[Any, Memory]:
    """A folder that diffusers saved, or a hub id."""
    try:
        index = diffusers.DiffusionPipeline.load_config(source)
        memory = memory.completed(pipeline_class(index, source))
        lacking = {name: None for name, kind in index.items() if kind == [None, None]}  # for example SD 3 without T5
        loading = diffusers.DiffusionPipeline.from_pretrained
        return loading(source, dtype=memory.torch_dtype, use_safetensors=True, **lacking), memory
    except OSError as error:
        here = Path(source).is_dir()
        why = str(error).strip().splitlines()[0] if here else "the hub has no such model, or cannot be reached"
        raise ValueError(f"{source} cannot be opened as a base model: {why}") from error
