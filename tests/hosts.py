"""One tiny pipeline for each kind that people run, of the real classes, with random weights and offline.

`HOSTS` maps a host's name to a function that returns (pipe, what its call needs beside a prompt).
"""

import re
from functools import partial
from pathlib import Path

import diffusers as d
import torch
from accelerate import cpu_offload
from diffusers.hooks import apply_group_offloading
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_base import LoraBaseMixin
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as qwen_editing
from safetensors.torch import load_file, save_file
from tiny import tiny_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    Qwen3VLConfig,
    Qwen3VLModel,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mole_diffusers import models_of
from mole_diffusers.binding.vocabulary import DETERMINERS

PICTURE = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
PHOTO = VaeImageProcessor.numpy_to_pil(PICTURE.permute(0, 2, 3, 1).numpy())[0]
MASK = torch.ones(1, 1, 32, 32).tril()


def unet(**options):
    wide = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    down = ("DownBlock2D", "CrossAttnDownBlock2D")
    shape = {"down_block_types": down, "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": 16}
    return d.UNet2DConditionModel(**({"sample_size": 16} | wide | shape | options)).eval()


def vae(channels=4):
    return d.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=channels,
        sample_size=32,
        shift_factor=0.0,
    ).eval()


def text(kind=CLIPTextModel, *, width=16, projected=16, activation="quick_gelu", tokens=None):
    words = tiny_tokenizer()
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = {"vocab_size": len(words), "max_position_embeddings": tokens or words.model_max_length}
    size |= {"projection_dim": projected}
    return kind(CLIPTextConfig(**shape, **size, **ids, hidden_act=activation)).eval()


def t5(width=16, kind=T5EncoderModel, config=T5Config, *, tokens=16):
    letters = [(chr(c), -2.0) for c in range(97, 123)]
    marks = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    words = T5Tokenizer(vocab=[*marks, *letters], model_max_length=tokens)
    shape = {"d_model": width, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return kind(config(vocab_size=len(words), **shape)).eval(), words


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def letters():
    """Qwen's tokenizer and its template of a chat, with a token for each byte."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *VISION]
    ids = {piece: i for i, piece in enumerate([*bytes_to_unicode().values(), *marks])}
    words = Qwen2Tokenizer(vocab=ids, merges=[], extra_special_tokens=marks[1:])
    words.chat_template = CHAT
    return words


def qwen3(kind=Qwen3Model, *, width=16, layers=2):
    words = letters()
    shape = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
    size = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(words)}
    return kind(Qwen3Config(**shape, **size)).eval(), words


def qwen3_vl():
    words = letters()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = {"num_key_value_heads": 1, "head_dim": 8, "vocab_size": len(words)}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    eye |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    return Qwen3VLModel(Qwen3VLConfig(text_config=shape | size | rope, vision_config=eye)).eval(), words


INSTRUCTIONS = (
    "<s>{% for m in messages %}{% set kind = '[SYSTEM_PROMPT]' if m['role'] == 'system' else '[INST]' %}"
    "{{ kind }}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{{ kind.replace('[', '[/') }}{% endfor %}"
)


def by_bytes(*marks):
    """A tokenizer with a token for each byte, and others: the first three pad, begin and end a text."""
    ids = {piece: i for i, piece in enumerate([*bytes_to_unicode().values(), *marks])}
    bytewise = Tokenizer(models.BPE(ids, []))
    bytewise.pre_tokenizer, bytewise.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    named = dict(zip(("pad_token", "bos_token", "eos_token"), marks, strict=False))
    return PreTrainedTokenizerFast(tokenizer_object=bytewise, **named, extra_special_tokens=list(marks[3:]))


def llama():
    words = by_bytes("<|eot_id|>", "<|begin_of_text|>", "<|end_of_text|>")
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**shape, num_key_value_heads=1, vocab_size=len(words))).eval(), words


def mistral(width=8):
    """Mistral's encoder, its processor and template, with a token for each byte.

    The states after its layers 10, 20 and 30 are the text.
    """
    marks = ["<pad>", "<s>", "</s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]"]
    words = by_bytes(*marks, "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    shape = {"hidden_size": width, "intermediate_size": 8, "num_hidden_layers": 31, "num_attention_heads": 2, "head_dim": 4}
    size = {"num_key_value_heads": 1, "vocab_size": len(words)}
    eye = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    config = Mistral3Config(
        text_config={"model_type": "mistral"} | shape | size,
        vision_config={"model_type": "pixtral", "head_dim": 4} | eye,
        image_token_index=words.convert_tokens_to_ids("[IMG]"),
    )
    processor = PixtralProcessor(PixtralImageProcessor(), words, chat_template=INSTRUCTIONS)
    return Mistral3ForConditionalGeneration(config).eval(), processor


def gemma():
    """Gemma's encoder and its tokenizer, with a token for each letter."""
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *map(chr, range(33, 127))]
    words = GemmaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], add_bos_token=True)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8}
    return Gemma2Model(Gemma2Config(**shape, num_key_value_heads=1, vocab_size=len(words))).eval(), words


