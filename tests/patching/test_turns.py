"""One pipeline shared by threads, and one that is interrupted: nothing leaks, nothing stays behind."""

import copy
import gc
import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hosts import assert_same, breaking, snapshot

import mole_diffusers as mole
from mole_diffusers.gates import FAMILIES
from mole_diffusers.testing import tiny_pipeline

SETTINGS = {  # one per thread
    "all": lambda m: nullcontext(),
    "fox": lambda m: m.only("fox"),
    "ink": lambda m: m.only("ink"),
    "collapsed": lambda m: m.collapsed("a fox", num_inference_steps=1),
    "half ink": lambda m: m.strengths({"ink": 0.5}),
    "no fox": lambda m: m.strengths({"fox": 0, "hat": -1.5}),
    "fixed": lambda m: m.fixed({"ink": 0.7}),
    "traced": lambda m: m.trace(),
    "bound": lambda m: m.bound({"fox": ("fox", "left"), "ink": "ink", "hat": "everywhere"}),
}


@pytest.mark.parametrize("drop_in", [False, True])
def test_eight_threads_draw_what_each_would_alone(loras, draw, awake, drop_in):
    pipe = tiny_pipeline()
    pipe = mole.MoLEStableDiffusionPipeline(**pipe.components, requires_safety_checker=False) if drop_in else pipe
    pipe.set_progress_bar_config(disable=True)
    mixture = awake(mole.attach(pipe, loras, "mole"))

    def work(name):
        images = []
        for _ in range(2):
            with SETTINGS[name](mixture):
                images.append(draw(pipe, num_inference_steps=3))
        return torch.cat(images)

    alone = {name: work(name) for name in SETTINGS}
    with ThreadPoolExecutor(len(SETTINGS)) as threads:
        together = dict(zip(SETTINGS, threads.map(work, SETTINGS), strict=True))
    assert all(torch.equal(alone[name], together[name]) for name in SETTINGS)
    pairs = [(a, b) for a in SETTINGS for b in SETTINGS if a < b and {a, b} != {"all", "traced"}]
    assert not any(torch.allclose(alone[a], alone[b], atol=1e-3) for a, b in pairs)


def test_attaching_anew_waits_for_the_calls_of_other_threads(pipe, loras, draw):
    mole.attach(pipe, {"ink": loras["ink"]})
    ink = draw(pipe)
    mole.attach(pipe, {"fox": loras["fox"]})
    fox = draw(pipe)
    with ThreadPoolExecutor(8) as threads:
        drawn = [threads.submit(draw, pipe) for _ in range(4)]
        changed = [threads.submit(mole.attach, pipe, {name: loras[name]}) for name in ("ink", "fox")]
        drawn += [threads.submit(draw, pipe) for _ in range(4)]
    assert all(job.exception() is None for job in changed)
    assert all(torch.equal(job.result(), fox) or torch.equal(job.result(), ink) for job in drawn)


BLOCK = "mid_block.attentions.0.transformer_blocks.0"
PLACES = {  # what is interrupted -> the module in which it happens
    "text encoder": lambda pipe, mixture: pipe.text_encoder.encoder.layers[1],
    "first layer": lambda pipe, mixture: pipe.unet.conv_in,
    "gate": lambda pipe, mixture: mixture.banks["unet"][BLOCK],
    "attention": lambda pipe, mixture: pipe.unet.get_submodule(f"{BLOCK}.attn1"),
    "expert": lambda pipe, mixture: pipe.unet.get_submodule(f"{BLOCK}.attn2.to_out.0.lora_A.mole_experts"),
    "last layer": lambda pipe, mixture: pipe.unet.conv_out,
    "picture": lambda pipe, mixture: pipe.vae.decoder,
}


FAST = [
    (RuntimeError, "expert"),
    (KeyboardInterrupt, "text encoder"),
    (KeyboardInterrupt, "gate"),
    (RuntimeError, "callback"),
]
BREAKS = [(error, place) for place in [*PLACES, "callback"] for error in (RuntimeError, KeyboardInterrupt)]


