"""diffusers' LoRA calls on the drop-in, beside the same calls on diffusers' own pipeline."""

import inspect
import logging
from dataclasses import replace

import diffusers
import hosts
import numpy as np
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.binding.config import Bound

CLOSE = {"atol": 1e-5, "rtol": 0}
LAYERS = ["to_q", "to_k", "to_v", "to_out.0"]


@pytest.fixture(params=["sd15", *thorough("sdxl")])
def both(request, tmp_path):
    """(the drop-in, diffusers' own pipeline, what calls need, two LoRA files); the same weights in both."""
    (ours, options), (stock, _) = (hosts.HOSTS[request.param]() for _ in range(2))
    files = {n: tiny_lora(ours, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    return hosts.quiet(mole.MoLEPipeline.from_pipe(ours)), stock, options, files


def load(pipe, files):
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)


def same(ours, stock, options):
    torch.testing.assert_close(hosts.draw(ours, options), hosts.draw(stock, options), **CLOSE)


LIKE = ("prompt_template_encode_start_idx", "prompt_template_encode_num_suffix_tokens", "vae_scale_factor")
LIKE += ("default_sample_size",)
FOR_ATTENTION = {"attention_kwargs", "joint_attention_kwargs"}


def like(stock, pipe):
    """A pipeline with the numbers that only the tiny one has, such as the tokens of its template."""
    for name in LIKE:
        if hasattr(stock, name):
            setattr(pipe, name, getattr(stock, name))
    return hosts.quiet(pipe)


OTHERS = ("sd3", "flux", "z_image", "chroma", "flux2", "flux2-dev", "krea2", "lumina2", "hidream", "wan", "ltx")


@pytest.mark.parametrize("name", ["qwen", *thorough(*OTHERS)])
def test_the_calls_of_transformers_are_those_of_diffusers(name, tmp_path):
    (ours, options), (stock, _) = (hosts.HOSTS[name]() for _ in range(2))
    base, ours = hosts.draw(stock, options), like(stock, mole.MoLEPipeline.from_pipe(ours))
    assert type(ours).__name__ == f"MoLE{type(stock).__name__}"
    files = {n: tmp_path / f"{n}.safetensors" for n in ("fox", "ink")}
    for seed, file in enumerate(files.values()):
        loaded = {f"{part}." for part in stock._lora_loadable_modules}
        tensors = load_file(tiny_lora(stock, file, seed=seed))
        save_file({key: tensor for key, tensor in tensors.items() if key.startswith(tuple(loaded))}, file)
    for pipe in (ours, stock):
        load(pipe, files)
        pipe.set_adapters(["fox", "ink"], [0.7, -0.4])
    same(ours, stock, options)
    assert ours.get_list_adapters() == stock.get_list_adapters()
    assert ours.get_active_adapters() == stock.get_active_adapters()
    ours.save_pretrained(tmp_path / "saved")
    without = {part: None for part, model in ours.components.items() if model is None}
    same(like(stock, mole.MoLEPipeline.from_pretrained(tmp_path / "saved", **without)), stock, options)
    (scaled,) = FOR_ATTENTION & inspect.signature(type(stock).__call__).parameters.keys()
    same(ours, stock, options | {scaled: {"scale": 0.5}})
    for pipe in (ours, stock):
        pipe.set_adapters("ink", 0.5)
        pipe.fuse_lora(components=stock._lora_loadable_modules, lora_scale=0.9)
    same(ours, stock, options)
    for pipe in (ours, stock):
        pipe.unfuse_lora(components=stock._lora_loadable_modules)
        pipe.delete_adapters("ink")
        pipe.set_adapters("fox")
    same(ours, stock, options)
    for pipe in (ours, stock):
        pipe.unload_lora_weights()
        torch.testing.assert_close(hosts.draw(pipe, options), base, **CLOSE)


def control(pipe, *, channels):
    """A state dict of a LoRA for the layer that reads the channels."""
    (out, _), generator = pipe.transformer.x_embedder.weight.shape, torch.Generator().manual_seed(0)
    shapes = {"lora_A": (4, channels), "lora_B": (out, 4)}
    return {f"transformer.x_embedder.{k}.weight": torch.randn(v, generator=generator) for k, v in shapes.items()}


def test_a_control_lora_of_flux_becomes_an_ordinary_adapter(tmp_path):
    ours, options = hosts.HOSTS["flux"]()
    ours = hosts.quiet(mole.MoLEPipeline.from_pipe(ours))
    base, (norm, weight) = (
        hosts.draw(ours, options),
        next((name, p) for name, p in ours.transformer.named_parameters() if "norm_q" in name),
    )
    ours.load_lora_weights({f"transformer.{norm}": weight.detach() + 1})
    assert ours.mixture is None
    assert not torch.allclose(hosts.draw(ours, options), base, atol=1e-4)
    ours.unload_lora_weights()
    assert torch.equal(hosts.draw(ours, options), base)
    fox = tiny_lora(ours, tmp_path / "fox.safetensors", ends=("attn.to_q",))
    ours.load_lora_weights(fox, adapter_name="fox")
    alone = hosts.draw(ours, options)
    save_file(control(ours, channels=8), tmp_path / "narrow.safetensors")
    ours.load_lora_weights(tmp_path / "narrow.safetensors", adapter_name="narrow")  # for fewer channels than the model has
    assert list(ours.mixture.experts) == ["fox"]
    assert set(ours.get_active_adapters()) == {"fox", "narrow"}
    assert not torch.allclose(hosts.draw(ours, options), alone, atol=1e-4)
    with pytest.raises(ValueError, match="'fox' is in use"):
        ours.load_lora_weights(control(ours, channels=32), adapter_name="fox")
    with pytest.raises(RuntimeError, match="size mismatch for x_embedder.lora_A.wide.weight: a LoRA that widens"):
        ours.load_lora_weights(control(ours, channels=32), adapter_name="wide")
    ours.unload_lora_weights()
    assert torch.equal(hosts.draw(ours, options), base)
    ours.load_lora_weights(control(ours, channels=16), adapter_name="plain")
    assert list(ours.mixture.experts) == ["plain"]


WEIGHTS = [
    *thorough(0.5, [0.3, -1.2]),
    *thorough([np.float32(0.3), torch.tensor(0.7)], [{"text_encoder": 0.2}, 1.0]),
    [{"unet": 0.4, "text_encoder": 2.0}, {"unet": {"down": 0.2, "up": {"block_0": [0.1, 0.9]}}}],
    *thorough([{"unet": {"mid": 0.3}}, None]),
]


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
def test_weights_are_those_of_diffusers(both, weights):
    ours, stock, options, files = both
    load(ours, files)
    load(stock, files)
    for pipe in (ours, stock):
        pipe.set_adapters(["fox", "ink"], weights)
    same(ours, stock, options)
    for pipe in (ours, stock):
        pipe.set_adapters("ink")
    same(ours, stock, options)


def test_a_weight_that_would_not_count_is_said(both):
    ours, _, options, files = both
    load(ours, files)
    ours.set_adapters("fox", 0.5)
    half = hosts.draw(ours, options)
    for given in ({"unet": [0.3]}, {"text_encoder": [1, 2]}, {"unet": {"down": float("nan")}}):
        with pytest.raises(ValueError, match="must be a"):
            ours.set_adapters("fox", [given])
    assert torch.equal(hosts.draw(ours, options), half)
    for given in ({"unett": 0.3}, {"text_encoder": {"layers": 0.3}}):
        with pytest.warns(UserWarning, match="does not count: there is a number for each of"):
            ours.set_adapters("fox", [given])
    ours.set_adapters("fox")
    whole = hosts.draw(ours, options)
    with pytest.warns(UserWarning, match="'unett' does not count"):
        ours.set_adapters("fox", [{"unett": 0.3}])
    assert torch.equal(hosts.draw(ours, options), whole)


def test_adapters_are_listed_and_active_as_in_diffusers(both):
    ours, stock, options, files = both
    load(ours, files)
    load(stock, files)
    for pipe in (ours, stock):
        pipe.set_adapters(["fox", "ink"], [0.0, 1.0])
    assert ours.get_active_adapters() == stock.get_active_adapters() == ["fox", "ink"]
    assert ours.get_list_adapters() == stock.get_list_adapters()
    for pipe in (ours, stock):
        pipe.set_adapters("ink", 0.5)
        pipe.delete_adapters(["fox", "nobody"])
    assert ours.get_active_adapters() == stock.get_active_adapters() == ["ink"]
    assert ours.get_list_adapters() == stock.get_list_adapters()
    same(ours, stock, options)


def test_who_is_off_stays_off_when_gates_or_experts_change(both):
    ours, _, options, files = both
    load(ours, files)
    ours.set_adapters("ink", 0.5)
    ink = hosts.draw(ours, options)
    ours.load_gates("sum")
    torch.testing.assert_close(hosts.draw(ours, options), ink, **CLOSE)
    assert ours.get_active_adapters() == ["ink"]


def test_what_is_off_in_a_block_is_on_after_it_beside_a_lora_that_came_inside(both):
    ours, _, _, files = both
    load(ours, files)
    with ours.mixture.only("fox"), ours.mixture.strengths({"ink": 0.0}):
        ours.load_lora_weights(files["fox"], adapter_name="third")
    assert ours.get_active_adapters() == ["fox", "ink", "third"]
    assert ours.mixture.strength("ink") == 1.0


BY_BLOCK = {"unet": {"down": 0.2, "up": {"block_0": [0.1, 0.9]}}, "text_encoder": 0.5}


@pytest.mark.parametrize("then", ["fuse", *thorough("save", "load", "gates")])
def test_weights_of_blocks_outlast_what_comes_after(both, then, tmp_path):
    ours, stock, options, files = both
    for pipe in (ours, stock):
        pipe.load_lora_weights(files["fox"], adapter_name="fox")
        pipe.set_adapters("fox", [BY_BLOCK])
    if then == "load":
        for pipe in (ours, stock):
            pipe.load_lora_weights(files["ink"], adapter_name="ink")
        stock.set_adapters(["fox", "ink"], [BY_BLOCK, 1.0])  # in diffusers the last one alone would be on
    elif then == "gates":
        ours.load_gates("sum")
    elif then == "save":
        ours.save_pretrained(tmp_path / "saved")
        ours = hosts.quiet(mole.MoLEPipeline.from_pretrained(tmp_path / "saved"))
    else:
        for pipe in (ours, stock):
            pipe.fuse_lora()
    same(ours, stock, options)


def test_a_swapped_expert_has_the_words_of_its_own_file(both):
    ours, _, _, files = both
    fox, ink = (replace(mole.read_expert(files[name]), triggers=(name,)) for name in ("fox", "ink"))
    ours.load_lora_weights(fox, adapter_name="x")
    ours.load_lora_weights(ink, adapter_name="x", hotswap=True)
    assert ours.mixture.binding["x"].words == ("ink",)


def test_adapters_of_peft_are_seen_and_taken_out(both):
    ours, stock, options, files = both
    base = hosts.draw(ours, options)
    for pipe in (ours, stock):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), "other")
    same(ours, stock, options)
    assert ours.get_list_adapters() == {"unet": ["other"]}
    assert ours.get_active_adapters() == ["other"]
    for pipe in (ours, stock):
        pipe.load_lora_weights(files["fox"], adapter_name="fox")
        pipe.set_adapters(["other", "fox"], [0.5, 0.8])
    same(ours, stock, options)
    assert sorted(ours.get_active_adapters()) == ["fox", "other"]
    for pipe in (ours, stock):
        pipe.set_adapters("fox")
    same(ours, stock, options)
    ours.delete_adapters("other")
    assert ours.get_list_adapters()["unet"] == ["fox"]
    ours.unload_lora_weights()
    assert torch.equal(hosts.draw(ours, options), base)
    ours.unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), "other")
    ours.unload_lora_weights()
    assert torch.equal(hosts.draw(ours, options), base)


