"""Weights inside a prompt, `(fox:1.3)`, and prompts of any length -> arguments of a pipeline call.

They are written as in A1111: ( ) multiply by 1.1, [ ] divide by it, (words:1.3) by the number, a backslash makes a bracket
plain text, BREAK begins a new chunk, and a prompt that is longer than the text encoder reads is encoded in chunks. What a
weight does to the states of its words is compel's (https://github.com/damian0815/compel).
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby, zip_longest
from typing import Any, NamedTuple

import torch

STEP = 1.1
MOST_NESTED = 50
MOST_WEIGHT = 100.0
BACK = 20  # tokens that may move to the next chunk, so that it begins after a comma or with a whole word
PIECE = re.compile(r"\\[()\[\]\\]|[()\[\]]|[^\\()\[\]]+|\\")
NUMBER = re.compile(r":\s*([+-]?(?:\d+(?:\.\d*)?|\.\d+))\s*$")
BREAK = "\0"
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")


@dataclass(frozen=True)
class Chunk:
    """A part of a prompt that is encoded by itself, and the weight of each of its characters."""

    text: str
    weights: tuple[float, ...]

    @property
    def has_weights(self) -> bool:
        return not set(self.weights) <= {1.0}

    @property
    def fragments(self) -> list[tuple[str, float]]:
        """Words of one weight, and the weight, from the first to the last; at least one."""
        runs = [list(run) for _, run in groupby(range(len(self.text)), key=self.weights.__getitem__)]
        texts = [(self.text[run[0] : run[-1] + 1].strip(), self.weights[run[0]]) for run in runs]
        return [(text, weight) for text, weight in texts if text] or [("", 1.0)]

    @property
    def words(self) -> str:
        """The text as compel reads it, in which a fragment begins with a new word."""
        return " ".join(text for text, _ in self.fragments) if self.has_weights else self.text

    def __getitem__(self, part: slice) -> Chunk:
        text = self.text[part]
        start = (part.start or 0) + len(text) - len(text.lstrip())
        return Chunk(text.strip(), self.weights[start : start + len(text.strip())])


NOTHING = Chunk("", ())


class Weighted(NamedTuple):
    """States of a text encoder's layers that pipelines read, with the weights in them, [1, T, C] each."""

    last: torch.Tensor
    before_last: torch.Tensor


@dataclass(frozen=True)
class TokenCount:
    """What one text encoder reads of a prompt.

    Attributes:
        encoder: "tokenizer", "tokenizer_2", ..., as the pipeline names them.
        used, limit: tokens, without the marks of begin and end.
        cut: the end of the prompt that it does not read.
    """

    encoder: str
    used: int
    limit: int
    cut: str


def parse_weights(prompt: str) -> list[Chunk]:
    """The chunks that a prompt asks for, at least one.

    Raises ValueError for a bracket that is not closed or not opened, for a weight beyond MOST_WEIGHT, and for what else
    A1111 has in square brackets.
    """
    characters: list[str] = []
    weights: list[float] = []
    opened: list[tuple[str, int]] = []
    for piece in PIECE.findall(re.sub(r"\bBREAK\b", BREAK, prompt.replace(BREAK, " "))):
        if piece in ("(", "["):
            opened.append((piece, len(characters)))
            if len(opened) > MOST_NESTED:
                raise ValueError(f"brackets in a prompt are nested at most {MOST_NESTED} deep")
        elif piece in (")", "]"):
            if not opened or opened[-1][0] != ("(" if piece == ")" else "["):
                raise ValueError(f"the prompt has a {piece} that nothing opens; write \\{piece} for a plain bracket")
            start = opened.pop()[1]
            factor, end = _closed(piece, "".join(characters[start:]), start)
            del characters[end:], weights[end:]
            weights[start:] = [weight * factor for weight in weights[start:]]
        else:
            text = piece[1:] if piece[0] == "\\" and len(piece) == 2 else piece
            characters += text
            weights += [1.0] * len(text)
    if opened:
        rest = "".join(characters[opened[-1][1] :]).strip()[:30]
        raise ValueError(
            f"the prompt does not close the {opened[-1][0]} before {rest!r}; write \\{opened[-1][0]} for a plain bracket"
        )
    if any(abs(weight) > MOST_WEIGHT for weight in weights):
        raise ValueError(f"a weight in a prompt, with those around it, is at most {MOST_WEIGHT:g}")
    return _chunks(Chunk("".join(characters), tuple(weights)))


