"""Words of a prompt: whose they are, and which of them have a place."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPTokenizer, PreTrainedTokenizerFast

from mole_diffusers.binding.words import joined, read
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
    things = [(thing.expert, thing.name) for thing in reading.things]
    return own(reading, tokenizer.convert_ids_to_tokens(ids)), things, list(reading.relations)


def test_words_are_found_whole_in_any_case_and_in_the_plural(clip):
    words, things, _ = found(clip, "noto drawing of two Foxes and an octopus", ["fox"], ["octopus"])
    assert words == [["fo", "x", "es</w>"], ["octopus</w>"]]
    assert things == [(0, "foxes"), (1, "octopus")]
    assert found(clip, "a firefox and a boxfox", ["fox"])[0] == [[]]
    assert found(clip, "two cherries", ["cherry"])[0] != [[]]


def test_several_phrases_and_words_of_several_tokens(clip):
    words, things, _ = found(
        clip, "noto drawing of french fries and a cheese wedge", ["fries potato", "french fries"], ["cheese wedge"]
    )
    assert words == [["french</w>", "fries</w>"], ["cheese</w>", "wedge</w>"]]
    assert things == [(0, "french fries"), (1, "cheese wedge")]


def test_the_longer_phrase_counts_and_a_shared_word_is_of_both(clip):
    words, _, _ = found(clip, "a cheese wedge and a cheese", ["cheese"], ["cheese wedge"])
    assert words == [["cheese</w>"], ["cheese</w>", "wedge</w>"]]
    assert found(clip, "a fox", ["fox"], ["fox"])[0] == [["fox</w>"], ["fox</w>"]]


def test_marks_before_words_and_case_are_those_of_the_tokenizer(sentencepiece):
    ids = sentencepiece.convert_tokens_to_ids(["▁a", "▁Fox", "▁and", "▁an", "▁owl", "</s>", "<pad>", "<pad>"])
    reading = read(ids, sentencepiece, [["fox"], ["pad"]])
    assert reading.own[0] == (False, True) + (False,) * 6
    assert not any(reading.own[1])  # marks of the tokenizer are no words
    assert [(t.expert, t.name) for t in reading.things] == [(0, "fox"), (None, "owl")]


@pytest.mark.parametrize(
    "prompt",
    [
        "ink drawing of a fox",
        "a fox in ink",
        "a fox, ink style",
        "a photo of a fox in the style of ink",
        "ink portrait of a fox",
    ],
)
def test_a_style_has_words_and_no_place(clip, prompt):
    words, things, _ = found(clip, prompt, ["fox"], ["ink"])
    assert words[1] == ["ink</w>"]
    assert things == [(0, "fox")]


def test_nouns_beside_an_experts_have_a_place_and_others_have_none(clip):
    prompt = "noto drawing of a lemon and a tiger in a hat, highly detailed, a panda on a blue background"
    assert found(clip, prompt, ["tiger"])[1] == [(0, "tiger"), (None, "lemon"), (None, "panda")]
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
    relations = found(clip, f"a fox {between} an octopus", ["fox"], ["octopus"])[2]
    assert relations == ([] if relation is None else [relation])


def test_a_text_in_two_runs_is_one_text(clip, sentencepiece):
    first = read(clip("a fox and a lemon").input_ids, clip, [["fox"]])
    second = read(sentencepiece.convert_tokens_to_ids(["▁a", "▁fox"]), sentencepiece, [["fox"]])
    both = joined([first, second])
    assert both.own[0] == first.own[0] + second.own[0]
    assert [(t.expert, t.name) for t in both.things] == [(0, "fox"), (None, "lemon")]
    assert both.things[0].tokens == both.own[0]
    assert both.things[1].tokens == first.things[1].tokens + (False, False)