def eye(width=8):
    shape = {"hidden_size": width, "projection_dim": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2}
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**shape, image_size=32, patch_size=16)).eval()


def noise(kind=d.DDIMScheduler, **options):
    return kind(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1, **options)


def flow():
    return d.FlowMatchEulerDiscreteScheduler()


def controlnet(**options):
    shape = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 2, "attention_head_dim": 2}
    down = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "cross_attention_dim": 16}
    net = d.ControlNetModel(**(shape | down | options), conditioning_embedding_out_channels=(4, 8)).eval()
    for module in [*net.controlnet_down_blocks, net.controlnet_mid_block]:
        torch.nn.init.normal_(module.weight, std=0.1)  # zero as built, which would condition nothing
    return net


def t2i_adapter():
    return d.T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2).eval()


def sd(kind=d.StableDiffusionPipeline, *, host=None, encoder=None, scheduler=None, **extra):
    torch.manual_seed(0)
    parts = {"vae": vae(), "text_encoder": encoder or text(), "tokenizer": tiny_tokenizer(), "unet": host or unet()}
    parts |= {"scheduler": scheduler or noise(clip_sample=False), "safety_checker": None, "feature_extractor": None}
    return quiet(kind(**parts, requires_safety_checker=False, **extra))


def sd21():
    torch.manual_seed(0)
    encoder = text(width=32, activation="gelu")
    host = unet(cross_attention_dim=32, use_linear_projection=True, upcast_attention=True, attention_head_dim=(2, 4))
    return sd(host=host, encoder=encoder, scheduler=noise(clip_sample=False, prediction_type="v_prediction"))


XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2)}
XL |= {"use_linear_projection": True, "cross_attention_dim": 32}


def sdxl(kind=d.StableDiffusionXLPipeline, *, refiner=False, channels=4, **extra):
    torch.manual_seed(0)
    inputs = 16 + 8 * (5 if refiner else 6)
    width = {"cross_attention_dim": 16 if refiner else 32, "in_channels": channels}
    host = unet(**XL | {"projection_class_embeddings_input_dim": inputs} | width)
    second = text(CLIPTextModelWithProjection, activation="gelu")
    first = {"text_encoder": None, "tokenizer": None} if refiner else {"text_encoder": text(), "tokenizer": tiny_tokenizer()}
    parts = first | {"text_encoder_2": second, "tokenizer_2": tiny_tokenizer(), "unet": host, "vae": vae()}
    if refiner:
        extra["requires_aesthetics_score"] = True
    return quiet(kind(**parts, scheduler=noise(d.EulerDiscreteScheduler), **extra, add_watermarker=False))


def xl_controlnet():
    return controlnet(**XL | {"projection_class_embeddings_input_dim": 16 + 8 * 6})


