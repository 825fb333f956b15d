"""Prompts with weights (see `weight_syntax`) and of any length -> arguments of a pipeline call.

compel (https://github.com/damian0815/compel) applies the weights to the states of the words; it is only imported where a
prompt has weights. A prompt that is too long for the text encoder is encoded in chunks.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from functools import partial
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers.loaders import TextualInversionLoaderMixin
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from mole_app.studio.weight_syntax import NOTHING, Chunk, parse_weights
from mole_diffusers.binding import Part

BACK = 20  # most tokens that move to the next chunk, to cut after a comma or between words
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
STATES = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")  # as encoded

_copies: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # tokenizer -> its copy, see `_copy_of`
# Weighted states [1, T, C] of the last layer of a text encoder, and of the one before it if pipelines read that, too
WeightedStates = tuple[torch.Tensor, ...]


def chunks_of(pipe: Any, prompt: str) -> list[Chunk]:
    """The chunks of a prompt. Each is short enough for the main text encoder, see `_main_tokenizer`."""
    tokenizer = _copy_of(_main_tokenizer(pipe))
    limit = _limit(pipe, tokenizer)
    return [part for chunk in parse_weights(prompt) for part in _short(chunk, tokenizer, limit)]


def prompts_read(pipe: Any) -> set[str]:
    """The optional prompts that this pipeline reads: "negative_prompt" and, if it has a first and a second text encoder,
    "prompt_2" and "negative_prompt_2"."""
    given = inspect.signature(pipe.encode_prompt).parameters
    several = all(getattr(pipe, name, None) is not None for name in TOKENIZERS[:2])
    names = ["negative_prompt", *(["prompt_2", "negative_prompt_2"] if several else [])]
    return {name for name in names if name in given}


def unread(pipe: Any, *, negative: str, prompt_2: str, negative_2: str, guidance: float) -> list[str]:
    """A sentence for each of these prompts that the pipeline does not read, at all or with this guidance."""
    given = [("negative_prompt", negative, "the negative prompt"), ("prompt_2", prompt_2, "a second prompt")]
    given.append(("negative_prompt_2", negative_2, "a second negative prompt"))
    kind, known = type(pipe).__name__, prompts_read(pipe)
    sentences = [f"{kind} is drawn without {words}" for name, text, words in given if text and name not in known]
    if guidance <= 1 and any(text and name in known for name, text, _ in given if name.startswith("negative")):
        sentences.append(f"negative prompts are read from a guidance above 1 on, and it is {guidance:g}")
    return sentences


def cut_off(pipe: Any, prompt: str, prompt_2: str = "") -> list[str]:
    """A sentence for each text encoder that does not read all of a prompt. The second reads `prompt_2` if that is given.

    Raises what `parse_weights` raises.
    """
    sentences = []
    for name, tokenizer in _tokenizers(pipe).items():
        is_second = name == "tokenizer_2" and "prompt_2" in prompts_read(pipe)
        chunks = chunks_of(pipe, prompt_2 or prompt if is_second else prompt)
        limit = _limit(pipe, tokenizer)
        parts = [(chunk.text, chunk.spans(_copy_of(tokenizer))) for chunk in chunks]
        if cut := " ".join(text[spans[limit][0] :] for text, spans in parts if len(spans) > limit):
            sentences.append(f"the {name} reads {limit * len(chunks)} tokens of the prompt, not {cut!r}")
    return sentences


@torch.no_grad()
def call_arguments(pipe: Any, prompt: str, negative: str = "", *, guided: bool = True, **how: Any) -> dict[str, Any]:
    """The arguments of a pipeline call for a prompt: text if it is short and without weights, else encoded states.

    Text encoders run here, so call this inside the same `with` blocks of a mixture as the pipeline. Prompts that the
    pipeline does not read are left out, see `unread`.

    Args:
        prompt_2, negative_2: what the second text encoder reads; "" means the same as the first.
        guided: whether the call has classifier-free guidance, which needs the negative prompt.
    """
    chunks = _chunks_asked(pipe, prompt, negative, guided=guided, **how)
    if all(len(each) == 1 and not each[0].has_weights for each in chunks.values()):
        return {name: each[0].text for name, each in chunks.items()}
    return _states(pipe, chunks, guided)


def _states(pipe: Any, chunks: Mapping[str, list[Chunk]], guided: bool) -> dict[str, Any]:
    """The states of prompts, as arguments of the pipeline's call."""
    given = inspect.signature(pipe.encode_prompt).parameters
    has_negative = "negative_prompt" in prompts_read(pipe)
    names = [name for name in STATES if has_negative or not name.startswith("negative")]
    names = [name for name in names if "pooled" not in name or "pooled_prompt_embeds" in given]
    options: dict[str, Any] = {name: None for name in ("prompt_2", "prompt_3") if name in given}
    if has_negative:
        options["do_classifier_free_guidance"] = guided
    parts = [dict(zip(chunks, row, strict=True)) for row in zip_longest(*chunks.values(), fillvalue=NOTHING)]
    weighted = [_weighted(pipe, part) for part in parts]  # first: binding remembers the runs that `encode_prompt` makes
    made = []
    for part, states in zip(parts, weighted, strict=True):
        texts = {name: [chunk.words] for name, chunk in part.items()}  # lists: a bare "" would mean the same as the first
        with _giving(pipe, states):
            found = pipe.encode_prompt(device=pipe._execution_device, num_images_per_prompt=1, **options | texts)
        made.append(dict(zip(names, found, strict=False)))
    return {
        name: value if "pooled" in name else torch.cat([each[name] for each in made], 1)
        for name, value in made[0].items()
        if value is not None
    }


