"""Gate training in the app: it says what it does, goes on, starts over, and measures what it was worth."""

from contextlib import suppress
from dataclasses import replace

import hosts
import numpy as np
import pytest
from app_client import PROMPT, built, plain
from tiny import tiny_lora, tiny_pipeline

from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_app.web import held_out
from mole_app.web.gate_training import TrainingRequest, train
from mole_app.web.jobs import StoppedError, ignore
from mole_app.web.training_runs import GatesExistError
from mole_diffusers.binding.config import Bound, files_bindings
from mole_diffusers.gates import load_gates
from mole_diffusers.mixture import attach, attached
from mole_diffusers.patching.subjects.tiles import Tiles
from mole_diffusers.safe_files import read_json
from mole_diffusers.training import GateTraining, TrainingData, train_gates

pytest.importorskip("gradio")
TEACHERS = [("collage", ["ink"], 1), ("collage", [], 2), ("blend", [], 1), ("blend", ["ink"], 2)]
RECIPE = Recipe(PROMPT, steps=2, width=32, height=32)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def blocks(loras, home):
    return built(loras, home)


@pytest.fixture
def studio(loras):
    return Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")


def request(name="g", **changes):
    return TrainingRequest(
        name, **{"singles": {"fox": ["a fox in ink"], "ink": ["ink"]}, "composed": ["fox in ink"], "steps": 8} | changes
    )


def run(studio, home, wanted=None, *, stop=lambda state: False, again="", prompt=PROMPT):
    """The last progress, and everything that was said on the way."""
    said, last = [], []

    def report(state):
        last[:] = [state]
        if not said or said[-1] != str(state):
            said.append(str(state))
        if stop(state):
            raise StoppedError

    work = train(studio, Recipe(prompt, steps=2, width=32, height=32), wanted or request(), home=home, again=again)
    with suppress(StoppedError):
        last[:] = [work(report)]
    assert len(studio.base.pipe.unet._forward_pre_hooks) == 3  # the mixture's own
    return last[0], said


def test_it_says_what_it_does_from_the_first_second_to_the_verdict(studio, tmp_path):
    last, said = run(studio, tmp_path, request(steps=4))
    assert said[0] == "starting"
    assert said[1] == "drawing on seeds that the training will not see, before it"
    counted = [line for line in said if line.startswith("drawing the teachers' pictures")]
    assert counted[0] == "drawing the teachers' pictures, 0 of 24"
    assert counted[-1] == "drawing the teachers' pictures, 24 of 24"
    assert any(line.startswith("update 4 of 4, loss ") for line in said)
    assert str(last).startswith("done: on 4 seeds that the training did not see, the error to the teachers' pictures is ")
    labels = [label for _, label in last.pictures]
    assert [label for label in labels if "updates" not in label] == [
        "before, seed 1000", "before, seed 1001", "before, seed 0", "after, seed 1000", "after, seed 1001"
    ]  # fmt: skip
    assert [label for label in labels if "updates" in label] == [f"after {n} updates, seed 0" for n in (1, 2, 3, 4)]
    assert studio.catalog.gates["g"] == tmp_path / "g"


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["collage", "blend"])
def test_loras_are_bound_as_their_tags_say(studio, tmp_path, recwarn, way):
    prompt = "a beast in ink <lora:fox:1:word=beast:region=left> <lora:ink:1>"
    singles = {"fox": ["a beast in ink"], "ink": ["ink"]}
    run(studio, tmp_path, request(singles=singles, composed=["beast in ink"], steps=1, way=way), prompt=prompt)
    assert attached(studio.base.pipe).binding["fox"] == Bound(("beast",), "left")
    assert not [w for w in recwarn if "no trigger" in str(w.message)]


@pytest.mark.parametrize(("binding", "bound"), [("none", (False, False)), ("bound", (True, False)), ("auto", (True, True))])
def test_it_binds_and_draws_in_tiles_as_the_recipe_says(studio, tmp_path, monkeypatch, binding, bound):
    """At a size that has room for tiles. Only what is not bound is taught otherwise, so the other runs go on."""
    in_tiles, denoise = [], Tiles._denoise

    def stop(state):
        if state.pictures:
            raise StoppedError

    monkeypatch.setattr(Tiles, "_denoise", lambda self, *args, **named: in_tiles.append(1) or denoise(self, *args, **named))
    prompt, singles = "a fox and a hen <lora:fox:1:word=fox> <lora:ink:1:word=hen>", {"fox": ["a fox"], "ink": ["a hen"]}
    recipe = Recipe(prompt, steps=1, width=64, height=32, binding=binding)
    wanted = request(composed=["a fox and a hen"], singles=singles)
    with pytest.raises(StoppedError):
        train(studio, recipe, wanted, home=tmp_path)(stop)
    assert (attached(studio.base.pipe).binding is not None, bool(in_tiles)) == bound
    assert read_json(tmp_path / ".runs" / "g" / "run.json")["is_bound"] == (binding != "none")


