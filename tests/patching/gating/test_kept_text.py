"""Keys and values of the text are computed once in a call where nothing changes them, and pictures keep all bits."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, UNet2DConditionModel
from gate_types import gate_types
from PIL import Image
from tiny import tiny_pipeline

import mole_diffusers as mole
from benchmarks.hosts import SIZES
from mole_diffusers.gates import GATE_TYPES
from mole_diffusers.patching.gating.kept_text import KeptText

TWO = ("fox", "ink")
PLACES = {"fox": ("fox", "left"), "ink": ("ink", "right")}


@pytest.fixture
def attached(pipe, loras, awake):
    """attached(family): a mixture whose gates depend on what they read."""

    def run(gate_type, **how):
        return awake(mole.attach(pipe, {name: loras[name] for name in TWO}, gate_type, **how))

    return run


@pytest.fixture
def anew(monkeypatch):
    """anew(draw, ...): what a call draws if no layer is told that it reads the text of the call."""

    def run(draw, *args, **options):
        with monkeypatch.context() as patch:
            patch.setattr(KeptText, "of", lambda *_: None)
            return draw(*args, **options)

    return run


def key_layer(pipe):
    return next(module for name, module in pipe.unet.named_modules() if name.endswith("attn2.to_k"))


def each_step(change):
    """Options of a call that does `change(step, tensors)` between its steps."""

    def between(pipe, step, time, tensors):
        change(step, tensors)
        return tensors

    return {"callback_on_step_end": between, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}


@pytest.mark.parametrize("gate_type", gate_types("sum", "mole", among=list(GATE_TYPES)))
def test_pictures_have_the_same_bits(pipe, attached, draw, anew, gate_type):
    mixture, four = attached(gate_type, binding=PLACES), {"num_inference_steps": 4}
    schedule = each_step(lambda step, _: mixture.strength("fox", [0.5, 1, 0, 1][step]))
    for options in (
        {},
        {"guidance_scale": 1.0},
        {"prompt": ["a fox", "ink"]},
        {"cross_attention_kwargs": {"scale": 0.5}},
        schedule,
    ):
        drawn = draw(pipe, **four | options)
        mixture.strength("fox", 1.0)
        assert torch.equal(drawn, anew(draw, pipe, **four | options)), options


@pytest.mark.thorough
@pytest.mark.parametrize("inside", ["tiled", "every", "rows", "trace"])
def test_blocks_have_the_same_bits(pipe, attached, draw, anew, inside):
    mixture = attached("mole", binding=PLACES)
    options = {"num_inference_steps": 4, "prompt": "a fox and an ink", "height": 64, "width": 128}
    blocks = {
        "tiled": lambda: mixture.tiled(0.5),
        "every": lambda: mixture.every(2),
        "rows": lambda: mixture.rows([{"fox": 1.0}]),
        "trace": lambda: mixture.trace(maps=True),
    }
    with blocks[inside]():
        assert torch.equal(draw(pipe, **options), anew(draw, pipe, **options))


@pytest.mark.thorough
def test_pictures_from_pictures_have_the_same_bits(pipe, attached, anew):
    attached("flow", binding=PLACES)
    other = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)

    def drawn():
        generator, given = torch.Generator().manual_seed(0), Image.new("RGB", (32, 32), "red")
        return other("a fox", image=given, num_inference_steps=6, generator=generator, output_type="pt").images

    assert torch.equal(drawn(), anew(drawn))


CHANGES = {
    "nothing": lambda pipe, tensors: None,
    "text in place": lambda pipe, tensors: tensors["prompt_embeds"].mul_(0.5),
    "another text": lambda pipe, tensors: tensors.update(prompt_embeds=tensors["prompt_embeds"] * 0.5),
    "weights": lambda pipe, tensors: key_layer(pipe).base_layer.weight.mul_(1.5),
    "up": lambda pipe, tensors: key_layer(pipe).lora_B["mole_experts"].weight.mul_(1.5),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_changes_between_steps_is_seen(loras, awake, draw, anew, change):
    pictures = {}
    for name in (change, "nothing"):
        for how in ("kept", "anew"):
            pipe = tiny_pipeline()
            awake(mole.attach(pipe, {n: loras[n] for n in TWO}, "sum"))
            options = each_step(lambda step, tensors, p=pipe, n=name: step == 2 and CHANGES[n](p, tensors))
            with torch.no_grad():
                run = draw if how == "kept" else lambda *a, **k: anew(draw, *a, **k)
                pictures[name, how] = run(pipe, num_inference_steps=5, **options)
    assert torch.equal(pictures[change, "kept"], pictures[change, "anew"])
    assert torch.equal(pictures[change, "kept"], pictures["nothing", "kept"]) is (change == "nothing")


def test_a_processor_may_write_into_keys(pipe, attached, draw, anew):
    attached("sum")
    plain = draw(pipe, num_inference_steps=5)
    hook = key_layer(pipe).register_forward_hook(lambda module, given, y: y.mul_(2))
    assert torch.equal(drawn := draw(pipe, num_inference_steps=5), anew(draw, pipe, num_inference_steps=5))
    hook.remove()
    assert (drawn - plain).abs().max() > 1e-4
    assert torch.equal(draw(pipe, num_inference_steps=5), plain)


@pytest.mark.parametrize("binding", [None, PLACES], ids=["unbound", "bound"])
def test_keys_are_kept_until_the_call_ends(pipe, attached, draw, binding):
    attached("sum", binding=binding)
    keys, ends = [], []
    key_layer(pipe).register_forward_hook(lambda module, given, y: keys.append(weakref.ref(y)))
    draw(pipe, num_inference_steps=6, **each_step(lambda step, _: ends.append(keys[-1]())))
    assert len(keys) == len(ends) == 6
    assert (
        ends[3] is ends[4] is ends[5]
    )  # a text is kept when it comes again, and its layout is decided after the first step
    assert ends[0] is not ends[3]
    del ends[:]
    gc.collect()
    assert [key() for key in keys] == [None] * 6


@pytest.mark.parametrize("gate_type", ["sum", "mole"])
@pytest.mark.parametrize("tiled", [False, *[pytest.param(True, marks=pytest.mark.thorough)]])
def test_what_is_kept_takes_the_memory_of_keys_and_values(pipe, attached, draw, gate_type, tiled):
    """Of one text, whether its factors change or not; and of none if texts take turns."""
    mixture, held = attached(gate_type, binding=PLACES), []

    def count(step, _):
        products = mixture.parts.shared.kept_text._made.values()
        held.append(sum(each.nbytes for p in products for each in (p.plain, p._output) if each is not None))

    options = {"prompt": "a fox and an ink", "height": 64, "width": 128} if tiled else {}
    with mixture.tiled(1.0) if tiled else nullcontext():
        draw(pipe, num_inference_steps=4, **options, **each_step(count))
    own = 0 if tiled else _bytes(pipe.unet, tokens=pipe.tokenizer.model_max_length, itemsize=4)
    assert held == [0, own, own, own]


@pytest.mark.parametrize(("size", "megabytes"), [("sd15", 7.7), ("sdxl", 51.3)])
def test_the_memory_at_real_size_is_what_the_page_says(size, megabytes):
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SIZES[size].unet)
    assert round(_bytes(unet, tokens=77, itemsize=2) / 1e6, 1) == megabytes


def _bytes(unet, *, tokens, itemsize):
    """Of all keys and values of a text and an empty one."""
    ends = ("attn2.to_k", "attn2.to_v")
    return sum(2 * tokens * m.out_features * itemsize for name, m in unet.named_modules() if name.endswith(ends))


def test_a_text_is_kept_if_it_comes_again_in_a_call_and_its_changes_are_seen():
    kept, (one, other), layer = KeptText(), [torch.randn(1, 3, 4) for _ in range(2)], object()

    def found(text, *, in_call=True):
        kept.begin(text, in_call=in_call)
        made = kept.of(text)
        return None if made is None else made.setdefault(layer, len(made))

    with torch.no_grad():
        assert found(one) is None
        assert found(one) == found(one) == 0
        assert kept.of(other) is None
        one.add_(1)
        assert found(one) is None
        assert found(one) == 0
        assert found(other) is found(one) is found(other) is None  # in turn
        assert found(other) == 0
        assert found(other, in_call=False) is None
        many = one.expand(5, -1, -1)  # its rows would take much memory
        assert found(many) is found(many) is None
        kept.begin(other, in_call=True)
        with torch.inference_mode():
            assert found(other) is None
    assert found(other) is None  # with gradients
