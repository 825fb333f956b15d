"""Every tool's files give the layers and the changes of weight that are computed here by hand, or by diffusers."""

import json

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from safetensors.torch import save_file

from mole_diffusers.lora import match, read_expert, stated_base, summarize

BLOCK = "down_blocks_0_attentions_0_transformer_blocks_0"


@pytest.fixture
def read(tmp_path):
    """read(tensors, metadata, **options) -> Expert"""

    def run(tensors, metadata=None, **options):
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, tmp_path / "x.safetensors", metadata)
        return read_expert(tmp_path / "x.safetensors", **options)

    return run


def random(*shape, seed=[0]):  # noqa: B006
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0]))


def kohya(stem, cout, cin, *, rank=2, alpha=1.0, taps=()):
    """One layer in kohya keys, and its change of weight."""
    down, up = random(rank, cin, *taps), random(cout, rank, *(1,) * len(taps))
    delta = alpha / rank * torch.einsum("or,r...->o...", up.flatten(1), down)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(alpha)}, delta


def only(expert):
    """The one layer of an expert."""
    ((_, layers),) = expert.layers.items()
    ((_, weights),) = layers.items()
    return weights


# ---- original UNet names

SGM = {  # as the original UNet numbers its modules, SD 1.x; SDXL is the same with fewer blocks
    "input_blocks_0_0": "conv_in",
    "input_blocks_1_0_in_layers_2": "down_blocks_0_resnets_0_conv1",
    "input_blocks_1_1_proj_in": "down_blocks_0_attentions_0_proj_in",
    "input_blocks_2_1_transformer_blocks_0_ff_net_0_proj": "down_blocks_0_attentions_1_transformer_blocks_0_ff_net_0_proj",
    "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
    "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
    "input_blocks_8_1_transformer_blocks_9_attn2_to_out_0": "down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_out_0",
    "input_blocks_11_0_out_layers_3": "down_blocks_3_resnets_1_conv2",
    "middle_block_0_emb_layers_1": "mid_block_resnets_0_time_emb_proj",
    "middle_block_1_proj_out": "mid_block_attentions_0_proj_out",
    "middle_block_2_in_layers_2": "mid_block_resnets_1_conv1",
    "output_blocks_0_0_out_layers_3": "up_blocks_0_resnets_0_conv2",
    "output_blocks_2_1_conv": "up_blocks_0_upsamplers_0_conv",
    "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
    "output_blocks_8_1_transformer_blocks_0_attn1_to_q": "up_blocks_2_attentions_2_transformer_blocks_0_attn1_to_q",
    "output_blocks_11_0_skip_connection": "up_blocks_3_resnets_2_conv_shortcut",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "out_2": "conv_out",
}


@pytest.mark.parametrize("prefix", ["lora_unet_", "unet.", "diffusion_model."])
@pytest.mark.shows("original UNet names")
def test_sgm_names_become_diffusers_names(read, prefix):
    parts = {old: kohya(prefix + old, 4, 4) for old in SGM}
    expert = read({k: v for tensors, _ in parts.values() for k, v in tensors.items()})
    assert expert.format == {"lora_unet_": "kohya", "unet.": "omi", "diffusion_model.": "comfy"}[prefix]
    assert set(expert.layers["unet"]) == set(SGM.values())
    for old, (_, delta) in parts.items():
        torch.testing.assert_close(expert.layers["unet"][SGM[old]].delta(), delta)


