"""Settings: plain data that is checked when it is made."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest

from mole_diffusers import training
from mole_diffusers.training import OBJECTIVES, GateTraining, Validation
from mole_diffusers.training.config import BALANCE, TERMS, CollageTerm, DistillationTerm, Term


def test_settings_are_checked_and_survive_json():
    for options, message in (
        ({"terms": {"single": 0.0, "balance": 1.0}}, "at least one term"),
        ({"terms": {"sigle": 1.0}}, r"unknown term 'sigle'; known: \['single'"),
        (
            {"terms": {"rollout": {"step": 3}}},
            r"unknown options \['step'\] of the rollout term; known: \['weight'",
        ),
        ({"terms": {"single": -1.0}}, "weight of the single term must be 0 or more, got -1.0"),
        ({"terms": {"single": {"batch": 0}}}, "batch of the single term must be 1 or more, got 0"),
        ({"terms": {"rollout": {"steps": 0}}}, "steps of the rollout term must be 1 or more, got 0"),
        ({"terms": {"clip": {"lengths": [50, 20]}}}, r"must be the least and the most steps, got \[50, 20\]"),
        ({"terms": {"clip": {"lengths": [20]}}}, r"must be the least and the most steps, got \[20\]"),
        ({"lr": "1e-3"}, "lr of the training must be a number, got '1e-3'"),
        ({"steps": True}, "steps of the training must be a whole number, got True"),
        ({"batch": 0}, "batch of the training must be 1 or more, got 0"),
        ({"max_norm": -1.0}, "max_norm of the training must be 0 or more, got -1.0"),  # would turn every gradient round
        ({"lr": float("nan")}, "lr of the training must be 0 or more, got nan"),
        ({"terms": {"single": float("nan")}}, "weight of the single term must be 0 or more, got nan"),
        ({"warmup": -1}, "warmup of the training must be 0 or more, got -1"),
        ({"precision": "int8"}, r"precision of the training must be one of \['no', 'bf16', 'fp16'\], got 'int8'"),
        ({"schedule": "steep"}, "schedule of the training must be one of "),
        ({"ema": 1.0}, "ema must be 0 or more and less than 1"),
    ):
        with pytest.raises(ValueError, match=message):
            GateTraining(**options)
    for options, message in (({"every": -1}, "every of the validation must be 0"), ({"seeds": 0}, "seeds of the valid")):
        with pytest.raises(ValueError, match=message):
            Validation(**options)
    config = GateTraining({"rollout": {"steps": 4}}, lr=0.1, validation=Validation(every=3, prompts=("a fox",)))
    assert GateTraining.from_dict(json.loads(json.dumps(asdict(config)))) == config
    for given in ({"stepps": 3}, {"validation": {"stepps": 3}}):
        with pytest.raises(ValueError, match=r"unknown options \['stepps'\] of the "):
            GateTraining.from_dict(given)


def test_a_message_quotes_little_of_a_value():
    """A few lines of YAML, whose lists name one another, are gigabytes when they are written out."""
    lists = ["x"] * 9
    for _ in range(4):
        lists = [lists] * 9
    with pytest.raises(ValueError, match="lr of the training must be a number, got ") as error:
        GateTraining(lr=lists)
    assert len(str(error.value)) < 200


def test_every_term_has_an_objective_and_only_balance_has_none():
    assert TERMS.keys() == {*OBJECTIVES, BALANCE}


def test_terms_are_read_once_and_keep_their_defaults():
    config = GateTraining({"collage": {"weight": 2, "guidance": 3}, "single": 0.0, "balance": 0.1})
    assert config.parsed == {"collage": CollageTerm(weight=2, guidance=3), "balance": Term(weight=0.1)}
    assert config.parsed is config.parsed
    assert replace(config, terms={"single": 1.0}).parsed == {"single": DistillationTerm()}


def test_configs_import_nothing_of_what_they_configure():
    """So that a command can say what is wrong with them, and print its help, before torch is loaded."""
    code = (
        "import sys, mole_diffusers.training.config as c; c.GateTraining(); print({'torch', 'diffusers'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def test_every_public_name_is_there():
    assert all(getattr(training, name) for name in training.__all__)
    with pytest.raises(AttributeError, match="No mole_diffusers.training attribute nothing"):
        training.nothing  # noqa: B018
