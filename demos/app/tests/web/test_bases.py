"""Another base model while the app runs: through the API, and as the pages of several visitors see it."""

import dataclasses
import shutil
import threading

import hosts
import numpy as np
import pytest
from app_client import PROMPT, QueueVisit, kept_fields, launched, plain
from PIL import Image
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.base_models import Base
from mole_app.studio.catalog import Catalog
from mole_app.studio.memory import Memory
from mole_app.studio.names import shared_name
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions
from mole_app.web.jobs import ignore

gr = pytest.importorskip("gradio")
BASES = {"dream": "models/dream.safetensors", "flux": "models/flux", "broken": "models/broken"}


def opening(source):
    if source == BASES["broken"]:
        raise ValueError("models/broken has no VAE")
    return Base(hosts.flux() if source == BASES["flux"] else tiny_pipeline(), source, Memory("cpu"))


@pytest.fixture
def actions(loras, tmp_path):
    studio = Studio(tiny_pipeline(), Catalog(dict(loras), {}), BASES["dream"])
    return Actions(studio, home=tmp_path / "gates", gallery=tmp_path / "pictures", bases=BASES, opening=opening)


@pytest.fixture
def blocks(actions):
    from mole_app.web.build import build

    return build(actions, Recipe(PROMPT, steps=2, width=48, height=32, gates="auto", base=BASES["dream"]))


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.thorough
def test_the_api_changes_the_base_and_the_gallery_stays(blocks, tmp_path):
    from gradio_client import handle_file

    with launched(blocks, tmp_path) as client:
        assert tuple(client.predict(api_name="/bases")) == ("dream", ["dream", "flux", "broken"])
        (first,), *_ = client.predict(PROMPT, api_name="/compose")
        assert client.predict("FLUX", api_name="/base") == "flux"
        (other,), (recipe,), _ = client.predict("a fox", prompt_2="a hat", api_name="/compose")
        own = {"base": BASES["flux"], "width": 256, "height": 256, "guidance": 3.5, "prompt_2": "a hat"}
        assert {name: recipe[name] for name in own} == own
        assert not np.array_equal(pixels(other), pixels(first))
        with pytest.raises(Exception, match="has no VAE"):
            client.predict("broken", api_name="/base")
        with pytest.raises(Exception, match="there is no base model 'gone'; known: dream, flux, broken"):
            client.predict("gone", api_name="/base")
        assert client.predict(api_name="/bases")[0] == "flux"
        assert np.array_equal(pixels(client.predict(recipe, api_name="/redraw")), pixels(other))
        assert client.predict("dream", api_name="/base") == "dream"
        read, notes = client.predict(handle_file(other), api_name="/read")
        assert read == recipe
        assert "it was drawn with the base 'flux', and here is 'dream'" in notes
        train = ("mine", {"fox": ["a fox"], "ink": ["ink"]}, ["a fox in ink"], 1)
        calls = {
            "redraw": (),
            "compare": (),
            "look": (),
            "grid": ("seed=1", "seed=1"),
            "code": (),
            "export": (),
            "train": train,
        }
        for name, rest in calls.items():
            with pytest.raises(Exception, match="this is for the base model 'flux', and here is 'dream': change it first"):
                client.predict(read, *rest, api_name=f"/{name}")
        (again,), *_ = client.predict(PROMPT, api_name="/compose")
        assert np.array_equal(pixels(again), pixels(first))
        kept, about = client.predict(api_name="/gallery")
        used = [shared_name(BASES[name]) for name in ("dream", "flux", "flux", "dream")]
        assert [entry["recipe"]["base"] for entry in about] == used