def ip_adapter_weights(pipe):
    """Random IP-Adapter weights for the pipeline's UNet: of what reads a picture of 8 numbers, and of the attention."""
    generator = torch.Generator().manual_seed(1)
    width, token = pipe.unet.config.cross_attention_dim, {}
    crosses = [name for name in pipe.unet.attn_processors if "attn2" in name and "motion" not in name]
    for i, name in enumerate(crosses):
        shape = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.weight.shape
        for half in ("k", "v"):
            token[f"{2 * i + 1}.to_{half}_ip.weight"] = torch.randn(shape, generator=generator) * 0.3
    project = {"proj.weight": torch.randn(4 * width, 8, generator=generator), "proj.bias": torch.zeros(4 * width)}
    project |= {"norm.weight": torch.ones(width), "norm.bias": torch.zeros(width)}
    return {"image_proj": project, "ip_adapter": token}


def ip_adapter(pipe, encoder=None):
    """Give the pipeline an image encoder and load random IP-Adapter weights into its UNet."""
    torch.manual_seed(1)
    pipe.register_modules(image_encoder=encoder or eye(), feature_extractor=CLIPImageProcessor(size=32, crop_size=32))
    pipe.load_ip_adapter(ip_adapter_weights(pipe), subfolder="", weight_name="")


def save_given(folder, pipe, network, encoder):
    """Files as ComfyUI has them in its models folder: a ControlNet, an IP-Adapter for a pipeline, and its image encoder."""
    named = {f"{half}.{key}": w for half, own in ip_adapter_weights(pipe).items() for key, w in own.items()}
    files = {
        "controlnet/canny": network.state_dict(),
        "ipadapter/ip-plus": named,
        "clip_vision/CLIP-ViT": encoder.state_dict(),
    }
    for name, tensors in files.items():
        path = folder / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path)


def with_ip_adapter():
    pipe = sd()
    ip_adapter(pipe)
    return pipe


def animatediff():
    torch.manual_seed(0)
    motion = d.MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2
    )
    parts = {"vae": vae(), "text_encoder": text(), "tokenizer": tiny_tokenizer(), "unet": unet(), "motion_adapter": motion}
    return quiet(d.AnimateDiffPipeline(**parts, scheduler=noise(clip_sample=False)))


def sd3():
    torch.manual_seed(0)
    shape = {"sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    size = {"joint_attention_dim": 32, "caption_projection_dim": 16, "pooled_projection_dim": 32}
    size |= {"attention_head_dim": 8, "num_attention_heads": 2}
    parts = {
        "transformer": d.SD3Transformer2DModel(**shape, **size, dual_attention_layers=(0,), qk_norm="rms_norm").eval(),
        "text_encoder": text(CLIPTextModelWithProjection),
        "text_encoder_2": text(CLIPTextModelWithProjection, activation="gelu"),
        "text_encoder_3": None,
        "tokenizer_3": None,
    }
    words = {"tokenizer": tiny_tokenizer(), "tokenizer_2": tiny_tokenizer()}
    return quiet(d.StableDiffusion3Pipeline(**parts, **words, vae=vae(), scheduler=flow()))


def flux():
    torch.manual_seed(0)
    shape = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8}
    size = {"num_attention_heads": 2, "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": (2, 2, 4)}
    encoder, words = t5()
    parts = {"transformer": d.FluxTransformer2DModel(**shape, **size).eval(), "vae": vae(), "scheduler": flow()}
    parts |= {"text_encoder": text(), "tokenizer": tiny_tokenizer(), "text_encoder_2": encoder, "tokenizer_2": words}
    return quiet(d.FluxPipeline(**parts))


