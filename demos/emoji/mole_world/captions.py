"""How captions say a scene: a style before or after, sentences and tags, several words for the same relation."""

from __future__ import annotations

from collections.abc import Sequence

from mole_world.words import LIGHTS, OPEN, PLACES

FORMS = (  # {what}: the subjects and how they stand; {where}: background and light; {tags}: the same, with commas alone
    "{style} drawing of {what}{where}",
    "a {style} drawing of {what}{where}",
    "{what}{where}, {style} drawing",
    "{what}{where} in {style} style",
    "a picture of {what}{where}, {style} style",
    "{style} picture of {what}{where}",
    "{style}, {tags}",
    "{tags}, {style} style",
)
TAGGED = tuple(i for i, form in enumerate(FORMS) if "{tags}" in form)
BETWEEN = {  # relation -> what stands between the first subject and the others
    None: ("and", "next to", "beside"),
    "left of": ("left of", "to the left of", "on the left and"),
    "right of": ("right of", "to the right of", "on the right and"),
    "above": ("above", "over"),
    "below": ("below", "under"),
    "riding": ("riding", "riding on"),
    "on": ("on", "on top of"),
    "in front of": ("in front of",),
    "behind": ("behind",),
    "hugging": ("hugging",),
    "holding": ("holding",),
}
BEHIND = {"on the left and": "on the right", "on the right and": "on the left"}  # and what stands behind the second
PAPER = "on white paper"


def article(word: str) -> str:
    return f"an {word}" if word[0] in "aeio" else f"a {word}"


def worded(
    subjects: Sequence[str],
    style: str,
    background: str,
    relation: str | None,
    light: str | None,
    *,
    form: int = 0,
    way: int = 0,
) -> str:
    """A scene in one wording.

    Args:
        form: index into FORMS. Tags cannot say a relation.
        way: which of the words in BETWEEN, for two subjects; it counts from the start again after the last one.
    """
    if form in TAGGED and relation is not None:
        raise ValueError(f"tags cannot say {relation!r}; forms that can: those of FORMS without tags")
    paper = PAPER if background == "white" else f"on a {background} background"
    where = [] if background == OPEN else [PLACES.get(background, paper)]
    where += [LIGHTS[light]] if light else []
    things = [article(subject) for subject in subjects]
    return FORMS[form].format(
        style=style,
        what=_listed(things, relation, way),
        where="".join(f" {phrase}" for phrase in where),
        tags=", ".join([*things, *where]),
    )


def _listed(things: list[str], relation: str | None, way: int) -> str:
    """Things with their relation, which is that of the first to all others."""
    first, *others = things
    if len(things) == 2:
        between = BETWEEN[relation][way % len(BETWEEN[relation])]
        return " ".join([first, between, *others, *([BEHIND[between]] if between in BEHIND else [])])
    if relation is None and others and way % 2:
        return ", ".join(things[:-1]) + f" and {things[-1]}"
    return f"{first} {relation or 'and'} {' and '.join(others)}" if others else first
