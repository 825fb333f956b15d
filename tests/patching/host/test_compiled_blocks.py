"""Regional compilation: blocks that are alike share their code, with a mixture as without."""

from contextlib import nullcontext

import pytest
import torch
import torch._dynamo
from diffusers import UNet2DConditionModel
from gate_types import LEARNED
from tiny import tiny_pipeline

import mole_diffusers as mole
from benchmarks.hosts import lora_files


def compiled(unet, step):
    """(what a step gives, how many graphs were made for it and the next one)."""
    torch.compiler.reset()
    graphs = []
    unet.compile_repeated_blocks(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    with torch.no_grad():
        given = step()
        step()
    return given, len(graphs)


def narrow(width):
    """SD 1.5's sixteen blocks, few channels."""
    torch.manual_seed(0)
    shape = {"block_out_channels": (8, 16, 16, 16), "attention_head_dim": 2, "norm_num_groups": 4}
    return UNet2DConditionModel(sample_size=8, cross_attention_dim=width, **shape).eval()


@pytest.mark.thorough
@pytest.mark.parametrize("gate_type", LEARNED)
@pytest.mark.shows("`torch.compile`")
def test_sixteen_blocks_share_the_graphs_that_the_base_has(gate_type, awake, tmp_path):
    pipe = tiny_pipeline()
    width = pipe.unet.config.cross_attention_dim
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, width)

    def step():
        return pipe.unet(latents, 5, encoder_hidden_states=text, return_dict=False)[0]

    pipe.register_modules(unet=narrow(width))
    plain = compiled(pipe.unet, step)[1]
    pipe.register_modules(unet=narrow(width))
    mixture = awake(mole.attach(pipe, lora_files(pipe.unet, tmp_path, 3, rank=2), gate_type))
    with torch.no_grad():
        expected = step()
    given, graphs = compiled(pipe.unet, step)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)
    assert graphs <= 2 * plain <= 8  # a gate of its own code before each kind of block, at most
    with torch.no_grad(), mixture.only("lora0"):
        assert (step() - expected).abs().max() > 1e-3


@pytest.mark.thorough
@pytest.mark.parametrize("tiled", [False, True], ids=["bound", "in tiles"])
def test_twenty_changes_of_strength_prompt_seed_and_places_compile_nothing_again(pipe, loras, awake, tiled):
    """After two pictures that differ in all of these: the first sizes of tiles are compiled as they are."""
    torch.compiler.reset()
    mixture, graphs, pictures = awake(mole.attach(pipe, {name: loras[name] for name in ("fox", "ink")}, "mole")), [], []
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)

    def draw(i):
        edge = 0.5 + (i % 3 - 1) / 8
        mixture.bind({"fox": ("fox", (0, 0, edge, 1)), "ink": ("ink", (edge, 0, 1, 1))})
        mixture.strength("fox", 0.5 + i / 20)
        prompt, generator = f"a fox and an ink{i % 7 * ' x'}", torch.Generator().manual_seed(i)
        with mixture.tiled(0.5, prompt="a fox and an ink") if tiled else nullcontext():
            size = {"height": 32, "width": 64}
            pictures.append(pipe(prompt, generator=generator, num_inference_steps=2, output_type="pt", **size).images)

    for i in range(3):
        draw(i)
    known = len(graphs)
    for i in range(3, 23):
        draw(i)
    assert known > 0
    assert len(graphs) == known
    for block in pipe.unet.modules():
        block._compiled_call_impl = None
    draw(22)
    torch.testing.assert_close(pictures[-1], pictures[-2], atol=2e-5, rtol=0)


@pytest.mark.thorough
@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize(("bound", "most"), [(False, 3), (True, 8)])
@pytest.mark.shows("binding with `torch.compile`")
def test_pictures_of_other_sizes_compile_twice_each_if_bound_and_like_the_base_otherwise(pipe, loras, awake, bound, most):
    torch.compiler.reset()
    mixture = awake(mole.attach(pipe, {name: loras[name] for name in ("fox", "ink")}, "mole"))
    if bound:
        mixture.bind({"fox": ("fox", (0, 0, 0.5, 1)), "ink": ("ink", (0.5, 0, 1, 1))})
    graphs = []
    pipe.unet.compile_repeated_blocks(fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    sizes = [(32, 64), (64, 32), (32, 32), (64, 64)]
    for height, width in sizes:
        generator = torch.Generator().manual_seed(0)
        pipe("a fox and an ink", generator=generator, num_inference_steps=2, height=height, width=width)
    assert 0 < len(graphs) <= most  # the tiny model has one kind of block; the base has 3 graphs of it
