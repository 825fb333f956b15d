"""Parse keys of LoRA files: component, layer, and the tensor's role in that layer."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mole_diffusers.lora.expert import COMPONENTS
from mole_diffusers.lora.original_names import is_original_transformer, unet_name

KOHYA_PREFIXES = {
    "lora_unet_": "unet",
    "lora_te_": "text_encoder",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
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
        "single_stream_blocks_", "text_fusion_", "txtfusion_",
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
