"""The words that call a LoRA: those that its file or the notes beside it state, otherwise training tags that are its own.

Words from training tags depend on the other LoRAs that are attached with it: a tag that two of them know calls neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mole_diffusers.lora.expert import Expert
from mole_diffusers.lora.metadata import MOST_TRIGGERS, TAG, plain, tag_counts
from mole_diffusers.safe_files import RefusedFileError, parse_json

HEADER = (  # keys of a header that state trigger words
    "modelspec.trigger_phrase", "trigger_phrase", "trigger_words", "trigger_word", "trained_words", "trainedWords",
    "ss_trigger_words", "ss_trigger_word", "activation text", "instance_prompt",
)  # fmt: skip
# Words of no LoRA in particular: how many people, how they are framed and look, how good and how safe the picture is.
GENERIC = re.compile(
    r"\d\+?(?:girl|boy|other)s?|(?:multiple|many) (?:girls|boys|others)|solo|solo focus|(?:fe)?male focus|no humans|everyone"
    r"|(?:a |the )?(?:girl|boy|woman|man|person|people|lady|guy|child|human|male|female|character|subject)s?"
    r"|looking (?:at viewer|back|away|to the side|up|down|ahead|afar|at another)|facing (?:viewer|away)|eye contact|viewer"
    r"|(?:upper|lower|full) body|portrait|close[ -]?up|cowboy shot|(?:medium|wide|long|full) shot|head ?shot|profile"
    r"|from (?:above|below|behind|side)|dutch angle|(?:side|front|back|rear) view|pov|depth of field|blurry|bokeh|cropped"
    r"|(?:simple|plain|blurry|gradient|transparent|detailed|two-tone|\w+) background|no background|outdoors?|indoors?"
    r"|(?:masterpiece|best|high|highest|good|great|amazing|normal|low|worst)(?: quality)?|(?:very )?aesthetic|hi-?res"
    r"|highres|absurdres|lowres|newest|recent|score[_ ]\d+(?:[_ ]up)*|source[_ ]\w+|rating[:_ ]\w+|safe|sfw|nsfw|sensitive"
    r"|general|questionable|explicit|(?:very |extremely |ultra |highly )?(?:detailed|realistic)|photo-?realistic|\d+k|u?hd"
    r"|(?:a )?(?:photo|photograph|picture|image|artwork|art|style|lora)s?"
    r"|standing|sitting|walking|lying|smil(?:e|ing)|light smile|grin|blush|frown|(?:open|closed) (?:mouth|eyes)|parted lips"
    r"|expressionless|teeth|tongue|lips|nose|(?:(?:very )?long|short|medium) hair|bangs|blunt bangs|hair ornament|ponytail"
    r"|(?:black|brown|blonde?|red|blue|green|purple|pink|white|gr[ae]y|silver|aqua|orange|yellow|golden) (?:hair|eyes)"
    r"|(?:small |medium |large |huge )?breasts|cleavage|navel|(?:bare )?shoulders|collarbone|shirt|skirt|jewelry"
    r"|long sleeves|short sleeves|simple|monochrome|grayscale|greyscale|english text|text|signature|watermark|artist name"
    r"|artist:?\w*|uncensored|censored|trigger ?words?|none|null|n/a",
    re.IGNORECASE,
)
PHOTO_OF = re.compile(r"^(?:an? |the )?(?:photo|picture|image|portrait)s? of (?:an? |the )?", re.IGNORECASE)  # "... sks dog"


class OwnWords(NamedTuple):
    """The words of one LoRA among others."""

    words: tuple[str, ...]  # none if it has no words of its own
    stated: bool  # whether they are meant as trigger words. Tags only tell what its training pictures show


def own_words(experts: Mapping[str, Expert]) -> dict[str, OwnWords]:
    """The words of each of these LoRAs, beside the others."""
    counts = {name: tag_counts(expert.metadata) for name, expert in experts.items()}
    known = {  # what each one knows, in lower case
        name: {tag.casefold() for tag in (*counts[name][0], *expert.triggers)} for name, expert in experts.items()
    }
    found = {}
    for name, expert in experts.items():
        is_same = {other: one is expert or one.sha256 == expert.sha256 != "" for other, one in experts.items()}
        others = [words for other, words in known.items() if not is_same[other]]
        tags, captions = counts[name]
        common = (tag for tag, count in tags.items() if 2 * count >= captions and not is_generic(tag))
        own = [tag for tag in common if not any(tag.casefold() in words for words in others)]
        named = [tag for tag in own if _squeezed(tag) and any(_squeezed(tag) in each for each in _names(expert))]
        usual = named or [tag for tag in own if 4 * tags[tag] >= 3 * captions]  # others are what it was drawn with: "tree"
        words = dict.fromkeys(PHOTO_OF.sub("", tag) for tag in usual[:MOST_TRIGGERS])
        found[name] = OwnWords(expert.triggers, True) if expert.triggers else OwnWords(tuple(words), False)
    return found


def words_of(expert: Expert) -> OwnWords:
    """The words of a LoRA alone."""
    return own_words({expert.name: expert})[expert.name]


def stated_words(beside: Iterable[Any], metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The trigger words that the notes beside a file state, otherwise its header; without generic ones."""
    for value in (*beside, *(_listed(metadata.get(key)) for key in HEADER)):
        texts = value if isinstance(value, list) else [value]
        pieces = (piece for text in texts if isinstance(text, str) for piece in TAG.sub("", text).split(","))
        words = (PHOTO_OF.sub("", piece.strip())[:200] for piece in pieces)
        if own := tuple(dict.fromkeys(word for word in words if word and not is_generic(word)))[:MOST_TRIGGERS]:
            return own
    return ()


def is_generic(word: str) -> bool:
    """Whether a word calls no LoRA in particular, such as "1girl" or "(masterpiece:1.2)"."""
    return GENERIC.fullmatch(" ".join(plain(word).split())) is not None or GENERIC.fullmatch(_spaced(word)) is not None


def _spaced(word: str) -> str:
    return " ".join(plain(word).replace("_", " ").split())


def _listed(text: str | None) -> Any:
    """The value of a header, which may be a JSON list of texts."""
    if text and text.lstrip().startswith("["):
        try:
            return parse_json(text, "its trigger words")
        except RefusedFileError:
            return text
    return text


def _names(expert: Expert) -> Sequence[str]:
    """What a LoRA is called: its name, its file's, and the one that it was trained under."""
    return [_squeezed(name) for name in (expert.name, Path(expert.source).stem, expert.metadata.get("ss_output_name", ""))]


def _squeezed(text: str) -> str:
    """The letters and digits alone; "" if they are too few to tell anything."""
    letters = re.sub(r"[\W_]+", "", text.casefold())
    return letters if len(letters) > 2 else ""
