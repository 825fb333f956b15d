"""One layer with experts: its arithmetic by every route, and gates that are not evaluated where they cannot have changed."""

import pytest
import torch
from gate_types import gate_types
from tiers import thorough
from tiny import tiny_pipeline

import mole_diffusers as mole
from benchmarks.hosts import inputs
from mole_diffusers import functional

CLOSE = {"atol": 1e-5, "rtol": 0}
B, T, CIN, COUT, R = 2, 50, 12, 20, 6
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


@pytest.fixture
def step(pipe):
    """step(text, sample, time): one call of the denoiser; its defaults are the same objects every time."""
    given = inputs(pipe, pixels=32)

    @torch.no_grad()
    def run(text=None, sample=None, time=None):
        changed = {"encoder_hidden_states": text, "sample": sample, "timestep": time}
        return pipe.unet(**given | {k: v for k, v in changed.items() if v is not None})[0]

    run.text, run.sample = given["encoder_hidden_states"], given["sample"]
    return run


def asked(mixture):
    """A list that grows by what a gate of a mixture reads, whenever one is asked."""
    read = []
    for gate in (gate for bank in mixture.banks.values() for gate in bank):
        gate.register_forward_pre_hook(lambda _, given: read.append(given[0]))
    return read


def by_peft(pipe):
    """A hook on the host's layer: its product is left to it, and the experts are added by peft's own modules."""
    for model in (pipe.unet, pipe.text_encoder):
        for module in model.modules():
            if hasattr(module, "base_layer"):
                module.base_layer.register_forward_pre_hook(lambda *_: None)


# ---- arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(), (B, 1), (B, T)])
@pytest.mark.parametrize("gradients", [False, True])
def test_a_low_rank_product_is_added_as_in_float64(dtype, rows, gradients):
    torch.manual_seed(0)
    shapes = {"y": (B, T, COUT), "low": (B, T, R), "up": (COUT, R)}
    y, low, up = ((torch.randn(shape) * shape[-1] ** -0.5).to(dtype) for shape in shapes.values())
    factor = torch.rand(*rows, R).to(dtype)
    exact = y.double() + (low.double() * factor.double()) @ up.double().T
    with torch.set_grad_enabled(gradients):
        given = [part.clone().requires_grad_(gradients) for part in (y, low, factor, up)]
        y, low, factor, up = given
        by_row = factor.flatten(0, 1) if rows == (B, T) else factor
        added = functional.add_low_rank(y.flatten(0, 1), low.flatten(0, 1), by_row, up)
    assert added.dtype == dtype
    torch.testing.assert_close(added.double(), exact.flatten(0, 1), atol=TOLERANCE[dtype], rtol=0)
    if gradients:
        added.double().sum().backward()
        expected = (low.detach().double() * up.double().sum(0)).sum_to_size(factor.shape)
        torch.testing.assert_close(given[2].grad.double(), expected, atol=20 * TOLERANCE[dtype], rtol=0.02)


@pytest.mark.parametrize("gate_type", ["mole", *thorough("sum", "flow")])
def test_a_picture_is_the_same_by_whole_layers_and_by_peft(pipe, loras, draw, awake, gate_type):
    awake(mole.attach(pipe, loras, gate_type))
    whole = draw(pipe)
    by_peft(pipe)
    torch.testing.assert_close(draw(pipe), whole, **CLOSE)


def test_another_lora_beside_is_left_to_peft(pipe, loras, draw):
    pipe.load_lora_weights(loras["hat"], adapter_name="hat")
    mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]})
    beside = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    lora_only = {"fox": (loras["fox"], 0.5), "ink": (loras["ink"], 0.5), "hat": (loras["hat"], 0.5)}
    alone = tiny_pipeline()
    mole.attach(alone, lora_only)
    torch.testing.assert_close(beside, draw(alone), **CLOSE)


def test_scale_is_applied(pipe, loras, draw):
    mole.attach(pipe, loras)
    ours = draw(pipe, cross_attention_kwargs={"scale": 0.5})
    mole.attach(pipe, {name: (path, 0.5) for name, path in loras.items()})
    torch.testing.assert_close(ours, draw(pipe), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, *thorough(torch.float16)])
