"""The loop of gate training: what moves, what does not, and that a run survives what happens to runs."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import hosts
import numpy as np
import pytest
import torch
from PIL import Image
from tiers import thorough
from tiny import tiny_clip, tiny_lora, tiny_pipeline, tiny_tokenizer

import mole_diffusers as mole
from mole_diffusers.lora import strengths
from mole_diffusers.patching.gating.cross_attention import cross_attentions
from mole_diffusers.training import (
    OBJECTIVES,
    Clip,
    GateTraining,
    Samples,
    TrainingContext,
    TrainingData,
    Validation,
    engine,
    mean_losses,
    summary,
    train_gates,
)
from mole_diffusers.training.gate_trainer import GateTrainer, parameter_groups

TEACH = {"seeds": 2, "steps": 2}
BOTH = {"single": TEACH, "composed": TEACH}
DATA = TrainingData({"fox": ["a fox"], "ink": ["ink art"]}, ["a fox in ink"], others={"fox": ["cat"]})
PICTURES = Samples(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), ["a fox"] * 4)
DRAWN = replace(DATA, samples=PICTURES)
SHORT = {"batch": 4, "steps": 4, "every": 2}
DENOISE = GateTraining({"denoise": 1.0}, **SHORT)  # the cheapest term


def gates_of(mixture):
    return {f"{p}.{k}": v.clone() for p, bank in mixture.banks.items() for k, v in bank.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def mixture(pipe, loras):
    return mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")


@pytest.fixture
def clip():
    return Clip(tiny_clip(), tiny_tokenizer())


@pytest.mark.parametrize(
    "terms",
    [
        {"single": TEACH},
        *thorough({"composed": TEACH}, {"denoise": 1.0}, {"denoise": {"weight": 1e-6}, "balance": 0.5}),
        *thorough({"clip": {"lengths": (3, 4)}}, {"rollout": {"steps": 2, "batch": 4}}),
    ],
    ids=lambda terms: "+".join(terms),
)
def test_training_lowers_each_term_and_moves_only_gates(pipe, loras, awake, clip, terms):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, mole.GateConfig("mole", total="N"))
    awake(mixture, size=2.0)
    config = GateTraining(terms, steps=12, lr=1e-1, batch=8)
    models = (pipe.unet, pipe.text_encoder, pipe.vae, clip.model)
    before = {(i, n): p.clone() for i, m in enumerate(models) for n, p in m.named_parameters() if "mole_gates" not in n}
    gates, flags = gates_of(mixture), [p.requires_grad for m in models for p in m.parameters()]
    log = train_gates(pipe, mixture, replace(DRAWN, styles=["ink"]), config=config, clip=clip)
    term = list(terms)[-1]
    first, last = (sum(row[term] for row in rows) for rows in (log[:4], log[-4:]))
    assert last < first
    after = {(i, n): p for i, m in enumerate(models) for n, p in m.named_parameters() if "mole_gates" not in n}
    assert same(before, after)
    assert not same(gates_of(mixture), gates)
    assert [p.requires_grad for m in models for p in m.parameters()] == flags
    assert all(p.grad is None for p in after.values())


def test_the_other_terms_move_only_gates(pipe, loras, clip):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, mole.GateConfig("mole", total="N"))
    before = {f"{i}.{n}": v.clone() for i, m in enumerate((pipe.unet, pipe.text_encoder, pipe.vae)) for n, v in state(m)}
    gates = gates_of(mixture)
    data = replace(DRAWN, plain=["a cat"], parts={"a fox in ink": ["a fox", "ink art"]})
    terms = {"base": TEACH, "separate": {"steps": 2}, "collage": {"pictures": 2, "seeds": 1, "steps": 1}}
    train_gates(pipe, mixture, data, config=GateTraining(terms, steps=2, batch=2))
    assert same(before, {f"{i}.{n}": v for i, m in enumerate((pipe.unet, pipe.text_encoder, pipe.vae)) for n, v in state(m)})
    assert any("lora_A" in name for name in before)
    assert not same(gates_of(mixture), gates)


def state(model):
    """Its parameters and buffers, with the experts' and without the gates'."""
    return [(name, value) for name, value in model.state_dict().items() if "mole_gates" not in name]


def train(loras, folder, *, config=DENOISE, data=DRAWN, **options):
    """A run on a pipeline of its own; returns its gates and log."""
    pipe = tiny_pipeline()
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    log = train_gates(pipe, mixture, data, config=config, folder=folder, **options)
    return gates_of(mixture), log


class Cut(BaseException):
    """What stops a run in the tests."""


def cut_at(patch, step):
    """Have the optimizer die in update `step`, counted from 1."""
    real, calls = torch.optim.AdamW.step, []

    def die(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == step:
            raise Cut
        return real(self, *args, **kwargs)

    patch.setattr(torch.optim.AdamW, "step", die)


@pytest.mark.parametrize(
    ("terms", "options"),
    [
        ({"single": TEACH, "balance": 0.1}, {"steps": 2}),
        *thorough(
            (BOTH | {"balance": 0.1}, {"steps": 3}),
            (
                {"clip": {"lengths": (3, 3)}, "denoise": 1.0},
                {"steps": 3, "ema": 0.9, "schedule": "linear", "warmup": 1},
            ),
        ),
    ],
    ids=["words", "all words", "pictures"],
)
def test_a_run_cut_off_goes_on_bit_for_bit(loras, clip, tmp_path, monkeypatch, terms, options):
    config = GateTraining(terms, batch=4, every=1, **options)
    whole = train(loras, tmp_path / "whole", config=config, clip=clip)
    with monkeypatch.context() as patch:
        cut_at(patch, options["steps"])
        with pytest.raises(Cut):
            train(loras, tmp_path / "cut", config=config, clip=clip)
    resumed = train(loras, tmp_path / "cut", config=config, clip=clip, resume_from="latest")
    assert same(resumed[0], whole[0])
    assert resumed[1] == whole[1]
    lines = [(tmp_path / n / "log.jsonl").read_text() for n in ("cut", "whole")]
    assert lines[0] == lines[1]


@pytest.mark.parametrize("terms", [{"single": TEACH}, *thorough(BOTH)], ids="+".join)
def test_accumulated_parts_equal_the_whole_batch(loras, terms):
    whole, parts = (train(loras, None, config=GateTraining(terms, batch=4, steps=2, accumulation=n)) for n in (1, 2))
    for name, gate in whole[0].items():
        torch.testing.assert_close(parts[0][name], gate, atol=2e-6, rtol=1e-4)
    assert [r["loss"] for r in parts[1]] == pytest.approx([r["loss"] for r in whole[1]], rel=1e-4)


def test_rank_gates_even_out_their_load_once_per_update(loras):
    """Whatever parts a batch is computed in: their bias c moves by its rate, and by what the whole batch asked for."""
    ends = []
    for accumulation in (1, 2):
        pipe = tiny_pipeline()
        mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, mole.GateConfig("rank", top=3))
        config = GateTraining({"denoise": 1.0}, batch=4, steps=2, accumulation=accumulation)
        train_gates(pipe, mixture, DRAWN, config=config)
        ends.append({name: value for name, value in gates_of(mixture).items() if name.endswith("balance")})
        assert all(gate.load is None for bank in mixture.banks.values() for gate in bank.gates.values())
    assert any(c.abs().max() > 0 for c in ends[0].values())
    for name, c in ends[0].items():
        torch.testing.assert_close(ends[1][name], c)


@pytest.mark.thorough  # test_gates.py compares the gradients of one call
@pytest.mark.parametrize("gate_type", ["mole", "static"])
def test_checkpointing_changes_no_gradient(loras, clip, gate_type):
    """Two terms and several noise levels in one update, with gates that read the noise level."""
    ends = []
    for checkpointing in (False, True):
        pipe = tiny_pipeline()
        gates = (
            mole.GateConfig(gate_type, granularity="model") if gate_type == "mole" else mole.GateConfig(gate_type, bins=4)
        )
        mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, gates)
        terms = {"rollout": {"steps": 2, "batch": 2}, "denoise": {"batch": 2}, "balance": 0.1}
        config = GateTraining(terms, steps=2, checkpointing=checkpointing)
        train_gates(pipe, mixture, DRAWN, config=config, clip=clip)
        assert not pipe.unet.is_gradient_checkpointing
        ends.append(gates_of(mixture))
    for name, gate in ends[0].items():
        torch.testing.assert_close(ends[1][name], gate, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_checkpointing_runs_a_block_once_more_for_each_update(pipe, mixture, checkpointing):
    data = replace(DRAWN, samples=PICTURES)
    config = GateTraining({"denoise": 1.0}, batch=2, steps=1, checkpointing=checkpointing)
    trainer, runs = GateTrainer(TrainingContext(pipe, mixture, data, None, config)), Counter()
    for name, module in pipe.unet.named_modules():
        if name.endswith(("transformer_blocks.0", "resnets.0")):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    with trainer.only_gates_learn():
        trainer.prepare()
        trainer.update(0)
    blocks = {name: count for name, count in runs.items() if "transformer_blocks" in name}
    assert set(blocks.values()) == {1 + checkpointing}
    assert max(runs.values()) == 1 + checkpointing


def test_rates_move_every_gates_logits_alike(pipe, loras):
    found = {}
    for name, gates in {
        "static": mole.GateConfig("static"),
        "pooled": mole.GateConfig("mole"),
        "flattened": mole.GateConfig("mole", features="flattened"),
        "flow": mole.GateConfig("flow"),
        "retrieval": mole.GateConfig("retrieval"),
    }.items():
        mixture = mole.attach(pipe, {"fox": loras["fox"]}, gates)
        gates = [gate for bank in mixture.banks.values() for gate in bank]
        groups = parameter_groups(gates, None)
        assert sum(len(g["params"]) for g in groups) == len(mixture.parameters())
        found[name] = min(g["lr"] for g in groups)
    assert found["static"] == 0.05
    assert found["pooled"] == pytest.approx(0.05 / 4)  # the tiny pipeline has 16 channels,
    assert found["flattened"] == pytest.approx(0.05 / 32)  # and 64 tokens of them
    assert found["flow"] == pytest.approx(0.05 / 16)  # raw states, whose entries are of size 1 each
    assert found["retrieval"] == pytest.approx(0.05 / 16)
    assert {g["lr"] for g in parameter_groups(gates, 1e-3)} == {1e-3}


@pytest.mark.thorough
def test_ema_is_what_is_kept(loras, tmp_path):
    plain = train(loras, None)[0]
    averaged = train(loras, tmp_path, config=replace(DENOISE, ema=0.5))[0]
    first = train(loras, None, config=replace(DENOISE, steps=1, schedule="constant"))[0]
    assert not same(plain, averaged)
    saved = torch.load(tmp_path / "checkpoint-4" / engine.STATE, weights_only=True)
    raw = {f"{p}.{k}": v for p in ("unet", "text_encoder") for k, v in saved[f"gates of {p}"].items()}
    assert same(raw, plain)
    assert first.keys() == plain.keys()
    mixture = mole.attach(tiny_pipeline(), {n: loras[n] for n in ("fox", "ink")}, gates=tmp_path)
    assert same(gates_of(mixture), averaged)


def test_validation_pictures_and_success(pipe, mixture, tmp_path):
    asked = []

    def success(images, prompt):
        asked.append((len(images), prompt, np.asarray(images[0])))
        return 0.25 * len(asked)

    looks = Validation(every=2, prompts=("a fox", "ink"), seeds=2, steps=1, guidance=1.0)
    config = replace(DENOISE, steps=5, validation=looks, ema=0.5)
    log = train_gates(pipe, mixture, DRAWN, config=config, folder=tmp_path, success=success)
    assert [row.get("success") for row in log] == [None, 0.375, None, 0.875, 1.375]
    assert [a[:2] for a in asked] == [(2, "a fox"), (2, "ink")] * 3
    with Image.open(tmp_path / "validation" / "step-5.png") as grid:
        assert grid.size == (64, 64)
    again = pipe(["a fox"] * 2, generator=[torch.Generator().manual_seed(i) for i in range(2)], num_inference_steps=1,
                 guidance_scale=1.0).images  # fmt: skip
    assert np.array_equal(np.asarray(again[0]), asked[-2][2])  # the mean gates drew the last ones too
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows == log
    with pytest.raises(ValueError, match="validation draws the composed prompts, and there are none"):
        train_gates(pipe, mixture, replace(DRAWN, composed=[]), config=replace(config, validation=Validation(every=2)))


@pytest.mark.parametrize(
    "terms",
    [
        {"single": TEACH},
        *thorough(
            {"single": TEACH, "composed": TEACH, "base": TEACH},
            {"separate": {"steps": 2}},
            {"collage": {"pictures": 2, "seeds": 1, "steps": 2}},
            {"clip": {"lengths": (3, 4)}, "rollout": {"steps": 2, "batch": 4}},
        ),
    ],
    ids=lambda terms: "+".join(terms),
)
def test_gates_are_trained_on_sdxl(clip, terms, tmp_path):
    pipe = hosts.sdxl()
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, "flow")
    gates = {id(p) for p in mixture.parameters()}
    still = [(p, p.clone()) for p in pipe.text_encoder_2.parameters() if id(p) not in gates]
    data = replace(DRAWN, plain=["a cat"], composed=["fox in ink"], parts={"fox in ink": ["a fox", "ink"]})
    before = gates_of(mixture)
    log = train_gates(pipe, mixture, data, config=GateTraining(terms, batch=2, steps=2, lr=1e-2), clip=clip)
    assert all(math.isfinite(row["loss"]) for row in log)
    after = gates_of(mixture)
    assert any(name.startswith("unet.") and not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(p, was) and p.grad is None for p, was in still)


@pytest.mark.parametrize(
    ("term", "shapes"),
    [
        *thorough(({"single": TEACH}, {(16, 16)}), ({"base": TEACH}, {(16, 16)})),
        ({"composed": TEACH}, {(8, 24)}),
        *thorough(({"separate": {"steps": 2}}, {(8, 24)})),
        *thorough(({"rollout": {"steps": 2, "batch": 4}}, {(8, 24)})),
        ({"collage": {"pictures": 2, "seeds": 1, "steps": 2}}, {(16, 16), (8, 24)}),  # the parts, then the collages
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_composed_prompts_are_learned_at_the_size_that_is_asked_for(pipe, mixture, clip, term, shapes, tmp_path):
    data = replace(DATA, plain=["a hat"], parts={"a fox in ink": ["a fox", "ink art"]})
    looks, seen = Validation(every=9, seeds=1, steps=1, guidance=1.0), []
    config = GateTraining(term, batch=4, steps=1, width=48, height=16, validation=looks)
    record = pipe.unet.register_forward_pre_hook(lambda _, args: seen.append(tuple(args[0].shape[2:])))
    train_gates(pipe, mixture, data, config=config, clip=clip, folder=tmp_path)
    record.remove()
    assert set(seen[:-1]) == shapes
    assert seen[-1] == (8, 24)
    with Image.open(tmp_path / "validation" / "step-1.png") as drawn:
        assert drawn.size == (48, 16)
    with pytest.raises(ValueError, match="width must be a multiple of 8 pixels, got 50"):
        train_gates(pipe, mixture, data, config=replace(config, width=50), clip=clip)


def test_trackers_get_terms_and_pictures(pipe, mixture, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    looks = Validation(every=2, seeds=1, steps=1, guidance=1.0)
    config = replace(DENOISE, tracker="tensorboard", validation=looks)
    log = train_gates(pipe, mixture, DRAWN, config=config, folder=tmp_path, success=lambda *_: 1.0)
    events = EventAccumulator(str(tmp_path / "mole")).Reload()
    assert [e.value for e in events.Scalars("denoise")] == pytest.approx([row["denoise"] for row in log])
    assert [e.step for e in events.Scalars("success")] == [1, 3]
    assert len(events.Images("validation")) == 2
    with pytest.raises(ValueError, match="tracker 'nothing' is not installed; installed: "):
        train_gates(pipe, mixture, DRAWN, config=replace(DENOISE, tracker="nothing"))


def test_weights_and_biases_gets_the_same(pipe, mixture, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    sent = []
    monkeypatch.setattr(wandb.Run, "log", lambda _, values, step=None, **__: sent.append((step, values)))
    looks = Validation(every=2, seeds=1, steps=1, guidance=1.0)
    config = replace(DENOISE, tracker="wandb", validation=looks)
    log = train_gates(pipe, mixture, DRAWN, config=config, folder=tmp_path, success=lambda *_: 1.0)
    assert [(step, v["denoise"]) for step, v in sent if "denoise" in v] == [(row["step"], row["denoise"]) for row in log]
    assert [step for step, v in sent if "success" in v] == [1, 3]
    pictures = [(step, v["validation"]) for step, v in sent if "validation" in v]
    assert [(step, len(seen), type(seen[0])) for step, seen in pictures] == [(1, 1, wandb.Image), (3, 1, wandb.Image)]


@pytest.mark.thorough
def test_only_the_last_checkpoints_are_kept(loras, tmp_path):
    train(loras, tmp_path, config=replace(DENOISE, every=1, keep=2))
    assert [p.name for p in engine.checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(ValueError, match="holds checkpoint-4 of an earlier run: resume 'latest'"):
        train(loras, tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint 'checkpoint-9' .*\['latest', 'checkpoint-3', 'checkpoint-4'\]"):
        train(loras, tmp_path, resume_from="checkpoint-9")
    with pytest.raises(ValueError, match=r"other settings \(lr\)"):
        train(loras, tmp_path, config=replace(DENOISE, lr=1.0), resume_from="latest")
    with pytest.raises(ValueError, match=r"other settings \(pictures\)"):
        train(loras, tmp_path, data=replace(DRAWN, samples=replace(PICTURES, captions=["ink"] * 4)), resume_from="latest")
    with pytest.raises(ValueError, match=r"other settings \(composed\)"):
        train(loras, tmp_path, data=replace(DRAWN, composed=["fox ink"]), resume_from="checkpoint-3")
    more = replace(DENOISE, every=4, keep=1)
    assert same(*(train(loras, tmp_path, config=more, resume_from=name)[0] for name in ("checkpoint-3", "latest")))


def test_a_checkpoint_that_was_just_written_is_never_deleted(loras, tmp_path):
    def names():
        return [p.name for p in engine.checkpoints(tmp_path)]

    def stop(row):
        raise Cut

    train(loras, tmp_path, config=replace(DENOISE, every=1, keep=3))
    assert names() == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]
    last = replace(DENOISE, every=1, keep=1)
    with pytest.raises(Cut):  # after checkpoint-3, with that of the earlier run beyond it
        train(loras, tmp_path, config=last, resume_from="checkpoint-2", report=stop)
    assert names() == ["checkpoint-3", "checkpoint-4"]
    train(loras, tmp_path, config=last, resume_from="checkpoint-3")
    assert names() == ["checkpoint-4"]


def test_a_run_goes_on_with_its_own_base_pictures_and_clip_alone(pipe, mixture, clip, tmp_path):
    config = replace(DENOISE, steps=1)

    def train(data=DRAWN, clip=clip):
        train_gates(pipe, mixture, data, config=config, clip=clip, folder=tmp_path, resume_from="latest")

    train()
    with torch.no_grad():
        for p in mixture.parameters():  # which the digest of the base leaves out
            p.add_(1)
    train()
    others = replace(PICTURES, latents=PICTURES.latents.flip(1))
    for arguments, what in (({"data": replace(DATA, samples=others)}, "pictures"), ({"clip": None}, "clip")):
        with pytest.raises(ValueError, match=rf"other settings \({what}\)"):
            train(**arguments)
    with torch.no_grad():
        pipe.vae.decoder.conv_out.bias.add_(1)
    with pytest.raises(ValueError, match=r"other settings \(base\)"):
        train()


def test_a_run_of_before_bases_were_told_apart_is_refused(loras, tmp_path):
    config = replace(DENOISE, steps=1)
    train(loras, tmp_path, config=config)
    file = tmp_path / "checkpoint-1" / engine.STATE
    state = torch.load(file)
    run = json.loads(state["run"])
    run = {name: value for name, value in run.items() if name not in ("base", "clip")} | {"pictures": PICTURES.captions}
    torch.save(state | {"run": json.dumps(run)}, file)
    with pytest.raises(ValueError, match=r"other settings \(pictures, base\); use another folder"):
        train(loras, tmp_path, config=config, resume_from="latest")


def test_a_full_disk_keeps_what_is_whole(loras, tmp_path, monkeypatch):
    real, calls = torch.save, []

    def full(state, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"half")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        return real(state, path)

    monkeypatch.setattr(torch, "save", full)
    config = replace(DENOISE, steps=2, every=1)
    with pytest.raises(OSError, match=r"checkpoint-2 cannot be written: .*; whole checkpoints: \['checkpoint-1'\]"):
        train(loras, tmp_path, config=config)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name[0] != ".") == ["checkpoint-1", "log.jsonl"]
    whole = train(loras, None, config=config)[0]
    assert same(train(loras, tmp_path, config=config, resume_from="latest")[0], whole)


@pytest.mark.shows("Training")
def test_a_loss_that_is_not_finite_stops_and_names_step_and_expert(pipe, loras, tmp_path, monkeypatch):
    free = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, mole.GateConfig("static", total="linear"))
    wrong = replace(DENOISE, lr=1e30, every=1)
    with pytest.raises(ValueError, match=r"not finite at step 1: .*'denoise'.*; every expert alone is finite"):
        train_gates(pipe, free, DRAWN, config=wrong, folder=tmp_path)
    assert [p.name for p in engine.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert all(torch.isfinite(v).all() for v in gates_of(free).values())
    monkeypatch.setattr(strengths, "MAX_STRENGTH", 1e39)
    free.strength("ink", 1e38)
    with pytest.raises(ValueError, match=r"not finite at step 0: .*; expert 'ink' alone predicts what is not finite"):
        train_gates(pipe, free, DRAWN, config=DENOISE)


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(loras, tmp_path, monkeypatch):
    """Its loss is a number, and the checkpoint after it would have been the last good one."""
    pipe = tiny_pipeline()
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "static")
    updates = []

    def rooted(draw):
        updates.append(draw)
        near = float(len(updates) != 2)  # the root's slope at 0 is 1 / 0
        return sum((p - p.detach() + near).square().sum() for p in mixture.parameters()).sqrt()

    monkeypatch.setitem(OBJECTIVES, "denoise", lambda context, term: rooted)
    with pytest.raises(ValueError, match=r"the gradient is not finite at step 1: .*; every expert alone is finite"):
        train_gates(pipe, mixture, DRAWN, config=DENOISE, folder=tmp_path)
    assert not engine.checkpoints(tmp_path)
    assert all(torch.isfinite(v).all() for v in gates_of(mixture).values())


def test_bad_training_data_are_named(pipe, loras):
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, "mole")
    fox = TrainingData({"fox": ["a fox"]}, ["a fox"])
    for terms, data, message in (
        (BOTH, TrainingData({}, ["a fox"]), "single term needs prompts"),
        (BOTH, TrainingData({"fox": ["a fox"]}), "composed term needs"),
        ({"base": 1.0}, fox, "base term needs plain prompts"),
        ({"denoise": 1.0}, fox, "denoise term needs pictures"),
        ({"rollout": 1.0}, fox, "rollout term needs a CLIP"),
        ({"separate": 1.0}, fox, "separate term needs two experts"),
        (BOTH, replace(fox, styles=["oil"]), "unknown expert 'oil'"),
        (BOTH, replace(fox, others={"oil": ["chalk"]}), "unknown expert 'oil'"),
        (BOTH, TrainingData({"cat": ["a cat"]}, ["a cat"]), "unknown expert 'cat'"),
    ):
        with pytest.raises(ValueError, match=message):
            train_gates(pipe, mixture, data, config=GateTraining(terms, **SHORT))
    with pytest.raises(ValueError, match="'sum' have nothing to train"):
        train_gates(pipe, mole.attach(pipe, {"fox": loras["fox"]}), fox, config=GateTraining(**SHORT))


def test_attention_of_one_layer_has_nothing_to_be_kept_together_with(pipe, mixture):
    for attention in list(cross_attentions(pipe.unet).values())[1:]:
        attention.is_cross_attention = False
    with pytest.raises(ValueError, match="compares 2 layers with cross-attention or more, and the UNet has 1"):
        train_gates(pipe, mixture, DATA, config=GateTraining({"separate": {"steps": 2}}, **SHORT))


@pytest.mark.parametrize("progress", [True, *thorough(False)])
def test_bars_show_the_teachers_pictures_and_the_updates(pipe, mixture, capsys, progress):
    config = GateTraining({"single": TEACH}, batch=2, steps=2, initial="uniform")
    train_gates(pipe, mixture, DATA, config=config, progress=progress)
    shown = capsys.readouterr().err
    assert [bar in shown for bar in ("pictures of fox", "pictures of ink", "gates: 100%")] == [progress] * 3


@pytest.mark.shows("Training")
def test_prompts_without_a_trigger_are_warned_of(pipe, mixture):
    data = replace(DRAWN, composed=["a fox"], singles={"ink": ["oil paint"]})
    with pytest.warns(UserWarning, match="has no trigger of expert") as caught:
        train_gates(pipe, mixture, data, config=replace(DENOISE, steps=1))
    assert [str(w.message) for w in caught] == [
        "the prompt 'a fox' has no trigger of expert 'ink': ['ink']",
        "the prompt 'oil paint' has no trigger of expert 'ink': ['ink']",
    ]


def test_the_balance_is_that_of_the_experts_that_take_part(pipe, mixture):
    config = replace(DENOISE, terms={"denoise": 1.0, "balance": 0.1}, drop=0.99, steps=2)  # one of two sits out
    log = train_gates(pipe, mixture, DRAWN, config=config)
    assert [row["balance"] for row in log] == pytest.approx([0, 0], abs=1e-5)


@pytest.mark.parametrize("strength", [0.0, *thorough(None)])
def test_the_balance_leaves_out_what_is_at_0_or_off(pipe, loras, strength):
    mixture, config = mole.attach(pipe, loras, "mole"), replace(DENOISE, terms={"denoise": 1.0, "balance": 0.1}, steps=1)
    if strength is None:
        with mixture.only("fox", "ink"):
            (row,) = train_gates(pipe, mixture, DRAWN, config=config)
    else:
        mixture.strength("hat", strength)
        (row,) = train_gates(pipe, mixture, DRAWN, config=config)
    assert row["balance"] == pytest.approx(0, abs=1e-5)


def test_a_batch_that_cannot_be_divided(pipe, mixture):
    with pytest.raises(ValueError, match="denoise term's batch, 4, must be a multiple of processes x accumulation, 3"):
        train_gates(pipe, mixture, DRAWN, config=replace(DENOISE, accumulation=3))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_training_on_cuda(loras, clip, precision):
    pipe = tiny_pipeline().to("cuda")
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    clip.model.to("cuda")
    terms = BOTH | {"rollout": {"steps": 2, "batch": 2}, "balance": 0.1}
    log = train_gates(pipe, mixture, DRAWN, config=GateTraining(terms, precision=precision, **SHORT), clip=clip)
    assert all(math.isfinite(row["loss"]) for row in log)
    assert all(p.device.type == "cuda" for p in mixture.parameters())


def test_a_run_ends_with_the_means_of_its_last_tenth():
    """And with the latest success in validation. A short run has one update at each end."""
    log = [{"step": i, "loss": float(100 - i), "single": i % 2} for i in range(40)]
    log[20]["success"], log[35]["success"] = 0.25, 0.75
    first, last = mean_losses(log)
    assert first == {"loss": 98.5, "single": 0.5}
    assert last == {"loss": 62.5, "single": 0.5, "success": 0.75}
    assert mean_losses(log[:5]) == ({"loss": 100.0, "single": 0.0}, {"loss": 96.0, "single": 0.0})
    text = summary(GateTraining({"single": 1.0}), log)
    assert text == (
        "Trained for 40 updates on single (weight 1). Mean of the last tenth of them: loss 62.5, single 0.5, success 0.75."
    )
