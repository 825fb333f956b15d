"""The queue of a page without a browser: one button, the list, and what a reloaded or second page sees."""

from pathlib import Path

import pytest
from app_client import QueueVisit, built
from PIL import Image

from mole_app.studio import infotext

gr = pytest.importorskip("gradio")
SECOND = type("Request", (), {"session_hash": "second"})()


@pytest.fixture
def blocks(loras, tmp_path):
    return built(loras, tmp_path)


def label(shown):
    return shown["compose"]["value"]


def titles(shown):
    return [row["title"] for row in shown[3]]


def long(blocks, **more):
    return QueueVisit(blocks, **{"Steps": 150, "Pictures": 16, **more})


def test_a_picture_is_drawn_previewed_and_kept_in_one_frame(blocks):
    visit, seen = QueueVisit(blocks, **{"Steps": 150}), []

    def finished(shown):
        seen.append((type(shown.get("picture")), shown.get("frame"), label(shown)))
        return str(shown.get("compose-status", "")).startswith("done")

    assert visit.press("pressed", "Compose") == ""
    shown = visit.see(finished)
    assert infotext.read(shown["picture"]).steps == 150
    assert Path(shown["picture"]).name == shown[6]  # which is the one that the tools use
    assert [Path(small).stem for small, _ in shown["strip"]] == [Path(shown["picture"]).stem]
    previews = {frame for kind, frame, _ in seen if kind is Image.Image}
    (shape,) = previews
    assert shown["frame"].startswith(shape)  # nothing jumps
    assert f'#strip img[src*="/{Path(shown["picture"]).stem}."]' in shown["frame"]  # it is marked
    assert "--wide: 32; --high: 32" in shown["frame"]
    assert [said for *_, said in seen][-1] == "Compose"
    assert "Cancel" in [said for *_, said in seen]


def test_the_one_button_cancels_the_picture_that_is_drawn_and_the_next_begins(blocks):
    visit = long(blocks)
    for _ in range(3):
        assert visit.press() == ""
    visit.see(lambda shown: " steps" in str(shown.get("compose-status", "")) and len(titles(shown)) == 3)
    assert label(visit.shown) == "Cancel"
    assert titles(visit.shown) == ["a fox in ink, seed 0, 16 pictures"] * 3
    before = [row["number"] for row in visit.shown[3]]
    assert visit.press("pressed", "Cancel") == ""
    visit.see(lambda shown: [row["number"] for row in shown[3]] == before[1:])
    for left in (before[2:], []):
        visit.press("pressed", "Cancel")
        visit.see(lambda shown, left=left: [row["number"] for row in shown[3]] == left)
    assert label(visit.shown) == "Compose"
    assert visit.press("pressed", "Cancel") == "nothing of yours is running"


def test_a_picture_that_is_cancelled_half_drawn_gives_way_to_the_last_finished_one(blocks):
    def cancelled(visit):
        visit.press()
        visit.see(lambda shown: isinstance(shown.get("picture"), Image.Image))
        assert "#strip" not in visit.shown["frame"]  # no finished one is shown
        visit.press("pressed", "Cancel")
        return visit.see(lambda shown: str(shown["compose-status"]).startswith("stopped after 0"))

    empty = cancelled(long(blocks))
    assert (empty["picture"], empty[6]) == (None, "")
    visit = QueueVisit(blocks)
    visit.press()
    finished = visit.done()["picture"]
    visit.edits = {"Steps": 150}
    shown = cancelled(visit)
    assert (shown["picture"], shown[6]) == (finished, Path(finished).name)
    assert f"/{Path(finished).stem}." in shown["frame"]