def test_half_precision_is_near_and_stays_half(loras, awake, dtype):
    outputs = []
    for kind in (torch.float32, dtype):
        pipe = tiny_pipeline().to(kind)
        awake(mole.attach(pipe, loras, "mole"))
        latents = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(kind)  # the same in any precision
        outputs.append(pipe("a fox", latents=latents, num_inference_steps=1, output_type="latent").images)
        assert outputs[-1].dtype == kind
    exact, near = (output.float() for output in outputs)
    assert (near - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.parametrize("gate_type", gate_types("mole"))
def test_gates_learn_after_a_picture_of_inference_mode(pipe, loras, draw, gate_type):
    mixture = mole.attach(pipe, loras, gate_type, binding=None)
    with torch.inference_mode():
        draw(pipe)
    pipe.unet(torch.randn(1, 4, 16, 16), torch.tensor(500), torch.randn(1, 16, 16)).sample.sum().backward()
    assert any(p.grad is not None for p in mixture.parameters())


def test_gradients_reach_the_gates_and_change_no_number(pipe, loras, awake):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    given = torch.randn(2, 4, 16, 16), torch.tensor(10), torch.randn(2, 16, 16)
    with torch.no_grad():
        without = pipe.unet(*given).sample
    result = pipe.unet(*given).sample
    torch.testing.assert_close(result, without, **CLOSE)
    result.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())


def test_autocast_rounds_as_peft_does(pipe, loras, awake, step):
    awake(mole.attach(pipe, loras, "mole"))
    with torch.autocast("cpu", torch.bfloat16):
        whole = step()
        by_peft(pipe)
        torch.testing.assert_close(step(), whole, atol=0.05, rtol=0)


# ---- what may change between two calls


def test_texts_gates_strengths_and_weights_count_whenever_they_change(pipe, loras, awake, step):
    """Each change against a pipeline that was never in any other state."""

    def fresh():
        other = tiny_pipeline()
        layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.base_layer
        with torch.no_grad():
            other.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.copy_(layer.weight)
        twin = mole.attach(other, {n: (p, mixture.strength(n)) for n, p in loras.items()}, "mole")
        for part, bank in mixture.banks.items():
            twin.banks[part].load_state_dict(bank.state_dict())
        with torch.no_grad():
            return other.unet(step.sample, torch.tensor(500), step.text)[0]

    mixture = awake(mole.attach(pipe, loras, "mole"))
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.base_layer

    def swap():
        layer.weight.data = layer.weight.data / 2

    changes = (
        lambda: step.text.mul_(2),
        lambda: mixture.strength("fox", -2.0),
        lambda: mixture.strength("ink", 0.0),
        lambda: awake(mixture, seed=1),
        lambda: layer.weight.data.mul_(3),
        swap,
    )
    for change in changes:
        before = step()
        change()
        after = step()
        assert (after - before).abs().max() > 1e-4
        torch.testing.assert_close(after, fresh(), **CLOSE)


def test_a_sum_is_evaluated_once_and_traced_at_every_step(pipe, loras, step):
    mixture = mole.attach(pipe, loras, "sum")
    calls = asked(mixture)
    with mixture.trace() as trace:
        first = step()
        once = len(calls)
        torch.testing.assert_close(step(), first, **CLOSE)
    assert len(calls) == once > 0
    assert len(trace.weights(trace.locations[0])) >= 2
    mixture.strength("fox", 0.0)
    step()
    assert len(calls) > once


class Schedule:
    """Strengths that change with the step, by hand."""

    def __init__(self):
        self.now = 1.0

    def part(self, part):
        return [1.0, self.now, 1.0]

    def block(self, module):
        return [1.0, 1.0, 0.5 if "up_blocks" in module else 1.0]

    def gates(self, place):
        return None


@pytest.mark.parametrize("gate_type", ["sum", *thorough("factors")])
def test_under_a_schedule_gates_are_asked_when_its_strengths_change(pipe, loras, step, gate_type):
    mixture, schedule = mole.attach(pipe, loras, gate_type), Schedule()
    decided = asked(mixture)
    with mixture.planned(schedule):
        first = step()
        once = len(decided)
        torch.testing.assert_close(step(), first, **CLOSE)
        assert len(decided) == once > 0
        schedule.now = 0.25
        second = step()
        assert len(decided) == 2 * once
    with mixture.strengths({"ink": 0.25}), mixture.planned(Schedule()):
        torch.testing.assert_close(step(), second, **CLOSE)
    assert (second - first).abs().max() > 1e-4


