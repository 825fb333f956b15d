"""One pipeline shared by threads: each draws what it would alone, and waits for its turn."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from tiers import thorough
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.binding.config import Bound

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


@pytest.mark.parametrize("drop_in", [*thorough(False), True])
@pytest.mark.shows("exceptions, interrupts, threads", "Threads and interruptions")
def test_eight_threads_draw_what_each_would_alone(loras, draw, awake, drop_in):
    pipe = tiny_pipeline()
    pipe = mole.MoLEStableDiffusionPipeline(**pipe.components, requires_safety_checker=False) if drop_in else pipe
    pipe.set_progress_bar_config(disable=True)
    mixture = awake(mole.attach(pipe, loras, "mole"))

    def work(name):
        with SETTINGS[name](mixture):
            return draw(pipe)

    alone = {name: work(name) for name in SETTINGS}
    with ThreadPoolExecutor(len(SETTINGS)) as threads:  # twice, so that each begins while others draw
        together = list(threads.map(lambda name: (name, work(name), work(name)), SETTINGS))
    assert all(torch.equal(alone[name], picture) for name, *pictures in together for picture in pictures)
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


@pytest.mark.thorough
def test_two_first_attaches_at_once_leave_one_mixture(loras, draw):
    for seed in range(6):
        pipe, names = tiny_pipeline(seed), ("fox", "ink")
        base, start = draw(pipe), threading.Barrier(2)

        def attach(name, pipe=pipe, start=start):
            start.wait(60)
            return mole.attach(pipe, {name: loras[name]})

        with ThreadPoolExecutor(2) as threads:
            made = list(threads.map(attach, names))
        assert mole.attached(pipe) in made
        mole.detach(pipe)
        assert torch.equal(draw(pipe), base)


def waiting():
    """An event that a call of the pipeline has begun, one that lets it go on, and its callback."""
    begun, gate = threading.Event(), threading.Event()

    def wait(pipe, step, timestep, kwargs):
        begun.set()
        gate.wait(60)
        return kwargs

    return begun, gate, wait


def test_unloading_waits_for_the_call_of_another_thread(pipe, loras, draw):
    mole.attach(pipe, {"fox": loras["fox"]})
    fox, (begun, gate, wait) = draw(pipe), waiting()
    with ThreadPoolExecutor(2) as threads:
        drawn = threads.submit(draw, pipe, callback_on_step_end=wait)
        begun.wait(60)
        unloaded = threads.submit(pipe.unload_lora_weights)
        time.sleep(0.5)
        assert not unloaded.done()
        gate.set()
        assert torch.equal(drawn.result(60), fox)
        unloaded.result(60)
    assert mole.attached(pipe) is None


@pytest.mark.thorough
def test_attaching_in_threads_leaves_torch_as_it_was(loras):
    """On pipelines of their own; peft's way of making empty layers patches `nn.Module` for the whole process."""
    register, meta = torch.nn.Module.register_parameter, []

    def work(seed):
        pipe = tiny_pipeline(seed)
        for _ in range(5):
            mole.attach(pipe, loras)
            meta.append(torch.nn.Linear(2, 2).weight.is_meta)
            mole.detach(pipe)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(work, range(3)))
    assert torch.nn.Module.register_parameter is register
    assert not any(meta)


def test_texts_that_another_thread_encodes_wait_for_the_picture(loras, draw):
    def attached():
        pipe = tiny_pipeline()
        mole.attach(pipe, loras, binding={name: Bound((name,), required=True) for name in loras})
        return pipe

    def encoded(pipe):
        return pipe.encode_prompt("ink", "cpu", 1, True, negative_prompt="a hat")[:2]

    pipe, alone, found = attached(), attached(), []
    other = threading.Thread(target=lambda: found.append(encoded(pipe)))

    def between(*_):  # the prompt and its negative prompt
        if other.ident is None:
            other.start()
            other.join(1)

    pipe.text_encoder.register_forward_hook(between)
    picture = draw(pipe, "a fox", negative_prompt="a hat")
    other.join(60)
    assert torch.equal(picture, draw(alone, "a fox", negative_prompt="a hat"))
    for states, wanted in zip(found[0], encoded(alone), strict=True):
        assert torch.equal(states, wanted)