@pytest.mark.shows("original UNet names")
def test_sgm_names_are_those_that_diffusers_finds(read):
    """All attention layers of SDXL, by diffusers' own conversion."""
    blocks = {"input": (4, 5, 7, 8), "middle": (None,), "output": (0, 1, 2, 3, 4, 5)}
    stems = [
        f"lora_unet_{way}_block{'' if n is None else f's_{n}'}_1_transformer_blocks_{depth}_{leaf}"
        for way, numbers in blocks.items()
        for n in numbers
        for depth in (0, 1)
        for leaf in ("attn1_to_q", "attn2_to_out_0", "ff_net_2")
    ]
    tensors = {k: v for stem in stems for k, v in kohya(stem, 4, 4)[0].items()}

    class Config:
        layers_per_block = 2

    theirs, _ = _convert_non_diffusers_lora_to_diffusers(_maybe_map_sgm_blocks_to_diffusers(dict(tensors), Config))
    save = {k: v for k, v in theirs.items() if not k.endswith("alpha")}
    ours = read(tensors).layers["unet"]
    assert len(ours) == len(stems)
    assert set(ours) == set(read(save).layers["unet"])


# ---- Flux and SD 3

FLUX = {
    "double_blocks_0_img_attn_proj": "transformer_blocks_0_attn_to_out_0",
    "double_blocks_0_img_mlp_0": "transformer_blocks_0_ff_net_0_proj",
    "double_blocks_0_img_mlp_2": "transformer_blocks_0_ff_net_2",
    "double_blocks_0_img_mod_lin": "transformer_blocks_0_norm1_linear",
    "double_blocks_0_txt_attn_proj": "transformer_blocks_0_attn_to_add_out",
    "double_blocks_0_txt_mlp_2": "transformer_blocks_0_ff_context_net_2",
    "double_blocks_0_txt_mod_lin": "transformer_blocks_0_norm1_context_linear",
    "single_blocks_3_linear2": "single_transformer_blocks_3_proj_out",
    "single_blocks_3_modulation_lin": "single_transformer_blocks_3_norm_linear",
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "final_layer_linear": "proj_out",
}


@pytest.mark.shows("kohya, Flux")
def test_flux_names_and_fused_matrices(read):
    whole = {old: kohya(f"lora_unet_{old}", 6 * 4, 4, alpha=i + 1.0) for i, old in enumerate(FLUX)}
    image, image_delta = kohya("lora_unet_double_blocks_0_img_attn_qkv", 12, 4)
    text, text_delta = kohya("lora_unet_double_blocks_0_txt_attn_qkv", 12, 4)
    single, single_delta = kohya("lora_unet_single_blocks_3_linear1", 12 + 16, 4)
    last, last_delta = kohya("lora_unet_final_layer_adaLN_modulation_1", 8, 4)
    t5, t5_delta = kohya("lora_te3_encoder_block_0_layer_0_SelfAttention_q", 4, 4)
    tensors = {k: v for one, _ in whole.values() for k, v in one.items()} | image | text | single | last | t5
    expert = read(tensors)
    layers = expert.layers["transformer"]
    assert (expert.format, expert.base) == ("kohya", "Flux")
    for old, (_, delta) in whole.items():
        torch.testing.assert_close(layers[FLUX[old]].delta(), delta)
    for names, delta in ((("to_q", "to_k", "to_v"), image_delta), (("add_q_proj", "add_k_proj", "add_v_proj"), text_delta)):
        for name, part in zip(names, delta.chunk(3), strict=True):
            torch.testing.assert_close(layers[f"transformer_blocks_0_attn_{name}"].delta(), part)
    names = ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp")
    for name, part in zip(names, single_delta.split([4, 4, 4, 16]), strict=True):
        torch.testing.assert_close(layers[f"single_transformer_blocks_3_{name}"].delta(), part)
    torch.testing.assert_close(layers["norm_out_linear"].delta(), torch.cat([last_delta[4:], last_delta[:4]]))
    torch.testing.assert_close(expert.layers["text_encoder_2"]["encoder_block_0_layer_0_SelfAttention_q"].delta(), t5_delta)


