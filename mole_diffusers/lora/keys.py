"""Parse keys of LoRA files: component, layer, and the tensor's role in that layer.

Layers may have the names of the original Stable Diffusion, Flux or SD 3 code, which become diffusers' names, both with
underscores.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import torch

from mole_diffusers.lora.expert import COMPONENTS, LoraWeights

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te4_": "text_encoder_4",
}
ONETRAINER_PREFIX = "lora_transformer_"
PREFIXES = {  # how a key begins -> component, and the files' format; diffusers' and PEFT's have the components' names
    ONETRAINER_PREFIX: ("transformer", "onetrainer"),
    "lycoris_": ("unet", "kohya"),
    **{prefix: (component, "kohya") for prefix, component in KOHYA_PREFIXES.items()},
    "clip_l.": ("text_encoder", "omi"),
    "clip_g.": ("text_encoder_2", "omi"),
    "t5.": ("text_encoder_3", "omi"),
    "diffusion_model.": ("unet", "comfy"),
    "text_encoders.clip_l.transformer.": ("text_encoder", "comfy"),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", "comfy"),
    "text_encoders.t5xxl.transformer.": ("text_encoder_3", "comfy"),
}
LAYER_STARTS = {  # component -> how its layer keys begin
    "unet": ("down_blocks_", "mid_block_", "up_blocks_", "conv_in", "conv_out", "time_embedding_", "add_embedding_"),
    "transformer": (
        "transformer_blocks_", "single_transformer_blocks_", "x_embedder", "context_embedder", "time_text_embed_",
        "norm_out_", "proj_out", "pos_embed_", "img_in", "txt_in", "time_guidance_embed_", "blocks_", "layers_",
        "noise_refiner_", "context_refiner_", "double_blocks_", "single_blocks_", "joint_blocks_", "double_stream_blocks_",
        "single_stream_blocks_", "text_fusion_", "txtfusion_", "all_x_embedder_", "all_final_layer_", "cap_embedder_",
        "t_embedder_",
    ),
    "text_encoder": ("encoder_layers_",),
}  # fmt: skip
FLUX_BLOCKS = ("double_blocks_", "single_blocks_", "single_transformer_blocks_")
ROLES = {  # what a tensor is -> how its key ends
    "down": r"lora_A(?:\.\w+)?\.weight|lora_down\.weight|lora\.down\.weight|lora_linear_layer\.down\.weight",
    "up": r"lora_B(?:\.\w+)?\.weight|lora_up\.weight|lora\.up\.weight|lora_linear_layer\.up\.weight",
    "mid": r"lora_mid\.weight",
    "alpha": r"alpha",
    "dora_scale": r"dora_scale",
    "magnitude": r"lora_magnitude_vector(?:\.\w+)?(?:\.weight)?",
    "lycoris": r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2",  # the ending is its role
}
ROLE = re.compile("|".join(rf"(?:^|[._])(?P<{role}>{ends})$" for role, ends in ROLES.items()))
UNSUPPORTED = {  # how a key ends -> what it belongs to
    r"diff": "a full weight difference",
    r"diff_b|lora_B(?:\.\w+)?\.bias|lora_up\.bias": "a trained bias",
    r"w_norm|b_norm": "a trained normalisation",
    r"oft_\w+": "OFT",
    r"boft_\w+": "BOFT",
    r"on_input": "IA3",
    r"[ab][12]\.weight": "GLoRA",
    r"vera_\w+": "VeRA",
    r"lora_embedding_[AB](?:\.\w+)?": "a LoRA of an embedding",
    r"set_weight": "a replaced weight",
}
# The keys of XLabs' trainer for Flux, which names the stream of a block by a number; and the original names.
XLABS = re.compile(
    r"(?:diffusion_model\.)?(?P<block>(?P<kind>double|single)_blocks\.\d+)\.processor\.(?P<layer>qkv|proj)_lora(?P<stream>[12]?)"
    r"\.(?P<half>down|up)\.weight"
)
XLABS_STREAMS = {"1": "img_attn", "2": "txt_attn"}
# An embedding that was trained with a LoRA: of A1111 and OneTrainer with its word, of ai-toolkit without.
EMBEDDING = re.compile(r"bundle_emb\.(?P<word>.+?)\.(?P<of>string_to_param(?:\.\*)?|[^.]+)|(?P<bare>emb_params|clip_[lg])")
EMBEDDED_IN = {  # how a key of an embedding ends -> the text encoder
    "string_to_param": "text_encoder", "string_to_param.*": "text_encoder", "emb_params": "text_encoder",
    "clip_l": "text_encoder", "clip_g": "text_encoder_2",
}  # fmt: skip


@dataclass(frozen=True)
class Key:
    """A parsed key of a file."""

    component: str  # "unet", "text_encoder", ...
    layer: str  # the layer key. For a transformer it may be an original name, which may stand for several layers
    module: str  # the layer's name in the file, without the component: dotted in files of diffusers and PEFT
    role: str  # "down", "up", "mid", "alpha", "magnitude" (PEFT's), "dora_scale", or LyCORIS's own ("hada_w1_a", ...)
    format: str  # of the file, as in `Expert.format`


def parse_key(key: str) -> Key:
    """Parse one key. Raises ValueError saying what else the key is, and which keys are known."""
    if (found := XLABS.fullmatch(key)) and (found["kind"] == "double") == bool(found["stream"]):
        of_single = {"qkv": "qkv", "proj": "linear2"}[found["layer"]]
        layer = f"{XLABS_STREAMS[found['stream']]}.{found['layer']}" if found["stream"] else of_single
        return replace(parse_key(f"{found['block']}.{layer}.lora_{found['half']}.weight"), format="xlabs")
    if not (found := ROLE.search(key)):
        for end, what in UNSUPPORTED.items():
            if re.search(rf"(?:^|[._])(?:{end})$", key):
                raise ValueError(f"{key!r} is of {what}; LoRA, LoCon, LoHa, LoKr and DoRA are read")
        raise ValueError(f"{key!r} is not a LoRA key")
    role = found["lycoris"] or str(found.lastgroup)
    component, module, form = _located(key[: found.start()])
    layer = plain = layer_key(module)
    original = is_original_transformer(layer)
    # kohya and ComfyUI file a transformer under "unet" too, and call the layers of both as the original code did.
    if component == "unet" and (original or layer.startswith(LAYER_STARTS["transformer"])):
        component = "transformer"
    elif component == "unet":
        layer = unet_name(plain)
        if form and not layer.startswith(LAYER_STARTS["unet"]):
            component = "transformer"
    if not form and (original or layer != plain):
        form = "omi"
    elif not form:
        form = "peft" if found[0].strip("._").startswith(("lora_A", "lora_B")) else "diffusers"
    return Key(component, layer, module, role, form)


def _located(stem: str) -> tuple[str, str, str]:
    """A key without its role -> (component, module, format). The format is "" for diffusers and PEFT; the role decides."""
    for prefix, (component, form) in PREFIXES.items():
        if stem.startswith(prefix):
            return component, stem.removeprefix(prefix), form
    named, stem = stem, stem.removeprefix("base_model.model.")
    component, _, module = stem.partition(".")
    if component not in COMPONENTS:  # saved from a single model: the layer's name tells the component
        module, layer = stem, layer_key(stem)
        other = "transformer" if named != stem else ""  # PEFT's own files may be of any transformer
        component = next((c for c, starts in LAYER_STARTS.items() if layer.startswith(starts)), other)
    if not component:
        raise ValueError(f"{stem!r} begins with none of {[*(f'{c}.' for c in COMPONENTS), *PREFIXES]}")
    if ".processor." in module:  # old diffusers files name the attention processor, and to_out_lora for to_out.0
        module = re.sub(r"\.to_out$", ".to_out.0", module.replace(".processor.", "."))
    return component, module, ""


def layer_key(module_name: str) -> str:
    """The layer key for a module's dotted name in the model."""
    # CLIPTextModel lost its `text_model` level in transformers 5.6; files exist in both forms.
    return module_name.replace(".", "_").removeprefix("text_model_")


