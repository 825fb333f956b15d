"""The mixer without a browser: its cards are drawn, and their events keep prompt, cards and fields in step, in whatever
order they are sent and answered."""

from copy import deepcopy

import pytest
from app_client import built, plain

from mole_app.web.mixer_cards import cards_of, fields_of

gr = pytest.importorskip("gradio")
FIELDS = ("unet", "word", "region", "te", "lbw", "start", "stop")  # of a card, as they are laid out
TEXT = "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:0.5>"
SHOWN = {"cards": [], "at": 1}  # as the cards are drawn


@pytest.fixture(scope="module")
def drawn(loras, tmp_path_factory):
    """Cards, and the components and events of their drawing."""
    blocks = built(loras, tmp_path_factory.mktemp("app"))
    cards = cards_of(TEXT, [], loras)
    before = set(blocks.fns)
    with blocks:
        mixer_of(blocks).fn(SHOWN, TEXT, cards, [])
    events = [event for number, event in blocks.fns.items() if number not in before]
    return cards, list(blocks.blocks.values()), events, blocks


def mixer_of(blocks):
    """What draws the cards of a page."""
    (found,) = [one for one in blocks.default_config.renderables if one.fn.__name__ == "draw"]
    return found


class Visit:
    """A page and its server. An event is sent with what the page shows, answered with the states of the server, and what
    comes back is shown; `do` is all of it at once."""

    def __init__(self, drawn):
        cards, components, of_cards, blocks = drawn
        self.events = of_cards + [event for event in blocks.fns.values() if event.fn is not None and event not in of_cards]
        self.values = {one: deepcopy(one.value) for one in components if hasattr(one, "value")}
        _, self.prompt, self.cards, self.rewrites, self.shown = self.event("write").inputs[:5]
        self.values |= {self.prompt: TEXT, self.cards: cards, self.shown: SHOWN}

    def event(self, name, card=0):
        return [event for event in self.events if event.fn.__name__ == name][card]

    def part(self, name, card=1):
        """A component of a card, by default of ink."""
        return self.event("write", card).inputs[5 + ["on", "slider", *FIELDS, "place"].index(name)]

    def send(self, event, **edits):
        self.values |= edits.pop("shown", {})
        return event, [self.values[each] for each in event.inputs]

    def edit(self, card=1, **edits):
        """An edit of a card, by default of ink."""
        return self.send(self.event("write", card), shown={self.part(name, card): edits[name] for name in edits})

    def answer(self, sent):
        event, given = sent
        given = [
            self.values[one] if isinstance(one, gr.State) else value for one, value in zip(event.inputs, given, strict=True)
        ]
        after = list(zip(event.outputs, plain(event)(*given), strict=True))
        self._put([each for each in after if isinstance(each[0], gr.State)])
        return [each for each in after if not isinstance(each[0], gr.State)]

    def do(self, sent):
        self._put(self.answer(sent))
        return self.values[self.prompt]

    def _put(self, after):
        for one, value in after:
            is_update = isinstance(value, dict) and value.get("__type__") == "update"
            if not is_update or "value" in value:
                self.values[one] = value["value"] if is_update else value


def test_a_card_has_a_field_for_all_that_its_tag_says(drawn, loras):
    cards, components, *_ = drawn
    labels = [getattr(one, "label", None) for one in components]
    for card in cards:
        assert card["name"] in labels
        slider = next(one for one in components if getattr(one, "label", None) == f"Strength of {card['name']}")
        assert slider.interactive == ("@" not in fields_of(card, loras)["unet"])  # a slider cannot move a list
    values = [one.value for one in components if getattr(one, "elem_classes", None) == ["any"]]
    assert values == ["0@0,1@0.4", "0.5"]
    folded = [one.open for one in components if getattr(one, "elem_classes", None) == ["rest"]]
    assert folded == [True, False]  # the first one stops at a step


