"""Where A1111, Forge, ComfyUI and SwarmUI keep which kind of file, in folders with upper or lower case names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from mole_diffusers.lora.keys import parse_key
from mole_diffusers.lora.safe_files import read_header
from mole_diffusers.studio.names import by_name, files_below, matching

MODELS = "models"  # the folder of a program that has the folders of each kind
KINDS = {  # kind of file -> its folders, in lower case
    "base": ("stable-diffusion", "checkpoints", "diffusers", "diffusion_models", "unet"),
    "lora": ("lora", "loras", "lycoris"),
    "embedding": ("embeddings", "embedding"),
    "upscaler": ("upscale_models", "esrgan", "realesrgan", "swinir", "dat"),
    "vae": ("vae",),
    "text_encoder": ("text_encoders", "text_encoder", "clip"),
}


def places(folder: Path, kind: str) -> list[Path]:
    """The folders of a kind in a models folder or in the folder of a whole program; [] if it is neither."""
    inside = [each for each in _folders(folder) if each.name.casefold() == MODELS]
    found = [each for up in (*inside, folder) for each in _folders(up) if each.name.casefold() in KINDS[kind]]
    return sorted(found, key=lambda each: (each.parent == folder, each.name))


def _folders(folder: Path) -> Iterator[Path]:
    try:
        yield from (each for each in folder.iterdir() if each.is_dir())
    except OSError:  # it is not there, or not for us to read
        return


def files_of(folder: str | Path, kind: str) -> dict[str, Path]:
    """{name: path} of the safetensors files below a folder; of a models folder or a program's, below its folders of a kind.

    A file's name is its own, or if two are the same, with the folder that it is in ("people/fox"). Raises ValueError if this
    is not a folder or has no such files.
    """
    if not (folder := Path(folder)).is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; give the folder of {kind} files")
    files = (file for root in places(folder, kind) or [folder] for file in files_below(root))
    if not (found := by_name((file for file in files if file.suffix == ".safetensors"), folder)):
        raise ValueError(f"no .safetensors files in {folder}")
    return found


def around(file: Path, kind: str) -> dict[str, Path]:
    """The files of a kind by name in the program that a checkpoint belongs to, in whose folder for checkpoints it is.

    {} if it belongs to no program, or that has no such files.
    """
    for up in file.absolute().parents:
        if places(up, "base") and places(up, kind):
            with suppress(ValueError):  # there are none
                return files_of(up, kind)
    return {}


def loras_beside(bases: Iterable[Path]) -> dict[str, Path]:
    """The LoRA files by name that belong to checkpoints: those of their programs, otherwise those in their own folders."""
    files: dict[str, Path] = {}
    for base in bases:
        folder = base.absolute().parent
        own = around(base, "lora") or by_name((file for file in folder.glob("*.safetensors") if is_lora(file)), folder)
        for name, path in own.items():
            if path not in files.values():
                is_new = matching(name, files) is None
                files[name if is_new else path.with_suffix("").as_posix()] = path
    return files


def is_lora(path: Path) -> bool:
    """Whether a file has the keys of a LoRA. Only its header is read."""
    try:
        shapes, _ = read_header(path)
        return bool(shapes) and bool(parse_key(next(iter(shapes))))
    except (ValueError, OSError):
        return False
