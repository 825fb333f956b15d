"""The measurement of the library, at tiny size: its prompts, its counts by hand, its page."""

import pytest
from libraries import WordEncoder, library

import mole_diffusers as mole
from mole_diffusers import emoji


@pytest.fixture(scope="module")
def retrieve(script):
    return script("retrieve")


LIBRARY = {"fox": ["fox"], "tiger": ["tiger"], "ink": ["ink drawing"], "flat": ["flat drawing"]}


def test_held_out_prompts_ask_for_the_concept_and_are_on_no_card(retrieve):
    for concept in (*emoji.HELD_OUT_SUBJECTS, *emoji.HELD_OUT_STYLES):
        card = set(retrieve.trained_captions(concept))
        for kind, word in zip(retrieve.KINDS, (concept, *retrieve.FORMS[concept]), strict=True):
            prompts = retrieve.held_out(concept, kind)
            assert len(set(prompts)) == 10
            assert all(word in prompt for prompt in prompts)
            assert not card & set(prompts)


def test_counts_by_hand(retrieve):
    found = library(LIBRARY)
    split = {"pair": [("fox", "ink"), ("fox", "koala"), ("tiger", "flat")], "triple": [("fox", "tiger", "ink")]}
    assert retrieve.sets(found, split, 2) == (pytest.approx(2 / 3), pytest.approx(2 / 3), 3)
    assert retrieve.sets(found, split, 3) == (1, 1, 1)
    greedy = library(LIBRARY | {"twin": ["fox"]})  # comes beside whatever fox comes for
    assert retrieve.sets(greedy, split, 2) == (pytest.approx(2 / 3), pytest.approx(1 / 3), 3)
    assert retrieve.first(found, "fox", "as written")[0] > 0
    assert retrieve.first(found, "fox", "a synonym") == (0, 0)
    right, other = retrieve.first(library({"tiger": ["vixen"]}), "fox", "a synonym")
    assert right == 0 < other
    assert retrieve.silent(found) == 1
    assert retrieve.silent(library({"bear": ["bear"]})) == pytest.approx(1 - 1 / len(emoji.BASE_SUBJECTS))


def test_without_triggers_only_texts_speak(retrieve):
    found = library({"fox": ["animal"]}, {"fox": ["sks"]})
    assert retrieve.asked(found, "sks at night") == {"fox"}
    assert retrieve.asked(retrieve.without_triggers(found), "sks at night") == set()


def test_times_are_medians_by_turns(retrieve):
    order = []
    spent = retrieve.milliseconds({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=3)
    assert order == ["a", "b"] * 4
    assert all(value >= 0 for value in spent.values())
    table = retrieve.time_table(WordEncoder(), (2, 5), ["a fox", "ink, owl"], rounds=2)
    assert [line.split(" | ")[0] for line in table.splitlines()[2:]] == ["| 2", "| 5", "| the text encoder alone"]


def test_the_page_is_filled_in(retrieve):
    split = {kind: group[:1] for kind, group in emoji.TEST.items()}
    text = retrieve.page(mole.emoji_world(), ["fox", "ink"], split, sizes=(3, 4), rounds=1)
    assert "| fox * | 1.0 | " in text
    assert "| triggers | 1.00 | " in text
    assert "{" not in text
    assert retrieve.DOCS.joinpath("retrieval.md").read_text().splitlines()[:4] == text.splitlines()[:4]
