"""The `mole` command, as a user calls it."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_diffusers import emoji_world, merge, read_expert
from mole_diffusers.cli import main
from mole_diffusers.cli.common import parse_expert
from mole_diffusers.testing import tiny_pipeline


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


def test_inspect_reports_each_file(loras, base, capsys):
    assert main(["inspect", str(loras["fox"]), str(loras["ink"]), "--base", base, "--json"]) == 0
    fox, ink = json.loads(capsys.readouterr().out)
    assert (fox["format"], fox["ranks"], fox["matched"]) == ("peft", "4", "40 of 40 layers")
    assert ink["parts"] == "unet 40, text_encoder 12"
    assert main(["inspect", str(loras["fox"])]) == 0
    assert "triggers  none stated" in capsys.readouterr().out


def test_inspect_goes_on_after_a_bad_file(loras, tmp_path, capsys):
    (tmp_path / "bad.safetensors").write_bytes(b"<html>")
    assert main(["inspect", str(tmp_path / "bad.safetensors"), str(loras["fox"]), "--json"]) == 1
    bad, good = json.loads(capsys.readouterr().out)
    assert "is an HTML page" in bad["error"]
    assert good["format"] == "peft"


def test_merge_writes_one_lora(loras, base, tmp_path, capsys):
    out = tmp_path / "one.safetensors"
    files = [str(loras["fox"]), f"{loras['ink']}:0.5"]
    assert main(["merge", *files, "--method", "dare", "--option", "drop=0.5", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["mole.method"], facts["mole.options"]) == ("dare", '{"drop": 0.5}')
    wanted = merge({"fox": loras["fox"], "ink": (loras["ink"], 0.5)}, "dare", drop=0.5)
    found = read_expert(out)
    for key, weights in wanted.layers["unet"].items():
        torch.testing.assert_close(found.layers["unet"][key].delta(), weights.delta(), rtol=0, atol=1e-2)
    prompts = ["--base", base, "--device", "cpu", "--own", "fox=a fox", "--own", "ink=in ink"]
    assert main(["merge", *files, "--method", "ssr", *prompts, "--format", "kohya", "--out", str(out)]) == 0
    assert read_expert(out).format == "kohya"
    assert "mole.loss" in capsys.readouterr().out


def test_compose_on_the_embedded_world(tmp_path, capsys):
    out = tmp_path / "new" / "grid.png"
    assert main(["compose", "--rows", "1", "--steps", "2", "--out", str(out), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert sorted(facts["experts"]) == ["doughnut", "sunflower"]
    assert facts["gates"]["family"] == "flow"
    with Image.open(out) as image:
        assert image.width > 5 * 128


def test_compose_train_and_compose_again_on_any_pipeline(loras, base, tmp_path, capsys):
    experts = ["--base", base, "--expert", f"fox={loras['fox']}", "--expert", f"ink={loras['ink']}:0.7"]
    train = [*experts, "--prompt", "a fox in ink", "--single", "fox=a fox", "--single", "ink=ink", "--style", "ink"]
    sizes = [
        "--steps",
        "2",
        "--batch",
        "2",
        "--family",
        "mole",
        "--granularity",
        "layer",
        "--total",
        "1",
        "--term",
        "single=1,seeds=2,steps=2",
    ]
    sizes += ["--term", "composed=0.5,seeds=2,steps=2", "--term", "balance=0.5"]
    assert main(["train", *train, *sizes, "--out", str(tmp_path / "g"), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert {"single", "composed", "balance", "loss"} <= set(row)
    compose = ["compose", "a fox in ink", *experts, "--gates", str(tmp_path / "g"), "--steps", "1", "--rows", "2"]
    assert main([*compose, "--out", str(tmp_path / "x.png")]) == 0
    assert Path(tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["compose", "a cat", "--out", "x.png"], "names none of the world's concepts: "),
        (["compose", "a fox", "--rows", "0"], "--rows must be 1 or more"),
        (["compose", "a fox", "--expert", "fox"], "is not NAME=FILE"),
        (["compose", "a fox", "--expert", "fox=a.safetensors:big"], "strength 'big' is not a number"),
        (["compose", "a fox", "--expert", "fox=missing.safetensors"], "no LoRA file at missing.safetensors"),
        (["compose", "a fox", "--base", "somewhere"], "give at least one --expert"),
        (["merge", "a.safetensors", "b/a.safetensors", "--out", "x"], "no LoRA file at a.safetensors"),
        (["merge", "a.safetensors", "--method", "np", "--option", "mu", "--out", "x"], "no LoRA file at"),
        (["train", "--prompt", "a fox", "--out", "g", "--single", "fox"], "--single 'fox' is not NAME=VALUE"),
    ],
)
def test_bad_input_is_one_line_and_status_1(capsys, argv, message):
    assert main(argv) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_expert_arguments():
    assert parse_expert("a=x.safetensors") == ("a", (Path("x.safetensors"), 1.0))
    assert parse_expert("a=x.safetensors:-0.5") == ("a", (Path("x.safetensors"), -0.5))
    assert parse_expert("a=C:/x.safetensors") == ("a", (Path("C:/x.safetensors"), 1.0))
    assert "fox" in emoji_world().loras
