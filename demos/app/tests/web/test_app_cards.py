"""Cards in step with the prompt's tags, and what the app proposes."""

import pytest
import torch

from mole_app.studio.recipe import Recipe
from mole_app.web import mixer_cards as cards
from mole_diffusers.inspection.gate_figures import COLOURS, colours

KNOWN = ["fox", "ink", "hat", "a:b"]
LIST = "a fox <lora:fox:0@0,1@0.4:lbw=OUTALL:start=2> <lora:ink:0.5:unet=1>"


def test_a_tag_is_what_its_card_shows():
    fox, ink = cards.cards_of(LIST, [], KNOWN)
    shown = cards.fields_of(fox, KNOWN)
    assert {key: value for key, value in shown.items() if value} == {
        "unet": "0@0,1@0.4", "te": "0@0,1@0.4", "lbw": "OUTALL", "start": "2", "region": "auto"
    }  # fmt: skip
    assert (cards.fields_of(ink, KNOWN)["unet"], cards.fields_of(ink, KNOWN)["te"]) == ("1", "0.5")
    assert cards.edit(LIST, [fox, ink], "fox", KNOWN, **shown) == (LIST, [fox, ink])
    assert cards.edit(LIST, [fox, ink], "fox", KNOWN) == (LIST, [fox, ink])


def test_a_card_that_is_changed_changes_its_tag():
    fox, ink = cards.cards_of(LIST, [], KNOWN)
    text, found = cards.edit(LIST, [fox, ink], "ink", KNOWN, unet="-7", stop="9")
    assert text == "a fox <lora:fox:0@0,1@0.4:lbw=OUTALL:start=2> <lora:ink:0.5:unet=-7:stop=9>"
    assert found == cards.cards_of(text, [], KNOWN)
    assert found[0] == fox
    for field, value, message in (("unet", "x", "is not a number"), ("lbw", "1:2", "end a tag"), ("stop", "-1", "a step")):
        with pytest.raises(ValueError, match=message):
            cards.edit(LIST, [fox, ink], "fox", KNOWN, **{field: value})


def test_a_card_that_is_off_keeps_its_whole_tag():
    fox, ink = cards.cards_of(LIST, [], KNOWN)
    text, off = cards.edit(LIST, [fox, ink], "fox", KNOWN, on=False)
    assert text == "a fox <lora:ink:0.5:unet=1>"
    assert cards.cards_of(text, off, KNOWN) == off
    text, on = cards.edit(text, off, "fox", KNOWN)
    assert on == [fox, ink]
    assert "<lora:fox:0@0,1@0.4:lbw=OUTALL:start=2>" in text


def test_a_card_that_a_tag_brought_goes_with_it_and_one_that_was_picked_stays():
    text, found = cards.edit("<lora:fox:1>", cards.cards_of("<lora:fox:1>", [], KNOWN), "ink", KNOWN, unet="0.5")
    assert cards.cards_of(text, found, KNOWN) == found
    ink, hat = cards.cards_of("<lora:hat:1>", found, KNOWN)
    assert (ink, hat["name"]) == ({**found[1], "on": False}, "hat")
    assert cards.cards_of("", [ink, hat], KNOWN) == [ink]


def test_a_lora_keeps_its_colour_whatever_comes_and_goes():
    found = cards.cards_of("<lora:ink:1> <lora:fox:1>", [], KNOWN)
    assert cards.shades(found) == {"ink": COLOURS[0], "fox": COLOURS[1]}
    _, found = cards.edit("<lora:ink:1> <lora:fox:1>", found, "a:b", KNOWN)
    found = [card for card in found if card["name"] != "ink"]
    found = cards.cards_of("<lora:fox:1> <lora:a:b:1> <lora:hat:1>", found, KNOWN)
    assert cards.shades(found) == {"fox": COLOURS[1], "a:b": COLOURS[2], "hat": COLOURS[0]}
    drawn = colours(["fox", "hat", "new"], cards.shades(found))
    assert (drawn["fox"], drawn["hat"]) == (COLOURS[1], COLOURS[0])
    assert drawn["new"] not in cards.shades(found).values()


def test_a_lora_is_the_same_one_however_its_name_is_typed():
    """In any case, and with _ for spaces."""
    known, typed = ["my fox", "ink"], "a fox <lora:My_Fox:1> <lora:ink:1>"
    found = cards.cards_of(typed, [], known)
    assert found == cards.cards_of("a fox <lora:my fox:1> <lora:ink:1>", [], known)
    text, edited = cards.edit(typed, found, "my fox", known, unet="2")
    assert text == "a fox <lora:my fox:2> <lora:ink:1>"
    assert cards.cards_of(text, found, known) == edited
    assert cards.with_tag(typed, "my fox", None, known) == "a fox <lora:ink:1>"
    with pytest.raises(ValueError, match="two tags of the prompt mean the same LoRA: My_Fox, my fox"):
        cards.cards_of("<lora:My_Fox:1> <lora:my fox:1>", [], known)