def chroma():
    torch.manual_seed(0)
    shape = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8}
    size = {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    small = {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1}
    encoder, words = t5()
    parts = {"transformer": d.ChromaTransformer2DModel(**shape, **size, **small).eval(), "vae": vae(), "scheduler": flow()}
    return quiet(d.ChromaPipeline(**parts, text_encoder=encoder, tokenizer=words))


def z_image():
    torch.manual_seed(0)
    shape = {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16}
    size = {"in_channels": 4, "axes_dims": [8, 4, 4], "axes_lens": [256, 32, 32]}
    encoder, words = qwen3()
    parts = {"transformer": d.ZImageTransformer2DModel(**shape, **size).eval(), "vae": vae(), "scheduler": flow()}
    for pad in (parts["transformer"].x_pad_token, parts["transformer"].cap_pad_token):
        torch.nn.init.normal_(pad)
    return quiet(d.ZImagePipeline(**parts, text_encoder=encoder, tokenizer=words))


def qwen_vl():
    words = letters()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size = {"num_key_value_heads": 1, "vocab_size": len(words)}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    names = ("vision_start_token_id", "vision_end_token_id", "image_token_id", "video_token_id")
    ids = dict(zip(names, words.convert_tokens_to_ids(list(VISION)), strict=True))
    config = Qwen2_5_VLConfig(text_config=shape | size | rope, vision_config=eye, **ids)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), words


def qwen(kind=d.QwenImagePipeline):
    torch.manual_seed(0)
    shape = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16}
    size = {"in_channels": 16, "out_channels": 4, "axes_dims_rope": (8, 4, 4)}
    encoder, words = qwen_vl()
    parts = {"transformer": d.QwenImageTransformer2DModel(**shape, **size).eval(), "scheduler": flow()}
    if kind is d.QwenImageEditPlusPipeline:
        parts["processor"] = Qwen2VLProcessor(Qwen2VLImageProcessor(), words, Qwen2VLVideoProcessor())
    pipe = kind(**parts, vae=qwen_vae(), text_encoder=encoder, tokenizer=words)
    # The template is 34 tokens of the published tokenizer up to the prompt, and more of one for each byte.
    pipe.prompt_template_encode_start_idx = len(words(pipe.prompt_template_encode.partition("{}")[0]).input_ids)
    return quiet(pipe)


def flux2(kind=d.Flux2KleinPipeline):
    torch.manual_seed(0)
    shape = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    size = {"in_channels": 16, "joint_attention_dim": 24, "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 8}
    encoder, words = qwen3(Qwen3ForCausalLM, width=8, layers=28)  # its states after layers 9, 18 and 27 are the text
    wide = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 4}
    kinds = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    parts = {"transformer": d.Flux2Transformer2DModel(**shape, **size, guidance_embeds=False).eval(), "scheduler": flow()}
    return quiet(kind(**parts, vae=d.AutoencoderKLFlux2(**wide, **kinds).eval(), text_encoder=encoder, tokenizer=words))


def qwen_vae():
    wide = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    return d.AutoencoderKLQwenImage(**wide, latents_mean=[0.0] * 4, latents_std=[1.0] * 4).eval()


def qwen_edit():
    # Given pictures are enlarged to a million pixels for the autoencoder, and to 384 x 384 for the text encoder.
    qwen_editing.VAE_IMAGE_SIZE = qwen_editing.CONDITION_IMAGE_SIZE = 32 * 32
    return qwen(d.QwenImageEditPlusPipeline)


def flux_like(kind, transformer, encoder, words, *, channels=4, **extra):
    """A pipeline whose transformer has the blocks of Flux."""
    shape = {"patch_size": 1, "in_channels": 4 * channels, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8}
    size = {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (2, 2, 4)}
    parts = {"transformer": transformer(**shape, **size).eval(), "vae": vae(channels), "scheduler": flow()}
    return quiet(kind(**parts, text_encoder=encoder, tokenizer=words, **extra))


def longcat():
    torch.manual_seed(0)
    extra = {"channels": 16, "text_processor": None}  # the pipeline draws 16 channels, whatever the transformer has
    return flux_like(d.LongCatImagePipeline, d.LongCatImageTransformer2DModel, *qwen_vl(), **extra)