@pytest.mark.thorough
@pytest.mark.shows("kohya, Flux")
def test_flux_files_are_what_diffusers_makes_of_them(read):
    """At full width, since diffusers' conversion knows no other."""
    tensors = kohya("lora_unet_double_blocks_2_img_attn_qkv", 9216, 3072, alpha=2.0)[0]
    tensors |= kohya("lora_unet_double_blocks_2_txt_mlp_0", 12288, 3072, alpha=0.5)[0]
    tensors |= kohya("lora_unet_single_blocks_7_linear1", 21504, 3072)[0]
    ours = read(tensors).layers["transformer"]
    theirs = read(_convert_kohya_flux_lora_to_diffusers(dict(tensors))).layers["transformer"]
    assert set(ours) == set(theirs)
    x = random(3072, 1)
    for name, weights in ours.items():
        effects = [w.scale * (w.up @ (w.down @ x)) for w in (weights, theirs[name])]
        torch.testing.assert_close(*effects, rtol=1e-4, atol=1e-3)


def test_q_k_and_v_that_were_trained_apart_keep_their_own_ranks(read):
    tensors, _ = kohya("lora_unet_double_blocks_0_img_attn_qkv", 12, 4, rank=6)
    up = tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"]
    up.copy_(torch.block_diag(*(random(4, 2) for _ in range(3))))
    layers = read(tensors).layers["transformer"]
    assert {w.rank for w in layers.values()} == {2}
    delta = 1 / 6 * up @ tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"]
    torch.testing.assert_close(torch.cat([w.delta() for w in layers.values()]), delta)


SD3 = {
    "x_block_attn_proj": "attn_to_out_0",
    "context_block_attn_proj": "attn_to_add_out",
    "x_block_attn2_proj": "attn2_to_out_0",
    "x_block_mlp_fc1": "ff_net_0_proj",
    "context_block_mlp_fc2": "ff_context_net_2",
    "x_block_adaLN_modulation_1": "norm1_linear",
    "context_block_adaLN_modulation_1": "norm1_context_linear",
}


@pytest.mark.shows("kohya, SD 3")
def test_sd3_names_and_fused_matrices(read):
    whole = {old: kohya(f"lora_unet_joint_blocks_5_{old}", 24, 4) for old in SD3}
    last, last_delta = kohya("lora_unet_joint_blocks_6_context_block_adaLN_modulation_1", 8, 4)
    fused = {old: kohya(f"lora_unet_joint_blocks_5_{old}_qkv", 12, 4) for old in ("x_block_attn", "context_block_attn")}
    time, time_delta = kohya("lora_unet_t_embedder_mlp_2", 4, 4)
    text, text_delta = kohya("lora_unet_context_embedder", 4, 4)  # which diffusers calls the same
    expert = read({k: v for one, _ in [*whole.values(), *fused.values()] for k, v in one.items()} | last | time | text)
    assert list(expert.layers) == ["transformer"]
    layers = expert.layers["transformer"]
    for old, (_, delta) in whole.items():
        torch.testing.assert_close(layers[f"transformer_blocks_5_{SD3[old]}"].delta(), delta)
    for old, names in (("x_block_attn", "to_{}"), ("context_block_attn", "add_{}_proj")):
        for name, part in zip("qkv", fused[old][1].chunk(3), strict=True):
            torch.testing.assert_close(layers[f"transformer_blocks_5_attn_{names.format(name)}"].delta(), part)
    swapped = torch.cat([last_delta[4:], last_delta[:4]])
    torch.testing.assert_close(layers["transformer_blocks_6_norm1_context_linear"].delta(), swapped)
    torch.testing.assert_close(layers["time_text_embed_timestep_embedder_linear_2"].delta(), time_delta)
    torch.testing.assert_close(layers["context_embedder"].delta(), text_delta)


# ---- OneTrainer, OMI, ComfyUI

