"""The rungs of demos/experiments/emoji/ladder.py: where they begin, what learns, and that what is drawn is what learned."""

import json
import sys
from dataclasses import replace

import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers import emoji
from mole_diffusers.evaluation import emoji_protocol
from mole_diffusers.evaluation.runner import Case, Setup
from mole_diffusers.lora import read_expert
from mole_diffusers.testing import tiny_pipeline
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.context import TrainingContext
from mole_diffusers.training.data import TrainingData
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.gate_trainer import GateTrainer

FREE = ("factors", "mixer", "A", "A+B")
NAMES = ("fox", "hat")  # of different ranks, one with convolutions
DATA = TrainingData({"fox": ["a fox", "a fox, a cat"], "hat": ["a hat"]}, plain=["a cat"], sizes={"a fox, a cat": (64, 32)})
TEACH = {"seeds": 2, "steps": 2}
CONFIG = GateTraining({"single": {**TEACH, "batch": 4}, "base": {**TEACH, "batch": 2}}, steps=2)


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


@pytest.mark.parametrize("name", ["mixer", *thorough(*(name for name in FREE if name != "mixer"))])
def test_wherever_a_rung_is_it_is_one_ordinary_lora_where_nothing_is_bound(ladder, pipe, experts, tmp_path, name):
    mixture = mole.attach(pipe, experts, binding=None)
    before = answer(pipe)
    ladder.set_free(pipe, mixture, ladder.RUNGS[name])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in mixture.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    assert (answer(pipe) - before).abs().max() > 1e-2
    ladder.write_lora(ladder.one_lora(pipe, mixture), tmp_path / "one.safetensors", dtype=torch.float32)
    other = tiny_pipeline()
    other.load_lora_weights(str(tmp_path / "one.safetensors"))
    torch.testing.assert_close(answer(pipe), answer(other), atol=1e-4, rtol=1e-4)


def test_a_mixer_mixes_ranks_before_the_gate(ladder, pipe, experts):
    """y = W x + B (g * ((I + D) (A x))), written out for one layer whose LoRAs act at weights of their own."""
    mixture = mole.attach(pipe, {"fox": (experts["fox"], 0.5), "hat": (experts["hat"], 2.0)}, binding=None)
    ladder.set_free(pipe, mixture, ladder.RUNGS["mixer"])
    part, name, layer = next(found for found in ladder.layers(pipe) if found[1].endswith("attn1.to_q"))
    mixer = mixture.banks["layers"][f"{part}.{name}"]
    with torch.no_grad():
        mixer.change.copy_(torch.randn(mixer.change.shape, generator=torch.Generator().manual_seed(2)))
    a, b = layer.lora_A[ladder.ADAPTER].weight, layer.lora_B[ladder.ADAPTER].weight
    x, ranks = torch.randn(1, 5, a.shape[1]), layer.lora_variant[ladder.ADAPTER].ranks
    g = torch.tensor([0.5] * ranks[0] + [2.0] * ranks[1])
    with torch.no_grad():
        written = layer.base_layer(x) + (x @ a.T @ (torch.eye(len(a)) + mixer.change).T * g) @ b.T
        torch.testing.assert_close(layer(x), written, atol=1e-5, rtol=1e-5)


def learn(pipe, mixture):
    """Leave the gradient of one update where it arrives."""
    trainer = GateTrainer(TrainingContext(pipe, mixture, DATA), CONFIG)
    with trainer.only_gates_learn():
        trainer.prepare()
        sum(trainer.losses(0, index=0, shares=1).values()).backward()


LEARNS = {"mole": (), "factors": (), "mixer": (), "A": ("lora_A",), "A+B": ("lora_A", "lora_B")}  # of the LoRAs' matrices


@pytest.mark.parametrize("name", ["mole", *thorough(*(name for name in LEARNS if name != "mole"))])
def test_gradient_reaches_what_a_rung_frees_and_nothing_else(ladder, pipe, experts, name):
    mixture = ladder.begin(pipe, experts, ladder.RUNGS[name])
    learn(pipe, mixture)
    hosts = {n: p for part in (pipe.unet, pipe.text_encoder) for n, p in part.named_parameters() if "mole_gates" not in n}
    reached = {n for n, p in hosts.items() if p.grad is not None and p.grad.any()}
    assert reached == {n for n in hosts if n.endswith(tuple(f"{half}.{ladder.ADAPTER}.weight" for half in LEARNS[name]))}
    assert any(p.grad is not None and p.grad.any() for p in mixture.parameters())
    assert not any(p.requires_grad for n, p in hosts.items() if "lora_" in n)  # as they were


