"""Modular diffusers: blocks with the inputs of `attach`, against the pipelines of the same models."""

import hosts
import numpy as np
import pytest
import torch
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.modular_pipelines.krea2 import encoders as krea2
from tiers import thorough
from tiny import ATTENTION, tiny_lora

import mole_diffusers as mole

CALL = {"num_inference_steps": 2, "output_type": "np"}
LAYERS = (*ATTENTION[:4], "w1", "to_qkv_mlp_proj", "proj_mlp", "img_mlp.net.2")
LATENTS = torch.randn(1, 4, 2, 16, 16, generator=torch.Generator().manual_seed(0))
# Host -> blocks, the scale of their guider, and how the pipeline is guided alike. Two are drawn without guidance: diffusers'
# own blocks of SD 3 read the prompt in both predictions, and Qwen-Image's pipeline changes the length of guided ones.
BLOCKS = {
    "sdxl": (mole.MoLEStableDiffusionXLBlocks, 5.0, {"guidance_scale": 5.0}),
    "sd3": (mole.MoLEStableDiffusion3Blocks, 1.0, {"guidance_scale": 1.0}),
    "flux": (mole.MoLEFluxBlocks, None, {}),
    "flux2": (mole.MoLEFlux2KleinBlocks, None, {"guidance_scale": 1.0}),
    "qwen": (mole.MoLEQwenImageBlocks, 1.0, {"true_cfg_scale": 1.0}),
    "z_image": (mole.MoLEZImageBlocks, 3.0, {"guidance_scale": 2.0}),
    "krea2": (mole.MoLEKrea2Blocks, 3.0, {"guidance_scale": 2.0}),
    "anima": (mole.MoLEAnimaBlocks, 4.0, {}),
    "wan": (mole.MoLEWanBlocks, 3.0, {"guidance_scale": 3.0, "latents": LATENTS}),
    "ltx": (mole.MoLELTXBlocks, 3.0, {"guidance_scale": 3.0}),
}
VIDEOS = ("wan", "ltx")
BINDINGS = [*thorough(None, "auto"), {"fox": ("fox", "left"), "ink": ("ink", "right")}]


@pytest.fixture
def host(request):
    return getattr(request, "param", "sdxl")


@pytest.fixture
def options(host):
    """What both draw with."""
    _, options = hosts.HOSTS[host]()
    length = {} if host in ("sdxl", "sd3") else {"max_sequence_length": 64 if host == "krea2" else 16}
    return hosts.SIZE | options | CALL | BLOCKS[host][2] | length


@pytest.fixture
def pipe(host):
    return hosts.HOSTS[host]()[0]


@pytest.fixture
def modular(host, pipe, monkeypatch):
    kind, scale, _ = BLOCKS[host]
    blocks = kind()
    if host == "qwen":  # as in hosts.py
        encoder = blocks.sub_blocks["text_encoder"].sub_blocks["text_encoder"]
        monkeypatch.setattr(encoder, "prompt_template_encode_start_idx", pipe.prompt_template_encode_start_idx)
    if host == "krea2":
        suffix = pipe.prompt_template_encode_num_suffix_tokens
        monkeypatch.setattr(krea2, "KREA2_TEXT_ENCODER_SELECT_LAYERS", pipe.text_encoder_select_layers)
        monkeypatch.setattr(krea2, "_PROMPT_TEMPLATE_ENCODE_START_IDX", pipe.prompt_template_encode_start_idx)
        monkeypatch.setattr(krea2, "_PROMPT_TEMPLATE_ENCODE_NUM_SUFFIX_TOKENS", suffix)
    made = blocks.init_pipeline()
    parts = {part.name for part in blocks.expected_components}
    guider = {} if scale is None else {"guider": ClassifierFreeGuidance(guidance_scale=scale)}
    made.update_components(**{name: part for name, part in pipe.components.items() if name in parts} | guider)
    return made


@pytest.fixture
def experts(pipe, tmp_path):
    encoders = {part: model for part, model in pipe.components.items() if part.startswith("text_encoder")}
    for part in encoders:
        setattr(pipe, part, None)
    ends = ATTENTION if hasattr(pipe, "unet") else LAYERS
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=ends) for i, n in enumerate(("fox", "ink"))}
    for part, model in encoders.items():
        setattr(pipe, part, model)
    return files


def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def drawn(host, modular, options):
    """A function that draws with the blocks."""
    taken = {given.name for given in modular.blocks.inputs}
    call = {name: value for name, value in options.items() if name in taken}

    def drawn(**experts):
        what = "videos" if host in VIDEOS else "images"
        return np.asarray(modular(prompt="a fox in ink", output=what, generator=generator(), **call, **experts))

    return drawn


@pytest.fixture
def reference(pipe, options):
    """A function that draws with the pipeline."""

    def reference(*attached, **how):
        if attached:
            mole.attach(pipe, *attached, **how)
        picture = np.asarray(hosts.draw(pipe, options | {"generator": generator()}, "a fox in ink"))
        mole.detach(pipe)
        return picture

    return reference


@pytest.mark.parametrize("binding", BINDINGS)
def test_the_blocks_draw_what_the_pipeline_draws(drawn, reference, experts, binding):
    wanted = reference(experts, "sum", binding=binding)
    np.testing.assert_allclose(drawn(experts=experts, binding=binding), wanted, atol=1e-5)


@pytest.mark.parametrize(
    "host", ["flux", *thorough(*(name for name in BLOCKS if name not in ("sdxl", "flux")))], indirect=True
)
@pytest.mark.shows("Pipelines")
def test_blocks_of_each_model_draw_what_its_pipeline_draws(host, drawn, reference, experts):
    found = []
    for binding in (None, {"fox": "fox", "ink": "ink"} if host in VIDEOS else {"fox": ("fox", "left"), "ink": "ink"}):
        found.append(drawn(experts=experts, binding=binding))
        np.testing.assert_allclose(found[-1], reference(experts, "sum", binding=binding), atol=1e-5)
    base = drawn(experts={})
    np.testing.assert_allclose(base, reference(), atol=1e-5)
    assert all(np.abs(one - other).max() > 1e-3 for one, other in zip(found, (base, found[0]), strict=True))


def test_each_call_says_what_is_attached(modular, drawn, reference, experts):
    base, fox = reference(), reference({"fox": (experts["fox"], 0.5)})
    np.testing.assert_allclose(drawn(), base, atol=1e-5)
    np.testing.assert_allclose(drawn(experts={"fox": (experts["fox"], 0.5)}), fox, atol=1e-5)
    np.testing.assert_allclose(drawn(), fox, atol=1e-5)
    np.testing.assert_allclose(drawn(experts={}), base, atol=1e-5)
    assert mole.attached(modular) is None


def test_a_loop_of_ones_own_is_a_call_in_drawing(pipe, options, reference, experts, recwarn):
    """`pipe.__call__` as diffusers wrote it, without what attach puts around it: a call says whose words are missing."""
    binding = {"fox": ("fox", "left"), "ink": "a hat"}
    mixture = mole.attach(pipe, experts, binding=binding)
    call = type(pipe).__call__.__wrapped__

    def loop():
        return call(pipe, "a fox in ink", generator=generator(), **options).images

    loop()
    assert not [w for w in recwarn if "acts everywhere" in str(w.message)]
    with mixture.drawing(), pytest.warns(UserWarning, match="expert 'ink' acts everywhere"):
        picture = loop()
    np.testing.assert_allclose(picture, reference(experts, binding=binding), atol=1e-6)
