"""MoLE by its equations: block by block, expert by expert and number by number, on a tiny real Stable Diffusion."""

import copy
import math
from functools import partial

import pytest
import torch
from hosts import HOSTS
from tiny import tiny_lora
from torch import nn

import mole_diffusers as mole
from mole_diffusers.gates import Context, GateConfig
from mole_diffusers.gates.types.outputs import LENGTH, OutputGate
from mole_diffusers.lora import read_expert
from mole_diffusers.training import GateTraining, TrainingContext
from mole_diffusers.training.gate_trainer import GateTrainer

NAMES = ("fox", "ink")  # their layers are all in blocks; ink has feed-forward layers, too
PROMPT = "a fox in ink"
FLAT = GateConfig("outputs", features="flattened")


def states(pipe, prompt=PROMPT):
    """The text's states and what the UNet predicts from one noise for it and for the empty prompt."""
    with torch.no_grad():
        text = torch.cat([each for each in pipe.encode_prompt(prompt, "cpu", 1, True) if each is not None])
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(text.dtype).repeat(2, 1, 1, 1)
        return text, pipe.unet(noise, torch.tensor(700), encoder_hidden_states=text)[0]


class Written:
    """Eq. 7 to 13 on one model: every block runs with one LoRA at a time, and a loop over the numbers of E decides."""

    def __init__(self, model, part, experts, bank):
        self.now, self.gates = None, []
        for name, module in model.named_modules():
            for which, (expert, strength) in enumerate(experts):
                if (own := expert.layers[part].get(name.replace(".", "_"))) is not None:
                    module.register_forward_hook(partial(self.add, which, strength * own.delta()))
            if hasattr(module, "attn1") or hasattr(module, "self_attn"):
                module.forward = partial(self.block, module.forward, len(experts), bank[name])

    def add(self, which, delta, module, args, out):
        return out + nn.functional.linear(args[0], delta.to(out.dtype)) if self.now == which else out

    def run(self, block, which, args, kwargs):
        self.now = which
        try:
            return block(*args, **kwargs)
        finally:
            self.now = None

    def block(self, block, count, gate, *args, **kwargs):
        base = self.run(block, None, args, kwargs)
        changes = [self.run(block, which, args, kwargs) - base for which in range(count)]  # E_i(x)
        out = base.clone()
        for row in range(len(base)):
            side_by_side = [value for token in zip(*(e[row] for e in changes), strict=True) for value in torch.cat(token)]
            length = sum(value * value for value in side_by_side).sqrt()
            tau = gate.log_tau.exp()
            logits = [sum(a * b for a, b in zip(e, side_by_side, strict=True)) / length / tau for e in gate.matrix.tolist()]
            total = sum(logit.exp() for logit in logits)
            self.gates.append([(logit.exp() / total).item() for logit in logits])
            for share, change in zip(self.gates[-1], changes, strict=True):
                out[row] += share * change[row]
        return out


def test_it_is_the_paper_written_out(pipe, loras, awake):
    """Flattened, in the UNet and in the text encoder, with strengths, in float64 where nothing is rounded away."""
    pipe.to(torch.float64)
    host, strengths = copy.deepcopy(pipe), {"fox": 0.8, "ink": -1.3}
    mixture = awake(mole.attach(pipe, {n: (loras[n], s) for n, s in strengths.items()}, FLAT, binding=None), size=0.7)
    with torch.no_grad():
        for gates in mixture.banks.values():
            for i, gate in enumerate(gates):
                gate.log_tau.fill_(0.1 * i - 0.3)
    heard = []
    with mixture.parts.listen(heard.append):
        found = states(pipe)
    experts = [(read_expert(loras[name], name), strength) for name, strength in strengths.items()]
    written = [Written(getattr(host, part), part, experts, bank) for part, bank in mixture.banks.items()]
    for ours, theirs in zip(found, states(host), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    gates = torch.cat([decision.gates for decision in heard])
    both = [row for each in written for row in each.gates]
    assert sorted(gates[:, 0].tolist()) == pytest.approx(sorted(row[0] for row in both), abs=1e-6)
    assert gates.std() > 0.05
    assert torch.allclose(gates.sum(1), torch.ones(len(gates)))


def test_it_starts_near_equal_weights_with_rows_of_length_a_hundredth():
    gate = OutputGate(3, 40, "flattened")
    assert gate.matrix.norm(dim=1).tolist() == pytest.approx([LENGTH] * 3)
    weights = gate(torch.randn(2, 4, 10), Context(torch.tensor([True] * 3), torch.zeros(1)))
    assert (weights - 1 / 3).abs().max() < LENGTH / 2


@pytest.mark.parametrize("features", ["pooled", "flattened"])
def test_one_lora_is_that_lora_and_two_alike_are_one(pipe, loras, draw, features):
    mole.attach(pipe, {"fox": loras["fox"]})
    fox, gates = draw(pipe), GateConfig("outputs", features=features)
    for names in (("a",), ("a", "b")):
        mixture = mole.attach(pipe, dict.fromkeys(names, loras["fox"]), gates, binding=None)
        torch.testing.assert_close(draw(pipe), fox, atol=1e-5, rtol=0)
    with mixture.fixed({"a": 0.4, "b": 0.6}):  # in the layers
        torch.testing.assert_close(draw(pipe), fox, atol=1e-5, rtol=0)


def test_who_is_off_does_not_run_and_layers_outside_blocks_have_a_gate(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, "outputs", binding=None))
    block, runs = pipe.unet.mid_block.attentions[0].transformer_blocks[0], []
    forward = block.forward
    block.forward = lambda *args, **kwargs: runs.append(0) or forward(*args, **kwargs)
    draw(pipe, num_inference_steps=1)
    assert len(runs) == 1 + len(loras)
    with mixture.only("fox"), mixture.trace() as trace:
        draw(pipe, num_inference_steps=1)
    assert len(runs) == 1 + len(loras) + 2
    assert all(weights.reshape(-1, 3)[:, 1:].eq(0).all() for _, _, weights in trace.records)
    assert "unet" in trace.locations  # the convolutions of hat
    with mixture.fixed({"hat": 1.0}):
        draw(pipe, num_inference_steps=1)
    assert len(runs) == 1 + len(loras) + 3