def test_what_an_interrupted_call_deferred_is_not_read_by_the_next(pipe, loras, awake, step):
    awake(mole.attach(pipe, loras, "prompt"))
    wanted = pipe.unet(step.sample, torch.tensor(500), step.text)[0]
    hook = pipe.unet.conv_in.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        step(text=step.text * 5)
    hook.remove()
    torch.testing.assert_close(pipe.unet(step.sample, torch.tensor(500), step.text)[0], wanted, **CLOSE)


def test_gates_of_the_text_are_evaluated_when_it_changes(pipe, loras, awake, step):
    """Against a copy of the text, which is new to them. The picture's gates are evaluated at every step."""
    mixture = awake(mole.attach(pipe, loras, "flow"))
    read = asked(mixture)
    changes = (
        lambda: step.text.mul_(2),
        lambda: awake(mixture, seed=1),
        lambda: mixture.strength("fox", -2.0),
        lambda: mixture.strength("ink", 0.0),
    )
    step(step.text)
    for change in changes:
        read.clear()
        before = step(step.text)
        assert read
        assert not any(hidden is step.text for hidden in read)
        change()
        after = step(step.text)
        assert any(hidden is step.text for hidden in read)
        assert (after - before).abs().max() > 1e-4
        torch.testing.assert_close(step(step.text.clone()), after, **CLOSE)
        step(step.text)


def test_gates_asked_at_every_second_step(pipe, loras, awake, draw):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    calls = asked(mixture)

    def weights(every, steps=5):
        calls.clear()
        with mixture.every(every), mixture.trace() as trace:
            picture = draw(pipe, num_inference_steps=steps)
        return picture, trace

    picture, each = weights(1)
    whole = len(calls)
    again, some = weights(2)
    assert len(calls) < whole
    place = next(p for p in some.locations if p.startswith("unet.") and "attentions" in p)
    table = some.weights(place)
    assert torch.equal(table[0], each.weights(place)[0])
    assert torch.equal(table[1], table[0])
    assert not torch.equal(table[2], table[1])
    assert torch.equal(table[3], table[2])
    assert len(table) == 5
    assert (again - picture).abs().max() > 0
    torch.testing.assert_close(weights(2)[0], again, **CLOSE)  # another picture begins anew, though the last ended half way
    torch.testing.assert_close(weights(1)[0], picture, **CLOSE)
    with pytest.raises(ValueError, match="1 or more calls, got 0"), mixture.every(0):
        pass


def test_gates_asked_less_often_are_asked_about_every_text(pipe, loras, awake, step):
    mixture, other = awake(mole.attach(pipe, loras, "mole")), torch.randn_like(step.text)
    samples = [step.sample + i for i in range(3)]
    expected = [step(other.clone(), sample) for sample in samples]
    with mixture.every(2):
        for sample, wanted in zip(samples, expected, strict=True):  # two calls a step, in turn
            step(sample=sample)
            torch.testing.assert_close(step(other, sample), wanted, **CLOSE)
    with mixture.every(100):  # longer than a picture takes
        step(sample=samples[1])
        torch.testing.assert_close(step(other, samples[2]), expected[2], **CLOSE)


def test_a_text_of_inference_mode_that_changed_in_place_is_routed_anew(pipe, loras, awake, step):
    awake(mole.attach(pipe, loras, "prompt"))
    with torch.inference_mode():
        text = step.text.clone()
        before = step(text)
        text.mul_(-2)
        assert (step(text) - before).abs().max() > 1e-3
        torch.testing.assert_close(step(text), step(text.clone()), **CLOSE)


def test_weights_given_by_hand_count_whatever_is_active(pipe, loras, step):
    """A teacher's weights hold while a student's experts are dropped."""
    mixture = mole.attach(pipe, {"fox": (loras["fox"], 1.5), "ink": loras["ink"]}, "mole")
    with mixture.fixed({"fox": 0.7, "ink": 0.4}):
        both = step()
    with mixture.only("ink"):
        masked = step()
        with mixture.fixed({"fox": 0.7, "ink": 0.4}):
            torch.testing.assert_close(step(), both, **CLOSE)
    assert (masked - both).abs().max() > 1e-4
    mole.attach(pipe, {"fox": (loras["fox"], 0.7), "ink": (loras["ink"], 0.4)}, "sum")
    torch.testing.assert_close(step(), both, **CLOSE)
