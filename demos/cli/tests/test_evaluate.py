"""`mole evaluate` on the embedded world: what a run writes, searches and shares among processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import mole_world
from mole_cli.mole import main
from mole_world.evaluation import strength_search
from mole_world.evaluation.rows import Rows, picture_path

CANVASES = ((64, 64), (128, 64), (64, 128), (128, 128), (96, 64), (64, 96))


def test_evaluate_on_the_embedded_world(tmp_path, capsys):
    args = ["evaluate", "--limit", "1", "--seeds", "1", "--steps", "1", "--out", str(tmp_path), "--device", "cpu", "--json"]
    assert main([*args, "--method", "base", "--method", "sum"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(r["method"], r["kind"]) for r in rows} == {(a, k) for a in ("base", "sum") for k in mole_world.VALIDATION}
    assert (tmp_path / "table.md").read_text().startswith("| method | one subject | subject x style |")
    assert all(Image.open(picture_path(tmp_path, row)).size in CANVASES for row in rows)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--device", "nowhere"], "this machine has no device 'nowhere': "),
        (["--steps", "0"], "Invalid value for '--steps'"),
    ],
)
def test_bad_settings_are_known_before_the_embedded_world_is_opened(tmp_path, capsys, monkeypatch, given, message):
    monkeypatch.setattr("mole_world.world.emoji_world", lambda **_: pytest.fail("opened"))
    assert main(["evaluate", "--out", str(tmp_path), *given]) == 1
    assert message in capsys.readouterr().err


SEARCH_METHODS = strength_search.search_methods
WORLD = ["evaluate", "--limit", "1", "--seeds", "1", "--steps", "1", "--device", "cpu"]


@pytest.mark.thorough
def test_a_search_writes_weights_that_the_next_run_uses(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(strength_search, "search_methods", lambda setup: SEARCH_METHODS(setup, (1.0, 1.3)))
    assert main([*WORLD, "--search", "--out", str(tmp_path / "search")]) == 0
    weights = json.loads((tmp_path / "search" / "weights.json").read_text())
    assert set(weights) == set(mole_world.VALIDATION)
    assert all(set(found) == {"subject", "style"} for found in weights.values())
    chosen = ["--weights", str(tmp_path / "search" / "weights.json"), "--method", "grid search"]
    assert main([*WORLD, *chosen, "--out", str(tmp_path / "used")]) == 0
    rows = Rows(tmp_path / "used").read()
    assert [r["settings"]["weights"] for r in rows] == [weights] * len(mole_world.VALIDATION)
    capsys.readouterr()
    assert main([*WORLD, "--search", "--split", "test", "--out", str(tmp_path / "none")]) == 1
    assert "nothing is chosen on the test split" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.thorough
def test_a_table_is_of_its_own_run_alone(tmp_path, capsys):
    """The same folder with more steps: what was drawn before is neither in the table nor in the figures' rows."""
    args = ["evaluate", "--limit", "1", "--seeds", "1", "--device", "cpu", "--method", "base", "--out"]
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
    run = [
        "--method",
        "sum",
        "--share",
        "0.3",
        "--share",
        "0.7",
        "--attached",
        "2",
        "--attached",
        "4",
        "--out",
        str(tmp_path),
    ]
    assert main([*WORLD, *run]) == 0
    rows = Rows(tmp_path).read()
    assert {(r["method"], len(r["seen"]) + len(r["idle"])) for r in rows} == {
        (f"sum @ {share}", count) for share in (0.3, 0.7) for count in (2, 4)
    }
    assert {p.name for p in tmp_path.glob("*.png")} == {"samples.png", "bars.png", "experts.png", "frontier.png"}
    capsys.readouterr()


@pytest.mark.thorough
def test_a_launcher_divides_a_run(tmp_path):
    """torchrun sets what `accelerate launch` sets on GPUs, and on CPUs with `--multi_gpu`."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "mole_cli"]
    command = [*launch, *WORLD, "--method", "base", "--method", "sum", "--method", "mean", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(mole_world.__file__).parent.parent)
    made = [len(path.read_text().splitlines()) for path in sorted(tmp_path.glob("rows-*.jsonl"))]
    assert len(made) == 2
    assert min(made) > 0
    assert sum(made) == 3 * len(mole_world.VALIDATION)
    assert (tmp_path / "table.md").exists()
