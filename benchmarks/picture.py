"""Time to a picture: open a pipeline, put LoRAs on it, draw, save. With a mixture and with diffusers alone, by stage."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusers import DiffusionPipeline

from benchmarks.arms import load
from benchmarks.clock import CLOCKS, Measure, interleaved
from benchmarks.settings import DTYPES, Cost, Files, Settings
from mole_diffusers.mixture import attach

STEPS = 8
PROMPT = "bcd"
# What diffusers' documentation shows: a pipeline, LoRAs, a picture.
SCRIPT = """
import sys
import torch
from diffusers import DiffusionPipeline

folder, out, dtype, device, side, *files = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
for i, file in enumerate(files):
    pipe.load_lora_weights(file, adapter_name=f"lora{i}")
pipe.set_adapters([f"lora{i}" for i in range(len(files))], [1.0] * len(files))
generator = torch.Generator().manual_seed(0)
pipe("PROMPT", num_inference_steps=STEPS, width=int(side), height=int(side), generator=generator).images[0].save(out)
""".replace("PROMPT", PROMPT).replace("STEPS", str(STEPS))


def picture_costs(settings: Settings, _: Sequence[str], experts: Sequence[int]) -> list[Cost]:
    """The seconds of each stage with N LoRAs, relative to the same stage of diffusers' own way, which comes first."""
    rows = []
    with settings.host(experts) as (pipe, _given, files), TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        del pipe, _given
        for n in experts:
            found: dict[str, dict[str, list[float]]] = {"diffusers": {}, "mixture": {}}
            ways = {way: partial(_drawn, settings, folder, files[n], way, found[way]) for way in found}
            interleaved(ways, repeats=settings.repeats, warmup=0)
            for stage, theirs in found["diffusers"].items():
                for way, times in found.items():
                    rows.append(Cost.of(f"{stage}, {way}", n, seconds=times[stage], base=theirs))
    return rows


def _drawn(settings: Settings, folder: str, files: Files, way: str, found: dict[str, list[float]]) -> float:
    """Draw one picture, and add the seconds of each stage to `found`. Returns their sum."""
    clock = CLOCKS[settings.clock]
    ends, total = [clock()], 0.0

    def done(stage: str) -> None:
        ends.append(clock())
        found.setdefault(stage, []).append(ends[-1] - ends[-2])

    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=DTYPES[settings.dtype]).to(settings.device)
    pipe.set_progress_bar_config(disable=True)
    done("open")
    if way == "mixture":
        attach(pipe, dict(files), settings.gates)
    else:
        load(pipe, files)
        pipe.set_adapters(list(files), [1.0] * len(files))
    done("LoRAs")

    def stepped(_pipe: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in (0, STEPS - 1):
            done("text and first step" if step == 0 else f"{STEPS - 1} more steps")
        return tensors

    side = {"width": settings.side, "height": settings.side}
    picture = pipe(PROMPT, num_inference_steps=STEPS, callback_on_step_end=stepped, **side).images[0]
    done("decoding")
    with TemporaryDirectory() as out:
        picture.save(Path(out) / "picture.png")
    done("save")
    total = ends[-1] - ends[0]
    found.setdefault("all", []).append(total)
    return total


def cold_costs(settings: Settings, _: Sequence[str], experts: Sequence[int]) -> list[Cost]:
    """`mole draw` in a new process with N LoRAs, relative to a script of diffusers alone."""
    rows = []
    with settings.host(experts) as (pipe, _given, files), TemporaryDirectory() as folder:
        base, loras = Path(folder) / "base", next(iter(files[experts[0]].values())).parent
        pipe.save_pretrained(base)
        del pipe, _given
        for n in experts:
            given = [str(base), f"{folder}/one.png", str(DTYPES[settings.dtype]).removeprefix("torch."), settings.device]
            script = [sys.executable, "-c", SCRIPT, *given, str(settings.side), *map(str, files[n].values())]
            prompt = " ".join([PROMPT, *(f"<lora:{name}:1>" for name in files[n])])
            side = ["--width", str(settings.side), "--height", str(settings.side)]
            draw = [sys.executable, "-m", "mole_diffusers", "draw", prompt, "--base", str(base), "--loras", str(loras)]
            draw += ["--steps", str(STEPS), *side, "--seed", "0", "--device", settings.device, "--dtype", given[2]]
            draw += ["--out", f"{folder}/two.png", "--overwrite"]
            ways: Mapping[str, Measure] = {
                "script": partial(_process, script, settings.clock),
                "mole draw": partial(_process, draw, settings.clock),
            }
            times = interleaved(ways, repeats=settings.repeats, warmup=1)
            rows += [Cost.of(f"cold, {way}", n, seconds=took, base=times["script"]) for way, took in times.items()]
    return rows


def _process(command: Sequence[str], clock: str) -> float:
    """The seconds of a process; with the clock "cpu" those that it and its children computed."""
    now: Callable[[], float] = time.perf_counter if clock == "wall" else _of_children
    start = now()
    subprocess.run(command, check=True, capture_output=True)
    return now() - start


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
