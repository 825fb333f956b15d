"""Experts as files: every name of a real model is told from its key, and the file is the expert again."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from tiny import tiny_pipeline
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mole_diffusers import merge, read_expert, save_expert
from mole_diffusers.lora import layer_key
from mole_diffusers.lora.writing import module_name


def hosts():
    """Models with every kind of layer name, without memory."""
    with torch.device("meta"):
        yield UNet2DConditionModel()  # as Stable Diffusion 1.5
        yield UNet2DConditionModel(
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=2,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=64,
        )  # as SDXL
        yield CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=1))
        yield T5EncoderModel(T5Config(num_layers=1, feed_forward_proj="gated-gelu"))
        yield SD3Transformer2DModel(num_layers=2, dual_attention_layers=(0,))
        yield FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def test_every_layer_name_is_told_from_its_key():
    for host in hosts():
        names = [n for n, m in host.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        assert names
        for name in names:
            assert module_name(layer_key(name)) == name.removeprefix("text_model.")


@pytest.mark.parametrize(
    ("width", "others", "prefix"), [(768, (), "lora_te_"), (2048, (), "lora_te1_"), (16, ("text_encoder_2",), "lora_te1_")]
)
def test_kohyas_name_of_the_first_text_encoder_tells_whether_there_are_more(tmp_path, width, others, prefix):
    """A1111 finds the layers of SDXL's first encoder by lora_te1_ alone, and Stable Diffusion's by lora_te_."""
    inputs = {"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": width}
    inputs |= {f"{part}.encoder.layers.0.self_attn.q_proj": 4 for part in ("text_encoder", *others)}
    halves = {f"{name}.lora_A.weight": torch.randn(2, size) for name, size in inputs.items()}
    save_file(halves | {f"{name}.lora_B.weight": torch.randn(4, 2) for name in inputs}, tmp_path / "x")
    save_expert(read_expert(tmp_path / "x"), tmp_path / "y", format="kohya")
    found = {key.partition("text_model")[0] for key in load_file(tmp_path / "y") if key.startswith("lora_te")}
    assert found == {prefix, *(["lora_te2_"] if others else [])}


def test_a_name_that_no_model_has_is_an_error():
    with pytest.raises(ValueError, match="layer 'down_blocks_0_magic' has words that no known model uses"):
        module_name("down_blocks_0_magic")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_saved_expert_is_the_expert(loras, tmp_path, format):
    expert = read_expert(loras["hat"])
    save_expert(expert, tmp_path / "x.safetensors", format=format, dtype=torch.float32)
    again = read_expert(tmp_path / "x.safetensors")
    assert set(again.layers["unet"]) == set(expert.layers["unet"])
    for part, layers in expert.layers.items():
        for key, weights in layers.items():
            torch.testing.assert_close(again.layers[part][key].delta(), weights.delta())


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_a_saved_expert_of_flux_is_the_expert(tmp_path, format):
    layers = {
        "transformer": ("transformer_blocks.0.attn.to_add_out", "single_transformer_blocks.3.proj_mlp", "norm_out.linear"),
        "text_encoder": ("encoder.layers.0.self_attn.q_proj",),
        "text_encoder_2": ("encoder.block.0.layer.0.SelfAttention.q", "encoder.block.0.layer.1.DenseReluDense.wi_0"),
    }
    halves = {"lora_A": (2, 4), "lora_B": (4, 2)}
    names = [f"{part}.{name}.{half}.weight" for part, found in layers.items() for name in found for half in halves]
    save_file({name: torch.randn(halves[name.split(".")[-2]]) for name in names}, tmp_path / "x")
    expert = read_expert(tmp_path / "x")
    assert {part: len(found) for part, found in expert.layers.items()} == {
        part: len(found) for part, found in layers.items()
    }
    save_expert(expert, tmp_path / "y", format=format, dtype=torch.float32)
    again = read_expert(tmp_path / "y")
    assert again.base == expert.base == "Flux"
    for part, found in expert.layers.items():
        for key, weights in found.items():
            torch.testing.assert_close(again.layers[part][key].delta(), weights.delta())


def test_stock_diffusers_loads_convolutions_whose_file_does_not_tell_their_kernel(tmp_path):
    """LoHa without a core stores [r, Cin k k]. What diffusers makes of its merge is the change that the file says."""
    pipe = tiny_pipeline()
    convolutions = {name: m for name, m in pipe.unet.named_modules() if isinstance(m, nn.Conv2d)}
    sides = {
        f"lora_unet_{layer_key(name)}.hada_w{i}_{half}": (len(m.weight), 2) if half == "a" else (2, m.weight[0].numel())
        for name, m in convolutions.items()
        for i in (1, 2)
        for half in "ab"
    }
    save_file({key: torch.randn(size) for key, size in sides.items()}, tmp_path / "loha")
    expert = replace(read_expert(tmp_path / "loha", "a"), base="SD 1.x")  # whose proj_in and proj_out are convolutions
    save_expert(merge({"a": expert}, "sum"), tmp_path / "one.safetensors", dtype=torch.float32)
    pipe.load_lora_weights(tmp_path / "one.safetensors", adapter_name="one")
    for name in convolutions:
        delta = expert.layers["unet"][layer_key(name)].delta()
        made = pipe.unet.get_submodule(name).get_delta_weight("one")
        torch.testing.assert_close(made, delta.reshape(made.shape), atol=1e-4, rtol=1e-4)
