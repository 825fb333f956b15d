"""What a page finds when it is opened again, without a browser: its fields, its cards, and its jobs."""

from pathlib import Path

import pytest
from app_client import PROMPT, REQUEST, QueueVisit, built, kept_fields, plain, value_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiers import thorough
from tiny import tiny_pipeline

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.recipe import Recipe, load
from mole_app.studio.render import Studio
from mole_app.web.actions import Actions
from mole_app.web.jobs import Job, ignore
from mole_diffusers.mixture import attach, detach

gr = pytest.importorskip("gradio")


@pytest.fixture(scope="module")
def functions(loras, tmp_path_factory):
    return named(built(loras, tmp_path_factory.mktemp("app")))


def named(blocks):
    """A page's functions by name; of those with one name, the first, but for those of the base model."""
    found = {"fields": kept_fields(blocks)}
    for event in blocks.fns.values():
        if event.fn is not None and "base-status" not in [getattr(each, "elem_id", None) for each in event.outputs]:
            found.setdefault(event.fn.__name__, (plain(event), event))
    return found


def values(functions):
    """How the page's fields are at first."""
    return [component.value for component in functions["fields"]]


def labels(functions):
    return [getattr(component, "label", None) for component in functions["fields"]]


def is_left(value):
    return isinstance(value, dict) and value.get("__type__") == "update" and "value" not in value


def test_a_new_browser_gets_a_name_and_keeps_the_defaults(functions):
    enter, _ = functions["enter"]
    visitor, filled = enter(REQUEST, "", None)
    assert len(visitor) > 16
    assert filled == [None] * len(functions["fields"])
    assert enter(REQUEST, "", None)[0] != visitor
    assert enter(REQUEST, "me", None)[0] == "me"


def test_the_cards_are_those_of_the_prompt_after_a_page_was_filled(functions):
    (fill, _), first = functions["fill"], values(functions)
    *_, cards, _, _, problem = fill([None] * len(first), "a hat <lora:hat:0.5>", *first[1:])
    assert ([card["tag"] for card in cards], problem) == (["<lora:hat:0.5>"], "")
    *_, cards, _, rewrites, problem = fill(["a <lora:gone:1> <lora:hat:0.5>", *[None] * len(first[1:])], *first)
    assert [card["tag"] for card in cards] == ["<lora:hat:0.5>"]  # one that is not here hides no other
    assert "there is no LoRA 'gone'" in problem
    assert rewrites == ["a <lora:gone:1> <lora:hat:0.5>"]


def test_a_block_is_set_for_loras_that_are_typed_in_another_case(functions):
    """The page proposes their names here, in which a picture has them."""
    set_lock, _ = functions["set_lock"]
    locks, _ = set_lock("mid", "fox=0.5, ink=1", 2, {"mid": "unet.mid"}, "a <lora:FOX:1> <lora:Ink:1>", {})
    assert locks == {"unet.mid": {"fox": 1.0, "ink": 2.0}}


def test_fields_come_back_and_each_that_does_not_fit_is_as_on_a_fresh_page(functions):
    enter, _ = functions["enter"]
    saved = values(functions)
    assert saved[0] == PROMPT
    saved[0] = "a hat <lora:hat:1>"
    assert enter(REQUEST, "me", saved) == ("me", saved)
    bad = {
        "Gates": "gone",
        "Sampler": "Best",
        "Seed": "x",
        "Steps": 0,
        "Binding": "x",
        "Guidance (CFG scale)": "y",
        "Width": [1],
    }
    for chosen in (*([label] for label in bad), list(bad)):
        at = [labels(functions).index(label) for label in chosen]
        given = [bad[labels(functions)[i]] if i in at else value for i, value in enumerate(saved)]
        first = values(functions)
        assert enter(REQUEST, "me", given)[1] == [first[i] if i in at else value for i, value in enumerate(saved)], chosen
    for garbage in ([], saved[:-1], "x", 5, {"a": 1}):
        assert set(enter(REQUEST, "me", garbage)[1]) == {None}
    assert enter(REQUEST, "me", ["a <lora:gone:1>", *saved[1:]])[1][0] == "a <lora:gone:1>"


