"""Words of a prompt: whose they are, and which of them have a place."""

import random
import time

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mole_diffusers.binding import finding
from mole_diffusers.binding.chat import of_user
from mole_diffusers.binding.sentence import Who, parse
from mole_diffusers.binding.words import joined, keys, overlaid, read
from mole_world import default_folder


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
    prompt, phrases = f"a fox, a {noun} and an owl", [["fox"], ["owl"]]
    ids = byte_level(prompt).input_ids
    things = read(ids, byte_level, phrases).things
    assert byte_level.decode([i for i, mine in zip(ids, things[1].tokens, strict=True) if mine]).strip() == noun.lower()
    assert keys(things) == keys(parse(prompt, phrases).things)


def test_words_are_found_where_no_spaces_are(byte_level):
    """In scripts without them, and between letters, digits and other marks."""
    ids = byte_level("一只狐狸和猫头鹰").input_ids
    reading = read(ids, byte_level, [["狐狸"], ["猫头鹰"], ["fox"]])
    assert reading.mentioned == (True, True, False)
    decoded = [byte_level.decode([i for i, mine in zip(ids, own, strict=True) if mine]).strip() for own in reading.own[:2]]
    assert decoded == ["狐狸", "猫头鹰"]
    assert parse("1girl,sks_fox(owl)", [["girl"], ["fox"], ["owl"]]).mentioned == (True, True, True)


@pytest.mark.parametrize(
    ("prompt", "trigger", "found_as"),
    [
        ("two wolves", "wolf", "wolves"),
        ("two knives", "knife", "knives"),
        ("an owl's eye", "owl", "owl"),
    ],
)
def test_plurals(clip, prompt, trigger, found_as):
    ids = clip(prompt).input_ids
    (own,) = read(ids, clip, [[trigger]]).own
    assert clip.decode([i for i, mine in zip(ids, own, strict=True) if mine]).strip() == found_as


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
    owned, things, _ = found(clip, "a fox and an owl", ["fox"], ["fox"], ["owl"])
    assert owned == [["fox</w>"], ["fox</w>"], ["owl</w>"]]
    assert things == [(0, 1, "fox"), (2, "owl")]  # one thing of both
    assert found(clip, "miku hatsune summer", ["miku"], ["miku hatsune summer"])[0][0] == []


def test_of_phrases_inside_one_another_the_longest_counts_however_many_there_are():
    rng = random.Random(0)
    for _ in range(200):
        text, *phrases = ("".join(rng.choices(["a", "b", " ", "a b", "s "], k=k)) for k in (12, 1, 2, 2, 3, 3))
        spans = [set(finding.spans(text, p)) for p in phrases]
        longer = [(c, d) for each in spans for c, d in each]
        wanted = [{(a, b) for a, b in s if not any(c <= a <= b <= d and d - c > b - a for c, d in longer)} for s in spans]
        for words, one in zip(parse(text, [[p] for p in phrases]).words, wanted, strict=True):
            assert one <= set(words)  # `spans` leaves out what overlaps with one before it
    begun = time.process_time()
    parse("a b " * 1200, [["a " + "b a " * n for n in range(32)], ["b " + "a b " * n for n in range(32)]])
    assert time.process_time() - begun < 2  # 10 s if each is compared to all others


def test_marks_before_words_and_case_are_those_of_the_tokenizer(sentencepiece):
    ids = sentencepiece.convert_tokens_to_ids(["▁a", "▁Fox", "▁and", "▁an", "▁owl", "</s>", "<pad>", "<pad>"])
    reading = read(ids, sentencepiece, [["fox"], ["pad"], ["owl"]])
    assert reading.own[0] == (False, True) + (False,) * 6
    assert not any(reading.own[1])  # marks of the tokenizer are no words
    assert [(t.experts, t.name) for t in reading.things] == [((0,), "fox"), ((2,), "owl")]


