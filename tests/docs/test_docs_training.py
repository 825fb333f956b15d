"""docs/training.md: every command runs, at tiny size, and what is launched elsewhere at least parses."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny import tiny_pipeline

from mole_cli.mole import NAMED, main, parser
from mole_diffusers.lora import read_expert
from mole_diffusers.training.config import BALANCE
from mole_diffusers.training.objectives import OBJECTIVES

TEXT = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def commands(language):
    """The words of every command in blocks of a language."""
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def tiny(tmp_path, loras, monkeypatch):
    """Flags that make a command small; of a flag given twice the last counts."""
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(tmp_path / "photos" / f"{i}.png")
    size = ["--base", "base", "--steps", "2", "--batch", "2"]
    experts = [f"--expert=fox={loras['fox']}", f"--expert=octopus={loras['hat']}", "--term", "collage,seeds=2,steps=2"]
    prior = ["--prior-count", "2", "--prior-steps", "1"]
    return {"train": [*size, *experts], "train-lora": [*size, *prior]}


@pytest.mark.thorough
def test_every_command_runs(tiny, tmp_path):
    found = commands("bash")
    assert [words[:2] for words in found] == [["mole", "train"]] * 3 + [["mole", "train-lora"]]
    for words in found:
        name = words[1]
        given = tiny[name] if "--config" not in words else []
        if "--validate" in words:  # its pictures need no twenty steps
            settings = yaml.safe_load(Path("run.yaml").read_text())
            settings["training"]["validation"] = {"steps": 1, "seeds": 1}
            Path("run.yaml").write_text(json.dumps(settings))
            given = [*given, "--validate", "1"]
        assert main([*words[1:], *given]) == 0
    for out in ("fox-and-octopus", "kept"):
        assert (tmp_path / out / "gates.safetensors").is_file()
    assert list((tmp_path / "kept").glob("validation/step-*.png"))
    assert len((tmp_path / "kept" / "log.jsonl").read_text().splitlines()) == 2
    assert read_expert(tmp_path / "sks-fox" / "sks-fox.safetensors").triggers == ("sks fox",)


def test_what_other_machines_are_needed_for_parses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").touch()  # the reader's own
    found = commands("sh")
    assert len(found) == 3
    for words in found:
        own = words[words.index("mole_cli") + 1 :] if words[0] == "accelerate" else words[1:]
        assert own[0] == "train"
        with parser(*NAMED).commands["train"].make_context("train", own[1:]) as context:
            assert context.params["expert"] or context.params["config"]


def test_every_term_and_flag_is_there():
    assert set(re.findall(r"^\| `(\w+)` \|", TEXT, re.MULTILINE)) == {*OBJECTIVES, BALANCE}
    flags = {flag for command in parser(*NAMED).commands.values() for option in command.params for flag in option.opts}
    flags |= {"--help"}  # of click itself
    launcher = {"--multi_gpu", "--num_processes", "--num_machines"}
    assert set(re.findall(r"--[a-z][a-z_-]+", TEXT)) - launcher - flags == set()