def test_what_is_typed_while_a_page_opens_stays_and_the_browser_keeps_the_fields_as_of_then(functions):
    (fill, _), (keep, _), first = functions["fill"], functions["keep"], values(functions)
    filling = [None] * len(first)
    filling[0], filling[1] = "kept", "blurred"
    assert is_left(keep(None, *first))  # which would replace what the browser has
    shown, *updates = fill(filling, *first)
    assert (shown[:2], updates[:2]) == (["kept", "blurred"], ["kept", "blurred"])
    shown, *updates = fill(filling, "typed", *first[1:])
    assert (shown[:2], updates[1]) == (["typed", "blurred"], "blurred")
    assert all(map(is_left, [updates[0], *updates[2 : len(first)]]))
    assert keep(filling, *shown) == shown


def test_no_two_fields_have_one_name(functions):
    named = [label for label in labels(functions) if label]
    assert len(named) > 20
    assert len({*named, "Gates to download"}) == len(named) + 1


def test_styles_of_a_training_that_are_gone_are_left_out(functions):
    enter, _ = functions["enter"]
    saved = values(functions)
    at = labels(functions).index("Styles")
    for kept, shown in ((["gone", "ink"], ["ink"]), (["fox"], ["fox"]), (None, []), ("fox", [])):
        saved[at] = kept
        assert enter(REQUEST, "me", saved)[1][at] == shown


def test_sizes_stay_open_and_those_of_an_older_page_are_left_out(functions):
    """Pages without second prompts kept the size of all pictures, 64 x 64, as if it had been asked for."""
    enter, _ = functions["enter"]
    saved = values(functions)
    sizes = [labels(functions).index(name) for name in ("Width", "Height")]
    for at in sizes:
        saved[at] = 0
    assert enter(REQUEST, "me", saved)[1] == saved
    for at in sizes:
        saved[at] = 64
    both = zip(labels(functions), saved, strict=True)
    older = [value for label, value in both if not str(label).endswith(" 2")]
    assert len(older) == len(saved) - 2
    assert set(enter(REQUEST, "me", older)[1]) == {None}


@pytest.mark.parametrize(("had_over", "hires"), [(False, 1), (True, 1), (False, 2)])
def test_a_reloaded_page_says_that_the_picture_to_draw_over_is_gone(functions, had_over, hires):
    """The browser does not keep it. What is larger than asked for is seen, too."""
    panel, said, has_over = functions["reopened"][0](had_over, hires)
    assert is_left(panel) if (had_over, hires) == (False, 1) else panel["open"]
    assert ("put it there again" in said, has_over) == (had_over, False)


@pytest.mark.parametrize("kind", ["compare", *thorough("look")])
def test_what_has_a_random_seed_is_seen_at_the_seed_of_the_last_picture(loras, tmp_path, kind):
    """The picture was made with a seed that the page does not show."""
    blocks = built(loras, tmp_path, seed=-1)
    visit = QueueVisit(blocks)
    visit.press()
    seed = infotext.read(visit.done()["picture"]).seed
    last_seed = named(blocks)["last_seed"][0]
    assert last_seed(type("Request", (), {"session_hash": "new"})(), "you") is None
    begins = [each for each in blocks.fns.values() if each.fn and each.fn.__name__ == "begin"]
    (see,) = [each for each in begins if each.outputs[0].elem_id == f"{kind}-status"]
    for last, said in ((last_seed(REQUEST, "me"), True), (None, False)):
        values = [last if component is see.inputs[-5] else component.value for component in see.inputs[1:]]
        yielded = list(plain(see)(REQUEST, "me", *values))
        assert (f"with the seed of your last picture, {seed}" in yielded[-1][0]) == said
        if kind == "compare":
            shown = next(pictures["value"] for _, pictures, *_ in reversed(yielded) if not is_left(pictures))
            assert (infotext.read(shown[0][0]).seed == seed) == said