def test_what_is_typed_and_moved_stays_in_step(drawn, loras):
    visit = Visit(drawn)
    shows = lambda *names: [visit.values[visit.part(name)] for name in names]  # noqa: E731
    assert visit.do(visit.edit(slider=1.5)) == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:1.5>"
    assert shows(*FIELDS) == ["1.5", [], "auto", "1.5", "", "", ""]
    text = visit.do(visit.edit(unet="-7", lbw="OUTALL", start=None, stop="3"))
    assert text == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:-7:lbw=OUTALL:stop=3>"  # te followed, as it was the same
    assert shows("slider", "te") == [-1, "-7"]
    assert [fields_of(visit.values[visit.cards][1], loras)[key] for key in FIELDS] == shows(*FIELDS)
    assert visit.do(visit.edit(on=False)) == "a fox <lora:fox:0@0,1@0.4:stop=9>"
    assert not visit.values[visit.cards][1]["on"]
    assert visit.do(visit.edit(on=True)) == text
    said = visit.answer(visit.edit(unet="strong"))[-1][1]
    assert "is not a number" in said
    assert visit.do(visit.edit(unet="0@0,1@0.4")).endswith("<lora:ink:0@0,1@0.4:lbw=OUTALL:stop=3>")
    assert visit.do(visit.edit(unet="1", te="0.5")).endswith("<lora:ink:0.5:unet=1:lbw=OUTALL:stop=3>")


def test_words_and_regions_go_into_the_tag_and_come_back(drawn):
    visit = Visit(drawn)
    text = visit.do(visit.edit(word=["an ink", "lines"], region="top left"))
    assert text == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:0.5:word=an ink|lines:region=top left>"
    assert visit.do(visit.edit(word=[], region="auto")) == TEXT
    said = visit.answer(visit.edit(region="0,0,2,1"))[-1][1]
    assert "a region is 'auto'" in said.replace("\\", "")
    regions = [one for one in drawn[1] if getattr(one, "elem_classes", None) == ["region"]]
    assert [region.value for region in regions] == ["auto", "auto"]


def test_the_switch_of_places_and_the_field_of_regions_are_one(drawn):
    visit = Visit(drawn)
    assert visit.do(visit.edit(place="everywhere")).endswith("<lora:ink:0.5:region=everywhere>")
    assert visit.values[visit.part("region")] == "everywhere"
    assert visit.do(visit.edit(region="left")).endswith("<lora:ink:0.5:region=left>")
    assert visit.values[visit.part("place")] is None  # none of its three
    assert visit.do(visit.edit(place="painted")).endswith("<lora:ink:0.5:region=painted>")
    (asked,) = [one for one in visit.event("write", 1).outputs if one is visit.event("by_card").inputs[1]]
    assert visit.values[asked][0] == "ink"  # which is painted on the picture now
    assert visit.do(visit.edit(place="auto")) == TEXT


def test_what_the_prompt_was_comes_back_with_its_cards(drawn, loras):
    visit = Visit(drawn)
    visit.values |= {visit.rewrites: [TEXT]}
    moved = visit.do(visit.edit(slider=1.5))
    visit.values |= {visit.prompt: f"{moved} in snow"}
    visit.do(visit.send(visit.event("changed")))
    assert visit.values[visit.rewrites] == [TEXT, moved, f"{moved} in snow"]
    assert visit.do(visit.send(visit.event("undo"))) == moved
    assert visit.do(visit.send(visit.event("undo"))) == TEXT
    assert visit.values[visit.cards] == cards_of(TEXT, [], loras)
    assert visit.do(visit.send(visit.event("undo"))) == TEXT  # there is nothing before it


def test_events_are_answered_while_cards_are_drawn(drawn):
    """Which adds to the events and components of the visit that Gradio goes through."""
    from gradio.state_holder import SessionState

    visit = SessionState(drawn[-1]).blocks_config
    for held in (visit.fns, visit.blocks):
        before = len(held)
        for n, each in enumerate(held.values()):
            held[f"new {n}"] = each
        assert len(held) == 2 * before == len(list(held.items()))


def test_cards_go(drawn):
    visit = Visit(drawn)
    assert visit.do(visit.send(visit.event("removed"))) == "a fox <lora:ink:0.5>"
    assert visit.values[visit.cards] == drawn[0][1:]


