"""What tests of binding share."""

import warnings

import hosts
import torch

import mole_diffusers as mole
from mole_diffusers.binding import Bound

PROMPT = "a fox+an owl"  # the tiny tokenizer has a token per letter; "fox" is tokens 2..4, "owl" 8..10
FOX, OWL = range(2, 5), range(8, 11)
WORDS = {"fox": "fox", "ink": "owl", "hat": "everywhere"}
IN_A_FOLDER = {"fox": Bound(("fox",), required=True), "ink": Bound(("owl",), required=True)}
HALVES = {"fox": ("fox", "left"), "ink": ("owl", "right"), "hat": "everywhere"}


def own_words(tokens=16):
    """[T, 3] by hand: the words of fox and owl are closed to the other, and the third expert acts on every word."""
    mask = torch.ones(tokens, 3)
    mask[list(OWL), 0] = 0
    mask[list(FOX), 1] = 0
    return mask


def now(mixture):
    """What binding knows of the text that was drawn last."""
    return mixture.parts.settings.binding.now.text


def by_hand(steps, tokens, side):
    """Each subject's map at each step: steps has lists of (q, k) [heads, T or S, D], one for each layer that is read."""
    found = []
    for layers in steps:
        total = torch.zeros(len(tokens), *side)
        for q, k in layers:
            shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # [T, S]
            for i, words in enumerate(tokens):
                map_ = shares[:, list(words)].mean(1).reshape(side)
                total[i] += (map_ - map_.min()) / (map_.max() - map_.min())
        found.append(total)
    return found


def draw_other(other, steps=2):
    words = {"max_sequence_length": 16} if other.name == "flux" else {}  # T5 has a token per letter, too
    return hosts.draw(other.pipe, other.options | words, "fox and owl", steps=steps)


def bound_pictures(other, binding, steps=2):
    mixture = mole.attach(other.pipe, other.files, binding=binding)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return mixture, draw_other(other, steps=steps)


def stop(*_):
    raise KeyboardInterrupt