@pytest.mark.parametrize("argument", ["te=0.5:unet=1", "lbw=OUTALL", "start=1", "stop=1", "unet=0@0,1@1"])
def test_strengths_that_gates_are_not_taught_with_are_refused(studio, tmp_path, argument):
    with pytest.raises(ValueError, match="one LoRA has one strength: take te="):
        train(studio, Recipe(f"a fox in ink <lora:fox:1:{argument}> <lora:ink:1>"), request(), home=tmp_path)


def test_a_painted_region_needs_its_mask(studio, tmp_path):
    painted = Recipe("a beast in ink <lora:fox:1:word=beast:region=painted> <lora:ink:1>")
    with pytest.raises(ValueError, match="the region of 'fox' is painted, but the recipe has no mask"):
        train(studio, painted, request("painted"), home=tmp_path)


@pytest.mark.thorough  # one way is counted to the end above
@pytest.mark.parametrize(("way", "styles", "composed"), TEACHERS)
def test_the_teachers_are_counted_right(studio, tmp_path, way, styles, composed):
    wanted = request(way=way, styles=styles, composed=["a fox in ink", "fox, ink"][:composed], steps=1)
    calls = []
    run(studio, tmp_path, wanted, stop=lambda state: not state.doing and not state.rows and calls.append(state.called))
    assert max(calls) - wanted.teachers()[1] in range(4)  # the first update calls it, too


@pytest.mark.thorough
def test_what_was_stopped_goes_on(loras, tmp_path):
    def fresh():
        return Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny")

    early, _ = run(fresh(), tmp_path / "a", stop=lambda state: state.called >= 1)
    assert (early.verdict, early.rows) == ("", [])
    cut, _ = run(fresh(), tmp_path / "a", stop=lambda state: len(state.rows) > 5)
    assert len(cut.rows) == 6
    assert not (tmp_path / "a" / "g").exists()
    (on, _), (whole, _) = run(fresh(), tmp_path / "a"), run(fresh(), tmp_path / "b")
    assert on.rows == whole.rows
    assert load_gates(tmp_path / "a" / "g").tensors.keys() == load_gates(tmp_path / "b" / "g").tensors.keys()


def weights(folder):
    return np.concatenate([t.float().flatten().numpy() for _, t in sorted(load_gates(folder).tensors.items())])


@pytest.mark.thorough
def test_the_same_name_with_other_settings_is_asked_about(studio, tmp_path):
    run(studio, tmp_path)
    first = weights(tmp_path / "g")
    other = request(steps=2)
    with pytest.raises(GatesExistError, match="continue from them, or overwrite") as error:
        train(studio, RECIPE, other, home=tmp_path)
    assert str(tmp_path) not in str(error.value)
    with pytest.raises(ValueError, match="are factors gates: continue with these"):
        train(studio, RECIPE, request(gate_type="mole"), home=tmp_path, again="continue")
    assert np.array_equal(weights(tmp_path / "g"), first)


@pytest.mark.thorough
def test_a_name_is_continued_or_overwritten(studio, tmp_path):
    run(studio, tmp_path)
    first, other = weights(tmp_path / "g"), request(steps=2)
    run(studio, tmp_path, other, again="continue", stop=lambda state: len(state.rows) > 0)
    assert np.array_equal(weights(tmp_path / "g"), first)  # the old ones stay until the new ones are done
    run(studio, tmp_path, other)  # goes on: its settings are known now
    more = weights(tmp_path / "g")
    run(studio, tmp_path, request(steps=3), again="overwrite")
    anew = weights(tmp_path / "g")
    _, said = run(studio, tmp_path, request(steps=3), again="overwrite")  # which is for other settings
    assert not [line for line in said if line.startswith("update ")]
    studio.catalog.gates.clear()
    run(studio, tmp_path / "other", request(steps=3))
    assert np.array_equal(anew, weights(tmp_path / "other" / "g"))
    assert np.abs(more - first).max() < np.abs(more - anew).max()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".new", ".old"))] == []


@pytest.mark.thorough
def test_gates_are_trained_at_the_size_of_the_recipe(studio, tmp_path):
    shapes = []
    record = studio.base.pipe.unet.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape[2:])))
    wanted = request(way="collage", steps=2)
    work = train(studio, Recipe(PROMPT, steps=2, width=48, height=32), wanted, home=tmp_path)
    last = work(lambda _: None)
    record.remove()
    with pytest.raises(GatesExistError):
        train(Studio(studio.base.pipe, studio.catalog, "another"), replace(RECIPE, width=48), wanted, home=tmp_path)
    assert {picture.size for picture, _ in last.pictures} == {(48, 32)}
    assert set(shapes) == {(16, 24), (16, 16)}  # collages are wide, their parts are not
    with pytest.raises(GatesExistError):
        run(studio, tmp_path, wanted)