def test_a_prompt_keeps_its_lines_and_a_tag_its_place():
    lines = "a fox,\nin ink <lora:fox:1>\n\n<lora:ink:0.5>\nwide"
    found = cards.cards_of(lines, [], KNOWN)
    assert cards.edit(lines, found, "fox", KNOWN, unet="2")[0] == lines.replace("fox:1", "fox:2")
    assert cards.with_tag(lines, "fox", None, KNOWN) == lines.replace(" <lora:fox:1>", "")
    assert cards.edit(lines, found, "a:b", KNOWN)[0] == f"{lines} <lora:a:b:1>"
    assert cards.with_triggers(lines, [], ["sks fox"], KNOWN) == f"{lines}, sks fox"


@pytest.mark.parametrize(
    ("text", "before", "chosen", "wanted"),
    [
        ("a cat <lora:fox:1>", [], ["sks fox"], "a cat, sks fox <lora:fox:1>"),
        ("a cat, sks fox <lora:fox:1>", ["sks fox"], [], "a cat <lora:fox:1>"),
        ("a fox in snow <lora:fox:1>", [], ["orange fur"], "a fox in snow, orange fur <lora:fox:1>"),
        ("a fox in snow <lora:fox:1>", ["fox"], ["fox", "orange fur"], "a fox in snow, orange fur <lora:fox:1>"),
        ("a category of things, cat", ["cat"], [], "a category of things"),
        ("a Cat,\nCAT, red <lora:fox:1:word=cat>", ["cat"], [], "a,\nred <lora:fox:1:word=cat>"),
        ("Sks  Fox in snow", [], ["sks fox"], "Sks  Fox in snow"),
        ("<lora:fox:1>", [], ["fox"], "fox <lora:fox:1>"),
        ("a cat,\n<lora:fox:1>\n<lora:ink:1>", [], ["fox", "fur"], "a cat, fox, fur\n<lora:fox:1>\n<lora:ink:1>"),
        ("fox", ["fox"], [], ""),
        ("", [], ["fox"], "fox"),
    ],
)
def test_trigger_words_come_and_go(text, before, chosen, wanted):
    """Whole words in any case, and only those whose tick has changed."""
    assert cards.with_triggers(text, before, chosen, KNOWN) == wanted


def test_words_are_ticked_and_removed_in_the_plural_too_as_binding_finds_them():
    assert cards.triggers_in("two foxes, a hat", ["fox", "red fox"]) == ["fox"]
    assert cards.with_triggers("two foxes, a hat <lora:foxes:1>", ["fox"], [], KNOWN) == "two, a hat <lora:foxes:1>"


def test_a_trigger_word_is_ticked_where_the_prompt_says_it_beside_its_tags():
    assert cards.triggers_in(
        "a FOX <lora:hat:1> <lora:ink",
        ["fox", "hat", "in"],
    ) == ["fox"]


def test_a_prompt_for_one_lora_names_no_other():
    pytest.importorskip("gradio")
    from mole_app.web.train_tab import single_prompt

    two = "noto drawing of a sunflower and a doughnut"
    assert single_prompt(two, ["doughnut"], keep=["sunflower"]) == "noto drawing of a sunflower"
    assert single_prompt(two, ["sunflower"], keep=["doughnut"]) == "noto drawing of a doughnut"
    assert single_prompt("ink drawing of a pink fox", ["ink"], keep=["fox"]) == "drawing of a pink fox"  # not of a "p fox"
    assert single_prompt("ink drawing of a fox", ["Fox"], keep=["ink"]) == "ink drawing"


def test_words_and_a_region_are_fields_of_a_card():
    (fox,) = cards.cards_of("<lora:fox:1:word=a red fox|foxes:region=top left>", [], KNOWN)
    shown = cards.fields_of(fox, KNOWN)
    assert (shown["word"], shown["region"]) == (["a red fox", "foxes"], "top left")
    assert cards.edit(fox["tag"], [fox], "fox", KNOWN, **shown) == (fox["tag"], [fox])
    text, (moved,) = cards.edit("a fox", [{**fox, "on": False}], "fox", KNOWN, region="painted")
    assert text == "a fox <lora:fox:1:word=a red fox|foxes:region=painted>"
    assert moved["on"]
    assert cards.edit("", [fox], "fox", KNOWN, region="0,0,0.5,1")[0].endswith(":region=0,0,0.5,1>")
    with pytest.raises(ValueError, match="a region is 'auto'"):
        cards.edit("", [fox], "fox", KNOWN, region="somewhere")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fox", "'fox' is not NAME=WEIGHT; the LoRAs are fox, ink"),
        ("fox=big", "the weight of 'fox': 'big' is not a number"),
        ("fox=1, ink=nan", "the weight of 'ink': 'nan' is not a finite number"),
        ("hat=1", "there is no LoRA 'hat' in this picture; the LoRAs are fox, ink"),
    ],
)
def test_weights_set_by_hand_are_numbers_of_loras(text, message):
    assert cards.parse_lock("fox=1, ink = -0.5", ["fox", "ink"]) == {"fox": 1.0, "ink": -0.5}
    with pytest.raises(ValueError, match=message):
        cards.parse_lock(text, ["fox", "ink"])


