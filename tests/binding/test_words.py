"""Words of a prompt: whose they are, and which of them have a place."""

import random
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mole_diffusers.binding.parts import prompts_apart
from mole_diffusers.binding.sentence import parse, pattern
from mole_diffusers.binding.words import joined, keys, overlaid, read
from mole_diffusers.emoji import default_folder


@pytest.fixture(scope="module")
def clip():
    return CLIPTokenizer.from_pretrained(default_folder() / "base" / "tokenizer")


@pytest.fixture(scope="module")
def sentencepiece():
    """Words that begin with a mark and keep their case, as T5's."""
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁Fox", "▁fox", "es", "▁and", "▁an", "▁owl", "▁", "(", ")", "fox"]
    model = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="<unk>", continuing_subword_prefix=""))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def own(reading, tokens):
    return [[t for t, mine in zip(tokens, row, strict=True) if mine] for row in reading.own]


def found(tokenizer, prompt, *phrases):
    """Own tokens by expert, things by (expert, text), relations."""
    ids = tokenizer(prompt).input_ids
    reading = read(ids, tokenizer, phrases)
    things = [(*thing.experts, thing.name) for thing in reading.things]
    return own(reading, tokenizer.convert_ids_to_tokens(ids)), things, list(reading.relations)


def test_words_are_found_whole_in_any_case_and_in_the_plural(clip):
    words, things, _ = found(clip, "noto drawing of two Foxes and an octopus", ["fox"], ["octopus"])
    assert words == [["fo", "x", "es</w>"], ["octopus</w>"]]
    assert things == [(0, "foxes"), (1, "octopus")]
    assert found(clip, "a firefox and a boxfox", ["fox"])[0] == [[]]
    assert found(clip, "two cherries", ["cherry"])[0] != [[]]


@pytest.fixture(scope="module")
def byte_level():
    """CLIP's own alphabet: every byte of UTF-8 is a letter, and letters of two bytes are tokens."""
    letters = list(bytes_to_unicode().values())
    merges = [("Ã", "±"), ("Ã", "©</w>"), ("Å", "Ĥ"), ("Ð", "»")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges)


@pytest.mark.parametrize("noun", ["piñata", "Café", "łoś", "狐"])
def test_a_noun_is_the_same_in_bytes(byte_level, noun):
    prompt = f"a fox and a {noun}"
    ids = byte_level(prompt).input_ids
    things = read(ids, byte_level, [["fox"]]).things
    assert byte_level.decode([i for i, mine in zip(ids, things[1].tokens, strict=True) if mine]).strip() == noun.lower()
    if noun in ("piñata", "Café"):  # no token is a part of a letter
        assert keys(things) == keys(prompts_apart(prompt, [["fox"]]).reading.things)


@pytest.mark.parametrize(
    ("prompt", "trigger", "found_as"),
    [
        ("two wolves", "wolf", "wolves"),
        ("two knives", "knife", "knives"),
        ("an owl's eye", "owl", "owl"),
    ],
)
def test_plurals(clip, prompt, trigger, found_as):
    assert [name for *_, name in found(clip, prompt, [trigger])[1]] == [found_as]


def test_words_that_were_added_to_the_tokenizer():
    words = CLIPTokenizer.from_pretrained(default_folder() / "base" / "tokenizer")
    words.add_tokens(["<s0>", "<s1>", "sks"])
    owned, things, _ = found(words, "a <s0><s1> fox and a sks owl", ["<s0><s1>"], ["sks"])
    assert owned == [["<s0>", "<s1>"], ["sks"]]
    assert len(things) == 2


def test_several_phrases_and_words_of_several_tokens(clip):
    words, things, _ = found(
        clip, "noto drawing of french fries and a cheese wedge", ["fries potato", "french fries"], ["cheese wedge"]
    )
    assert words == [["french</w>", "fries</w>"], ["cheese</w>", "wedge</w>"]]
    assert things == [(0, "french fries"), (1, "cheese wedge")]


def test_the_longer_phrase_counts_and_a_shared_word_is_of_both(clip):
    words, _, _ = found(clip, "a cheese wedge and a cheese", ["cheese"], ["cheese wedge"])
    assert words == [["cheese</w>"], ["cheese</w>", "wedge</w>"]]
    owned, things, _ = found(clip, "a fox and an owl", ["fox"], ["fox"])
    assert owned == [["fox</w>"], ["fox</w>"]]
    assert things == [(0, 1, "fox"), ("owl",)]  # one thing of both