TOOLS = {
    "onetrainer": {
        "lora_transformer_transformer_blocks_0_attn_to_q": ("transformer", "transformer_blocks_0_attn_to_q"),
        "lora_transformer_single_transformer_blocks_1_proj_mlp": ("transformer", "single_transformer_blocks_1_proj_mlp"),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("text_encoder", "encoder_layers_0_mlp_fc1"),
    },
    "omi": {
        "unet.input_blocks.4.1.transformer_blocks.0.attn2.to_k": (
            "unet", "down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k",
        ),
        "clip_l.text_model.encoder.layers.3.self_attn.q_proj": ("text_encoder", "encoder_layers_3_self_attn_q_proj"),
        "clip_g.text_projection": ("text_encoder_2", "text_projection"),
    },
    "omi flux": {
        "transformer.double_blocks.0.img_attn.qkv.1": ("transformer", "transformer_blocks_0_attn_to_k"),
        "transformer.single_blocks.2.linear1.3": ("transformer", "single_transformer_blocks_2_proj_mlp"),
        "transformer.img_in.proj": ("transformer", "x_embedder"),
        "t5.encoder.block.0.layer.0.SelfAttention.q": ("text_encoder_2", "encoder_block_0_layer_0_SelfAttention_q"),
    },
    "comfy": {
        "diffusion_model.context_embedder": ("transformer", "context_embedder"),
        "diffusion_model.double_blocks.0.txt_attn.proj": ("transformer", "transformer_blocks_0_attn_to_add_out"),
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc2": ("text_encoder", "encoder_layers_0_mlp_fc2"),
    },
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.shows(
    "A1111",
    "OneTrainer, OMI, ComfyUI",
)
def test_other_tools(read, tool):
    made = {stem: kohya(stem, 4, 4) for stem in TOOLS[tool]}
    tensors = {k: v for one, _ in made.values() for k, v in one.items()}
    embeddings = {"zwx.string_to_param.*": torch.ones(1, 4), "zw.x.clip_g": torch.ones(3), "zwx.t5": torch.ones(1, 4)}
    embeddings["nan.clip_l"] = torch.full((1, 4), torch.nan)
    expert = read(tensors | {f"bundle_emb.{name}": vectors for name, vectors in embeddings.items()})
    assert expert.format == tool.split()[0]
    assert expert.notes.left_out == {
        "bundle_emb.zwx.t5": "an embedding for a text encoder that takes no new words",
        "bundle_emb.nan.clip_l": "an embedding that is no list of vectors of finite numbers",
    }
    shapes = {word: {part: v.shape for part, v in parts.items()} for word, parts in expert.embeddings.items()}
    assert shapes == {"zwx": {"text_encoder": (1, 4)}, "zw.x": {"text_encoder_2": (1, 3)}}
    assert set(expert.triggers) == {"zwx", "zw.x"}
    for stem, (part, layer) in TOOLS[tool].items():
        torch.testing.assert_close(expert.layers[part][layer].delta(), made[stem][1])


# ---- algorithms


@pytest.mark.shows("LoCon")
def test_locon_with_and_without_a_core(read):
    plain, plain_delta = kohya("lora_unet_conv_in", 6, 4, taps=(3, 3))
    down, core, up = random(2, 4, 1, 1), random(3, 2, 3, 3), random(6, 3, 1, 1)
    stem = "lora_unet_conv_out"
    tensors = {f"{stem}.lora_down.weight": down, f"{stem}.lora_mid.weight": core, f"{stem}.lora_up.weight": up}
    expert = read(plain | tensors | {f"{stem}.alpha": torch.tensor(6.0)})
    assert expert.notes.algorithms == {"LoCon": 2}
    torch.testing.assert_close(expert.layers["unet"]["conv_in"].delta(), plain_delta)
    expected = 6 / 3 * torch.einsum("or,rskl,si->oikl", up[:, :, 0, 0], core, down[:, :, 0, 0])
    torch.testing.assert_close(expert.layers["unet"]["conv_out"].delta(), expected)


def loha(kind):
    """(tensors, delta W) of a LoHa layer."""
    a1, a2 = random(6, 2), random(6, 3)
    b1, b2 = (random(2, 5), random(3, 5)) if kind == "linear" else (random(2, 36), random(3, 36))
    if kind != "core":
        tensors = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        return tensors, (a1 @ b1) * (a2 @ b2)
    t1, t2, b1, b2 = random(2, 2, 3, 3), random(3, 3, 3, 3), random(2, 4), random(3, 4)
    tensors = {"hada_t1": t1, "hada_w1_a": a1.T, "hada_w1_b": b1, "hada_t2": t2, "hada_w2_a": a2.T, "hada_w2_b": b2}
    rebuilt = [torch.einsum("ijkl,jr,pi->prkl", t, b, a) for t, b, a in ((t1, b1, a1), (t2, b2, a2))]
    return tensors, rebuilt[0] * rebuilt[1]


@pytest.mark.parametrize("kind", ["linear", "flattened", "core"])
@pytest.mark.shows("LoHa")
def test_loha_is_exact(read, kind):
    tensors, delta = loha(kind)
    stem = {"linear": f"lora_unet_{BLOCK}_attn1_to_q"}.get(kind, "lora_unet_conv_in")
    expert = read({f"{stem}.{k}": v for k, v in tensors.items()} | {f"{stem}.alpha": torch.tensor(4.0)}, tolerance=0)
    assert expert.notes.algorithms == {"LoHa": 1}
    torch.testing.assert_close(only(expert).delta(), 4 / 2 * delta, rtol=1e-4, atol=1e-5)


def lokr(kind):
    """(tensors, delta W / scale, the rank that alpha is over) of a LoKr layer: 6 x 8, or a 6 x 8 x 3 x 3 convolution."""
    w1, w2 = random(2, 4), random(3, 2)
    if kind == "whole":
        return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1, w2), None
    if kind == "factors":
        parts = {"lokr_w1_a": random(2, 1), "lokr_w1_b": random(1, 4), "lokr_w2_a": random(3, 1), "lokr_w2_b": random(1, 2)}
        return parts, torch.kron(*(parts[f"lokr_w{i}_a"] @ parts[f"lokr_w{i}_b"] for i in (1, 2))), 1
    if kind == "convolution":
        w2 = random(3, 2, 3, 3)
        return {"lokr_w1": w1, "lokr_w2": w2}, torch.kron(w1[:, :, None, None], w2), None
    core, a, b = random(2, 2, 3, 3), random(2, 3), random(2, 2)
    w2 = torch.einsum("ijkl,ip,jr->prkl", core, a, b).contiguous()
    return {"lokr_w1": w1, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}, torch.kron(w1[:, :, None, None], w2), 2


