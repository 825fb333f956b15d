"""What is not computed twice is the same, and is computed again whenever it would not be."""

import pytest
import torch
import torch.nn.functional as F

import mole_diffusers as mole
from benchmarks.hosts import inputs
from mole_diffusers.gates import FAMILIES, ConstantGate, FlowGate, GateConfig, MoLEGate, RankGate, StaticGate
from mole_diffusers.inspection.contributions import contributions
from mole_diffusers.patching.gated_linear import GatedLayer
from mole_diffusers.patching.kept_products import Kept, Together, at_rest
from mole_diffusers.patching.peft_injection import ADAPTER
from mole_diffusers.testing import tiny_pipeline

CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture
def step(pipe):
    """step(text, sample, time): one call of the denoiser; its defaults are the same objects every time."""
    given = inputs(pipe, "tiny", pixels=32)

    @torch.no_grad()
    def run(text=None, sample=None, time=None):
        changed = {"encoder_hidden_states": text, "sample": sample, "timestep": time}
        return pipe.unet(**given | {k: v for k, v in changed.items() if v is not None})[0]

    run.text, run.sample = given["encoder_hidden_states"], given["sample"]
    return run


@pytest.fixture
def products(monkeypatch):
    """products(): how many products of the text's width were made since it was last asked."""
    made, linear = [], F.linear

    def counted(x, *rest):
        made.append(tuple(x.shape))
        return linear(x, *rest)

    monkeypatch.setattr(F, "linear", counted)

    def ask():
        count = sum(shape == (2, 16, 16) for shape in made)
        made.clear()
        return count

    return ask


def fresh(step):
    """A step in which nothing can be kept: a text of its own."""
    return step(text=step.text.clone())


def test_a_kept_text_gives_the_same_step_and_one_changed_in_place_is_seen(pipe, loras, awake, step):
    awake(mole.attach(pipe, loras, "mole"))
    expected = fresh(step)
    for _ in range(3):
        torch.testing.assert_close(step(), expected, **CLOSE)
    step.text.mul_(2)
    assert (step() - expected).abs().max() > 1e-3
    torch.testing.assert_close(step(), fresh(step), **CLOSE)


def test_gates_strengths_and_scales_still_count_over_a_kept_text(pipe, loras, awake, step):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    for _ in range(3):
        first = step()
    mixture.strength("fox", -2.0)
    changed = step()
    assert (changed - first).abs().max() > 1e-3
    torch.testing.assert_close(changed, fresh(step), **CLOSE)
    awake(mixture, seed=1)
    torch.testing.assert_close(step(), fresh(step), **CLOSE)
    noise = torch.randn_like(step.sample)
    torch.testing.assert_close(step(sample=noise), step(sample=noise, text=step.text.clone()), **CLOSE)


def test_a_host_weight_changed_in_place_or_swapped_is_seen(pipe, loras, step):
    mole.attach(pipe, loras)
    for _ in range(3):
        step()
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.base_layer
    with torch.no_grad():
        layer.weight.mul_(3)
    torch.testing.assert_close(step(), fresh(step), **CLOSE)
    layer.weight.data = layer.weight.data / 2
    torch.testing.assert_close(step(), fresh(step), **CLOSE)


def test_the_texts_products_are_made_twice_and_not_again(pipe, loras, step, products):
    mole.attach(pipe, loras)
    counts = []
    for _ in range(4):
        products()
        step()
        counts.append(products())
    assert counts[0] == counts[1] > counts[2] == counts[3]


def test_nothing_is_kept_with_gradients_in_inference_mode_or_while_casting(pipe, loras, awake, step, products):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    with torch.no_grad():
        assert at_rest()
    assert not at_rest()
    for _ in range(3):
        products()
        pipe.unet(step.sample, torch.tensor(500), step.text).sample.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
    step()
    step()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(step(), fresh(step), atol=0.05, rtol=0)
    with torch.inference_mode():
        text = step.text.clone()
        kept = Kept()
        assert kept.of([text], lambda: (text,)) is None
        assert kept.of([text], lambda: (text,)) is None