def ovis():
    torch.manual_seed(0)
    pipe = flux_like(d.OvisImagePipeline, partial(d.OvisImageTransformer2DModel, out_channels=16), *qwen3())
    # The template is 28 tokens of the published tokenizer up to the prompt, and more of one for each byte.
    begins, instructions, _ = pipe._get_messages("")[0].partition(pipe.system_prompt)
    pipe.user_prompt_begin_id = len(pipe.tokenizer(begins + instructions).input_ids)
    return pipe


def ltx():
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "cross_attention_dim": 24, "caption_channels": 16}
    size = {"num_layers": 2, "in_channels": 8, "out_channels": 8}
    wide = {"latent_channels": 8, "block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4, "patch_size": 1}
    deep = {"layers_per_block": (1,) * 5, "decoder_layers_per_block": (1,) * 5, "upsample_factor": (1,) * 4}
    scaled = (True, True, False, False)
    kinds = {"spatio_temporal_scaling": scaled, "decoder_spatio_temporal_scaling": scaled}
    kinds |= {"decoder_inject_noise": (False,) * 5, "upsample_residual": (False,) * 4}
    encoder, words = t5()
    parts = {"transformer": d.LTXVideoTransformer3DModel(**shape, **size).eval(), "scheduler": flow()}
    parts["vae"] = d.AutoencoderKLLTXVideo(**wide, **deep, **kinds).eval()
    return quiet(d.LTXPipeline(**parts, text_encoder=encoder, tokenizer=words))


def krea2():
    torch.manual_seed(0)
    shape = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = {"text_hidden_dim": 16, "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2}
    small = {"intermediate_size": 32, "timestep_embed_dim": 16, "text_intermediate_size": 16, "axes_dims_rope": (8, 4, 4)}
    blocks = {"num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1, "in_channels": 16}
    encoder, words = qwen3_vl()
    parts = {"transformer": d.Krea2Transformer2DModel(**shape, **text, **small, **blocks).eval(), "vae": qwen_vae()}
    for table in (p for n, p in parts["transformer"].named_parameters() if n.endswith("scale_shift_table")):
        torch.nn.init.normal_(table)  # zero as built, so that blocks would add nothing
    pipe = d.Krea2Pipeline(flow(), text_encoder=encoder, tokenizer=words, **parts, text_encoder_select_layers=(1, 2))
    # The template is 34 tokens of the published tokenizer up to the prompt and 5 behind it, and more of one for each byte.
    pipe.prompt_template_encode_start_idx = len(words(pipe.prompt_template_encode_prefix).input_ids)
    pipe.prompt_template_encode_num_suffix_tokens = len(words(pipe.prompt_template_encode_suffix).input_ids)
    return quiet(pipe)


def flux2_dev():
    pipe = flux2()
    encoder, processor = mistral()
    parts = {"vae": pipe.vae, "scheduler": flow(), "transformer": pipe.transformer}
    return quiet(d.Flux2Pipeline(**parts, text_encoder=encoder, tokenizer=processor))


def lumina2():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1, "num_attention_heads": 2, "num_kv_heads": 1}
    size = {"in_channels": 4, "cap_feat_dim": 16, "multiple_of": 8, "axes_dim_rope": (4, 4, 8), "axes_lens": (300, 32, 32)}
    encoder, words = gemma()
    parts = {"transformer": d.Lumina2Transformer2DModel(**shape, **size).eval(), "vae": vae(), "scheduler": flow()}
    pipe = d.Lumina2Pipeline(**parts, text_encoder=encoder, tokenizer=words)
    pipe.vae_scale_factor = 2  # the pipeline takes it that all autoencoders shrink a side to an eighth
    return quiet(pipe)


def hidream():
    torch.manual_seed(0)
    shape = {"patch_size": 2, "in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 8}
    size = {"num_attention_heads": 2, "caption_channels": [16, 16], "text_emb_dim": 32, "axes_dims_rope": (4, 2, 2)}
    routed = {"num_routed_experts": 2, "num_activated_experts": 1, "max_resolution": (16, 16), "llama_layers": [0, 1, 1]}
    parts = {"transformer": d.HiDreamImageTransformer2DModel(**shape, **size, **routed).eval(), "scheduler": flow()}
    for i, activation in (("", "quick_gelu"), ("_2", "gelu")):  # those of HiDream read up to 248 tokens
        parts |= {f"text_encoder{i}": text(CLIPTextModelWithProjection, activation=activation, tokens=64)}
        parts |= {f"tokenizer{i}": tiny_tokenizer()}
    parts |= dict(zip(("text_encoder_3", "tokenizer_3"), t5(tokens=64), strict=True))
    parts |= dict(zip(("text_encoder_4", "tokenizer_4"), llama(), strict=True))
    pipe = d.HiDreamImagePipeline(**parts, vae=vae())
    pipe.default_sample_size = 16  # the pipeline draws about a megapixel, whatever size it is given
    return quiet(pipe)


def anima():
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4, "out_channels": 4}
    size = {"text_embed_dim": 24, "adaln_lora_dim": 8, "extra_pos_embed_type": None}
    encoder, words = qwen3()
    _, t5_words = t5(tokens=64)
    reads = {"source_dim": 16, "target_dim": 24, "model_dim": 16, "num_layers": 1, "num_attention_heads": 2}
    reads |= {"target_vocab_size": len(t5_words), "min_sequence_length": 64}
    pipe = d.AnimaAutoBlocks().init_pipeline()
    pipe.update_components(
        transformer=d.CosmosTransformer3DModel(**shape, **size).eval(),
        text_conditioner=d.AnimaTextConditioner(**reads).eval(),
        text_encoder=encoder,
        tokenizer=words,
        t5_tokenizer=t5_words,
        vae=qwen_vae(),
        scheduler=flow(),
    )
    return quiet(pipe)


def wan():
    torch.manual_seed(0)
    shape = {"num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16, "freq_dim": 16, "ffn_dim": 32}
    size = {"num_layers": 2, "rope_max_seq_len": 32, "in_channels": 4, "out_channels": 4}
    wide = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 1], "num_res_blocks": 1, "temperal_downsample": [False]}
    latents = {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}
    encoder, words = t5(kind=UMT5EncoderModel, config=UMT5Config)
    parts = {
        "transformer": d.WanTransformer3DModel(**shape, **size).eval(),
        "vae": d.AutoencoderKLWan(**wide, **latents).eval(),
    }
    return quiet(d.WanPipeline(**parts, scheduler=flow(), text_encoder=encoder, tokenizer=words))


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


# An adapter adds its features inside the blocks that have attention.
TURNED = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
IMAGE, INPAINT = {"image": PICTURE, "strength": 1.0}, {"image": PICTURE, "mask_image": MASK, "strength": 1.0}
SIZE = {"height": 32, "width": 32}
CONTROLLED = {"control_image": PICTURE}
LCM = {"kind": d.LCMScheduler, "clip_sample": False}
HOSTS = {
    "sd15": lambda: (sd(), {}),
    "sd21": lambda: (sd21(), {}),
    "sd15-img2img": lambda: (sd(d.StableDiffusionImg2ImgPipeline), IMAGE),
    "sd15-inpaint": lambda: (sd(d.StableDiffusionInpaintPipeline), INPAINT | SIZE),
    "sd15-inpaint9": lambda: (sd(d.StableDiffusionInpaintPipeline, host=unet(in_channels=9)), INPAINT | SIZE),
    "sd15-pix2pix": lambda: (
        sd(d.StableDiffusionInstructPix2PixPipeline, host=unet(in_channels=8)),
        {"image": PICTURE, "guidance_scale": 3.0},
    ),
    "sd15-controlnet": lambda: (sd(d.StableDiffusionControlNetPipeline, controlnet=controlnet()), {"image": PICTURE}),
    "sd15-controlnet-img2img": lambda: (
        sd(d.StableDiffusionControlNetImg2ImgPipeline, controlnet=controlnet()),
        IMAGE | CONTROLLED,
    ),
    "sd15-controlnet-inpaint": lambda: (
        sd(d.StableDiffusionControlNetInpaintPipeline, controlnet=controlnet()),
        INPAINT | CONTROLLED | SIZE,
    ),
    "sd15-t2i-adapter": lambda: (
        sd(d.StableDiffusionAdapterPipeline, host=unet(**TURNED), adapter=t2i_adapter()),
        {"image": PICTURE} | SIZE,
    ),
    "sd15-ip-adapter": lambda: (with_ip_adapter(), {"ip_adapter_image": PICTURE}),
    "sd15-pag": lambda: (sd(d.StableDiffusionPAGPipeline, pag_applied_layers="mid"), {"pag_scale": 3.0}),
    "sd15-lcm": lambda: (sd(scheduler=noise(d.LCMScheduler, clip_sample=False)), {"guidance_scale": 1.0}),
    "animatediff": lambda: (animatediff(), {"num_frames": 3}),
    "sdxl": lambda: (sdxl(), {}),
    "sdxl-refiner": lambda: (sdxl(d.StableDiffusionXLImg2ImgPipeline, refiner=True), IMAGE),
    "sdxl-img2img": lambda: (sdxl(d.StableDiffusionXLImg2ImgPipeline), IMAGE),
    "sdxl-inpaint": lambda: (sdxl(d.StableDiffusionXLInpaintPipeline), INPAINT | SIZE),
    "sdxl-pix2pix": lambda: (
        sdxl(d.StableDiffusionXLInstructPix2PixPipeline, channels=8),
        {"image": PICTURE, "guidance_scale": 3.0} | SIZE,
    ),
    "sdxl-controlnet": lambda: (sdxl(d.StableDiffusionXLControlNetPipeline, controlnet=xl_controlnet()), {"image": PICTURE}),
    "sdxl-controlnet-img2img": lambda: (
        sdxl(d.StableDiffusionXLControlNetImg2ImgPipeline, controlnet=xl_controlnet()),
        IMAGE | CONTROLLED,
    ),
    "sdxl-controlnet-inpaint": lambda: (
        sdxl(d.StableDiffusionXLControlNetInpaintPipeline, controlnet=xl_controlnet()),
        INPAINT | CONTROLLED | SIZE,
    ),
    "sdxl-turbo": lambda: (sdxl(), {"guidance_scale": 0.0, "num_inference_steps": 1}),
    "sdxl-pag": lambda: (sdxl(d.StableDiffusionXLPAGPipeline, pag_applied_layers="mid"), {"pag_scale": 3.0}),
    "sd3": lambda: (sd3(), {}),
    "flux": lambda: (flux(), SIZE | {"max_sequence_length": 8}),
    "chroma": lambda: (chroma(), SIZE | {"max_sequence_length": 8}),
    "z_image": lambda: (z_image(), SIZE | {"max_sequence_length": 64}),
    "qwen": lambda: (qwen(), SIZE | {"negative_prompt": " ", "true_cfg_scale": 3.0}),
    "wan": lambda: (wan(), SIZE | {"num_frames": 5, "max_sequence_length": 16}),
    "flux2": lambda: (flux2(), SIZE | {"max_sequence_length": 64}),
    "qwen-edit": lambda: (
        qwen_edit(),
        SIZE | {"image": [PHOTO], "negative_prompt": " ", "true_cfg_scale": 3.0},
    ),
    "longcat": lambda: (longcat(), SIZE | {"enable_prompt_rewrite": False}),
    "ovis": lambda: (ovis(), SIZE | {"max_sequence_length": 64}),
    "ltx": lambda: (ltx(), SIZE | {"num_frames": 9, "max_sequence_length": 16}),
    "flux2-dev": lambda: (flux2_dev(), SIZE | {"max_sequence_length": 256}),
    "krea2": lambda: (krea2(), SIZE | {"max_sequence_length": 64}),
    # Its normalisation divides each row of the picture by a norm of the whole row, whatever is drawn where.
    "lumina2": lambda: (lumina2(), SIZE | {"max_sequence_length": 256, "cfg_normalization": False}),
    "anima": lambda: (anima(), SIZE | {"max_sequence_length": 64}),
    "hidream": lambda: (hidream(), SIZE | {"max_sequence_length": 32}),
}


def draw(pipe, options, prompt="a fox in ink", *, steps=2):
    """Pictures (or frames) of one fixed seed."""
    options = {"num_inference_steps": steps, "output_type": "np", "generator": torch.Generator().manual_seed(0)} | options
    if isinstance(pipe, d.ModularPipeline) and options["output_type"] == "latent":  # it takes none
        return pipe(prompt=prompt, **options | {"output_type": "np"}, output="latents")[:, :, 0]
    made = pipe(prompt=prompt, **options)
    return torch.as_tensor(made.frames if hasattr(made, "frames") else made.images)


def networks(pipe):
    """All models of a pipeline."""
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def load_adapters(pipe, files, weights=None):
    """diffusers' own adapters; of a pipeline that loads none by another one, or by the transformer."""
    loader, weights = pipe, [1.0] * len(files) if weights is None else weights
    if isinstance(pipe, d.StableDiffusionAdapterPipeline):
        loader = d.StableDiffusionPipeline(**{k: v for k, v in pipe.components.items() if k != "adapter"})
    if isinstance(loader, LoraBaseMixin):
        for adapter, file in files.items():
            loader.load_lora_weights(file, adapter_name=adapter)
        loader.set_adapters(list(files), weights)
        return
    for adapter, file in files.items():
        loader.transformer.load_lora_adapter(load_file(file), adapter_name=adapter)
    loader.transformer.set_adapters(list(files), weights)


CPU = torch.device("cpu")


def group(pipe, **options):
    for model in networks(pipe):
        apply_group_offloading(model, onload_device=CPU, offload_device=CPU, **options)


OFFLOADS = {  # the CPU plays the accelerator too; what is offloaded layer by layer is on "meta" between calls
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "sequential": lambda pipe: [cpu_offload(model, CPU) for model in networks(pipe)],
    "block": lambda pipe: group(pipe, offload_type="block_level", num_blocks_per_group=1),
    "leaf": lambda pipe: group(pipe, offload_type="leaf_level"),
}


def denoiser(pipe):
    return models_of(pipe).get("unet") or models_of(pipe)["transformer"]


def snapshot(pipe):
    """Everything about the host models that attaching could change."""
    return {
        part: (
            {k: v.clone() for k, v in model.state_dict().items()},
            {n: type(m) for n, m in model.named_modules()},
            {n: p.requires_grad for n, p in model.named_parameters()},
            {k for k in model.__dict__ if k != "_modules"},
            [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        )
        for part, model in models_of(pipe).items()
    }


def assert_same(before, after):
    for part in before:
        states, *rest = zip(before[part], after[part], strict=True)
        assert list(states[0]) == list(states[1])
        assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
        for old, new in rest:
            assert old == new


def breaking(error, at):
    """A function that raises when it is called for the `at`-th time, counted from 0, and else returns what is last."""
    calls = iter(range(at + 1))

    def call(*given):
        if next(calls) == at:
            raise error
        return given[-1]

    return call


def real_prompts():
    """A third of the PartiPrompts of at least five words."""
    lines = (Path(__file__).parent / "binding" / "data" / "parti_third.txt").read_text().splitlines()
    return [line for line in lines if not line.startswith("#")]


def first_noun(prompt):
    """About the first noun of a prompt."""
    words = [word for word in re.findall(r"[A-Za-z][a-z]+", prompt) if word.lower() not in DETERMINERS | {"photo", "of"}]
    return words[0]
