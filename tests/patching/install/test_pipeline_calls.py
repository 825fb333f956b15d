"""Calls of a pipeline with a mixture: whose they are, and that they are entered once."""

import gc
import inspect
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from diffusers import AutoPipelineForImage2Image, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from tiny import tiny_pipeline

import mole_diffusers as mole


@pytest.fixture
def entered(monkeypatch):
    """The mixtures whose contexts calls have entered."""
    entered, drawing = [], mole.Mixture.drawing
    monkeypatch.setattr(mole.Mixture, "drawing", lambda self, call: entered.append(self) or drawing(self, call))
    return entered


def test_the_pipeline_keeps_its_kind_and_its_signature(pipe, loras):
    signature, encoding = inspect.signature(pipe.__call__), inspect.signature(pipe.encode_prompt)
    mole.attach(pipe, {"ink": loras["ink"]})
    assert isinstance(pipe, StableDiffusionPipeline)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert (inspect.signature(pipe.__call__), inspect.signature(pipe.encode_prompt)) == (signature, encoding)
    for kind in (StableDiffusionImg2ImgPipeline, AutoPipelineForImage2Image):
        assert type(kind.from_pipe(pipe, dtype=torch.float32)) is StableDiffusionImg2ImgPipeline
    with TemporaryDirectory() as folder, mole.attached(pipe).lifted():
        pipe.save_pretrained(folder)
        assert '"_class_name": "StableDiffusionPipeline"' in (Path(folder) / "model_index.json").read_text()
    mole.detach(pipe)
    assert type(pipe) is StableDiffusionPipeline


def test_a_pipeline_that_nobody_detached_is_collected(loras, draw):
    """On whatever thread; and others draw on."""
    one, other = tiny_pipeline(), tiny_pipeline(1)
    for pipe in (one, other):
        for name in ("fox", "ink"):
            mole.attach(pipe, {name: loras[name]})
    picture, known = draw(other), weakref.ref(one)
    del one, pipe
    with ThreadPoolExecutor(1) as threads:
        threads.submit(gc.collect).result(60)
    assert known() is None
    assert torch.equal(draw(other), picture)


def test_what_others_put_around_calls_of_the_class_runs_inside(pipe, loras, draw, monkeypatch, entered):
    mixture, seen = mole.attach(pipe, loras), []
    call = StableDiffusionPipeline.__call__
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", lambda *a, **k: seen.append(len(entered)) or call(*a, **k))
    draw(pipe)
    assert (seen, entered) == ([1], [mixture])


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
