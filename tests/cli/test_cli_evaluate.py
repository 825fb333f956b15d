"""The evaluation: intervals, rows that survive, arms that are what they say, tables that can be computed by hand."""

import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mole_diffusers import attach, detach, emoji
from mole_diffusers.cli.mole import main
from mole_diffusers.evaluation import arms, checkpoint_protocol, emoji_protocol, strength_search, tables
from mole_diffusers.evaluation.rows import Rows, picture_path
from mole_diffusers.evaluation.runner import Case, Setup, evaluate, requested_rows
from mole_diffusers.evaluation.statistics import as_table, bootstrap, estimate
from mole_diffusers.inspection.compare import sample
from mole_diffusers.lora import read_expert

OPTIONS = {"num_inference_steps": 1, "guidance_scale": 2.0}


def apart(count):
    """Units of cases that share none."""
    return [[str(i)] for i in range(count)]


def test_bootstrap_of_a_constant_and_of_a_known_spread():
    assert bootstrap(torch.full((3, 4), 0.25), apart(3)) == (0.25, 0.25, 0.25)
    coins = torch.tensor([[0.0], [1.0]]).repeat(50, 1)  # 100 cases, half of them 1: standard error 0.05
    mean, low, high = bootstrap(coins, apart(100))
    assert mean == 0.5
    assert low == pytest.approx(0.5 - 1.96 * 0.05, abs=0.015)
    assert high == pytest.approx(0.5 + 1.96 * 0.05, abs=0.015)


def test_bootstrap_resamples_cases_and_not_only_seeds():
    values = torch.tensor([[0.0] * 8, [1.0] * 8])  # no spread within a case, all of it between them
    assert bootstrap(values, apart(2))[1:] == (0.0, 1.0)


def test_cases_that_share_a_concept_stand_and_fall_with_it():
    """What one concept decides is as uncertain as its draw, in however many cases it comes."""
    values = torch.tensor([[1.0]] * 20 + [[0.0]] * 20)
    names = [str(i) for i in range(20)]
    alone = bootstrap(values, apart(40))
    shared = bootstrap(values, [[side, name] for side in "ab" for name in names])
    assert alone[0] == shared[0] == 0.5
    assert alone[1] > 0.3
    assert alone[2] < 0.7
    assert shared[1:] == (0.0, 1.0)


def test_a_case_counts_as_often_as_all_of_its_concepts_came():
    """Three cases of three concepts: all 27 draws counted by hand, those left out that hold no case."""
    values, cases = (0.0, 1.0, 0.5), ((0, 1), (1, 2), (2, 2))
    found = []
    for drawn in itertools.product(range(3), repeat=3):
        weights = [drawn.count(a) * drawn.count(b) for a, b in cases]
        if sum(weights):
            found.append(sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights))
    table = torch.tensor(values)[:, None]
    mean, low, high = bootstrap(table, [[str(c) for c in case] for case in cases], draws=27000)
    every = torch.quantile(torch.tensor(found).repeat(1000), torch.tensor([0.025, 0.975])).tolist()
    assert (mean, [low, high]) == (0.5, pytest.approx(every))


@pytest.mark.parametrize("count", [1, 2, 8, 24])
def test_no_interval_has_no_width(count):
    """What all cases agree on is not certain; Wilson's interval of k of k starts at k / (k + 1.96 squared)."""
    mean, low, high = estimate(torch.ones(count, 3), apart(count), "share")
    assert (mean, high) == (1.0, pytest.approx(1.0))
    assert low == pytest.approx(count / (count + 1.96**2), abs=1e-4)
    assert estimate(torch.zeros(count, 3), apart(count), "share")[2] == pytest.approx(1 - low)
    _, low, high = estimate(torch.zeros(count, 3), apart(count), "change")
    assert high == pytest.approx(-low)
    assert high == pytest.approx(1 - count / (count + 1.96**2), abs=1e-4)
    assert all(map(math.isnan, estimate(torch.full((count, 3), 0.25), apart(count), "measure")[1:]))


def test_few_measures_have_students_interval():
    """Two means that lie 1 apart: half the distance times the quantile of one degree of freedom, 12.706."""
    mean, low, high = estimate(torch.tensor([[0.0], [1.0]]), apart(2), "measure")
    assert (mean, low, high) == (0.5, pytest.approx(0.5 - 6.353, abs=1e-3), pytest.approx(0.5 + 6.353, abs=1e-3))


