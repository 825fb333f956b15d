"""A mixture that is put on, taken off, copied or interrupted: nothing stays behind."""

import copy
import gc
import pickle
import random
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import Mock

import diffusers
import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hosts import assert_same, breaking, snapshot
from tiers import thorough
from tiny import tiny_pipeline
from turns import entered

import mole_diffusers as mole
from mole_diffusers.gates import GATE_TYPES
from mole_diffusers.patching.undo import Undo, undoing

BLOCK = "mid_block.attentions.0.transformer_blocks.0"


PLACES = {  # what is interrupted -> the module in which it happens
    "text encoder": lambda pipe, mixture: pipe.text_encoder.encoder.layers[1],
    "first layer": lambda pipe, mixture: pipe.unet.conv_in,
    "gate": lambda pipe, mixture: mixture.parts.banks["unet"][BLOCK],
    "attention": lambda pipe, mixture: pipe.unet.get_submodule(f"{BLOCK}.attn1"),
    "expert": lambda pipe, mixture: pipe.unet.get_submodule(f"{BLOCK}.attn2.to_out.0.lora_A.mole_experts"),
    "last layer": lambda pipe, mixture: pipe.unet.conv_out,
    "picture": lambda pipe, mixture: pipe.vae.decoder,
}


FAST = [(KeyboardInterrupt, "text encoder")]


BREAKS = [(error, place) for place in [*PLACES, "callback"] for error in (RuntimeError, KeyboardInterrupt)]


@pytest.mark.parametrize(("error", "place"), [*FAST, *thorough(*(b for b in BREAKS if b not in FAST))])
@pytest.mark.shows("exceptions, interrupts, threads", "Threads and interruptions")
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


@pytest.mark.shows("`copy.deepcopy`, pickling")
def test_a_copy_of_a_model_is_the_original_s(pipe, loras):
    original = copy.deepcopy(pipe.unet).state_dict()
    mole.attach(pipe, {"ink": loras["ink"]})
    twin = copy.deepcopy(pipe.unet).state_dict()
    assert twin.keys() == original.keys()
    assert all(torch.equal(twin[k], original[k]) for k in twin)


@pytest.mark.shows("`copy.deepcopy`, pickling")
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


@pytest.mark.shows("`copy.deepcopy`, pickling")
def test_pickling_is_refused_but_of_the_original(pipe, loras, draw):
    base = draw(pipe)
    mixture = mole.attach(pipe, {"ink": loras["ink"]})
    for what in (pipe, pipe.unet, pipe.text_encoder):
        with pytest.raises(ValueError, match=r"cannot be pickled or .*; do that inside `with mixture.lifted\(\):`"):
            pickle.dumps(what)
    with mixture.lifted():
        assert torch.equal(draw(pickle.loads(pickle.dumps(pipe))), base)


@pytest.mark.parametrize("share", [0.97, *thorough(0.02, 0.2, 0.4, 0.6, 0.8, 0.9)])
@pytest.mark.shows("Threads and interruptions")
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


@pytest.mark.parametrize("what", ["collapsed", *thorough("detach", "only", "lifted")])
@pytest.mark.parametrize("rounds", [1, *thorough(50)])
@pytest.mark.shows("Threads and interruptions")
def test_an_interrupted_block_can_be_restored(pipe, loras, draw, what, rounds):
    """Ctrl-C at the entry of functions of ours, drawn at random: the mixture draws as before, and comes off as a whole."""
    kind = type(pipe)
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
        assert type(pipe) is kind
    assert broken == rounds + 2


def test_lifting_that_is_interrupted_at_once_changes_nothing(pipe, loras, monkeypatch):
    kind = type(pipe)
    mixture = mole.attach(pipe, {"fox": loras["fox"]})
    monkeypatch.setattr("mole_diffusers.patching.install.installation.switch", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        entered(mixture.lifted())
    assert mole.attached(pipe) is mixture
    mole.detach(pipe)
    assert type(pipe) is kind


PUT_BACK = {name: BLOCKS[name] for name in ("lifted", "collapsed")} | {
    "save_pretrained": lambda pipe, mixture: pipe.unet.save_pretrained(TemporaryDirectory().name)
}


@pytest.mark.parametrize("what", ["lifted", *thorough("collapsed", "save_pretrained")])
@pytest.mark.parametrize("rounds", [10, *thorough(100)])
def test_an_interrupted_mixture_is_put_back(pipe, loras, draw, what, rounds):
    """Ctrl-C in functions of ours and of the libraries, while the mixture is taken off, or put back."""
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


@pytest.mark.parametrize(
    ("gate_types", "rounds"), [(("mole",), 1), *thorough((tuple(GATE_TYPES), 25))], ids=["mole", "each"]
)
def test_no_family_leaves_anything_behind(loras, gate_types, rounds):
    """No more tensors, modules, mixtures and hooks after twice as many rounds. What ended before may still go meanwhile."""
    pipe, kinds = tiny_pipeline(), (torch.Tensor, torch.nn.Module, mole.Mixture)

    def alive():
        gc.collect()
        subjects = [subject for subject in gc.get_objects() if isinstance(subject, kinds)]
        modules = [module for model in (pipe.unet, pipe.text_encoder) for module in model.modules()]
        return len(subjects), sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in modules)

    def attaching(times):
        for gate_type in gate_types * times:
            mole.attach(pipe, loras, gate_type)
            mole.detach(pipe)

    attaching(rounds)
    subjects, hooks = alive()
    attaching(rounds)
    now, still = alive()
    assert now <= subjects
    assert still == hooks
