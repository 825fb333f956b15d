"""The rungs of demos/emoji/experiments/ladder.py: where they begin, what learns, and that what is drawn is what learned."""

import json
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers.lora import read_expert
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.context import TrainingContext
from mole_diffusers.training.data import TrainingData
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.gate_trainer import GateTrainer
from mole_world.evaluation import methods
from mole_world.evaluation.runner import Case, Setup

FREE = ("mixer", "A", "A+B")
NAMES = ("fox", "hat")  # of different ranks, one with convolutions
PROMPT = "a fox and a hat"
DATA = TrainingData(composed=[PROMPT], parts={PROMPT: ["a fox", "a hat"]})
SHORT = {"collage": {"seeds": 1, "steps": 2, "pictures": 2}}
CONFIG = GateTraining(SHORT, steps=2, batch=2)


@pytest.fixture(scope="module")
def ladder(script):
    return script("ladder")


@pytest.fixture
def experts(loras):
    return {name: replace(read_expert(loras[name], name), triggers=(name,)) for name in NAMES}


@torch.no_grad()
def answer(pipe):
    """What a pipeline's UNet predicts for two prompts."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return predict(pipe, x, torch.tensor([5, 800]), ["a fox and a hat", ""])


@pytest.mark.parametrize("name", ["mixer", *thorough(*(name for name in FREE if name != "mixer"))])
def test_a_free_rung_begins_as_the_sum(ladder, pipe, experts, name):
    mixture = mole.attach(pipe, experts, binding={"fox": ("fox", "left")})
    before = answer(pipe)
    ladder.set_free(pipe, mixture, ladder.RUNGS[name])
    torch.testing.assert_close(answer(pipe), before, atol=1e-6, rtol=0)


def test_a_mixer_mixes_ranks_before_the_gate(ladder, pipe, experts):
    """y = W x + B (g * ((I + D) (A x))), written out for one layer whose LoRAs act at weights of their own."""
    mixture = mole.attach(pipe, {"fox": (experts["fox"], 0.5), "hat": (experts["hat"], 2.0)}, binding=None)
    ladder.set_free(pipe, mixture, ladder.RUNGS["mixer"])
    part, name, down, up = next(found for found in ladder.layers(pipe) if found[1].endswith("attn1.to_q"))
    mixer = mixture.parts.banks["layers"][f"{part}.{name}"].module
    with torch.no_grad():
        mixer.change.copy_(torch.randn(mixer.change.shape, generator=torch.Generator().manual_seed(2)))
    layer, a, b = getattr(pipe, part).get_submodule(name), down.weight, up.weight
    x, g = torch.randn(1, 5, a.shape[1]), torch.tensor([0.5, 2.0])[down.expert_index]
    with torch.no_grad():
        written = layer.base_layer(x) + (x @ a.T @ (torch.eye(len(a)) + mixer.change).T * g) @ b.T
        torch.testing.assert_close(layer(x), written, atol=1e-5, rtol=1e-5)


def learn(pipe, mixture):
    """Leave the gradient of one update where it arrives."""
    trainer = GateTrainer(TrainingContext(pipe, mixture, DATA, config=CONFIG))
    with trainer.only_gates_learn():
        trainer.prepare()
        sum(trainer.losses(0, index=0, shares=1).values()).backward()


LEARNS = {"mole": (), "mixer": (), "A": ("lora_A",), "A+B": ("lora_A", "lora_B")}  # of the LoRAs' matrices


@pytest.mark.parametrize("name", ["mole", *thorough(*(name for name in LEARNS if name != "mole"))])
def test_gradient_reaches_what_a_rung_frees_and_nothing_else(ladder, pipe, experts, name):
    mixture = mole.attach(pipe, experts, ladder.RUNGS[name].gates)
    ladder.set_free(pipe, mixture, ladder.RUNGS[name])
    learn(pipe, mixture)
    hosts = {n: p for part in (pipe.unet, pipe.text_encoder) for n, p in part.named_parameters() if "mole_gates" not in n}
    reached = {n for n, p in hosts.items() if p.grad is not None and p.grad.any()}
    assert reached == {n for n in hosts if any(f".{half}." in n for half in LEARNS[name])}
    assert any(p.grad is not None and p.grad.any() for p in mixture.parameters())
    assert not any(p.requires_grad for n, p in hosts.items() if "lora_" in n)  # as they were


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["mixer", "A", "A+B"])
def test_what_was_trained_is_what_is_drawn(ladder, pipe, experts, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ladder, "WORK", tmp_path)
    setup, case, base, after = Setup(pipe, experts, {}), Case(NAMES, "pair", PROMPT), answer(pipe), []
    with methods.bound().draws(setup, case):
        untrained = answer(pipe)
    method = ladder.bound(name, 2)
    assert not method.covers(case)

    def detach(pipe):
        after.append(answer(pipe))
        mole.detach(pipe)

    monkeypatch.setattr(ladder, "detach", detach)
    log = ladder.train(pipe, experts, ladder.RUNGS[name], DATA, ladder.kept(name, 2)(case), config=CONFIG)
    assert torch.equal(answer(pipe), base)
    assert set(ladder.reached(log)) == {"loss", "collage"}
    assert method.covers(case)
    with method.draws(setup, case):
        drawn = answer(pipe)
    torch.testing.assert_close(drawn, after[0], atol=1e-5, rtol=1e-5)
    assert (drawn - untrained).abs().max() > 1e-5
    assert method.settings(setup, case)["trained"]


@pytest.mark.thorough
def test_trained_gates_are_drawn_as_attached_from_their_folder(ladder, pipe, experts, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "WORK", tmp_path)
    setup, case = Setup(pipe, experts, {}), Case(NAMES, "pair", "a fox and a hat")
    folder = ladder.kept("flow", 2)(case)
    ladder.train(pipe, experts, ladder.RUNGS["flow"], DATA, folder, config=CONFIG)
    with ladder.bound("flow", 2).draws(setup, case):
        drawn = answer(pipe)
    mole.attach(pipe, experts, folder)
    assert torch.equal(answer(pipe), drawn)
    mole.attach(pipe, experts)
    assert not torch.equal(answer(pipe), drawn)


def test_the_figure_has_every_row_at_its_rung_and_what_is_not_trained_at_each(ladder):
    rows = ladder.placed([{"method": name, "kind": "k"} for name in ("A @ 240", "bound", "mixer @ 60")])
    assert [(row["method"], row["panel"], row["what is free to learn"], row["line"]) for row in rows] == [
        ("bound", "k", "mixer", "bound"), ("bound", "k", "A", "bound"),
        ("mixer @ 60", "k", "mixer", "60 updates"), ("A @ 240", "k", "A", "240 updates"),
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_run_trains_draws_and_goes_on(ladder, script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for module in (ladder, script("loop")):
        monkeypatch.setattr(module, "WORK", tmp_path)
    monkeypatch.setattr(script("packing"), "FOLDER", tmp_path)
    monkeypatch.setattr(ladder, "STEPS", 1)
    monkeypatch.setattr(ladder, "recipe", lambda concepts: CONFIG)
    options = ["--kinds", "subject x style", "--per-kind", "1", "--seeds", "1", "--rungs", "mixer", "--updates", "1"]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *options])
    ladder.main()
    table = capsys.readouterr().out.partition("| method")[2]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == ["| sum", "| bound", "| tiles", "| mixer @ 1"]
    took = json.loads((tmp_path / "took.json").read_text())
    assert [name.split()[1] for name in took] == ["mixer"]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    assert len(files) == 2  # the mixers, rows
    elsewhere = [option if option != "subject x style" else "two subjects" for option in options]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *elsewhere])
    ladder.main()  # rows that were not asked for are not in the figure
    capsys.readouterr()
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    shown, curves = [], ladder.curves
    monkeypatch.setattr(ladder, "curves", lambda rows, *given, **how: shown.append(rows) or curves(rows, *given, **how))
    monkeypatch.setattr(ladder, "UPDATES", (1,))
    again = [*options[:-4], "--rungs", "--updates", "7"]  # what was trained by other runs is in it
    monkeypatch.setattr(sys, "argv", ["ladder.py", *again, "--figure", str(tmp_path / "ladder.png")])
    ladder.main()
    assert set(shown[0]["kind"]) == {"subject x style"}
    assert list(shown[0]["line"]) == ["sum", "bound", "tiles", "1 updates"]
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["ladder.py", *options, "--pack", "--figure", str(tmp_path / "ladder.png")])
    ladder.main()
    assert capsys.readouterr().out.partition("| method")[2] == table
    assert {path: path.read_bytes() for path in files} == files
    assert (tmp_path / "ladder.png").exists()
    packed = pd.read_csv(tmp_path / "ladder.csv.gz")
    assert packed["method"].tolist() == ["sum", "bound", "tiles", "mixer @ 1"]
