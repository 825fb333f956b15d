"""Every key family gives the same expert; every alpha is the one in the file; bad files get one clear sentence."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ATTENTION, CONVOLUTION, lora_layers, tiny_lora

import mole_diffusers as mole
from mole_diffusers import RefusedFileError
from mole_diffusers.lora import algorithms, read_expert, words_of


def kohya(pipe, path, alphas, *, rank=4, seed=0, ends=ATTENTION + CONVOLUTION, metadata=None):
    """A kohya file with one alpha per layer; returns {layer: delta W}, computed here by hand."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for i, (name, module) in enumerate(lora_layers(pipe, ends).items()):
        down = torch.randn(rank, *module.weight.shape[1:], generator=generator) * 0.2
        up = torch.randn(module.weight.shape[0], rank, *(1,) * (module.weight.dim() - 2), generator=generator) * 0.2
        part, _, layer = name.partition(".")
        stem = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + layer.replace(".", "_")
        alpha = alphas[i % len(alphas)]
        tensors |= {
            f"{stem}.lora_down.weight": down,
            f"{stem}.lora_up.weight": up,
            f"{stem}.alpha": torch.tensor(float(alpha)),
        }
        deltas[name] = alpha / rank * torch.einsum("or,r...->o...", up.flatten(1), down)
    save_file(tensors, path, {"format": "pt", **(metadata or {})})
    return deltas


@pytest.mark.shows("kohya, SD 1.x and 2.x")
def test_kohya_alphas_that_differ_per_layer_are_all_right(pipe, tmp_path):
    deltas = kohya(pipe, tmp_path / "k.safetensors", [1, 2, 4, 0.5])
    expert = read_expert(tmp_path / "k.safetensors")
    assert expert.format == "kohya"
    assert sum(len(layers) for layers in expert.layers.values()) == len(deltas)
    for name, delta in deltas.items():
        part, _, layer = name.partition(".")
        torch.testing.assert_close(expert.layers[part][layer.replace(".", "_")].delta(), delta)


@pytest.mark.shows("kohya, SD 1.x and 2.x")
def test_kohya_deltas_are_what_the_host_applies(pipe, draw, tmp_path):
    deltas = kohya(pipe, tmp_path / "k.safetensors", [1, 2, 4, 0.5])
    mole.attach(pipe, {"k": tmp_path / "k.safetensors"})
    attached = draw(pipe)
    mole.detach(pipe)
    with torch.no_grad():
        for name, module in lora_layers(pipe, ATTENTION + CONVOLUTION).items():
            module.weight += deltas[name]
    torch.testing.assert_close(attached, draw(pipe), atol=2e-5, rtol=0)


@pytest.mark.parametrize("form", ["peft", "diffusers", "old diffusers", "wrapped peft", "one model's own"])
@pytest.mark.shows("PEFT without metadata")
def test_key_families_give_one_expert(pipe, loras, tmp_path, form):
    reference = read_expert(loras["ink"])
    rename = {
        "peft": lambda k: k,
        "wrapped peft": lambda k: f"base_model.model.{k}",
        "one model's own": lambda k: f"base_model.model.{k.split('.', 1)[1]}",
        "diffusers": lambda k: k.replace("lora_A", "lora.down").replace("lora_B", "lora.up"),
        "old diffusers": lambda k: old_diffusers(k),
    }[form]
    save_file({rename(k): v for k, v in load_file(loras["ink"]).items()}, tmp_path / "x.safetensors")
    expert = read_expert(tmp_path / "x.safetensors")
    assert {p: set(v) for p, v in expert.layers.items()} == {p: set(v) for p, v in reference.layers.items()}
    for part, layers in reference.layers.items():
        for key, weights in layers.items():
            assert torch.equal(expert.layers[part][key].delta(), weights.delta())


def old_diffusers(key):
    stem, _, half = key.removesuffix(".weight").rpartition(".lora_")
    role = {"A": "down", "B": "up"}[half]
    if "text_encoder" in key:
        return f"{stem.replace('text_encoder.', 'text_encoder.text_model.')}.lora_linear_layer.{role}.weight"
    for layer in ("to_q", "to_k", "to_v"):
        if stem.endswith(f".{layer}"):
            return f"{stem.removesuffix(layer)}processor.{layer}_lora.{role}.weight"
    if stem.endswith(".to_out.0"):
        return f"{stem.removesuffix('to_out.0')}processor.to_out_lora.{role}.weight"
    return f"{stem}.lora.{role}.weight"