def test_a_tick_changes_its_own_word_alone(drawn):
    """Also where the prompt was changed since the card was drawn."""
    visit = Visit(drawn)
    switched = visit.event("switched")
    ticked, chips = switched.inputs[:2]
    orange = TEXT.replace("a fox", "a fox, orange fur")
    assert visit.do(visit.send(switched, shown={chips: ["orange fur"]})) == orange
    assert visit.values[ticked]["ticked"] == ["orange fur"]
    assert visit.do(visit.send(switched, shown={chips: []})) == TEXT


def test_changes_that_are_sent_before_the_page_has_shown_the_last_one_add_up(drawn):
    visit = Visit(drawn)
    strength, stop, tick = visit.edit(slider=1.5), visit.edit(0, stop="7"), visit.send(visit.event("switched"))
    tick[1][1] = ["orange fur"]
    for answer in [visit.answer(sent) for sent in (strength, stop, tick)]:
        visit._put(answer)
    assert visit.values[visit.prompt] == "a fox, orange fur <lora:fox:0@0,1@0.4:stop=7> <lora:ink:1.5>"
    assert visit.do(visit.edit(slider=0.5)).endswith("<lora:ink:0.5>")
    assert visit.do(visit.edit(slider=1.5)) == "a fox, orange fur <lora:fox:0@0,1@0.4:stop=7> <lora:ink:1.5>"


def test_a_card_that_was_drawn_before_the_prompt_was_typed_changes_what_was_changed_in_it(drawn, loras):
    """Whoever types a strength into the prompt and clicks on a card, both at once."""
    visit = Visit(drawn)
    typed = "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:0.9>"
    visit.values |= {visit.prompt: typed, visit.cards: cards_of(typed, drawn[0], loras)}
    assert visit.do(visit.edit(stop="3")) == "a fox <lora:fox:0@0,1@0.4:stop=9> <lora:ink:0.9:stop=3>"
    assert (visit.values[visit.part("unet")], visit.values[visit.part("slider")]) == ("0.9", 0.9)


def test_a_card_that_is_edited_while_it_is_drawn_anew_is_drawn_with_the_edit(drawn, loras):
    visit = Visit(drawn)
    visit.do(visit.edit(stop="3"))
    assert visit.values[visit.shown] == SHOWN  # not for its own edit alone
    visit.values |= {visit.shown: {"cards": drawn[0], "at": 2}}
    text = visit.do(visit.edit(unet="2"))
    assert visit.values[visit.shown]["at"] > 2
    assert visit.values[visit.shown]["cards"] == visit.values[visit.cards] == cards_of(text, drawn[0], loras)


def test_a_tick_while_the_cards_are_drawn_anew_is_drawn_too(drawn):
    visit = Visit(drawn)
    visit.values |= {visit.shown: {"cards": drawn[0], "at": 2}}
    switched = visit.event("switched")
    ticked, chips = switched.inputs[:2]
    assert visit.do(visit.send(switched, shown={chips: ["orange fur"]})) == TEXT.replace("a fox", "a fox, orange fur")
    assert visit.values[visit.shown]["at"] > 2
    assert visit.values[ticked]["ticked"] == []  # as the card that is on its way shows


def test_cards_that_are_drawn_anew_keep_their_parts_and_events(loras, tmp_path):
    """Until the page shows the new ones, it sends what is clicked on the old ones."""
    from gradio.context import LocalContext
    from gradio.state_holder import SessionState

    blocks = built(loras, tmp_path)
    visit, renderable = SessionState(blocks).blocks_config, mixer_of(blocks)

    def events(text):
        LocalContext.blocks_config.set(visit)
        renderable.apply(SHOWN, text, cards_of(text, [], loras), [])
        return {number: event for number, event in visit.fns.items() if event.rendered_in is renderable}

    def parts(event):
        return event.fn.__name__, event.targets, [[one._id for one in side] for side in (event.inputs, event.outputs)]

    one = events("a fox <lora:fox:1>")
    two = events("a hat, ink <lora:fox:0.5> <lora:ink:1>")
    assert len(one) == 3
    assert len(two) == 6
    assert {number: parts(event) for number, event in one.items()} == {number: parts(two[number]) for number in one}


