"""Prompts of the protocols: as many as the papers have, from the LoRAs' own words, and of the LoRAs that they name."""

import json
from dataclasses import replace
from itertools import combinations

import pytest

from mole_diffusers.lora import read_expert
from mole_world.evaluation.prompts import CONTACT, PROTOCOLS, Concept, cases, concept_of


def concept(name, kind="object", *words):
    return Concept(name, words or (name,), kind, name)


SUBJECTS = [concept(name) for name in ("fox", "hat", "owl", "cup", "bus", "elk")]


def test_composlora_has_its_480_sets():
    """Two subsets of three characters, and two each of clothes, styles, backgrounds and objects: 48 + 144 + 192 + 96."""
    counts = {"character": 3, "clothing": 2, "style": 2, "background": 2, "object": 2}
    subset = [concept(f"{kind}_{i}", kind, f"{kind} {i}", "more") for kind, count in counts.items() for i in range(count)]
    found = cases(subset, ["composlora"])
    sizes = [sum(case.kind == f"composlora, {n} LoRAs" for case in found) for n in (2, 3, 4, 5)]
    assert [2 * size for size in sizes] == [48, 144, 192, 96]
    assert len({frozenset(case.concepts) for case in found}) == 240
    kinds = {c.name: c.kind for c in subset}
    for case in found:
        assert kinds[case.concepts[0]] == "character"
        assert len({kinds[name] for name in case.concepts}) == len(case.concepts)
        assert case.prompt == ", ".join(f"{name.replace('_', ' ')}, more" for name in case.concepts)


def test_every_pair_and_triple_comes_once_and_names_its_subjects():
    for name, size in (("pairs", 2), ("triples", 3), ("scenes", 2), ("contact", 2)):
        found = cases(SUBJECTS, [name])
        assert {frozenset(case.concepts) for case in found} == set(
            map(frozenset, combinations([c.name for c in SUBJECTS], size))
        )
        assert len(found) == len({frozenset(case.concepts) for case in found})
        assert {case.kind for case in found} == {name}
    contact = cases(SUBJECTS, ["contact"])
    assert len({case.prompt.split(" a", 2)[1] for case in contact}) > 1
    for i, case in enumerate(contact):
        first, other = (f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in case.concepts)
        assert case.prompt == CONTACT[i % len(CONTACT)].format(first=first, rest=other)


def test_large_groups_have_each_subject_equally_often():
    found = cases(SUBJECTS, ["interaction"])
    assert [case.kind for case in found[15:]] == ["interaction, 4 subjects"] * 6 + ["interaction, 6 subjects"]
    four = [name for case in found[15:21] for name in case.concepts]
    assert {four.count(c.name) for c in SUBJECTS} == {4}
    assert all(len(set(case.concepts)) == len(case.concepts) for case in found)
    assert set(found[-1].concepts) == {c.name for c in SUBJECTS}
    assert found[-1].prompt.count(",") == 4
    assert " and " in found[-1].prompt


def test_a_limit_is_of_each_kind_and_takes_the_first_of_all():
    whole, some = cases(SUBJECTS, ["pairs", "neutral"]), cases(SUBJECTS, ["pairs", "neutral"], limit=4)
    assert len(some) == 4 + 4 + 4 + 1
    assert [case for case in whole if case in some] == some
    assert len({case.concepts[0] for case in some[:4]}) > 1


def test_protocols_are_of_the_lora_kinds_that_are_there():
    ink = concept("ink", "style", "in inks style")
    assert {case.kind for case in cases([SUBJECTS[0], ink])} == {"styles"}
    assert [case.prompt for case in cases([SUBJECTS[0], ink])] == ["a fox, in inks style"]
    mary = concept("mary", "character")
    assert {case.kind.split(",")[0] for case in cases([mary, *SUBJECTS, ink])} == set(PROTOCOLS)
    assert cases([mary, SUBJECTS[0]], ["pairs"])[0].prompt == "a photo of mary and a fox"
    for given, names, message in (
        (SUBJECTS, ["composlora"], "these LoRAs do not allow the protocols ['composlora']: 6 of kind object; see --kind"),
        (SUBJECTS[:1], [], "no protocol is for these LoRAs: 1 of kind object; see --kind"),
        (SUBJECTS, ["pair"], "unknown protocols ['pair']; known: ['composlora', 'pairs',"),
    ):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            cases(given, names)
        assert message in str(error.value)


def test_a_lora_is_named_by_its_triggers_and_its_kind_by_its_place(loras):
    fox = read_expert(loras["fox"], "fox")
    assert concept_of(fox) == Concept("fox", ("fox",), "object", "fox")
    for source, kind in (
        ("styles/x.safetensors", "style"), ("Character/x.safetensors", "character"), ("style_2.safetensors", "style"),
        ("stylish.safetensors", "object"), ("background_1.safetensors", "background"),
    ):  # fmt: skip
        assert concept_of(replace(fox, source=source)).kind == kind
    told = replace(fox, triggers=("(sks dog:1.2)", "an old dog"), source="red_fox.safetensors")
    assert concept_of(told, kind="clothing", subject="dog") == Concept("fox", ("sks dog", "an old dog"), "clothing", "dog")
    assert concept_of(told).phrase == "a sks dog"
    assert concept_of(replace(told, triggers=())).phrase == "a red fox"
    assert concept_of(replace(told, triggers=("an old dog",))).phrase == "an old dog"
    assert json.dumps([case.prompt for case in cases([concept_of(told), SUBJECTS[1]], ["pairs"])]).count("a sks dog") == 1