def test_a_stock_pipeline_with_loras_becomes_a_drop_in(both):
    _, stock, options, files = both
    stock.load_lora_weights(files["fox"], adapter_name="fox")
    picture = hosts.draw(stock, options)
    ours = hosts.quiet(mole.MoLEPipeline.from_pipe(stock))
    assert ours.get_active_adapters() == ["fox"]
    torch.testing.assert_close(hosts.draw(ours, options), picture, **CLOSE)
    ours.set_adapters("fox", 0.3)
    assert not torch.allclose(hosts.draw(ours, options), picture, atol=1e-4)


@pytest.mark.parametrize("how", ["dict", "folder", "weight_name", *thorough("options")])
def test_sources_are_those_of_diffusers(both, how, tmp_path):
    ours, stock, options, files = both
    stock.load_lora_weights(files["fox"])
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "some_name.safetensors").write_bytes(files["fox"].read_bytes())
    given, named = {
        "dict": (load_file(files["fox"]), {}),
        "folder": (tmp_path / "one", {"subfolder": None}),  # diffusers' own default
        "weight_name": (tmp_path / "one", {"weight_name": "some_name.safetensors"}),
        "options": (files["fox"], {"low_cpu_mem_usage": True, "use_safetensors": True}),
    }[how]
    ours.load_lora_weights(given, **named)
    assert ours.get_active_adapters() == stock.get_active_adapters()
    same(ours, stock, options)


