"""What prompts say: places and tiles of real prompts, as people read them, and how long reading takes."""

import gc
import json
import math
import operator
import random
import time
from functools import partial
from pathlib import Path

import hosts
import pytest
from reading import Reader, sentence_of
from transformers import CLIPTokenizer

from mole_world import default_folder

DATA = Path(__file__).parent / "data"
FILES = (
    "readings",
    "more_readings",
    # Written as users write: tags, sentences, triggers, weights, names. What should come out was noted before it was read.
    "readings_of_strangers",
    # In 30 more styles. What should come out was noted first; `half` says if it was held back while rules were made.
    "readings_of_many_styles",
)
READINGS = [json.loads(line) for name in FILES for line in (DATA / f"{name}.jsonl").read_text().splitlines()]
PAIRS = [json.loads(line) for line in (DATA / "pairs.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def explained():
    return Reader().explained


@pytest.mark.parametrize("case", READINGS, ids=[case["prompt"][:60] for case in READINGS])
def test_a_prompt_is_read_as_people_read_it(explained, case):
    """In a picture with room for tiles, and for places in one without."""
    given = {"prompt": case["prompt"], "loras": case["loras"], "required": case.get("required", False)}
    found, as_one = explained(**given), explained(**given, tiled=False)
    places = {name: role.place for name, role in as_one.experts.items()}
    assert {name for name, place in places.items() if place == "own"} == set(case["places"])
    assert {n: p.removeprefix("with ") for n, p in places.items() if p.startswith("with ")} == case.get("with", {})
    assert [name for name, place in places.items() if place == "inactive"] == case.get("inactive", [])
    assert found.tiles == case.get("apart", case["tiles"])  # `apart`: each of two that touch
    apart = [name for name, role in found.experts.items() if role.place == "own tile"]
    assert bool(apart) == ("apart" in case)
    assert as_one.tiles is None
    if "contacts" in case:
        assert list(map(str, found.contacts)) == case["contacts"]
    assert all(role.why for role in found.experts.values())
    assert (found.tiles is None) == bool(found.why_no_tiles)


@pytest.mark.parametrize("case", PAIRS, ids=[f"{' and '.join(case['words'])} in {case['prompt'][:40]}" for case in PAIRS])
def test_two_words_of_a_real_prompt_have_places_only_if_it_lists_them(explained, case):
    """Checked by hand."""
    for words in (case["words"], case["words"][::-1]):
        found = explained(case["prompt"], {word: word for word in words}, tiled=False)
        assert [role.place for role in found.experts.values()] == ["own" if case["listed"] else "everywhere"] * 2


def test_a_lora_alone_acts_everywhere_in_every_real_prompt(explained):
    for prompt in hosts.real_prompts():
        found = explained(prompt, {"it": hosts.first_noun(prompt)})
        assert (found.experts["it"].place, found.tiles) == ("everywhere", None), prompt


def test_a_folder_is_silent_but_for_what_the_prompt_names(explained):
    loras = {"fox": "fox", "owl": "owl", "ink": "ink", "none": ()}
    found = explained("a fox in a forest", loras, required=True)
    assert {name: role.place for name, role in found.experts.items()} == {
        "fox": "everywhere", "owl": "inactive", "ink": "inactive", "none": "everywhere"
    }  # fmt: skip
    chosen = explained("a fox in a forest", loras)
    assert {role.place for role in chosen.experts.values()} == {"everywhere"}
    assert chosen.experts["owl"].why == "the prompt has none of its words: owl"
    assert chosen.experts["fox"].words == ("fox",)


def test_who_is_off_is_nobody(explained):
    loras = {"fox": "fox", "owl": "owl", "bear": "bear"}
    found = explained("a fox, an owl and a bear", loras, acting={"fox", "bear"})
    assert [role.place for role in found.experts.values()] == ["own", "inactive", "own"]
    assert found.tiles == ["a fox", "an owl", "a bear"]  # the owl is one that the model draws by itself
    found = explained("a fox, an owl and a bear", loras, acting={"fox"})
    assert [role.place for role in found.experts.values()] == ["everywhere", "inactive", "inactive"]
    assert found.tiles is None


def test_a_region_counts_wherever_words_stand(explained):
    found = explained(
        "a fox riding an owl", {"fox": "fox", "owl": "owl", "ink": "ink"}, regions={"fox": "left", "ink": "top"}
    )
    assert [role.place for role in found.experts.values()] == ["own", "everywhere", "own"]
    assert found.experts["fox"].why == "you gave it the region 'left'"
    found = explained("a house", {"fox": "fox", "ink": "ink"}, regions={"fox": "left", "ink": "everywhere"})
    assert [(role.place, role.why) for role in found.experts.values()] == [
        ("own", "you gave it the region 'left'; the prompt has none of its words: fox"),
        ("everywhere", "you said so; the prompt has none of its words: ink"),
    ]


def test_a_tag_of_other_tools_says_nothing(explained):
    """It may begin a prompt, name the same LoRA again, and stand anywhere; no subject is drawn with it."""
    loras = {"fox": "fox", "owl": "owl"}
    said = explained("a fox and an owl, night", loras)
    for prompt in (
        "<lora:fox:0.8> a fox and an owl, night",
        "a fox and an owl, night <lora:fox:0.8> <lora:owl_v2:1:0.5>",
        "a fox <lyco:owl:1> and an owl, night",
    ):
        found = explained(prompt, loras)
        assert (found.experts, [tile.split() for tile in found.tiles]) == (said.experts, [t.split() for t in said.tiles])
    assert explained("a house < lora : fox : 0 . 8 >", loras).experts["fox"].words == ()  # as a tokenizer splits it


def test_an_explanation_is_a_table(explained):
    table = str(explained("ink drawing of a fox and an owl", {"fox": "fox", "owl": "owl", "ink": "ink"}))
    assert [line.split("  ")[0].strip() for line in table.splitlines()] == [
        "LoRA", "fox", "owl", "ink", "tile 1: ink drawing of a fox", "tile 2: ink drawing of an owl"
    ]  # fmt: skip
    assert str(explained("a fox", {"fox": "fox"})).endswith("no tiles: the prompt lists it beside no other LoRA's subject")


WORDS = ["fox", "owl", "a"]
LONG = {
    "a word": lambda n: "fox " * (n // 4),
    "two words": lambda n: "fox and owl and " * (n // 16),
    "nouns": lambda n: ", ".join(f"a {chr(97 + i % 26)}{chr(97 + i // 26 % 26)}n and an owl" for i in range(n // 17)),
    "spaces": lambda n: f"a fox{' ' * n}and an owl",
    "spaces before": lambda n: f"{' ' * n}a fox and an owl",
    "commas": lambda n: f"fox and owl{',' * n}",
    "brackets": lambda n: f"{'(' * (n // 2)}fox and owl{')' * (n // 2)}",
    "digits": lambda n: f"fox and owl {'1' * n}",
    "sentences": lambda n: "fox and owl. " * (n // 13),
    "sides": lambda n: "a fox on the left, an owl on the right, " * (n // 40),
    "quotes": lambda n: f"{chr(39) * n}fox and owl",
    "colons": lambda n: f"{':1' * (n // 2)}fox and owl",
    "hyphens": lambda n: f"{'fox-' * (n // 4)} and owl",
}


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_pretrained(default_folder() / "base" / "tokenizer")


def seconds(act):
    begun = time.process_time()
    act()
    return time.process_time() - begun


def least_seconds(acts, is_enough):
    """The least of many times of each act, taken in turns, so that a busy machine slows all alike; until it is enough."""
    least = [math.inf] * len(acts)
    gc.disable()
    try:
        for turn in range(60):
            least = [min(time_of, seconds(act)) for time_of, act in zip(least, acts, strict=True)]
            if turn > 3 and is_enough(*least):
                break
    finally:
        gc.enable()
    return least


@pytest.mark.parametrize("name", LONG)
def test_reading_takes_time_in_proportion_to_the_prompt(name):
    def is_in_proportion(quarter, whole):  # twice the text takes 2.2 times as long at most; with the square, 4 times
        return whole < max(2.2**2 * quarter, 0.005)

    size = 4000  # characters: all of a text of this length is read
    acts = [partial(sentence_of, LONG[name](n), *WORDS) for n in (size // 4, size)]
    assert is_in_proportion(*least_seconds(acts, is_in_proportion))


@pytest.mark.parametrize("name", LONG)
def test_reading_takes_less_time_than_the_tokenizer(clip, name):
    text = LONG[name](100_000)
    reading, tokenizing = least_seconds([partial(sentence_of, text, *WORDS), partial(clip, text)], operator.lt)
    assert reading < tokenizing


def test_any_text_can_be_read():
    """And a tile's prompt is made of pieces of the prompt."""
    rng = random.Random(0)
    pieces = [
        "fox", "owl", "fox", "owl", "and", "a", "an", "the", "and", ",", ".", "(", ")", ":1.2", "in", "with", "of", "photo",
        "next to", "left of", "on the left", "on the right", "is", "holding", "'s", "-", "_", "2", "girl", "riding", "who",
        "there", "background", "\n", "BREAK", "狐", "ñ", "&", "hat", "man", " ", "both", "in front of",
    ]  # fmt: skip
    listed = 0
    for _ in range(4000):
        text = " ".join(rng.choices(pieces, k=rng.randrange(3, 9)))
        sentence = sentence_of(text, "fox", ["owl", "hat"], "in front", "狐")
        for part in sentence.parts:
            assert part.text == "".join(text[i] for i in part.source)
            assert part.source == sorted(set(part.source))
        for subject in sentence.subjects:
            for begin, end in subject.spans:
                assert 0 <= begin < end <= len(text)
        owners = [k for subject in sentence.subjects for k in subject.experts]
        assert not sentence.subjects or len(owners) > 1
        listed += bool(sentence.subjects)
    assert listed > 20
