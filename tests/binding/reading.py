"""Reads prompts as a mixture explains them, before anything is drawn."""

from dataclasses import replace

import torch
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.binding import Bound, Explanation, read_prompt
from mole_diffusers.lora import Expert, LoraWeights, layer_key

LAYER = layer_key("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
MOST = 6  # LoRAs of one prompt


def sentence_of(prompt, *words, acting=None, regions=()):
    """What a prompt says for LoRAs with these words each, one or a list."""
    bound = [
        Bound((own,) if isinstance(own, str) else tuple(own), dict(regions).get(k, "auto")) for k, own in enumerate(words)
    ]
    return read_prompt(prompt, bound, [acting is None or k in acting for k in range(len(words))])


class Reader:
    """A mixture whose text encoder reads prompts of any length."""

    def __init__(self):
        pipe = tiny_pipeline()
        pipe.tokenizer.model_max_length = 10_000
        nothing = {"unet": {LAYER: LoraWeights(torch.zeros(1, 16), torch.zeros(16, 1), 1.0)}}
        experts = {str(k): Expert(str(k), nothing, "peft", "unknown", (), "file", "", {}) for k in range(MOST)}
        self.mixture = mole.attach(pipe, experts, binding=None)

    def explained(self, prompt, loras, *, acting=None, required=False, regions=(), tiled=True):
        """What becomes of a prompt for LoRAs of these names and words; with `tiled=False`, where there is no room."""
        names, given = list(loras), dict(regions)
        bound = {
            str(k): Bound((own,) if isinstance(own, str) else tuple(own), given.get(name, "auto"), required)
            for k, (name, own) in enumerate(loras.items())
        }
        on = {str(k): float(k < len(names) and (acting is None or names[k] in acting)) for k in range(MOST)}
        unused = dict.fromkeys(map(str, range(len(names), MOST)), "everywhere")
        size = {} if tiled else {"width": 8, "height": 8}
        with self.mixture.bound(bound | unused), self.mixture.strengths(on):
            found = self.mixture.explain(prompt, **size)
        roles = {name: _named(found.experts[str(k)], names) for k, name in enumerate(names)}
        return Explanation(roles, found.tiles, found.why_no_tiles, found.contacts)


def _named(role, names):
    """With the name of the LoRA whose subject it is said of."""
    start, owner = role.place[:5], role.place[5:]
    return replace(role, place=f"with {names[int(owner)]}") if start == "with " and owner.isdigit() else role
