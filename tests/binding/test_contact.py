"""Which subjects touch in a prompt, and who is in front."""

import pytest
from reading import Reader, sentence_of

from mole_world.captions import BETWEEN
from mole_world.scenes import CONTACTS

NAMES = ("fox", "owl", "bear", "ink")


def contacts(prompt, names=NAMES):
    """(first, relation, second) of each pair."""
    return [
        (contact.subjects[0].name, contact.relation, contact.subjects[1].name)
        for contact in sentence_of(prompt, *names).contacts
    ]


@pytest.mark.parametrize("relation", CONTACTS)
def test_the_worlds_captions_say_their_relation_and_who_is_in_front(relation):
    for between in BETWEEN[relation]:
        sentence = sentence_of(f"ink drawing of a fox {between} an owl on a beach", *NAMES)
        (contact,) = sentence.contacts
        assert ([subject.experts for subject in contact.subjects], contact.relation) == ([(0,), (1,)], relation)
        assert contact.front == CONTACTS[relation]
        assert [part.text for part in contact.parts] == [
            "ink drawing of a fox on a beach",
            "ink drawing of an owl on a beach",
        ]
        assert not sentence.subjects  # no strips


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ("a fox sitting on an owl", ("fox", "on", "owl")),
        ("a fox is standing on the big old owl's back", ("fox", "on", "owl")),
        ("a fox perched atop an owl", ("fox", "on", "owl")),
        ("fox riding on owl, ink", ("fox", "riding", "owl")),
        ("an owl ridden by a fox", ("fox", "riding", "owl")),
        ("a fox in a red hat carrying an owl on its back", ("fox", "holding", "owl")),
        ("a fox held by an owl", ("owl", "holding", "fox")),
        ("a fox in the arms of an owl", ("owl", "holding", "fox")),
        ("a fox hiding behind an owl", ("fox", "behind", "owl")),
        ("a fox stands in front of an owl wearing a hat", ("fox", "in front of", "owl")),
        ("a fox gently kissing an owl", ("fox", "hugging", "owl")),
        ("a fox holding hands with an owl", ("fox", "hugging", "owl")),
        ("a fox and an owl kissing in the rain", ("fox", "hugging", "owl")),
        ("a fox and an owl, hand in hand", ("fox", "hugging", "owl")),
        ("a fox next to an owl", None),
        ("a fox and an owl", None),
        ("a fox and an owl riding a bike", None),
        ("a fox and an owl hugging a tree", None),
        ("a fox watching a man who rides an owl", None),
        ("a fox, a man holding an owl", None),
        ("a fox on a beach and an owl", None),
        ("a fox chasing an owl", None),
        ("a fox and an owl dancing in the rain", None),  # apart, or one in the other's arms
        ("a fox in ink", None),
        ("a fox on ink paper, an owl", None),
        ("a fox. On an owl", None),
    ],
)
def test_other_words_say_the_same_and_what_does_not_touch_says_nothing(prompt, wanted):
    assert contacts(prompt) == ([wanted] if wanted else [])


def test_each_pair_of_a_chain_touches():
    assert contacts("a fox riding a bear holding an owl") == [("fox", "riding", "bear"), ("bear", "holding", "owl")]


def test_only_those_who_act_touch_and_never_one_lora_with_itself():
    text = "a fox riding an owl"
    assert not sentence_of(text, "fox", "owl", acting={0}).contacts
    assert not sentence_of(text, "fox", "owl", regions={1: "everywhere"}).contacts
    assert not sentence_of(text, ["fox", "owl"]).contacts


def test_the_prompt_of_each_alone_is_without_what_they_do():
    def apart(prompt):
        (contact,) = sentence_of(prompt, *NAMES).contacts
        return [part.text for part in contact.parts]

    assert apart("a photo of a fox in a hat hugging an (owl:1.2), night") == [
        "a photo of a fox in a hat, night", "a photo of an (owl:1.2), night"
    ]  # fmt: skip
    assert apart("a fox and an owl hugging in a cafe") == ["a fox in a cafe", "an owl in a cafe"]
    assert apart("an owl held by a fox, ink") == ["a fox, ink", "an owl, ink"]


def test_an_explanation_names_the_contact():
    found = Reader().explained("a fox holding an owl", {"fox": "fox", "owl": "owl"}, tiled=False)
    assert [role.place for role in found.experts.values()] == ["everywhere", "everywhere"]
    said = "'fox' holding 'owl', with 'owl' in front"
    assert {role.why for role in found.experts.values()} == {f"the prompt has {said}"}
    assert str(found).splitlines()[-1] == f"contact: {said}"


@pytest.mark.parametrize(
    "prompt",
    [
        "2girls, a fox hugging an owl, park",  # each would be drawn as two girls
        "1girl, 1boy, fox kissing owl",
        "a couple, a fox kissing an owl, wedding photo",
        "photos of a fox hugging an owl",
        "a fox hugging an owl, both smiling",
        "split screen, a fox hugging an owl",
        "a fox hugging an owl on a sofa",
        "a photo of a painting of a fox hugging an owl",
        "a fox and an owl hugging, twins",
        "foxes riding owls",
        "a fox carried by three owls",
        "a tiny fox riding a giant owl",
    ],
)
def test_two_that_touch_are_one_picture_if_the_prompt_says_more_of_both(prompt):
    (contact,) = sentence_of(prompt, *NAMES).contacts
    assert contact.why_not_per_subject


def test_two_that_touch_may_be_drawn_apart_whatever_is_said_of_one():
    for prompt in (
        "ink drawing of a fox in a painted hat hugging an owl in a garden at night",
        "a giant fox riding an owl",
        "a photo of a married fox hugging an owl",
    ):
        (contact,) = sentence_of(prompt, *NAMES).contacts
        assert not contact.why_not_per_subject


def test_panels_have_no_two_that_touch():
    assert not contacts("comic panels, a fox hugging an owl")
    assert not contacts("character sheet of a fox hugging an owl")
