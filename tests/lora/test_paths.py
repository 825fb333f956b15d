"""Every way through a gated layer gives the same numbers."""

import pytest
import torch
import torch.nn.functional as F

import mole_diffusers as mole
from mole_diffusers import functional
from mole_diffusers.patching.gated_linear import GatedLayer
from mole_diffusers.patching.placement import TEXT_LAYERS
from mole_diffusers.testing import ATTENTION, FEED_FORWARD, lora_layers, tiny_pipeline

B, T, CIN, COUT, R = 2, 50, 12, 20, 6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture
def inside(monkeypatch):
    """inside(True or False): fold in every layer, or in none; inside(): as shapes say. Lists the layers that did."""

    def force(answer=None):
        calls = []
        whole = functional.folded_linear
        if answer is not None:
            monkeypatch.setattr(GatedLayer, "pays", staticmethod(lambda *_: answer))
        monkeypatch.setattr(functional, "folded_linear", lambda *a: calls.append(a) or whole(*a))
        return calls

    return force


def layer(dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"x": (B, T, CIN), "w": (COUT, CIN), "b": (COUT,), "down": (R, CIN), "up": (COUT, R)}
    return [(torch.randn(shape) * shape[-1] ** -0.5).to(dtype) for shape in shapes.values()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(), (B, 1)])
@pytest.mark.parametrize("biased", [False, True])
def test_inside_equals_beside_equals_float64(dtype, rows, biased):
    x, w, b, down, up = layer(dtype)
    factor = torch.rand(*rows, R).to(dtype)
    bias = b if biased else None
    exact = F.linear(x.double(), w.double(), None if bias is None else b.double())
    exact = exact + (x.double() @ down.double().T * factor.double()) @ up.double().T
    with torch.no_grad():
        beside = functional.added_low_rank(F.linear(x, w, bias), functional.scaled(F.linear(x, down), factor), up)
        inside = functional.folded_linear(x, (w, bias), (down, up * factor))
    for y in (beside, inside):
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, atol=TOLERANCE[dtype], rtol=0)


def test_the_cheaper_way_is_chosen_from_shapes():
    @torch.no_grad()
    def pays(tokens, width, experts, rows=(2, 1)):
        return functional.folding_pays(
            torch.empty(2, tokens, width), torch.empty(width, width), torch.empty(*rows, 16 * experts)
        )

    assert pays(4096, 320, 3)  # SD 1.5 at 512 pixels, by what benchmarks/layers.py measures
    assert pays(1024, 320, 3)
    assert not pays(256, 640, 3)
    assert not pays(64, 1280, 8)
    assert not pays(77, 768, 3)
    assert not pays(256, 640, 16)
    assert pays(256, 640, 16, rows=())  # one weight for all rows
    assert not pays(4096, 320, 3, rows=(2, 4096))  # weights by token


@pytest.mark.parametrize("family", ["sum", "mole"])
def test_a_picture_is_the_same_by_either_way_and_by_peft(pipe, loras, draw, awake, inside, family):
    layers = lora_layers(pipe, ATTENTION + FEED_FORWARD)
    mixture = awake(mole.attach(pipe, loras, family))
    inside(False)
    beside = draw(pipe)
    calls = inside(True)
    folded = draw(pipe)
    texts = {name for name in layers if name.endswith(TEXT_LAYERS)}  # what is kept of the text is added beside
    assert len({id(a[1][0]) for a in calls}) == len(layers) - len(texts) > 0
    torch.testing.assert_close(folded, beside, atol=1e-5, rtol=0)
    for model in (pipe.unet, pipe.text_encoder):  # a hook on the host's layer: its product is left to it
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_pre_hook(lambda *_: None)
    count = len(calls)
    torch.testing.assert_close(draw(pipe), beside, atol=1e-5, rtol=0)
    assert len(calls) == count
    assert mixture is mole.attached(pipe)


def test_another_lora_beside_and_scale_by_either_way(pipe, loras, draw, inside):
    pipe.load_lora_weights(loras["hat"], adapter_name="hat")
    mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    options = {"cross_attention_kwargs": {"scale": 0.5}}
    inside(False)
    beside = draw(pipe, **options)
    assert inside(True) == []
    torch.testing.assert_close(draw(pipe, **options), beside, atol=1e-5, rtol=0)


def test_scale_is_applied_inside_too(pipe, loras, draw, inside):
    mole.attach(pipe, loras)
    inside(True)
    ours = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    mole.attach(pipe, {name: (path, 0.5) for name, path in loras.items()})
    torch.testing.assert_close(ours, draw(pipe), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near_and_stays_half(loras, awake, inside, dtype):
    def latents(pipe):
        return pipe("a fox", generator=torch.Generator().manual_seed(0), num_inference_steps=1, output_type="latent").images

    outputs = []
    for kind, answer in ((torch.float32, False), (dtype, False), (dtype, True)):
        pipe = tiny_pipeline().to(kind)
        awake(mole.attach(pipe, loras, "mole"))
        inside(answer)
        outputs.append(latents(pipe))
        assert outputs[-1].dtype == kind
    exact, beside, folded = (o.float() for o in outputs)
    spread = exact.std()
    assert (beside - exact).abs().mean() < 0.05 * spread
    assert (folded - exact).abs().mean() < 0.05 * spread


def test_wide_pictures_fold_by_themselves_and_gradients_take_the_way_beside(pipe, loras, awake, inside):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    calls = inside()
    given = torch.randn(2, 4, 64, 64), torch.tensor(10), torch.randn(2, 16, 16)
    with torch.no_grad():
        folded = pipe.unet(*given).sample
    assert calls
    calls.clear()
    beside = pipe.unet(*given).sample
    assert calls == []
    torch.testing.assert_close(folded, beside, atol=1e-4, rtol=0)
    beside.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