# ---- names of the original UNet ("sgm" names; SD 1.x, SD 2.x, SDXL), which numbers its blocks consecutively. Each of
# diffusers' blocks is two resnets and a downsampler going down, and three resnets with the upsampler in the last going up.

PER_BLOCK = 3
UNET_OUTSIDE_BLOCKS = {
    "input_blocks_0_0": "conv_in",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "out_2": "conv_out",
}
RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
MIDDLE = {"0": "mid_block_resnets_0", "1": "mid_block_attentions_0", "2": "mid_block_resnets_1"}
MIDDLE_BLOCK = re.compile(r"middle_block_([012])_(\w+)$")
NUMBERED_BLOCK = re.compile(r"(?P<way>input|output)_blocks_(?P<block>\d{1,2})_(?P<inner>\d)_(?P<rest>\w+)$")


def unet_name(layer: str) -> str:
    """The diffusers name of an original UNet layer; any other name unchanged."""
    if layer in UNET_OUTSIDE_BLOCKS:
        return UNET_OUTSIDE_BLOCKS[layer]
    if found := MIDDLE_BLOCK.match(layer):
        return f"{MIDDLE[found[1]]}_{RESNET.get(found[2], found[2])}"
    if not (found := NUMBERED_BLOCK.match(layer)):
        return layer
    down, rest = found["way"] == "input", found["rest"]
    block, index = divmod(int(found["block"]) - (1 if down else 0), PER_BLOCK)
    if down and rest == "op":
        return f"down_blocks_{block}_downsamplers_0_conv"
    if not down and rest == "conv":  # after the attention if there is one, else in its place
        return f"up_blocks_{block}_upsamplers_0_conv"
    inner = "resnets" if found["inner"] == "0" else "attentions"
    return f"{'down' if down else 'up'}_blocks_{block}_{inner}_{index}_{RESNET.get(rest, rest)}"


