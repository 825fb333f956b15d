"""What the objectives of gate training need, and the captions that they derive from its prompts."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from tqdm import tqdm

from mole_diffusers.binding.finding import spans
from mole_diffusers.mixture import Mixture
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.data import RandomBatch, TrainingData
from mole_diffusers.training.latents import latent_shape

LossFn = Callable[[RandomBatch], torch.Tensor]  # the value of one term on a share of a batch

ARTICLE = re.compile(r"\ban? $", re.IGNORECASE)


@dataclass
class TrainingContext:
    """The pipeline with its mixture, and what its gates are trained on and how.

    Attributes:
        clip: for the objectives that need one.
        state: what losses keep from one update to the next; checkpoints save it.
        progress: show progress bars while objectives are prepared.
    """

    pipe: Any
    mixture: Mixture
    data: TrainingData
    clip: Clip | None = None
    config: GateTraining = GateTraining()
    state: dict[str, Any] = field(default_factory=dict)
    progress: bool = False

    def state_dict(self) -> dict[str, Any]:
        """`state` of all processes, on the CPU, since another machine may lack this device."""
        return {name: value for part in gather_object([send_to_device(self.state, "cpu")]) for name, value in part.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.state.update(state)

    @property
    def composed_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of composed prompts."""
        return latent_shape(self.pipe, self.config.width, self.config.height)

    def bar(self, items: Iterable[Any], what: str) -> Iterator[Any]:
        """`items`, with a progress bar that disappears at the end."""
        return iter(tqdm(items, desc=what, disable=not self.progress, leave=False))


def require(found: Any, term: str, what: str) -> Any:
    """`found`; raises ValueError if it is None or empty."""
    if not found:
        raise ValueError(f"the {term} term needs {what}")
    return found


def triggers(mixture: Mixture, expert: str) -> list[str]:
    """The words that call an expert: its bound words, or those of its file and its name."""
    bound = (mixture.binding or {}).get(expert)
    if bound is not None and bound.words:
        return list(bound.words)
    return [*dict.fromkeys((*mixture.file_words[expert].words, expert))]


def experts_in(mixture: Mixture, prompt: str) -> list[str]:
    """The experts whose trigger words are in a prompt: in any case, or in the plural."""
    return [e for e in mixture.experts if any(spans(prompt, word) for word in triggers(mixture, e))]


def warn_of_missing_triggers(context: TrainingContext) -> None:
    """Warn of prompts that have no trigger word of an expert they are meant for: it cannot show its concept there."""
    data, mixture = context.data, context.mixture
    meant = [(prompt, list(mixture.experts)) for prompt in data.composed]
    meant += [(prompt, [name]) for name, prompts in data.singles.items() for prompt in prompts]
    for prompt, names in meant:
        for name in names:
            if name not in experts_in(mixture, prompt):
                words = triggers(mixture, name)
                warnings.warn(f"the prompt {prompt!r} has no trigger of expert {name!r}: {words}", stacklevel=4)


def negatives(context: TrainingContext, prompt: str) -> list[str]:
    """Captions that each lack a concept of `prompt`: one trigger replaced by another word, and the single prompts.

    Raises ValueError if there are none.
    """
    data = context.data
    replaced = [
        replace_word(prompt, word, other)
        for expert, others in data.others.items()
        for word in triggers(context.mixture, expert)
        for other in others
    ]
    found = [caption for caption in dict.fromkeys(chain(replaced, *data.singles.values())) if caption != prompt]
    if not found:
        raise ValueError(f"{prompt!r} has no caption to be told from: give single prompts, or other words for its concepts")
    return found


def replace_word(prompt: str, word: str, other: str) -> str:
    """`prompt` with `other` instead of `word`, and its article adjusted; unchanged if it lacks the word."""
    for begin, end in reversed(spans(prompt, word)):
        before = ARTICLE.sub("an " if other[0].lower() in "aeiou" else "a ", prompt[:begin])
        prompt = f"{before}{other}{prompt[end:]}"
    return prompt
