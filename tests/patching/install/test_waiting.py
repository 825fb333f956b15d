"""Who waits for a `with` block of another thread: not a generator for itself, and nobody for ever without a word."""

import asyncio
import gc
import threading
import time
import warnings
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers.patching.install import pipeline_lock

BLOCKS = {
    "only": lambda m: m.only("fox"),
    "lifted": lambda m: m.lifted(),
    "collapsed": lambda m: m.collapsed(),
    "bound": lambda m: m.bound(None),
    "drawing": lambda m: m.drawing(),
}
REST = (("only", "stack"), ("lifted", "with"), ("collapsed", "with"), ("bound", "with"), ("only", "of the user's own"))
MOVED = (
    r"was entered at .*test_waiting.py:\d+ in {}.* on thread 'first_0', and the generator that holds it goes on on another"
)


@contextmanager
def around(block):
    with block:
        yield


@pytest.fixture
def threads():
    """Two threads that live."""
    with ThreadPoolExecutor(1, "first") as first, ThreadPoolExecutor(1, "second") as second:
        yield first, second


@pytest.mark.parametrize(("what", "how"), [("only", "with"), ("drawing", "with"), *thorough(*REST)])
def test_a_generator_that_goes_on_on_another_thread_is_refused(pipe, loras, draw, threads, what, how):
    mixture = mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    whole, (first, second) = draw(pipe), threads

    def drawing():
        with ExitStack() as stack:
            if how == "with":
                with BLOCKS[what](mixture):
                    yield
                    yield draw(pipe)
            elif how == "stack":
                stack.enter_context(BLOCKS[what](mixture))
                yield
                yield draw(pipe)
            else:
                with around(BLOCKS[what](mixture)):
                    yield
                    yield draw(pipe)

    pictures = drawing()
    first.submit(next, pictures).result(60)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=MOVED.format("around" if how == "of the user's own" else "drawing")):
        second.submit(next, pictures).result(60)
    assert time.monotonic() - begun < 2
    for thread in threads:
        assert torch.equal(thread.submit(draw, pipe).result(60), whole)


def test_a_generator_of_a_generator_and_a_coroutine_are_refused(pipe, loras, draw, threads):
    """The frame that entered the block is not the one that goes on."""
    mixture = mole.attach(pipe, loras)
    whole, (first, second) = draw(pipe), threads

    def inner():
        with mixture.only("fox"):
            yield

    def outer():
        held = inner()
        next(held)
        yield
        yield draw(pipe)

    class Pause:
        def __await__(self):
            yield

    async def drawing():
        with mixture.only("fox"):
            await Pause()
            draw(pipe)

    async def pictures():
        with mixture.only("fox"):
            yield
            yield draw(pipe)

    for step in (outer().__next__, partial(drawing().send, None), partial(next_of, pictures())):
        first.submit(step).result(60)
        with pytest.raises(RuntimeError, match="goes on on another"):
            second.submit(step).result(60)
        del step
        gc.collect()
        assert torch.equal(second.submit(draw, pipe).result(60), whole)


def next_of(pictures):
    with suppress(StopIteration):
        pictures.__anext__().send(None)


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
                assert collects or not mixture._lock._open  # at once
                gc.collect()
                assert known() is None
                assert not mixture._lock._open
                assert torch.equal(first.submit(draw, pipe).result(60), whole)
    finally:
        gc.enable()


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
    said = f"`with` block that thread 'MainThread' entered at {__file__}:{work.__code__.co_firstlineno + 1} in work;"
    assert said in str(warned[0].message)


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


def test_a_file_beside_the_package_is_a_users_own(pipe, loras):
    """Though its name begins with the package's: a warning says where it entered the block."""
    mixture = mole.attach(pipe, loras)
    name = str(Path(mole.__file__).parent) + "_try.py"
    code = "with mixture.only('fox'):\n    found.append(mixture._lock._open[0].entered_at)"
    exec(compile(code, name, "exec"), {"mixture": mixture, "found": (found := [])})
    assert found == [f"{name}:1 in <module>"]


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
