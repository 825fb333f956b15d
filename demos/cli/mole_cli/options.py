"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mole_cli.console import quiet_unless

Prompt = Annotated[str, Argument(help="what to draw.")]
Experts = Annotated[
    list[str], Option(metavar="NAME=FILE[:STRENGTH]", help="a LoRA file and the name you give it. Repeatable.")
]
Verbose = Annotated[
    bool,
    Option("--verbose", "-v", callback=quiet_unless, help="show warnings, notices and loading bars of other libraries."),
]
AsJson = Annotated[bool, Option("--json", help="print the result as JSON.")]
Out = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        show_default=False,
        help="where the result goes. Default: a new file here, named by its kind, as grid.png, merged.safetensors or, if "
        "that is there already, grid-2.png.",
    ),
]
Overwrite = Annotated[bool, Option("--overwrite", help="replace a file that exists.")]
Negative = Annotated[str | None, Option(show_default=False, help="what should not be in the picture.")]
Prompt2 = Annotated[
    str | None,
    Option(
        show_default=False,
        help="what the second text encoder of SDXL, SD 3 or Flux reads, without tags. Default: the same as the first.",
    ),
]
Negative2 = Annotated[str | None, Option(show_default=False, help="the negative prompt for that encoder.")]
Steps = Annotated[int | None, Option(min=1, max=150, show_default="20", help="steps of the sampler: more take longer.")]
Guidance = Annotated[
    float | None,
    Option(
        min=0.0,
        max=50.0,
        show_default=False,
        help="how strictly to follow the prompt. Default: 7; Flux 3.5, Stable Diffusion 3 5, the emoji world 3.",
    ),
]
Width = Annotated[
    int | None,
    Option(
        show_default=False,
        help="pixels, rounded to what the base can draw. Default: the size that the base was trained at (in the embedded "
        "world, that for so many subjects), or that of the picture to draw over.",
    ),
]
Height = Annotated[
    int | None,
    Option(
        show_default=False,
        help="pixels, rounded to what the base can draw. Default: the size that the base was trained at (in the embedded "
        "world, that for so many subjects), or that of the picture to draw over.",
    ),
]
Sampler = Annotated[
    str | None,
    Option(
        show_default=False,
        help="Euler a, DPM++ 2M Karras, UniPC, LCM, ...; a wrong name lists all. Default: the base's own.",
    ),
]
Device = Annotated[
    str | None,
    Option(
        show_default=False,
        rich_help_panel="The base model on this machine",
        help="cpu, cuda, cuda:1, mps, ... Default: a GPU if there is one.",
    ),
]
BaseConfig = Annotated[
    str | None,
    Option(
        metavar="FOLDER",
        show_default=False,
        rich_help_panel="The base model on this machine",
        help="for a checkpoint that is built in another way than its kind: a diffusers folder of the same kind of "
        "model (its "
        "weights are not needed), or a hub id. For T5, the folder of its tokenizer is enough. Default: read from the "
        "checkpoint.",
    ),
]
Compiled = Annotated[
    bool,
    Option(
        "--compile",
        rich_help_panel="The base model on this machine",
        help="compile the model: the first picture takes minutes, later ones are faster.",
    ),
]
Dtype = Annotated[
    str | None,
    Option(
        show_default=False,
        rich_help_panel="The base model on this machine",
        help="float32, float16 or bfloat16. Default: float32 on a CPU; on a GPU bfloat16 for Flux and SD 3, else float16.",
    ),
]
Offload = Annotated[
    str | None,
    Option(
        show_default=False,
        rich_help_panel="The base model on this machine",
        help="what waits in main memory until it is used: none, model (whole models) or sequential (single layers, which is "
        "slow). Default: the first that fits into the GPU's free memory.",
    ),
]
Slicing = Annotated[
    bool | None,
    Option(
        show_default="False",
        rich_help_panel="The base model on this machine",
        help="compute attention head by head: less memory, more time.",
    ),
]
Tiling = Annotated[
    bool | None,
    Option(
        show_default=False,
        rich_help_panel="The base model on this machine",
        help="decode large pictures in tiles. Default: if the GPU's memory is short.",
    ),
]
Base = Annotated[
    str,
    Option(
        metavar="MODEL",
        help="a .safetensors checkpoint, a folder that diffusers saved, a models folder of A1111, Forge, ComfyUI or SwarmUI "
        "followed by the name of a model in it (models/dreamshaper), or a hub id; emoji is the world in this package.",
    ),
]
IndexBase = Annotated[
    str | None,
    Option(
        metavar="MODEL",
        show_default="emoji",
        help="a .safetensors checkpoint, a folder that diffusers saved, a models folder of A1111, Forge, ComfyUI or SwarmUI "
        "followed by the name of a model in it (models/dreamshaper), or a hub id; emoji is the world in this package.",
    ),
]
FirstSeed = Annotated[int, Option(min=-1, help="seed of the first row, -1 for a random one; each further row adds 1.")]
Rows = Annotated[int, Option(min=1, help="pictures per column, each with its own seed.")]
Loras = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        show_default=False,
        help="LoRA files that tags may name, in subfolders too. If two have the same name, write people/fox and "
        "animals/fox. "
        "The emoji world has its own. Default: those of the program or the folder that the base is in.",
    ),
]
Embeddings = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        show_default=False,
        help="textual inversions, which a prompt names as embedding:NAME. Default: those of the program that "
        "the base is in.",
    ),
]
Upscalers = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        show_default=False,
        help="models that enlarge pictures, such as ESRGAN's. Default: those of the program that the base is in.",
    ),
]
Controlnets = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        show_default=False,
        help="ControlNets. Default: those of the program that the base is in.",
    ),
]
IpAdapters = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        show_default=False,
        help="IP-Adapters. Default: those of the program that the base is in.",
    ),
]
ImageEncoders = Annotated[
    Path | None,
    Option(
        metavar="FOLDER",
        exists=True,
        file_okay=False,
        show_default=False,
        help="what IP-Adapters read a picture with. Default: clip_vision of the program that the base is in.",
    ),
]
Trained = Annotated[
    Path | None,
    Option(metavar="FOLDER", exists=True, file_okay=False, help="trained gates that you may name, one folder each."),
]
MoreExperts = Annotated[list[str], Option(metavar="NAME=FILE", help="one more LoRA file that tags may name. Repeatable.")]
Image = Annotated[
    Path | None,
    Option(
        metavar="PICTURE",
        exists=True,
        dir_okay=False,
        rich_help_panel="Given pictures",
        help="a picture to draw over (img2img).",
    ),
]
Mask = Annotated[
    Path | None,
    Option(
        metavar="PICTURE",
        exists=True,
        dir_okay=False,
        rich_help_panel="Given pictures",
        help="white where --image is drawn over (inpainting).",
    ),
]
Control = Annotated[
    Path | None,
    Option(
        metavar="PICTURE",
        exists=True,
        dir_okay=False,
        rich_help_panel="Given pictures",
        help="a control map: edges, depths, a pose, ... as its ControlNet reads them.",
    ),
]
Reference = Annotated[
    Path | None,
    Option(
        metavar="PICTURE",
        exists=True,
        dir_okay=False,
        rich_help_panel="Given pictures",
        help="a picture that an IP-Adapter reads.",
    ),
]
Controlnet = Annotated[
    str | None,
    Option(
        show_default=False,
        rich_help_panel="Given pictures",
        help="the ControlNet that a control map is for, by the name of its file; for Stable Diffusion 1.x, 2.x and XL.",
    ),
]
ControlStrength = Annotated[
    float | None,
    Option(min=0.0, max=2.0, show_default="1.0", rich_help_panel="Given pictures", help="how much the map counts."),
]
ControlEnd = Annotated[
    float | None,
    Option(
        min=0.05,
        max=1.0,
        show_default="1.0",
        rich_help_panel="Given pictures",
        help="the share of the steps after which it counts no more.",
    ),
]
IpAdapter = Annotated[
    str | None,
    Option(
        show_default=False,
        rich_help_panel="Given pictures",
        help="the IP-Adapter that reads a reference picture, by the name of its file; for the same bases.",
    ),
]
IpScale = Annotated[
    float | None,
    Option(
        min=0.0, max=2.0, show_default="0.6", rich_help_panel="Given pictures", help="how much the reference picture counts."
    ),
]
Strength = Annotated[
    float | None,
    Option(
        min=0.0,
        max=1.0,
        show_default="0.6",
        rich_help_panel="Given pictures",
        help="how much of that picture to redraw: the fraction of the steps that run.",
    ),
]
Hires = Annotated[
    float | None,
    Option(
        min=1.0,
        max=4.0,
        show_default="1.0",
        rich_help_panel="Given pictures",
        help="enlarge the picture by this factor, and draw over it once more.",
    ),
]
HiresStrength = Annotated[
    float | None,
    Option(
        min=0.0,
        max=1.0,
        show_default="0.5",
        rich_help_panel="Given pictures",
        help="how much of the enlarged picture to redraw.",
    ),
]
Upscaler = Annotated[
    str | None,
    Option(
        show_default=False,
        rich_help_panel="Given pictures",
        help="the model that enlarges the picture, by the name of its file. Default: its pixels are interpolated.",
    ),
]
Preset = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        help="a recipe, or a picture with one inside, whose size, steps, sampler and the like are used where you give none.",
    ),
]
Style = Annotated[
    list[str], Option(metavar="NAME", help="words from the file of styles, put around the prompt. Repeatable.")
]
Styles = Annotated[
    Path | None,
    Option(
        metavar="FILE",
        exists=True,
        dir_okay=False,
        show_default=False,
        help="styles.csv of A1111 or Forge, or a .json of Fooocus. Default: styles.csv here.",
    ),
]
RecipeSeed = Annotated[
    int | None,
    Option(show_default="0", help="the same seed gives the same picture, whatever the device; -1 is a random one."),
]
Gates = Annotated[
    str | None,
    Option(
        show_default=False,
        help="trained gates by name or folder, sum or mean. Default: auto, your own gates for these LoRAs if there are any, "
        "else sum.",
    ),
]
Binding = Annotated[
    str | None,
    Option(
        show_default=False,
        help="bound: each LoRA acts on its own words and in its own place; tiles: in some steps each subject is also drawn "
        "by itself in its place; auto: tiles if each has room, else bound; none: every LoRA acts everywhere. Default: "
        "auto.",
    ),
]
Detail = Annotated[
    float | None,
    Option(
        min=0.0,
        max=1.0,
        show_default="0.0",
        help="draw each subject's place in the finished picture once more, enlarged, and redraw this much of it: 0.2 to 0.3 "
        "sharpens faces; 0 leaves it out.",
    ),
]
ClipSkip = Annotated[
    int | None,
    Option(
        min=1,
        max=12,
        show_default="1",
        help="the last layer of the text encoder to read, counted from the end as in A1111; many checkpoints for drawings "
        "want 2. For Stable Diffusion 1.x and 2.x.",
    ),
]
TrainedBase = Annotated[
    str | None, Option(metavar="MODEL", show_default=False, help="as in the other commands. Default: emoji.")
]
RunFolder = Annotated[Path | None, Option(metavar="FOLDER", help="the result, checkpoints and the log go here.")]
Config = Annotated[
    Path | None,
    Option(metavar="FILE", exists=True, dir_okay=False, help="a YAML or JSON file with any settings; options override it."),
]
WriteConfig = Annotated[
    Path | None, Option(metavar="FILE", help="write the settings that you gave as YAML or JSON to a new file, and stop.")
]
Resume = Annotated[
    str | None, Option(metavar="latest|checkpoint-N", help="continue the run in --out; latest also starts a new one.")
]
Accumulation = Annotated[
    int | None,
    Option(show_default="1", rich_help_panel="How to train", help="compute a batch in this many parts, for less memory."),
]
TrainingSeed = Annotated[
    int | None, Option(show_default="0", rich_help_panel="How to train", help="seed of all random choices.")
]
Precision = Annotated[
    Literal["no", "bf16", "fp16"] | None,
    Option(
        show_default="no",
        rich_help_panel="How to train",
        help='"no", "bf16" or "fp16" (with loss scaling) for the forward pass; what is trained stays fp32.',
    ),
]
Checkpointing = Annotated[
    bool | None,
    Option(
        show_default="False",
        rich_help_panel="How to train",
        help="compute activations again in the backward pass, for less memory and more time.",
    ),
]
Keep = Annotated[int | None, Option(show_default="2", rich_help_panel="How to train", help="how many checkpoints to keep.")]
Encoder = Annotated[
    str | None,
    Option(
        metavar="MODEL",
        show_default=False,
        help="a sentence-transformers model that reads texts. Default: the text encoder of --base.",
    ),
]
Library = Annotated[
    Path, Option(metavar="FOLDER", exists=True, file_okay=False, help="a folder that `mole index` has indexed.")
]
K = Annotated[
    int, Option(min=1, help="find at most this many LoRAs. LoRAs whose trigger words are in the prompt always count.")
]
Threshold = Annotated[float, Option(help="similarity that a LoRA needs if its trigger words are not in the prompt.")]

DRAWING = ("negative", "prompt_2", "negative_2", "steps", "guidance", "sampler", "width", "height")  # of a recipe
