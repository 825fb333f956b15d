"""What a checkpoint does not hold: the configs of its models, its noise schedule and its tokenizers.

Sizes are read from the shapes of its tensors; the rest is that of its kind. CLIP's vocabulary comes with this package. T5's
is looked for in the program that the checkpoint belongs to.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    create_diffusers_clip_model_from_ldm,
    create_diffusers_t5_model_from_checkpoint,
)
from transformers import CLIPTokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

Shapes = Mapping[str, tuple[int, ...]]
PIPELINES = {  # diffusers' name for the kind of a checkpoint -> pipeline class
    "v1": "StableDiffusionPipeline",
    "v2": "StableDiffusionPipeline",
    "xl_base": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sd35_medium": "StableDiffusion3Pipeline",
    "sd35_large": "StableDiffusion3Pipeline",
    "flux-dev": "FluxPipeline",
    "flux-schnell": "FluxPipeline",
}
SIDES = {"v1": 64, "v2": 96}  # of the latents that a kind was trained with; of the others 128
HEAD, HEAD_OF_FLUX = 64, 128  # channels of an attention head; Stable Diffusion 1.x has eight heads everywhere instead
VAES = {  # pipeline class -> scale and shift of its latents
    "StableDiffusionPipeline": (0.18215, None),
    "StableDiffusionXLPipeline": (0.13025, None),
    "StableDiffusion3Pipeline": (1.5305, 0.0609),
    "FluxPipeline": (0.3611, 0.1159),
}
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
LACKS = "it lacks the {}: take a checkpoint with text encoders and VAE inside, or put that file where your program has it"
MERGES = Path(__file__).with_name("clip_merges.txt.gz")
START, END = "<|startoftext|>", "<|endoftext|>"
T5_LENGTH = 512  # tokens
T5_FILES = ("tokenizer.json", "spiece.model")
T5_PLACES = (  # of T5's tokenizer: in ComfyUI, in the ComfyUI of SwarmUI, in Forge
    "comfy/text_encoders/t5_tokenizer",
    "dlbackend/*/comfy/text_encoders/t5_tokenizer",
    "dlbackend/*/ComfyUI/comfy/text_encoders/t5_tokenizer",
    "backend/huggingface/*/*/tokenizer_[23]",
)


class TextEncoder(NamedTuple):
    """A text encoder of a kind of checkpoint: its class, where its tensors are, and its activation (T5 has its own)."""

    model: str
    keys: str
    activation: str = "quick_gelu"


CLIP, PROJECTED, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
CLIP_L = "text_encoders.clip_l.transformer.text_model."
T5_XXL = "text_encoders.t5xxl.transformer."
ENCODERS: dict[str, dict[str, TextEncoder]] = {
    "v1": {"text_encoder": TextEncoder(CLIP, "cond_stage_model.transformer.text_model.")},
    "v2": {"text_encoder": TextEncoder(CLIP, "cond_stage_model.model.", "gelu")},
    "xl_base": {
        "text_encoder": TextEncoder(CLIP, "conditioner.embedders.0.transformer.text_model."),
        "text_encoder_2": TextEncoder(PROJECTED, "conditioner.embedders.1.model.", "gelu"),
    },
    "sd3": {
        "text_encoder": TextEncoder(PROJECTED, CLIP_L),
        "text_encoder_2": TextEncoder(PROJECTED, "text_encoders.clip_g.transformer.text_model.", "gelu"),
        "text_encoder_3": TextEncoder(T5, T5_XXL),
    },
    "flux": {"text_encoder": TextEncoder(CLIP, CLIP_L), "text_encoder_2": TextEncoder(T5, T5_XXL)},
}


def configs(shapes: Shapes, kind: str) -> dict[str, dict[str, Any]]:
    """The configs of the models of a checkpoint with tensors of these shapes, by their names in the pipeline.

    Raises ValueError if a part is missing; SD 3 may lack T5.
    """
    if kind in ("v1", "v2", "xl_base"):
        network = {"unet": _unet(shapes, kind)}
    else:
        network = {"transformer": _sd3(shapes) if kind.startswith("sd3") else _flux(shapes)}
    read = encoders(shapes, kind).items()
    readers = {name: (_t5 if encoder.model == T5 else _clip)(shapes, encoder) for name, encoder in read}
    return {**network, "vae": _vae(shapes, kind), **readers}


def models(tensors: Mapping[str, torch.Tensor], configs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The models of a checkpoint, by their names in the pipeline. Raises what diffusers raises."""
    found: dict[str, Any] = {}
    with TemporaryDirectory(prefix="mole_config_") as folder:  # diffusers reads configs from there
        for name, config in configs.items():
            (Path(folder) / name).mkdir()
            (Path(folder) / name / "config.json").write_text(json.dumps(config))
            own = {"config": folder, "subfolder": name, "torch_dtype": dtype}
            if "_class_name" in config:
                found[name] = getattr(diffusers, config["_class_name"]).from_single_file(dict(tensors), **own)
                continue
            is_t5 = config["architectures"] == [T5]
            make = create_diffusers_t5_model_from_checkpoint if is_t5 else create_diffusers_clip_model_from_ldm
            found[name] = make(getattr(transformers, config["architectures"][0]), checkpoint=dict(tensors), **own)
    return found


