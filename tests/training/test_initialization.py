"""Gates that start at closed-form weights, against brute force and against the merges of the same name."""

from dataclasses import replace

import pytest
import torch

import mole_diffusers as mole
from mole_diffusers.functional import gate_weights, logits_for
from mole_diffusers.gates import Context, GateConfig
from mole_diffusers.gates.types.flow import FlowGate
from mole_diffusers.gates.types.mole import MoLEGate
from mole_diffusers.gates.types.static import StaticGate
from mole_diffusers.merging import Activations, layers_of, merge, merge_key
from mole_diffusers.training import GateTraining, Samples, TrainingContext, TrainingData, initialization, train_gates
from mole_diffusers.training.denoising import predict
from mole_diffusers.training.initialization import initialize

SINGLES = {"fox": ["a fox", "fox"], "ink": ["ink art", "ink"], "hat": ["a hat"]}
HERE, ONE = torch.tensor([True, True]), torch.zeros(1)


def context_of(pipe, loras, gates, names=("fox", "ink")):
    mixture = mole.attach(pipe, {n: (loras[n], 0.7 if n == "ink" else 1.0) for n in names}, gates)
    return TrainingContext(pipe, mixture, TrainingData({n: SINGLES[n] for n in names}, ["a fox in ink"]))


def test_logits_give_the_weights_that_a_total_can_reach():
    wanted = torch.tensor([0.5, 1.5])
    for total in ("linear", "sigmoid", "N"):
        torch.testing.assert_close(gate_weights(logits_for(wanted, total), HERE, total), wanted)
    torch.testing.assert_close(gate_weights(logits_for(wanted, "1"), HERE, "1"), wanted / 2)
    far = torch.tensor([-3.0, 3.0])
    assert torch.equal(gate_weights(logits_for(far, "linear"), HERE, "linear"), far)
    torch.testing.assert_close(gate_weights(logits_for(far, "sigmoid"), HERE, "sigmoid"), torch.tensor([0.05, 1.95]))


@pytest.mark.parametrize("start", ["sum", "mean", "faithful"])
def test_every_family_that_can_begins_where_told(start):
    wanted, hidden = torch.tensor([0.4, -0.3]), torch.randn(1, 3, 4)
    gates = FlowGate(2, 4, start), StaticGate(2, "linear", 3), MoLEGate(2, 4, "linear", "pooled", bias=True)
    for gate in gates:
        gate.begin(wanted, HERE)
        found = gate(hidden, Context(HERE, ONE))
        torch.testing.assert_close(found, wanted.expand_as(found))
    one = FlowGate(2, 4, start)
    one.begin(torch.tensor([0.4, 1.0]), torch.tensor([True, False]))
    weights = one(hidden, Context(torch.tensor([True, False]), ONE))
    torch.testing.assert_close(weights, torch.tensor([0.4, 0.0]).expand_as(weights))


@pytest.mark.thorough
def test_scalars_of_a_gate_equal_brute_force_over_its_layers(pipe, loras):
    context = context_of(pipe, loras, GateConfig("static", granularity="layer", total="linear"))
    initialize(context, "scalars")
    weighed = context.mixture.weighed()
    activations, layers = Activations(pipe, context.data.singles), layers_of(weighed)
    own = [activations.own(n, e, s) for n, (e, s) in weighed.items()]
    gates = [(g, names) for g, names in context.mixture.layers_by_gate() if len(names) > 1]
    assert len(gates) > 8
    for gate, names in gates[::5]:
        rows, wanted = [], []
        for key in map(merge_key, names):
            deltas = [None if pair is None else pair.delta() for pair in layers[key]]
            for k, x in enumerate(activation.get(key) for activation in own):
                if deltas[k] is not None:
                    each = [torch.zeros_like(x.double() @ deltas[k].T) if d is None else x.double() @ d.T for d in deltas]
                    rows.append(torch.stack([e.flatten() for e in each], 1))
                    wanted.append(each[k].flatten())
        table = torch.cat(rows)
        brute = torch.linalg.lstsq(table, torch.cat(wanted)[:, None], driver="gelsd").solution[:, 0]
        brute += (table == 0).all(0)  # who is not there keeps 1
        torch.testing.assert_close(1 + gate.logits[0].detach().double(), brute, atol=1e-5, rtol=1e-4)


def test_one_gate_per_matrix_from_scalars_draws_as_that_merge(pipe, loras):
    """Two routes to one picture: the started mixture, and the training-free merge of the same experts."""
    context = context_of(pipe, loras, GateConfig("mole", granularity="matrix", total="linear", bias=True))
    weighed, x, t = context.mixture.weighed(), torch.randn(2, 4, 16, 16), torch.tensor([5, 800])
    initialize(context, "scalars")
    with torch.no_grad():
        found = predict(pipe, x, t, ["a fox", "ink"])
        merged = merge(weighed, "scalars", activations=Activations(pipe, context.data.singles))
        mole.attach(pipe, {"merged": merged})
        torch.testing.assert_close(found, predict(pipe, x, t, ["a fox", "ink"]), atol=1e-4, rtol=1e-4)


