"""Which held-out concepts are composed: by kind, validation and test apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mole_diffusers.emoji import words

Concepts = tuple[str, ...]


def compositions(
    subjects: Sequence[str], styles: Sequence[str], counts: Mapping[str, int]
) -> dict[str, tuple[Concepts, ...]]:
    """Kind -> the first `counts[kind]` compositions; each subject and style comes about equally often.

    There are none of a kind that needs more: three subjects are chosen among four or more, four among five or more.
    """
    n, m = len(subjects), len(styles)

    def styled(groups: Sequence[Concepts]) -> list[Concepts]:
        return [(*group, styles[i % m]) for i, group in enumerate(groups) if m]

    # At half way round an even circle a pair comes up from both its ends.
    turns = [(i, (i + s) % n) for s in range(1, n // 2 + 1) for i in range(n) if 2 * s < n or i < s]
    pairs: list[Concepts] = [(subjects[i], subjects[j]) for i, j in turns]
    threes, fours = (
        [tuple(subjects[(i + step) % n] for step in steps) for i in range(n) if n > len(steps)]
        for steps in ((0, 1, 3), (0, 1, 2, 4))  # round the circle from each
    )
    kinds: dict[str, list[Concepts]] = {
        "subject x style": [(subjects[i], styles[(i + shift) % m]) for shift in range(m) for i in range(n)],
        "two subjects": pairs,
        "two subjects + style": styled(pairs),
        "three subjects": threes,
        "three subjects + style": styled(threes),
        "four subjects": fours,
        "four subjects + style": styled(fours),
    }
    return {kind: tuple(kinds[kind][:count]) for kind, count in counts.items()}


TEST = compositions(
    words.TEST_SUBJECTS,
    words.TEST_STYLES,
    {"subject x style": 24, "two subjects": 24, "two subjects + style": 24, "three subjects": 8},
)
VALIDATION = compositions(
    words.VALIDATION_SUBJECTS,
    words.VALIDATION_STYLES,
    {"subject x style": 8, "two subjects": 6, "two subjects + style": 6, "three subjects": 4},
)
# More of the test's subjects in a picture, up to the four that the world has canvases for.
LARGER = compositions(
    words.TEST_SUBJECTS,
    words.TEST_STYLES,
    {"three subjects + style": 8, "four subjects": 8, "four subjects + style": 8},
)
