"""Composing needs few packages: attach, draw and save work where only those and their own requirements are installed."""

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from tiers import thorough

ROOT = Path(__file__).parents[1]
NEEDED = ["torch", "diffusers", "transformers", "peft", "safetensors", "accelerate", "lazy_loader", "numpy", "pillow"]
EVALUATE = "krippendorff, matplotlib, open_clip, pandas, scipy, timm, torchmetrics, torchvision"
SCRIPT = """
import mole_diffusers as mole
import mole_world
from mole_world import emoji_world

pipe = emoji_world().pipe
files = mole_world.concept_files()
mixture = mole.attach(pipe, {"sunflower": files["sunflower"], "doughnut": (files["doughnut"], 0.8)}, gates="sum")
image = pipe("a sunflower and a doughnut", num_inference_steps=2, width=32, height=32).images[0]
image.save("picture.png")
mixture.save_pretrained("gates")
mixture.export_lora("one.safetensors")
mole.attach(pipe, {"one": "one.safetensors"})
mole.detach(pipe)
"""


def required(names):
    """These distributions and what they need, by name."""
    found, wanted = {}, [Requirement(name) for name in names]
    while wanted:
        each = wanted.pop()
        if each.name.lower() in found or each.marker and not each.marker.evaluate({"extra": ""}):
            continue
        try:
            found[each.name.lower()] = distribution(each.name)
        except PackageNotFoundError:
            continue
        wanted += map(Requirement, found[each.name.lower()].requires or [])
    return found


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A folder that holds these packages alone, for a Python that sees no other."""
    folder = tmp_path_factory.mktemp("bare")
    for each in required(NEEDED).values():
        for top in {Path(file).parts[0] for file in each.files or ()} - {"..", "__pycache__"}:
            place = Path(each.locate_file(top))
            if place.exists() and not (folder / top).exists():
                (folder / top).symlink_to(place)
    for part in ("mole_diffusers", "demos/app/mole_app", "demos/cli/mole_cli", "demos/emoji/mole_world"):
        shutil.copytree(ROOT / part, folder / Path(part).name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def run(folder, *command, cwd):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-S", *command], capture_output=True, text=True, cwd=cwd, env=environment)


def test_attach_draw_and_save_work_with_few_packages(bare, tmp_path):
    assert not {"pandas", "compel", "gradio", "matplotlib"} & {path.name for path in bare.iterdir()}
    done = run(bare, "-c", SCRIPT, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "torch_dtype" not in done.stderr
    made = {"picture.png", "one.safetensors", "gates"}
    assert {path.name for path in tmp_path.iterdir()} == made


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["evaluate"], f"mole evaluate: this needs {EVALUATE}: pip install 'mole-diffusers[evaluate]'"),
        (["app"], "mole app: this needs gradio: pip install 'mole-diffusers[app]'"),
        *thorough(
            (
                ["draw", "a (sunflower:1.3)"],
                "mole draw: weights in prompts need compel: pip install 'mole-diffusers[weights]'",
            )
        ),
    ],
)
def test_what_needs_more_says_which(bare, tmp_path, command, said):
    done = run(bare, "-m", "mole_cli", *command, cwd=tmp_path)
    assert (done.returncode, done.stderr.strip().splitlines()[-1]) == (1, said)