def test_a_reloaded_page_and_a_second_one_see_the_same_queue_and_nobody_else_does(blocks):
    visit, second = long(blocks), QueueVisit(blocks, request=SECOND)
    visit.press()
    visit.press()
    for one in (visit, second):
        one.see(lambda shown: "left" in str(shown.get("compose-status", "")) and len(titles(shown)) == 2)
    stranger = QueueVisit(blocks, visitor="you", request=SECOND)
    assert titles(stranger.see(lambda shown: True)) == []
    assert label(stranger.shown) == "Compose"
    assert stranger.press("pressed", "Cancel") == "nothing of yours is running"
    for left in (1, 0):
        second.press("pressed", "Cancel")
        visit.see(lambda shown, left=left: len(titles(shown)) == left)
    assert label(visit.shown) == "Compose"


def test_a_job_that_began_while_the_page_opened_is_found_by_the_next_page(blocks):
    early = long(blocks, visitor="")
    early.press()
    (enter,) = [event.fn for event in blocks.fns.values() if event.fn and event.fn.__name__ == "enter"]
    enter(early.request, "me", None)
    early.press()  # sent before the page knew its visitor
    later = QueueVisit(blocks, request=SECOND)
    assert len(titles(later.see(lambda shown: True))) == 2
    for left in (1, 0):
        early.press("pressed", "Cancel")
        later.see(lambda shown, left=left: len(titles(shown)) == left)


def test_what_the_button_does_is_said_by_what_watches_the_queue_alone(blocks):
    """The answer to a press may come after the picture is done, and would leave a button that cancels nothing."""
    writers = {event.fn.__name__ for event in blocks.fns.values() for each in event.outputs if each.elem_id == "compose"}
    assert writers == {"watch"}


def test_a_page_that_is_opened_later_shows_the_newest_picture_of_the_gallery(blocks):
    first = QueueVisit(blocks)
    first.press()
    picture = first.done()["picture"]
    later = QueueVisit(blocks, visitor="you")
    assert later.see(lambda shown: True)["picture"] == picture
    Path(picture).unlink()
    assert QueueVisit(blocks, visitor="they").see(lambda shown: True)["picture"] is None


def test_wrong_fields_are_said_and_nothing_is_started(blocks):
    visit = QueueVisit(blocks, **{"Prompt": "a <lora:gone:1>"})
    assert visit.press().replace("\\", "").startswith("**there is no LoRA 'gone'; known: fox")
    assert titles(visit.see(lambda shown: True)) == []


def test_what_a_lora_without_its_words_does_is_said_of_it_by_its_name(blocks):
    visit = QueueVisit(blocks, **{"Prompt": "a hat <lora:fox:1:word=hen> <lora:ink:1:word=owl>"})
    visit.press()
    said = visit.done()["compose-status"].replace("\\", "")
    assert said.startswith("done; 'fox' acts everywhere: the prompt has none of its words, hen; 'ink' acts")


def test_an_emptied_seed_is_a_random_one(blocks):
    seeds = set()
    for _ in range(2):
        visit = QueueVisit(blocks, **{"Seed": None})
        visit.press()
        number = len(visit.see(lambda shown: titles(shown) == [])["strip"])
        seeds.add(infotext.read(visit.done()["picture"]).seed)
    assert (len(seeds), number) == (2, 2)


def starts(blocks, event):
    """The components and actions that an event follows."""
    return {(blocks.blocks[number].elem_id, kind) for number, kind in event.targets if number is not None}


def test_what_covers_the_picture_goes_when_one_is_composed(blocks):
    closing = [event for event in blocks.fns.values() if [each.elem_id for each in event.outputs] == ["browser"]]
    composing = {("compose", "click"), ("queue-more", "click"), ("prompt", "submit")}
    (event,) = [event for event in closing if starts(blocks, event) == composing]
    assert event.fn()["visible"] is False


def test_the_size_that_is_said_follows_the_prompt_whoever_writes_it(blocks):
    (told,) = [
        event for event in blocks.fns.values() if event.fn and event.fn.__name__ == "told" and len(event.outputs) == 5
    ]
    assert ("prompt", "change") in starts(blocks, told)
