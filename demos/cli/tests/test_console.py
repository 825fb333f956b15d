"""What the console shows: help at once, bars for what takes time, and nothing that other libraries say."""

import re
import subprocess
import sys

import pytest
from PIL import Image

import mole_diffusers as mole
import mole_world
from mole_cli.mole import main

SAID = "a fox: seed 0, 64 x 64 pixels\nfox at 1, everywhere: no other LoRA acts\n{}\n"  # of `mole draw`
SLOW = ("torch", "diffusers", "transformers", "matplotlib", "gradio")


def shell(code):
    """What a new Python prints to stdout and stderr."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout, run.stderr


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["evaluate", "--help"]])
def test_help_loads_no_model_library(argv):
    asked = f"from mole_cli.mole import main; import sys; assert main({argv}) == 0; "
    out, _ = shell(f"{asked}print([name for name in {SLOW} if name in sys.modules])")
    assert out.splitlines()[-1] == "[]"
    assert len(out.splitlines()) > 1


@pytest.mark.parametrize(
    ("argv", "hidden", "install"),
    [
        (["app"], "gradio", "mole-diffusers[app]"),
        (["draw", "--help"], "mole_app", "mole-diffusers"),
        (["evaluate", "--limit", "1"], "mole_world", "mole-diffusers[evaluate]"),
    ],
)
def test_a_command_whose_part_is_absent_says_what_to_install(argv, hidden, install):
    hide = f"import sys; sys.modules[{hidden!r}] = None; from mole_cli.mole import main; "
    out, err = shell(f"{hide}assert main(['--help']) == 0; print(main({argv}))")
    assert out.splitlines()[-1] == "1"
    assert f"pip install '{install}'" in err
    assert err.count("\n") == 1


def test_what_works_on_files_loads_no_model_library(loras, tmp_path):
    fox, ink = str(loras["fox"]), str(loras["ink"])
    asked = "from mole_cli.mole import main; import sys; "
    for argv in (["inspect", fox], ["merge", fox, ink, "--out", str(tmp_path / "one.safetensors")]):
        out, _ = shell(f"{asked}main({argv}); print([name for name in {SLOW} if name in sys.modules])")
        assert out.splitlines()[-1] == "['torch']"


MISSING = [
    ["merge", "ghost.safetensors", "b.safetensors"],
    *(["draw", "a fox <lora:ghost:1>", *words] for words in (
        ["--image", "ghost.png"], ["--preset", "ghost.png"], ["--loras", "ghost"], ["--expert", "ghost=ghost.safetensors"],
    )),
    ["redraw", "ghost.png"],
    ["grid", "a fox", "--image", "ghost.png"],
    ["compose", "a fox", "--expert", "fox=ghost.safetensors"],
    ["compose", "a fox", "--bind", "fox=fox@ghost.png"],
    *([*words, "--base", "ghost.safetensors"] for words in (["draw", "a fox"], ["compose", "a fox"], ["app"])),
    ["train", "--config", "ghost.yaml"],
    ["train", "--expert", "fox=ghost.safetensors", "--out", "x"],
    ["train-lora", "--data", "ghost", "--trigger", "x", "--out", "x"],
    ["index", "ghost"],
    ["retrieve", "a fox", "--library", "ghost"],
    ["compose-library", "a fox", "--library", "ghost"],
    ["evaluate", "--base", "x", "--expert", "a=ghost.safetensors"],
    ["evaluate", "--weights", "ghost.json"],
]  # fmt: skip


def test_a_file_that_is_missing_is_said_before_anything_is_loaded():
    asked = "from mole_cli.mole import main; import sys; "
    count = f"print([main(argv) for argv in {MISSING}].count(1), [name for name in {SLOW} if name in sys.modules])"
    out, err = shell(asked + count)
    assert out.splitlines()[-1] == f"{len(MISSING)} []"
    assert ["ghost" in line for line in err.splitlines()] == [True] * (len(MISSING))


def test_importing_the_package_loads_no_model_library():
    out, err = shell(f"import sys, mole_diffusers; print([name for name in {SLOW} if name in sys.modules])")
    assert (out, err) == ("[]\n", "")


def test_every_public_name_and_submodule_is_there():
    assert {name: getattr(mole, name).__name__ for name in mole.__all__} == {name: name for name in mole.__all__}
    assert {name for name in dir(mole) if not name.startswith("__")} == set(mole.__all__)
    assert mole.functional.gate_weights
    assert mole_world.words.BASE_STYLES
    with pytest.raises(AttributeError, match="No mole_diffusers attribute compose"):
        _ = mole.compose


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mole {mole.__version__}\n"


@pytest.mark.thorough
def test_other_libraries_are_silent_unless_asked(tmp_path):
    argv = ["draw", "a fox <lora:fox:1>", "--steps", "1", "--out", f"{tmp_path}/x.png"]
    out, err = shell(f"from mole_cli.mole import main; main({argv})")
    assert out == SAID.format(f"{tmp_path}/x.png")
    said = [line for line in re.split(r"[\r\n]+ *", err) if line and "%|" not in line]  # its own bar, if it took long
    assert said == ["emoji: StableDiffusionPipeline, cpu, float32"]
    assert "Loading" not in err


@pytest.mark.thorough
def test_other_libraries_speak_where_asked(tmp_path):
    argv = ["draw", "a fox <lora:fox:1>", "--steps", "1", "--out", f"{tmp_path}/x.png", "-v"]
    out, err = shell(f"from mole_cli.mole import main; main({argv})")
    assert out == SAID.format(f"{tmp_path}/x.png")
    assert "Loading pipeline components" in err
    assert not [word for word in ("torchvision", "torch_dtype", "deprecated") if word in err]


@pytest.mark.thorough
def test_our_own_warnings_are_one_line(tmp_path):
    for i in range(2):
        Image.new("RGB", (64, 64), (90 * i, 0, 0)).save(tmp_path / f"{i}.png")
    argv = ["train-lora", "--data", str(tmp_path), "--trigger", "sks", "--prompt", "a fox", "--steps", "1", "--batch", "1"]
    _, err = shell(f"from mole_cli.mole import main; main({[*argv, '--out', str(tmp_path / 'sks')]})")
    assert err.splitlines()[0] == "warning: the caption 'a fox' lacks the trigger 'sks', 2 do"