def text_encoders(kind: str) -> dict[str, TextEncoder]:
    """The text encoders of a kind of checkpoint, by their names in a pipeline."""
    return ENCODERS[kind if kind in ENCODERS else kind[:3] if kind.startswith("sd3") else "flux"]


def encoders(shapes: Shapes, kind: str) -> dict[str, TextEncoder]:
    """The text encoders of a checkpoint. Raises ValueError if one is missing; SD 3 may lack T5."""
    known = text_encoders(kind)
    held = {name: encoder for name, encoder in known.items() if any(key.startswith(encoder.keys) for key in shapes)}
    for name in known:
        if name not in held and name != "text_encoder_3":
            raise ValueError(LACKS.format(name))
    return held


def tokenizers(shapes: Shapes, kind: str, checkpoint: Path, t5: Path | None) -> dict[str, Any]:
    """The tokenizers of a checkpoint by their names in the pipeline.

    Args:
        t5: the folder of T5's tokenizer; None looks for it in the program that the checkpoint belongs to.

    Raises ValueError for a text encoder with another vocabulary than CLIP's, and if T5's tokenizer is not there.
    """
    found: dict[str, Any] = {}
    for name, encoder in encoders(shapes, kind).items():
        part = name.replace("text_encoder", "tokenizer")
        if encoder.model == T5:
            found[part] = T5Tokenizer.from_pretrained(t5 or t5_folder(checkpoint), model_max_length=T5_LENGTH)
            continue
        words, places = _clip_sizes(shapes, encoder)
        if words < len(vocabulary := clip_vocabulary()[0]):
            known = f"its {name} knows {words} tokens, and CLIP's vocabulary has {len(vocabulary)}"
            raise ValueError(f"{known}: give --base-config, a folder that diffusers saved for the same kind of model")
        found[part] = clip_tokenizer(places, pad="!" if encoder.activation == "gelu" else END)
    return found


def clip_tokenizer(length: int = 77, *, pad: str = END) -> CLIPTokenizer:
    """CLIP's tokenizer. OpenCLIP's pads with "!"."""
    vocabulary, merges = clip_vocabulary()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad, model_max_length=length)


@cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """{token: its number}, and the merges: first each byte, inside a word and at its end, then what each merge makes."""
    lines = gzip.decompress(MERGES.read_bytes()).decode().splitlines()
    merges = [(first, second) for first, second in (line.split() for line in lines)]
    letters = list(bytes_to_unicode().values())
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {token: number for number, token in enumerate(tokens)}, merges


def t5_folder(checkpoint: Path) -> Path:
    """The folder of T5's tokenizer in the program around a checkpoint, which may be a link. Raises ValueError if there is
    none."""
    around = dict.fromkeys([*checkpoint.absolute().parents, *checkpoint.resolve().parents])
    hits = (hit for up in around for place in T5_PLACES for hit in sorted(up.glob(place)))
    if (found := next((hit for hit in hits if holds_t5(hit)), None)) is None:
        raise ValueError(
            "it reads prompts with T5, whose tokenizer is not beside it as in ComfyUI or Forge: give the folder of that "
            "tokenizer (tokenizer.json or spiece.model, 1 to 3 MB, from google/t5-v1_1-xxl for example) as --base-config"
        )
    return found


def holds_t5(folder: Path) -> bool:
    """Whether a folder has the files of a tokenizer, and not of a whole pipeline."""
    return any((folder / name).is_file() for name in T5_FILES)