def test_of_phrases_inside_one_another_the_longest_counts_however_many_there_are():
    rng = random.Random(0)
    for _ in range(200):
        text, *phrases = ("".join(rng.choices(["a", "b", " ", "a b", "s "], k=k)) for k in (12, 1, 2, 2, 3, 3))
        spans = [{m.span() for m in pattern(p).finditer(text)} if p else set() for p in phrases]
        longer = [(c, d) for each in spans for c, d in each]
        wanted = [{(a, b) for a, b in s if not any(c <= a <= b <= d and d - c > b - a for c, d in longer)} for s in spans]
        assert [set(each) for each in parse(text, [[p] for p in phrases]).words] == wanted
    begun = time.process_time()
    parse("a b " * 1200, [["a " + "b a " * n for n in range(32)], ["b " + "a b " * n for n in range(32)]])
    assert time.process_time() - begun < 2  # 10 s if each is compared to all others


def test_marks_before_words_and_case_are_those_of_the_tokenizer(sentencepiece):
    ids = sentencepiece.convert_tokens_to_ids(["▁a", "▁Fox", "▁and", "▁an", "▁owl", "</s>", "<pad>", "<pad>"])
    reading = read(ids, sentencepiece, [["fox"], ["pad"]])
    assert reading.own[0] == (False, True) + (False,) * 6
    assert not any(reading.own[1])  # marks of the tokenizer are no words
    assert [(t.experts, t.name) for t in reading.things] == [((0,), "fox"), ((), "owl")]


@pytest.mark.parametrize(
    "prompt",
    [
        "ink drawing of a fox",
        "a fox in ink",
        "a fox, ink style",
        "a photo of a fox in the style of ink",
        "ink portrait of a fox",
        "ink's painting of a fox",
    ],
)
def test_a_style_has_words_and_no_place(clip, prompt):
    words, things, _ = found(clip, prompt, ["fox"], ["ink"])
    assert words[1] == ["ink</w>"]
    assert things == [(0, "fox")]


@pytest.mark.parametrize(
    ("prompt", "things", "tags"),
    [
        ("a fox, ink", ["fox"], ["ink"]),
        ("photo of a fox and an owl, (ink:1.2), night", ["fox", "owl"], ["ink"]),
        ("ink, a fox and an owl", ["fox", "owl"], ["ink"]),
        ("1girl, fox, owl, ink", [], ["fox", "owl", "ink"]),
        ("fox, owl and ink", ["fox", "owl", "ink"], []),
        ("fox, standing beside an owl, ink", ["fox", "owl"], ["ink"]),
        ("a fox, an owl", ["fox", "owl"], []),
        ("fox on the left, owl on the right", ["fox", "owl"], []),
        ("fox owl", ["fox", "owl"], []),
    ],
)
def test_words_alone_between_commas_are_tags_that_say_of_no_place(clip, prompt, things, tags):
    """A style at the end of a prompt stands so; a list with "and" is one of things."""
    phrases = [["fox"], ["owl"], ["ink"]]
    reading = read(clip(prompt).input_ids, clip, phrases)
    assert [thing.name for thing in reading.things if not thing.is_tag] == things
    assert [thing.name for thing in reading.things if thing.is_tag] == tags
    as_given = read(clip(prompt).input_ids, clip, phrases, whole=[0, 1, 2])  # with regions, these are their places
    assert not any(thing.is_tag for thing in as_given.things)
    found, apart, _ = prompts_apart(prompt, phrases)
    assert [found.things[i].name for i in apart] == things
    assert all(tag in part.text for part in apart.values() for tag in tags)


@pytest.mark.parametrize(
    "prompt",
    [
        "ink's painting of a fox and an owl",
        "Ink’s painting of a fox and an owl",
        "a fox in ink's style and an owl",
        "a fox's hat and an owl",
        "a fox and an owl\nink",
        "ink\n\na fox\nan owl",
        "1girl, FOX & (owl:1.1)",
        "a well-known old fox...and a lemon-yellow cat's toy + an owl",
    ],
)
@pytest.mark.parametrize("phrases", [[["fox"], ["owl"], ["ink"]], [["fox", "owl"], ["ink"]], [["ink's"], ["Fox"], ["owl"]]])
def test_a_prompt_has_the_same_things_as_its_tokens(clip, prompt, phrases):
    """So what is drawn in tiles keeps its place when the text encoder's tokens say what is bound."""
    text, tokens = prompts_apart(prompt, phrases).reading, read(clip(prompt).input_ids, clip, phrases)
    assert keys(text.things) == keys(tokens.things)
    assert [thing.is_tag for thing in text.things] == [thing.is_tag for thing in tokens.things]
    assert text.relations == tokens.relations