def test_an_interval_holds_that_of_the_bootstrap():
    """Cases that share a concept say less than their number."""
    values, units = torch.tensor([[1.0]] * 20 + [[0.0]] * 20), [[side, str(i)] for side in "ab" for i in range(20)]
    assert estimate(values, units, "share") == bootstrap(values, units) == (0.5, 0.0, 1.0)


@pytest.mark.parametrize(
    ("better", "worse", "cases", "said"),
    [(19, 0, 19, "too few cases"), (20, 0, 20, "better"), (0, 20, 20, "worse"), (1, 0, 20, "no difference shown")],
)
def test_no_arm_is_called_better_for_few_cases_or_a_small_difference(better, worse, cases, said):
    won = [True] * better + [False] * (cases - better)
    lost = [False] * (cases - worse) + [True] * worse
    rows = rows_of(*((arm, f"a{i}", {"a": x}) for arm, all in (("sum", lost), ("mean", won)) for i, x in enumerate(all)))
    less = tables.differences(emoji_protocol.frame(rows), "sum", ["success"])
    assert tables.verdict(less, "success", "higher") == said
    other = {"better": "worse", "worse": "better"}.get(said, said)
    assert tables.verdict(less, "success", "lower") == other


def test_cases_of_fewer_seeds_are_padded():
    assert torch.isnan(as_table([[1.0], [1.0, 2.0]])).tolist() == [[False, True], [False, False]]


def rows_of(*cells):
    """(arm, case, {concept: seen}) -> rows, seeds counted up."""
    out = []
    for arm, case, seen in cells:
        seed = sum(r["arm"] == arm and r["case"] == case for r in out)
        out.append(
            {
                "arm": arm, "case": case, "kind": "pair", "prompt": "p", "seed": seed, "settings": {}, "seen": seen,
                "concepts": case.split("+"), "idle": [],
                "success": all(seen.values()), "subjects": 1.0, "style": True, "background": False,
                "apart": None, "all seen": all(seen.values()), "one scene": True, "in order": None, "another": False,
            }
        )  # fmt: skip
    return out


def test_tables_by_hand():
    rows = rows_of(
        ("alone fox", "fox+ink", {"fox": True, "ink": False}),
        ("alone ink", "fox+ink", {"fox": False, "ink": False}),
        ("sum", "fox+ink", {"fox": True, "ink": True}),
        ("sum", "fox+ink", {"fox": False, "ink": True}),
        ("mean", "fox+ink", {"fox": True, "ink": True}),
        ("mean", "fox+ink", {"fox": True, "ink": True}),
    )
    frame = emoji_protocol.frame(rows)
    _, concept_table = emoji_protocol.REPORT.tables
    lines = concept_table(frame).splitlines()
    assert lines[0] == "| arm | all seen | one scene | in order | concepts seen | style | background | another | apart |"
    # One case: Wilson's interval of 1 of 1 starts at 1 / (1 + 1.96 squared).
    one = "1.00 [0.21, 1.00]"
    assert (
        lines[2]
        == f"| alone | 0.00 [0.00, 0.79] | {one} | - | 0.25 (n = 1) | {one} | 0.00 [0.00, 0.79] | 0.00 [0.00, 0.79] | - |"
    )
    assert f"{one} | - | 0.75 (n = 1) | {one} |" in lines[3]  # fox in one of two, ink in both
    assert lines[4].startswith(f"| mean | {one} | {one} | - | 1.00 (n = 1) | {one} |")
    assert "| sum | 0.50 [0.00, 1.00] |" in tables.success_table(frame)
    assert "| mean | 0.50 [-0.41, 1.00] |" in tables.success_table(frame, against="sum")


def test_standing_apart_is_of_the_cases_with_several_subjects():
    rows = rows_of(*[("sum", case, {"a": True}) for case in ("a+b", "a+b", "a+c", "a+ink")])
    for row, value in zip(rows, (True, False, False, None), strict=True):
        row["apart"] = value
    wanted = tables.interval(emoji_protocol.frame(rows[:3]), "apart")
    assert tables.interval(emoji_protocol.frame(rows), "apart") == wanted
    assert wanted.startswith("0.25 [0.00, ")


