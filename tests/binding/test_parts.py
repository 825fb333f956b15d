"""Prompts of single things, out of a prompt that names several."""

import pytest

from mole_diffusers.binding.parts import prompts_apart

TWO = ["fox", "owl", "blue hat", "ink"]  # all of one LoRA


def test_words_that_stand_among_those_of_another_thing_are_not_listed():
    """Each of the two would be in the other's prompt, too."""
    for prompt in ("fox, bear and owl", "a fox, a bear, the owl asleep"):
        assert not prompts_apart(prompt, [["fox", "owl"], ["bear"]]).are_listed
    assert not prompts_apart("a fox, ink style, and an owl", [["fox"], ["owl"], ["ink"]]).are_listed  # ink would be in none


@pytest.mark.parametrize(
    ("prompt", "apart", "listed"),
    [
        ("ink drawing of a fox and an owl in snow", ["ink drawing of a fox in snow", "ink drawing of an owl in snow"], True),
        ("an owl, a red fox, night", ["an owl, night", "a red fox, night"], True),
        ("photo of a fox to the left of a blue OWL", ["photo of a fox", "photo of a blue OWL"], True),
        ("a fox and a lemon", ["a fox", "a lemon"], True),
        ("fox owl in ink", ["fox in ink", "owl in ink"], False),
        ("a fox riding an owl", ["a fox", "an owl"], False),
        ("a fox in a red scarf and the large owl", ["a fox in a red scarf", "the large owl"], True),
        ("a fox is above an owl", ["a fox", "an owl"], True),
        ("a fox jumping over an owl", ["a fox jumping", "an owl"], False),
        ("a fox, riding an owl", ["a fox", "riding an owl"], False),
        ("a fox looking over at an owl", ["a fox looking", "at an owl"], False),
        ("a fox. it rides an owl", ["a fox", "it rides an owl"], False),
        ("a fox by a hat", ["a fox by a hat"], True),
        ("a hill", [], True),
    ],
)
def test_each_thing_has_a_prompt_of_its_own(prompt, apart, listed):
    """With what is said of all; a hat is said of the whole picture here."""
    reading, found, are_listed = prompts_apart(prompt, [["owl"], ["Fox"], ["ink"], ["hat"]], everywhere=[3])
    assert [part.text for part in found.values()] == apart
    for part in found.values():
        assert [c for c, i in zip(part.text, part.source, strict=True) if i is not None and prompt[i] != c] == []
        assert {c for c, i in zip(part.text, part.source, strict=True) if i is None} <= {" "}
        assert sorted(known := [i for i in part.source if i is not None]) == known
    assert are_listed == listed
    assert [reading.things[i].name for i in found] == [
        name for name in sorted(("fox", "owl", "lemon"), key=prompt.lower().find) if name in prompt.lower()
    ]


@pytest.mark.parametrize(
    ("prompt", "listed"),
    [
        ("ink drawing of a fox, a sliced lemon and a bell on a hill", True),
        ("a bell, a fox, and two lemons", True),
        ("a lemon left of a fox", True),
        ("a fox, a forest, a lake", False),
        ("photo of a fox, a sharp focus, a shallow depth of field", False),
        ("photo of a fox in a red dress, a beautiful smile, a detailed face, the golden hour", False),
        ("a portrait of a fox, a masterpiece, the best quality", False),
        ("a photo of a fox in a forest and the moon above the trees", False),
        ("a fox and the moon", False),
        ("a fox with a red hat and a blue scarf", False),
        ("a fox and a cup of tea", False),
        ("a fox and a lemon, a sharp focus", False),
        ("a fox, an owl", True),
        ("a fox with a red hat and the owl", True),
    ],
)
def test_nouns_of_nobody_are_listed_in_a_plain_list_alone(prompt, listed):
    _, found, are_listed = prompts_apart(prompt, [["owl"], ["fox"]])
    assert len(found) > 1
    assert are_listed == listed


@pytest.mark.parametrize(
    ("prompt", "apart"),
    [
        ("ink drawing of a fox and an owl in snow", ["ink drawing of a fox in snow", "ink drawing of an owl in snow"]),
        ("a fox, an owl and a bear", ["a fox", "an owl", "a bear"]),
        ("a bear, a fox and an owl", ["a bear", "a fox", "an owl"]),
        ("an owl left of a fox", ["an owl", "a fox"]),
        ("a fox and an owl in a blue hat", ["a fox in a blue hat", "an owl in a blue hat"]),
        ("fox next to owl", ["fox", "owl"]),
        ("a fox in a blue hat and an owl", ["a fox in a blue hat and an owl"]),
        ("fox and owl in snow", ["fox in snow", "owl in snow"]),
        ("fox, owl and blue hat", ["fox, owl and blue hat"]),
        ("a fox with owl and blue hat", ["a fox with owl and blue hat"]),
        ("a fox and an owl of ink", ["a fox and an owl of ink"]),
        ("ink, fox, owl, blue hat", []),
        ("a fox with an owl", ["a fox with an owl"]),
        ("a fox, an owl", ["a fox, an owl"]),
        ("a fox and a fox", ["a fox and a fox"]),
        ("a fox and a bear", ["a fox", "a bear"]),
        ("a fox, the fox asleep, and a bear", ["a fox, the fox asleep", "a bear"]),
        ("the fox and the owl", ["the fox", "the owl"]),
        ("a fox on the left, an owl on the right", ["a fox", "an owl"]),
        ("photo with fox and owl", ["photo with fox", "photo with owl"]),
        ("a fox with an owl and a blue hat", ["a fox with an owl and a blue hat"]),
        ("a girl with owl and blue hat", []),
        ("a girl wearing a small blue hat and an owl", ["a girl wearing a small blue hat and an owl"]),
        ("ink, fox, an owl and a blue hat", ["ink, fox, an owl and a blue hat"]),
    ],
)
def test_a_lora_of_several_things_names_them_in_a_list(prompt, apart):
    """Elsewhere its words are those of one thing, as are a character and its clothes; "bear" is another LoRA's."""
    _, found, _ = prompts_apart(prompt, [TWO, ["bear"]])
    assert [part.text for part in found.values()] == apart


@pytest.mark.parametrize("prompt", ["an owl and a on the right and a fox", "an owl and a on the left"])
def test_an_article_before_a_side_names_nothing(prompt):
    _, found, _ = prompts_apart(prompt, [["owl"], ["fox"]])
    assert len(found) == 1 + ("fox" in prompt)