@pytest.fixture
def actions(loras, tmp_path):
    pytest.importorskip("gradio")
    from tiny import tiny_pipeline

    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions

    return Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"), home=tmp_path / "gates")


def test_the_page_says_what_a_mixture_says_of_each_lora(actions, loras):
    from tiny import tiny_pipeline

    import mole_diffusers as mole

    prompt = "a fox and an owl <lora:fox:1:word=fox> <lora:hat:1:word=owl> <lora:ink:1:region=painted>"
    found = actions.loras.roles(Recipe(prompt))
    mixture = mole.attach(tiny_pipeline(), dict(loras), binding={"fox": "fox", "hat": "owl"})
    said = mixture.explain("a fox and an owl").experts
    assert {name: role.place for name, role in found.items()} == {"fox": "own", "hat": "own", "ink": "own"}
    assert [found[name] for name in ("fox", "hat")] == [said[name] for name in ("fox", "hat")]
    assert "region" in found["ink"].why  # its mask is in the page alone
    assert mole.mixture.attached(actions.studio.base.pipe) is None  # and nothing was attached


def test_a_card_says_in_one_line_what_its_lora_does(actions):
    from mole_app.web.mixer import sentence, stands

    prompt = "a fox and an owl <lora:fox:1:word=fox> <lora:hat:1:word=owl> <lora:ink:1:region=everywhere>"
    roles = actions.loras.roles(Recipe(prompt))
    said = {name: sentence(role) for name, role in roles.items()}
    assert said["fox"] == "Acts in its own place, on “fox”: the prompt lists it beside 'owl'"
    assert said["ink"] == "Acts everywhere: you said so"
    assert sentence(roles["fox"], "left").startswith("Acts in its own place, on “fox”, left in the last picture: ")
    assert "last picture" not in sentence(roles["ink"], "left")
    unbound = actions.loras.roles(Recipe(prompt, binding="none"))
    assert {sentence(role) for role in unbound.values()} == {"Acts everywhere: nothing is bound"}
    touching = prompt.replace("a fox and an owl", "fox hugging owl")  # the tiny text encoder reads 14 letters
    sizes = {width: sentence(actions.loras.roles(Recipe(touching, width=width, height=32))["fox"]) for width in (32, 64)}
    assert sizes[32].startswith("Acts everywhere, called by “fox”: ")
    assert sizes[64] == "Acts in its own tile, on “fox”: it touches 'owl'"
    place = torch.zeros(4, 8)
    assert (stands(None), stands(place)) == ("", "")
    place[:, :4] = 1
    assert stands(place) == "left"
    place[2:] = 0
    assert stands(place) == "top left"
    assert stands(torch.ones(4, 8)) == "in the middle"


@pytest.mark.parametrize(
    ("prompt", "tag", "wanted"),
    [
        ("a fox and an owl", "1:word=fox:region=right", "Acts in the place you gave it, right, on “fox”"),
        ("a fox and an owl", "1:word=fox:region=painted", "Acts where you painted, on “fox”"),
        ("an owl", "1:word=fox:region=left", "Acts in the place you gave it, left; the prompt has none of its words"),
        ("an owl", "1:word=fox", "Acts everywhere: the prompt has none of its words: fox"),
        (
            "an owl",
            "1:word=fox:region=everywhere",
            "Acts everywhere: you said so; the prompt has none of its words: fox",
        ),
        ("a fox", "0:word=fox", "Does not act: its strength is 0"),
    ],
)
def test_a_card_names_one_place(actions, prompt, tag, wanted):
    """Also after a picture in which its subject stood elsewhere."""
    from mole_app.web.mixer import sentence

    recipe = Recipe(f"{prompt} <lora:fox:{tag}> <lora:hat:1:word=owl>")
    given = next(each for each in recipe.tags if each.name == "fox")
    assert sentence(actions.loras.roles(recipe)["fox"], "bottom left", given) == wanted


def test_one_bad_tag_hides_no_other_card():
    for bad in ("<lora:koala:1>", "<lora:hat:strong>", "<hypernet:x:1>", "<lora:FOX:2>"):
        text = f"a fox <lora:fox:0.5> {bad} <lora:ink:1>"
        assert cards.without_bad_tags(text, KNOWN) == "<lora:fox:0.5> <lora:ink:1>"


def test_a_switched_place_is_one_of_three():
    from mole_app.web.mixer import in_switch

    assert [in_switch(region) for region in ("auto", "everywhere", "painted", "left", "0,0,1,1")] == [
        "auto", "everywhere", "painted", None, None
    ]  # fmt: skip
