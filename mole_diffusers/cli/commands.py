"""Turn functions into commands: parameters become options, and the docstring becomes the help.

A parameter that is a `Group` becomes several options, which commands can share. The help of an option is its entry `name
(METAVAR): help` under Args or Attributes of the docstring; otherwise it comes from the type.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Sequence
from copy import copy
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from rich.markup import escape
from typer import Argument, Context, Option

from mole_diffusers.cli.console import quiet

ENTRY = re.compile(r"^ {4}([\w, ]+?)(?: \((\S+)\))?: (.+(?:\n {8}.+)*)", re.MULTILINE)  # in a docstring's Args
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


def _be_quiet_unless(ctx: Context, verbose: bool) -> None:
    if not verbose:
        ctx.with_resource(quiet())


@dataclass
class Verbose(Group):
    """Options of every command.

    Attributes:
        verbose: show warnings, notices and loading bars of other libraries.
    """

    verbose: Annotated[bool, Option("--verbose", "-v", callback=_be_quiet_unless)] = False


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
    groups: dict[str, Any] = {"console": Verbose if signature.return_annotation is None else Console}
    options, entries = [], _entries(command)
    for name, parameter in signature.parameters.items():
        kind = parameter.annotation
        if isinstance(kind, type) and issubclass(kind, Group):
            groups[name] = kind
        else:
            options.append(_option(name, kind, parameter.default, entries.get(name)))
    options += [option for group in groups.values() for option in _options(group)]

    def run(**given: Any) -> int:
        made = {n: g(**{f.name: given.pop(g.prefix + f.name) for f in fields(g)}) for n, g in groups.items()}
        console = made.pop("console")
        if (result := command(**given, **made)) is None:
            return 0
        print(json.dumps(result.facts) if console.as_json else result.words)
        return result.status

    vars(run)["__signature__"] = inspect.Signature(options)
    run.__annotations__ = {option.name: option.annotation for option in options}
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
    found: dict[str, list[tuple[type, Any]]] = {}  # option -> the configs that have it, and its types there
    for config in configs:
        for name, kind in get_type_hints(config, include_extras=True).items():
            if name not in without and (only is None or name in only) and get_origin(kind) is not ClassVar:
                found.setdefault(name, []).append((config, kind))

    def added(group: type[T]) -> type[T]:
        own = _entries(group)
        about = [inspect.getdoc(group) or "", *(() if own else ("\nAttributes:",))]
        for name, places in found.items():
            group.__annotations__ = inspect.get_annotations(group) | {name: _setting(name, places)}
            setattr(group, name, None)
            if name not in own:
                about.append(f"    {name}: {_help(name, [config for config, _ in places])}")
        group.__doc__ = "\n".join(about)
        return dataclass(group)

    return added


def _setting(name: str, places: Sequence[tuple[type, Any]]) -> Any:
    """The type of an option: that of a field, or the values of several, or None."""
    kind = places[0][1]
    if get_origin(kind) is Literal:
        kind = Literal[tuple(dict.fromkeys(value for _, each in places for value in get_args(each)))]  # type: ignore[valid-type]
    least, most = None, None
    if get_origin(kind) is Annotated:
        kind, least, most = get_args(kind)
    defaults = {repr(getattr(config, name)): getattr(config, name) for config, _ in places}
    default = next(iter(defaults.values())) if len(defaults) == 1 else None
    several = get_origin(kind) is Sequence
    shown = False if default is None or default == "" else ", ".join(default) if several else str(default)
    return Annotated[kind if several else kind | None, Option(show_default=shown, min=least, max=most)]


def _help(name: str, configs: Sequence[Any]) -> str:
    """The help of a field; if several configs have it, after their names."""
    if len(configs) == 1 and not hasattr(configs[0], "name"):
        return _entries(configs[0])[name][1]
    said: dict[str, list[str]] = {}
    for config in configs:
        said.setdefault(_entries(config)[name][1], []).append(config.name)
    return " ".join(f"{', '.join(names)}: {text}" for text, names in said.items())


def _options(group: type[Group]) -> list[inspect.Parameter]:
    """The options of base classes come first; each has the panel of its own class."""
    kinds, options = get_type_hints(group, include_extras=True), []
    for each in reversed(group.__mro__[:-2]):
        entries, panel = _entries(each), vars(each).get("panel")
        for name in inspect.get_annotations(each):
            default = getattr(group, name, inspect.Parameter.empty)
            options.append(_option(group.prefix + name, kinds[name], default, entries.get(name), panel))
    return options


def _option(
    name: str, kind: Any, default: Any, entry: tuple[str | None, str] | None, panel: str | None = None
) -> inspect.Parameter:
    kind, *given = get_args(kind) if get_origin(kind) is Annotated else [kind]
    is_argument = not given and default is inspect.Parameter.empty
    flag = [f"--{name.replace('_', '-')}"] if kind is bool else []  # only --name, no --no-name
    info: Any = copy(given[0]) if given else Argument() if is_argument else Option(*flag)
    info.metavar, info.help = entry or (info.metavar, info.help)
    info.rich_help_panel = panel
    if get_origin(kind) is Sequence:  # typer only knows lists
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
        info.help += "" if is_argument else " Repeatable."
    if "Default:" in info.help:
        info.show_default = False
    info.help = escape(info.help)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _entries(thing: Any) -> dict[str, tuple[str | None, str]]:
    """Name -> (metavar, help) from the Args or Attributes of a docstring."""
    entries = ENTRY.findall(inspect.getdoc(thing) or "")
    return {n: (metavar or None, " ".join(text.split())) for names, metavar, text in entries for n in names.split(", ")}