@pytest.mark.parametrize(
    ("prompt", "relations", "apart"),
    [
        ("a fox on the right and an owl on the left, night", [(1, 0, "x")], ["a fox, night", "an owl, night"]),
        ("a fox on the right side of the picture and an owl", [(1, 0, "x")], ["a fox", "an owl"]),
        ("on the right, a fox, and on the left an owl", [(1, 0, "x")], ["a fox", "an owl"]),
        ("on the left is a fox, an owl", [(0, 1, "x")], ["a fox", "an owl"]),
        ("A FOX AT THE BOTTOM, AN OWL", [(1, 0, "y")], ["A FOX", "AN OWL"]),
        ("a fox and an owl and a bear on the left", [(2, 0, "x"), (2, 1, "x")], ["a fox", "an owl", "a bear"]),
        ("a fox with a scar on the left cheek and an owl", [], ["a fox with a scar on the left cheek", "an owl"]),
        ("a fox on the left side of a road and an owl", [], ["a fox on the left side of a road", "an owl"]),
    ],
)
def test_a_side_of_the_picture_is_a_place(clip, prompt, relations, apart):
    """And in the prompt of that thing alone it is not said."""
    phrases = [["fox"], ["owl"], ["bear"]]
    assert list(read(clip(prompt).input_ids, clip, phrases).relations) == relations
    reading, found, listed = prompts_apart(prompt, phrases)
    assert list(reading.relations) == relations
    assert [part.text for part in found.values()] == apart
    assert listed


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("miku wearing a red cape", ["miku"]),
        ("miku holding a cape and rin", ["miku", "rin"]),
        ("rin, wearing cape, and miku", ["miku", "rin"]),
        ("miku with blue eyes and cape", ["miku"]),
        ("photo of miku with her big blue eyes next to rin", ["miku", "rin"]),
        ("photo with miku and rin", ["miku", "rin"]),
        ("miku with a cape", ["miku", "cape"]),
        ("miku riding a cape", ["miku", "cape"]),
        ("miku with a friend beside rin", ["miku", "rin"]),
    ],
)
def test_what_somebody_has_has_no_place_of_its_own(clip, prompt, things):
    """Beside its owner it would be a second thing; all of these are LoRAs of their own."""
    reading = read(clip(prompt).input_ids, clip, [["miku"], ["rin"], ["cape"], ["blue eyes"]])
    assert [thing.name for thing in reading.things] == things
    words = ("miku", "rin", "cape", "blue eyes")
    assert [any(own) for own in reading.own] == [f" {word}" in f" {prompt}" for word in words]


NO_STYLES = ["a fox on a horse", "a fox by a horse", "a horse painting a wall and a fox", "a horse art collector, a fox"]


@pytest.mark.parametrize("prompt", NO_STYLES)
def test_what_only_looks_like_a_style_has_a_place(clip, prompt):
    assert {thing[0] for thing in found(clip, prompt, ["fox"], ["horse"])[1]} >= {0, 1}


def test_nouns_beside_an_experts_have_a_place_and_others_have_none(clip):
    prompt = "noto drawing of a lemon and a tiger in a hat, highly detailed, a panda on a blue background"
    assert found(clip, prompt, ["tiger"])[1] == [(0, "tiger"), ("lemon",), ("panda",)]
    assert found(clip, "noto drawing of a lemon and a panda", ["tiger"])[1] == []


@pytest.mark.parametrize(
    ("between", "relation"),
    [
        ("left of", (0, 1, "x")),
        ("to the right of", (1, 0, "x")),
        ("above", (0, 1, "y")),
        ("under", (1, 0, "y")),
        ("and", None),
    ],
)
def test_place_words_say_which_comes_first(clip, between, relation):
    for octopus in ("an octopus", "octopus", "two octopuses", "a big blue octopus in a hat"):
        relations = found(clip, f"a fox {between} {octopus}", ["fox"], ["octopus"])[2]
        assert relations == ([] if relation is None else [relation])


