"""A sum as one LoRA on each host, by export, by merge and folded into the weights: the same picture on every way."""

import hosts
import pytest
import torch
from tiers import thorough
from tiny import ATTENTION, FEED_FORWARD, tiny_lora

import mole_diffusers as mole
from mole_diffusers.lora import read_expert

LAYERS = (*ATTENTION, *FEED_FORWARD, "w1", "w2", "w3", "proj_mlp", "img_mlp.net.2", "txt_mlp.net.2", "to_qkv_mlp_proj")
LAYERS += ("to_gate", "ff.up", "ff.down", "linear_3")
CLOSE = {"atol": 1e-5, "rtol": 0}
OTHERS = ("sdxl", "sd3", "flux", "flux2", "chroma", "wan", "krea2", "lumina2", "hidream", "ltx")


def two_loras(pipe, folder):
    """Files for the layers of which diffusers loads LoRAs."""
    parts = {part: model for part, model in pipe.components.items() if part.startswith("text_encoder")}
    unread = set(parts) - set(pipe._lora_loadable_modules)
    for part in unread:
        setattr(pipe, part, None)
    files = {n: tiny_lora(pipe, folder / f"{n}.safetensors", seed=i, ends=LAYERS) for i, n in enumerate(("fox", "ink"))}
    for part in unread:
        setattr(pipe, part, parts[part])
    return files


@pytest.mark.parametrize("name", ["qwen", "z_image", *thorough(*OTHERS)])
def test_a_sum_is_one_lora(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    base, weighed = hosts.draw(pipe, options), dict(zip(("fox", "ink"), (0.8, -0.6), strict=True))
    experts = {n: (file, weighed[n]) for n, file in two_loras(pipe, tmp_path).items()}
    mixture = mole.attach(pipe, experts, binding=None)
    whole = hosts.draw(pipe, options)
    assert not torch.allclose(whole, base, atol=1e-3)
    with mixture.collapsed():
        torch.testing.assert_close(hosts.draw(pipe, options), whole, atol=3e-5, rtol=0)
    files = {form: tmp_path / f"{form}.safetensors" for form in ("diffusers", "kohya", "merge")}
    for form in ("diffusers", "kohya"):
        mixture.export_lora(files[form], format=form, dtype=torch.float32)
    mole.save_expert(mole.merge(experts, "sum"), files["merge"], dtype=torch.float32)
    mole.detach(pipe)
    assert torch.equal(hosts.draw(pipe, options), base)
    for file in files.values():
        mole.attach(pipe, {"one": file}, binding=None)
        torch.testing.assert_close(hosts.draw(pipe, options), whole, **CLOSE)
        mole.detach(pipe)
    for form in ("diffusers", "merge"):
        pipe.load_lora_weights(files[form])
        torch.testing.assert_close(hosts.draw(pipe, options), whole, **CLOSE)
        pipe.unload_lora_weights()


@pytest.mark.parametrize("name", ["z_image", *thorough("qwen")])
def test_activations_of_a_transformer_are_its_tokens_without_padding(name, tmp_path):
    """Against the inputs cut by hand: of the prompt alone, in its own place among the picture's tokens."""
    pipe, options = hosts.HOSTS[name]()
    joint = "layers.0.attention.to_q"
    ends = (joint, "context_refiner.0.attention.to_q") if name == "z_image" else ("add_k_proj",)
    encoder, pipe.text_encoder = pipe.text_encoder, None
    expert, prompts, seen = read_expert(tiny_lora(pipe, tmp_path / "a.safetensors", ends=ends)), ["a fox", "an owl"], {}
    pipe.text_encoder = encoder
    for layer, module in pipe.transformer.named_modules():
        if layer.endswith(ends):
            module.register_forward_pre_hook(lambda _, args, layer=layer: seen.update({layer: args[0]}))
    runs = mole.Activations(pipe, {"a": prompts}, steps=1, rows=10**6, call=hosts.SIZE | {"max_sequence_length": 128})
    found = runs.own("a", expert)
    assert len(found) == len(seen)
    begin, end = ("<|im_start|>user\n", "") if name == "z_image" else ("", "\n")  # Jinja drops a newline at the end
    texts = [f"{begin}{prompt}<|im_end|>\n<|im_start|>assistant{end}" for prompt in prompts]
    counts = [len(pipe.tokenizer(text).input_ids) for text in texts]
    for layer, x in seen.items():
        start = 64 if layer == joint else 0  # the picture's tokens come first; both are padded to a multiple of 32
        parts = [torch.cat([row[:start], row[start:][:count]]) for row, count in zip(x, counts, strict=True)]
        key = next(key for key in found if key.replace("_", ".").endswith(layer.replace("_", ".")))
        torch.testing.assert_close(found[key], torch.cat(parts), msg=layer)