def test_an_expert_is_swapped_in_place_of_another(both):
    ours, stock, options, files = both
    ours.load_lora_weights(files["fox"], adapter_name="x")
    ours.load_lora_weights(files["ink"], adapter_name="x", hotswap=True)
    stock.load_lora_weights(files["ink"], adapter_name="x")
    same(ours, stock, options)
    with pytest.raises(TypeError, match="has no argument 'weigth_name'"):
        ours.load_lora_weights(files["fox"], weigth_name="x")


@pytest.mark.parametrize("then", ["unfuse", *thorough("unload")])
def test_fusing_is_that_of_diffusers(both, then):
    """load, fuse, unload is the usual idiom."""
    ours, stock, options, files = both
    base = hosts.draw(ours, options)
    for pipe in (ours, stock):
        load(pipe, files)
        pipe.set_adapters(["fox", "ink"], [0.7, 0.4])
        pipe.fuse_lora(lora_scale=0.9)
    same(ours, stock, options)
    for pipe in (ours, stock):
        pipe.unload_lora_weights() if then == "unload" else pipe.unfuse_lora()
    same(ours, stock, options)
    assert (hosts.draw(ours, options) - base).abs().max() > 1e-3


def test_fusing_takes_what_is_beside_the_experts_along(both):
    ours, stock, options, files = both
    for pipe in (ours, stock):
        torch.manual_seed(0)
        pipe.unet.add_adapter(LoraConfig(r=2, target_modules=LAYERS, init_lora_weights=False), "other")
        pipe.load_lora_weights(files["fox"], adapter_name="fox")
        pipe.set_adapters(["other", "fox"], [0.5, 0.8])
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    same(ours, stock, options)


