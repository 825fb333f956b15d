"""One pipeline shared by threads, and one that is interrupted: nothing leaks, nothing stays behind."""

import asyncio
import copy
import gc
import inspect
import os
import pickle
import random
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import diffusers
import peft
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from hosts import assert_same, breaking, snapshot
from tiers import thorough

import mole_diffusers as mole
from mole_diffusers.gates import FAMILIES
from mole_diffusers.patching.install import pipeline_calls
from mole_diffusers.patching.undo import Undo, undoing
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


@pytest.mark.parametrize("drop_in", [*thorough(False), True])
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


FAST = [(KeyboardInterrupt, "text encoder")]
BREAKS = [(error, place) for place in [*PLACES, "callback"] for error in (RuntimeError, KeyboardInterrupt)]


@pytest.mark.parametrize(("error", "place"), [*FAST, *thorough(*(b for b in BREAKS if b not in FAST))])
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
    pipe, kind = of_its_own_kind(pipe)
    signature = inspect.signature(pipe.__call__)
    mole.attach(pipe, {"ink": loras["ink"]})
    assert type(pipe) is kind
    assert inspect.signature(pipe.__call__) == signature
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.float32)
    assert type(other) is StableDiffusionImg2ImgPipeline
    with TemporaryDirectory() as folder, mole.attached(pipe).lifted():
        pipe.save_pretrained(folder)
        assert '"_class_name": "Own"' in (Path(folder) / "model_index.json").read_text()
    mole.detach(pipe)
    assert "__call__" not in vars(kind)


