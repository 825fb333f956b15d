"""Commands made from functions: their options, their help, and what they print."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import pytest
import typer

from mole_cli.commands import Group, Result, as_command, help_of, settings_of


@dataclass
class Config:
    """How it is cooked.

    Attributes:
        minutes: in the oven, without
            what it takes to heat up.
        herbs: what goes in.
    """

    minutes: int = 20
    herbs: Sequence[str] = ("dill",)
    secret: str = ""


@settings_of(Config, without=("secret",))
class Cooking(Group):
    """Of the kitchen.

    Attributes:
        oven (NAME): which one, the [large] say. Default: the first.
    """

    panel, prefix = "In the kitchen", "cook_"
    oven: str | None = None


def bake(what: str, times: Sequence[int] = (), hot: bool = False, *, how: Cooking) -> Result:
    """Bake something
    in the oven.

    Args:
        what: a cake.
        times (N): how often.
        hot: serve it at once.
    """
    return Result({"what": what, "times": list(times), "hot": hot, **vars(how)}, f"a {what}", status=len(times))


def command():
    whole = typer.Typer()
    whole.command(help=help_of(bake))(as_command(bake))
    return typer.main.get_command(whole)


def test_options_are_what_a_function_and_its_groups_take():
    found = {option.name: option for option in command().params}
    assert found["what"].param_type_name == "argument"
    assert (found["hot"].opts, found["hot"].secondary_opts) == (["--hot"], [])
    assert (found["times"].metavar, found["times"].help) == ("N", "how often. Repeatable.")
    minutes = found["cook_minutes"]
    assert minutes.help == "in the oven, without what it takes to heat up."
    assert (minutes.default, minutes.show_default, minutes.rich_help_panel) == (None, "20", "In the kitchen")
    assert found["cook_herbs"].show_default == "dill"
    assert (found["cook_oven"].help, found["cook_oven"].show_default) == (
        r"which one, the \[large] say. Default: the first.",
        False,
    )
    assert "cook_secret" not in found
    assert help_of(bake) == "Bake something in the oven."


def test_a_command_gets_groups_and_prints_what_it_returns(capsys):
    argv = ["cake", "--times", "1", "--times", "2", "--cook-minutes", "5"]
    assert command().main(argv, standalone_mode=False) == 2
    assert capsys.readouterr().out == "a cake\n"
    command().main([*argv, "--json"], standalone_mode=False)
    said = json.loads(capsys.readouterr().out)
    assert (said["times"], said["hot"], said["minutes"], said["oven"]) == ([1, 2], False, 5, None)


@dataclass
class Oven:
    """In the wall.

    Attributes:
        heat: of the air.
        fan: whether air moves.
        mode: where it is hot.
    """

    name = "oven"
    heat: Annotated[int, 50, 250] = 180
    fan: bool = False
    mode: Literal["top", "both"] = "both"


@dataclass
class Pan:
    """On the stove.

    Attributes:
        heat: of the plate.
        mode: with or without a lid.
    """

    name = "pan"
    heat: Annotated[int, 50, 250] = 3
    mode: Literal["lid", "both"] = "both"


@settings_of(Oven, Pan)
class Heat(Group):
    """How."""


def cook(*, how: Heat) -> Result:
    """Cook."""
    return Result(vars(how), str(vars(how)))


def test_configs_that_share_an_option_say_what_it_means_in_each(capsys):
    whole = typer.Typer()
    whole.command()(as_command(cook))
    found = {option.name: option for option in typer.main.get_command(whole).params}
    assert found["heat"].help == "oven: of the air. pan: of the plate."
    assert not found["heat"].show_default
    assert found["fan"].help == "oven: whether air moves."
    assert found["mode"].show_default == "both"
    command = typer.main.get_command(whole)
    command.main(["--heat", "200", "--mode", "lid", "--no-fan"], standalone_mode=False)
    assert capsys.readouterr().out == "{'heat': 200, 'fan': False, 'mode': 'lid'}\n"
    for argv, said in ((["--heat", "251"], "less than or equal to 250"), (["--mode", "x"], "'top', 'both', 'lid'")):
        with pytest.raises(typer.TyperException) as refused:
            command.main(argv, standalone_mode=False)
        assert said in refused.value.format_message()
