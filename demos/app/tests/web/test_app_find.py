"""Finding LoRAs for a prompt while the pipeline is busy."""

import threading

import hosts
import pytest
import torch
from tiny import tiny_pipeline

from mole_app.studio.base_models import Base
from mole_app.studio.catalog import Catalog
from mole_app.studio.memory import Memory
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions
from mole_app.web.jobs import Jobs, ignore
from mole_diffusers import attach, attached
from mole_diffusers.retrieval.encoders import PipelineText, text_beside

TEXTS = ["a fox in ink", "hat"]
RECIPE = Recipe("a <lora:fox:1> <lora:ink:1>", steps=2, width=32, height=32)


def test_texts_are_read_with_the_pipelines_weights_and_without_its_loras(pipe, loras):
    wanted = PipelineText(pipe)(TEXTS)
    attach(pipe, loras)
    beside = text_beside(pipe)
    assert beside.id == PipelineText(pipe).id
    assert torch.equal(beside(TEXTS), wanted)
    own = {tensor.data_ptr() for tensor in beside.pipe.text_encoder.parameters()}
    assert own <= {tensor.data_ptr() for tensor in pipe.text_encoder.parameters()}  # which takes no memory
    assert attached(pipe) is not None
    assert attached(beside.pipe) is None


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_weights_that_come_and_go_are_not_shared(pipe, offload):
    hosts.OFFLOADS[offload](pipe)
    assert text_beside(pipe) is None


def test_finding_does_not_wait_for_a_job(loras, tmp_path):
    actions, begun, held = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")), threading.Event(), []

    def draw(report):
        def found_meanwhile(state):
            if not held:
                begun.set()
                held.append(found.wait(60))

        return actions.compose(RECIPE, 1)(found_meanwhile)

    found, jobs = threading.Event(), Jobs()
    job = jobs.submit("me", "compose", draw)
    assert begun.wait(60)  # and stays where it is
    hits = actions.loras.find("a fox and a hat")
    found.set()
    *_, _ = jobs.follow(job)
    assert (held, job.state) == ([True], "done")
    assert [hit.name for hit in hits] == ["fox", "hat"]
    assert hits == actions.loras.find("a fox and a hat")


@pytest.mark.parametrize("offload", [None, "model"])
def test_another_base_reads_with_its_own_encoder(loras, offload):
    def opening(name):
        pipe = tiny_pipeline(1)
        if offload:
            hosts.OFFLOADS[offload](pipe)
        return Base(pipe, name, Memory("cpu"))

    bases = {"tiny": "tiny", "other": "other"}
    actions = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"), bases=bases, opening=opening)
    actions.loras.find("a fox")
    assert torch.equal(actions.loras._library.encoder(TEXTS), PipelineText(tiny_pipeline(0))(TEXTS))
    actions.compose(RECIPE, 1)(ignore)
    actions.bases.change("other")(ignore)
    assert [hit.name for hit in actions.loras.find("a fox")] == ["fox"]
    assert torch.equal(actions.loras._library.encoder(TEXTS), PipelineText(tiny_pipeline(1))(TEXTS))


def test_a_base_that_is_opened_again_is_read_anew(loras, monkeypatch):
    """Also where somebody finds while its weights are about to be let go."""

    def opening(name):
        if name == "broken":
            raise ValueError("it cannot be opened")
        return Base(tiny_pipeline(), name, Memory("cpu"))

    studio = Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")
    actions = Actions(studio, bases={"tiny": "tiny", "broken": "broken"}, opening=opening)
    change, hits = studio.base.change, []
    monkeypatch.setattr(studio.base, "change", lambda *given: (hits.append(actions.loras.find("a fox")), change(*given)))
    with pytest.raises(ValueError, match="cannot be opened"):
        actions.bases.change("broken")(ignore)
    assert [actions.loras.find("a fox")] == hits
    assert actions.loras._library.encoder is actions.loras._reader
