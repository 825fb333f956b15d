"""Folders of ComfyUI, Forge, A1111 and SwarmUI, and folders of one's own: which models and which LoRAs are found there."""

import shutil

import pytest

from mole_app.studio.model_folders import around, bases_in, files_of, find_base, loras_beside, places
from mole_cli.app import first_that_opens
from mole_cli.common import open_catalog

LAYOUTS = {  # program -> folders of its checkpoints, LoRAs and embeddings
    "ComfyUI": ("models/checkpoints/sd15", "models/loras/people", "models/embeddings"),
    "forge": ("models/Stable-diffusion", "models/Lora", "embeddings"),
    "SwarmUI": ("Models/Stable-Diffusion", "Models/Lora", "Models/Embeddings"),
    "linked": ("models/checkpoints", "models/loras", "models/embeddings"),
}


@pytest.fixture(params=LAYOUTS)
def program(request, loras, tmp_path):
    """The folder of a program with the checkpoint "Dream" (nothing is in it), the LoRA "fox" and an embedding."""
    root, real = tmp_path / request.param, tmp_path / "drive"
    for folder, name in zip(LAYOUTS[request.param], ("Dream", "fox", "easy"), strict=True):
        (root / folder).mkdir(parents=True)
        file = root / folder / f"{name}.safetensors"
        if request.param == "linked":
            real.mkdir(exist_ok=True)
            file.symlink_to(real / file.name)
            file = real / file.name
        shutil.copy(loras["fox"], file)
    return root


def test_what_a_program_has_is_found_from_its_folder_its_models_or_a_checkpoint(program):
    models = next(each for each in program.iterdir() if each.name.lower() == "models")
    for folder in (program, models):
        assert list(bases_in(folder)) == ["Dream"]
        assert find_base(str(folder)) == find_base(str(folder / "dream")) == bases_in(folder)["Dream"]
        assert list(files_of(folder, "lora")) == ["fox"]
        assert list(open_catalog([str(folder)], {}).loras) == ["fox"]
    checkpoint = find_base(str(models / "dream"))
    assert list(loras_beside([checkpoint])) == list(around(checkpoint, "lora")) == ["fox"]
    assert list(around(checkpoint, "embedding")) == ["easy"]
    assert around(checkpoint, "upscaler") == {}


def test_a_folder_of_ones_own_may_have_all_in_one_place(loras, tmp_path):
    (tmp_path / "Dream.safetensors").write_text("not read yet")
    shutil.copy(loras["fox"], tmp_path / "fox.safetensors")
    assert list(bases_in(tmp_path)) == ["Dream"]
    assert list(open_catalog([str(tmp_path / "dream")], {}).loras) == ["fox"]
    assert places(tmp_path / "nowhere", "base") == []


def test_loras_of_one_name_in_two_programs_are_both_there(loras, tmp_path):
    bases = []
    for program in ("a", "b"):
        for folder in ("checkpoints", "loras"):
            (tmp_path / program / folder).mkdir(parents=True)
        bases.append(tmp_path / program / "checkpoints" / "Dream.safetensors")
        bases[-1].touch()
        shutil.copy(loras["fox"], tmp_path / program / "loras" / "fox.safetensors")
    found = loras_beside([*bases, bases[0]])
    assert found == {
        "fox": tmp_path / "a" / "loras" / "fox.safetensors",
        (tmp_path / "b" / "loras" / "fox").as_posix(): tmp_path / "b" / "loras" / "fox.safetensors",
    }


def test_the_app_starts_with_the_first_model_that_opens(capsys):
    def opening(name):
        if name.startswith("bad"):
            raise ValueError(f"{name} cannot be opened")
        return name

    assert first_that_opens(["bad one", "bad two", "good", "bad three"], opening) == "good"
    notes = capsys.readouterr().err
    assert "bad one cannot be opened" in notes
    assert "three" not in notes
    with pytest.raises(ValueError, match="bad two cannot"):
        first_that_opens(["bad one", "bad two"], opening)
