"""Maps that are read from attention over text and picture, and words that are closed in it."""

import warnings

import pytest
import torch
from bound_pictures import bound_pictures, by_hand, draw_other, now, stop
from diffusers.models.attention_dispatch import attention_backend
from tiers import thorough
from torch import nn
from torch.overrides import TorchFunctionMode

import mole_diffusers as mole
from mole_diffusers.binding import region_mask
from mole_diffusers.patching.gating import bound_text, joint_attention

pytestmark = pytest.mark.usefixtures("decided")


@pytest.mark.parametrize("other", ["flux", *thorough("sd3")], indirect=True)
def test_closed_words_of_joint_attention_are_those_written_out(other, monkeypatch):
    """Logits of the picture's tokens to other experts' words, lowered by hand in a plain attention."""
    binding = {"fox": ("fox", "left"), "ink": ("owl", "right")}
    mixture, closed = bound_pictures(other, binding)
    own = torch.tensor(now(mixture).picture.readings[-1].own).float()  # [N, S]
    conditional = [row for row, prompt in enumerate(now(mixture).picture.prompt_of) if row == prompt]
    height, width = now(mixture).picture.latent_size
    words, tokens = own.shape[1], height * width
    outside = 1 - torch.stack([region_mask(side, height, width).flatten() for side in ("left", "right")])  # [N, T]
    closing = -8.0 * outside.T @ own  # [T, S]

    hosts_own = torch.nn.functional.scaled_dot_product_attention

    def attention(query, key, value, *args, **kwargs):
        if query.shape[2] != words + tokens:
            return hosts_own(query, key, value, *args, **kwargs)
        picture, text = slice(words, None), slice(0, words)
        if other.name == "sd3":
            picture, text = slice(0, tokens), slice(tokens, None)
        logits = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        for row in conditional:
            logits[row, :, picture, text] += closing
        return logits.softmax(-1) @ value

    monkeypatch.setattr(bound_text, "MASK_BIAS", 0.0)
    with monkeypatch.context() as patched:
        patched.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
        by_hand = draw_other(other)
    torch.testing.assert_close(by_hand, closed, atol=1e-4, rtol=0)
    assert (draw_other(other) - closed).abs().max() > 1e-4


@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_ctrl_c_inside_joint_attention_leaves_nothing_behind(other):
    """After a Ctrl-C PyTorch calls no hook."""
    base = draw_other(other, steps=2)
    _, closed = bound_pictures(other, {"fox": ("fox", "left"), "ink": ("owl", "right")}, steps=2)
    hook = other.pipe.transformer.transformer_blocks[0].attn.to_out[0].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        draw_other(other, steps=2)
    hook.remove()
    assert torch.equal(draw_other(other, steps=2), closed)
    mole.detach(other.pipe)
    assert torch.equal(draw_other(other, steps=2), base)


class Heard(TorchFunctionMode):
    """Queries and keys of every attention."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.scaled_dot_product_attention:
            given = dict(zip(("query", "key"), args, strict=False)) | (kwargs or {})
            self.calls.append((given["query"], given["key"]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_a_trace_keeps_the_maps_of_joint_attention(other):
    """Of the middle half of the three blocks: the first and the second; the text comes first."""
    mixture = mole.attach(other.pipe, other.files, binding={"fox": "fox", "ink": "owl"})
    with Heard() as heard, mixture.trace(maps=True) as trace, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw_other(other, steps=3)
    picture = now(mixture).picture
    side, subjects = picture.latent_size, picture.readings[0].subjects
    text = len(subjects[0].tokens)
    joint = [(q[0], k[0]) for q, k in heard.calls if q.shape[2] == text + side[0] * side[1]]
    assert len(joint) == 9
    steps = [[(q[:, text:], k[:, :text]) for q, k in joint[i : i + 2]] for i in (0, 3, 6)]
    tokens = [[t for t, own in enumerate(subject.tokens) if own] for subject in subjects]
    for (maps,), wanted in zip(trace.maps.values(), by_hand(steps, tokens, side), strict=True):
        assert list(maps) == ["fox", "ink"]
        torch.testing.assert_close(torch.stack(list(maps.values())), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", ["flux"], indirect=True)
@pytest.mark.shows("binding with attention slicing or another attention backend")
def test_closed_words_do_not_depend_on_the_attention_backend(other):
    binding = {"fox": ("fox", "left"), "ink": ("owl", "right")}
    _, native = bound_pictures(other, binding)
    mole.detach(other.pipe)
    joint_attention._say_native.cache_clear()
    with attention_backend("native"):  # setting one makes it the default of all models
        other.pipe.transformer.set_attention_backend("_native_flash")  # which refuses masks
        mole.attach(other.pipe, other.files, binding=binding)
        with pytest.warns(UserWarning, match="PyTorch's own backend instead of _native_flash") as said:
            other_backend = draw_other(other)
    assert sum("PyTorch's own backend" in str(warning.message) for warning in said) == 1
    torch.testing.assert_close(other_backend, native, atol=1e-5, rtol=0)
    assert all(p._attention_backend == "_native_flash" for p in other.pipe.transformer.attn_processors.values())


@pytest.mark.thorough
@pytest.mark.parametrize("other", ["flux"], indirect=True)
@pytest.mark.shows("binding with `torch.compile`")
def test_compiled_blocks_of_a_transformer_are_bound(other):
    torch.compiler.reset()
    mixture, expected = bound_pictures(other, {"fox": "fox", "ink": "owl"}, steps=3)
    other.pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    torch.testing.assert_close(draw_other(other, steps=3), expected, atol=1e-5, rtol=0)
    assert set(mixture.layouts[0].regions) == {"fox", "ink"}
