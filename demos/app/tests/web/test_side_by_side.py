"""Words of LoRAs that are tags of the prompt: what the page says of them, and the click that lists them as things."""

import json
import shutil

import pytest
from app_client import REQUEST, built, plain

from mole_app.web.mixer_cards import bare_tags, cards_of, listed
from mole_diffusers.lora.own_words import OwnWords

pytest.importorskip("gradio")
OF_THREE = ["fox", "owl", "hat"]
TAGS = "<lora:fox:1> <lora:hen:1> <lora:owl:1>"


@pytest.fixture(scope="module")
def page(loras, tmp_path_factory):
    """A page with animals and styles, of which the folder, the name or a word tells, and what its events are called."""
    folder, files = tmp_path_factory.mktemp("loras"), {}
    names = ("fox", "hen", "owl", "ink", "watercolor_v2", "sks")
    for name, source in zip(names, [*loras.values()] * 2, strict=True):
        files[name] = folder / ("styles" if name == "ink" else "animals") / f"{name}.safetensors"
        files[name].parent.mkdir(exist_ok=True)
        shutil.copy(source, files[name])
        of_file = {"owl": "owl, big eyes", "hen": "Hen", "watercolor_v2": "wtc", "sks": "hat, watercolor"}
        words = of_file.get(name, name)
        files[name].with_suffix(".json").write_text(json.dumps({"activation text": words}))
    return {each.fn.__name__: each for each in built(files, tmp_path_factory.mktemp("app")).fns.values() if each.fn}


def seen(page, prompt, **edits):
    """What the page says and offers beside the result, and the words that a click takes."""
    event, edits = page["tell"], {"prompt": prompt, **edits}
    values = [edits.get(one.elem_id, one.value) for one in event.inputs[2:]]
    _, said, button, words = plain(event)(REQUEST, "me", {"cards": []}, *values)
    return said, button.get("value", "") if button["visible"] else "", words


@pytest.mark.parametrize(
    ("prompt", "offered"),
    [
        (f"fox, hen {TAGS}", "a fox and a hen"),
        (f"masterpiece, FOX, 1girl, hen, forest {TAGS}", "FOX and a hen"),
        (f"fox, a hen, owl {TAGS}", ""),  # the tiny tokenizer has no comma, so a list of three would lose its first
        (f"big eyes, fox, forest {TAGS}", ""),  # eyes are no thing
        (f"a fox and a hen {TAGS}", ""),
        (f"a fox, a hen {TAGS}", ""),  # which has places
        ("hen, forest <lora:fox:1> <lora:hen:1>", ""),
        ("fox, fox, forest <lora:fox:1>", ""),
        ("hen <lora:fox:1> <lora:hen:1>", "a hen and a fox"),
        ("<lora:fox:1> <lora:hen:1>", "a fox and Hen"),  # as its file writes it
        ("<lora:hen:1> <lora:ink:1> <lora:fox:1>", "Hen and a fox, ink style"),
        ("<lora:hen:1> <lora:watercolor_v2:1> <lora:fox:1>", "Hen and a fox"),
        ("fox, hen, watercolor <lora:fox:1> <lora:hen:1> <lora:sks:1>", "a fox and a hen"),
        ("fox <lora:fox:1> <lora:watercolor_v2:1>", ""),
        ("fox <lora:fox:1> <lora:sks:1>", ""),
        ("<lora:fox:1> <lora:hen:1:region=everywhere>", ""),
        ("<lora:fox:1>", ""),
        ("", ""),
        (f"fox, (hen:1.2) {TAGS}", ""),
        ("fox, hen <lora:fox:1> <lora:hen:1:region=everywhere>", ""),
        ("fox, ink <lora:fox:1> <lora:ink:1>", ""),
        ("fox, hen, ink <lora:fox:1> <lora:hen:1> <lora:ink:1>", "a fox and a hen"),
        ("fox, hen <lora:fox:1> <lora:gone:1>", ""),
    ],
)
def test_tags_that_could_be_things_are_offered_as_a_list(page, prompt, offered):
    said, button, words = seen(page, prompt)
    assert button == (f"Write “{offered}”" if offered else "")
    assert bool(said) == bool(offered) == bool(words)


def test_words_that_cannot_be_a_tag_are_not_offered_and_the_cards_say_what_they_did(page, monkeypatch):
    own = lambda expert: OwnWords((f"the {expert.name}|side",), True)  # noqa: E731
    monkeypatch.setattr("mole_app.web.side_by_side.words_of", own)
    event, edits = page["tell"], {"prompt": "<lora:fox:1> <lora:hen:1>"}
    values = [edits.get(one.elem_id, one.value) for one in event.inputs[2:]]
    lines, said, *_ = plain(event)(REQUEST, "me", {"cards": [{"name": "fox"}]}, *values)
    assert ("Acts" in lines, said) == (True, "")


def test_advice_is_below_the_picture_where_it_moves_nothing(loras, tmp_path):
    blocks = built(loras, tmp_path).blocks.values()
    (stage,) = [each for each in blocks if each.elem_id == "stage"]
    assert stage.children[-1].elem_id == "advice"
    assert [each.elem_id for each in stage.children[-1].children] == ["mixed", "side-by-side"]


def test_nothing_is_offered_without_binding(page):
    assert seen(page, f"fox, hen {TAGS}", binding="none") == ("", "", [])


def test_a_click_writes_the_list_and_then_nothing_more_is_offered(page):
    prompt = f"masterpiece, fox, forest, hen {TAGS}"
    said, _, words = seen(page, prompt)
    assert said.startswith("fox, hen are tags without places, so they may mix.")  # the reason for the advice
    click = page["as_things"]
    cards = cards_of(prompt, [], ["fox", "hen", "owl"])
    text, _, shown, *_ = plain(click)(words, prompt, cards, [])
    assert shown["cards"] == cards  # drawn anew, with the words ticked
    assert text == f"masterpiece, a fox and a hen, forest {TAGS}"
    assert seen(page, text) == ("", "", [])
    painted = f"fox, hen {TAGS} <lora:ink:1>"
    assert plain(click)(words, painted, [], [])[0] == painted.replace("fox, hen", "a fox and a hen, ink style")
    assert plain(click)(words, TAGS, [], [])[0] == f"a fox and Hen {TAGS}"  # into a prompt without words
    assert plain(click)(words, "a fox and a hen", [], [])[0]["__type__"] == "update"  # the prompt was changed meanwhile


@pytest.mark.parametrize(
    ("prompt", "words", "wanted"),
    [
        ("fox, owl, ink", ["fox", "owl"], "a fox and an owl, ink"),
        (
            "fox <lora:fox:1>, The Owl,\nhat <lora:owl:1>",
            ["fox", "owl", "hat"],
            "a fox, Owl and a hat <lora:fox:1> <lora:owl:1>",
        ),
        ("octopus, iris", ["octopus", "iris"], "an octopus and an iris"),
        ("fries, sks_man, glass, Fox", ["fries", "sks_man", "glass"], "fries, sks_man and a glass, Fox"),
    ],
)
def test_things_get_articles_and_names_do_not(prompt, words, wanted):
    assert listed(prompt, words) == wanted


def test_tags_are_what_stands_between_commas_alone():
    assert bare_tags("a fox, in ink <lora:a, b:1> Owl\nowl,, (hat:1.2)") == {
        "fox": (0, 5), "in ink": (7, 13), "owl": (28, 31), "(hat:1.2)": (38, 47),
    }  # fmt: skip
