"""Who waits for a `with` block of another thread: not a generator for itself, and nobody for ever without a word."""

import asyncio
import gc
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiers import thorough
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.binding.config import Bound
from mole_diffusers.patching.install import pipeline_lock


@pytest.fixture
def threads():
    """Two threads that live."""
    with ThreadPoolExecutor(1, "first") as first, ThreadPoolExecutor(1, "second") as second:
        yield first, second


def test_others_wait_for_the_block_of_a_generator(pipe, loras, draw, threads):
    """And so does a generator of the same function that another thread has begun."""
    mixture = mole.attach(pipe, loras)
    first, second = threads

    def drawing(name):
        with mixture.only(name):
            yield draw(pipe)
            yield draw(pipe)

    alone = {name: next(drawing(name)) for name in ("fox", "ink")}
    fox, ink = drawing("fox"), drawing("ink")
    assert torch.equal(first.submit(next, fox).result(60), alone["fox"])
    waiting = second.submit(next, ink)
    time.sleep(0.25)
    assert not waiting.done()
    assert torch.equal(first.submit(next, fox).result(60), alone["fox"])
    first.submit(fox.close).result(60)
    assert torch.equal(waiting.result(60), alone["ink"])
    second.submit(ink.close).result(60)


def test_an_awaiting_task_is_waited_for(pipe, loras, draw, threads):
    """What another thread draws waits for the block of a task of asyncio, which may go on."""
    mixture = mole.attach(pipe, loras)
    whole, (first, _) = draw(pipe), threads

    async def main():
        with mixture.only("fox"):
            waiting = first.submit(draw, pipe)
            await asyncio.sleep(0.25)
            assert not waiting.done()
            fox = draw(pipe)
        assert not torch.equal(fox, whole)
        return await asyncio.wrap_future(waiting)

    assert torch.equal(asyncio.run(main()), whole)


@pytest.mark.thorough
def test_blocks_leave_nothing_behind(pipe, loras, draw, threads):
    """Neither one that was closed, nor a generator that was dropped, nor one that ended and left a block open."""

    class Kept:
        pass

    mixture = mole.attach(pipe, loras)
    whole, (first, _) = draw(pipe), threads

    def ended(kept):
        with mixture.only("fox"):
            yield

    def left(kept):
        mine = mixture.only("fox")
        mine.__enter__()
        yield

    gc.collect()
    gc.disable()
    try:
        for make, collects in ((ended, False), (left, True)):
            for drops in (False, True):
                kept = Kept()
                generator, known = make(kept), weakref.ref(kept)
                next(generator)
                if not drops:
                    assert next(generator, None) is None
                del kept, generator
                assert collects or not mixture.parts.lock._open  # at once
                gc.collect()
                assert known() is None
                assert not mixture.parts.lock._open
                assert torch.equal(first.submit(draw, pipe).result(60), whole)
    finally:
        gc.enable()


@pytest.mark.shows("Threads and interruptions")
def test_a_block_that_waits_for_a_call_of_another_thread_is_warned_of(pipe, loras, draw, threads, monkeypatch):
    monkeypatch.setattr(pipeline_lock, "WARN_AFTER", 0.2)
    mixture = mole.attach(pipe, loras)
    first, _ = threads

    def work():
        with mixture.only("fox"), mixture.strengths({"ink": 2}):
            waiting = first.submit(draw, pipe)
            with pytest.raises(TimeoutError):
                waiting.result(0.6)
        return waiting.result(60)

    with pytest.warns(UserWarning, match="waiting for") as warned:
        work()
    assert len(warned) == 1
    assert "a `with` block of thread 'MainThread';" in str(warned[0].message)


@pytest.mark.thorough
def test_a_wait_leaves_nothing_behind(pipe, loras, threads):
    """What the caller who waited had is freed with it, without a collection: pictures, say."""

    class Kept:
        pass

    mixture = mole.attach(pipe, loras)
    known, (first, _) = [], threads

    def waits():
        kept = Kept()
        known.append(weakref.ref(kept))
        with mixture.only("ink"):
            pass

    gc.collect()
    gc.disable()
    try:
        with mixture.only("fox"):
            waiting = first.submit(waits)
            time.sleep(0.25)
            assert not waiting.done()
        waiting.result(60)
        assert known[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("draws", ["in a block", *thorough("in no block", "many blocks", "a loop of one's own")])
def test_long_drawing_is_waited_for_without_a_word(pipe, loras, draw, threads, monkeypatch, draws):
    monkeypatch.setattr(pipeline_lock, "WARN_AFTER", 0.2)
    mixture = mole.attach(pipe, loras)
    begun, (first, second) = threading.Event(), threads

    def slow(pipe, step, timestep, kwargs):
        begun.set()
        time.sleep(0.3)
        return kwargs

    def work():
        if draws == "many blocks":
            for _ in range(4):
                with mixture.only("fox"):
                    begun.set()
                    time.sleep(0.15)
        elif draws == "a loop of one's own":
            with mixture.only("fox"), mixture.drawing():
                begun.set()
                time.sleep(0.6)
        elif draws == "in a block":
            with mixture.only("fox"):
                draw(pipe, callback_on_step_end=slow)
        else:
            draw(pipe, callback_on_step_end=slow)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        working = first.submit(work)
        begun.wait(60)
        second.submit(draw, pipe).result(60)
        working.result(60)


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
