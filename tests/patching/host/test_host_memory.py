"""Offloading, compiling and storing in fewer bits, with a mixture on the pipeline before or after."""

import copy

import pytest
import torch
import torch._dynamo
from accelerate.hooks import ModelHook, add_hook_to_module
from gate_types import gate_types
from hosts import OFFLOADS
from tiers import thorough
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.pipelines.kept import attach_kept, keep

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.mark.thorough  # whole models are in studio/test_render.py, and the leaves of Flux in test_host_switches.py
@pytest.mark.parametrize("name", OFFLOADS)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.shows("these work")
def test_offloading_before_and_after_attach(pipe, loras, draw, awake, tmp_path, name, first):
    base = draw(pipe)
    awake(mole.attach(pipe, loras, "mole")).save_pretrained(tmp_path)
    picture = draw(pipe)
    if first:
        mole.detach(pipe)
    OFFLOADS[name](pipe)
    if first:
        mole.attach(pipe, loras, tmp_path)
    torch.testing.assert_close(draw(pipe), picture, **CLOSE)
    if name == "sequential":
        assert all(p.is_meta for p in pipe.unet.parameters())
    if name in ("block", "leaf"):
        leaf = pipe.unet.mid_block.attentions[0].proj_in.lora_A["mole_experts"]
        assert (name == "leaf") is (getattr(leaf, "_diffusers_hook", None) is not None)
    keep(mole.attached(pipe), tmp_path / "kept")
    attach_kept(other := tiny_pipeline(), tmp_path / "kept")
    torch.testing.assert_close(draw(other), picture, **CLOSE)
    if name in ("model", "sequential"):  # diffusers' own hooks of groups cannot be copied
        torch.testing.assert_close(draw(copy.deepcopy(pipe)), picture, **CLOSE)
    mole.detach(pipe)
    torch.testing.assert_close(draw(pipe), base, **CLOSE)


class Elsewhere(ModelHook):
    """As model offloading: the weights are right only while the model's own forward runs."""

    def init_hook(self, module):
        self.kept = {name: p.data.clone() for name, p in module.named_parameters()}
        return self.post_forward(module, module)

    def pre_forward(self, module, *args, **kwargs):
        for name, p in module.named_parameters():
            p.data.copy_(self.kept[name])
        return args, kwargs

    def post_forward(self, module, output):
        for p in module.parameters():
            p.data.fill_(torch.nan)
        return output


@pytest.mark.parametrize("gate_type", gate_types("rank"))
def test_no_gate_reads_weights_before_the_host_has_brought_them(pipe, loras, draw, awake, gate_type):
    awake(mole.attach(pipe, loras, gate_type))
    picture = draw(pipe)
    for model in (pipe.unet, pipe.text_encoder):
        add_hook_to_module(model, Elsewhere())
    assert torch.equal(draw(pipe), picture)


@pytest.mark.thorough
@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.parametrize("how", ["module", "wrapped first", "wrapped after", "blocks"])
@pytest.mark.shows("`torch.compile`")
def test_compiled_whole(pipe, loras, draw, awake, how):
    """One graph without breaks; strengths and masks still count, and the original comes back."""
    torch.compiler.reset()
    options = {"fullgraph": True, "backend": "eager"}
    base = draw(pipe)
    if how == "wrapped first":
        pipe.unet = torch.compile(pipe.unet, **options)
    mixture = awake(mole.attach(pipe, loras, "mole"))
    with mixture.only("ink"):
        ink = draw(pipe)
    picture = draw(pipe)
    if how == "wrapped after":
        pipe.unet = torch.compile(pipe.unet, **options)
    elif how == "module":
        pipe.unet.compile(**options)
    elif how == "blocks":
        pipe.unet.compile_repeated_blocks(**options)
    torch.testing.assert_close(draw(pipe), picture, **CLOSE)
    with mixture.only("ink"):
        torch.testing.assert_close(draw(pipe), ink, **CLOSE)
    assert mole.attached(pipe) is mixture
    mole.detach(pipe)
    torch.testing.assert_close(draw(pipe), base, **CLOSE)


@pytest.mark.parametrize("first", [*thorough(True), False])
@pytest.mark.shows("fp8 layerwise casting")
def test_layerwise_casting_rounds_the_host_and_not_the_experts(pipe, loras, draw, awake, first):
    """The other route: the same layers of the host rounded to fp8 by hand."""
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    if first:
        pipe.unet.enable_layerwise_casting(**cast)
    awake(mole.attach(pipe, loras, "mole"))
    if not first:
        pipe.unet.enable_layerwise_casting(**cast)
    picture = draw(pipe)
    stored = {n.replace(".base_layer", "") for n, p in pipe.unet.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert not any("lora" in name or "gates" in name for name in stored)
    assert any("to_q" in name for name in stored)
    plain = tiny_pipeline()
    for name, p in plain.unet.named_parameters():
        if name in stored:
            p.data = p.data.to(torch.float8_e4m3fn).float()
    awake(mole.attach(plain, loras, "mole"))
    torch.testing.assert_close(picture, draw(plain), **CLOSE)


@pytest.mark.thorough
@pytest.mark.parametrize("how", ["whole", "blocks"])
@pytest.mark.shows("`torch.compile`")
def test_gates_strengths_and_masks_change_without_compiling_again(pipe, loras, draw, awake, how):
    torch.compiler.reset()
    mixture = awake(mole.attach(pipe, loras, "mole"))
    expected = {}
    with mixture.only("ink", "hat"):
        mixture.strength("ink", -0.5)
        awake(mixture, seed=1)
        expected["changed"] = draw(pipe)
    awake(mixture, seed=0)
    mixture.strength("ink", 1.0)
    compile = {"whole": pipe.unet.compile, "blocks": pipe.unet.compile_repeated_blocks}[how]
    compile(fullgraph=True, backend="eager")
    draw(pipe)
    with torch._dynamo.config.patch(error_on_recompile=True), mixture.only("ink", "hat"):
        mixture.strength("ink", -0.5)
        awake(mixture, seed=1)
        torch.testing.assert_close(draw(pipe), expected["changed"], **CLOSE)


@pytest.mark.parametrize("first", [True, *thorough(False)])
def test_channels_last_draws_the_same(pipe, loras, draw, awake, first):
    awake(mole.attach(pipe, loras, "mole"))
    picture = draw(pipe)
    if first:
        mole.detach(pipe)
    pipe.unet.to(memory_format=torch.channels_last)
    if first:
        awake(mole.attach(pipe, loras, "mole"))
    assert pipe.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(draw(pipe), picture, atol=3e-5, rtol=0)  # another layout sums in another order
