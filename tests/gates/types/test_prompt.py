"""MiLoRA's own properties."""

import math

import hosts
import pytest
import torch
import torch.nn.functional as F
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.functional import among_largest, load_balance
from mole_diffusers.gates import Context
from mole_diffusers.gates.types.prompt import GELU, PromptGate, rational
from mole_diffusers.patching.gating.prompt_tokens import word_mask

BOTH, NOW = torch.tensor([True, True]), torch.zeros(1)
LOGITS = torch.tensor([[math.log(5.0), math.log(3.0), math.log(2.0)]])


def fixed(monkeypatch, logits):
    """Routers that give `logits` whatever they read."""
    monkeypatch.setattr(PromptGate, "route", lambda gate, hidden, tokens: logits.expand(len(hidden), -1))


def test_the_activation_begins_near_gelu():
    x = torch.linspace(-3, 3, 601)
    assert (rational(x, *map(torch.tensor, GELU)) - F.gelu(x)).abs().max() < 0.01


def test_an_unlearned_pooler_is_the_mean_of_the_words():
    gate = PromptGate(4, [BOTH.tolist()], axis="concept", top=0, total="N")
    hidden, tokens = torch.randn(2, 5, 4), torch.tensor([[True] * 3 + [False] * 2, [True] * 5])
    means = torch.stack([hidden[0, :3].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(gate.pooled(hidden, tokens), means)
    with torch.no_grad():
        gate.pooler.copy_(torch.tensor([100.0, 0, 0, 0]))
    best = hidden[0, :3, 0].argmax()
    torch.testing.assert_close(gate.pooled(hidden, tokens)[0], hidden[0, best], atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    ("top", "total", "expected"),
    [
        (0, "none", [0.5, 0.3, 0.2]),
        (3, "none", [0.5, 0.3, 0.2]),
        (2, "none", [0.5, 0.3, 0]),
        (2, "1", [0.625, 0.375, 0]),
        (2, "N", [1.875, 1.125, 0]),
    ],
)
def test_top_k_and_renormalisation_by_hand(monkeypatch, top, total, expected):
    fixed(monkeypatch, LOGITS)
    gate = PromptGate(4, [[True] * 3], axis="concept", top=top, total=total)
    weights = gate(torch.zeros(1, 1, 4), Context(torch.tensor([True] * 3), NOW))
    torch.testing.assert_close(weights, torch.tensor([expected]))


def test_axes_by_hand(monkeypatch):
    """Two layers, two concepts; the second layer lacks the first concept."""
    layer_adapters, hidden = [[True, True], [False, True]], torch.zeros(1, 1, 4)
    fixed(monkeypatch, torch.tensor([[math.log(3.0), 0.0]]))
    weights = PromptGate(4, layer_adapters, axis="module", top=0, total="1")(hidden, Context(BOTH, NOW))
    torch.testing.assert_close(weights, torch.tensor([[[0.75, 0.75], [0.0, 0.25]]]))
    fixed(monkeypatch, torch.tensor([[math.log(2.0), math.log(3.0), math.log(9.0), math.log(5.0)]]))
    both = PromptGate(4, layer_adapters, axis="both", top=0, total="N")
    torch.testing.assert_close(both(hidden, Context(BOTH, NOW)), torch.tensor([[[0.6, 0.9], [0.0, 1.5]]]))
    one = both(hidden, Context(torch.tensor([True, False]), NOW))
    torch.testing.assert_close(one, torch.tensor([[[1.0, 0.0], [0.0, 0.0]]]))


ALL = torch.tensor([True] * 3)


def routed(probabilities, top, mask=ALL):
    return probabilities, probabilities * among_largest(probabilities, top), mask


def test_load_balance_over_processes_and_calls_is_that_of_all_rows():
    rows = torch.softmax(torch.randn(4, 3), -1)
    own, others = rows.chunk(2)
    whole = load_balance([routed(rows, 1)])
    torch.testing.assert_close(load_balance([routed(own, 1), routed(others, 1)]), whole)
    sums = []
    load_balance([routed(others, 1)], lambda mean: sums.append(mean) or mean)
    torch.testing.assert_close(load_balance([routed(own, 1)], lambda mean: (mean + sums[0]) / 2), whole)
    chosen = among_largest(rows, 1).float().mean(0)  # the paper's formula
    torch.testing.assert_close(whole, 3 * (chosen * rows.mean(0)).sum())


def test_load_balance_is_1_when_even_and_their_number_when_one_takes_all():
    even, one = torch.full((6, 3), 1 / 3), torch.tensor([[1.0, 0.0, 0.0]]).expand(6, 3)
    by_turns = torch.eye(3).repeat(2, 1)
    assert load_balance([(even, even * by_turns, ALL)]).item() == pytest.approx(1)
    assert load_balance([routed(even, 0)]).item() == pytest.approx(1)
    assert load_balance([routed(one, 1)]).item() == pytest.approx(3)
    assert load_balance([routed(one, 0)]).item() == pytest.approx(3)
    assert among_largest(LOGITS.softmax(-1), 1).count_nonzero() == 1


def test_load_balance_is_among_the_experts_that_are_there():
    two = torch.tensor([[0.9, 0.1]])
    three, mask = F.pad(two, (0, 1)), torch.tensor([True, True, False])
    wanted = load_balance([(two, two, torch.tensor([True, True]))])
    assert wanted.item() == pytest.approx(2 * (0.9**2 + 0.1**2))
    alone = torch.tensor([[0.0, 0.0, 1.0]])
    for calls in ([routed(three, 0, mask)], [routed(three, 0, mask), routed(alone, 0, torch.tensor([False, False, True]))]):
        torch.testing.assert_close(load_balance(calls), wanted)
    assert load_balance([routed(alone, 0, torch.tensor([False, False, True]))]).item() == 1


@pytest.mark.parametrize("top", [0, 1, 2])
def test_the_balance_loss_lowers_what_is_chosen_too_often(top):
    logits = torch.tensor([[3.0, 1.0, 0.0], [2.0, 0.0, 1.0]], requires_grad=True)
    load_balance([routed(logits.softmax(-1), top)]).backward()
    assert (logits.grad[:, 0] > 0).all()
    assert (logits.grad[:, 1:] < 0).all()


def test_words_are_what_comes_before_the_padding():
    ids = torch.tensor([[7, 1, 2, 9, 9], [7, 1, 2, 3, 9], [7, 1, 9, 0, 0]])  # 9 ends; padded with it, or with 0
    expected = [[True, True, True, False, False], [True] * 4 + [False], [True, True, False, False, False]]
    assert word_mask(ids, 9).tolist() == expected


def texts_read(mixture):
    """A list that grows by (gate, what it reads, which tokens count) whenever a gate of a mixture is asked."""
    seen = []
    for gate in (gate for bank in mixture.banks.values() for gate in bank):
        gate.register_forward_pre_hook(lambda gate, given: seen.append((gate, given[0], given[1].tokens)))
    return seen


def test_padding_does_not_reach_the_gate(pipe, loras, draw, awake):
    seen = texts_read(awake(mole.attach(pipe, loras, "prompt")))
    draw(pipe, prompt="ab", num_images_per_prompt=2)
    for gate, hidden, tokens in seen:
        logits, padded = (gate.route(each, tokens) for each in (hidden, hidden + 5 * ~tokens[..., None]))
        torch.testing.assert_close(logits, padded, atol=1e-4, rtol=1e-4)
        assert tokens.sum(1).tolist() in ([3], [1], [1, 1, 3, 3])  # the start of the text, and two words of one letter
    assert {len(tokens) for _, _, tokens in seen} == {1, 4}


@pytest.mark.parametrize("pad", ["<|endoftext|>", *thorough("!")])  # as SDXL's first tokenizer, and its second, have it
def test_words_of_either_prompt_reach_the_gate(pad, tmp_path):
    """SDXL's two encoders lie side by side: a token counts where one of the texts has a word there, and never the end."""
    pipe, options = hosts.HOSTS["sdxl"]()
    pipe.tokenizer_2.pad_token = pad
    pipe.text_encoder_2.config.eos_token_id = 2  # as the published configuration has it, though the end is another token
    experts = {n: tiny_lora(pipe, tmp_path / n, seed=i) for i, n in enumerate(("fox", "ink"))}
    seen = texts_read(mole.attach(pipe, experts, "prompt"))
    short, long = "a fox", "a fox in ink"  # a token per letter, after the one that begins the text
    for first, second in ((short, long), (long, short), (long, long), (short, short)):
        seen.clear()
        hosts.draw(pipe, options | {"prompt_2": second, "guidance_scale": 1.0}, first, steps=1)
        length = 1 + max(len(text.replace(" ", "")) for text in (first, second))
        *_, (_, _, tokens) = seen  # the UNet's, which come last
        assert tokens[0].nonzero().flatten().tolist() == list(range(length))


@pytest.mark.parametrize("steps", [1, 10, *thorough(50)])
def test_routers_speak_once_per_prompt(pipe, loras, awake, monkeypatch, steps):
    mixture = awake(mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "prompt"))
    calls, route = [], PromptGate.route

    def count(gate, hidden, tokens):
        calls.append(gate)
        return route(gate, hidden, tokens)

    monkeypatch.setattr(PromptGate, "route", count)
    pipe("a fox", num_inference_steps=steps, output_type="latent")
    unet = list(mixture.banks["unet"].gates.values())
    assert [calls.count(gate) for gate in unet] == [1] * len(unet)
    of_text = mixture.banks["text_encoder"].gates  # which read prompt and negative prompt
    assert len(calls) == len(unet) + 2 * len(of_text)


def test_weights_changed_between_two_calls_are_heard(pipe, loras, awake, draw):
    mixture = awake(mole.attach(pipe, loras, "prompt"))
    texts = {
        f"{n}prompt_embeds": e for n, e in zip(("", "negative_"), pipe.encode_prompt("ab", "cpu", 1, True), strict=True)
    }
    first = draw(pipe, prompt=None, **texts)
    assert torch.equal(draw(pipe, prompt=None, **texts), first)
    awake(mixture, seed=1)
    assert not torch.allclose(draw(pipe, prompt=None, **texts), first, atol=1e-3)
    texts["prompt_embeds"].mul_(1.5)
    awake(mixture, seed=0)
    assert not torch.allclose(draw(pipe, prompt=None, **texts), first, atol=1e-3)


def test_folded_away_it_draws_the_same_and_leaves_the_same_bits(pipe, loras, draw, awake):
    mixture = awake(mole.attach(pipe, loras, "prompt"), size=1.0)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    unfolded = draw(pipe, prompt="ab", guidance_scale=1)
    with mixture.collapsed("ab", guidance_scale=1, num_inference_steps=1):
        torch.testing.assert_close(draw(pipe, prompt="ab", guidance_scale=1), unfolded, atol=1e-4, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    with pytest.raises(ValueError, match="depends on the prompt; give a prompt"), mixture.collapsed():
        pass


def test_folded_away_the_prompt_decides_for_guidance_too(pipe, loras, draw, awake):
    """The other route: live gates, whose rows without the prompt are overwritten by those with it."""
    mixture, first = awake(mole.attach(pipe, loras, "prompt"), size=1.0), {}

    def as_prompted(place, gates, mask):
        if place.startswith("text"):  # it reads the prompt, then the negative prompt
            return first.setdefault((place, *mask.tolist()), gates)
        return gates[-1:].expand_as(gates)

    own = draw(pipe, prompt="ab")
    with mixture.adjusted(as_prompted):
        prompted = draw(pipe, prompt="ab")
    assert not torch.allclose(own, prompted, atol=1e-3)
    with mixture.collapsed("ab"):
        torch.testing.assert_close(draw(pipe, prompt="ab"), prompted, atol=1e-4, rtol=0)
    with mixture.collapsed("ab", guidance_scale=7.5):  # which averages over the empty prompt, too
        assert not torch.allclose(draw(pipe, prompt="ab"), prompted, atol=1e-3)


@pytest.mark.parametrize("axis", [*thorough("module"), "both"])
def test_modules_as_experts(pipe, loras, draw, awake, tmp_path, axis):
    mole.attach(pipe, loras, "sum")
    plain = draw(pipe)
    mixture = mole.attach(pipe, loras, mole.GateConfig("prompt", axis=axis))
    torch.testing.assert_close(draw(pipe), plain, atol=1e-5, rtol=0)
    awake(mixture).save_pretrained(tmp_path)
    with mixture.trace() as trace:
        gated = draw(pipe)
    assert not torch.allclose(gated, plain, atol=1e-3)
    block = "unet.mid_block.attentions.0.transformer_blocks.0."
    layers = torch.stack([trace.weights(p)[0] for p in trace.locations if p.startswith(block)])  # [M, N]
    if axis == "both":  # 8 layers of three experts and 2 of one
        assert layers.sum().item() == pytest.approx(26, rel=1e-4)
    else:
        assert layers.amax(1).sum().item() == pytest.approx(10, rel=1e-4)
    mole.attach(pipe, loras, tmp_path)
    assert torch.equal(draw(pipe), gated)


@pytest.mark.parametrize("axis", [*thorough("module", "both"), "concept"])
@pytest.mark.parametrize("top", [0, *thorough(1)])
def test_training_evens_out_what_all_terms_route(pipe, loras, axis, top):
    """LoRAs of different layers, and two terms: beside the balance, nothing pulls at the gates."""
    from mole_diffusers.training import GateTraining, TrainingData, train_gates

    mixture = mole.attach(pipe, loras, mole.GateConfig("prompt", axis=axis, top=top))
    with torch.no_grad():
        for bank in mixture.banks.values():
            for gate in bank.gates.values():
                gate.weight[0] += 0.5
    nothing = {"weight": 1e-9, "seeds": 1, "steps": 1}
    config = GateTraining({"single": nothing, "base": nothing, "balance": 1.0}, steps=4, batch=2)
    log = train_gates(pipe, mixture, TrainingData({"fox": ["a fox"]}, plain=["c d e"]), config=config)
    assert log[0]["balance"] > log[-1]["balance"] >= 1 - 1e-5
    assert all(gate._routed is None for bank in mixture.banks.values() for gate in bank.gates.values())
