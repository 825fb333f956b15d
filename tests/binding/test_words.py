"""Words of a prompt: whose they are, and which of them have a place."""

import random
import time
import warnings

import pytest
import torch
from attention import watched, word_map
from reading import sentence_of
from tiny import tiny_lora, tiny_pipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

import mole_diffusers as mole
from mole_diffusers.binding import spans
from mole_world import default_folder

INK = ["fox", "owl", "ink"]
TWO = ["fox", "owl", "blue hat", "ink"]  # all of one LoRA
ROWS = [  # prompt, words of each LoRA, those that are found, subjects as (*LoRAs, name)
    # whole, in any case and in the plural
    ("drawing of two Foxes and an octopus", ["fox", "octopus"], "Foxes/octopus", [(0, "foxes"), (1, "octopus")]),
    ("a firefox and a boxfox", ["fox"], "", []),
    ("two cherries", ["cherry"], "cherries", []),
    ("two wolves", ["wolf"], "wolves", []),
    ("two knives", ["knife"], "knives", []),
    ("an owl's eye", ["owl"], "owl", []),
    # nouns of nobody in a list, in any script
    *(
        (f"a fox, a {noun} and an owl", ["fox", "owl"], "fox/owl", [(0, "fox"), (noun.lower(),), (1, "owl")])
        for noun in ("piñata", "Café", "łoś", "狐")
    ),
    # where no spaces are: in scripts without them, and between letters, digits and other marks
    ("一只狐狸和猫头鹰", ["狐狸", "猫头鹰", "fox"], "狐狸/猫头鹰/", []),
    ("1girl,sks_fox(owl)", ["girl", "fox", "owl"], "girl/fox/owl", []),
    ("a <s0><s1> fox and a sks owl", ["<s0><s1>", "sks"], "<s0><s1>/sks", [(0, "<s0><s1>"), (1, "sks")]),
    # several phrases, and words of several tokens
    (
        "drawing of french fries and a cheese wedge",
        [["fries potato", "french fries"], "cheese wedge"],
        "french fries/cheese wedge",
        [(0, "french fries"), (1, "cheese wedge")],
    ),
    # the longer phrase counts, and a shared word is of both
    (
        "a cheese wedge and a cheese",
        ["cheese", "cheese wedge"],
        "cheese/cheese wedge",
        [(1, "cheese wedge"), (0, "cheese")],
    ),
    ("a fox and an owl", ["fox", "fox", "owl"], "fox/fox/owl", [(0, 1, "fox"), (2, "owl")]),
    ("miku hatsune summer", ["miku", "miku hatsune summer"], "/miku hatsune summer", []),
    # a style has words and no place
    *(
        (prompt, INK, "fox/owl/ink", [(0, "fox"), (1, "owl")])
        for prompt in (
            "ink drawing of a fox and an owl",
            "a fox and an owl in ink style",
            "a fox and an owl, ink",
            "a photo of a fox and an owl in the style of ink",
            "(ink:1.2), a fox and an owl",
            "ink's painting of a fox and an owl",
            "a fox in ink's style and an owl",
        )
    ),
    ("Ink’s painting of a fox and an owl", INK, "fox/owl/Ink", [(0, "fox"), (1, "owl")]),
    ("1girl, FOX & (owl:1.1)", INK, "FOX/owl/", [(0, "fox"), (1, "owl")]),
    # nouns in a list have a place, and others have none
    (
        "drawing of a lemon, a tiger in a hat and a fox, highly detailed, a panda on a blue background",
        ["tiger", "fox"],
        "tiger/fox",
        [("lemon",), (0, "tiger"), (1, "fox")],
    ),
    ("drawing of a lemon and a tiger", ["tiger"], "tiger", []),
    # several subjects of one LoRA
    ("a bear, a fox and an owl", [TWO, "bear"], "fox,owl/bear", [(1, "bear"), (0, "fox"), (0, "owl")]),
    ("miku wearing a red cape and rin", ["miku", "cape", "rin"], "miku/cape/rin", [(0, "miku"), (2, "rin")]),
]


@pytest.mark.parametrize(("prompt", "words", "found", "subjects"), ROWS, ids=[row[0] for row in ROWS])
def test_words_and_subjects(prompt, words, found, subjects):
    sentence = sentence_of(prompt, *words)
    assert "/".join(",".join(prompt[slice(*span)] for span in sorted(own)) for own in sentence.words) == found
    assert [(*subject.experts, subject.name) for subject in sentence.subjects] == subjects


