"""Training where it is meant to run: half precision, two processes on one card, a compiled UNet; on a CPU for want of one.

`pytest -m gpu` runs them on a CUDA card, `pytest -m thorough` on the CPU.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from devices import DEVICES
from tiers import thorough
from tiny import tiny_pipeline
from torch.utils._python_dispatch import TorchDispatchMode

import mole_diffusers as mole
from mole_diffusers.training import (
    OBJECTIVES,
    GateTraining,
    Samples,
    TrainingContext,
    TrainingData,
    save_weight_memory,
    train_gates,
)
from mole_diffusers.training.config import Term
from mole_diffusers.training.gate_trainer import GateTrainer

PICTURES = Samples(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), ["a fox in ink"] * 4)
SHORT = GateTraining({"denoise": 1.0, "balance": 0.1}, batch=4, steps=3, every=3)


def train(files, device, config=SHORT, *, folder=None, compile=None, resume=None):
    """A run on a tiny pipeline of its own; returns its gates on the CPU and its log."""
    pipe = tiny_pipeline().to(device)
    mixture = mole.attach(pipe, files, "mole")
    if compile is not None:
        pipe.unet.compile(backend=compile)
    log = train_gates(pipe, mixture, TrainingData(samples=PICTURES), config=config, folder=folder, resume_from=resume)
    return {f"{p}.{k}": v.cpu() for p, bank in mixture.banks.items() for k, v in bank.state_dict().items()}, log


def close(one, other, *, atol):
    assert one.keys() == other.keys()
    for name, gate in other.items():
        torch.testing.assert_close(one[name], gate, atol=atol, rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_learns_the_same_and_keeps_gates_whole(loras, device, precision):
    files = {n: loras[n] for n in ("fox", "ink")}
    whole, half = (train(files, device, replace(SHORT, precision=name)) for name in ("no", precision))
    assert [row["denoise"] for row in half[1]] == pytest.approx([row["denoise"] for row in whole[1]], rel=0.05)
    assert all(gate.dtype == torch.float32 and torch.isfinite(gate).all() for gate in half[0].values())
    moved = {name: gate for name, gate in half[0].items() if gate.abs().sum() > 0}
    assert moved.keys() == {name for name, gate in whole[0].items() if gate.abs().sum() > 0}


class Copies(TorchDispatchMode):
    """Adds up the bytes of the copies of frozen weights in another precision."""

    def __init__(self, model):
        super().__init__()
        self.frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad and p.dim() > 1}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        if func is torch.ops.aten._to_copy.default and args[0].dim() > 1 and args[0].data_ptr() in self.frozen:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("precision", ["bf16", *thorough("fp16")])
@pytest.mark.parametrize("term", ["denoise", *thorough("composed")])
def test_a_unet_in_the_precision_of_the_run_has_no_copies_of_its_weights(pipe, loras, precision, term):
    files, config = {n: loras[n] for n in ("fox", "ink")}, GateTraining({term: 1.0}, batch=2, steps=2, precision=precision)
    data = TrainingData(composed=["a fox in ink"], samples=PICTURES)

    def trained():
        mixture = mole.attach(pipe, files, "mole")
        trainer = GateTrainer(TrainingContext(pipe, mixture, data, None, config))
        with trainer.only_gates_learn():
            trainer.prepare()
            with Copies(pipe.unet) as copies:
                trainer.update(0)
        mole.detach(pipe)
        return copies.bytes, trainer.engine.read_log()["loss"], {p.dtype for p in mixture.parameters()}

    weights = sum(p.numel() for p in pipe.unet.parameters() if p.dim() > 1)
    of_whole, loss, _ = trained()
    assert of_whole > 2 * 0.9 * weights  # each has a half copy
    save_weight_memory(pipe.unet, precision)
    of_half, same, dtypes = trained()
    assert of_half == 0
    assert same == pytest.approx(loss, rel=0.02)
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("device", DEVICES)
def test_a_compiled_unet_learns_the_same(loras, device):
    files = {n: loras[n] for n in ("fox", "ink")}
    config = replace(SHORT, steps=2)
    try:
        found = train(files, device, config, compile="inductor" if device == "cuda" else "aot_eager")
    finally:
        torch.compiler.reset()
    wanted = train(files, device, config)
    close(found[0], wanted[0], atol=1e-4)
    assert [row["loss"] for row in found[1]] == pytest.approx([row["loss"] for row in wanted[1]], rel=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_an_update_waits_for_no_card(loras, precision):
    """The driver's own word; `test_training_waits.py` asks the same of the meta device."""
    pipe = tiny_pipeline().to("cuda")
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    config = replace(SHORT, precision=precision, ema=0.9)
    context = TrainingContext(pipe, mixture, TrainingData(samples=PICTURES), config=config)
    trainer = GateTrainer(context)
    trainer.loss_fns = {"denoise": OBJECTIVES["denoise"](context, Term())}
    with trainer.only_gates_learn():
        trainer.update(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            trainer.update(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(trainer.engine.read_log()) == 4


@pytest.mark.parametrize("device", DEVICES)
def test_a_run_of_half_precision_cut_off_goes_on(loras, tmp_path, device):
    """With everything that a checkpoint must bring back to the device: optimizer, loss scale, running mean."""
    files = {n: loras[n] for n in ("fox", "ink")}
    config = replace(SHORT, precision="fp16", ema=0.9, every=1, keep=3)
    whole = train(files, device, config, folder=tmp_path)
    found = train(files, device, config, folder=tmp_path, resume="checkpoint-1")
    close(found[0], whole[0], atol=0 if device == "cpu" else 1e-5)
    assert [row["loss"] for row in found[1]] == pytest.approx([row["loss"] for row in whole[1]], rel=1e-4)


SCRIPT = """
import sys
sys.path[:0] = {tests!r}
from accelerate import PartialState
state = PartialState(cpu={device!r} == "cpu", backend="gloo")  # NCCL refuses two processes on one card
assert state.num_processes == 2
from test_training_devices import train
train(dict(fox=sys.argv[2], ink=sys.argv[3]), state.device, folder=sys.argv[1])
"""


@pytest.mark.parametrize("device", DEVICES)
def test_two_processes_on_one_device_equal_one(loras, tmp_path, device):
    """Each is started as a machine of its own, as launchers do by these variables, so that both take the first card."""
    files = {n: str(loras[n]) for n in ("fox", "ink")}
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=[str(folder) for folder in Path(__file__).parents[:2]], device=device))
    shared = {
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29517",
    }
    command = [sys.executable, str(script), str(tmp_path / "two"), *files.values()]
    both = [subprocess.Popen(command, env=os.environ | shared | {"RANK": str(rank)}) for rank in range(2)]
    assert [process.wait(timeout=600) for process in both] == [0, 0]
    wanted, log = train(files, device, folder=tmp_path / "one")
    mixture = mole.attach(tiny_pipeline(), files, gates=tmp_path / "two")
    found = {f"{p}.{k}": v for p, bank in mixture.banks.items() for k, v in bank.state_dict().items()}
    close(found, wanted, atol=1e-5)
    rows = [json.loads(line) for line in (tmp_path / "two" / "log.jsonl").read_text().splitlines()]
    for two, one in zip(rows, log, strict=True):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-5)
