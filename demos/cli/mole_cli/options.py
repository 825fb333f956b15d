"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from mole_app.studio.names import WORLD
from mole_cli.commands import Group, settings_of
from mole_cli.declared import declared

Base = Annotated[
    str,
    Option(
        metavar="MODEL",
        help="a .safetensors checkpoint, a folder that diffusers saved, a models folder of A1111, Forge, ComfyUI or SwarmUI "
        "followed by the name of a model in it (models/dreamshaper), or a hub id; emoji is the world in this package.",
    ),
]
Experts = Annotated[Sequence[str], Option(metavar="NAME=FILE[:STRENGTH]", help="a LoRA file and the name you give it.")]
File = Annotated[Path | None, Option(exists=True, dir_okay=False)]
Folder = Annotated[Path | None, Option(exists=True, file_okay=False)]
FileOrFolder = Annotated[Path | None, Option(exists=True)]
Steps = Annotated[int, Option(min=1, help="steps of the sampler: more take longer.")]
Seed = Annotated[int, Option(min=-1)]
AtLeastOne = Annotated[int, Option(min=1)]


@dataclass
class Machine(Group):
    """Where and how a base is opened.

    Attributes:
        device: cpu, cuda, cuda:1, mps, ... Default: a GPU if there is one.
        base_config (FOLDER): for a checkpoint that is built in another way than its kind: a diffusers folder of the same
            kind of model (its weights are not needed), or a hub id. For T5, the folder of its tokenizer is enough.
            Default: read from the checkpoint.
    """

    panel = "The base model on this machine"
    device: str | None = None
    base_config: str | None = None


@settings_of(declared("mole_app/studio/memory.py")["Memory"], without=("device", "compiled"))
class Opening(Machine):
    """How a base is loaded.

    Attributes:
        compiled: compile the model: the first picture takes minutes, later ones are faster.
    """

    panel = "The base model on this machine"
    compiled: Annotated[bool, Option("--compile")] = False


@dataclass
class Files(Group):
    """LoRAs and gates that prompts and recipes may name.

    Attributes:
        loras (FOLDER): LoRA files that tags may name, in subfolders too. If two have the same name, write people/fox and
            animals/fox. The emoji world has its own. Default: those of the program or the folder that the base is in.
        trained (FOLDER): trained gates that you may name, one folder each.
        embeddings (FOLDER): textual inversions, which a prompt names as embedding:NAME. Default: those of the program that
            the base is in.
        upscalers (FOLDER): models that enlarge pictures, such as ESRGAN's. Default: those of the program that the
            base is in.
        controlnets (FOLDER): ControlNets. Default: those of the program that the base is in.
        ip_adapters (FOLDER): IP-Adapters. Default: those of the program that the base is in.
        image_encoders (FOLDER): what IP-Adapters read a picture with. Default: clip_vision of the program that the base is
            in.
    """

    loras: Folder = None
    embeddings: Folder = None
    upscalers: Folder = None
    controlnets: Folder = None
    ip_adapters: Folder = None
    image_encoders: Folder = None
    trained: Folder = None


@dataclass
class Studio(Opening, Files):
    """A base with the LoRAs and gates that prompts and recipes may name.

    Attributes:
        expert (NAME=FILE): one more LoRA file that tags may name.
    """

    base: Base = WORLD
    expert: Sequence[str] = ()


@dataclass
class Output(Group):
    """Where the result goes.

    Attributes:
        out (FILE): where the result goes. Default: a new file here, named by its kind, as grid.png, merged.safetensors or,
            if that is there already, grid-2.png.
        overwrite: replace a file that exists.
    """

    out: Path | None = None
    overwrite: bool = False


RECIPE = declared("mole_app/studio/recipe.py")["Recipe"]
DRAWING = ("negative", "prompt_2", "negative_2", "steps", "guidance", "sampler", "width", "height")


@settings_of(RECIPE, only=DRAWING)
class Drawing(Group):
    """How pictures are drawn.

    Attributes:
        guidance: how strictly to follow the prompt. Default: 7; Flux 3.5, Stable Diffusion 3 5, the emoji world 3.
    """


@dataclass
class Pictures(Group):
    """The pictures that a picture is made with.

    Attributes:
        image (PICTURE): a picture to draw over (img2img).
        mask (PICTURE): white where --image is drawn over (inpainting).
        control (PICTURE): a control map: edges, depths, a pose, ... as its ControlNet reads them.
        reference (PICTURE): a picture that an IP-Adapter reads.
    """

    panel = "Given pictures"
    image: File = None
    mask: File = None
    control: File = None
    reference: File = None
