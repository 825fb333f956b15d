"""Which held-out concepts are composed: by kind, validation and test apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mole_diffusers.emoji import words

Concepts = tuple[str, ...]


def compositions(
    subjects: Sequence[str], styles: Sequence[str], counts: Mapping[str, int]
) -> dict[str, tuple[Concepts, ...]]:
    """Kind -> the first `counts[kind]` compositions; each subject and style comes about equally often.

    There are none of a kind that needs more subjects or styles: three subjects are chosen among four or more.
    """
    n, m = len(subjects), len(styles)
    # At half way round an even circle a pair comes up from both its ends.
    turns = [(i, (i + s) % n) for s in range(1, n // 2 + 1) for i in range(n) if 2 * s < n or i < s]
    pairs: list[Concepts] = [(subjects[i], subjects[j]) for i, j in turns]
    kinds: dict[str, list[Concepts]] = {
        "subject x style": [(subjects[i], styles[(i + shift) % m]) for shift in range(m) for i in range(n)],
        "two subjects": pairs,
        "two subjects + style": [(*pair, styles[i % m]) for i, pair in enumerate(pairs) if m],
        "three subjects": [(subjects[i], subjects[(i + 1) % n], subjects[(i + 3) % n]) for i in range(n) if n > 3],
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
