"""demos/emoji/experiments/shared_gate.py: gates of ten numbers, for any LoRAs."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

import mole_diffusers as mole
from mole_diffusers.lora import read_expert
from mole_diffusers.training.denoising import predict

NAMES = ("fox", "ink")


@pytest.fixture(scope="module")
def shared(script):
    return script("shared_gate")


@pytest.fixture
def mixture(pipe, loras):
    """Of the denoiser's part alone, which is what the gates weigh."""
    experts = {name: read_expert(loras[name], name) for name in NAMES}
    of_unet = {name: replace(each, layers={"unet": each.layers["unet"]}) for name, each in experts.items()}
    return mole.attach(pipe, of_unet, binding=None)


@torch.no_grad()
def answer(pipe):
    """What a pipeline's UNet predicts for two prompts at different noise levels."""
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    return predict(pipe, x, torch.tensor([100, 900]), ["a fox in ink", ""])


def put(shared, pipe, mixture, numbers):
    clock = shared.Clock()
    shared.put_gates(pipe, mixture, nn.Parameter(torch.tensor(numbers)), styles={"ink"}, clock=clock)
    return clock


def test_it_begins_as_the_sum(shared, pipe, mixture):
    before = answer(pipe)
    with put(shared, pipe, mixture, [0.0] * 10).of(pipe):
        torch.testing.assert_close(answer(pipe), before, atol=1e-6, rtol=0)


def test_a_number_of_a_kind_is_that_kinds_strength(shared, pipe, mixture):
    with mixture.strengths({"fox": 0.5, "ink": 2.0}):
        before = answer(pipe)
    halved, doubled = torch.tensor([0.5, 2.0]).log().tolist()
    with put(shared, pipe, mixture, [halved, 0, 0, 0, doubled, 0, 0, 0, 0, 0]).of(pipe):
        torch.testing.assert_close(answer(pipe), before, atol=1e-5, rtol=1e-5)


def test_by_noise_each_row_has_its_own_strength(shared, pipe, mixture):
    """At .1 and .9 of the noise the factor is exp(number * (time - .5))."""
    rows = []
    for factor in torch.tensor([-0.4, 0.4]).exp().tolist():
        with mixture.strengths({"fox": 1.0, "ink": factor}):
            rows.append(answer(pipe))
    with put(shared, pipe, mixture, [0, 0, 0, 0, 0, 1.0, 0, 0, 0, 0]).of(pipe):
        got = answer(pipe)
    torch.testing.assert_close(got, torch.stack([rows[0][0], rows[1][1]]), atol=1e-4, rtol=1e-4)


def test_the_larger_of_two_outputs_is_weighed_by_its_size(shared, pipe, mixture):
    put(shared, pipe, mixture, [0, 0, 0, 0, 0, 0, 0, 0, 0.5, 1.0])
    queries = next(name for _, name, *_ in shared.ladder.layers(pipe) if name.endswith("attn1.to_q"))
    gate = mixture.parts.banks["scores"][queries]
    rows = torch.randn(1, 3, len(gate.expert_index))
    sizes = [((rows * gate.lengths)[..., gate.expert_index == k] ** 2).sum(-1).sqrt() for k in (0, 1)]
    log, share = [size.log() for size in sizes], sizes[0] / (sizes[0] + sizes[1])
    apart = ((log[0] - log[1]) / 2).clamp(-3, 3)
    wanted = torch.stack([0.5 * apart + share - 0.5, -0.5 * apart + 0.5 - share], -1).exp()
    torch.testing.assert_close(gate.weights(rows).detach(), wanted, atol=1e-4, rtol=1e-4)


def test_retrieval_gates_have_their_name_only_after_the_last_lesson(shared, pipe, loras, tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "FOLDER", tmp_path)
    began = []

    @contextmanager
    def taught(setup, case, scene, gates):
        def train(seed):
            if case == "interrupted":
                raise KeyboardInterrupt

        began.append(gates)
        yield mole.attach(pipe, {name: loras[name] for name in NAMES}, gates), train
        mole.detach(pipe)

    monkeypatch.setattr(shared, "taught", taught)
    with pytest.raises(KeyboardInterrupt):
        shared.train_retrieval(None, [("first", None), ("interrupted", None)])
    assert not (tmp_path / "retrieval").exists()
    mole.detach(pipe)
    shared.train_retrieval(None, [("first", None), ("second", None)])
    part = tmp_path / "retrieval.part"
    assert began == ["retrieval", part] * 2  # what an interrupted run left is not gone on with
    assert (tmp_path / "retrieval" / "config.json").exists()
    assert not part.exists()