def plain_texts(pipe: Any, prompt: str, negative: str = "", **how: Any) -> dict[str, str] | None:
    """The words of the prompts that a call reads, or None if one that is no negative prompt is too long for one chunk.
    Takes the arguments of `call_arguments`."""
    chunks = _chunks_asked(pipe, prompt, negative, **how)
    if any(len(each) > 1 for name, each in chunks.items() if not name.startswith("negative")):
        return None
    return {name: " ".join(chunk.text for chunk in each) for name, each in chunks.items()}


def texts_read(pipe: Any, prompt: str, prompt_2: str = "") -> list[str]:
    """The words of the chunks that a denoiser's states are made of.

    If a pipeline reads a second prompt, they are of both, or, as Flux's denoiser reads the second
    encoder's states alone, of the second.
    """
    prompts = [prompt]
    if prompt_2 and "prompt_2" in prompts_read(pipe):
        prompts = [prompt_2] if _main_tokenizer(pipe) is pipe.tokenizer_2 else [prompt, prompt_2]
    return [chunk.text for each in prompts for chunk in chunks_of(pipe, each)]


def _chunks_asked(
    pipe: Any,
    prompt: str,
    negative: str,
    *,
    prompt_2: str = "",
    negative_2: str = "",
    guided: bool = True,
) -> dict[str, list[Chunk]]:
    """The chunks of the prompts that a call gives."""
    prompts = {"prompt": prompt, "negative_prompt": negative, "prompt_2": prompt_2, "negative_prompt_2": negative_2}
    known = {name for name in prompts_read(pipe) if guided or not name.startswith("negative")}
    asked = {name: text for name, text in prompts.items() if text and name in known}
    if "negative_prompt_2" in asked:  # without the first, SDXL would have zeros for both
        asked.setdefault("negative_prompt", "")
    asked["prompt"] = prompt
    return {name: chunks_of(pipe, text) for name, text in asked.items()}


def tiled_prompt(pipe: Any, prompt: str, negative: str = "", **how: Any) -> dict[str, Any]:
    """The arguments of `Mixture.tiled` for a prompt with weights: its words, and a function that encodes a part of them
    with their weights. Takes the arguments of `call_arguments`.

    A part is followed by empty chunks where the prompt is, beside a longer negative one. If the pipeline reads a second
    prompt, the result is {}: tiles would ignore it.
    """
    asked = _chunks_asked(pipe, prompt, negative, **how)
    if "prompt_2" in asked:
        return {}
    empty = max(map(len, asked.values())) - 1 if len(asked["prompt"]) == 1 else 0
    chunks = [chunk for chunk in parse_weights(prompt) if chunk.text]
    text = " ".join(chunk.text for chunk in chunks)
    of_text = [weight for chunk in chunks for weight in (*chunk.weights, 1.0)]

    @torch.no_grad()
    def encode(part: Part) -> tuple[torch.Tensor, torch.Tensor | None]:
        chunk = Chunk(part.text, tuple(of_text[i] for i in part.source))
        states = _states(pipe, {"prompt": [chunk, *[NOTHING] * empty]}, guided=False)
        return states["prompt_embeds"], states.get("pooled_prompt_embeds")

    return {"prompt": text, "encode": encode}


def _weighted(pipe: Any, part: Mapping[str, Chunk]) -> dict[str, list[WeightedStates | None]]:
    """{tokenizer: weighted states of the prompt and of the negative prompt}, for one chunk of each; None without weights."""
    first = part["prompt"], part.get("negative_prompt", NOTHING)
    second = part.get("prompt_2", first[0]), part.get("negative_prompt_2", first[1])
    return {
        name: [_weigh(pipe, name, chunk) if chunk.has_weights else None for chunk in (second if "2" in name else first)]
        for name in _tokenizers(pipe)
    }


def _tokenizers(pipe: Any) -> dict[str, Any]:
    """The tokenizers of the pipeline's text encoders, by their names in the pipeline."""
    return {name: getattr(pipe, name) for name in TOKENIZERS if _encoder(pipe, name) is not None}


def _encoder(pipe: Any, tokenizer: str) -> Any:
    return getattr(pipe, tokenizer.replace("tokenizer", "text_encoder"), None)