def test_jobs_that_were_asked_for_before_are_drawn_with_the_old_base(actions, tmp_path):
    """The change waits for them; one that comes after it was asked for must be asked for again."""
    from mole_app.web.jobs import Jobs

    jobs, held = Jobs(), threading.Event()
    recipe = Recipe(PROMPT, steps=1, width=32, height=32, gates="sum")
    jobs.submit("me", "hold", lambda report: held.wait(60))
    before = jobs.submit("me", "compose", actions.compose(recipe, 1))
    change = jobs.submit("you", "base", actions.bases.change("flux"))
    after = jobs.submit("me", "compose", actions.compose(recipe, 1))
    held.set()
    *_, _ = jobs.follow(after)
    assert infotext.read(before.event.pictures[0].path).base == shared_name(BASES["dream"])
    assert (change.state, str(change.event)) == ("done", "flux is open: FluxPipeline")
    assert str(after.error) == (
        "this was meant for the base model 'dream.safetensors', and now 'flux' is here: start it again"
    )
    with pytest.raises(ValueError, match="there is no base model 'gone'"):
        actions.bases.change("gone")


def test_a_training_for_another_base_is_refused(actions):
    from mole_app.web.gate_training import TrainingRequest, train

    request = TrainingRequest("mine", {"fox": ["a fox"], "ink": ["ink"]}, ["a fox in ink"], steps=1)
    recipe = Recipe(PROMPT, steps=1, width=32, height=32)
    work = train(actions.studio, recipe, request, home=actions.home)
    actions.bases.change("flux")(ignore)
    with pytest.raises(ValueError, match="was meant for the base model 'dream.safetensors'"):
        work(ignore)
    assert not (actions.home / "mine").exists()


def page(name):
    return type("Request", (), {"session_hash": name})()


def is_left(value):
    return isinstance(value, dict) and value.get("__type__") == "update" and "value" not in value


def event_of(blocks, name, first):
    """An event whose function has this name, and whose first inputs have these labels."""
    labels = lambda event: [getattr(component, "label", None) for component in event.inputs[1 : 1 + len(first)]]  # noqa: E731
    return next(e for e in blocks.fns.values() if e.fn is not None and e.fn.__name__ == name and labels(e) == first)


def test_pictures_know_their_base_among_those_of_one_name_and_tell_no_folder(loras, tmp_path):
    from mole_app.web.build import build

    def app(bases):
        studio = Studio(tiny_pipeline(), Catalog(dict(loras), {}), next(iter(bases.values())))
        return Actions(studio, gallery=tmp_path / "pictures", bases=bases, opening=opening)

    def noted(actions, path):
        load = plain(next(e for e in build(actions, Recipe(PROMPT)).fns.values() if e.fn and e.fn.__name__ == "load"))
        shutil.copy(path, tmp_path / "dropped.png")
        return "was drawn with the base 'new', and here is 'old'" in load(str(tmp_path / "dropped.png"))[-1].replace(
            "\\", ""
        )

    bases = {name: str(tmp_path / "jane" / name / "dream.safetensors") for name in ("new", "old")}
    actions = app(bases)
    picture = actions.compose(Recipe(PROMPT, steps=1, width=32, height=32), 1)(ignore).pictures[0]
    assert b"jane" not in picture.path.read_bytes()
    read = infotext.read(picture.path)
    for base in (read.base, bases["new"]):  # of today, and of before
        assert (actions.bases.other(base), app({"new": bases["new"]}).bases.other(base)) == (None, None)
    assert not noted(actions, picture.path)
    assert np.array_equal(np.asarray(actions.studio.draw(read)), pixels(picture.path))
    actions.bases.change("old")(ignore)
    for base in (read.base, bases["new"]):
        with pytest.raises(ValueError, match="this is for the base model 'new', and here is 'old': change it first"):
            actions.bases.check(base, "change it first")
    assert noted(actions, picture.path)
    assert app({"dream": "/elsewhere/dream.safetensors"}).bases.other(read.base) is None  # by its name, on another machine
    assert app({"toon": "/elsewhere/toon.safetensors"}).bases.other(read.base) == "dream.safetensors"


