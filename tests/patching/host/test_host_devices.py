"""Pictures where they are meant to be drawn: on a card, in half precision, in tiles, compiled; on a CPU for want of one."""

from contextlib import nullcontext

import pytest
import torch
from devices import DEVICES
from tiny import tiny_pipeline

import mole_diffusers as mole


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("how", ["bound", "in tiles", "compiled"])
def test_a_picture_is_that_of_the_cpu_in_whole_precision(loras, awake, device, dtype, how):
    def drawn(device, dtype, compiled):
        pipe = tiny_pipeline().to(device, getattr(torch, dtype))
        binding = None if how == "compiled" else {"fox": ("fox", "left"), "ink": ("ink", "right")}  # one graph binds nothing
        mixture = awake(mole.attach(pipe, {name: loras[name] for name in ("fox", "ink")}, "mole", binding=binding))
        if compiled:
            graphs = {"mode": "reduce-overhead"} if device == "cuda" else {"backend": "aot_eager"}
            pipe.unet.compile(fullgraph=True, **graphs)
        options = {"height": 32, "width": 64, "num_inference_steps": 4, "output_type": "pt"}
        with mixture.tiled(0.5) if how == "in tiles" else nullcontext():
            generator = torch.Generator().manual_seed(0)
            return pipe("a fox and an ink", generator=generator, **options).images.float().cpu()

    wanted = drawn("cpu", "float32", False)
    try:
        found = drawn(device, dtype, how == "compiled")
    finally:
        torch.compiler.reset()
    assert (found - wanted).abs().mean() < (1e-4 if dtype == "float32" else 0.01)
