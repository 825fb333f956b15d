"""What a user says about binding."""

import json

import pytest
import torch
from PIL import Image

from mole_app.studio.weight_syntax import plain_text
from mole_diffusers.binding import Bound, bindings, files_bindings, parse_binding, region_mask, to_json
from mole_diffusers.binding.config import from_json
from mole_diffusers.lora import Expert


def expert(name, triggers=(), **metadata):
    return Expert(name, {}, "peft", "unknown", triggers, "file", "", metadata)


def test_words_are_those_of_the_file_unless_others_are_given():
    fox = expert("fox", ("sks fox",))
    assert files_bindings({"fox": fox, "ink": expert("ink")}) == {
        "fox": Bound(("sks fox",)), "ink": Bound(())
    }  # fmt: skip
    own = Bound(("sks fox",))
    assert bindings({"fox": "a fox"}, {"fox": own}, {"fox": own})["fox"] == Bound(("fox",))
    assert bindings({"fox": ["a fox", "foxes"]}, {"fox": own}, {"fox": own})["fox"] == Bound(("fox", "foxes"))
    assert bindings({"fox": (None, "left")}, {"fox": own}, {"fox": own})["fox"] == Bound(("sks fox",), "left")
    assert bindings({"fox": ("the fox", (0, 0, 0.5, 1))}, {"fox": own}, {"fox": own})["fox"] == Bound(
        ("fox",), (0.0, 0.0, 0.5, 1.0)
    )
    assert bindings({"fox": "everywhere"}, {"fox": own}, {"fox": own})["fox"] == Bound((), "everywhere")


@pytest.mark.parametrize("phrase", [r"miku \(vocaloid\)", "(miku:1.2)", "( a (red : .5) fox:+1. )", r"\\o/"])
def test_words_count_as_the_file_writes_them_and_as_prompts_are_read(phrase):
    assert files_bindings({"miku": expert("miku", (phrase,))})["miku"].words == (phrase, plain_text(phrase))


@pytest.mark.parametrize(
    ("stated", "words"),
    [
        # As pages of characters list them. Somebody else's white dress is not hers.
        (("fern", "half updo", "white dress", "long hair", "pointy ears"), ("fern", "half updo")),
        (("mikudef", "(school uniform:1.1)", "detached sleeves"), ("mikudef", "detached sleeves")),
        (("ohwx man", "ohwx suit", "sks hat"), ("ohwx man", "ohwx suit", "sks hat")),  # triggers of their own
        (("white dress", "long skirt"), ("white dress", "long skirt")),  # all that a file of clothes says
    ],
)
def test_what_anybody_may_wear_calls_nobody_beside_a_name(stated, words):
    assert files_bindings({"it": expert("it", stated)})["it"].words == words


def test_what_a_comma_cuts_apart_and_a_face_keep_their_words():
    words = files_bindings({"miku": expert("miku", ("(miku", "vocaloid:1.2)", ":)", "3:1"))})["miku"].words
    assert words == ("(miku", "vocaloid:1.2)", ":)", "3:1", "miku", "vocaloid")


def test_words_of_files_do_not_silence():
    tags = json.dumps({"folder": {"1girl": 10, "hat": 9, "solo": 8, "smile": 1}})
    assert files_bindings({"girl": expert("girl", ss_tag_frequency=tags)})["girl"] == Bound(("hat",), required=False)
    assert files_bindings({"girl": expert("girl", ("hat",), ss_tag_frequency=tags)})["girl"].required is False


def test_experts_that_are_not_named_keep_theirs():
    experts = {"fox": expert("fox", ("fox",)), "ink": expert("ink", ("ink",))}
    before = files_bindings(experts)
    assert bindings({"ink": "everywhere"}, before, before) == {"fox": before["fox"], "ink": Bound((), "everywhere")}
    with pytest.raises(ValueError, match="unknown expert 'cat'; attached: .'fox', 'ink'"):
        bindings({"cat": "cat"}, before, before)


def test_a_binding_from_a_file_is_what_was_written_or_is_refused():
    mask = Image.new("L", (4, 2), 255)
    for given in (Bound(("fox", "foxes"), "left", required=False), Bound((), (0.0, 0.0, 0.5, 1.0)), Bound(("a",), mask)):
        again = from_json(json.loads(json.dumps(to_json(given))), "fox")
        assert (again.words, again.required) == (given.words, given.required)
        assert torch.equal(region_mask(again.region, 2, 4), region_mask(given.region, 2, 4))
    for bad in (
        {},
        {"words": "fox", "region": "left", "required": True},
        {"words": [], "region": "png:x", "required": True},
    ):
        with pytest.raises(ValueError, match="the binding of 'fox' cannot be read"):
            from_json(bad, "fox")


BAD = [3, [], ["", "fox"], ("fox", "left", 1), [3], ("fox", "nowhere"), Bound(("fox",), "nowhere")]


@pytest.mark.parametrize("bad", BAD)
def test_what_is_no_binding_is_refused_by_name(bad):
    with pytest.raises(ValueError, match="'fox'"):
        bindings({"fox": bad}, {"fox": Bound()}, {"fox": Bound()})["fox"]


@pytest.mark.parametrize(
    ("text", "given"),
    [
        ("fox=a fox", ["a fox"]),
        ("fox=a fox|foxes@left", (["a fox", "foxes"], "left")),
        ("fox=@top right", (None, "top right")),
        ("fox=left|", ["left"]),
        ("fox=a fox@0,0,0.5,1", (["a fox"], (0.0, 0.0, 0.5, 1.0))),
        ("fox=everywhere", "everywhere"),
    ],
)
def test_a_binding_can_be_typed(text, given):
    assert parse_binding(text, "--bind") == ("fox", given)


def test_a_mask_picture_is_typed_as_a_file(tmp_path):
    Image.new("L", (4, 4), 255).save(tmp_path / "mask.png")
    _, (words, region) = parse_binding(f"fox=fox@{tmp_path / 'mask.png'}", "--bind")
    assert words == ["fox"]
    assert region.getpixel((1, 1)) == 255


def test_a_mask_that_is_no_picture_or_too_large_is_refused_by_option(tmp_path):
    """Pillow takes every kind of picture by itself, and runs Ghostscript for one of them."""
    (tmp_path / "other.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    Image.new("1", (4096, 4097)).save(tmp_path / "large.png")
    for name, why in (("other", "cannot be read as a picture"), ("large", "has 16781312 pixels, more than 16777216")):
        with pytest.raises(ValueError, match=f"--bind .*{name}.png {why}"):
            parse_binding(f"fox=fox@{tmp_path / name}.png", "--bind")


@pytest.mark.parametrize("bad", ["fox", "=fox", "fox=", "fox=fox@0,0,x,1", "fox=left", "fox=auto"])
def test_what_cannot_be_read_is_refused(bad):
    with pytest.raises(ValueError, match=r"--bind|not a box"):
        parse_binding(bad, "--bind")


@pytest.mark.parametrize("region", ["left", "top left", "auto"])
def test_a_region_in_the_place_of_words_is_refused(region):
    with pytest.raises(ValueError, match=rf"'{region}' is a region: give 'fox' \(None, '{region}'\), or \['{region}'\]"):
        bindings({"fox": region}, {"fox": Bound()}, {"fox": Bound()})
    assert bindings({"fox": [region]}, {"fox": Bound()}, {"fox": Bound()})["fox"].words == (region,)
