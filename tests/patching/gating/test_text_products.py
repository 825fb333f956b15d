"""Keys and values of the prompt are computed once in a call where nothing changes them, and pictures keep all bits."""

import gc
import weakref

import pytest
import torch
from diffusers import UNet2DConditionModel
from gate_families import families

import mole_diffusers as mole
from benchmarks.hosts import SIZES
from mole_diffusers.gates import FAMILIES
from mole_diffusers.patching.gating.text_products import KeptTexts
from mole_diffusers.testing import tiny_pipeline

TWO = ("fox", "ink")
PLACES = {"fox": ("fox", "left"), "ink": ("ink", "right")}


@pytest.fixture
def attached(pipe, loras, awake):
    """attached(family): a mixture whose gates depend on what they read."""

    def run(family, **how):
        return awake(mole.attach(pipe, {name: loras[name] for name in TWO}, family, **how))

    return run


def layer_of(pipe, end="attn2.to_k"):
    return next(module for name, module in pipe.unet.named_modules() if name.endswith(end))


def computed_anew(pipe, monkeypatch, draw, **options):
    """What a call draws if no layer is told that it reads the text of the call."""
    with monkeypatch.context() as patch:
        patch.setattr(KeptTexts, "of", lambda *_: None)
        return draw(pipe, num_inference_steps=4, **options)


def each_step(change):
    """Options of a call that does `change(step, tensors)` between its steps."""

    def between(pipe, step, time, tensors):
        change(step, tensors)
        return tensors

    return {"callback_on_step_end": between, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


@pytest.mark.parametrize("family", families("sum", "mole", among=list(FAMILIES)))
def test_pictures_have_the_same_bits(pipe, attached, draw, monkeypatch, family):
    mixture = attached(family, binding=PLACES)
    schedules = [each_step(lambda step, _, f=factors: mixture.strength("fox", f[step])) for factors in ([0.5, 1, 0, 1],) * 2]
    for options in ({}, {"guidance_scale": 1.0}, {"prompt": ["a fox", "ink"]}, {"cross_attention_kwargs": {"scale": 0.5}}):
        assert torch.equal(draw(pipe, num_inference_steps=4, **options), computed_anew(pipe, monkeypatch, draw, **options))
    drawn = draw(pipe, num_inference_steps=4, **schedules[0])
    mixture.strength("fox", 1.0)
    assert torch.equal(drawn, computed_anew(pipe, monkeypatch, draw, **schedules[1]))


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe, tensors: tensors["prompt_embeds"].mul_(0.5),
        lambda pipe, tensors: tensors.update(prompt_embeds=tensors["prompt_embeds"] * 0.5),
        lambda pipe, tensors: layer_of(pipe).base_layer.weight.mul_(1.5),
    ],
    ids=["text in place", "another text", "weights"],
)
def test_what_changes_between_steps_is_seen(loras, awake, draw, monkeypatch, change):
    pictures = []
    for keeps in (True, False):
        pipe = tiny_pipeline()
        awake(mole.attach(pipe, {name: loras[name] for name in TWO}, "sum"))
        options = each_step(lambda step, tensors, p=pipe: change(p, tensors))
        with torch.no_grad():
            run = draw if keeps else lambda *a, **k: computed_anew(a[0], monkeypatch, draw, **k)
            pictures.append(run(pipe, **({"num_inference_steps": 4} if keeps else {}), **options))
            assert (pictures[-1] - draw(tiny_pipeline(), num_inference_steps=4)).abs().max() > 1e-3
    assert torch.equal(*pictures)


def test_a_processor_may_write_into_keys(pipe, attached, draw, monkeypatch):
    attached("sum")
    plain = draw(pipe, num_inference_steps=4)
    hook = layer_of(pipe).register_forward_hook(lambda module, given, y: y.mul_(2))
    assert torch.equal(drawn := draw(pipe, num_inference_steps=4), computed_anew(pipe, monkeypatch, draw))
    hook.remove()
    assert (drawn - plain).abs().max() > 1e-4
    assert torch.equal(draw(pipe, num_inference_steps=4), plain)


@pytest.mark.parametrize("binding", [None, PLACES], ids=["unbound", "bound"])
def test_keys_are_kept_until_the_call_ends(pipe, attached, draw, binding):
    attached("sum", binding=binding)
    keys, ends = [], []
    layer_of(pipe).register_forward_hook(lambda module, given, y: keys.append(weakref.ref(y)))
    draw(pipe, num_inference_steps=4, **each_step(lambda step, _: ends.append(keys[-1]())))
    assert len(keys) == len(ends) == 4
    assert ends[1] is ends[2] is ends[3]  # the layout is decided after the first step
    del ends[:]
    gc.collect()
    assert [key() for key in keys] == [None] * 4


def test_what_is_kept_takes_the_memory_of_keys_and_values(pipe, attached, draw):
    mixture, held = attached("sum"), []

    def count(step, _):
        products = [each for *_, made in mixture._sampling.texts._kept for each in made.values()]
        held.append(sum(each.whole.nbytes + (0 if each.plain is None else each.plain.nbytes) for each in products))

    draw(pipe, num_inference_steps=2, **each_step(count))
    assert held == [_bytes(pipe.unet, tokens=pipe.tokenizer.model_max_length, itemsize=4)] * 2


@pytest.mark.parametrize(("size", "megabytes"), [("sd15", 7.7), ("sdxl", 51.3)])
def test_the_memory_at_real_size_is_what_the_page_says(size, megabytes):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES[size].unet)
    assert round(_bytes(unet, tokens=77, itemsize=2) / 1e6, 1) == megabytes


def _bytes(unet, *, tokens, itemsize):
    """Of all keys and values of a text and an empty one."""
    ends = ("attn2.to_k", "attn2.to_v")
    return sum(2 * tokens * m.out_features * itemsize for name, m in unet.named_modules() if name.endswith(ends))


def test_two_texts_in_turn_are_both_kept():
    kept, texts = KeptTexts(), [torch.randn(1, 3, 4) for _ in range(3)]
    layer = object()
    with torch.no_grad():
        for _ in range(2):
            for text in texts[:2]:
                kept.begin(text)
                kept.of(text).setdefault(layer, id(text))
                assert kept.of(text)[layer] == id(text)
        kept.begin(texts[2])
        assert kept.of(texts[1]) is None  # it is not that of this call of the denoiser
        kept.begin(texts[1])
        assert kept.of(texts[1])[layer] == id(texts[1])
        kept.begin(texts[0])
        assert kept.of(texts[0]) == {}  # two others came since
        texts[0].add_(1)
        kept.of(texts[0])[layer] = 0
        kept.begin(texts[0])
        assert kept.of(texts[0]) == {}
        kept.begin(many := texts[0].expand(5, -1, -1))
        assert kept.of(many) is None  # more rows would take much memory
    kept.begin(texts[1])
    assert kept.of(texts[1]) is None  # with gradients
    with torch.inference_mode():
        kept.begin(texts[1])
        assert kept.of(texts[1]) is None