def test_peft_metadata_gives_alpha_per_part_and_pattern(pipe, loras, tmp_path):
    config = {
        "unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": True, "unet.alpha_pattern": {"attn2.to_v": 1},
        "text_encoder.r": 2, "text_encoder.lora_alpha": 1,
    }  # fmt: skip
    save_file(load_file(loras["ink"]), tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    layers = read_expert(tmp_path / "x.safetensors").layers
    block = "mid_block_attentions_0_transformer_blocks_0"
    assert layers["unet"][f"{block}_attn1_to_v"].scale == pytest.approx(6 / 2**0.5)
    assert layers["unet"][f"{block}_attn2_to_v"].scale == pytest.approx(1 / 2**0.5)
    assert layers["text_encoder"]["encoder_layers_0_self_attn_q_proj"].scale == 0.5


def test_what_a_file_says_of_itself(pipe, tmp_path):
    tags = {"10_fox": {"fox": 30, "smile": 12, "snow": 9, "grass": 2}}
    kohya(pipe, tmp_path / "a.safetensors", [4], metadata={"ss_tag_frequency": json.dumps(tags)})
    kohya(pipe, tmp_path / "b.safetensors", [4], metadata={"modelspec.trigger_phrase": "zwx fox, red"})
    first, second = (read_expert(tmp_path / f"{n}.safetensors") for n in "ab")
    assert (first.triggers, words_of(first)) == ((), (("fox",), False))
    assert second.triggers == ("zwx fox", "red")
    assert first.sha256 == second.sha256  # of the tensors, so metadata does not count
    assert (first.ranks, first.base, first.name) == ((4, 4), "cross-attention 16", "a")
    assert len(repr(first)) < 1000  # none of its numbers


def test_base_family_from_shapes(tmp_path):
    for width, family in ((768, "SD 1.x"), (1024, "SD 2.x"), (2048, "SDXL")):
        stem = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
        save_file({f"{stem}.lora_A.weight": torch.ones(2, width), f"{stem}.lora_B.weight": torch.ones(8, 2)}, tmp_path / "x")
        assert read_expert(tmp_path / "x").base == family


STEM = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
GOOD = {f"{STEM}.lora_A.weight": torch.ones(2, 16), f"{STEM}.lora_B.weight": torch.ones(16, 2)}


KEY = STEM.replace(".", "_").replace("unet_", "unet.")
HADA = {
    f"lora_unet_x.hada_w{i}_{half}": torch.ones(4 if half == "a" else 2, 2 if half == "a" else 4)
    for i in (1, 2)
    for half in "ab"
}
LOKR = {"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(3, 3)}
SQUARE = {"lora_unet_x.lokr_w1": torch.ones(200, 200)}


def pair(rank, rows, columns):
    return {f"{STEM}.lora_A.weight": torch.ones(rank, columns), f"{STEM}.lora_B.weight": torch.ones(rows, rank)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"{STEM}.lora_A.weight": torch.ones(2, 16)}, "has no up matrix"),
        (GOOD | {f"{STEM}.lora_B.weight": torch.ones(16, 3)}, "are not a low-rank pair"),
        (GOOD | {f"{STEM}.lora_B.weight": torch.full((16, 2), torch.nan)}, f"layer '{KEY}': its up holds NaN"),
        (GOOD | {f"{STEM}.lora_A.weight": torch.full((2, 16), -torch.inf)}, f"layer '{KEY}': its down holds NaN"),
        (
            GOOD | {f"{STEM}.dora_scale": torch.ones(1, 16)},
            r"its magnitudes \[1, 16\] are not one number for each of its 16 rows",
        ),
        (GOOD | {f"{STEM}.lora_magnitude_vector.default.weight": torch.ones(9)}, r"its magnitudes \[9\] are not one number"),
        (GOOD | {f"{STEM}.diff": torch.ones(16, 16)}, "is of a full weight difference"),
        (GOOD | {f"{STEM}.lora_B.bias": torch.ones(16)}, "is of a trained bias"),
        ({"lora_unet_x.w_norm": torch.ones(2)}, "is of a trained normalisation"),
        ({"lora_unet_x.oft_blocks": torch.ones(2, 2)}, "is of OFT"),
        ({"lora_unet_x.on_input": torch.ones(2)}, "is of IA3"),
        ({"lora_unet_x.a1.weight": torch.ones(2, 2)}, "is of GLoRA; LoRA, LoCon, LoHa, LoKr and DoRA are read"),
        ({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, "it has no hada_w1_b matrix"),
        (HADA | {"lora_unet_x.hada_w2_b": torch.ones(2, 3)}, "its halves change weights of 4 x 4 and 4 x 3"),
        (HADA | {"lora_unet_x.hada_t1": torch.ones(2, 2, 1, 1)}, "one of hada_t1 and hada_t2"),
        (HADA | {"lora_unet_x.lora_up.weight": torch.ones(4, 2)}, "its up does not go with the rest"),
        ({"lora_unet_x.lokr_w1": torch.ones(2, 2)}, "it has no lokr_w2_a matrix"),
        (LOKR | {"lora_unet_x.lokr_w1_a": torch.ones(2, 2)}, "it has lokr_w1 both whole and in factors"),
        ({k: torch.full_like(v, 3e38) for k, v in LOKR.items()}, "too large for a number"),
        (GOOD | {f"{STEM}.alpha": torch.ones(2)}, "alpha is not one number"),
        (GOOD | {f"{STEM}.alpha": torch.tensor(torch.inf)}, "its alpha holds NaN or infinite"),
        (GOOD | {f"{STEM}.lora_down.weight": torch.ones(2, 16)}, "has two down tensors under different keys"),
        ({k: v.to(torch.int8) for k, v in GOOD.items()}, "is stored as int8, not as floating point"),
        ({k: v[0] for k, v in GOOD.items()}, "which is not the shape of a LoRA factor"),
        ({k: v[:0] for k, v in GOOD.items()}, "which is not the shape of a LoRA factor"),
        (pair(5000, 8, 8), "its rank 5000 is too large"),
        (pair(1, 1 << 18, 1), "a weight of 262144 x 1, larger than any layer has"),
        (pair(1, 1 << 15, 1 << 15), "a weight of 32768 x 32768, larger than any layer has"),
        (LOKR | {"lora_unet_x.lokr_w2": torch.ones(1 << 10, 1 << 10)} | SQUARE, "larger than any layer has"),
        (
            {
                "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": torch.ones(2, 4),
                "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight": torch.ones(13, 2),
            },
            "13 rows are not 3 equal parts",
        ),
        (
            {
                "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": torch.ones(2, 4),
                "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": torch.ones(7, 2),
            },
            "7 rows are not 2 equal parts",
        ),
        (GOOD | {"unet.conv_in.weight": torch.ones(2)}, "is not a LoRA key"),
        ({"vision.x.lora_A.weight": torch.ones(2, 2)}, "begins with none of"),
        ({"emb_params": torch.ones(2, 8)}, "it holds no LoRA layers"),
        ({}, "holds no LoRA layers"),
    ],
)
@pytest.mark.shows("Files")
def test_bad_contents_are_named(tmp_path, tensors, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(RefusedFileError, match=f"bad.safetensors.*{message}"):
        read_expert(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "is not a JSON object"),
        (json.dumps({"unet.lora_alpha": "8"}), "an alpha that is not a finite number"),
        (json.dumps({"unet.alpha_pattern": {"a": 1e300}}), "an alpha that is not a finite number"),
        (json.dumps({"unet.alpha_pattern": [1]}), "an alpha that is not a finite number"),
        (json.dumps({"unet.use_dora": True}), "says DoRA, and it has no magnitudes"),
    ],
)
def test_a_config_that_scales_hang_on_must_be_right(tmp_path, metadata, message):
    save_file(GOOD, tmp_path / "bad.safetensors", {"lora_adapter_metadata": metadata})
    with pytest.raises(RefusedFileError, match=f"bad.safetensors.*{message}"):
        read_expert(tmp_path / "bad.safetensors")


