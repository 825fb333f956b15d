"""Runs that are divided, cut off and continued, and rows that say all that their picture depends on."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from mole_diffusers import attach, detach
from mole_diffusers.inspection.compare import sample
from mole_diffusers.lora import read_expert
from mole_world.evaluation import methods
from mole_world.evaluation.rows import Rows, picture_path
from mole_world.evaluation.runner import Case, Setup, evaluate, requested_rows

OPTIONS = {"num_inference_steps": 1, "guidance_scale": 2.0}


@pytest.fixture
def setup(pipe, loras):
    return Setup(pipe, {name: read_expert(path, name) for name, path in loras.items()}, OPTIONS)


def brightness(case, images):
    return [{"light": sum(image.convert("L").getdata()) / image.width} for image in images]


CASES = [Case(("fox", "ink"), "pair", "a fox in ink"), Case(("fox", "hat"), "pair", "a fox with a hat")]


def test_a_killed_run_goes_on_where_it_was(setup, tmp_path):
    some = [methods.base(), methods.summed()]
    whole = evaluate(setup, some, CASES, brightness, seeds=[1, 2], rows=Rows(tmp_path / "a"))
    evaluate(setup, some, CASES[:1], brightness, seeds=[1], rows=Rows(tmp_path / "b"))
    with (tmp_path / "b" / "rows-0.jsonl").open("a") as file:
        file.write('{"case": "fox+i')  # the line that was being written
    again = evaluate(setup, some, CASES, brightness, seeds=[1, 2], rows=Rows(tmp_path / "b"))
    order = lambda row: (row["method"], row["case"], row["seed"])  # noqa: E731
    again, whole = sorted(again, key=order), sorted(whole, key=order)
    # the seed that is left of a pair is drawn alone, which older versions of torch round in another way
    assert [row.pop("light") for row in again] == pytest.approx([row.pop("light") for row in whole], abs=0.1)
    assert again == whole
    assert len((tmp_path / "b" / "rows-0.jsonl").read_text().splitlines()) == 8  # none was made twice


@pytest.mark.parametrize("line", ['{"case": "fox" "method"}', '{"case": "fox"}', "[1]", "", "5"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    row = dict.fromkeys(("case", "kind", "method", "prompt", "seed", "settings"), "x")
    (tmp_path / "rows-3.jsonl").write_text(f"{json.dumps(row)}\n{line}\n{json.dumps(row)}\n")
    with pytest.raises(
        ValueError, match="rows-3.jsonl, line 2: not a row with case, kind, method, prompt, seed, settings: "
    ):
        Rows(tmp_path).read()


def test_processes_divide_the_work_and_leave_nothing_out(setup, tmp_path):
    some = [methods.base(), methods.summed(), methods.mean()]
    for process in (0, 1):
        rows = Rows(tmp_path / "two", process)
        evaluate(setup, some, CASES, brightness, seeds=[1], rows=rows, processes=2)
    parts = [len(p.read_text().splitlines()) for p in sorted((tmp_path / "two").glob("rows-*.jsonl"))]
    assert sum(parts) == 6
    assert min(parts) > 0
    one = evaluate(setup, some, CASES, brightness, seeds=[1], rows=Rows(tmp_path / "one"))
    both = requested_rows(
        setup, some, CASES, seeds=[1], rows=Rows(tmp_path / "two", 1)
    )  # of all processes, in the same order
    assert one == both
    assert requested_rows(setup, some[1:], CASES[:1], seeds=[1, 2], rows=Rows(tmp_path / "two")) == [
        row for row in one if row["method"] != "base" and row["case"] == CASES[0].name
    ]


def test_what_is_asked_twice_counts_once(setup, tmp_path):
    """Else two equal rows would pass for two seeds, and intervals be too narrow."""
    measured, twice = [], [methods.base(), methods.base()]

    def counted(case, images):
        measured.extend(images)
        return brightness(case, images)

    made = evaluate(setup, twice, CASES[:1] * 2, counted, seeds=[1, 1, 2], rows=Rows(tmp_path))
    assert [row["seed"] for row in made] == [1, 2]
    assert len(measured) == 2


def test_rows_that_say_less_of_their_case_are_still_its_rows(setup, tmp_path):
    rows, path = Rows(tmp_path), tmp_path / "rows-0.jsonl"
    made = evaluate(setup, [methods.base()], CASES[:1], brightness, seeds=[1, 2], rows=rows)
    older = [{name: value for name, value in row.items() if name != "concepts"} for row in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert evaluate(setup, [methods.base()], CASES[:1], brightness, seeds=[1, 2], rows=rows) == made
    assert len(path.read_text().splitlines()) == 2


def test_a_case_is_drawn_at_its_own_size(setup, tmp_path):
    wide = replace(CASES[0], size=(48, 24))
    rows = Rows(tmp_path)
    made = evaluate(setup, [methods.base()], [CASES[0], wide], brightness, seeds=[1], rows=rows)
    sizes = []
    for row in made:
        with Image.open(picture_path(tmp_path, row)) as picture:
            sizes.append(picture.size)
    assert sizes == [(32, 32), (48, 24)]
    assert [row["settings"].get("width") for row in made] == [None, 48]
    assert [row["case"] for row in made] == ["fox+ink", "fox+ink 48x24"]  # tables pair methods by the name of the case
    assert evaluate(setup, [methods.base()], [wide], brightness, seeds=[1], rows=rows) == made[1:]


def test_other_settings_are_other_rows(setup, tmp_path):
    """Nor is a picture of other settings, seeds or prompts shown or overwritten."""
    rows, wanted = Rows(tmp_path), []
    twin = Case(CASES[0].concepts, CASES[0].kind, "ink: a fox")
    for steps, seed, case in ((1, 1, CASES[0]), (2, 1, CASES[0]), (1, 2, CASES[0]), (1, 1, twin)):
        setup.options = OPTIONS | {"num_inference_steps": steps}
        (row,) = evaluate(setup, [methods.base()], [case], brightness, seeds=[seed], rows=rows)
        assert (row["settings"]["num_inference_steps"], row["seed"], row["prompt"]) == (steps, seed, case.prompt)
        wanted.append((row, sample(setup.pipe, case.prompt, [seed], **setup.options)[0].tobytes()))
    assert len(rows.read()) == 4
    assert len({picture for _, picture in wanted}) == 4
    for row, picture in wanted:
        assert Image.open(picture_path(tmp_path, row)).tobytes() == picture


@pytest.mark.thorough
def test_methods_are_what_they_say_and_leave_nothing_behind(setup, tmp_path, loras):
    case, before = CASES[0], sample(setup.pipe, "a fox in ink", [3], **OPTIONS)[0]

    def drawn(method):
        with method.draws(setup, case):
            return sample(setup.pipe, case.prompt, [3], **OPTIONS)[0].tobytes()

    mixture = attach(setup.pipe, {"fox": loras["fox"], "ink": loras["ink"]}, "mole")
    mixture.save_pretrained(tmp_path / "fox+ink")
    with mixture.only("fox", "ink"):
        gated = sample(setup.pipe, case.prompt, [3], **OPTIONS)[0].tobytes()
    with mixture.fixed({"fox": 0.5, "ink": 0.5}):
        half = sample(setup.pipe, case.prompt, [3], **OPTIONS)[0].tobytes()
    with mixture.fixed({"fox": 1.0}):
        fox = sample(setup.pipe, case.prompt, [3], **OPTIONS)[0].tobytes()
    detach(setup.pipe)
    trained = methods.weighted("gates", gates=lambda case: tmp_path / case.name)
    assert drawn(methods.mean()) == half
    assert drawn(methods.alone("fox")) == fox
    assert drawn(trained) == gated
    assert (trained.covers(case), trained.covers(CASES[1])) == (True, False)
    assert drawn(methods.base()) == before.tobytes()
    assert sample(setup.pipe, "a fox in ink", [3], **OPTIONS)[0].tobytes() == before.tobytes()
