"""The scripts of the emoji world import what exists; the long ones are run by hand."""

import importlib
from pathlib import Path

import pytest

EMOJI = Path(__file__).parent.parent / "demos" / "emoji"


@pytest.mark.parametrize("name", sorted(path.stem for path in EMOJI.glob("*.py")))
def test_a_script_imports_and_says_what_it_does(monkeypatch, name):
    monkeypatch.syspath_prepend(str(EMOJI))
    assert importlib.import_module(name).__doc__


def test_every_family_has_its_arms_and_its_place_in_the_report(monkeypatch):
    monkeypatch.syspath_prepend(str(EMOJI))
    arms, report, training = (importlib.import_module(name) for name in ("arms", "report", "train_gates"))
    drawn = {arm.name for arm in arms.families()}
    assert set(report.TRAINED) == drawn & set(report.TRAINED) | {"gates"}
    assert len(report.TRAINED) == len(report.CEILINGS) - 1 == len(training.FAMILIES)
