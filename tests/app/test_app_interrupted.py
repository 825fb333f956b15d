"""Jobs that were waiting or running when the app ended are offered again by the next one."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from app_client import PROMPT, plain
from PIL import Image

from mole_diffusers.app.actions import Actions
from mole_diffusers.studio.catalog import Catalog
from mole_diffusers.studio.recipe import Recipe
from mole_diffusers.studio.render import Studio
from mole_diffusers.testing import tiny_pipeline

pytest.importorskip("gradio")
from mole_diffusers.app import draw_over
from mole_diffusers.app.jobs import Jobs, StoppedError, ignore
from mole_diffusers.app.paint import COLOUR, OPACITY

RECIPE = Recipe(PROMPT, seed=3, steps=2, width=32, height=32, gates="sum", base="tiny")
REQUEST = type("Request", (), {"session_hash": "page"})()


class App:
    """An app on folders that outlive it; its functions of a tab are called as the page calls them."""

    def __init__(self, loras, folder):
        from mole_diffusers.app.build import build

        studio = Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")
        self.actions = Actions(studio, home=folder / "gates", gallery=folder / "pictures")
        self.events = [event for event in build(self.actions, RECIPE).fns.values() if event.fn]

    def event(self, name, first):
        """The first event whose function is called so, and whose first output has this place in the page."""
        return self.every(name, first)[0]

    def every(self, name, first):
        return [e for e in self.events if e.fn.__name__ == name and e.outputs[0].elem_id == first]

    def begin(self, kind, **fields):
        """Press the button; fields by their label. The events of the job."""
        event = self.event("begin", f"{kind}-status")
        labels = [getattr(component, "label", None) for component in event.inputs[1:]]
        values = [component.value for component in event.inputs[1:]]
        for label, value in fields.items():
            values[labels.index(label)] = value
        return plain(event)(REQUEST, "me", *values)

    def offered(self, kind, visitor="me"):
        row, said, self.offer = plain(self.event("show", f"{kind}-interrupted"))(visitor)
        return said.replace("\\", "") if row["visible"] else ""

    def again(self, kind, editor=None):
        """The events of the job once the offer is taken."""
        return plain(self.every("begin", f"{kind}-status")[-1])(REQUEST, "me", self.offer, editor)

    def said_again(self, kind, editor=None):
        """What the page says last of it."""
        *_, (said, *_) = self.again(kind, editor)
        return said

    def forget(self, kind):
        return plain(self.event("drop", f"{kind}-interrupted"))("me", self.offer)


def killed(app, *presses):
    """Press buttons while the app's pipeline is busy until the event that this returns, as if the app was ended there."""
    held = threading.Event()
    draw = app.actions.studio.draw

    def wait_and_draw(*args, **options):
        if not held.wait(60):
            raise StoppedError
        return draw(*args, **options)

    app.actions.studio.draw = wait_and_draw
    for press in presses:
        next(press())
    return held


@pytest.fixture
def apps(loras, tmp_path):
    return lambda: App(loras, tmp_path)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_pictures_that_were_not_drawn_are_offered_and_drawn_as_they_were_asked_for(apps, tmp_path):
    first = apps()
    killed(first, lambda: first.begin("compose", Seed=5, Pictures=2), lambda: first.begin("compose", Prompt="a hat"))
    assert first.offered("compose") == ""  # they are in its queue
    second = apps()
    assert second.offered("compose", "you") == ""
    assert second.offered("compose") == f"“{PROMPT}”, 2 pictures, was interrupted when the app ended. One of 2."
    assert second.said_again("compose") == "done"
    drawn = sorted((tmp_path / "pictures").glob("*.png"))
    wanted = second.actions.compose(Recipe(PROMPT, seed=5, steps=2, width=32, height=32, gates="sum"), 2)(lambda _: None)
    assert [pixels(path).tolist() for path in drawn] == [pixels(p.path).tolist() for p in wanted.pictures]
    assert second.offered("compose") == "“a hat” was interrupted when the app ended."
    row, *_ = second.forget("compose")
    assert not row["visible"]
    assert apps().offered("compose") == ""
    assert "started again or forgotten" in second.said_again("compose")


def test_a_page_takes_what_it_offers_and_nothing_that_another_one_has_left(apps):
    """Two pages of one visitor that offer the same job."""
    first = apps()
    killed(first, lambda: first.begin("compose", Prompt="a hat"), lambda: first.begin("compose", Prompt="a sea"))
    second = apps()
    assert second.offered("compose").startswith("“a hat”")
    second.forget("compose")
    row, said, offer = second.forget("compose")  # of the page that still shows it
    assert row["visible"]
    assert said.startswith("“a sea” was interrupted")
    assert "started again or forgotten already" in second.said_again("compose")
    second.offer, kept = offer, second.actions.home / ".jobs"
    held = killed(second, lambda: second.begin("compose"))
    assert next(second.again("compose"))[0].startswith("waiting")
    assert "started again" in next(second.again("compose"))[0]
    assert len(list(kept.rglob("*-compose.json"))) == 2
    other = Jobs(kept)
    path = other.left("me", "compose")[0]
    other.submit("me", "compose", ignore, file=path)
    with pytest.raises(ValueError, match="started again already"):  # by another page, at the same moment
        other.submit("me", "compose", ignore, file=path)
    held.set()