def scheduler(shapes: Shapes, metadata: Mapping[str, str], kind: str) -> Any:
    """The noise schedule of a checkpoint: that of its kind, unless the file says that it predicts something else."""
    if kind == "flux-schnell":
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    if kind not in ("v1", "v2", "xl_base"):
        return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=kind == "flux-dev")
    said = metadata.get("modelspec.prediction_type", "v" if "v_pred" in shapes else "")
    predicts = "v_prediction" if said.startswith("v") or (kind == "v2" and not said) else "epsilon"
    if kind == "v1":
        return diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, prediction_type=predicts)
    if kind == "v2":
        return diffusers.DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type=predicts)
    noise = {**NOISE, "prediction_type": predicts, "rescale_betas_zero_snr": "ztsnr" in shapes}
    return diffusers.EulerDiscreteScheduler(**noise, timestep_spacing="leading")


# ---- the models


def _unet(shapes: Shapes, kind: str) -> dict[str, Any]:
    net = _below("model.diffusion_model.", shapes)
    levels: list[list[tuple[int, int]]] = [[]]  # per level and layer: channels, and transformer blocks (0: no attention)
    for i in range(1, _count(net, "input_blocks.")):
        if f"input_blocks.{i}.0.op.weight" in net:
            levels.append([])
        else:
            width = net[f"input_blocks.{i}.0.in_layers.2.weight"][0]
            levels[-1].append((width, _count(net, f"input_blocks.{i}.1.transformer_blocks.")))
    widths, depths = [level[0][0] for level in levels], [level[0][1] for level in levels]
    reads = [shape[-1] for key, shape in net.items() if key.endswith("attn2.to_k.weight")]
    turned = [shape for key, shape in net.items() if key.endswith("1.proj_in.weight")]
    is_xl = kind == "xl_base"
    return {
        "_class_name": "UNet2DConditionModel",
        "sample_size": SIDES.get(kind, 128),
        "in_channels": net["input_blocks.0.0.weight"][1],
        "out_channels": net["out.2.weight"][0],
        "block_out_channels": widths,
        "layers_per_block": len(levels[0]),
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "up_block_types": ["CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(depths)],
        "transformer_layers_per_block": [max(depth, 1) for depth in depths],
        "cross_attention_dim": reads[0],
        "attention_head_dim": 8 if kind == "v1" else [max(width // HEAD, 1) for width in widths],  # which is how many heads
        "use_linear_projection": len(turned[0]) == 2,
        "class_embed_type": None,
        "num_class_embeds": None,
        "addition_embed_type": "text_time" if is_xl else None,
        "addition_time_embed_dim": 256 if is_xl else None,
        "projection_class_embeddings_input_dim": net["label_emb.0.0.weight"][1] if is_xl else None,
    }


def _sd3(shapes: Shapes) -> dict[str, Any]:
    net = transformer(shapes)
    context, width = net["context_embedder.weight"], net["x_embedder.proj.weight"][0]
    blocks = range(_count(net, "joint_blocks."))
    return {
        "_class_name": "SD3Transformer2DModel",
        "patch_size": net["x_embedder.proj.weight"][-1],
        "in_channels": net["x_embedder.proj.weight"][1],
        "out_channels": net["x_embedder.proj.weight"][1],
        "num_layers": len(blocks),
        "num_attention_heads": width // HEAD,
        "joint_attention_dim": context[1],
        "caption_projection_dim": context[0],
        "pooled_projection_dim": net["y_embedder.mlp.0.weight"][1],
        "pos_embed_max_size": round(net["pos_embed"][1] ** 0.5),
        "dual_attention_layers": [i for i in blocks if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in net],
        "qk_norm": "rms_norm" if "joint_blocks.0.x_block.attn.ln_q.weight" in net else None,
    }


def _flux(shapes: Shapes) -> dict[str, Any]:
    net = transformer(shapes)
    return {
        "_class_name": "FluxTransformer2DModel",
        "in_channels": net["img_in.weight"][1],
        "num_layers": _count(net, "double_blocks."),
        "num_single_layers": _count(net, "single_blocks."),
        "num_attention_heads": net["img_in.weight"][0] // HEAD_OF_FLUX,
        "joint_attention_dim": net["txt_in.weight"][1],
        "pooled_projection_dim": net["vector_in.in_layer.weight"][1],
        "guidance_embeds": "guidance_in.in_layer.weight" in net,
    }


def _vae(shapes: Shapes, kind: str) -> dict[str, Any]:
    net = _below("first_stage_model.", shapes)
    if not {"encoder.conv_in.weight", "decoder.conv_in.weight"} <= net.keys():
        raise ValueError(LACKS.format("VAE"))
    levels = range(_count(net, "encoder.down."))
    scale, shift = VAES[PIPELINES[kind]]
    return {
        "_class_name": "AutoencoderKL",
        "sample_size": 8 * SIDES.get(kind, 128),
        "latent_channels": net["decoder.conv_in.weight"][1],
        "block_out_channels": [net[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels],
        "layers_per_block": _count(net, "encoder.down.0.block."),
        "down_block_types": ["DownEncoderBlock2D" for _ in levels],
        "up_block_types": ["UpDecoderBlock2D" for _ in levels],
        "use_quant_conv": "quant_conv.weight" in net,
        "use_post_quant_conv": "post_quant_conv.weight" in net,
        "scaling_factor": scale,
        "shift_factor": shift,
    }


def _clip(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    net, (words, places) = _below(encoder.keys, shapes), _clip_sizes(shapes, encoder)
    is_open = "positional_embedding" in net
    blocks, inner = ("transformer.resblocks.", "mlp.c_fc.weight") if is_open else ("encoder.layers.", "mlp.fc1.weight")
    inside, width = net[f"{blocks}0.{inner}"]
    beside = _below(encoder.keys.removesuffix("text_model."), shapes)
    projected = net.get("text_projection", (width,))[-1] if is_open else beside.get("text_projection.weight", (width,))[0]
    layers = _count(net, blocks)
    return {
        "model_type": "clip_text_model",
        "architectures": [encoder.model],
        "vocab_size": words,
        "max_position_embeddings": places,
        "hidden_size": width,
        "intermediate_size": inside,
        "num_hidden_layers": min(layers, 23) if encoder.keys == ENCODERS["v2"]["text_encoder"].keys else layers,  # of 24
        "num_attention_heads": max(width // HEAD, 1),
        "hidden_act": encoder.activation,
        "projection_dim": projected,
        "bos_token_id": (ends := clip_vocabulary()[0])[START],
        "eos_token_id": ends[END],
        "pad_token_id": ends["!"] if encoder.activation == "gelu" else ends[END],
    }


def _clip_sizes(shapes: Shapes, encoder: TextEncoder) -> tuple[int, int]:
    """How many tokens a text encoder knows, and how many it reads at a time."""
    net = _below(encoder.keys, shapes)
    start = "" if "positional_embedding" in net else "embeddings."
    places = net["positional_embedding" if not start else "embeddings.position_embedding.weight"]
    return net[f"{start}token_embedding.weight"][0], places[0]


def _t5(shapes: Shapes, encoder: TextEncoder) -> dict[str, Any]:
    net = _below(encoder.keys, shapes)
    attention, feed = "encoder.block.0.layer.0.SelfAttention.", "encoder.block.0.layer.1.DenseReluDense."
    is_gated = f"{feed}wi_0.weight" in net
    buckets, heads = net[f"{attention}relative_attention_bias.weight"]
    return {
        "model_type": "t5",
        "architectures": [encoder.model],
        "vocab_size": net["shared.weight"][0],
        "d_model": net["shared.weight"][1],
        "d_kv": net[f"{attention}q.weight"][0] // heads,
        "d_ff": net[f"{feed}{'wi_0' if is_gated else 'wi'}.weight"][0],
        "num_layers": _count(net, "encoder.block."),
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu" if is_gated else "relu",
    }


def transformer(shapes: Shapes) -> Shapes:
    """The tensors of the denoiser, which some files have alone."""
    return _below("model.diffusion_model.", shapes) or shapes


def _below(start: str, shapes: Shapes) -> dict[str, tuple[int, ...]]:
    """The tensors whose keys begin like this, without that."""
    return {key.removeprefix(start): shape for key, shape in shapes.items() if key.startswith(start)}


def _count(net: Shapes, start: str) -> int:
    """How many numbers follow this in the keys: the number of blocks."""
    return len({key[len(start) :].partition(".")[0] for key in net if key.startswith(start)})