@contextmanager
def _giving(pipe: Any, weighted: Mapping[str, Sequence[WeightedStates | None]]) -> Iterator[None]:
    """While the block runs, the text encoders return these states instead of their own, the next ones at each run.

    The states are replaced inside the encoders, before any other hook sees them, so that binding recognises them later.
    """
    with ExitStack() as undo:
        for name, states in weighted.items():
            hook = partial(_replaced, iter(states))
            undo.enter_context(_encoder(pipe, name).register_forward_hook(hook, prepend=True))
        yield


def _replaced(weighted: Iterator[WeightedStates | None], _: Any, __: Any, output: Any) -> Any:
    """A text encoder's output with the next weighted states in it; None if they are not weighted."""
    if (states := next(weighted)) is None:
        return None
    last, *before_last = states
    changed: dict[str, Any] = {"last_hidden_state": last.to(output.last_hidden_state)}
    if before_last and (hidden := output.get("hidden_states")) is not None:
        changed["hidden_states"] = (*hidden[:-2], before_last[0].to(hidden[-2]), hidden[-1])
    return type(output)(**dict(output) | changed)


class _Runs:
    """A text encoder wrapped for compel. Its device is the one that it runs on, not the one where offloading keeps its
    weights.

    Args:
        deep: whether the states of the layer before the last are needed, too. They follow those of the last, along the
            channels: compel weighs each channel by itself.
    """

    def __init__(self, encoder: Any, device: torch.device, *, deep: bool):
        self.encoder, self.device, self.dtype, self.deep = encoder, device, encoder.dtype, deep

    def __call__(self, ids: torch.Tensor, mask: torch.Tensor | None = None, **_: Any) -> Any:
        output = self.encoder(ids, mask, output_hidden_states=self.deep, return_dict=True)
        layers = [output.last_hidden_state, *([output.hidden_states[-2]] if self.deep else [])]
        return SimpleNamespace(last_hidden_state=torch.cat(layers, -1))


def _weigh(pipe: Any, name: str, chunk: Chunk) -> WeightedStates:
    try:
        from compel.embeddings_provider import EmbeddingsProvider
    except ImportError as error:
        raise ValueError(f"weights in prompts need {error.name}: pip install 'mole-diffusers[weights]'") from error

    tokenizer, encoder, device = getattr(pipe, name), _encoder(pipe, name), pipe._execution_device
    # Textual inversions of several vectors become several tokens, as in `encode_prompt`.
    converts = isinstance(pipe, TextualInversionLoaderMixin)
    read = partial(pipe.maybe_convert_prompt, tokenizer=tokenizer) if converts else str
    fragments = [fragment for fragment in chunk.fragments if tokenizer(fragment.text, add_special_tokens=False).input_ids]
    texts, weights = [read(fragment.text) for fragment in fragments], [fragment.weight for fragment in fragments]
    has_layers = isinstance(encoder, CLIPTextModel | CLIPTextModelWithProjection)  # only the last layer of T5 is read
    length = _limit(pipe, tokenizer) + tokenizer.num_special_tokens_to_add()
    compel = EmbeddingsProvider(tokenizer, _Runs(encoder, device, deep=has_layers), device=device, model_max_length=length)
    found = compel.get_embeddings_for_weighted_prompt_fragments([texts], [weights], device=device)
    return found.chunk(2 if has_layers else 1, -1)


def _main_tokenizer(pipe: Any) -> Any:
    """The tokenizer that decides how long a chunk may be: CLIP's, or T5's in Flux."""
    if "negative_prompt" not in inspect.signature(pipe.encode_prompt).parameters:
        return pipe.tokenizer_2
    return getattr(pipe, "tokenizer", None) or pipe.tokenizer_2


def _copy_of(tokenizer: Any) -> Any:
    """A copy to look at prompts with, while another thread may draw: a call turns padding on or off for all callers."""
    copy = _copies.get(tokenizer)
    if copy is None or len(copy) != len(tokenizer):  # textual inversions add tokens
        _copies[tokenizer] = copy = deepcopy(tokenizer)
    return copy


def _limit(pipe: Any, tokenizer: Any) -> int:
    """How many tokens of a chunk one encoder reads, without the marks for begin and end."""
    marks = tokenizer.num_special_tokens_to_add()
    if marks == 1:  # T5, which reads as much as the pipeline asks for
        asked = inspect.signature(pipe.encode_prompt).parameters["max_sequence_length"].default
        return int(asked) - marks
    return int(tokenizer.model_max_length) - marks


def _short(chunk: Chunk, tokenizer: Any, limit: int) -> Iterator[Chunk]:
    """Split a chunk into parts of at most `limit` tokens, after a comma or between words if either is near."""
    offsets, first = chunk.spans(tokenizer), 0
    begin = 0
    while len(offsets) - first > limit:
        near = range(first + limit, first + max(limit - BACK, 0), -1)
        commas = (i for i in near if chunk.text[offsets[i - 1][1] - 1] == ",")
        words = (i for i in near if " " in chunk.text[offsets[i][0] - 1 : offsets[i][0] + 1])
        first = next(commas, None) or next(words, first + limit)
        yield chunk[begin : offsets[first][0]]
        begin = offsets[first][0]
    yield chunk[begin : len(chunk.text)]