def test_layers_that_are_not_finite_can_be_dropped(tmp_path):
    bad = {k.replace("attn1", "attn2"): torch.full_like(v, torch.nan) for k, v in GOOD.items()}
    save_file(GOOD | bad, tmp_path / "x.safetensors")
    expert = read_expert(tmp_path / "x.safetensors", drop_nonfinite=True)
    assert list(expert.layers["unet"]) == [KEY.removeprefix("unet.")]
    assert expert.notes.left_out == {KEY.replace("attn1", "attn2"): "its down holds NaN or infinite values"}
    save_file(bad, tmp_path / "x.safetensors")
    with pytest.raises(RefusedFileError, match="it holds no LoRA layers"):
        read_expert(tmp_path / "x.safetensors", drop_nonfinite=True)


def test_a_pickle_is_never_read_whatever_its_name(tmp_path):
    torch.save(GOOD, tmp_path / "x.safetensors")
    with pytest.raises(RefusedFileError, match="is a zip archive"):
        read_expert(tmp_path / "x.safetensors")


@pytest.mark.shows("Files")
def test_layers_the_host_lacks_are_reported_and_a_stranger_is_refused(pipe, loras, tmp_path):
    extra = load_file(loras["fox"]) | {k.replace("mid_block", "down_blocks.7"): v for k, v in GOOD.items()}
    save_file(extra, tmp_path / "extra.safetensors")
    with pytest.warns(UserWarning, match="'extra': the pipeline lacks 1 of its layers, 'unet.down_blocks_7"):
        mixture = mole.attach(pipe, {"extra": tmp_path / "extra.safetensors"})
    assert mixture.unmatched["extra"] == ("unet.down_blocks_7_attentions_0_transformer_blocks_0_attn1_to_q",)
    save_file({k.replace("mid_block", "down_blocks.7"): v for k, v in GOOD.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="none of its 1 layers is in this pipeline"):
        mole.attach(pipe, {"other": tmp_path / "other.safetensors"})


def test_linear_files_fit_one_by_one_convolutions(pipe, loras, draw, tmp_path):
    tensors = {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) else v for k, v in load_file(loras["hat"]).items()}
    squeezed = {k: v for k, v in tensors.items() if "proj_" in k}
    whole = {k: v for k, v in load_file(loras["hat"]).items() if "proj_" in k}
    save_file(squeezed, tmp_path / "linear.safetensors")
    save_file(whole, tmp_path / "conv.safetensors")
    mole.attach(pipe, {"x": tmp_path / "linear.safetensors"})
    image = draw(pipe)
    mole.attach(pipe, {"x": tmp_path / "conv.safetensors"})
    assert torch.equal(draw(pipe), image)


