"""Turn functions into commands: parameters become options, and the docstring becomes the help.

A parameter that is a `Group` becomes several options, which commands can share; one that is `Given` tells which options
were given. The help of an option is its entry `name (METAVAR): help` under Args or Attributes of the docstring; otherwise it
comes from the type.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from rich.markup import escape
from typer import Argument, Context, Option

from mole_cli.console import quiet
from mole_diffusers.options import described

T = TypeVar("T")


class Result(NamedTuple):
    """The result of a command: as data for --json, in words, and the exit status."""

    facts: Any
    words: str
    status: int = 0


class Group:
    """Options that belong together, as the fields of a dataclass. A command gets an instance with the values that were
    given.

    `panel` is their heading in the help, and `prefix` starts their names on the command line.
    """

    panel: ClassVar[str | None] = None
    prefix: ClassVar[str] = ""


class Given(frozenset[str]):
    """The names of the options on the command line."""

    def check_beside(self, option: str, reads: Collection[str], why: str) -> None:
        """Raise ValueError for options that would be ignored beside this one, which `reads` these alone."""
        always = {field.name for field in fields(Console)}
        if option in self and (unread := sorted(self - {option, *reads} - always)):
            raise ValueError(f"{_flag(option)} {why}: leave out {', '.join(map(_flag, unread))}")


@dataclass
class Verbose(Group):
    """Options of every command.

    Attributes:
        verbose: show warnings, notices and loading bars of other libraries.
    """

    verbose: Annotated[bool, Option("--verbose", "-v")] = False


@dataclass
class Console(Verbose):
    """Options of every command that prints a result.

    Attributes:
        as_json: print the result as JSON.
    """

    as_json: Annotated[bool, Option("--json")] = False


def as_command(command: Callable[..., Result | None]) -> Callable[..., int]:
    """The function that typer turns into a command. It prints what `command` returns, and returns the exit status."""
    signature = inspect.signature(command, eval_str=True)
    kinds = {name: parameter.annotation for name, parameter in signature.parameters.items()}
    groups: dict[str, Any] = {"console": Verbose if signature.return_annotation is None else Console}
    groups |= {name: kind for name, kind in kinds.items() if isinstance(kind, type) and issubclass(kind, Group)}
    told = [name for name, kind in kinds.items() if kind is Given]
    entries, own = described(command), [name for name in kinds if name not in (*groups, *told)]
    options = [_option(name, kinds[name], signature.parameters[name].default, entries.get(name)) for name in own]
    options += [option for group in groups.values() for option in _options(group)]

    def run(ctx: Context, **values: Any) -> int:
        given = Given(name for name in values if getattr(ctx.get_parameter_source(name), "name", "") == "COMMANDLINE")
        made = {n: g(**{f.name: values.pop(g.prefix + f.name) for f in fields(g)}) for n, g in groups.items()}
        console = made.pop("console")
        with nullcontext() if console.verbose else quiet():
            result = command(**values, **made, **dict.fromkeys(told, given))
        if result is None:
            return 0
        print(json.dumps(result.facts) if console.as_json else result.words)
        return result.status

    context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=Context)
    vars(run)["__signature__"] = inspect.Signature([context, *options])
    run.__annotations__ = {option.name: option.annotation for option in (context, *options)}
    return run


def help_of(command: Callable[..., Any]) -> str:
    """The docstring before Args, with each paragraph on one line."""
    return re.sub(r"(?<!\n)\n(?!\n)", " ", (inspect.getdoc(command) or "").partition("\n\nArgs:\n")[0])


def settings_of(
    *configs: type, only: Collection[str] | None = None, without: Collection[str] = ()
) -> Callable[[type[T]], type[T]]:
    """Add the fields of configs to a group: their types are the options' types, their docstrings the help.

    Options that are not given are None. What the group's own docstring says of a field comes before what the config's says.
    A field that several configs have is one option, whose help says for each what it means there; such configs have a
    `name`.

    Args:
        only: names of fields; by default all but those in `without`.
    """
    found: dict[str, dict[type, Any]] = {}  # option -> the configs that have it, and its types there
    for config in configs:
        for name, kind in get_type_hints(config, include_extras=True).items():
            if name not in without and (only is None or name in only) and get_origin(kind) is not ClassVar:
                found.setdefault(name, {})[config] = kind

    def added(group: type[T]) -> type[T]:
        options = {name: _setting(name, kinds) for name, kinds in found.items()}
        group.__annotations__ = inspect.get_annotations(group) | options
        for name in options:
            setattr(group, name, None)
        return dataclass(group)

    return added


def _setting(name: str, kinds: Mapping[type, Any]) -> Any:
    """The type of an option that these configs have as a field, or None, with its help."""
    kind, least, most, said = next(iter(kinds.values())), None, None, dict[str, list[str]]()
    if get_origin(kind) is Literal:
        kind = Literal[tuple(dict.fromkeys(value for each in kinds.values() for value in get_args(each)))]  # type: ignore[valid-type]
    if get_origin(kind) is Annotated:
        kind, least, most = get_args(kind)
    for config in kinds:
        said.setdefault(described(config)[name][1], []).append(getattr(config, "name", ""))
    text = " ".join(f"{', '.join(names)}: {text}".removeprefix(": ") for text, names in said.items())
    defaults = [getattr(config, name) for config in kinds]
    default, several = defaults[0], get_origin(kind) is Sequence
    is_shown = default not in (None, "") and all(each == default for each in defaults)
    shown = False if not is_shown else ", ".join(default) if several else str(default)
    return Annotated[kind if several else kind | None, Option(show_default=shown, min=least, max=most, help=text)]


def _options(group: type[Group]) -> list[inspect.Parameter]:
    """The options of base classes come first; each has the panel of its own class."""
    kinds, options = get_type_hints(group, include_extras=True), []
    entries = described(group)
    for each in reversed(group.__mro__[:-2]):
        panel = vars(each).get("panel")
        for name in inspect.get_annotations(each):
            default = getattr(group, name, inspect.Parameter.empty)
            options.append(_option(group.prefix + name, kinds[name], default, entries.get(name), panel))
    return options


def _option(
    name: str, kind: Any, default: Any, entry: tuple[str | None, str] | None, panel: str | None = None
) -> inspect.Parameter:
    kind, *given = get_args(kind) if get_origin(kind) is Annotated else [kind]
    is_argument = not given and default is inspect.Parameter.empty
    flag = [_flag(name)] if kind is bool else []  # only --name, no --no-name
    info: Any = copy(given[0]) if given else Argument() if is_argument else Option(*flag)
    info.metavar, info.help = entry or (info.metavar, info.help)  # an own entry comes before that of a config
    info.rich_help_panel = panel
    if get_origin(kind) is Sequence:  # typer only knows lists
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
        info.help += "" if is_argument else " Repeatable."
    if "Default:" in info.help:
        info.show_default = False
    info.help = escape(info.help)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