@pytest.mark.thorough
def test_ssr_is_the_weights_nearest_to_that_merge(pipe, loras, monkeypatch):
    context = context_of(pipe, loras, GateConfig("static", granularity="matrix", total="linear"))
    initialize(context, "ssr")
    weighed = context.mixture.weighed()
    activations, layers = Activations(pipe, context.data.singles), layers_of(weighed)
    merged = layers_of({"m": (merge(weighed, "ssr", activations=activations), 1.0)})
    own = [activations.own(n, e, s) for n, (e, s) in weighed.items()]
    shared = [(g, merge_key(n[0])) for g, n in context.mixture.layers_by_gate() if None not in layers[merge_key(n[0])]]
    for gate, key in shared[::7]:
        x = torch.cat([activation[key] for activation in own]).double()
        each = torch.stack([(x @ pair.delta().T).flatten() for pair in layers[key]], 1)
        brute = torch.linalg.lstsq(each, (x @ merged[key][0].delta().T).flatten()).solution
        torch.testing.assert_close(1 + gate.logits[0].detach().double(), brute, atol=1e-4, rtol=1e-3)
    ridged = shared[-1][0].logits.clone()
    monkeypatch.setattr(initialization, "RIDGE", 1e-9)
    initialize(context, "ssr")
    free = shared[-1][0].logits.clone()
    initialize(context, "scalars")
    torch.testing.assert_close(free, shared[-1][0].logits, atol=1e-4, rtol=0)
    assert not torch.allclose(free, ridged, atol=3e-4, rtol=0)


@pytest.mark.thorough
def test_training_starts_there_and_a_resumed_run_does_not_start_again(pipe, loras, tmp_path):
    gates = GateConfig("flow")
    context = context_of(pipe, loras, gates)
    initialize(context, "scalars")
    wanted = [p.detach().clone() for p in context.mixture.parameters()]
    samples = Samples(torch.randn(2, 4, 16, 16), ["a fox in ink"] * 2)
    data = replace(context.data, samples=samples)
    config = GateTraining({"denoise": 1.0}, initial="scalars", steps=2, batch=2, lr=1e-9, every=1)
    mixture = context_of(pipe, loras, gates).mixture
    train_gates(pipe, mixture, data, config=config, folder=tmp_path)
    for found, value in zip(mixture.parameters(), wanted, strict=True):
        torch.testing.assert_close(found, value, atol=1e-6, rtol=0)
    whole = [p.detach().clone() for p in mixture.parameters()]
    mixture = context_of(pipe, loras, gates).mixture
    train_gates(pipe, mixture, data, config=config, folder=tmp_path, resume_from="checkpoint-1")
    assert all(torch.equal(a, b) for a, b in zip(mixture.parameters(), whole, strict=True))


def test_first_weights_are_not_computed_for_a_run_that_is_refused_or_resumed(pipe, loras, tmp_path, monkeypatch):
    mixture, computed = context_of(pipe, loras, GateConfig("flow")).mixture, []
    data = TrainingData(samples=Samples(torch.randn(1, 4, 16, 16), ["a fox in ink"]))
    config = GateTraining({"denoise": 1.0}, initial="scalars", steps=1, batch=1)
    monkeypatch.setattr("mole_diffusers.training.gate_trainer.initialize", lambda *asked: computed.append(asked[1]))
    train_gates(pipe, mixture, data, config=config, folder=tmp_path)
    with pytest.raises(ValueError, match="holds checkpoint-1 of an earlier run"):
        train_gates(pipe, mixture, data, config=config, folder=tmp_path)
    train_gates(pipe, mixture, data, config=config, folder=tmp_path, resume_from="latest")
    assert computed == ["scalars"]


def test_what_cannot_start_elsewhere_is_said(pipe, loras):
    for gates, message in (
        (GateConfig("mole"), "needs a bias to start at other weights"),
        (GateConfig("rank"), "gates of type 'rank' can only start 'uniform', not 'scalars'"),
        (GateConfig("prompt"), "gates of type 'prompt' can only start 'uniform'"),
    ):
        with pytest.raises(ValueError, match=message):
            initialize(context_of(pipe, loras, gates), "scalars")
    context = context_of(pipe, loras, GateConfig("flow"))
    with pytest.raises(ValueError, match="need single prompts of every expert, and 'ink' has none"):
        initialize(replace(context, data=TrainingData({"fox": ["a fox"]})), "scalars")
    with pytest.raises(
        ValueError, match=r"initial of the training must be one of \['uniform', 'scalars', 'ssr'\], got 'ties'"
    ):
        GateTraining(initial="ties")
    with pytest.raises(ValueError, match="'bias' must be true or false, got 'yes'"):
        GateConfig(bias="yes")