@pytest.mark.parametrize("kind", ["whole", "factors", "convolution", "core"])
@pytest.mark.shows(
    "LoKr",
)
def test_lokr_is_exact(read, kind):
    tensors, delta, rank = lokr(kind)
    tensors = {f"lora_unet_conv_in.{k}": v for k, v in tensors.items()} | {"lora_unet_conv_in.alpha": torch.tensor(3.0)}
    expert = read(tensors, tolerance=0)
    assert expert.notes.algorithms == {"LoKr": 1}
    torch.testing.assert_close(only(expert).delta(), (3 / rank if rank else 1) * delta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tolerance", [0.02, 0.3])
@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr"])
@pytest.mark.shows("LoHa", "LoKr")
def test_a_cut_layer_states_the_error_it_has(read, algorithm, tolerance):
    if algorithm == "LoHa":
        falling = [random(40, 6) * 0.5 ** torch.arange(6) for _ in range(2)]
        tensors = {"hada_w1_a": falling[0], "hada_w1_b": random(6, 50), "hada_w2_a": falling[1], "hada_w2_b": random(6, 50)}
        delta = (falling[0] @ tensors["hada_w1_b"]) * (falling[1] @ tensors["hada_w2_b"])
    else:
        tensors = {"lokr_w1": random(4, 4), "lokr_w2": random(10, 10)}
        delta = torch.kron(*tensors.values())
    whole = only(read({f"lora_unet_conv_in.{k}": v for k, v in tensors.items()}, tolerance=0))
    cut = only(read({f"lora_unet_conv_in.{k}": v for k, v in tensors.items()}, tolerance=tolerance))
    measured = ((cut.delta() - delta).norm() / delta.norm()).item()
    assert cut.rank < whole.rank
    assert 0 < cut.error <= tolerance
    assert measured == pytest.approx(cut.error, rel=1e-2)


def test_a_convolution_without_taps_fits_its_host(pipe, loras, draw, tmp_path):
    import mole_diffusers as mole

    conv = pipe.unet.conv_in
    tensors = {f"lora_unet_conv_in.hada_w{i}_{h}": random(*s) for i in (1, 2) for h, s in (("a", (8, 2)), ("b", (2, 36)))}
    save_file(tensors, tmp_path / "x.safetensors")
    mole.attach(pipe, {"x": read_expert(tmp_path / "x.safetensors", tolerance=0)})
    attached = draw(pipe)
    mole.detach(pipe)
    w = list(tensors.values())
    with torch.no_grad():
        conv.weight += ((w[0] @ w[1]) * (w[2] @ w[3])).reshape(conv.weight.shape)
    torch.testing.assert_close(attached, draw(pipe), atol=1e-4, rtol=0)


# ---- storage, parts, scales


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.shows("fp64, bf16, fp16, fp8")
def test_storage(read, dtype):
    tensors, _ = kohya(f"lora_unet_{BLOCK}_attn1_to_q", 8, 4)
    stored = {k: v.to(dtype) for k, v in tensors.items()}
    up, down = (stored[f"lora_unet_{BLOCK}_attn1_to_q.lora_{half}.weight"].float() for half in ("up", "down"))
    torch.testing.assert_close(only(read(stored)).delta(), 0.5 * up @ down)


@pytest.mark.shows("ranks and alphas")
def test_ranks_and_alphas_that_differ(read):
    made = {}
    for i, leaf in enumerate(("attn1_to_q", "attn1_to_k", "attn2_to_v", "ff_net_2")):
        made[f"{BLOCK}_{leaf}"] = kohya(f"lora_unet_{BLOCK}_{leaf}", 8, 4, rank=i + 1, alpha=2.0**-i)
    expert = read({k: v for tensors, _ in made.values() for k, v in tensors.items()})
    assert expert.ranks == (1, 4)
    for layer, (_, delta) in made.items():
        torch.testing.assert_close(expert.layers["unet"][layer].delta(), delta)


@pytest.mark.parametrize(
    "parts", [("lora_te_text_model_",), ("lora_unet_",), ("lora_te1_text_model_", "lora_te2_text_model_")]
)
@pytest.mark.shows("some parts only")
def test_files_of_some_parts_only(read, parts):
    """The text encoder's without out_proj, as early kohya files are."""
    leaves = {"u": [f"{BLOCK}_attn1_to_q"], "t": [f"encoder_layers_0_self_attn_{x}_proj" for x in "qkv"]}
    made = {part + leaf: kohya(part + leaf, 4, 4) for part in parts for leaf in leaves[part[5]]}
    expert = read({k: v for tensors, _ in made.values() for k, v in tensors.items()})
    names = {"lora_te_text_model_": "text_encoder", "lora_te1_text_model_": "text_encoder", "lora_unet_": "unet"}
    assert set(expert.layers) == {names.get(part, "text_encoder_2") for part in parts}
    for part in parts:
        for leaf in leaves[part[5]]:
            weights = expert.layers[names.get(part, "text_encoder_2")][leaf]
            torch.testing.assert_close(weights.delta(), made[part + leaf][1])


@pytest.mark.shows("rsLoRA")
def test_rslora_by_metadata(read):
    stem = "unet.mid_block.attentions.0.proj_in"
    down, up = random(4, 6), random(6, 4)
    config = {"unet.r": 4, "unet.lora_alpha": 8, "unet.use_rslora": True}
    tensors = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    expert = read(tensors, {"lora_adapter_metadata": json.dumps(config)})
    torch.testing.assert_close(only(expert).delta(), 8 / 4**0.5 * up @ down)
    torch.testing.assert_close(only(read(tensors)).delta(), up @ down)


# ---- families and metadata


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, "SDXL"),
        ({"modelspec.architecture": "stable-diffusion-v1/lora", "ss_base_model_version": "sdxl_base_v1-0"}, "SD 1.x"),
        ({"ss_base_model_version": "sd_v2_v"}, "SD 2.x"),
        ({"ss_base_model_version": "sd3"}, "SD 3"),
        ({"ss_base_model_version": "flux1"}, "Flux"),
        ({"ss_v2": "True"}, "SD 2.x"),
        ({"ss_v2": "False"}, None),
        ({}, None),
    ],
)
def test_family_by_metadata_where_shapes_do_not_tell(read, metadata, family):
    tensors, _ = kohya("lora_te_text_model_encoder_layers_0_mlp_fc1", 8, 4)
    assert stated_base(metadata) == family
    assert read(tensors, metadata).base == (family or "unknown")