def test_what_is_over_or_cancelled_is_not_offered(apps):
    app = apps()
    *_, last = app.begin("compose", Prompt="a hat")
    assert last[0] == "done"
    held = killed(app, lambda: app.begin("compose"), lambda: app.begin("compose", Prompt="a hat"))
    later = apps()
    assert later.offered("compose") != ""
    app.event("cancel", "compose-status").fn(REQUEST, "me")
    assert later.offered("compose").startswith(f"“{PROMPT}”")
    assert "One of" not in later.offered("compose")
    held.set()


@pytest.mark.thorough
@pytest.mark.parametrize("painted", [True, False])
def test_a_picture_that_was_drawn_over_is_asked_for_and_its_paint_is_kept(apps, tmp_path, painted):
    photo = Image.effect_noise((32, 32), 90).convert("RGBA")
    plain = {"background": photo, "layers": [], "composite": None}
    layer = Image.new("RGBA", photo.size)
    layer.paste((*COLOUR, OPACITY), (3, 5, 20, 30))
    editor = plain | {"layers": [layer]} if painted else plain
    first = apps()
    killed(first, lambda: first.begin("compose", Steps=4, **{"To draw over": editor}))
    second = apps()
    assert second.offered("compose") != ""
    assert "needs the picture that it was made with" in second.said_again("compose")
    other = plain | {"background": photo.rotate(90)}
    assert "made with another picture" in second.said_again("compose", other)
    assert second.offered("compose") != ""
    assert second.said_again("compose", plain).startswith("done; drawn over ")
    assert second.offered("compose") == ""
    (file,) = (tmp_path / "pictures").glob("*.png")
    (wanted,) = second.actions.compose(replace(RECIPE, steps=4), 1, draw_over.pictures(editor))(lambda _: None).pictures
    assert pixels(file).tolist() == pixels(wanted.path).tolist()


@pytest.mark.thorough
def test_what_cannot_be_used_is_said_in_one_sentence_and_stays(apps, tmp_path):
    first = apps()
    killed(first, lambda: first.begin("compose"))
    (file,) = (tmp_path / "gates" / ".jobs").rglob("*-compose.json")
    whole = file.read_text()

    def again():
        app = apps()
        assert app.offered("compose") != ""
        return app.said_again("compose").replace("\\", "")

    for text, reason in (
        ("{", "is not JSON"),
        ("{}", "another release"),
        (whole.replace('"steps"', '"stops"'), "unknown fields"),
    ):
        file.write_text(text)
        said = apps().offered("compose")
        assert said.startswith("A job was interrupted when the app ended, and what was kept of this job cannot be used: ")
        assert reason in said
        assert str(tmp_path) not in said
        assert "cannot be used" in again()
        assert file.exists()
    file.write_text(whole.replace('"base": "tiny"', '"base": "flux"'))
    assert "for the base model 'flux', and here is 'tiny'" in again()
    file.write_text(whole)
    assert again() == "done"
    assert not file.exists()


@pytest.mark.thorough
def test_a_training_goes_on_from_its_last_checkpoint(apps, tmp_path):
    fields = {"Name of the gates": "mine", "Prompts of one LoRA each": "fox=a fox\nink=ink", "Updates": 40}
    fields["Prompts with all of them"] = "a fox in ink"
    first = apps()
    events = first.begin("train", **fields)
    said = next(events)[0]
    while not said.startswith("update "):
        said = next(events)[0]
    (file,) = (tmp_path / "gates" / ".jobs").rglob("*-train.json")
    kept = file.read_text()
    first.event("cancel", "train-status").fn(REQUEST, "me")  # which lets go of the folder, as the end of the app does
    *_, last = events
    assert last[0].startswith("stopped")
    assert not file.exists()
    file.write_text(kept)
    run = tmp_path / "gates" / ".runs" / "mine" / "run.json"
    begun = run.stat().st_mtime_ns
    second = apps()
    assert second.offered("train") == "The training **mine** was interrupted when the app ended."
    updates = [said for said, *_ in second.again("train")]
    assert updates[-1].startswith("done")
    assert run.stat().st_mtime_ns == begun  # nothing was begun anew
    assert int(next(said for said in updates if said.startswith("update ")).split()[1]) > 5
    assert "mine" in second.actions.studio.catalog.gates
    assert second.offered("train") == ""
