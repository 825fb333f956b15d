"""The commands as a shell runs them: killed and given again, and started as several processes that act as one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image
from ports import free_port
from safetensors.torch import load_file
from tiny import tiny_clip, tiny_pipeline, tiny_tokenizer

from mole_cli.mole import main
from mole_diffusers.training import checkpoints
from mole_diffusers.training.engine import STATE

pytestmark = pytest.mark.thorough
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}  # bits depend on how many threads add numbers up
MODULE = [sys.executable, "-m", "mole_cli"]


@pytest.fixture(scope="module")
def lines(loras, tmp_path_factory):
    """command -> its flags, all but --out and --steps, on tiny models."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny_pipeline().save_pretrained(folder / "base")
    for part in (tiny_clip(), tiny_tokenizer()):
        part.save_pretrained(folder / "clip")
    (folder / "photos").mkdir()
    for i in range(2):
        Image.new("RGB", (32, 32), (90 * i, 0, 200)).save(folder / "photos" / f"{i}.png")
        (folder / "photos" / f"{i}.txt").write_text("a fox")
    settings = {
        "base": str(folder / "base"),
        "experts": {name: str(loras[name]) for name in ("fox", "ink")},
        "gates": {"gate_type": "mole"},
        "lesson": {"singles": {"fox": ["a fox"], "ink": ["ink art"]}, "composed": ["a fox in ink"]},
        "data": [str(folder / "photos")],
        "clip": str(folder / "clip"),
        "training": {
            "terms": {"single": {"seeds": 2, "steps": 2}, "clip": {"lengths": [3, 3]}, "balance": 0.1},
            "batch": 4,
            "ema": 0.9,
        },
    }
    (folder / "gates.json").write_text(json.dumps(settings))
    prior = ["--prior-prompt", "a cat", "--prior-count", "2", "--prior-steps", "2"]
    concept = ["--base", str(folder / "base"), "--data", str(folder / "photos"), "--trigger", "fox", *prior, "--beam"]
    return {
        "train": ["train", "--config", str(folder / "gates.json"), "--every", "2"],
        "train-lora": ["train-lora", *concept, "--batch", "4", "--every", "2"],
    }


@pytest.fixture
def alone():
    """run(line): the command in this process, with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield lambda line: main([str(word) for word in line])
    torch.set_num_threads(threads)


def trained(out):
    """The tensors that a run leaves, and its log."""
    (file,) = out.glob("*.safetensors") if (out / "config.json").exists() else [out / f"{out.name}.safetensors"]
    return load_file(file), [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("command", ["train", "train-lora"])
def test_a_line_killed_in_the_middle_and_given_again_ends_as_if_it_had_not_been(lines, alone, tmp_path, command):
    steps, out = 20, tmp_path / "killed" / "x"
    line = [*lines[command], "--steps", str(steps), "--out", str(out), "--resume", "latest"]
    child = subprocess.Popen([*MODULE, *line], env=ALONE, stderr=subprocess.DEVNULL)
    while not (out / "log.jsonl").exists():  # which is written after the first checkpoint
        assert child.poll() is None
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert checkpoints(out)
    assert not list(out.glob("*.safetensors" if command == "train" else "x.safetensors"))
    assert len((out / "log.jsonl").read_text().splitlines()) < steps
    subprocess.run([*MODULE, *line], env=ALONE, check=True, timeout=600)
    whole = tmp_path / "whole" / "x"
    assert alone([*lines[command], "--steps", steps, "--out", whole]) == 0
    (found, rows), (wanted, expected) = trained(out), trained(whole)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert rows == expected


def launched(way, tmp_path):
    """The words before `-m mole_cli` of each command that is to be started, for two processes on this CPU."""
    accelerate = [sys.executable, "-m", "accelerate.commands.launch"]
    known = ["--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    if way == "mpirun":
        (tmp_path / "hosts").write_text("localhost\nlocalhost\n")
        hosts = ["--cpu", "--num_machines", "1", "--mpirun_hostfile", str(tmp_path / "hosts")]
        return [[*accelerate, *known, *hosts, "--main_process_port", free_port()]]
    known += ["--multi_gpu", "--main_process_port", free_port()]
    if way == "processes":
        return [[*accelerate, *known, "--num_machines", "1"]]
    machines = ["--num_machines", "2", "--main_process_ip", "127.0.0.1"]
    return [[*accelerate, *known, *machines, "--machine_rank", str(rank)] for rank in range(2)]


MPIRUN = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs mpirun")


@pytest.mark.parametrize(
    ("command", "way"),
    [
        ("train", "processes"),
        ("train", "machines"),
        pytest.param("train", "mpirun", marks=MPIRUN),
        ("train --family rank", "processes"),  # its gates count over all processes,
        ("train --family prompt", "processes"),  # and these weigh their load over all
        ("train-lora", "processes"),
    ],
)
def test_accelerate_launch_on_two_cpu_processes_equals_one(lines, alone, tmp_path, command, way):
    command, *gate_type = command.split()
    line, root = (
        [*lines[command], *gate_type, "--steps", "4"],
        {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"},
    )
    two, one = tmp_path / "two" / "x", tmp_path / "one" / "x"
    own = ["-m", "mole_cli", *line, "--device", "cpu", "--out", str(two)]
    started = [subprocess.Popen([*launcher, *own], env=ALONE | root) for launcher in launched(way, tmp_path)]
    assert [process.wait(timeout=600) for process in started] == [0] * len(started)
    assert alone([*line, "--out", one]) == 0
    (found, rows), (wanted, expected) = trained(two), trained(one)
    near = {"atol": 1e-5 if command == "train" else 1e-4, "rtol": 1e-3}  # a LoRA's file is fp16
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, **near)
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-6)
    if command == "train":  # each of the two was on a way of its own
        kept = torch.load(two / "checkpoint-4" / STATE, weights_only=True)["kept"]
        assert sorted(kept) == ["clip 0", "clip 1"]