def test_a_class_gets_its_call_back_with_the_last_pipeline(loras, draw):
    """Pipelines that nobody detached, collected on whatever thread."""
    one, kind = of_its_own_kind(tiny_pipeline())
    other = kind(**tiny_pipeline(1).components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    for pipe in (one, other):
        for name in ("fox", "ink"):
            mole.attach(pipe, {name: loras[name]})
    picture, known = draw(other), weakref.ref(one)
    del one, pipe
    gc.collect()
    assert known() is None
    assert "__call__" in vars(kind)
    assert torch.equal(draw(other), picture)
    del other
    with ThreadPoolExecutor(1) as threads:
        threads.submit(gc.collect).result(60)
    assert "__call__" not in vars(kind)
    assert kind not in pipeline_calls._patched


def test_a_call_of_ours_that_others_put_back_is_not_entered_twice(pipe, loras, draw, monkeypatch):
    """A library replaced `__call__` while one of ours was in its place, and restored that after the mixture was gone."""
    entered, drawing, kind = [], mole.Mixture.drawing, type(pipe)
    monkeypatch.setattr(mole.Mixture, "drawing", lambda self, call: entered.append(self) or drawing(self, call))
    with monkeypatch.context() as library:
        first = mole.attach(pipe, loras)
        ours = kind.__call__
        library.setattr(kind, "__call__", ours.__wrapped__)
        mole.detach(pipe)
        pipeline_calls._patched.pop(kind, None)  # as if the class had been patched and given back in between
    assert kind.__call__ is ours
    mixture = mole.attach(pipe, loras)
    draw(pipe)
    assert entered == [mixture]
    assert first is not mixture


@pytest.mark.thorough
def test_attaching_again_and_again_keeps_one_note_of_a_pipeline(pipe, loras):
    mole.attach(pipe, {"fox": loras["fox"]})
    count = weakref.getweakrefcount(pipe)
    for _ in range(3):
        mole.attach(pipe, {"fox": loras["fox"]})
        with mole.attached(pipe).lifted():
            pass
    assert weakref.getweakrefcount(pipe) == count
    mole.detach(pipe)
    assert weakref.getweakrefcount(pipe) == 0


def test_a_call_is_entered_once_where_a_class_and_its_parent_are_patched(pipe, loras, draw, monkeypatch):
    entered, call = [], mole.Mixture.drawing

    def counting(self, arguments):
        entered.append(self)
        return call(self, arguments)

    monkeypatch.setattr(mole.Mixture, "drawing", counting)
    mole.attach(pipe, loras)
    own, _ = of_its_own_kind(tiny_pipeline())
    mixture = mole.attach(own, loras)
    draw(own)
    assert entered == [mixture]


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


def test_a_lifted_mixture_stays_off_where_it_was_detached_or_replaced(pipe, loras, draw):
    base = draw(pipe)
    old = mole.attach(pipe, {"fox": loras["fox"]})
    with old.lifted(), old.lifted():
        mole.detach(pipe)
    assert mole.attached(pipe) is None
    assert torch.equal(draw(pipe), base)
    with pytest.raises(ValueError, match="is not attached any more"), old.lifted():
        pass
    old = mole.attach(pipe, {"fox": loras["fox"]})
    with old.lifted():
        new = mole.attach(pipe, {"ink": loras["ink"]})
        ink = draw(pipe)
    for block in (old.only(), old.strengths({"fox": 0}), old.trace(), old.bound(None)):  # they would change nothing
        with pytest.raises(ValueError, match="is not attached any more"), block:
            pass
    assert mole.attached(pipe) is new
    assert torch.equal(draw(pipe), ink)
    with new.lifted():  # another comes and goes
        mole.attach(pipe, {"fox": loras["fox"]})
        mole.detach(pipe)
        assert torch.equal(draw(pipe), base)
    assert mole.attached(pipe) is new
    assert torch.equal(draw(pipe), ink)
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


def test_a_copy_keeps_what_is_outside_of_blocks(pipe, loras, draw):
    base = draw(pipe)
    mixture = mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    mixture.strength("ink", 0.5)
    picture = draw(pipe)
    with mixture.only("fox"), mixture.fixed({"fox": 2}), mixture.strengths({"ink": 3}):
        twin = copy.deepcopy(pipe)
    assert torch.equal(draw(twin), picture)
    assert copy.deepcopy([pipe, mixture])[1] is not mixture
    pipe.disable_lora()
    assert torch.equal(draw(copy.deepcopy(pipe)), base)


def test_a_copy_of_a_model_is_the_original_s(pipe, loras):
    original = copy.deepcopy(pipe.unet).state_dict()
    mole.attach(pipe, {"ink": loras["ink"]})
    twin = copy.deepcopy(pipe.unet).state_dict()
    assert twin.keys() == original.keys()
    assert all(torch.equal(twin[k], original[k]) for k in twin)


def test_a_copy_of_a_pipeline_has_a_mixture_of_its_own(pipe, loras, draw, awake):
    base = draw(pipe)
    mixture = awake(mole.attach(pipe, {"fox": (loras["fox"], 0.7), "ink": loras["ink"]}, "mole", binding={"fox": "a fox"}))
    picture = draw(pipe)
    twin = copy.deepcopy(pipe)
    other = mole.attached(twin)
    assert other is not mixture
    assert type(twin) is type(pipe)
    assert torch.equal(draw(twin), picture)
    with other.only("ink"):
        assert torch.equal(draw(pipe), picture)
    mole.detach(twin)
    assert torch.equal(draw(twin), base)
    assert torch.equal(draw(pipe), picture)


def test_pickling_is_refused_but_of_the_original(pipe, loras, draw):
    base = draw(pipe)
    mixture = mole.attach(pipe, {"ink": loras["ink"]})
    for what in (pipe, pipe.unet, pipe.text_encoder):
        with pytest.raises(ValueError, match=r"cannot be pickled or .*; do that inside `with mixture.lifted\(\):`"):
            pickle.dumps(what)
    with mixture.lifted():
        assert torch.equal(draw(pickle.loads(pickle.dumps(pipe))), base)


@pytest.mark.parametrize("share", [0.97, *thorough(0.02, 0.2, 0.4, 0.6, 0.8, 0.9)])
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


BLOCKS = {
    "detach": lambda pipe, mixture: mole.detach(pipe),
    "only": lambda pipe, mixture: entered(mixture.only("fox")),
    "lifted": lambda pipe, mixture: entered(mixture.lifted()),
    "collapsed": lambda pipe, mixture: entered(mixture.collapsed()),
}


def entered(block):
    with block:
        pass


@pytest.mark.parametrize("what", ["collapsed", *thorough("detach", "only", "lifted")])
@pytest.mark.parametrize("rounds", [1, *thorough(50)])
def test_an_interrupted_block_can_be_restored(pipe, loras, draw, what, rounds):
    """Ctrl-C at the entry of functions of ours, drawn at random: the mixture draws as before, and comes off as a whole."""
    pipe, kind = of_its_own_kind(pipe)
    before, rng, broken = snapshot(pipe), random.Random(1), 0
    experts = {name: mole.read_expert(loras[name], name) for name in ("fox", "ink")}
    mixture = mole.attach(pipe, experts)
    calls, first = interrupted(lambda: BLOCKS[what](pipe, mixture), 0), None
    for at in [1, calls, *(rng.randint(1, calls) for _ in range(rounds))]:
        mixture = mole.attach(pipe, experts)
        first = draw(pipe, num_inference_steps=1) if first is None else first
        try:
            interrupted(lambda: BLOCKS[what](pipe, mixture), at)  # noqa: B023
        except KeyboardInterrupt:
            broken += 1
        if what in ("only", "collapsed") and mole.attached(pipe) is not None:
            with ThreadPoolExecutor(1) as threads:  # the lock is free, and no mask stays
                assert torch.equal(threads.submit(draw, pipe, num_inference_steps=1).result(timeout=60), first)
        mole.detach(pipe)
        assert_same(before, snapshot(pipe))
        assert "__call__" not in vars(kind)
    assert broken == rounds + 2


def test_lifting_that_is_interrupted_at_once_changes_nothing(pipe, loras, monkeypatch):
    pipe, kind = of_its_own_kind(pipe)
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    monkeypatch.setattr("mole_diffusers.patching.install.installation.switch", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        entered(mixture.lifted())
    assert mole.attached(pipe) is mixture
    mole.detach(pipe)
    assert "__call__" not in vars(kind)


PUT_BACK = {name: BLOCKS[name] for name in ("lifted", "collapsed")} | {
    "save_pretrained": lambda pipe, mixture: pipe.unet.save_pretrained(TemporaryDirectory().name)
}


@pytest.mark.parametrize("what", ["lifted", *thorough("collapsed", "save_pretrained")])
@pytest.mark.parametrize("rounds", [10, *thorough(100)])
def test_an_interrupted_mixture_is_put_back(pipe, loras, draw, what, rounds):
    """Ctrl-C in functions of ours and of the libraries, while the mixture is taken off, or put back."""
    pipe, _ = of_its_own_kind(pipe)
    mixture = mole.attach(pipe, {name: loras[name] for name in ("fox", "ink")}, binding={"fox": ("fox", "left")})
    picture, rng = draw(pipe, num_inference_steps=1), random.Random(2)
    calls = interrupted(lambda: PUT_BACK[what](pipe, mixture), 0, peft, diffusers)
    for at in (rng.randint(1, calls - 5) for _ in range(rounds)):
        with pytest.raises(KeyboardInterrupt):
            interrupted(lambda: PUT_BACK[what](pipe, mixture), at, peft, diffusers)
        assert mole.attached(pipe) is mixture, at
        assert torch.equal(draw(pipe, num_inference_steps=1), picture), at


def test_changes_are_undone_wherever_the_end_of_their_block_is_interrupted():
    left = set()

    def change():
        with undoing() as undo:
            for change in ("first", "second"):
                undo.callback(left.discard, change)
                left.add(change)

    calls = interrupted(change, 0)
    for at in range(1, calls + 1):
        with pytest.raises(KeyboardInterrupt):
            interrupted(change, at)
        assert not left


def of_its_own_kind(pipe):
    """The same models in a pipeline whose class no other test has patched, and the class."""
    kind = type("Own", (StableDiffusionPipeline,), {})
    own = kind(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    return own, kind


def interrupted(run, at, *others):
    """Raise KeyboardInterrupt in the `at`-th call of one of our functions (0: never); how many calls there were.

    `others` are packages whose functions count, too.
    """
    folders, calls = tuple(str(Path(package.__file__).parent) for package in (mole, *others)), 0

    def count(frame, event, _):
        nonlocal calls
        if event == "call" and frame.f_code.co_filename.startswith(folders) and frame.f_code.co_name[0] != "<":
            calls += 1
            if calls == at:
                raise KeyboardInterrupt

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_no_hook_is_left_where_recording_it_is_interrupted(loras, monkeypatch):
    pipe, callback = tiny_pipeline(), Undo.callback

    def hooked():
        return [module for module in pipe.unet.modules() if module._state_dict_pre_hooks]

    def interrupted(self, *step):
        if hooked():
            monkeypatch.undo()
            raise KeyboardInterrupt
        callback(self, *step)

    monkeypatch.setattr(Undo, "callback", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mole.attach(pipe, loras)
    assert not hooked()


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


@pytest.mark.parametrize(("families", "rounds"), [(("mole",), 1), *thorough((tuple(FAMILIES), 25))], ids=["mole", "each"])
def test_no_family_leaves_anything_behind(loras, families, rounds):
    """As many tensors, modules, mixtures and hooks after so many rounds as after twice as many."""
    pipe, kinds = tiny_pipeline(), (torch.Tensor, torch.nn.Module, mole.Mixture)

    def alive():
        gc.collect()
        things = [thing for thing in gc.get_objects() if isinstance(thing, kinds)]
        modules = [module for model in (pipe.unet, pipe.text_encoder) for module in model.modules()]
        return len(things), sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)

    def attaching(times):
        for family in families * times:
            mole.attach(pipe, loras, family)
            mole.detach(pipe)

    attaching(rounds)
    once = alive()
    attaching(rounds)
    assert alive() == once


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
        second_active = mixture.active
        second.close()
        waiting.result(60)
    assert second_active == {"ink"}
    second = opened("ink", 3.0)
    next(second)
    assert mixture.active == {"ink"}
    assert mixture.strength("ink") == 3
    second.close()
    assert mixture.active == set(loras)
    assert mixture.strength("fox") == mixture.strength("ink") == 1


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