def test_pages_that_were_closed_are_forgotten_but_none_whose_job_goes_on():
    from mole_app.web.visits import MAX_WATCHED, Visits

    with gr.Blocks():
        visits = Visits()
    requests = [type("Request", (), {"session_hash": str(i)})() for i in range(MAX_WATCHED + 3)]
    jobs = [Job("me", "compose", ignore) for _ in requests]
    for i, (request, job) in enumerate(zip(requests, jobs, strict=True)):
        job.state = "running" if i == 1 else "done"
        next(visits.watch(request, "compose", job))
    kept = [visits._watched.get((request.session_hash, "compose")) for request in requests]
    assert kept == [None, jobs[1], None, None, *jobs[4:]]


@pytest.mark.parametrize(
    ("about", "said", "shown"),
    [
        ({"prompt": "a hat <lora:hat:1> <lora:gone:1>"}, "mend this first: there is no LoRA 'gone'; known: ", {}),
        ({"prompt": "a ((hat"}, "mend this first: ", {}),
        ({"prompt": "<hypernet:hat:1>"}, "mend this first: <hypernet:hat:1> is not read", {}),
        ({"gates": "gone"}, "known: sum, mean; without its gates 'gone'", {"gates": "auto"}),
        ({"sampler": "Best"}, "without its sampler 'Best'", {"sampler": "default"}),
        ({"arm": "base"}, "it was drawn as 'base', which has no field here: a grid draws it with arm=base", {}),
        ({"prompt": ", ".join(["a hat"] * 99)}, "loaded: seed 5, 0 LoRAs; now press Compose", {}),
        ({"guidance": 50.0}, "now press Compose", {}),
        ({"seed": 2**53}, "loaded: seed 9007199254740992, 0 LoRAs; now press Compose", {}),
        ({"seed": 2**53 + 1}, "browsers round seeds above 9007199254740992: draw it with the API or ", {}),
    ],
)
def test_a_dropped_recipe_fills_what_it_can_and_the_rest_is_said(functions, tmp_path, about, said, shown):
    wanted = {"prompt": "a hat", "seed": 5, "steps": 7, "width": 48, "height": 32, "gates": "sum", **about}
    Recipe(**wanted).save(tmp_path / "recipe.json")
    load, event = functions["load"]
    *values, status = load(str(tmp_path / "recipe.json"))
    assert said in status.replace("\\", "")
    fields = ["prompt", "seed", "steps", "width", "height", "guidance", "sampler", "gates"]
    values = [value_of(value) for value in values]
    at = {each.elem_id: i for i, each in enumerate(event.outputs) if getattr(each, "elem_id", None) in fields}
    assert len(at) == len(fields)
    for name, value in (wanted | shown).items():
        if name in at:
            assert values[at[name]] == value, name
    slider = event.outputs[at["guidance"]]
    assert slider.minimum <= values[at["guidance"]] <= slider.maximum


def test_what_a_text_of_another_program_lacks_is_said_once_wherever_it_is_used(loras):
    from mole_app.web.build import build

    actions = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"))
    functions = named(build(actions, Recipe("a fox", steps=2)))
    path, about = actions.gallery.add(Image.new("RGB", (8, 8)), Recipe("a cat")), PngInfo()
    about.add_text(infotext.PARAMETERS, "a cat\nSteps: 1, Sampler: Euler, Seed: 1, Size: 64x64, Model: dream, Eta: 2")
    Image.new("RGB", (8, 8)).save(path, pnginfo=about)
    for name, given in (("reuse", path.name), ("load", str(path))):
        *_, status = functions[name][0](given)
        for said in ("drawn with the model 'dream', and here is 'tiny'", "not carried over from the picture's text: Eta 2"):
            assert status.replace("\\", "").count(said) == 1, name