def test_what_was_made_and_changed_since_is_made_again():
    kept, x = Kept(), torch.ones(2)
    assert kept.of([x, None], lambda: (x + 1,)) is None
    (y,) = kept.of([x, None], lambda: (x + 1,))
    assert kept.of([x, None], lambda: (x + 1,))[0] is y
    y.add_(5)
    assert kept.of([x, None], lambda: (x + 1,))[0].tolist() == [2, 2]
    assert kept.of([x.clone(), None], lambda: (x,)) is None


def test_queries_keys_and_values_are_projected_together(pipe, loras, awake, step, monkeypatch):
    awake(mole.attach(pipe, loras, "mole"))
    monkeypatch.setattr(GatedLayer, "pays", staticmethod(lambda *_: False))
    expected = fresh(step)
    alone = []
    monkeypatch.setattr(Together, "low", lambda *_: alone.append(0))
    torch.testing.assert_close(fresh(step), expected, **CLOSE)
    assert len(alone) == 3 * len(blocks(pipe))


def blocks(pipe):
    return [m for n, m in pipe.unet.named_modules() if n.endswith("attn1")]


def test_one_projection_serves_three_layers_and_each_its_own_where_they_lie_apart():
    downs = [torch.nn.Linear(6, r, bias=False) for r in (1, 2, 3)]
    for down in downs:
        down.weight.requires_grad_(False)
    x = torch.randn(2, 5, 6)
    expected = [down(x) for down in downs]
    together = Together(downs)
    for down, y in zip(downs, expected, strict=True):
        torch.testing.assert_close(down(x), y)
    for turn in (0, 1):
        for index, y in enumerate(expected):
            torch.testing.assert_close(together.low(x, index), y)
        assert turn == 0 or together._lows == [None] * 3
    together.low(x, 0)
    x.mul_(2)  # between two layers
    torch.testing.assert_close(together.low(x, 1), 2 * expected[1])
    downs[1].weight.data = downs[1].weight.data.clone()
    assert together.low(x.clone(), 0) is None


@pytest.mark.parametrize(("family", "kind"), [("sum", ConstantGate), ("static", StaticGate)])
def test_gates_that_read_nothing_speak_once(pipe, loras, awake, step, monkeypatch, family, kind):
    mixture = awake(mole.attach(pipe, loras, family))
    calls, forward = [], kind.forward
    monkeypatch.setattr(kind, "forward", lambda *a: calls.append(0) or forward(*a))
    with mixture.trace() as trace:
        first = step()
        once = len(calls)
        assert torch.equal(step(), first) or (step() - first).abs().max() < 1e-5
    assert len(calls) == once > 0
    assert len(trace.weights(trace.places[0])) >= 2  # a trace hears them all the same
    mixture.strength("fox", 0.0)
    torch.testing.assert_close(step(), fresh(step), **CLOSE)
    assert len(calls) > once
    if family == "static":
        before = step()
        awake(mixture, seed=2)
        assert (step() - before).abs().max() > 1e-4


@pytest.mark.parametrize(("family", "kind"), [("flow", FlowGate), ("rank", RankGate)])
def test_gates_of_a_text_speak_once_and_again_when_it_or_they_have_changed(
    pipe, loras, awake, step, monkeypatch, family, kind
):
    mixture = awake(mole.attach(pipe, loras, family))
    asked, forward = [], kind.forward

    def counted(self, hidden, context):
        asked.append(hidden.shape == step.text.shape)
        return forward(self, hidden, context)

    def run(text=None):
        asked.clear()
        result = step(text)
        return result, sum(asked), len(asked) - sum(asked)

    def holds():
        """The text's gates are not asked again, and the step is that of a text seen for the first time."""
        expected, _ = fresh(step), run()
        result, *counts = run()
        assert counts == [0, pictures]
        torch.testing.assert_close(result, expected, **CLOSE)
        return result

    monkeypatch.setattr(kind, "forward", counted)
    _, texts, pictures = run()
    assert texts > 0
    assert pictures > 0
    first = holds()
    step.text.mul_(-2)
    assert run()[1] == texts
    holds()
    awake(mixture, seed=2)
    assert run()[1] == texts
    assert (holds() - first).abs().max() > 1e-3
    for gate in (m for m in pipe.unet.modules() if isinstance(m, RankGate)):
        gate.balance += 1  # what evens out its load moves without its parameters
    assert run()[1] == (texts if family == "rank" else 0)
    holds()
    with torch.inference_mode():  # whether such a text was changed in place is not to be seen
        text = step.text.clone()
        assert run(text)[1] == run(text)[1] == texts