@pytest.mark.parametrize(
    "prompt",
    [
        "ink drawing of a fox and an owl",
        "a fox and an owl in ink style",
        "a fox and an owl, ink",
        "a photo of a fox and an owl in the style of ink",
        "(ink:1.2), a fox and an owl",
    ],
)
def test_a_style_has_words_and_no_place(clip, prompt):
    words, things, _ = found(clip, prompt, ["fox"], ["owl"], ["ink"])
    assert words[2] == ["ink</w>"]
    assert things == [(0, "fox"), (1, "owl")]


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
    text, tokens = parse(prompt, phrases), read(clip(prompt).input_ids, clip, phrases)
    assert keys(text.things) == keys(tokens.things)
    assert text.relations == tokens.relations


@pytest.mark.parametrize(
    ("prompt", "relations", "apart"),
    [
        ("a fox on the right and an owl on the left, night", [(1, 0, "x")], ["a fox, night", "an owl, night"]),
        ("a fox on the right side of the picture and an owl", [(1, 0, "x")], ["a fox", "an owl"]),
        ("on the right, a fox, and on the left an owl", [(1, 0, "x")], ["a fox", "an owl"]),
        ("a fox on the left, an owl on the right", [(0, 1, "x")], ["a fox", "an owl"]),
        ("A FOX AT THE BOTTOM AND AN OWL", [(1, 0, "y")], ["A FOX", "AN OWL"]),
        ("a fox and an owl and a bear on the left", [(2, 0, "x"), (2, 1, "x")], ["a fox", "an owl", "a bear"]),
        ("a fox with a scar on the left cheek next to an owl", [], ["a fox with a scar on the left cheek", "an owl"]),
    ],
)
def test_a_side_of_the_picture_is_a_place(clip, prompt, relations, apart):
    """And in the prompt of that thing alone it is not said."""
    phrases = [["fox"], ["owl"], ["bear"]]
    assert list(read(clip(prompt).input_ids, clip, phrases).relations) == relations
    sentence = parse(prompt, phrases)
    assert list(sentence.relations) == relations
    assert [part.text for part in sentence.parts] == apart
    assert not sentence.why_no_tiles


def test_nouns_in_a_list_have_a_place_and_others_have_none(clip):
    prompt = "noto drawing of a lemon, a tiger in a hat and a fox, highly detailed, a panda on a blue background"
    assert found(clip, prompt, ["tiger"], ["fox"])[1] == [("lemon",), (0, "tiger"), (1, "fox")]
    assert found(clip, "noto drawing of a lemon and a tiger", ["tiger"])[1] == []


@pytest.mark.parametrize(
    ("between", "relation"),
    [
        ("left of", (0, 1, "x")),
        ("to the right of", (1, 0, "x")),
        ("above", (0, 1, "y")),
        ("below", (1, 0, "y")),
        ("and", None),
    ],
)
def test_place_words_say_which_comes_first(clip, between, relation):
    for octopus in ("an octopus", "octopus", "two octopuses", "a big blue octopus in a hat"):
        relations = found(clip, f"a fox {between} {octopus}", ["fox"], ["octopus"])[2]
        assert relations == ([] if relation is None else [relation])


def test_a_text_in_two_runs_is_one_text(clip, sentencepiece):
    phrases = [["fox"], ["owl"]]
    first = read(clip("a fox, a lemon and an owl").input_ids, clip, phrases)
    second = read(sentencepiece.convert_tokens_to_ids(["▁a", "▁fox"]), sentencepiece, phrases)
    both = joined([first, second])
    assert both.own[0] == first.own[0] + second.own[0]
    assert [(t.experts, t.name) for t in both.things] == [((0,), "fox"), ((), "lemon"), ((1,), "owl")]
    assert both.things[0].tokens == both.own[0]
    assert both.things[1].tokens == first.things[1].tokens + (False, False)


