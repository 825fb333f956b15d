"""The base models that can be chosen. All visitors share the one that is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mole_app.studio.base_models import Base, open_base, usual_guidance
from mole_app.studio.names import known_names, matching, shared_name
from mole_app.studio.render import Studio
from mole_app.web.jobs import ReportProgress, Work
from mole_app.web.loras import Loras


class Bases:
    """The base models of an app.

    Args:
        loras: their texts are read with the open base.
        sources: name -> argument of `opening`, named as by `base_models.bases_of`; by default only the studio's own.
        opening: opens one of them.
    """

    def __init__(
        self,
        studio: Studio,
        loras: Loras,
        sources: Mapping[str, str] | None = None,
        opening: Callable[[str], Base] = open_base,
    ):
        self.studio, self._loras, self._opening, self._first = studio, loras, opening, studio.base.name
        self.sources = dict(sources or {Path(studio.base.name).name: studio.base.name})

    @property
    def open(self) -> str | None:
        """The name of the open base model, one of `sources`; None if none is open, see `Studio.base`."""
        return next((name for name, source in self.sources.items() if source == self.studio.base.name), None)

    def change(self, name: str) -> Work:
        """Replace the base model for all visitors. The work returns a sentence.

        Raises ValueError for a name that is not in `sources`.
        """
        if (found := matching(name, self.sources)) is None:
            raise ValueError(f"there is no base model {name!r}; {known_names(name, self.sources)}")

        def work(report: ReportProgress) -> str:
            report(f"opening {found}")
            if self.open != found:
                with self._loras.let_go():
                    self.studio.base.change(self.sources[found], self._opening)
            return f"{found} is open: {type(self.studio.base.pipe).__name__}"

        return work

    def other(self, asked: str | None) -> str | None:
        """The name of the base model that settings are for, or None if that one is open.

        Args:
            asked: the base's name in `sources` or in a recipe. A base that is not in `sources` is recognised by its file
                name.
        """
        asked = asked or ""
        wanted, here = shared_name(self.sources.get(asked, asked)), shared_name(self.studio.base.name)
        known = next((name for name, source in self.sources.items() if shared_name(source) == wanted), None)
        is_open = wanted == here or (known is None and Path(wanted).name == Path(here).name)
        return None if is_open else known or Path(wanted).name

    def check(self, asked: str | None, mend: str) -> None:
        """Raises ValueError if settings are for another base model than the open one; `mend` says what to do about it."""
        self.studio.base.check_open()
        if (other := self.other(asked)) is not None:
            raise ValueError(f"this is for the base model {other!r}, and here is {self.open!r}: {mend}")

    def settings(self) -> dict[str, Any]:
        """An open size and the usual guidance of the base model, as in a Recipe; {} for the one from the start."""
        if self.studio.base.name == self._first:
            return {}
        return {"width": 0, "height": 0, "guidance": usual_guidance(self.studio.base.pipe, self.studio.base.name)}
