"""Calls of a pipeline with a mixture: whose they are, and that they are entered once."""

import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline
from turns import of_its_own_kind

import mole_diffusers as mole
from mole_diffusers.patching.install import pipeline_calls
from mole_diffusers.testing import tiny_pipeline


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