@pytest.mark.parametrize(
    "config",
    [
        *FAMILIES,
        GateConfig("static", granularity="matrix", bins=4),
        GateConfig("mole", inputs="experts", granularity="matrix"),
    ],
)
def test_what_stands_over_a_kept_text_holds_at_any_noise_level(pipe, loras, awake, step, config):
    awake(mole.attach(pipe, loras, config))
    for _ in range(3):
        step(time=900)
    torch.testing.assert_close(step(time=100), step(time=100, text=step.text.clone()), **CLOSE)


def test_gates_asked_at_every_second_step(pipe, loras, awake, draw, monkeypatch):
    mixture = awake(mole.attach(pipe, loras, "mole"))
    asked, forward = [], MoLEGate.forward
    monkeypatch.setattr(MoLEGate, "forward", lambda *a: asked.append(0) or forward(*a))

    def weights(every, steps=5):
        asked.clear()
        with mixture.every(every), mixture.trace() as trace:
            picture = draw(pipe, num_inference_steps=steps)
        return picture, trace

    picture, each = weights(1)
    whole = len(asked)
    again, some = weights(2)
    assert len(asked) < whole
    place = next(p for p in some.places if p.startswith("unet.") and "attentions" in p)
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


def test_gates_asked_less_often_leave_the_texts_products_kept(pipe, loras, awake, step, products):
    mixture, counts = awake(mole.attach(pipe, loras, "mole")), []
    with mixture.every(2):
        for i in range(10):
            products()
            step(sample=step.sample + i)
            counts.append(products())
    assert counts[0] > 0
    assert not any(counts[3:])


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


def test_shares_of_experts_are_measured_beside_the_weight_too(pipe, loras, monkeypatch, step):
    """A layer that folds its experts into its weight would have none to measure."""
    mixture = mole.attach(pipe, loras)
    monkeypatch.setattr(GatedLayer, "pays", staticmethod(lambda *_: False))
    with contributions(mixture, pipe.unet, (32, 32)) as beside:
        step()
    monkeypatch.setattr(GatedLayer, "pays", staticmethod(lambda *_: not torch.is_grad_enabled()))
    with contributions(mixture, pipe.unet, (32, 32)) as folded:
        step()
    for size, share in beside.sums.items():
        torch.testing.assert_close(folded.sums[size], share, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "still"), [("static", True), ("flow", True), ("mole", False)])
def test_either_the_whole_of_a_text_is_kept_or_its_products(pipe, loras, awake, step, family, still):
    awake(mole.attach(pipe, loras, family))
    for i in range(4):
        step(sample=step.sample + i)
    variants = [m.lora_variant[ADAPTER] for m in pipe.unet.modules() if hasattr(m, "lora_variant")]
    found = [[kept._made is not None for kept in v.of_text] for v in variants if v.of_text is not None]
    assert found == [[not still, still]] * len(found) != []


def test_kept_products_leave_with_the_mixture(pipe, loras, step):
    base = step()
    mole.attach(pipe, loras)
    for _ in range(3):
        step()
    mole.detach(pipe)
    assert torch.equal(step(), base)
    assert not any(hasattr(m, "lora_variant") and ADAPTER in m.lora_variant for m in pipe.unet.modules())
    torch.testing.assert_close(tiny_pipeline().unet.state_dict()["conv_in.weight"], pipe.unet.state_dict()["conv_in.weight"])
