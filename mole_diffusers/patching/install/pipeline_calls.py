"""Run calls of a pipeline, and its `encode_prompt`, inside contexts of its mixture.

Python looks up `__call__` on the class, so such a pipeline gets a subclass of its own class, with the same name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

from mole_diffusers.patching.undo import Undo

Around = Callable[[Mapping[str, Any]], AbstractContextManager[None]]  # a call's arguments -> its context
Encoding = Callable[[], AbstractContextManager[None]]  # the context of `encode_prompt`

_around: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # pipeline -> the context of its calls
_encoding: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # pipeline -> that of its `encode_prompt`
_shared: WeakKeyDictionary[Any, WeakMethod] = WeakKeyDictionary()  # that of calls, for those that are not in `_around`


def lock_calls(pipe: Any, around: Around, encoding: Encoding, undo: Undo) -> None:
    """Make every call of `pipe` run inside `around(arguments)`, a method that holds a lock, and `encode_prompt` inside
    `encoding()`.

    A call that another thread began before the first mixture came is not waited for.
    """
    undo.callback(unlock_calls, pipe)
    _around[pipe], _encoding[pipe] = WeakMethod(around), WeakMethod(encoding)
    _give_class(pipe)


def share_calls(pipe: Any, around: Around) -> None:
    """Like `lock_calls`, for as long as the pipeline lives and has no lock of its own."""
    _shared[pipe] = WeakMethod(around)
    _give_class(pipe)


def calls_are_locked(pipe: Any) -> bool:
    """Whether calls of `pipe` run inside a context."""
    return pipe in _around


def unlock_calls(pipe: Any) -> None:
    """Restore the pipeline's own class."""
    _around.pop(pipe, None)
    _encoding.pop(pipe, None)
    if pipe not in _shared and _is_given(type(pipe)):
        pipe.__class__ = type(pipe).__base__


def _is_given(kind: type) -> bool:
    return "_runs_inside_a_context" in vars(kind)


def _give_class(pipe: Any) -> None:
    kind: Any = type(pipe)
    if not _is_given(kind):
        pipe.__class__ = _given(kind)


@functools.cache
def _given(kind: Any) -> Any:
    """The subclass of a class of pipelines whose calls look for the context of their pipeline."""
    names = list(inspect.signature(kind.__call__).parameters)[1:]

    @functools.wraps(kind.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _around.get(self) or _shared.get(self)
        around = None if method is None else method()
        with nullcontext() if around is None else around({**dict(zip(names, args, strict=False)), **kwargs}):
            return kind.__call__(self, *args, **kwargs)

    def encode_prompt(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = _encoding.get(self)
        encoding = None if method is None else method()
        with nullcontext() if encoding is None else encoding():
            return kind.encode_prompt(self, *args, **kwargs)

    def reduced(self: Any, protocol: int) -> tuple:
        _, _, *state = kind.__reduce_ex__(self, protocol)
        return object.__new__, (kind,), *state  # a copy has the pipeline's own class

    own = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    ours: dict[str, Any] = {"__call__": call, "__reduce_ex__": reduced, "_runs_inside_a_context": True}
    if inspect.isfunction(inspect.getattr_static(kind, "encode_prompt", None)):
        ours["encode_prompt"] = functools.wraps(kind.encode_prompt)(encode_prompt)
    return type(kind.__name__, (kind,), own | ours)