def test_scores_are_compared_on_the_same_noise():
    """Pictures differ far more than arms do; only the difference on the same noise shows the arm."""
    rows = []
    for i, (case, seed) in enumerate(itertools.product(("a", "b", "c"), (1, 2))):
        shared = {"case": case, "concepts": [case], "idle": [], "kind": "one", "prompt": "p", "seed": seed}
        shared |= {"lpips": None, "ssim": None, "collapse": i % 2 == 0}
        rows.append(shared | {"clip_t": 0.1 * i, "seam": 0.0, "dino": {"fox": 0.2 * i, "ink": 0.0}, "arm": "sum"})
        better = {"clip_t": 0.1 * i + 0.012, "seam": 0.1 * i, "dino": {"fox": 0.2 * i, "ink": -0.03}}
        rows.append(shared | better | {"arm": "gates"})
    odd = shared | {"arm": "gates", "case": "d", "concepts": ["d"], "seed": 1}
    rows.append(odd | {"clip_t": 9.0, "seam": 9.0, "dino": {}})
    frame = checkpoint_protocol.frame(rows)
    (table,) = checkpoint_protocol.report(()).tables
    lines = table(frame, against="sum").splitlines()
    assert lines[0] == "| arm, less sum | collapse | DINO | CLIP-T | LPIPS | SSIM | seam |"
    # No case of three changed: as likely as not by Wilson's 1.96 squared / (3 + 1.96 squared). Steps of 0.2 between cases
    # have Student's interval 4.303 * 0.2 / sqrt(3).
    assert lines[2:] == [
        "| gates | 0.000 [-0.561, 0.561] | -0.015 (n = 3) | 0.012 (n = 3) | - | - | 0.250 [-0.247, 0.747] |"
    ]
    assert "| sum | 0.250 [" in tables.score_table(frame, ["CLIP-T"])


@pytest.fixture
def setup(pipe, loras):
    return Setup(pipe, {name: read_expert(path, name) for name, path in loras.items()}, OPTIONS)


def brightness(case, images):
    return [{"light": sum(image.convert("L").getdata()) / image.width} for image in images]


CASES = [Case(("fox", "ink"), "pair", "a fox in ink"), Case(("fox", "hat"), "pair", "a fox with a hat")]


def test_a_killed_run_goes_on_where_it_was(setup, tmp_path):
    some = [arms.base(), arms.summed()]
    whole = evaluate(setup, some, CASES, brightness, seeds=[1, 2], rows=Rows(tmp_path / "a"))
    evaluate(setup, some, CASES[:1], brightness, seeds=[1], rows=Rows(tmp_path / "b"))
    with (tmp_path / "b" / "rows-0.jsonl").open("a") as file:
        file.write('{"case": "fox+i')  # the line that was being written
    again = evaluate(setup, some, CASES, brightness, seeds=[1, 2], rows=Rows(tmp_path / "b"))
    order = lambda row: (row["arm"], row["case"], row["seed"])  # noqa: E731
    assert sorted(again, key=order) == sorted(whole, key=order)
    assert len((tmp_path / "b" / "rows-0.jsonl").read_text().splitlines()) == 8  # none was made twice


@pytest.mark.parametrize("line", ['{"case": "fox" "arm"}', '{"case": "fox"}', "[1]", "", "5"])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    row = dict.fromkeys(("case", "kind", "arm", "prompt", "seed", "settings"), "x")
    (tmp_path / "rows-3.jsonl").write_text(f"{json.dumps(row)}\n{line}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match="rows-3.jsonl, line 2: not a row with case, kind, arm, prompt, seed, settings: "):
        Rows(tmp_path).read()


def test_processes_divide_the_work_and_leave_nothing_out(setup, tmp_path):
    some = [arms.base(), arms.summed(), arms.mean()]
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
        row for row in one if row["arm"] != "base" and row["case"] == CASES[0].name
    ]


def test_what_is_asked_twice_counts_once(setup, tmp_path):
    """Else two equal rows would pass for two seeds, and intervals be too narrow."""
    measured, twice = [], [arms.base(), arms.base()]

    def counted(case, images):
        measured.extend(images)
        return brightness(case, images)

    made = evaluate(setup, twice, CASES[:1] * 2, counted, seeds=[1, 1, 2], rows=Rows(tmp_path))
    assert [row["seed"] for row in made] == [1, 2]
    assert len(measured) == 2


