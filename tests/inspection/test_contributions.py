"""Where each LoRA acts: what is measured inside is the size of what a layer adds to each place of the picture."""

import hosts
import pytest
import torch
from tiny import tiny_lora

from mole_diffusers import attach
from mole_diffusers.inspection import contributions

ACTING = {  # host -> layers that have a token per place, and the shape of these for 32 x 48 pixels
    "sd15": (("mid_block.attentions.0.transformer_blocks.0.attn1.to_q",), (8, 12)),
    "sd3": (("transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2"), (8, 12)),
    "flux": (("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_out"), (8, 12)),
}
TEXT = {"sd15": "attn2.to_k", "sd3": "attn.add_q_proj", "flux": "ff_context.net.2"}


def watched(host, folder, ends, **call):
    """The contributions of one LoRA while a picture is drawn, and what enters its layers."""
    pipe, options = hosts.HOSTS[host]()
    mixture = attach(pipe, {"fox": tiny_lora(pipe, folder / "fox.safetensors", ends=ends)}, binding=None)
    network, entered = hosts.denoiser(pipe), {}
    layers = {name: module for name, module in network.named_modules() if hasattr(module, "lora_A")}
    for name, layer in layers.items():
        layer.register_forward_pre_hook(lambda _, args, name=name: entered.setdefault(name, []).append(args[0]))
    with contributions(pipe, mixture, (32, 48)) as found:
        hosts.draw(pipe, options | {"height": 32, "width": 48} | call)
    return layers, entered, found


@pytest.mark.parametrize("host", ACTING)
def test_maps_are_the_sizes_of_what_the_layers_add(host, tmp_path):
    names, shape = ACTING[host]
    layers, entered, found = watched(host, tmp_path, names)
    assert set(layers) >= set(names)
    wanted = 0
    for name, layer in layers.items():
        (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
        for x in entered[name]:  # of a step
            places = x[len(x) // 2 :, -shape[0] * shape[1] :]  # with the prompt; in what reads both, the text comes first
            wanted = wanted + (places @ down.weight.T @ up.weight.T).norm(dim=-1).mean(0)
    ((size, sums),) = found.sums.items()
    assert size == shape
    torch.testing.assert_close(sums[0], wanted.detach().unflatten(0, shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_rows_of_every_prompt_count_and_of_guidance_none(guidance, tmp_path):
    names, shape = ACTING["sd15"]
    layers, entered, found = watched("sd15", tmp_path, names, guidance_scale=guidance, num_images_per_prompt=4)
    (layer,), (inputs,) = layers.values(), entered.values()
    (down,), (up,) = layer.lora_A.values(), layer.lora_B.values()
    added = sum((x[-4:] @ down.weight.T @ up.weight.T).norm(dim=-1).mean(0) for x in inputs)
    torch.testing.assert_close(found.sums[shape][0], added.detach().unflatten(0, shape), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("host", TEXT)
def test_layers_of_the_text_act_on_no_place(host, tmp_path):
    layers, entered, found = watched(host, tmp_path, (TEXT[host],))
    assert layers
    assert all(entered.values())
    with pytest.raises(ValueError, match="no expert has acted on the picture"):
        found.finest()


def test_a_side_may_be_odd_where_the_unet_halves_it(tmp_path):
    """Half of 20 x 9 latents is 10 x 5, and not of their shape."""
    names, _ = ACTING["sd15"]
    _, _, found = watched("sd15", tmp_path, names, latents=torch.randn(1, 4, 20, 9))
    assert list(found.sums) == [(10, 5)]
