"""The mixer without a browser: its cards are drawn, and their events keep prompt, cards and fields in step."""

import pytest
from app_client import built, plain

from mole_diffusers.app.mixer_cards import FIELDS, cards_of, fields_of

pytest.importorskip("gradio")
TEXT = "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:0.5>"


@pytest.fixture(scope="module")
def drawn(loras, tmp_path_factory):
    """Cards, and the components and events of their drawing."""
    blocks = built(loras, tmp_path_factory.mktemp("app"))
    cards = cards_of(TEXT, [], loras)
    before = set(blocks.fns)
    (renderable,) = blocks.default_config.renderables
    with blocks:
        renderable.fn({"cards": cards}, TEXT)
    events = [event for number, event in blocks.fns.items() if number not in before]
    return cards, list(blocks.blocks.values()), events


def named(events, name):
    return [plain(event) for event in events if event.fn.__name__ == name]


def test_a_card_has_a_field_for_all_that_its_tag_says(drawn, loras):
    cards, components, _ = drawn
    labels = [getattr(one, "label", None) for one in components]
    for card in cards:
        assert card["name"] in labels
        slider = next(one for one in components if getattr(one, "label", None) == f"Strength of {card['name']}")
        assert slider.interactive == ("@" not in fields_of(card, loras)["unet"])  # a slider cannot move a list
    values = [one.value for one in components if getattr(one, "elem_classes", None) == ["any"]]
    assert values == ["0@0,1@0.4", "0.5"]


def test_what_is_typed_and_moved_stays_in_step(drawn, loras):
    cards, _, events = drawn
    slide, write = named(events, "slide")[1], named(events, "write")[1]  # of ink
    text, found, slider, *fields = slide(1.5, True, TEXT, cards)
    assert text == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:1.5>"
    assert fields == ["1.5", "1.5", "", "", "", [], "auto", ""]
    assert fields[:5] == [fields_of(found[1], loras)[key] for key in FIELDS[:5]]
    text, found, slider, *_ = write(True, TEXT, cards, "-7", "0.5", "OUTALL", None, "3", [], "auto")
    assert text == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:-7:lbw=OUTALL:stop=3>"  # te followed, as it was the same
    assert (slider["value"], slider["interactive"]) == (-1, True)
    text, off, *_ = write(False, text, found, "-7", "-7", "OUTALL", "", "3", [], "auto")
    assert text == "a fox <lora:fox:0@0,1@0.4:stop=9>"
    assert not off[1]["on"]
    assert write(True, text, off, "-7", "-7", "OUTALL", "", "3", [], "auto")[0].endswith("<lora:ink:-7:lbw=OUTALL:stop=3>")
    assert "is not a number" in write(True, TEXT, cards, "strong", "", "", "", "", [], "auto")[-1]


def test_words_and_regions_go_into_the_tag_and_come_back(drawn):
    cards, components, events = drawn
    write = named(events, "write")[1]
    text, found, _, *fields = write(True, TEXT, cards, "0.5", "0.5", "", "", "", ["an ink", "lines"], "top left")
    assert text == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:0.5:word=an ink|lines:region=top left>"
    assert fields[5:] == [["an ink", "lines"], "top left", ""]
    assert write(True, text, found, "0.5", "0.5", "", "", "", [], "auto")[0] == TEXT
    assert "a region is 'auto'" in write(True, TEXT, cards, "0.5", "0.5", "", "", "", [], "0,0,2,1")[-1].replace("\\", "")
    regions = [one for one in components if getattr(one, "elem_classes", None) == ["region"]]
    assert [region.value for region in regions] == ["auto", "auto"]


def test_cards_go(drawn):
    cards, _, events = drawn
    text, left, shown, _ = named(events, "removed")[0](TEXT, cards)
    assert (text, left, shown["cards"]) == ("a fox <lora:ink:0.5>", cards[1:], cards[1:])


def test_a_tick_changes_its_own_word_alone(drawn):
    """Also where the prompt was changed since the card was drawn."""
    _, _, events = drawn
    switched = named(events, "switched")[0]
    text, ticked, said = switched([], ["orange fur"], TEXT)
    assert (text, ticked, said) == (TEXT.replace("a fox", "a fox, orange fur"), ["orange fur"], "")
    assert switched(ticked, [], text)[0] == TEXT
    assert "is not closed" in switched([], ["x"], "a <lora:fox")[-1]