def plain_text(prompt: str) -> str:
    """The words of a prompt without weights and breaks. Raises as `parse_weights`."""
    return " ".join(chunk.text for chunk in parse_weights(prompt) if chunk.text)


def _closed(bracket: str, inside: str, start: int) -> tuple[float, int]:
    """The factor of a pair of brackets, and where its words end."""
    number = NUMBER.search(inside)
    if bracket == ")":
        return (float(number[1]), start + number.start()) if number else (STEP, start + len(inside))
    if number or "|" in inside:
        raise ValueError(f"[{inside}] is not read: square brackets lower a weight here, and change no words between steps")
    return 1 / STEP, start + len(inside)


def _chunks(whole: Chunk) -> list[Chunk]:
    edges = [-1, *(i for i, c in enumerate(whole.text) if c == BREAK), len(whole.text)]
    return [whole[a + 1 : b] for a, b in zip(edges, edges[1:], strict=False)]


def chunks_of(pipe: Any, prompt: str) -> list[Chunk]:
    """The chunks of a prompt, each short enough for the text encoder that makes the states that are read."""
    tokenizer = _main_tokenizer(pipe)
    limit = _limit(pipe, tokenizer)
    return [part for chunk in parse_weights(prompt) for part in _short(chunk, tokenizer, limit)]


def prompts_read(pipe: Any) -> set[str]:
    """Which of the prompts that not every pipeline reads this one does: "negative_prompt", and with a second text encoder
    beside the first "prompt_2" and "negative_prompt_2"."""
    given = inspect.signature(pipe.encode_prompt).parameters
    several = all(getattr(pipe, name, None) is not None for name in TOKENIZERS[:2])
    names = ["negative_prompt", *(["prompt_2", "negative_prompt_2"] if several else [])]
    return {name for name in names if name in given}


def unread(pipe: Any, *, negative: str, prompt_2: str, negative_2: str) -> list[str]:
    """A sentence for each of these prompts that the pipeline does not read."""
    prompts = {"negative_prompt": negative, "prompt_2": prompt_2, "negative_prompt_2": negative_2}
    words = {"negative_prompt": "the negative prompt", "prompt_2": "a second prompt",
             "negative_prompt_2": "a second negative prompt"}  # fmt: skip
    kind, known = type(pipe).__name__, prompts_read(pipe)
    return [f"{kind} is drawn without {words[name]}" for name, text in prompts.items() if text and name not in known]


def token_counts(pipe: Any, prompt: str, prompt_2: str = "") -> list[TokenCount]:
    """What each text encoder reads of a prompt, the second of another one where that is given, and what it does not. Raises
    as `parse_weights`."""
    counts = []
    for name in TOKENIZERS:
        tokenizer = getattr(pipe, name, None)
        if tokenizer is None:
            continue
        is_second = name == "tokenizer_2" and "prompt_2" in prompts_read(pipe)
        chunks = chunks_of(pipe, prompt_2 or prompt if is_second else prompt)
        limit = _limit(pipe, tokenizer)
        parts = [_offsets(tokenizer, chunk.text) for chunk in chunks]
        cut = [chunk.text[part[limit][0] :] for chunk, part in zip(chunks, parts, strict=True) if len(part) > limit]
        used = sum(min(limit, len(part)) for part in parts)
        counts.append(TokenCount(name, used, limit * len(chunks), " ".join(cut)))
    return counts


@torch.no_grad()
def call_arguments(
    pipe: Any,
    prompt: str,
    negative: str = "",
    *,
    prompt_2: str = "",
    negative_2: str = "",
    guided: bool = True,
    weights: bool = True,
) -> dict[str, Any]:
    """What a pipeline is called with for a prompt with weights: the text where it has none and is short, else its states.

    Call it where the pipeline is called, inside any `with` block of a mixture: text encoders run here. Prompts that the
    pipeline does not read are left out, see `unread`.

    Args:
        prompt_2, negative_2: what the second text encoder reads instead; "" is the same as the first.
        guided: whether the call has classifier-free guidance, which needs the negative prompt.
        weights: whether brackets are weights; else they are plain text, and a long prompt is cut.
    """
    prompts = {"prompt": prompt, "negative_prompt": negative, "prompt_2": prompt_2, "negative_prompt_2": negative_2}
    chunks = _chunks_asked(pipe, prompts, guided=guided, weights=weights)
    texts = _as_texts(chunks)
    if texts is not None and not any(chunk.has_weights for each in chunks.values() for chunk in each):
        return texts
    return _states(pipe, chunks, guided)


