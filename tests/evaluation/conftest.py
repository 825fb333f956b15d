import os

import pytest
import tiny_models
from protocol_parts import noise


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options for a folder of each model, with random weights."""
    folder, before = tmp_path_factory.mktemp("models"), os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(tiny_models.save_squeezenet(folder / "torch"))
    saved = {name: getattr(tiny_models, f"save_{name}")(folder / name) for name in ("clip", "dino", "detector")}
    yield {name: str(path) for name, path in saved.items()} | {"lpips": "squeeze"}
    os.environ.pop("TORCH_HOME")
    os.environ |= {"TORCH_HOME": before} if before else {}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """concept -> folder of its own pictures."""
    folders = {}
    for i, name in enumerate(("fox", "ink")):
        folders[name] = tmp_path_factory.mktemp(name)
        for j in range(2):
            noise(10 * i + j).save(folders[name] / f"{j}.png")
    return folders
