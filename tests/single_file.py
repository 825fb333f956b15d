"""A diffusers pipeline of the Stable Diffusion 1.5, 2.1 or XL kind as one checkpoint file, named as the original code names
things."""

import torch
from safetensors.torch import save_file

RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0"}
RESNET |= {"conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {"conv_in": "input_blocks.0.0", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
ENDS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}
ENDS |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
CLIP = "cond_stage_model.transformer.text_model."
OPEN_CLIP = "cond_stage_model.model."
CLIP_XL, OPEN_CLIP_XL = "conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model."
OPEN_CLIP_LAYER = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
OPEN_CLIP_LAYER |= {"self_attn.out_proj": "attn.out_proj"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipe, path):
    """Write the weights of `pipe` to `path`. Text encoders with gelu are OpenCLIP's, as in 2.1 and XL."""
    parts = {"model.diffusion_model.": _unet(pipe.unet), "first_stage_model.": _vae(pipe.vae)}
    if hasattr(pipe, "text_encoder_2"):
        parts |= {CLIP_XL: _clip(pipe.text_encoder), OPEN_CLIP_XL: _open_clip(pipe.text_encoder_2)}
    elif pipe.text_encoder.config.hidden_act == "gelu":
        parts[OPEN_CLIP] = _open_clip(pipe.text_encoder)
    else:
        parts[CLIP] = _clip(pipe.text_encoder)
    named = {prefix + key: weight.contiguous() for prefix, weights in parts.items() for key, weight in weights.items()}
    save_file(named, path, {"format": "pt"})
    return path


def _clip(encoder):
    return {key.removeprefix("text_model."): weight for key, weight in encoder.state_dict().items()}


def _open_clip(encoder):
    """q, k and v are one matrix, and the projection is turned."""
    weights = _clip(encoder)
    found = {
        "positional_embedding": weights["embeddings.position_embedding.weight"],
        "token_embedding.weight": weights["embeddings.token_embedding.weight"],
        "ln_final.weight": weights["final_layer_norm.weight"],
        "ln_final.bias": weights["final_layer_norm.bias"],
    }
    if "text_projection.weight" in weights:
        found["text_projection"] = weights["text_projection.weight"].T
    for i in range(encoder.config.num_hidden_layers):
        old, new = f"encoder.layers.{i}.", f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            found |= {f"{new}{to}.{kind}": weights[f"{old}{name}.{kind}"] for name, to in OPEN_CLIP_LAYER.items()}
            found[f"{new}attn.in_proj_{kind}"] = torch.cat([weights[f"{old}self_attn.{x}_proj.{kind}"] for x in "qkv"])
    return found


def _renamed(model, places):
    """The weights of a model; `places` maps how a module's name begins to how it begins in the file."""
    found = {}
    for key, weight in model.state_dict().items():
        start = max((p for p in places if key.startswith(f"{p}.")), key=len)
        found[places[start] + key.removeprefix(start)] = weight
    return found


def save_controlnet(net, path):
    """Write a ControlNet with four widths of what reads its map, as the original code names things."""
    places = {"controlnet_mid_block": "middle_block_out.0"} | _down(net)
    places |= {f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(len(net.controlnet_down_blocks))}
    layers = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    places |= {f"controlnet_cond_embedding.{name}": f"input_hint_block.{2 * i}" for i, name in enumerate(layers)}
    named = _renamed(net, _inside(places, "resnets", RESNET))
    save_file({f"control_model.{key}": weight.contiguous() for key, weight in named.items()}, path)
    return path


