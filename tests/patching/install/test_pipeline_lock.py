"""One pipeline shared by threads: each draws what it would alone, and waits for its turn."""

import asyncio
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from tiers import thorough
from tiny import tiny_pipeline

import mole_diffusers as mole

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


def test_a_block_may_be_closed_on_another_thread(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    whole = draw(pipe)

    def opened():
        with mixture.only("fox"):
            yield

    block = opened()
    with ThreadPoolExecutor(1) as threads:
        threads.submit(next, block).result(60)
        block.close()
        assert torch.equal(draw(pipe), whole)
        assert torch.equal(threads.submit(draw, pipe).result(60), whole)


def test_blocks_of_generators_may_end_in_any_order(pipe, loras):
    mixture = mole.attach(pipe, loras)

    def opened(name, strength):
        with mixture.only(name), mixture.strengths({name: strength}):
            yield

    first, second = opened("fox", 2.0), opened("ink", 3.0)
    next(first), next(second)
    first.close()
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(mixture.strength, "hat")
        time.sleep(0.3)
        assert not waiting.done()  # for the block that is open
        second_active = mixture.parts.active
        second.close()
        waiting.result(60)
    assert second_active == {"ink"}
    second = opened("ink", 3.0)
    next(second)
    assert mixture.parts.active == {"ink"}
    assert mixture.strength("ink") == 3
    second.close()
    assert mixture.parts.active == set(loras)
    assert mixture.strength("fox") == mixture.strength("ink") == 1


@pytest.mark.shows("Threads and interruptions")
def test_a_block_of_another_task_is_refused(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    whole = draw(pipe)

    async def hold(opened, done):
        with mixture.only("fox"):
            opened.set()
            await done.wait()

    async def both():
        opened, done = asyncio.Event(), asyncio.Event()
        holding = asyncio.create_task(hold(opened, done))
        await opened.wait()
        with pytest.raises(RuntimeError, match="another task of this thread"):
            draw(pipe)
        done.set()
        await holding
        return draw(pipe)

    assert torch.equal(asyncio.run(both()), whole)
    with mixture.strengths({"fox": 1}):  # a loop that runs inside a block is part of it
        assert torch.equal(asyncio.run(asyncio.to_thread(lambda: None)) or whole, whole)


@pytest.mark.shows("Threads and interruptions")
def test_a_block_left_open_by_a_thread_that_ended_is_said(pipe, loras, draw):
    mixture = mole.attach(pipe, loras)
    block = mixture.only("fox")
    thread = threading.Thread(target=block.__enter__)
    thread.start()
    thread.join()
    with pytest.raises(RuntimeError, match="opened on a thread that has ended"):
        draw(pipe)
    block.__exit__(None, None, None)
    draw(pipe)


@pytest.mark.shows("Threads and interruptions")
def test_a_fork_while_another_thread_holds_a_block_does_not_hang(pipe, loras):
    mixture = mole.attach(pipe, loras)
    opened, done = threading.Event(), threading.Event()

    def hold():
        with mixture.only("fox"):
            opened.set()
            done.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    opened.wait(60)
    if (child := os.fork()) == 0:
        try:
            mixture.strength("fox", 0.5)
        except RuntimeError as error:
            os._exit(7 if "has ended" in str(error) else 1)
        os._exit(2)
    done.set()
    holder.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


@pytest.mark.thorough
@pytest.mark.parametrize("rounds", [3, 500])
def test_drawing_and_attaching_on_two_pipelines(loras, draw, rounds):
    """8 threads draw and 2 attach: each picture is one that a mixture of that pipeline draws alone."""
    kinds = [("fox",), ("ink", "hat"), ("fox", "hat")]  # never none: diffusers' own pipelines are not for several threads
    pipes = [tiny_pipeline(seed) for seed in (0, 1)]
    experts = {name: mole.read_expert(path, name) for name, path in loras.items()}

    def change(pipe, names):
        return mole.attach(pipe, {n: experts[n] for n in names})

    alone = []
    for pipe in pipes:
        alone.append([])
        for names in kinds:
            change(pipe, names)
            alone[-1].append(draw(pipe, num_inference_steps=1))

    def attaching(pipe):
        for i in range(rounds):
            change(pipe, kinds[i % len(kinds)])

    def drawing(which):
        pictures = [draw(pipes[which], num_inference_steps=1) for _ in range(max(1, rounds // 8))]
        return sum(not any(torch.equal(picture, known) for known in alone[which]) for picture in pictures)

    with ThreadPoolExecutor(10) as threads:
        changes = [threads.submit(attaching, pipe) for pipe in pipes]
        wrong = list(threads.map(drawing, [0, 1] * 4))
        assert all(job.exception() is None for job in changes)
    assert wrong == [0] * 8