def test_there_is_nothing_to_learn_where_the_other_loras_are_silent(ladder, pipe, experts):
    mixture = ladder.begin(pipe, experts, ladder.RUNGS["mole"])
    mixture.bind({name: name for name in NAMES})
    learn(pipe, mixture)
    assert not any(p.grad.any() for p in mixture.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["mixer", *thorough("factors", "A", "A+B")])
def test_what_was_trained_is_what_is_drawn_bound_or_as_one_lora(ladder, pipe, experts, tmp_path, monkeypatch, name):
    monkeypatch.setattr(ladder, "WORK", tmp_path)
    setup, case, base = Setup(pipe, experts, {}), Case(NAMES, "pair", "a fox and a hat"), answer(pipe)
    with ladder.ARMS["sum"]().draws(setup, case):
        plain = answer(pipe)
    arms = ladder.bound(name, 2), ladder.one(name, 2)
    assert not any(arm.covers(case) for arm in arms)
    log = ladder.train(pipe, experts, ladder.RUNGS[name], DATA, ladder.kept(name, 2)(case), config=CONFIG)
    assert torch.equal(answer(pipe), base)
    assert set(ladder.reached(log)) == {"loss", "single", "base"}
    assert log[0]["base"] == pytest.approx(1, rel=0.5)  # where no LoRA is silent, all of them are in the way of the base
    found = []
    for arm in arms:
        assert arm.covers(case)
        with arm.draws(setup, case):
            mole.mixture.attached(pipe).bind(None)
            found.append(answer(pipe))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)
    assert (found[0] - plain).abs().max() > 1e-5
    assert arms[0].settings(setup, case)["trained"]


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


def test_a_lesson_is_of_each_concept_alone_and_beside_others(ladder):
    for case, _ in emoji_protocol.cases(emoji.VALIDATION):
        data = ladder.lesson(case)
        for concept, prompts in data.singles.items():
            assert all(emoji.scene_in(p) for p in prompts)
            others = set(case.concepts) - {concept}
            assert not any(other in p.split() for p in prompts for other in others), case.name
            sizes = [data.sizes[p] for p in prompts]
            assert sizes.count((64, 64)) == len(prompts) / 2
            assert set(sizes) == {(64, 64), (64, 128) if case.size == (64, 128) else (128, 64)}
        assert not any(concept in p.split() for p in data.plain for concept in case.concepts)


def test_the_figure_has_every_row_at_its_rung_and_the_bound_ones_at_their_updates(ladder):
    names = ("sum", "bound", "mixer @ 60", "mixer @ 60, one LoRA", "A @ 200", "joint LoRA")
    rows = ladder.placed([{"arm": name, "kind": "k"} for name in names])
    found = [(row["arm"], row["panel"], row["setting"], row["line"]) for row in rows]
    free, long = "k: what is free", "k: how long"
    assert found == [
        ("sum", free, "sum", "for comparison"),
        ("bound", free, "bound", "for comparison"), ("bound", long, 0, "mixer"), ("bound", long, 0, "A"),
        ("mixer @ 60", free, "mixer", "60 updates"), ("mixer @ 60", long, 60, "mixer"),
        ("mixer @ 60, one LoRA", free, "mixer", "60 updates, one LoRA"),
        ("A @ 200", free, "A", "200 updates"), ("A @ 200", long, 200, "A"),
        ("joint LoRA", free, "joint LoRA", "for comparison"),
    ]  # fmt: skip


@pytest.mark.thorough
def test_a_run_trains_draws_and_goes_on(ladder, script, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    for module in (ladder, script("loop")):
        monkeypatch.setattr(module, "WORK", tmp_path)
    short = {"seeds": 1, "steps": 1, "batch": 2}
    monkeypatch.setattr(ladder, "STEPS", 1)
    monkeypatch.setattr(ladder, "CAPTIONS", 1)
    monkeypatch.setattr(ladder, "TRAINING", GateTraining({"single": short, "base": short}))
    options = ["--kinds", "subject x style", "--per-kind", "1", "--seeds", "1", "--rungs", "mixer", "--updates", "1"]
    monkeypatch.setattr(sys, "argv", ["ladder.py", *options])
    ladder.main()
    table = capsys.readouterr().out.partition("| arm")[2]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:6]] == [
        "| sum", "| bound", "| mixer @ 1", "| mixer @ 1, one LoRA"
    ]  # fmt: skip
    took = json.loads((tmp_path / "took.json").read_text())
    assert [name.split()[1] for name in took] == ["mixer"]
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.suffix in (".safetensors", ".jsonl")}
    assert len(files) == 3  # the mixers, one LoRA, rows
    monkeypatch.setattr(sys, "argv", ["ladder.py", *options, "--figure", str(tmp_path / "ladder.png")])
    ladder.main()
    assert capsys.readouterr().out.partition("| arm")[2] == table
    assert {path: path.read_bytes() for path in files} == files
    assert (tmp_path / "ladder.png").exists()