def test_a_text_in_two_runs_is_one_text(clip, sentencepiece):
    first = read(clip("a fox and a lemon").input_ids, clip, [["fox"]])
    second = read(sentencepiece.convert_tokens_to_ids(["▁a", "▁fox"]), sentencepiece, [["fox"]])
    both = joined([first, second])
    assert both.own[0] == first.own[0] + second.own[0]
    assert [(t.experts, t.name) for t in both.things] == [((0,), "fox"), ((), "lemon")]
    assert both.things[0].tokens == both.own[0]
    assert both.things[1].tokens == first.things[1].tokens + (False, False)


def test_texts_side_by_side_are_one_text(clip):
    """Of two encoders: a token is of every word that one of the texts has there, and place words count in both."""
    first = read(clip("a photo of a hat").input_ids, clip, [["fox"], ["hat"]])
    second = read(clip("a fox left of a hat").input_ids, clip, [["fox"], ["hat"]])
    both = overlaid([first, second])
    length = max(len(first.own[0]), len(second.own[0]))
    for k in range(2):
        tokens = {t for reading in (first, second) for t, own in enumerate(reading.own[k]) if own}
        assert {t for t, own in enumerate(both.own[k]) if own} == tokens
        assert len(both.own[k]) == length
    assert second.relations == ((0, 1, "x"),)
    assert [thing.experts for thing in both.things] == [(1,), (0,)]
    assert both.relations == ((1, 0, "x"),)
    assert overlaid([second, second]) == second


@pytest.mark.parametrize(
    ("prompt", "things"),
    [
        ("a fox and a lemon and a lemon", ["fox", "lemon", "lemon"]),
        ("a fox and a house left of a house", ["fox", "house", "house"]),
    ],
)
def test_a_noun_that_a_text_names_twice_is_two_things(clip, prompt, things):
    """And two encoders that read it, side by side or one after the other, find no more and no fewer."""
    once = read(clip(prompt).input_ids, clip, [["fox"]])
    assert [thing.name for thing in once.things] == things
    assert overlaid([once, once]) == once
    both = joined([once, once])
    assert [thing.tokens for thing in both.things] == [thing.tokens * 2 for thing in once.things]
    assert both.relations == once.relations


TWO = ["fox", "owl", "blue hat", "ink"]  # all of one LoRA


def test_things_of_one_lora_are_known_by_their_words_in_every_text(clip):
    """Of several encoders, or chunks of a long prompt: the owl of the second is that of the first."""
    first, second, clothes = (
        read(clip(text).input_ids, clip, [TWO])
        for text in ("a fox and an owl", "an owl left of two foxes and a blue hat", "the owl, blue hat")
    )
    assert [thing.name for thing in first.things] == ["fox", "owl"]
    both, (owl, foxes, hat) = overlaid([first, second]), second.things
    assert [thing.name for thing in both.things] == ["fox", "owl", "blue hat"]
    padded = [(*thing.tokens, *[False] * (len(owl.tokens) - len(thing.tokens))) for thing in first.things]
    assert both.things[0].tokens == tuple(map(max, padded[0], foxes.tokens))
    assert both.things[1].tokens == tuple(map(max, padded[1], owl.tokens))
    assert both.things[2].tokens == hat.tokens
    assert both.relations == ((1, 0, "x"),)
    long = joined([first, clothes])
    assert [thing.tokens for thing in long.things] == [
        (*first.things[0].tokens, *[False] * len(clothes.own[0])),
        (*first.things[1].tokens, *clothes.things[0].tokens),
    ]
    assert overlaid([first, first]) == first


def test_a_lora_with_a_place_of_its_own_is_one_thing(clip):
    prompt = "a bear, a fox and an owl"
    reading, found, _ = prompts_apart(prompt, [TWO, ["bear"]], whole=[0])
    assert [part.text for part in found.values()] == ["a bear", "a fox and an owl"]
    ids, phrases = clip(prompt).input_ids, [TWO, ["bear"]]
    assert [thing.experts for thing in read(ids, clip, phrases, whole=[0]).things] == [(0,), (1,)]
    assert [thing.experts for thing in read(ids, clip, phrases).things] == [(0,), (0,), (1,)]