def test_flattened_gates_are_for_pictures_of_their_area(pipe, loras, draw):
    files = {name: loras[name] for name in NAMES}
    mole.attach(pipe, files, FLAT)
    draw(pipe, num_inference_steps=1)
    with pytest.raises(ValueError, match="it is tied to one resolution"):
        draw(pipe, num_inference_steps=1, width=64, height=32)
    mole.attach(pipe, files, GateConfig("outputs", features="flattened", area=2))
    assert draw(pipe, num_inference_steps=1, width=64, height=32).shape == (1, 32, 64, 3)
    assert draw(pipe, num_inference_steps=1, width=32, height=64).shape == (1, 64, 32, 3)


def test_gates_are_saved_and_get_gradients_and_are_balanced_as_in_the_paper(pipe, loras, awake, tmp_path):
    files = {name: loras[name] for name in NAMES}
    mixture = awake(mole.attach(pipe, files, FLAT, binding=None))
    trainer = GateTrainer(TrainingContext(pipe, mixture, _pictures(), config=GateTraining({"denoise": 1.0, "balance": 0.5})))
    trainer.prepare()
    with trainer.only_gates_learn():
        heard = []
        with mixture.parts.listen(heard.append):
            losses = trainer.losses(0, index=0, shares=1)
        losses["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in mixture.parameters())
    q = [0.0, 0.0]
    for decision in heard:
        for row in decision.gates.tolist():
            for i, share in enumerate(row):
                q[i] += share / len(decision.gates) / len(heard)
    least = 2 * math.log(2)  # of eq. 14, which is not shown
    assert losses["balance"].item() == pytest.approx(-math.log(q[0] * q[1]) - least, abs=1e-6)
    total = losses["denoise"] + 0.5 * losses["balance"]
    assert losses["loss"].item() == pytest.approx(total.item(), abs=1e-6)
    mixture.save_pretrained(tmp_path)
    with torch.no_grad():
        kept = [p.clone() for p in mixture.parameters()]
    again = mole.attach(pipe, files, tmp_path, binding=None)
    assert again.config == FLAT
    assert all(torch.equal(one, other) for one, other in zip(kept, again.parameters(), strict=True))


def _pictures():
    from mole_diffusers.training import Samples, TrainingData

    return TrainingData(samples=Samples(torch.randn(2, 4, 16, 16), ["a fox", "ink"]))


def test_what_these_gates_cannot_do(pipe, loras, tmp_path):
    with pytest.warns(UserWarning, match="'outputs' gates weigh as about the mean until they are trained"):
        mixture = mole.attach(pipe, {name: loras[name] for name in NAMES}, "outputs")
    with pytest.raises(ValueError, match="gates that weigh outputs of blocks cannot be folded"), mixture.collapsed(PROMPT):
        pass
    flux, _ = HOSTS["flux"]()
    with pytest.raises(ValueError, match="need blocks with one output, and those of a FluxTransformer2DModel have one"):
        mole.attach(flux, {"a": tiny_lora(flux, tmp_path / "a.safetensors")}, "outputs")
