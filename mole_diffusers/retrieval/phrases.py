"""The phrases of a text: what stands between its punctuation and function words."""

from __future__ import annotations

import re

WORD = re.compile(r"[\w<>'’+-]+|[^\w\s]")
BREAKS = frozenset(
    ["and", "with", "of", "in", "on", "by", "at", "a", "an", "the", "under", "over", "near", "beside", "behind", "from",
     "to", "for", "as", "into"]
)  # fmt: skip
COMMON = ("photo", "drawing", "painting", "picture", "background", "person", "animal", "object", "style")


def phrases(text: str) -> list[str]:
    """The text between punctuation and function words: "ink drawing of a fox, at night" -> ink drawing; fox; night.

    They are in lower case; "<new1>" and "sks-dog" are one word each. A phrase made only of everyday words ("drawing") does
    not ask for a LoRA and is left out.
    """
    found: list[list[str]] = [[]]
    for token in WORD.findall(text.lower()):
        if token in BREAKS or not re.search(r"\w", token):
            found.append([])
        else:
            found[-1].append(token)
    return [" ".join(phrase) for phrase in found if set(phrase) - set(COMMON)]