def _down(unet):
    """The places of the first half of a UNet and of its middle."""
    places, at = dict(ENDS), 1
    for b, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            places |= {f"down_blocks.{b}.resnets.{j}": f"input_blocks.{at}.0"}
            places |= {f"down_blocks.{b}.attentions.{j}": f"input_blocks.{at}.1"}
            at += 1
        if block.downsamplers:
            places[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
            at += 1
    middle = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
    return places | {f"mid_block.{name}": f"middle_block.{i}" for name, i in middle.items()}


def _unet(unet):
    places, at = _down(unet), 0
    for b, block in enumerate(unet.up_blocks):
        attends = hasattr(block, "attentions")
        for j in range(len(block.resnets)):
            places |= {f"up_blocks.{b}.resnets.{j}": f"output_blocks.{at}.0"}
            places |= {f"up_blocks.{b}.attentions.{j}": f"output_blocks.{at}.1"}
            at += 1
        if block.upsamplers:
            places[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{at - 1}.{1 + attends}.conv"
    return _renamed(unet, _inside(places, "resnets", RESNET))


def _vae(vae):
    places = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        places |= {f"{half}.{name}": f"{half}.{name}" for name in ("conv_in", "conv_out")}
        places |= {f"{half}.conv_norm_out": f"{half}.norm_out"}
        middle = {"resnets.0": "block_1", "resnets.1": "block_2"}
        places |= {f"{half}.mid_block.{name}": f"{half}.mid.{to}" for name, to in middle.items()}
        places |= {f"{half}.mid_block.attentions.0.{a}": f"{half}.mid.attn_1.{b}" for a, b in VAE_ATTENTION.items()}
    sides = (
        ("encoder", "down", "downsample", vae.encoder.down_blocks),
        ("decoder", "up", "upsample", vae.decoder.up_blocks),
    )
    for half, side, sampler, blocks in sides:
        for b, block in enumerate(blocks):
            to = f"{half}.{side}.{b if side == 'down' else len(blocks) - 1 - b}"
            places |= {f"{half}.{side}_blocks.{b}.resnets.{j}": f"{to}.block.{j}" for j in range(len(block.resnets))}
            places |= {f"{half}.{side}_blocks.{b}.{sampler}rs.0.conv": f"{to}.{sampler}.conv"}
    return _renamed(vae, _inside(places, "resnets", {"conv_shortcut": "nin_shortcut"}))


def _inside(places, kind, names):
    """`places`, and those of the modules inside the ones of a kind."""
    inside = {f"{a}.{x}": f"{b}.{y}" for a, b in places.items() if f".{kind}." in a for x, y in names.items()}
    return places | inside


# ---- transformers: Stable Diffusion 3 and Flux

EMBEDDERS_SD3 = {"timestep_embedder": "t_embedder.mlp", "text_embedder": "y_embedder.mlp"}
EMBEDDERS_FLUX = {"timestep_embedder": "time_in", "text_embedder": "vector_in", "guidance_embedder": "guidance_in"}


def save_transformer_file(pipe, path):
    """Write the weights of a pipeline of Stable Diffusion 3 or Flux to `path`, with its text encoders, as ComfyUI's files
    have them. The projection of the first text encoder is not in it."""
    is_flux = hasattr(pipe.transformer, "single_transformer_blocks")
    clips = {"l": pipe.text_encoder, "g": None if is_flux else pipe.text_encoder_2}
    t5 = pipe.text_encoder_2 if is_flux else pipe.text_encoder_3
    parts = {"model.diffusion_model.": (_flux if is_flux else _sd3)(pipe.transformer), "first_stage_model.": _vae(pipe.vae)}
    for name, clip in clips.items():
        weights = {} if clip is None else clip.state_dict()
        has_model = any(key.startswith("text_model.") for key in weights)
        parts[f"text_encoders.clip_{name}.transformer."] = {
            key if has_model else f"text_model.{key}": weight
            for key, weight in weights.items()
            if name == "g" or "text_projection" not in key
        }
    if t5 is not None:
        weights = t5.state_dict()
        parts["text_encoders.t5xxl.transformer."] = {
            k: w for k, w in weights.items() if "embed_tokens" not in k
        }  # is "shared"
    named = {f"{part}{key}": weight.contiguous() for part, weights in parts.items() for key, weight in weights.items()}
    save_file(named, path, {"format": "pt"})
    return path


def _joined(weights, names):
    """q, k and v (and what follows) as one matrix."""
    return {kind: torch.cat([weights[f"{name}.{kind}"] for name in names]) for kind in ("weight", "bias")}


def _turned(weight):
    """The original code has the shift before the scale."""
    scale, shift = weight.chunk(2)
    return torch.cat([shift, scale])


def _layers(weights, places):
    return {
        f"{new}.{kind}": weights[f"{old}.{kind}"]
        for old, new in places.items()
        for kind in ("weight", "bias")
        if f"{old}.{kind}" in weights
    }


def _sd3(model):
    weights = model.state_dict()
    places = {"pos_embed.proj": "x_embedder.proj", "context_embedder": "context_embedder", "proj_out": "final_layer.linear"}
    for old, new in EMBEDDERS_SD3.items():
        places |= {f"time_text_embed.{old}.linear_{i + 1}": f"{new}.{2 * i}" for i in range(2)}
    found, last = {"pos_embed": weights["pos_embed.pos_embed"]}, model.config.num_layers - 1
    for i in range(last + 1):
        old, new = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        sides = {"x_block": ("to_{}", "to_out.0", "norm_{}", "ff", "norm1")}
        sides["context_block"] = ("add_{}_proj", "to_add_out", "norm_added_{}", "ff_context", "norm1_context")
        for side, (to, out, norm, feed, modulation) in sides.items():
            for each in ("attn", "attn2") if side == "x_block" else ("attn",):
                if f"{old}.{each}.{to.format('q')}.weight" not in weights:
                    continue
                joined = _joined(weights, [f"{old}.{each}.{to.format(x)}" for x in "qkv"])
                found |= {f"{new}.{side}.{each}.qkv.{kind}": weight for kind, weight in joined.items()}
                places[f"{old}.{each}.{out}"] = f"{new}.{side}.{each}.proj"
                places |= {f"{old}.{each}.{norm.format(x)}": f"{new}.{side}.{each}.ln_{x}" for x in "qk"}
            places |= {f"{old}.{feed}.net.0.proj": f"{new}.{side}.mlp.fc1", f"{old}.{feed}.net.2": f"{new}.{side}.mlp.fc2"}
            places[f"{old}.{modulation}.linear"] = f"{new}.{side}.adaLN_modulation.1"
    found |= _layers(weights, places)
    for kind in ("weight", "bias"):
        turned = {
            f"joint_blocks.{last}.context_block": f"transformer_blocks.{last}.norm1_context",
            "final_layer": "norm_out",
        }
        found |= {
            f"{new}.adaLN_modulation.1.{kind}": _turned(weights[f"{old}.linear.{kind}"]) for new, old in turned.items()
        }
    return found


def _flux(model):
    weights = model.state_dict()
    places = {"context_embedder": "txt_in", "x_embedder": "img_in", "proj_out": "final_layer.linear"}
    for old, new in EMBEDDERS_FLUX.items():
        places |= {f"time_text_embed.{old}.linear_{i}": f"{new}.{side}_layer" for i, side in ((1, "in"), (2, "out"))}
    found, scales = {}, {}
    for i in range(model.config.num_layers):
        old, new = f"transformer_blocks.{i}", f"double_blocks.{i}"
        sides = {"img": ("to_{}", "to_out.0", "norm_{}", "ff", "norm1")}
        sides["txt"] = ("add_{}_proj", "to_add_out", "norm_added_{}", "ff_context", "norm1_context")
        for side, (to, out, norm, feed, modulation) in sides.items():
            joined = _joined(weights, [f"{old}.attn.{to.format(x)}" for x in "qkv"])
            found |= {f"{new}.{side}_attn.qkv.{kind}": weight for kind, weight in joined.items()}
            places[f"{old}.attn.{out}"] = f"{new}.{side}_attn.proj"
            places |= {f"{old}.{feed}.net.0.proj": f"{new}.{side}_mlp.0", f"{old}.{feed}.net.2": f"{new}.{side}_mlp.2"}
            places[f"{old}.{modulation}.linear"] = f"{new}.{side}_mod.lin"
            scales |= {f"{old}.attn.{norm.format(x[0])}": f"{new}.{side}_attn.norm.{x}_norm" for x in ("query", "key")}
    for i in range(model.config.num_single_layers):
        old, new = f"single_transformer_blocks.{i}", f"single_blocks.{i}"
        joined = _joined(weights, [*(f"{old}.attn.to_{x}" for x in "qkv"), f"{old}.proj_mlp"])
        found |= {f"{new}.linear1.{kind}": weight for kind, weight in joined.items()}
        places |= {f"{old}.proj_out": f"{new}.linear2", f"{old}.norm.linear": f"{new}.modulation.lin"}
        scales |= {f"{old}.attn.norm_{x[0]}": f"{new}.norm.{x}_norm" for x in ("query", "key")}
    found |= _layers(weights, places) | {f"{new}.scale": weights[f"{old}.weight"] for old, new in scales.items()}
    return found | {
        f"final_layer.adaLN_modulation.1.{kind}": _turned(weights[f"norm_out.linear.{kind}"]) for kind in ("weight", "bias")
    }
