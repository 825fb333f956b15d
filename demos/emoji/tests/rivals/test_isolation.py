"""Isolation against self-attention written out place by place."""

from types import SimpleNamespace

import pytest
import torch
from one_step import latents

import mole_diffusers as mole
from rivals.isolation import isolated, isolated_prompts
from rivals.regional_composers import regional_prompts

LEFT, MIDDLE = (0, 0, 0.5, 0.75), (0.25, 0.5, 0.75, 1)  # they overlap, and leave a background
SEEDS = (3, 4)


class Written:
    """Self-attention of one head after the other, of one place after the other, to the places that it may see."""

    def __init__(self, closed, boxes):
        self.closed, self.boxes = closed, boxes

    def inside(self, place, side):
        x, y = place % side, place // side
        return {
            i for i, (left, top, right, bottom) in enumerate(self.boxes)
            if left <= (x + 0.5) / side <= right and top <= (y + 0.5) / side <= bottom
        }  # fmt: skip

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        q, k, v = (layer(hidden_states).unflatten(-1, (attn.heads, -1)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        rows, tokens = hidden_states.shape[:2]
        side, out = int(tokens**0.5), torch.zeros_like(v)
        own = [self.inside(place, side) for place in range(tokens)]
        for row in range(rows):
            for place in range(tokens):
                seen = [
                    other for other in range(tokens)
                    if row < rows // 2 or not self.closed() or not own[place] or not own[other] or own[place] & own[other]
                ]  # fmt: skip
                for head in range(attn.heads):
                    shares = (k[row, seen, head] @ q[row, place, head] / q.shape[-1] ** 0.5).softmax(0)
                    out[row, place, head] = shares @ v[row, seen, head]
        return attn.to_out[0](out.flatten(2))


def test_it_is_attention_written_out(pipe):
    """Closed at two of three steps; regions of 3 x 6 of 8 x 8 places and of 4 x 4, that share some."""
    with isolated(pipe, [LEFT, MIDDLE], until=0.5):
        found = latents(pipe, seeds=SEEDS, num_inference_steps=3)
    plain, calls = latents(pipe, seeds=SEEDS, num_inference_steps=3), []
    pipe.unet.register_forward_pre_hook(lambda *_: calls.append(0))
    for name, module in pipe.unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(Written(lambda: len(calls) <= 2, [LEFT, MIDDLE]))
    wanted = latents(pipe, seeds=SEEDS, num_inference_steps=3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert (found - plain).abs().max() > 1e-3


def test_what_closes_nothing_changes_nothing(pipe):
    plain = latents(pipe, num_inference_steps=2)
    for regions, until in (([LEFT, MIDDLE], 0.0), (["everywhere", "everywhere"], 1.0), (["left"], 1.0), ([], 1.0)):
        with isolated(pipe, regions, until=until):
            torch.testing.assert_close(latents(pipe, num_inference_steps=2), plain, atol=1e-6, rtol=0)
    assert not any(module._forward_pre_hooks for module in pipe.unet.modules())


def test_regional_prompts_are_isolated_too(pipe, loras):
    prompt, parts = "a fox a hat", {"fox": ("a fox", "left"), "hat": ("a hat", "right")}
    names, gates = ("fox", "hat"), mole.GateConfig("static", granularity="matrix")
    mixture = mole.attach(pipe, {name: loras[name] for name in names}, gates, binding=None)
    with isolated_prompts(pipe, mixture, prompt, parts):
        found = latents(pipe, prompt, num_inference_steps=4)
    with regional_prompts(pipe, mixture, prompt, parts):
        for until, same in ((0.5, True), (0.25, False)):
            with isolated(pipe, ["left", "right"], until=until):
                other = latents(pipe, prompt, num_inference_steps=4)
            assert torch.allclose(found, other, atol=1e-6) == same


def test_what_cannot_be_isolated(pipe):
    for host, regions, until, why in (
        (pipe, ["left"], 1.5, "is in 0..1, got 1.5"),
        (pipe, ["left", "auto"], 0.5, "isolation needs given regions"),
        (SimpleNamespace(unet=None), ["left"], 0.5, "isolation needs a unet"),
    ):
        with pytest.raises(ValueError, match=why), isolated(host, regions, until=until):
            pass