# ---- names of the original transformers, which hold q, k and v (and the feed-forward of a single block) in one matrix

HAVE_ORIGINAL_NAMES = ("Flux", "Chroma", "SD 3")  # the families whose names these are
TRANSFORMER_OUTSIDE_BLOCKS = {
    "img_in": "x_embedder", "img_in_proj": "x_embedder", "txt_in": "context_embedder", "x_embedder_proj": "pos_embed_proj",
    "final_layer_linear": "proj_out",
    "t_embedder_mlp_0": "time_text_embed_timestep_embedder_linear_1",
    "t_embedder_mlp_2": "time_text_embed_timestep_embedder_linear_2",
    "y_embedder_mlp_0": "time_text_embed_text_embedder_linear_1",
    "y_embedder_mlp_2": "time_text_embed_text_embedder_linear_2",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
}  # fmt: skip


def _with_parts(layers: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Add each part of a fused matrix as a layer of its own, as in OMI files."""
    fused = {name: targets for name, targets in layers.items() if len(targets) > 1}
    return layers | {f"{name}_{i}": (target,) for name, targets in fused.items() for i, target in enumerate(targets)}


# the layers of a block with one stream, and of each stream of a block with two
SINGLE = _with_parts({
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"), "linear2": ("proj_out",),
    "modulation_lin": ("norm_linear",), "qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
})  # fmt: skip
IMAGE = _with_parts({
    "attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"), "attn_proj": ("attn_to_out_0",),
    "attn2_qkv": ("attn2_to_q", "attn2_to_k", "attn2_to_v"), "attn2_proj": ("attn2_to_out_0",),
    "mlp_0": ("ff_net_0_proj",), "mlp_2": ("ff_net_2",), "mod_lin": ("norm1_linear",),
})  # fmt: skip
TEXT = _with_parts({
    "attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"), "attn_proj": ("attn_to_add_out",),
    "mlp_0": ("ff_context_net_0_proj",), "mlp_2": ("ff_context_net_2",), "mod_lin": ("norm1_context_linear",),
})  # fmt: skip
OF_SD3 = {"mlp_fc1": "mlp_0", "mlp_fc2": "mlp_2", "adaLN_modulation_1": "mod_lin"}  # SD 3's names of the same layers
BLOCKS = {  # how the layers of a block begin -> what diffusers calls the block, and its layers
    r"single_blocks_(\d{1,3})_": ("single_transformer_blocks", SINGLE),
    r"double_blocks_(\d{1,3})_img_": ("transformer_blocks", IMAGE),
    r"double_blocks_(\d{1,3})_txt_": ("transformer_blocks", TEXT),
    r"joint_blocks_(\d{1,3})_x_block_": ("transformer_blocks", IMAGE),
    r"joint_blocks_(\d{1,3})_context_block_": ("transformer_blocks", TEXT),
}
LAST_NORM = "final_layer_adaLN_modulation_1"


def is_original_transformer(layer: str) -> bool:
    """Whether this is a layer name of an original transformer."""
    return _transformer_targets(layer)[0] != (layer,)


def split_fused(layer: str, weights: LoraWeights) -> dict[str, LoraWeights]:
    """A transformer layer of a file -> diffusers' layers: several for a fused matrix; other names are kept as they are."""
    targets, name = _transformer_targets(layer)
    rows, width, count = len(weights.up), weights.down.shape[1], len(targets)
    # The text stream of SD 3's last block has a last normalisation, too: two values per channel instead of six.
    is_last_norm = name == LAST_NORM or (name == "mod_lin" and rows == 2 * width)
    if count == 1 and not is_last_norm:
        return {targets[0]: weights}
    if name == "linear1":  # q, k and v are as wide as the input, and the feed-forward takes the remaining rows
        sizes, wanted = [width] * 3 + [rows - 3 * width], f"q, k, v of {width} and a feed-forward"
    else:
        count = 2 if is_last_norm else count
        sizes, wanted = [rows // count] * count, f"{count} equal parts"
    if min(sizes) <= 0 or sum(sizes) != rows:
        raise ValueError(f"{rows} rows are not {wanted}")
    parts = torch.arange(rows).split(sizes)
    if is_last_norm:  # diffusers has scale before shift there
        parts = (torch.cat(parts[::-1]),)
    return {target: weights.of_rows(part) for target, part in zip(targets, parts, strict=True)}


def _transformer_targets(layer: str) -> tuple[tuple[str, ...], str]:
    """diffusers' layer names, and the name in the original block."""
    if layer == LAST_NORM:
        return ("norm_out_linear",), layer
    for start, (block, layers) in BLOCKS.items():
        if found := re.match(start, layer):
            name = OF_SD3.get(layer[found.end() :], layer[found.end() :])
            if name in layers:
                return tuple(f"{block}_{found[1]}_{target}" for target in layers[name]), name
    return (TRANSFORMER_OUTSIDE_BLOCKS.get(layer, layer),), layer