def test_rows_that_say_less_of_their_case_are_still_its_rows(setup, tmp_path):
    rows, path = Rows(tmp_path), tmp_path / "rows-0.jsonl"
    made = evaluate(setup, [arms.base()], CASES[:1], brightness, seeds=[1, 2], rows=rows)
    older = [{name: value for name, value in row.items() if name != "concepts"} for row in made]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert evaluate(setup, [arms.base()], CASES[:1], brightness, seeds=[1, 2], rows=rows) == made
    assert len(path.read_text().splitlines()) == 2


def test_a_case_is_drawn_at_its_own_size(setup, tmp_path):
    wide = replace(CASES[0], size=(48, 24))
    rows = Rows(tmp_path)
    made = evaluate(setup, [arms.base()], [CASES[0], wide], brightness, seeds=[1], rows=rows)
    sizes = []
    for row in made:
        with Image.open(picture_path(tmp_path, row)) as picture:
            sizes.append(picture.size)
    assert sizes == [(32, 32), (48, 24)]
    assert [row["settings"].get("width") for row in made] == [None, 48]
    assert [row["case"] for row in made] == ["fox+ink", "fox+ink 48x24"]  # tables pair arms by the name of the case
    assert evaluate(setup, [arms.base()], [wide], brightness, seeds=[1], rows=rows) == made[1:]


def test_other_settings_are_other_rows(setup, tmp_path):
    """Nor is a picture of other settings, seeds or prompts shown or overwritten."""
    rows, wanted = Rows(tmp_path), []
    twin = Case(CASES[0].concepts, CASES[0].kind, "ink: a fox")
    for steps, seed, case in ((1, 1, CASES[0]), (2, 1, CASES[0]), (1, 2, CASES[0]), (1, 1, twin)):
        setup.options = OPTIONS | {"num_inference_steps": steps}
        (row,) = evaluate(setup, [arms.base()], [case], brightness, seeds=[seed], rows=rows)
        assert (row["settings"]["num_inference_steps"], row["seed"], row["prompt"]) == (steps, seed, case.prompt)
        wanted.append((row, sample(setup.pipe, case.prompt, [seed], **setup.options)[0].tobytes()))
    assert len(rows.read()) == 4
    assert len({picture for _, picture in wanted}) == 4
    for row, picture in wanted:
        assert Image.open(picture_path(tmp_path, row)).tobytes() == picture


@pytest.mark.thorough
def test_arms_are_what_they_say_and_leave_nothing_behind(setup, tmp_path, loras):
    case, before = CASES[0], sample(setup.pipe, "a fox in ink", [3], **OPTIONS)[0]

    def drawn(arm):
        with arm.draws(setup, case):
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
    trained = arms.weighted("gates", gates=lambda case: tmp_path / case.name)
    assert drawn(arms.mean()) == half
    assert drawn(arms.alone("fox")) == fox
    assert drawn(trained) == gated
    assert (trained.covers(case), trained.covers(CASES[1])) == (True, False)
    assert drawn(arms.base()) == before.tobytes()
    assert sample(setup.pipe, "a fox in ink", [3], **OPTIONS)[0].tobytes() == before.tobytes()


def test_splits_share_no_concept():
    concepts = [{c for group in split.values() for case in group for c in case} for split in (emoji.VALIDATION, emoji.TEST)]
    assert not concepts[0] & concepts[1]
    assert concepts[0] | concepts[1] == set(emoji.words.HELD_OUT_SUBJECTS + emoji.words.HELD_OUT_STYLES)
    assert sum(map(len, emoji.TEST.values())) == 168
    assert list(emoji.TEST) == list(emoji.VALIDATION)
    for split in (emoji.VALIDATION, emoji.TEST):
        for group in split.values():
            assert len({frozenset(case) for case in group}) == len(group)


CANVASES = ((64, 64), (128, 64), (64, 128), (128, 128), (96, 64), (64, 96))


