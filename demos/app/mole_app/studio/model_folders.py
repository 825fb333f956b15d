"""Where A1111, Forge, ComfyUI and SwarmUI keep which kind of file, in folders with upper or lower case names.

Importing this loads no torch, so that a missing base is said at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from mole_app.studio.names import WORLD, by_name, files_below, is_hub_id, known_names, matching, own_name, short_names

INDEX = "model_index.json"  # of a pipeline that diffusers saved
SAVED = "diffusion_pytorch_model.safetensors"  # of a model that diffusers saved
MODELS = "models"  # the folder of a program that has the folders of each kind
KINDS = {  # kind of file -> its folders, in lower case
    "base": ("stable-diffusion", "checkpoints", "diffusers", "diffusion_models", "unet"),
    "lora": ("lora", "loras", "lycoris"),
    "embedding": ("embeddings", "embedding"),
    "upscaler": ("upscale_models", "esrgan", "realesrgan", "swinir", "dat"),
    "vae": ("vae",),
    "controlnet": ("controlnet",),
    "ip_adapter": ("ipadapter", "ip-adapter", "ip_adapter", "controlnet"),
    "clip_vision": ("clip_vision", "controlnetpreprocessor"),
    "text_encoder": ("text_encoders", "text_encoder", "clip"),
}

KEYS = {"ip_adapter": "image_proj.", "clip_vision": "vision_model."}  # how keys of such files begin, and of no others


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

    A ControlNet may also be a folder that diffusers saved. A file's name is its own, or if two are the same, with the folder
    that it is in ("people/fox"). Raises ValueError if this is not a folder or has no such files.
    """
    if not (folder := Path(folder)).is_dir():
        raise ValueError(f"{folder} is {'a file' if folder.exists() else 'not there'}; give the folder of {kind} files")
    files = (file for root in places(folder, kind) or [folder] for file in files_below(root))
    alone = [file for file in files if file.suffix == ".safetensors" and _is_of(kind, file)]
    whole = [file.parent if kind == "controlnet" and is_saved(file) else file for file in alone]
    if not (found := by_name(whole, folder)):
        raise ValueError(f"no .safetensors files in {folder}")
    return found


def is_saved(file: Path) -> bool:
    """Whether a file is that of a folder that diffusers saved."""
    return file.name == SAVED and file.with_name("config.json").is_file()


def _is_of(kind: str, file: Path) -> bool:
    """Whether a file is of a kind, for the kinds that programs keep in one folder. Only its header is read."""
    if kind not in ("controlnet", *KEYS):
        return True
    from mole_diffusers.safe_files import read_header

    try:
        keys, _ = read_header(file)
    except (ValueError, OSError):
        return False
    return kind == next((own for own, start in KEYS.items() if any(key.startswith(start) for key in keys)), "controlnet")


def around(file: Path, kind: str) -> dict[str, Path]:
    """The files of a kind by name in the program that a checkpoint belongs to, in whose folder for checkpoints it is.

    {} if it belongs to no program, or that has no such files.
    """
    for up in file.absolute().parents:
        if places(up, "base") and places(up, kind):
            with suppress(ValueError):  # there are none
                return files_of(up, kind)
    return {}


def bases_in(folder: str | Path) -> dict[str, Path]:
    """The base models of a models folder by name: checkpoint files, and folders that diffusers saved.

    Args:
        folder: a models folder of A1111, Forge, ComfyUI or SwarmUI, the folder of the whole program, or any folder with
            checkpoints.
    """
    folder = Path(folder)
    known = places(folder, "base")
    files = [f for root in known for f in files_below(root)] if known else [*folder.glob("*"), *folder.glob("*/*")]
    saved = [file.parent for file in files if file.name == INDEX]
    alone = [f for f in files if f.suffix == ".safetensors" and not any(f.is_relative_to(s) for s in saved)]
    return by_name([*saved, *(f for f in alone if known or not is_lora(f))], folder)


def bases_of(given: Sequence[str]) -> dict[str, str]:
    """{name: what `open_base` takes} for these base models, in this order. A models folder stands for all models in it.

    Raises ValueError like `find_base`.
    """
    found: list[str] = []
    for base in given:
        inside = base != WORLD and Path(base).is_dir() and not (Path(base) / INDEX).is_file()
        models = list(bases_in(base).values()) if inside else []
        found += [str(model) for model in models] or [base if base == WORLD else str(find_base(base))]
    found = list(dict.fromkeys(found))
    return short_names({base: own_name(Path(base)) for base in found}, {base: base for base in found})


def find_base(base: str) -> Path | str:
    """The file or folder of a base model, or the text itself if it can only be a hub id.

    Raises ValueError for a models folder with several models or none, and for a name that is not in its models folder.
    """
    path = Path(base)
    if path.is_file() or (path / INDEX).is_file():
        return path
    if path.is_dir():
        models = bases_in(path)
        if len(models) == 1:
            return next(iter(models.values()))
        what = f"add the name of one of its {len(models)} models" if models else "it has no .safetensors checkpoint"
        raise ValueError(f"{base} is a folder of models; {what}{': ' + ', '.join(list(models)[:20]) if models else ''}")
    for folder in path.parents:
        if folder == path.parent and folder.is_dir() and str(folder) != "." or places(folder, "base"):
            models = bases_in(folder)
            name = path.relative_to(folder).as_posix().removesuffix(".safetensors")
            if (found := matching(name, models)) is not None:
                return models[found]
            raise ValueError(f"there is no model {name!r} in {folder}; {known_names(name, models)}")
    if not is_hub_id(base):
        raise ValueError(f"{base!r} is no file or folder here, and not a hub id such as OWNER/NAME")
    return base


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
    from mole_diffusers.lora import parse_key
    from mole_diffusers.safe_files import read_header

    try:
        shapes, _ = read_header(path)
        return bool(shapes) and bool(parse_key(next(iter(shapes))))
    except (ValueError, OSError):
        return False