def test_what_fused_weights_cannot_hold_is_refused(both):
    ours, _, options, files = both
    load(ours, files)
    ours.mixture.bind({"fox": "fox"})
    picture = hosts.draw(ours, options)
    with pytest.raises(ValueError, match=r"mixture.bind\(None\).*collapsed\(prompt\)"):
        ours.fuse_lora()
    assert torch.equal(hosts.draw(ours, options), picture)
    ours.mixture.bind(None)
    ours.load_gates("mole")
    with pytest.raises(ValueError, match=r"load_gates\('sum'\)"):
        ours.fuse_lora()


def test_layers_that_diffusers_does_not_fuse_are_not_dropped(tmp_path):
    ours, options = hosts.HOSTS["flux"]()
    ours = hosts.quiet(mole.MoLEPipeline.from_pipe(ours))
    fox = tiny_lora(ours, tmp_path / "fox.safetensors", ends=("attn.to_q", "SelfAttention.q"))
    ours.load_lora_weights(fox, adapter_name="fox")
    picture = hosts.draw(ours, options)
    with pytest.raises(ValueError, match="diffusers fuses nothing into the text_encoder_2 of 'fox': leave it unfused"):
        ours.fuse_lora()
    assert torch.equal(hosts.draw(ours, options), picture)


def test_auto_pipelines_find_the_drop_ins(both):
    ours, _, options, files = both
    load(ours, files)
    for auto, form in (
        (diffusers.AutoPipelineForImage2Image, "Img2ImgPipeline"),
        (diffusers.AutoPipelineForInpainting, "InpaintPipeline"),
        (diffusers.AutoPipelineForText2Image, "Pipeline"),
    ):
        pipe = auto.from_pipe(ours)
        assert type(pipe).__name__ == type(ours).__name__.removesuffix("Pipeline") + form
        assert pipe.get_active_adapters() == ["fox", "ink"]


def test_models_of_several_precisions_keep_them():
    pipe, _ = hosts.HOSTS["sd15"]()
    pipe.text_encoder.to(torch.bfloat16)
    ours = mole.MoLEPipeline.from_pipe(pipe)
    assert (ours.text_encoder.dtype, ours.unet.dtype) == (torch.bfloat16, torch.float32)


def test_a_lora_that_needs_its_words_is_fused_with_a_warning(both):
    ours, _, options, files = both
    ours.load_lora_weights(files["fox"], adapter_name="fox")
    ours.mixture.bind({"fox": Bound(("cat",), required=True)})
    silent = hosts.draw(ours, options)
    with ours.mixture.bound(None):
        acts = hosts.draw(ours, options)
    assert not torch.allclose(silent, acts, atol=1e-2)
    with pytest.warns(UserWarning, match="fused, 'fox' acts on every prompt; before, only on those with 'cat'"):
        ours.fuse_lora()
    torch.testing.assert_close(hosts.draw(ours, options), acts, **CLOSE)


def test_a_pipeline_without_a_denoiser_has_no_mixture():
    pipe, _ = hosts.HOSTS["sd15"]()
    parts = {**pipe.components, "unet": None}
    assert mole.MoLEStableDiffusionPipeline(**parts, requires_safety_checker=False).mixture is None


def test_a_state_dict_without_a_matrix_loads_nothing_and_diffusers_says_so(both, caplog, monkeypatch):
    ours, stock, options, _ = both
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING", logger="diffusers"):
        for pipe in (ours, stock):
            pipe.load_lora_weights({"lora_foo": torch.tensor(2.0)})
    logged = [record.message for record in caplog.records if record.message.startswith("No LoRA keys associated to")]
    assert len(logged) >= 2
    assert sorted(logged[: len(logged) // 2]) == sorted(logged[len(logged) // 2 :])
    assert ours.mixture is None
    same(ours, stock, options)