def test_the_text_encoder_is_read_as_far_as_in_the_picture(studio, tmp_path, monkeypatch):
    """Clip skip was left out, so gates were trained on texts that no picture was drawn with."""
    monkeypatch.setattr(held_out, "COUNT", 1)
    ran, last = [], studio.base.pipe.text_encoder.encoder.layers[-1].self_attn
    last.register_forward_pre_hook(lambda *_: ran.append(last))
    wanted = request(steps=1)
    assert train(studio, replace(RECIPE, clip_skip=2), wanted, home=tmp_path)(ignore).verdict
    assert not ran
    with pytest.raises(GatesExistError):
        train(studio, RECIPE, wanted, home=tmp_path)
    studio.draw(studio.complete(replace(RECIPE, clip_skip=2)))
    assert not ran
    studio.draw(studio.complete(RECIPE))
    assert ran


def test_an_open_size_is_that_of_what_is_trained(studio, tmp_path, monkeypatch):
    """Of the largest composed prompt; pictures before and after have the size of their own."""
    sizes = {"a fox": (32, 32), "fox in ink": (32, 48), "ink and a fox": (48, 32)}
    for module in ("web.gate_training", "studio.render"):
        monkeypatch.setattr(f"mole_app.{module}.usual_size", lambda pipe, base, text: sizes[text])
    recipe = Recipe("a fox <lora:fox:1> <lora:ink:1>", steps=2)
    wanted = request(composed=["fox in ink", "ink and a fox"])
    drawn = []

    def stop(state):
        drawn[:] = state.pictures
        if drawn:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(studio, recipe, wanted, home=tmp_path)(stop)
    settings = read_json(tmp_path / ".runs" / "g" / "run.json")
    assert (settings["width"], settings["height"], drawn[0][0].size) == (48, 48, (32, 32))
    train(studio, replace(recipe, width=48, height=48), wanted, home=tmp_path)  # the same training
    with pytest.raises(GatesExistError):
        train(studio, replace(recipe, width=32, height=32), wanted, home=tmp_path)
    train(studio, recipe, request(name="other", composed=[], way="blend"), home=tmp_path)


@pytest.mark.thorough
def test_the_verdict_compares_the_same_held_out_seeds(studio):
    wanted = request()
    experts = {name: studio.catalog.expert(name) for name in ("fox", "ink")}
    mixture = attach(studio.base.pipe, experts, "flow")
    losses = held_out.losses(studio.base.pipe, mixture, wanted.data(), replace(wanted.config(), seed=3))
    once, again = [loss() for loss in losses], [loss() for loss in losses]
    assert once == again
    assert len(set(once)) == 4
    assert set(held_out.seeds(3)).isdisjoint(range(100))
    better, worse = held_out.verdict([2.0] * 4, [1.0] * 3 + [2.5]), held_out.verdict([1.0] * 4, [2.0] * 4)
    assert better.endswith("is 69% of what it was before, and lower on 3 of them")
    assert "200%" in worse
    assert "do not help" in worse


@pytest.mark.parametrize("host", ["sdxl-refiner", "sd3", "flux"])
def test_a_base_that_gates_cannot_be_trained_on_is_said_at_once(loras, tmp_path, host):
    pipe, _ = hosts.HOSTS[host]()
    why = "training on this page needs a UNet" if host == "flux" else f"{type(pipe).__name__} cannot be trained on"
    with pytest.raises(ValueError, match=why):
        train(Studio(pipe, Catalog(dict(loras), {}), host), Recipe(PROMPT), request(), home=tmp_path)
    if host == "flux":
        return
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors") for n in ("fox", "ink")}
    mixture = attach(pipe, files, "static")
    data = TrainingData({"fox": ["a fox"], "ink": ["ink"]}, ["fox in ink"])
    with pytest.raises(ValueError, match="cannot be trained on"):
        train_gates(pipe, mixture, data, config=GateTraining({"single": 1.0}, steps=1))