def test_tiny_lora_is_what_diffusers_loads(pipe, tmp_path, draw):
    base = draw(pipe)
    pipe.load_lora_weights(tiny_lora(pipe, tmp_path / "t.safetensors"))
    assert not torch.allclose(draw(pipe), base, atol=1e-2)


@pytest.mark.shows("Files")
def test_a_small_file_cannot_ask_for_all_memory(tmp_path, monkeypatch):
    """Each layer alone is allowed; together they are not."""
    monkeypatch.setattr(algorithms, "MAX_MADE", 1 << 23)
    factor = {f"lora_unet_down_blocks_0_attentions_{i}_proj_in.lokr_w{j}": torch.eye(32) for i in range(9) for j in (1, 2)}
    save_file(dict(list(factor.items())[:6]), path := tmp_path / "three.safetensors")
    assert read_expert(path, tolerance=0).ranks == (1024, 1024)
    save_file(factor, path := tmp_path / "nine.safetensors")
    with pytest.raises(RefusedFileError, match="with the file's other LoHa and LoKr layers it becomes 10485760 numbers"):
        read_expert(path, tolerance=0)


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(FileNotFoundError, match=r", a folder; give a file in it: a\.safetensors$"):
        read_expert(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no LoRA file at gone\.safetensors$"):
        read_expert("gone.safetensors")
    with pytest.raises(FileNotFoundError, match="no LoRA file at owner/name: .* hub has to be downloaded first"):
        read_expert("owner/name")