def test_a_saved_recipe_stays_as_it_was_written(functions):
    """Others may save one of the same seed meanwhile."""
    save, event = functions["recipe_file"]
    values = [component.value for component in event.inputs]
    first, _ = save(*values)
    second, _ = save("another", *values[1:])
    first, second = first["value"], second["value"]
    assert Path(first).name == Path(second).name
    assert [load(path).text for path in (first, second)] == ["a fox in ink", "another"]


def test_gates_that_came_after_the_page_was_opened_can_be_filled_in(loras, tmp_path):
    """Of another visitor; the page had not got them as a choice, and none of its buttons answered any more."""
    from mole_app.web.build import build

    actions = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"))
    functions = named(build(actions, Recipe("a fox", steps=2)))
    mixture = attach(actions.studio.base.pipe, {name: loras[name] for name in ("fox", "ink")}, "mole")
    mixture.save_pretrained(tmp_path / "new")
    detach(actions.studio.base.pipe)
    actions.studio.catalog.add_gates("new", tmp_path / "new")
    Recipe(PROMPT, gates="new", base="tiny").save(tmp_path / "recipe.json")
    load, event = functions["load"]
    at = [getattr(each, "label", None) for each in event.outputs].index("Gates")
    filled, before = load(str(tmp_path / "recipe.json"))[at], event.outputs[at]
    assert type(before)(choices=filled["choices"]).preprocess(filled["value"]) == "new"
    with pytest.raises(gr.Error, match="new"):
        before.preprocess("new")


@pytest.mark.parametrize("image", ["", "0" * 64])
def test_a_dropped_recipe_is_drawn_over_its_own_picture_or_none(functions, tmp_path, image):
    Recipe("a hat", image=image, gates="sum").save(tmp_path / "recipe.json")
    load, event = functions["load"]
    at = [getattr(each, "elem_id", None) for each in event.outputs].index("over-picture")
    over, has_over, panel = load(str(tmp_path / "recipe.json"))[at : at + 3]
    assert all(map(is_left, (over, has_over))) if image else (over, has_over) == (None, False)
    assert panel["open"] if image else is_left(panel)


def test_a_grid_that_is_used_again_fills_its_axes_too(loras):
    """Both by the gallery's button and by dropping the file."""
    from mole_app.web.build import build

    actions = Actions(Studio(tiny_pipeline(), Catalog(dict(loras), {}), "tiny"))
    functions = named(build(actions, Recipe("a fox", steps=2)))
    recipe = Recipe("a hat <lora:hat:1>", steps=2, width=32, height=32, base="tiny")
    for shows, axes, tab in (
        ({"x": "steps=1,2", "y": "seed=4"}, ["steps=1,2", "seed=4"], "Compare"),
        ({"columns": ["base", "sum"]}, None, "Compose"),
        ({"x": ["no text"], "y": 5}, None, "Compose"),
    ):
        path = actions.gallery.add(Image.new("RGB", (8, 8)), recipe, shows)
        for name, given, after in (("reuse", path.name, 2), ("load", str(path), 1)):
            fill, event = functions[name]
            values, fields = fill(given), [getattr(each, "elem_id", None) for each in event.outputs]
            assert len(values) == len(fields)
            assert values[0] == recipe.prompt
            at = fields.index("axis-x")
            assert fields[at : at + 2] == ["axis-x", "axis-y"]
            assert at + 2 + after == len(fields)
            assert list(values[at : at + 2]) == axes if axes else all(map(is_left, values[at : at + 2]))
            if name == "reuse":
                assert values[-2]["selected"] == tab
            else:
                assert values[-1].endswith(f"now press {'Compose' if axes is None else 'Make the grid'}")