HEN = {"hat": ("hen",)}
SUGGESTED = [  # prompt; trigger words in files; styles that were chosen -> prompts of a collage, styles, those not named
    (
        "ink drawing of a red fox and a hen",
        HEN,
        [],
        {"fox": ["ink drawing of a red fox"], "hat": ["ink drawing of a hen"]},
        "ink",
        "",
    ),
    ("a hen and a fox in ink", HEN, [], {"hat": ["a hen in ink"], "fox": ["a fox in ink"]}, "ink", ""),
    ("a fox and an ink", {}, ["ink"], {"fox": ["a fox and an ink"]}, "ink", "hat"),
    ("a fox riding a hen", HEN, [], {"fox": ["a fox riding"], "hat": ["riding a hen"]}, "", "ink"),
    ("a fox and a hen", HEN | {"ink": ("line",)}, [], {"fox": ["a fox"], "hat": ["a hen"]}, "", "ink"),
    ("a cat and a hen in ink", {"hat": ("cat", "hen")}, [], {"hat": ["a cat in ink", "a hen in ink"]}, "ink", "fox"),
]


@pytest.mark.parametrize(("text", "triggers", "styles", "singles", "found", "silent"), SUGGESTED)
def test_suggestions_follow_what_binding_reads(studio, text, triggers, styles, singles, found, silent):
    """A style had to be chosen first, else it was drawn as one more subject beside the others, which had no style."""
    from mole_app.web.train_tab import suggested

    experts = {name: replace(studio.catalog.expert(name), triggers=triggers.get(name, ())) for name in ("fox", "ink", "hat")}
    bound = files_bindings(experts)
    assert suggested(text, bound, styles, "collage") == (singles, found.split(), silent.split())
    assert list(suggested(text, bound, styles, "collage")[0]) == list(singles)  # from left to right
    assert set(suggested(text, bound, styles, "blend")[0]) == set(experts)


def test_a_suggestion_fills_the_fields_and_says_what_it_took_for_a_style(blocks):
    event = next(event for event in blocks.fns.values() if event.fn and event.fn.__name__ == "suggestion")
    prompt = "(ink:1.2) drawing of a fox <lora:fox:1> <lora:ink:1> <lora:hat:1>"
    name, singles, composed, styles, said = plain(event)(prompt, [], "collage")
    assert (name, singles, composed) == ("fox+hat+ink", "fox=ink drawing of a fox", "ink drawing of a fox")
    added = "added to Styles, which act on the whole picture: **ink**"
    assert (styles["value"], said) == (["ink"], f"{added}; the prompt has none of the words of **hat**: write them in")
    _, singles, _, styles, said = plain(event)("a fox and a hat <lora:fox:1> <lora:hat:1:region=everywhere>", [], "collage")
    assert (singles, styles["value"]) == ("fox=a fox and a hat", ["hat"])
    tags = "<lora:fox:1:word=red beast:region=painted> <lora:hat:1:region=left>"
    _, singles, *_, said = plain(event)(f"a red beast and a hat {tags}", [], "collage")
    assert (singles, said) == ("fox=a red beast\nhat=a hat", "")
    _, singles, *_ = plain(event)("ink drawing of a fox <lora:fox:1> <lora:ink:1>", [], "blend")
    assert singles == "fox=drawing of a fox\nink=ink drawing"
    name, singles, *_ = plain(event)("a fox and a hat <lora:FOX:1> <lora:hat:1>", [], "collage")  # as typed in another case
    assert (name, singles) == ("fox+hat", "fox=a fox\nhat=a hat")


def test_the_page_asks_each_time_what_becomes_of_gates_with_other_settings(blocks, home):
    """After one answer it had asked no more, and refused."""
    run = home / ".runs" / "mine"
    run.mkdir(parents=True)
    (run / "run.json").write_text('{"steps": 1}')
    events = [event for event in blocks.fns.values() if event.fn and event.fn.__name__ == "begin"]
    event = next(event for event in events if event.outputs[0].elem_id == "train-status")
    fields = {"train-name": "mine", "train-singles": "fox=a fox\nink=ink", "train-composed": "a fox in ink"}
    values = [fields.get(getattr(one, "elem_id", None), one.value) for one in event.inputs[1:]]
    page = type("Request", (), {"session_hash": "page"})()
    for _ in range(2):
        ((said, *_, asked, again),) = plain(event)(page, "me", *values)
        assert "with other settings: continue from them, or overwrite?" in said.replace("\\", "")
        assert (asked["visible"], again) == (True, "")
    values[-5] = "continue"  # the answer: beside it are the given pictures, which a training has none of
    ((said, *_, asked, again),) = plain(event)(page, "me", *values)
    assert "has no checkpoint yet" in said
    assert (asked["visible"], again) == (False, "")


def test_two_loras_of_one_subject_are_one_part_of_a_collage():
    singles = {"fox": ["a fox in ink"], "fur": ["a fox in ink"], "hat": ["a hat in ink"]}
    wanted = request(singles=singles, styles=["ink"], composed=["a fox and a hat in ink"])
    assert wanted.data().parts == {"a fox and a hat in ink": ["a fox in ink", "a hat in ink"]}
