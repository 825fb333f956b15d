"""W-Switch and W-Composite against their formulas, written out step by step and token by token."""

from dataclasses import replace

import pytest
import torch
from one_step import PROMPT, latents

import mole_diffusers as mole
from mole_diffusers.lora import read_expert
from rivals import prompt_aware
from rivals.prompt_aware import (
    ablation_weights,
    trigger_weights,
    turn_at,
    w_composed,
    w_switched,
    without_words,
)


@pytest.fixture
def mixture(pipe, loras):
    experts = {name: replace(read_expert(loras[name], name), triggers=(name,)) for name in ("fox", "ink")}
    return mole.attach(pipe, experts, binding=None)


def text_of(pipe, text):
    """Mean over the tokens of a text's states, one token after the other."""
    ids = pipe.tokenizer(text, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    mole.detach(pipe)
    with torch.no_grad():
        states = pipe.text_encoder(ids)[0][0].double()
    total = torch.zeros(states.shape[1], dtype=torch.double)
    for state in states:
        total += state
    return total / len(states)


def cosine(a, b):
    return ((a @ b) / (a.norm() * b.norm())).item()


def test_weights_are_cosines_of_mean_token_states(pipe, mixture, monkeypatch):
    monkeypatch.setattr(prompt_aware, "LEAST", 1e-3)  # random states are much alike
    ablated, by_trigger = ablation_weights(pipe, mixture, PROMPT), trigger_weights(pipe, mixture, PROMPT)
    whole = text_of(pipe, PROMPT)
    lost = [max(1 - cosine(whole, text_of(pipe, rest)), 1e-3) for rest in ("a ink", "a fox")]
    assert ablated == pytest.approx([each / sum(lost) for each in lost], abs=1e-6)
    own = [cosine(whole, text_of(pipe, word)) for word in ("fox", "ink")]
    assert by_trigger == pytest.approx([each / sum(own) for each in own], abs=1e-6)
    assert abs(ablated[0] - ablated[1]) > 1e-3 < min(lost)
    assert abs(by_trigger[0] - by_trigger[1]) > 1e-4


def test_words_that_are_not_there_have_the_least_weight_and_words_that_are_all_the_most(pipe, mixture):
    assert ablation_weights(pipe, mixture, "a fox") == pytest.approx([2 / 2.05, 0.05 / 2.05])


@pytest.mark.parametrize(
    ("prompt", "rest"),
    [
        ("noto drawing of a fox and an ink", "noto drawing of a and an ink"),
        ("a photo, fox, ink", "a photo, ink"),
        ("Foxes, ink", "ink"),
        ("ink, fox", "ink"),
        ("a firefox", "a firefox"),
    ],
)
def test_words_are_taken_out_of_a_prompt(prompt, rest):
    assert without_words(prompt, ["fox"]) == rest


def listed(weights, steps, period, tail):
    """The turns of all steps as the paper's text and its code make them: blocks in a row, then the tail over it."""
    largest, turns, index = max(weights), [], 0
    while len(turns) < steps:
        which = index % len(weights)
        turns += [which] * max(1, round(weights[which] / largest * period))
        index += 1
    turns = turns[:steps]
    if tail:
        turns[-min(tail, steps) :] = [0] * min(tail, steps)
    return turns


@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.7, 0.2, 0.1], [0.05, 0.95], [1.0]])
@pytest.mark.parametrize(("period", "tail"), [(5, 5), (3, 0), (1, 1)])
@pytest.mark.parametrize("steps", [4, 23, 100])
def test_turns_are_as_listed(weights, period, tail, steps):
    found = [turn_at(weights, step, steps, period=period, tail=tail) for step in range(steps)]
    assert found == listed(weights, steps, period, tail)


def test_each_step_is_drawn_with_the_lora_whose_turn_it_is(pipe, mixture, monkeypatch):
    monkeypatch.setattr(prompt_aware, "ablation_weights", lambda *_: [0.3, 0.9])
    with w_switched(pipe, mixture, PROMPT, period=3, tail=2), mixture.trace() as trace:
        latents(pipe, num_inference_steps=9)
    place = "unet.mid_block.attentions.0.transformer_blocks.0"
    turns = [int(weights.argmax()) for name, _, weights in trace.records if name == place]
    assert turns == listed([0.3, 0.9], 9, 3, 2) == [0, 1, 1, 1, 0, 1, 1, 0, 0]
    with w_switched(pipe, mixture, PROMPT):  # the last five steps are those of the first
        found = latents(pipe, num_inference_steps=3)
    mole.attach(pipe, {"fox": mixture.experts["fox"]}, binding=None)
    torch.testing.assert_close(found, latents(pipe, num_inference_steps=3), atol=1e-6, rtol=0)


def test_w_composite_is_the_weighted_mean_of_predictions(pipe, mixture):
    """A step of DDIM is linear in the prediction, so its latent is the weighted mean of the single LoRAs' latents."""
    weights = trigger_weights(pipe, mixture, PROMPT)
    with w_composed(pipe, mixture, PROMPT):
        found = latents(pipe, seeds=(3, 4))
    wanted = 0
    for weight, (name, expert) in zip(weights, mixture.experts.items(), strict=True):
        mole.attach(pipe, {name: expert}, binding=None)
        wanted = wanted + weight * latents(pipe, seeds=(3, 4))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-6)
