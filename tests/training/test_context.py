"""Captions that lack a concept."""

from dataclasses import replace

import pytest

import mole_diffusers as mole
from mole_diffusers.training import TrainingContext, TrainingData
from mole_diffusers.training.context import experts_in, negatives, replace_word, warn_of_missing_triggers


def test_words_are_swapped_with_their_article():
    assert replace_word("ink drawing of an octopus", "octopus", "bear") == "ink drawing of a bear"
    assert replace_word("a fox and a foxglove", "fox", "owl") == "an owl and a foxglove"
    assert replace_word("ink drawing", "ink", "oil") == "oil drawing"
    assert replace_word("An Owl and two foxes", "owl", "cat") == "a cat and two foxes"
    assert replace_word("photo of <s0><s1> dog", "<s0><s1>", "old") == "photo of old dog"


def test_triggers_are_found_however_they_are_written(pipe, loras):
    mixture = mole.attach(pipe, dict.fromkeys(("Tiger", "<s0><s1>"), loras["fox"]))
    for prompt, named in (
        ("a tiger in snow", ["Tiger"]),
        ("two tigers", ["Tiger"]),
        ("a photo of <s0><s1> dog", ["<s0><s1>"]),
        ("tigerish snow", []),
    ):
        assert experts_in(mixture, prompt) == named


def test_a_bound_expert_is_called_by_its_words_alone(pipe, loras):
    """By its name it would be silent, and its gates would learn nothing."""
    mixture = mole.attach(pipe, {"fox": loras["fox"]}, binding={"fox": "vixen"})
    context = TrainingContext(pipe, mixture, TrainingData({"fox": ["a vixen", "a fox"]}))
    with pytest.warns(UserWarning, match="has no trigger") as caught:
        warn_of_missing_triggers(context)
    assert [str(warning.message) for warning in caught] == ["the prompt 'a fox' has no trigger of expert 'fox': ['vixen']"]
    mixture.bind({"fox": "everywhere"})
    assert [experts_in(mixture, prompt) for prompt in ("a vixen", "a fox")] == [[], ["fox"]]


def test_negatives_lack_a_concept_each(pipe, loras):
    mixture = mole.attach(pipe, {n: loras[n] for n in ("fox", "ink")}, "mole")
    data = TrainingData({"fox": ["a fox"]}, ["a fox in ink"], {"fox": ["owl", "cat"], "ink": ["oil"]})
    context = TrainingContext(pipe, mixture, data)
    assert negatives(context, "a fox in ink") == ["an owl in ink", "a cat in ink", "a fox in oil", "a fox"]
    with pytest.raises(ValueError, match="no caption to be told from"):
        negatives(replace(context, data=TrainingData(composed=["a fox"])), "a fox")