@pytest.mark.parametrize("names", [["dream_v1"], ["dream_v1", "toon"]])
def test_the_page_names_its_base(loras, names):
    """As text where there is nothing to choose."""
    from mole_app.web.build import build

    bases = {name: f"{name}.safetensors" for name in names}
    actions = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "dream_v1.safetensors"), bases=bases)
    by_id = {getattr(one, "elem_id", None): one for one in build(actions, Recipe(PROMPT)).blocks.values()}
    choice = by_id["base"]
    assert choice.value == "dream_v1"
    assert [choice.visible, "base-name" in by_id] == [len(names) > 1, len(names) == 1]
    if len(names) == 1:
        assert by_id["base-name"].value.replace("\\", "") == "Base model: dream_v1"


def test_a_page_follows_the_change_and_others_are_told(blocks, actions):
    change = event_of(blocks, "begin", ["Base model"])
    labels = [component.label for component in change.outputs[1:]]
    *_, last = plain(change)(page("mine"), "me", "flux")
    said, *shown = last
    now = dict(zip(labels, shown, strict=True))
    assert said.replace("\\", "") == "flux is open: FluxPipeline"
    assert (now["Base model"], now["Width"], now["Height"], now["Guidance (CFG scale)"]) == ("flux", 0, 0, 3.5)
    assert (now["Sampler"]["choices"], now["Sampler"]["value"]) == (["default", "Euler"], "default")
    other = QueueVisit(blocks, "you", page("other"), Prompt="a fox", **{"Base model": "dream"})
    assert "this is for the base model 'dream', and here is 'flux': wait until it" in other.press().replace("\\", "")
    other.edits["Base model"] = "flux"
    assert other.press() == ""
    assert other.done()["compose-status"] == "done"


def test_a_second_prompt_is_asked_for_where_the_base_reads_one(blocks, actions):
    panel = "Another prompt for the second text encoder"

    def shown(event, values):
        return dict(zip([getattr(component, "label", None) for component in event.outputs], values, strict=True))[panel]

    opened = next(event for event in blocks.fns.values() if event.fn is not None and event.fn.__name__ == "now")
    change = event_of(blocks, "begin", ["Base model"])
    visit = QueueVisit(blocks, "me", page("mine"), Prompt="a fox", **{"Prompt 2": "a hat"})
    assert shown(opened, plain(opened)())["visible"] == "hidden"
    visit.press()
    said = visit.done()["compose-status"].replace("\\", "")
    assert said == "done; StableDiffusionPipeline is drawn without a second prompt"
    *_, last = plain(change)(page("mine"), "me", "flux")
    assert shown(change, last)["visible"] is True
    assert shown(opened, plain(opened)())["visible"] is True
    visit.edits["Base model"] = "flux"
    visit.press()
    assert visit.done()["compose-status"] == "done"
    drawn = actions.gallery.entries(text="hat")[0]
    assert (drawn.recipe.prompt_2, drawn.recipe.base) == ("a hat", BASES["flux"])
    without = actions.studio.draw(dataclasses.replace(drawn.recipe, prompt_2=""))
    assert not np.array_equal(np.asarray(without), pixels(drawn.path))


def test_a_page_that_is_opened_after_the_change_has_the_new_base(blocks, actions):
    enter = next(event for event in blocks.fns.values() if event.fn is not None and event.fn.__name__ == "enter")
    labels = [getattr(component, "label", None) for component in kept_fields(blocks)]
    old = [component.value for component in kept_fields(blocks)]
    old[labels.index("Base model")] = "dream"
    old[labels.index("Prompt")] = "a hat"
    old[labels.index("Sampler")] = "Euler"
    actions.bases.change("flux")(ignore)
    page = type("Request", (), {"session_hash": "page"})()
    fresh = dict(zip(labels, plain(enter)(page, "", None)[1], strict=True))
    assert (fresh["Base model"], fresh["Width"], fresh["Guidance (CFG scale)"]) == ("flux", 0, 3.5)
    back = dict(zip(labels, plain(enter)(page, "me", old)[1], strict=True))
    sizes = [back[name] for name in ("Width", "Height", "Guidance (CFG scale)")]
    assert (back["Base model"], back["Prompt"], back["Sampler"], sizes) == ("flux", "a hat", "Euler", [0, 0, 3.5])
    old[labels.index("Sampler")], old[labels.index("Gates")] = "DDIM", "gone"  # which Flux has not
    again = plain(enter)(page, "me", old)[1]
    assert again[labels.index("Gates")] == "auto"
    assert dict(zip(labels, again, strict=True)) == back | {"Sampler": "default"}
    old[labels.index("Base model")], old[labels.index("Sampler")], old[labels.index("Gates")] = "flux", "Euler", "auto"
    again = dict(zip(labels, plain(enter)(page, "me", old)[1], strict=True))
    assert again["Width"] == 48  # what was typed for it stays