def test_a_field_that_is_left_as_it_was_and_a_card_that_is_gone_write_nothing(drawn):
    visit = Visit(drawn)
    left, late = visit.edit(), visit.edit(slider=1.5)
    for sent in (left, late):
        visit.values[visit.cards] = drawn[0] if sent is left else drawn[0][:1]
        *others, line = visit.answer(sent)
        assert all(value.get("__type__") == "update" and "value" not in value for _, value in others)
        assert line[1] == ""
    visit = Visit(drawn)
    answer = visit.answer(visit.edit(te="0.7"))
    visit.values |= {visit.part("start"): "2"}  # typed meanwhile
    visit._put(answer)
    assert visit.values[visit.part("start")] == "2"


def test_loras_that_are_found_are_added_to_the_prompt_as_it_is_by_then(drawn):
    visit = Visit(drawn)
    visit.do(visit.send(visit.event("found"), shown={visit.prompt: "a hat"}))
    add = visit.event("add")
    typed = {visit.prompt: "a red hat", visit.cards: []}
    assert visit.do(visit.send(add, shown=typed)) == "a red hat <lora:hat:1>"
    assert [card["name"] for card in visit.values[visit.cards]] == ["hat"]
    assert visit.do(visit.send(add, shown=typed)) == "a red hat"  # once


def test_a_lora_for_another_base_is_not_added(drawn, monkeypatch):
    from mole_app.studio.render import Studio

    visit = Visit(drawn)
    (chosen,) = [each for each in visit.events if each.fn.__name__ == "chosen" and len(each.inputs) == 4]
    found = visit.event("found")
    monkeypatch.setattr(Studio, "misfit", lambda studio, name: "it is made for Flux")
    for sent in (visit.send(chosen, shown={chosen.inputs[0]: "hat"}), visit.send(found, shown={visit.prompt: "a hat"})):
        answer = visit.answer(sent)
        assert answer[-1][1] == "**the LoRA 'hat' cannot be used here\\: it is made for Flux**"
        assert not any(isinstance(value, str) for _, value in answer[:-1])


def test_events_that_write_the_prompt_or_its_cards_wait_for_each_other(drawn):
    """Also the drawing of the cards; and what is changed while an event of the same kind is on its way is sent then."""
    visit, renderable = Visit(drawn), mixer_of(drawn[3])
    ours = {visit.prompt, visit.cards, visit.rewrites}
    events = [event for event in visit.events if ours & {*event.outputs}]
    names = "fill changed undo taken chosen add picked write switched removed used load reuse redraw put_around"
    assert {event.fn.__name__ for event in events} == {*names.split(), "as_things"}
    events += [event for event in drawn[3].fns.values() if event.renderable is renderable]
    assert {(event.concurrency_id, event.concurrency_limit) for event in events} == {("prompt", 1)}
    last = {event.fn.__name__ for event in events if event.trigger_mode == "always_last"}
    assert last >= {"changed", "write", "switched"}


def test_a_card_listens_to_its_own_parts_alone(drawn):
    """When the cards are drawn anew, a change of the rest of the page would call an event that is gone."""
    *_, of_cards, blocks = drawn
    outside = {one._id for event in blocks.fns.values() if event not in of_cards for one in event.inputs}
    listened = {number for event in of_cards for number, _ in event.targets}
    assert listened
    assert not listened & outside


def test_what_a_lora_does_is_written_on_its_card_and_nothing_else():
    from mole_app.web.mixer import lines

    style = lines({"fox": 'Acts on "</style>{}"'}, [{"name": "ink"}, {"name": "fox"}])
    assert style.count("{") == style.count("}") == 2
    assert style.count("<") == 2
    assert '.card.n0 .rest > button::before { content: ""; }' in style
    assert r'.card.n1 .rest > button::before { content: "Acts\000020on\000020\000022\00003c' in style