@pytest.mark.shows("Files")
def test_another_family_is_refused_before_anything_else(read):
    unet = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1, cross_attention_dim=768, attention_head_dim=2, norm_num_groups=2,
    )  # fmt: skip
    by_shape = read(kohya(f"lora_unet_{BLOCK}_attn2_to_k", 8, 2048)[0])
    by_word = read(kohya(f"lora_unet_{BLOCK}_attn1_to_q", 8, 8)[0], {"ss_base_model_version": "sdxl_base_v1-0"})
    for expert in (by_shape, by_word):
        with pytest.raises(
            ValueError, match=r"'x' \(.*x.safetensors, SDXL\): it is made for SDXL and this pipeline is SD 1.x"
        ):
            match(expert, {"unet": unet})
    right = read(kohya(f"lora_unet_{BLOCK}_attn2_to_k", 8, 768)[0], {"ss_base_model_version": "sdxl_base_v1-0"})
    assert right.base == "SD 1.x"  # shapes before words
    assert not match(right, {"unet": unet}).unmatched


@pytest.mark.shows("A1111")
def test_what_the_header_and_the_note_beside_say(read, tmp_path):
    header = {
        "modelspec.title": "Fox", "ss_output_name": "fox-v2", "modelspec.license": "CC0", "ss_clip_skip": "None",
        "ss_training_comment": "three epochs", "modelspec.trigger_phrase": "zwx fox", "someone.else": "kept",
    }  # fmt: skip
    tensors, _ = kohya(f"lora_unet_{BLOCK}_attn1_to_q", 8, 4)
    expert = read(tensors, header)
    assert summarize(expert.metadata) == {"title": "Fox", "description": "three epochs", "license": "CC0"}
    assert expert.triggers == ("zwx fox",)
    assert expert.metadata == header
    (tmp_path / "x.json").write_text(json.dumps({"activation text": "fox, red", "notes": ""}))
    assert read(tensors, header).triggers == ("fox", "red")
    (tmp_path / "x.json").write_text(json.dumps({"activation text": r"<lora:x:0@0,1@1> miku \(vocaloid\), <sks>"}))
    assert read(tensors, header).triggers == (r"miku \(vocaloid\)", "<sks>")
    (tmp_path / "x.json").write_text(json.dumps({"activation text": "<lora:x:1>"}))
    assert read(tensors, header).triggers == ("zwx fox",)
    (tmp_path / "x.json").write_text("[broken")
    assert read(tensors, header).triggers == ("zwx fox",)