def _states(pipe: Any, chunks: Mapping[str, list[Chunk]], guided: bool) -> dict[str, Any]:
    """The states of prompts, as the pipeline's call takes them."""
    given = inspect.signature(pipe.encode_prompt).parameters
    has_negative = "negative_prompt" in prompts_read(pipe)
    names = ["prompt_embeds", *(["negative_prompt_embeds"] if has_negative else [])]
    if "pooled_prompt_embeds" in given:
        names += ["pooled_prompt_embeds", *(["negative_pooled_prompt_embeds"] if has_negative else [])]
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in given}
    if has_negative:
        options["do_classifier_free_guidance"] = guided
    made = []
    for row in zip_longest(*chunks.values(), fillvalue=NOTHING):
        part = dict(zip(chunks, row, strict=True))
        texts = {name: [chunk.words] for name, chunk in part.items()}  # lists, since "" would be taken for the first's
        with _weighing(pipe, part):
            states = pipe.encode_prompt(device=pipe._execution_device, num_images_per_prompt=1, **options | texts)
        made.append(dict(zip(names, states, strict=False)))
    return {
        name: value if "pooled" in name else torch.cat([each[name] for each in made], 1)
        for name, value in made[0].items()
        if value is not None
    }


def plain_texts(
    pipe: Any,
    prompt: str,
    negative: str = "",
    *,
    prompt_2: str = "",
    negative_2: str = "",
    guided: bool = True,
    weights: bool = True,
) -> dict[str, str] | None:
    """The words of the prompts that a call reads, where each is short enough for one chunk; else None."""
    prompts = {"prompt": prompt, "negative_prompt": negative, "prompt_2": prompt_2, "negative_prompt_2": negative_2}
    return _as_texts(_chunks_asked(pipe, prompts, guided=guided, weights=weights))


def _chunks_asked(pipe: Any, prompts: Mapping[str, str], *, guided: bool, weights: bool) -> dict[str, list[Chunk]]:
    """The chunks of the prompts that a call gives."""
    known = prompts_read(pipe)
    asked = {name: text for name, text in prompts.items() if text and name in known}
    if not guided:
        asked = {name: text for name, text in asked.items() if not name.startswith("negative")}
    if "negative_prompt_2" in asked:  # without the first, SDXL would have zeros for both
        asked.setdefault("negative_prompt", "")
    asked["prompt"] = prompts["prompt"]
    return {name: chunks_of(pipe, text) if weights else [Chunk(text, (1.0,) * len(text))] for name, text in asked.items()}


def _as_texts(chunks: Mapping[str, list[Chunk]]) -> dict[str, str] | None:
    """The words of prompts of one chunk each; None where one has more."""
    return {name: each[0].text for name, each in chunks.items()} if all(len(e) == 1 for e in chunks.values()) else None


