"""What breaks runs from outside: a disk that is really full, and pictures or numbers that are no good."""

import json
import resource
import shutil
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_cli.mole import main
from mole_diffusers.lora.writing import save_atomically
from mole_diffusers.training import GateTraining, LoraTraining, Samples, TrainingData, engine, train_gates, train_lora

PICTURES = Samples(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), ["a fox"] * 4)
CONCEPT = LoraTraining(rank=4, steps=4, batch=2, lr=1e-2, every=2)


@contextmanager
def files_of(size):
    """No file may grow beyond `size` bytes: what the system says then is what it says of a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def gates(loras, folder, **options):
    mixture = mole.attach(tiny_pipeline(), {n: loras[n] for n in ("fox", "ink")}, "mole")
    config = GateTraining({"denoise": 1.0}, batch=2, steps=4, every=2)
    pipe = mixture.parts.pipe
    train_gates(pipe, mixture, TrainingData(samples=PICTURES), config=config, folder=folder, **options)
    return {f"{part}.{k}": v.clone() for part, bank in mixture.banks.items() for k, v in bank.state_dict().items()}


def concept(loras, folder, **options):
    return train_lora(tiny_pipeline(), PICTURES, CONCEPT, folder=folder, **options)


@pytest.mark.thorough
@pytest.mark.parametrize(("train", "weights"), [(gates, "gates.safetensors"), (concept, "lora.safetensors")])
def test_a_full_disk_loses_nothing_and_the_run_goes_on(loras, tmp_path, train, weights):
    """Full at the weights, and at the state beside them; both later go on to what an undisturbed run gives."""
    wanted = train(loras, tmp_path / "whole")
    sizes = [(tmp_path / "whole" / "checkpoint-2" / name).stat().st_size for name in (weights, engine.STATE)]
    for size in (sizes[0] // 2, (sizes[0] + sizes[1]) // 2):
        folder = tmp_path / str(size)

        def fill(row, size=size):
            if row["step"] == 1:  # the first checkpoint stands
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        with (
            files_of(resource.RLIM_INFINITY),
            pytest.raises(OSError, match=r"checkpoint-4 cannot be written: .*; whole checkpoints: \['checkpoint-2'\]"),
        ):
            train(loras, folder, report=fill)
        assert sorted(p.name for p in folder.iterdir() if p.name[0] != ".") == ["checkpoint-2", "log.jsonl"]
        found = train(loras, folder, resume_from="latest")
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_file_that_was_there_stays_where_the_new_one_does_not_fit(tmp_path):
    path = tmp_path / "x.safetensors"
    save_atomically({"a": torch.ones(2)}, path, {"format": "pt"})
    before = path.read_bytes()
    with files_of(1000), pytest.raises(OSError, match=r"x\.safetensors cannot be written: "):
        save_atomically({"a": torch.ones(10_000)}, path, {})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_concept_that_goes_wrong_stops_keeps_its_checkpoint_and_is_named(tmp_path):
    wild = replace(CONCEPT, lr=1e30, every=1)
    with pytest.raises(ValueError, match=r"the loss is not finite at step 1: .*; sks fox: a lower rate"):
        train_lora(tiny_pipeline(), PICTURES, wild, name="sks fox", folder=tmp_path)
    assert [p.name for p in engine.checkpoints(tmp_path)] == ["checkpoint-1"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_broken_picture_stops_gate_training_before_it_begins(loras, tmp_path, capsys):
    base, photos = tmp_path / "base", tmp_path / "photos"
    tiny_pipeline().save_pretrained(base)
    photos.mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32)).save(photos / f"{i}.png")
        (photos / f"{i}.txt").write_text("a fox")
    whole = (photos / "1.png").read_bytes()
    (photos / "1.png").write_bytes(whole[: len(whole) // 2])  # cut off on the way
    command = ["train", "--base", str(base), "--expert", f"fox={loras['fox']}", "--data", str(photos), "--term", "denoise"]
    command += ["--steps", "1", "--batch", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert "1.png cannot be read as a picture" in error
    assert error.count("mole train:") == 1
    assert not (tmp_path / "out").exists()
    (photos / "1.png").write_bytes(whole)
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "log.jsonl").read_text())["step"] == 0


@pytest.fixture(scope="module")
def trained(loras, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("trained")
    gates(loras, folder)
    return folder


@pytest.mark.parametrize("harm", [b"", b"\x80\x02no", None, "[]"])
@pytest.mark.shows("Training")
def test_a_damaged_checkpoint_is_named(loras, trained, tmp_path, harm):
    """Cut short, no such file at all, half of it, or settings that are none."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "checkpoint-4" / engine.STATE
    whole = state.read_bytes()
    if isinstance(harm, str):
        torch.save(torch.load(state, weights_only=True) | {"run": harm}, state)
    else:
        state.write_bytes(whole[: len(whole) // 2] if harm is None else harm)
    with pytest.raises(ValueError, match=r"checkpoint-4/training\.pt is damaged .*; resume from another checkpoint"):
        gates(loras, tmp_path, resume_from="latest")