def test_texts_side_by_side_are_one_text(clip):
    """Of two encoders: a token is of every word that one of the texts has there, and place words count in both."""
    first = read(clip("a photo of a cat").input_ids, clip, [["fox"], ["cat"]])
    second = read(clip("a fox left of a cat").input_ids, clip, [["fox"], ["cat"]])
    both = overlaid([first, second])
    length = max(len(first.own[0]), len(second.own[0]))
    for k in range(2):
        tokens = {t for reading in (first, second) for t, own in enumerate(reading.own[k]) if own}
        assert {t for t, own in enumerate(both.own[k]) if own} == tokens
        assert {t for thing in both.things if k in thing.experts for t, own in enumerate(thing.tokens) if own} == tokens
        assert len(both.own[k]) == length
    assert both.relations == second.relations == ((0, 1, "x"),)
    assert overlaid([second, second]) == second


def test_texts_with_other_lists_have_none(clip):
    """Nothing then says which of them counts."""
    phrases = [["fox"], ["owl"], ["bear"], ["cat"]]
    first, second, more = (
        read(clip(text).input_ids, clip, phrases)
        for text in ("a fox and an owl", "a bear and a cat", "a fox, an owl and a bear")
    )
    assert not joined([first, second]).things
    assert [thing.experts for thing in joined([first, more]).things] == [(0,), (1,), (2,)]


TWO = ["fox", "owl", "blue hat", "ink"]  # all of one LoRA


def test_things_of_one_lora_are_known_by_their_words_in_every_text(clip):
    """Of several encoders, or chunks of a long prompt: the owl of the second is that of the first."""
    first, second, tags = (
        read(clip(text).input_ids, clip, [TWO])
        for text in ("a fox and an owl", "an owl left of two foxes", "the owl, blue hat")
    )
    assert [thing.name for thing in first.things] == ["fox", "owl"]
    both, (owl, foxes) = overlaid([first, second]), second.things
    assert [thing.name for thing in both.things] == ["fox", "owl"]
    padded = [(*thing.tokens, *[False] * (len(owl.tokens) - len(thing.tokens))) for thing in first.things]
    assert both.things[0].tokens == tuple(map(max, padded[0], foxes.tokens))
    assert both.things[1].tokens == tuple(map(max, padded[1], owl.tokens))
    assert both.relations == ((1, 0, "x"),)
    long = joined([first, tags])
    assert [thing.tokens for thing in long.things] == [
        (*first.things[0].tokens, *[False] * len(tags.own[0])),
        (*first.things[1].tokens, *tags.said[0, 1]),
    ]
    assert overlaid([first, first]) == first


def test_what_somebody_wears_belongs_to_it_in_every_text(clip):
    phrases = [["miku"], ["cape"], ["rin"]]
    first, second = (read(clip(text).input_ids, clip, phrases) for text in ("miku wearing a red cape and rin", "the cape"))
    both = joined([first, second])
    assert [(thing.experts, thing.worn) for thing in both.things] == [((0,), (1,)), ((2,), ())]
    assert both.things[0].tokens == tuple(map(max, both.own[0], both.own[1]))


def test_a_lora_with_a_place_of_its_own_is_one_thing(clip):
    prompt, phrases = "a bear, a fox and an owl", [TWO, ["bear"]]
    ids = clip(prompt).input_ids
    assert [thing.experts for thing in read(ids, clip, phrases, Who(given=[0])).things] == [(1,), (0,)]
    assert [thing.experts for thing in read(ids, clip, phrases).things] == [(1,), (0,), (0,)]


def test_instructions_before_a_prompt_are_not_the_users():
    """As Lumina 2 has them."""
    tokens = ["<bos>", "A", "▁picture", "<", "Prompt", "▁Start", ">", "▁a", "▁fox"]
    assert list(of_user(tokens)) == [False] * 7 + [True] * 2


@pytest.mark.parametrize(
    "text", ["hatsune miku (cos)", "hatsune_miku_(cos)", r"hatsune miku \(cos\)", r"hatsune_miku_\(cos\)"]
)
def test_underscores_and_backslashes_are_written_in_tags_as_in_triggers(text):
    for phrase in ("hatsune miku (cos)", "hatsune_miku_(cos)", r"hatsune_miku_\(cos\)"):
        assert finding.spans(f"a {text}, night", phrase) == [(2, 2 + len(text))]
    assert finding.spans(text, "hatsune cos") == []