def test_evaluate_on_the_embedded_world(tmp_path, capsys):
    args = ["evaluate", "--limit", "1", "--seeds", "1", "--steps", "1", "--out", str(tmp_path), "--device", "cpu", "--json"]
    assert main([*args, "--arm", "base", "--arm", "sum"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["arm"], r["kind"]) for r in rows} == {(a, k) for a in ("base", "sum") for k in emoji.VALIDATION}
    assert (tmp_path / "table.md").read_text().startswith("| arm | one subject | subject x style |")
    assert all(Image.open(picture_path(tmp_path, row)).size in CANVASES for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "nowhere"], "this machine has no device 'nowhere': "),
        (["--steps", "0"], "Invalid value for '--steps'"),
    ],
)
def test_bad_settings_are_known_before_the_embedded_world_is_opened(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.setattr("mole_diffusers.emoji.world.emoji_world", lambda **_: pytest.fail("opened"))
    assert main(["evaluate", "--out", str(tmp_path), *given]) == 1
    assert message in capsys.readouterr().err


SEARCH_ARMS = strength_search.search_arms
WORLD = ["evaluate", "--limit", "1", "--seeds", "1", "--steps", "1", "--device", "cpu"]


@pytest.mark.thorough
def test_a_search_writes_weights_that_the_next_run_uses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(strength_search, "search_arms", lambda setup: SEARCH_ARMS(setup, (1.0, 1.3)))
    assert main([*WORLD, "--search", "--out", str(tmp_path / "search")]) == 0
    weights = json.loads((tmp_path / "search" / "weights.json").read_text())
    assert set(weights) == set(emoji.VALIDATION)
    assert all(set(found) == {"subject", "style"} for found in weights.values())
    chosen = ["--weights", str(tmp_path / "search" / "weights.json"), "--arm", "grid search"]
    assert main([*WORLD, *chosen, "--out", str(tmp_path / "used")]) == 0
    rows = Rows(tmp_path / "used").read()
    assert [r["settings"]["weights"] for r in rows] == [weights] * len(emoji.VALIDATION)
    capsys.readouterr()
    assert main([*WORLD, "--search", "--split", "test", "--out", str(tmp_path / "none")]) == 1
    assert "nothing is chosen on the test split" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.thorough
def test_a_table_is_of_its_own_run_alone(tmp_path, capsys):
    """The same folder with more steps: what was drawn before is neither in the table nor in the figures' rows."""
    args = ["evaluate", "--limit", "1", "--seeds", "1", "--device", "cpu", "--arm", "base", "--out"]
    assert main([*args, str(tmp_path / "one"), "--steps", "1"]) == 0
    capsys.readouterr()
    tables = []
    for folder in ("one", "two"):
        assert main([*args, str(tmp_path / folder), "--steps", "3", "--json"]) == 0
        tables.append(((tmp_path / folder / "table.md").read_text(), json.loads(capsys.readouterr().out)))
    assert tables[0] == tables[1]
    assert (tmp_path / "one" / "samples.png").read_bytes() == (tmp_path / "two" / "samples.png").read_bytes()
    assert len(Rows(tmp_path / "one").read()) == 2 * len(Rows(tmp_path / "two").read())


@pytest.mark.thorough
def test_strengths_that_move_and_experts_that_only_stand_by(tmp_path, capsys):
    run = ["--arm", "sum", "--share", "0.3", "--share", "0.7", "--attached", "2", "--attached", "4", "--out", str(tmp_path)]
    assert main([*WORLD, *run]) == 0
    rows = Rows(tmp_path).read()
    assert {(r["arm"], len(r["seen"]) + len(r["idle"])) for r in rows} == {
        (f"sum @ {share}", count) for share in (0.3, 0.7) for count in (2, 4)
    }
    assert {p.name for p in tmp_path.glob("*.png")} == {"samples.png", "bars.png", "experts.png", "frontier.png"}
    capsys.readouterr()


@pytest.mark.thorough
def test_a_launcher_divides_a_run(tmp_path):
    """torchrun sets what `accelerate launch` sets on GPUs, and on CPUs with `--multi_gpu`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mole_diffusers"]
    command = [*launch, *WORLD, "--arm", "base", "--arm", "sum", "--arm", "mean", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(emoji.__file__).parent.parent)
    made = [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("rows-*.jsonl"))]
    assert len(made) == 2
    assert min(made) > 0
    assert sum(made) == 3 * len(emoji.VALIDATION)
    assert (tmp_path / "table.md").exists()