def test_a_base_that_cannot_be_opened_is_said_and_the_choice_goes_back(blocks, actions):
    change = event_of(blocks, "begin", ["Base model"])
    *_, last = plain(change)(page("mine"), "me", "broken")
    assert last[0].replace("\\", "") == "**models/broken has no VAE**"
    assert last[1] == "dream"
    assert all(map(is_left, last[2:]))
    resume = [
        e for e in blocks.fns.values() if e.fn is not None and e.fn.__name__ == "resume" and e.outputs == change.outputs
    ]
    *_, last = plain(resume[0])(page("reloaded"), "me")  # after a reload fields stay as they are
    assert all(map(is_left, last[1:]))


def test_after_two_failures_a_page_can_choose_the_old_base_again(actions, blocks):
    change = event_of(blocks, "begin", ["Base model"])
    actions.bases._opening = lambda source: opening(BASES["broken"])
    *_, last = plain(change)(page("mine"), "me", "flux")
    assert "cannot be opened again" in last[0]
    assert (actions.bases.open, last[1]["value"]) == (None, None)  # the page shows none, so that any can be chosen
    assert "no base model is open" in QueueVisit(blocks, "you", page("other")).press()
    actions.bases._opening = opening
    *_, last = plain(change)(page("mine"), "me", "dream")
    assert (actions.bases.open, last[1]) == ("dream", "dream")


def test_the_command_takes_several_bases(loras, tmp_path, monkeypatch, capsys):
    """A folder of models, and one beside it; each says how it was opened, and what it cannot."""
    from mole_app.web import build
    from mole_cli.mole import main

    tiny_pipeline().save_pretrained(tmp_path / "models" / "checkpoints" / "dream")
    hosts.flux().save_pretrained(tmp_path / "flux")
    built = []
    monkeypatch.setattr(build, "build", lambda *given: built.extend(given))
    monkeypatch.setattr(build, "launch", lambda *_, **__: None)
    files = str(next(iter(loras.values())).parent)
    bases = ["--base", str(tmp_path / "models"), "--base", str(tmp_path / "flux")]
    assert main(["app", *bases, "--loras", files, "--device", "cpu", "--keep", str(tmp_path / "gates")]) == 0
    assert capsys.readouterr().err.splitlines()[-1].endswith("dream: StableDiffusionPipeline, cpu, float32")
    actions, recipe = built
    assert (actions.bases.open, list(actions.bases.sources), recipe.width) == ("dream", ["dream", "flux"], 0)
    actions.bases.change("flux")(ignore)
    said = capsys.readouterr().err.splitlines()
    assert said[-2].endswith("flux: FluxPipeline, cpu, float32")
    assert said[-1].startswith(
        "note: pictures can be drawn, but training on this page needs a UNet, and FluxPipeline has none"
    )
    assert actions.studio.base.pipe._progress_bar_config["disable"]
    assert actions.bases.settings()["guidance"] == 3.5
    assert main(["app", *bases, "--base-config", str(tmp_path / "flux"), "--loras", files]) == 1
    assert "--base-config is the config of one model, and these are 2: dream, flux" in capsys.readouterr().err
    assert main(["app", "--base", str(tmp_path / "gone.safetensors"), "--loras", files]) == 1
    assert "there is no model 'gone' in" in capsys.readouterr().err
