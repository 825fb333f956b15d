"""Weights in prompts, as they are written: what is read of brackets, and one sentence for those that cannot be read."""

import re
from itertools import groupby

import pytest

from mole_app.studio.weight_syntax import parse_weights, plain_text


def read(prompt):
    """[(words, weight), ...] of each chunk."""
    return [
        [
            ("".join(c for c, _ in group), round(weight, 3))
            for weight, group in _runs(list(zip(chunk.text, chunk.weights, strict=True)))
        ]
        for chunk in parse_weights(prompt)
    ]


def _runs(pairs):
    return [(weight, list(group)) for weight, group in groupby(pairs, key=lambda pair: pair[1])]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a fox", [[("a fox", 1)]]),
        ("a (fox) hat", [[("a ", 1), ("fox", 1.1), (" hat", 1)]]),
        ("((fox)) [hat]", [[("fox", 1.21), (" ", 1), ("hat", 0.909)]]),
        ("(a (red:1.5) fox:0.5)", [[("a ", 0.5), ("red", 0.75), (" fox", 0.5)]]),
        (r"a fox \(animal\) \\o/", [[(r"a fox (animal) \o/", 1)]]),
        ("a fox BREAK (a hat:1.2)", [[("a fox", 1)], [("a hat", 1.2)]]),
        ("(a BREAK b)", [[("a", 1.1)], [("b", 1.1)]]),
        ("BREAKFAST at 10:30", [[("BREAKFAST at 10:30", 1)]]),
        ("", [[]]),
    ],
)
def test_weights_are_read_as_in_a1111(prompt, wanted):
    got = [[(words, weight) for words, weight in chunk if words] for chunk in read(prompt)]
    merged = [[(w, n) for w, n in chunk] for chunk in got]
    assert [[w for w, _ in c] for c in merged] == [[w for w, _ in c] for c in wanted]
    assert [[n for _, n in c] for c in merged] == [[n for _, n in c] for c in wanted]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a (fox and", r"does not close the ( before 'fox and'; write \( for a plain bracket"),
        ("a [fox", "does not close the [ before 'fox'"),
        ("a fox)", r"has a ) that nothing opens; write \) for a plain bracket"),
        ("(fox]", "has a ] that nothing opens"),
        ("[fox:hat:0.5]", "[fox:hat:0.5] is not read: square brackets lower a weight here"),
        ("[fox|hat]", "[fox|hat] is not read"),
        ("((fox:20):20)", "a weight in a prompt, with those around it, is at most 100"),
        (f"(fox:{'1' * 4000})", "is at most 100"),
        ("(" * 60 + "a" + ")" * 60, "nested at most 50 deep"),
    ],
)
def test_brackets_that_cannot_be_read_are_one_sentence(prompt, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_weights(prompt)


def test_the_words_alone():
    assert plain_text(r"(a fox:1.3) in [ink] BREAK BREAK a \(red\) hat") == "a fox in ink a (red) hat"