def test_a_lora_with_a_place_of_its_own_is_one_subject():
    sentence = sentence_of("a bear, a fox and an owl", TWO, "bear", regions={0: "left"})
    assert [subject.experts for subject in sentence.subjects] == [(1,), (0,)]


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
def test_a_side_of_the_picture_is_a_place(prompt, relations, apart):
    """And in the prompt of that subject alone it is not said."""
    sentence = sentence_of(prompt, "fox", "owl", "bear")
    assert list(sentence.relations) == relations
    assert [part.text for part in sentence.parts] == apart
    assert not sentence.why_no_tiles


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
def test_place_words_say_which_comes_first(between, relation):
    for octopus in ("an octopus", "octopus", "two octopuses", "a big blue octopus in a hat"):
        relations = sentence_of(f"a fox {between} {octopus}", "fox", "octopus").relations
        assert list(relations) == ([] if relation is None else [relation])


def test_of_phrases_inside_one_another_the_longest_counts_however_many_there_are():
    rng = random.Random(0)
    for _ in range(200):
        text, *phrases = ("".join(rng.choices(["a", "b", " ", "a b", "s "], k=k)) for k in (12, 1, 2, 2, 3, 3))
        every = [set(spans(text, p)) for p in phrases]
        longer = [(c, d) for each in every for c, d in each]
        wanted = [{(a, b) for a, b in s if not any(c <= a <= b <= d and d - c > b - a for c, d in longer)} for s in every]
        for words, one in zip(sentence_of(text, *phrases).words, wanted, strict=True):
            assert one <= set(words)  # `spans` leaves out what overlaps with one before it
    begun = time.process_time()
    sentence_of("a b " * 1200, ["a " + "b a " * n for n in range(32)], ["b " + "a b " * n for n in range(32)])
    assert time.process_time() - begun < 2  # 10 s if each is compared to all others


@pytest.mark.parametrize(
    "text", ["hatsune miku (cos)", "hatsune_miku_(cos)", r"hatsune miku \(cos\)", r"hatsune_miku_\(cos\)"]
)
def test_underscores_and_backslashes_are_written_in_tags_as_in_triggers(text):
    for phrase in ("hatsune miku (cos)", "hatsune_miku_(cos)", r"hatsune_miku_\(cos\)"):
        assert spans(f"a {text}, night", phrase) == [(2, 2 + len(text))]
    assert spans(text, "hatsune cos") == []


# ---- words as a tokenizer has them


SIDES = ("left", "right")


def clip():
    return CLIPTokenizer.from_pretrained(default_folder() / "base" / "tokenizer")


def with_added_words():
    words = clip()
    words.add_tokens(["<s0>", "<s1>", "sks"])
    return words


def byte_level():
    """CLIP's own alphabet: every byte of UTF-8 is a letter, and letters of two bytes are tokens."""
    letters = list(bytes_to_unicode().values())
    merges = [("Ã", "±"), ("Ã", "©</w>"), ("Å", "Ĥ"), ("Ð", "»")]
    words = [*letters, *(f"{letter}</w>" for letter in letters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


@pytest.mark.usefixtures("decided")
@pytest.mark.parametrize(
    ("made", "prompt", "words", "spelled"),
    [
        (clip, "ink of two Foxes and an owl's", ["fox", "owl"], ["foxes", "owl"]),
        (clip, "a FOX & (owl:1.1)", ["fox", "owl"], ["fox", "owl"]),
        (clip, "french fries and a cheese wedge", ["french fries", "cheese wedge"], ["french fries", "cheese wedge"]),
        (with_added_words, "a <s0><s1> fox and a sks owl", ["<s0><s1>", "sks"], ["<s0><s1>", "sks"]),
        (byte_level, "a piñata and a Café", ["piñata", "Café"], ["piñata", "café"]),
        (byte_level, "一只狐狸和猫头鹰", ["狐狸", "猫头鹰"], ["狐狸", "猫头鹰"]),
    ],
)
def test_the_map_of_a_lora_is_the_attention_to_the_tokens_of_its_words(tmp_path, made, prompt, words, spelled):
    """However the tokenizer cuts the prompt."""
    pipe, tokenizer = tiny_pipeline(), made()
    marks = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPTextConfig(vocab_size=len(tokenizer), max_position_embeddings=77, **sizes, **marks)
    pipe.register_modules(tokenizer=tokenizer, text_encoder=CLIPTextModel(config).eval())
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("one", "other"))}
    mixture = mole.attach(pipe, files, binding={n: (w, side) for n, w, side in zip(files, words, SIDES, strict=True)})
    with watched(pipe.unet) as calls, mixture.trace(maps=True) as trace, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        pipe(prompt, num_inference_steps=1, output_type="latent")
    ids = tokenizer(prompt).input_ids
    for name, text in zip(files, spelled, strict=True):
        own = [
            range(a, b)
            for a in range(len(ids))
            for b in range(a + 1, len(ids) + 1)
            if tokenizer.decode(ids[a:b]).strip() == text
        ]
        wanted = word_map(calls[0], 1, min(own, key=len), (8, 8))
        torch.testing.assert_close(trace.maps[0][0][name], wanted, atol=1e-4, rtol=1e-4)
