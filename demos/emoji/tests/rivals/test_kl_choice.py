"""The choice by KL divergence against the same choice written out, layer by layer and token by token."""

import copy
from functools import partial

import pytest
import torch
from one_step import PROMPT, latents
from torch import nn

import mole_diffusers as mole
from mole_diffusers.lora import read_expert
from rivals.kl_choice import kl_choice

MATRIX = mole.GateConfig("static", granularity="matrix")
NAMES = ("fox", "hat")  # hat has convolutions, too


def divergence(base, other):
    """Mean over tokens of KL(softmax(base) || softmax(other)), [C] or [T, C] or [C, H, W] each."""
    if base.dim() == 3:
        base, other = base.flatten(1).T, other.flatten(1).T
    rows = []
    for b, o in zip(base.reshape(-1, base.shape[-1]), other.reshape(-1, other.shape[-1]), strict=True):
        p, q = b.exp() / b.exp().sum(), o.exp() / o.exp().sum()
        rows.append((p * (p / q).log()).sum())
    return torch.stack(rows).mean()


def choosing(deltas, chosen, module, args, base):
    found = []
    for delta in deltas:
        if delta is None:
            found.append(base)
        elif isinstance(module, nn.Conv2d):
            weight = delta.reshape(module.weight.shape)
            found.append(base + nn.functional.conv2d(args[0], weight, None, module.stride, module.padding))
        else:
            found.append(base + nn.functional.linear(args[0], delta))
    out = []
    for row in range(len(base)):
        far = [divergence(base[row], each[row]) for each in found]
        chosen.append(int(far[1] > far[0]))
        out.append(found[chosen[-1]][row])
    return torch.stack(out)


def test_it_is_the_choice_written_out(pipe, loras):
    host, chosen = copy.deepcopy(pipe), []
    mixture = mole.attach(pipe, {name: loras[name] for name in NAMES}, MATRIX, binding=None)
    text, without = pipe.encode_prompt(PROMPT, "cpu", 1, True)  # the text encoder keeps the sum
    with kl_choice(pipe, mixture):
        found = latents(pipe, num_inference_steps=2)
    layers = [read_expert(loras[name], name).layers["unet"] for name in NAMES]
    for name, module in host.unet.named_modules():
        deltas = [own[key].delta() if (key := name.replace(".", "_")) in own else None for own in layers]
        if any(delta is not None for delta in deltas):
            module.register_forward_hook(partial(choosing, deltas, chosen))
    call = {"prompt_embeds": text, "negative_prompt_embeds": without, "num_inference_steps": 2}
    generator = torch.Generator().manual_seed(0)
    wanted = host(generator=generator, guidance_scale=3.0, output_type="latent", **call).images
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)
    assert 0 < sum(chosen) < len(chosen)


def test_one_lora_is_that_lora_and_everything_is_given_back(pipe, loras):
    alone = latents(pipe) if mole.attach(pipe, {"fox": loras["fox"]}, MATRIX, binding=None) else None
    with kl_choice(pipe, mole.attached(pipe)):
        torch.testing.assert_close(latents(pipe), alone, atol=1e-6, rtol=0)
    assert torch.equal(latents(pipe), alone)
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_gates_of_whole_blocks_are_refused(pipe, loras):
    mixture = mole.attach(pipe, {name: loras[name] for name in NAMES}, binding=None)
    with pytest.raises(ValueError, match="a choice in each layer needs a gate per matrix"), kl_choice(pipe, mixture):
        pass