def tiled_prompt(pipe: Any, prompt: str, *, weights: bool = True) -> dict[str, Any]:
    """What `Mixture.tiled` is given of a prompt with weights: its words, and what encodes a part of them with theirs.

    Args:
        weights: whether brackets are weights, as in `call_arguments`.
    """
    if not weights:
        return {"prompt": prompt}
    whole = [chunk for chunk in parse_weights(prompt) if chunk.text]
    text = " ".join(chunk.text for chunk in whole)
    of_text = Chunk(text, tuple(weight for chunk in whole for weight in (*chunk.weights, 1.0)))

    @torch.no_grad()
    def encode(part: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        states = _states(pipe, {"prompt": [_weighed_as(part, of_text)]}, guided=False)
        return states["prompt_embeds"], states.get("pooled_prompt_embeds")

    return {"prompt": text, "encode": encode}


def _weighed_as(part: str, whole: Chunk) -> Chunk:
    """A text of words of `whole`, in their order, with the weights that they have there; others have 1."""
    weights, at = [1.0] * len(part), 0
    for word in re.finditer(r"\S+", part):
        if there := re.compile(rf"(?<!\w){re.escape(word[0])}(?!\w)").search(whole.text, at):
            at = there.end()
            weights[word.start() : word.end()] = whole.weights[there.start() : at]
    return Chunk(part, tuple(weights))


@contextmanager
def _weighing(pipe: Any, part: Mapping[str, Chunk]) -> Iterator[None]:
    """Have the text encoders give the weighted states of these prompts, each first of its prompt and then of its negative
    one, while the block runs.

    It happens in the encoders, before anyone else sees their states, so that binding knows the states again.
    """
    first = part["prompt"], part.get("negative_prompt", NOTHING)
    second = part.get("prompt_2", first[0]), part.get("negative_prompt_2", first[1])
    with ExitStack() as undo:
        for name in TOKENIZERS:
            encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"), None)
            if encoder is not None:
                weighted = [_weighted(pipe, name, encoder, chunk) for chunk in (second if name == "tokenizer_2" else first)]
                undo.callback(encoder.register_forward_hook(_giving(iter(weighted)), prepend=True).remove)
        yield


@dataclass(frozen=True)
class _RunsOn:
    """A text encoder as compel sees it: on the device where it runs, not where offloading keeps its weights."""

    encoder: Any
    device: torch.device

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.encoder(*args, **kwargs)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype


def _weighted(pipe: Any, name: str, encoder: Any, chunk: Chunk) -> Weighted | None:
    """What compel makes of a chunk; None where it has no weights."""
    if not chunk.has_weights:
        return None
    from compel import ReturnedEmbeddingsType
    from compel.embeddings_provider import EmbeddingsProvider

    tokenizer, device = getattr(pipe, name), pipe._execution_device
    length = _limit(pipe, tokenizer) + tokenizer.num_special_tokens_to_add()
    # Embeddings of several vectors are words of several tokens, as `encode_prompt` reads them.
    read = partial(pipe.maybe_convert_prompt, tokenizer=tokenizer) if hasattr(pipe, "maybe_convert_prompt") else str
    texts, weights = [read(text) for text, _ in chunk.fragments], [weight for _, weight in chunk.fragments]

    def states(layer: ReturnedEmbeddingsType) -> torch.Tensor:
        compel = EmbeddingsProvider(
            tokenizer,
            _RunsOn(encoder, device),
            returned_embeddings_type=layer,
            device=device,
            model_max_length=length,
        )
        return compel.get_embeddings_for_weighted_prompt_fragments([texts], [weights], device=device)

    return Weighted(
        last=states(ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED),
        before_last=states(ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED),
    )


def _giving(weighted: Iterator[Weighted | None]) -> Callable[[Any, Any, Any], Any]:
    """A forward hook that puts weighted states in the place of an encoder's own, the next at each run."""

    def hook(_: Any, __: Any, output: Any) -> Any:
        if (states := next(weighted)) is None:
            return None
        changed: dict[str, Any] = {"last_hidden_state": states.last.to(output.last_hidden_state)}
        if (hidden := output.get("hidden_states")) is not None:
            changed["hidden_states"] = (*hidden[:-2], states.before_last.to(hidden[-2]), hidden[-1])
        return type(output)(**dict(output) | changed)

    return hook


def _main_tokenizer(pipe: Any) -> Any:
    """That of the encoder whose states decide how long a chunk may be: CLIP, or in Flux T5."""
    if "negative_prompt" not in inspect.signature(pipe.encode_prompt).parameters:
        return pipe.tokenizer_2
    return getattr(pipe, "tokenizer", None) or pipe.tokenizer_2


def _limit(pipe: Any, tokenizer: Any) -> int:
    """How many tokens of a chunk one encoder reads, without the marks of begin and end."""
    marks = tokenizer.num_special_tokens_to_add()
    if marks == 1:  # T5, which reads as much as the pipeline asks for
        asked = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
        return int(asked) - marks
    return int(tokenizer.model_max_length) - marks


def _short(chunk: Chunk, tokenizer: Any, limit: int) -> Iterator[Chunk]:
    """The chunk in parts of at most `limit` tokens, cut after a comma or between words where one is near."""
    offsets, first = _offsets(tokenizer, chunk.text), 0
    begin = 0
    while len(offsets) - first > limit:
        near = range(first + limit, first + max(limit - BACK, 0), -1)
        commas = (i for i in near if chunk.text[offsets[i - 1][1] - 1] == ",")
        words = (i for i in near if " " in chunk.text[offsets[i][0] - 1 : offsets[i][0] + 1])
        first = next(commas, None) or next(words, first + limit)
        yield chunk[begin : offsets[first][0]]
        begin = offsets[first][0]
    yield chunk[begin : len(chunk.text)]


def _offsets(tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where each token of a text begins and ends in it."""
    read = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [tuple(span) for span in read["offset_mapping"]]