@pytest.mark.parametrize(
    ("error", "place"), [*FAST, *(pytest.param(*b, marks=pytest.mark.thorough) for b in BREAKS if b not in FAST)]
)
def test_a_call_interrupted_anywhere_leaves_a_usable_pipeline(pipe, loras, draw, awake, error, place):
    """At each of the calls of a place in turn, three steps long."""
    base = draw(pipe)
    mixture = awake(mole.attach(pipe, loras, "mole"))
    whole, counted, calls = draw(pipe), [], 3
    if place in PLACES:
        module = PLACES[place](pipe, mixture)
        hook = module.register_forward_hook(lambda *_: counted.append(1))
        draw(pipe, num_inference_steps=3)
        hook.remove()
        calls = len(counted)
    for at in range(calls):
        interrupt, options = breaking(error, at), {}
        if place in PLACES:
            hook = module.register_forward_hook(interrupt)
        else:
            options = {"callback_on_step_end": interrupt}
        with pytest.raises(error), mixture.only("fox"), mixture.strengths({"fox": 2}), mixture.trace():
            draw(pipe, num_inference_steps=3, **options)
        if place in PLACES:
            hook.remove()
        with ThreadPoolExecutor(1) as threads:  # the lock is free for another thread
            assert torch.equal(threads.submit(draw, pipe).result(timeout=600), whole)
    assert calls >= (1 if place == "picture" else 2)
    mole.detach(pipe)
    assert torch.equal(draw(pipe), base)


def test_the_pipeline_keeps_its_kind_and_its_signature(pipe, loras, draw):
    kind, signature = type(pipe), inspect.signature(pipe.__call__)
    mole.attach(pipe, {"ink": loras["ink"]})
    assert isinstance(pipe, StableDiffusionPipeline)
    assert inspect.signature(pipe.__call__) == signature
    assert type(pipe).__name__ == kind.__name__
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    assert type(other) is StableDiffusionImg2ImgPipeline
    with TemporaryDirectory() as folder, mole.attached(pipe).lifted():
        pipe.save_pretrained(folder)
        assert f'"_class_name": "{kind.__name__}"' in (Path(folder) / "model_index.json").read_text()
    mole.detach(pipe)
    assert type(pipe) is kind


def test_a_denoiser_with_a_mixture_can_be_copied(pipe, loras):
    mole.attach(pipe, {"ink": loras["ink"]})
    twin = copy.deepcopy(pipe.unet)
    assert twin.state_dict().keys() == pipe.unet.state_dict().keys()


@pytest.mark.parametrize(
    "share", [0.2, 0.6, 0.97, *(pytest.param(s, marks=pytest.mark.thorough) for s in (0.02, 0.4, 0.8, 0.9))]
)
def test_an_interrupted_attach_is_undone(pipe, loras, share):
    """Ctrl-C at the entry of some function of ours, the same share of the way through attaching."""
    experts = {name: mole.read_expert(loras[name], name) for name in ("fox", "ink")}
    calls = interrupted(lambda: mole.attach(pipe, experts, "mole"), 0)
    mole.detach(pipe)
    before = snapshot(pipe)
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: mole.attach(pipe, experts, "mole"), int(share * calls))
    mole.detach(pipe)
    assert_same(before, snapshot(pipe))
    assert type(pipe) is StableDiffusionPipeline


def interrupted(run, at):
    """Raise KeyboardInterrupt in the `at`-th call of one of our functions (0: never); how many calls there were."""
    folder, calls = str(Path(mole.__file__).parent), 0

    def count(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(folder) and frame.f_code.co_name[0] != "<":
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_attaching_in_threads_leaves_torch_as_it_was(loras):
    """On pipelines of their own; peft's way of making empty layers patches `nn.Module` for the whole process."""
    register, meta = torch.nn.Module.register_parameter, []

    def work(seed):
        pipe = tiny_pipeline(seed)
        for _ in range(10):
            mole.attach(pipe, loras)
            meta.append(torch.nn.Linear(2, 2).weight.is_meta)
            mole.detach(pipe)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    assert torch.nn.Module.register_parameter is register
    assert not any(meta)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_leaves_anything_behind(loras, family):
    """The same number of modules and hooks' owners alive after 5 rounds and after 10."""
    pipe = tiny_pipeline()

    def alive():
        gc.collect()
        return sum(isinstance(thing, torch.nn.Module | mole.Mixture) for thing in gc.get_objects())

    def rounds():
        for _ in range(5):
            mole.attach(pipe, loras, family)
            mole.detach(pipe)
        return alive()

    rounds()
    assert rounds() == rounds()
