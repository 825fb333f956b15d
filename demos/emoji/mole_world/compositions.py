"""The compositions of held-out concepts, by kind, separately for validation and test.

A composition of the last three kinds of TEST is a pair that is drawn in contact, on a canvas on which two have less room
than usual, or on paper. All others are drawn in an open landscape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mole_world import words

Concepts = tuple[str, ...]


def compositions(
    subjects: Sequence[str], styles: Sequence[str], counts: Mapping[str, int]
) -> dict[str, tuple[Concepts, ...]]:
    """Kind -> the first `counts[kind]` compositions. Each subject and style comes up about equally often.

    A kind is empty if there are too few subjects: three are chosen from at least four, four from at least five.
    """
    n, m = len(subjects), len(styles)

    def styled(groups: Sequence[Concepts]) -> list[Concepts]:
        return [(*group, styles[i % m]) for i, group in enumerate(groups) if m]

    # In an even circle, a pair half way round comes up from both of its ends; take it once.
    turns = [(i, (i + s) % n) for s in range(1, n // 2 + 1) for i in range(n) if 2 * s < n or i < s]
    pairs: list[Concepts] = [(subjects[i], subjects[j]) for i, j in turns]
    threes, fours = (
        [tuple(subjects[(i + step) % n] for step in steps) for i in range(n) if n > len(steps)]
        for steps in ((0, 1, 3), (0, 1, 2, 4))  # steps round the circle, from each subject
    )
    kinds: dict[str, list[Concepts]] = {
        "one subject": [(subject,) for subject in subjects],
        "subject x style": [(subjects[i], styles[(i + shift) % m]) for shift in range(m) for i in range(n)],
        "two subjects": pairs,
        "two subjects + style": styled(pairs),
        "three subjects": threes,
        "three subjects + style": styled(threes),
        "four subjects": fours,
        "four subjects + style": styled(fours),
        "contact": pairs,
        "two subjects, close": pairs,
        "two subjects on paper": pairs,
    }
    return {kind: tuple(kinds[kind][:count]) for kind, count in counts.items()}


TEST = compositions(
    words.TEST_SUBJECTS,
    words.TEST_STYLES,
    {
        "one subject": 8,
        "subject x style": 24,
        "two subjects": 24,
        "two subjects + style": 24,
        "three subjects": 8,
        "three subjects + style": 8,
        "contact": 24,
        "two subjects, close": 24,
        "two subjects on paper": 24,
    },
)
VALIDATION = compositions(
    words.VALIDATION_SUBJECTS,
    words.VALIDATION_STYLES,
    {
        "one subject": 4,
        "subject x style": 8,
        "two subjects": 6,
        "two subjects + style": 6,
        "three subjects": 4,
        "three subjects + style": 4,
        "contact": 6,
        "two subjects, close": 6,
        "two subjects on paper": 6,
    },
)
# Four test subjects per picture: the world has no larger canvases.
LARGER = compositions(words.TEST_SUBJECTS, words.TEST_STYLES, {"four subjects": 8, "four subjects + style": 8})
