"""Checkpoints that are opened without a config: their sizes are read from their shapes, and nothing is downloaded."""

import json
import shutil
from types import SimpleNamespace

import diffusers as d
import hosts
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import save_single_file, save_transformer_file
from tiers import thorough
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mole_app.studio.base_models import checkpoint_kind, open_base
from mole_app.studio.checkpoint_config import clip_tokenizer, configs, scheduler, t5_folder
from mole_app.studio.memory import Memory
from mole_app.studio.model_folders import bases_in

CPU = Memory(device="cpu", dtype="float32")
SD_NOISE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def clip(kind, width, layers, act="quick_gelu", projected=None):
    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers, "hidden_act": act}
    ends = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 0 if act == "gelu" else 49407}
    heads = {"num_attention_heads": width // 64, "projection_dim": projected or width}
    return kind(CLIPTextConfig(vocab_size=49408, **shape, **heads, **ends)).eval()


def vae(widths, layers, latents, scale, shift=None, quantised=True):
    return d.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=layers,
        latent_channels=latents,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=quantised,
        use_post_quant_conv=quantised,
    ).eval()


def unet(widths, crossing, layers, **options):
    """`crossing`: for each level, whether it has attention."""
    down = [f"{'CrossAttn' if yes else ''}DownBlock2D" for yes in crossing]
    up = [f"{'CrossAttn' if yes else ''}UpBlock2D" for yes in reversed(crossing)]
    shape = {"block_out_channels": widths, "down_block_types": down, "up_block_types": up, "layers_per_block": layers}
    return d.UNet2DConditionModel(**shape, **options).eval()


FULL, TINY = (320, 640, 1280, 1280), (32, 64)
XL_TEXT = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "use_linear_projection": True}


def sd15(*, full):
    """As published, or with few channels. Its heads are eight at any width."""
    wide = 768 if full else 64
    shape = (FULL, (True, True, True, False), 2) if full else (TINY, (False, True), 1)
    return d.StableDiffusionPipeline(
        unet=unet(*shape, cross_attention_dim=wide, attention_head_dim=8, sample_size=64),
        vae=vae((128, 256, 512, 512) if full else (32, 32), 2 if full else 1, 4, 0.18215),
        text_encoder=clip(CLIPTextModel, wide, 12 if full else 2),
        tokenizer=clip_tokenizer(),
        scheduler=d.PNDMScheduler(**SD_NOISE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd21(*, full):
    shape = (FULL, (True, True, True, False), 2) if full else (TINY, (True, False), 2)
    heads = (5, 10, 20, 20) if full else (1, 1)
    about = {"cross_attention_dim": 1024, "attention_head_dim": heads, "use_linear_projection": True, "sample_size": 96}
    noise = d.DDIMScheduler(**SD_NOISE, clip_sample=False, set_alpha_to_one=False, prediction_type="v_prediction")
    return d.StableDiffusionPipeline(
        unet=unet(*shape, **about),
        vae=vae((128, 256, 512, 512) if full else (32, 32), 2 if full else 1, 4, 0.18215),
        text_encoder=clip(CLIPTextModel, 1024, 23 if full else 1, "gelu"),
        tokenizer=clip_tokenizer(pad="!"),
        scheduler=noise,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(*, full):
    shape = ((320, 640, 1280), (False, True, True), 2) if full else (TINY, (False, True), 1)
    first, second = (768, 1280) if full else (64, 128)
    about = {"cross_attention_dim": first + second, "attention_head_dim": (5, 10, 20) if full else (1, 1)}
    about |= {"transformer_layers_per_block": (1, 2, 10) if full else (1, 2), **XL_TEXT, "sample_size": 128}
    noise = d.EulerDiscreteScheduler(**SD_NOISE, timestep_spacing="leading")
    return d.StableDiffusionXLPipeline(
        unet=unet(*shape, **about, projection_class_embeddings_input_dim=second + 6 * 256),
        vae=vae((128, 256, 512, 512) if full else (32, 32), 2 if full else 1, 4, 0.13025),
        text_encoder=clip(CLIPTextModel, first, 12 if full else 2),
        text_encoder_2=clip(CLIPTextModelWithProjection, second, 32 if full else 10, "gelu"),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        scheduler=noise,
        add_watermarker=False,
    )


def t5(width, *, full):
    shape = {"d_model": width, "d_ff": 10240 if full else 16, "d_kv": 64, "num_heads": 64 if full else 1}
    kind = {"num_layers": 24 if full else 1, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    words = hosts.t5()[1]
    words.model_max_length = 512
    return T5EncoderModel(T5Config(vocab_size=32128 if full else len(words), **shape, **kind)).eval(), words


def sd3(*, full):
    wide = 38 * 64 if full else 64
    first, second = (768, 1280) if full else (192, 320)
    encoder, words = t5(4096 if full else first + second, full=full)
    shape = {"num_layers": 38, "num_attention_heads": wide // 64, "attention_head_dim": 64, "caption_projection_dim": wide}
    about = {"joint_attention_dim": encoder.config.d_model, "pooled_projection_dim": first + second, "in_channels": 16}
    about |= {"out_channels": 16, "pos_embed_max_size": 192, "qk_norm": "rms_norm", "sample_size": 128}
    one = clip(CLIPTextModelWithProjection, first, 12 if full else 2)
    if not full:
        one.text_projection.weight.data = torch.eye(first)  # as files of SD 3 are read
    return d.StableDiffusion3Pipeline(
        transformer=d.SD3Transformer2DModel(**shape, **about).eval(),
        vae=vae((128, 256, 512, 512) if full else (32, 32), 2 if full else 1, 16, 1.5305, 0.0609, False),
        text_encoder=one,
        text_encoder_2=clip(CLIPTextModelWithProjection, second, 32 if full else 2, "gelu"),
        text_encoder_3=encoder,
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad="!"),
        tokenizer_3=words,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flux(*, full):
    wide, first = (3072, 768) if full else (128, 64)
    encoder, words = t5(4096 if full else 64, full=full)
    shape = {"num_layers": 19 if full else 1, "num_single_layers": 38 if full else 1, "num_attention_heads": wide // 128}
    about = {"attention_head_dim": 128, "joint_attention_dim": encoder.config.d_model, "pooled_projection_dim": first}
    return d.FluxPipeline(
        transformer=d.FluxTransformer2DModel(**shape, **about, in_channels=64, guidance_embeds=True).eval(),
        vae=vae((128, 256, 512, 512) if full else (32, 32), 2 if full else 1, 16, 0.3611, 0.1159, False),
        text_encoder=clip(CLIPTextModel, first, 12 if full else 2),
        tokenizer=clip_tokenizer(),
        text_encoder_2=encoder,
        tokenizer_2=words,
        scheduler=d.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def as_file(pipe, path):
    pipe.set_progress_bar_config(disable=True)
    return (save_transformer_file if hasattr(pipe, "transformer") else save_single_file)(pipe, path)


def comfy(root, pipe):
    """ComfyUI's folder with one checkpoint; for T5 also with its tokenizer, where ComfyUI has it."""
    (root / "models" / "checkpoints").mkdir(parents=True)
    words = getattr(pipe, "tokenizer_3", None) or (pipe.tokenizer_2 if isinstance(pipe, d.FluxPipeline) else None)
    if words is not None:
        words.save_pretrained(root / "comfy" / "text_encoders" / "t5_tokenizer")
    return as_file(pipe, root / "models" / "checkpoints" / "Dream.safetensors")


@pytest.mark.parametrize("make", [sd15, sdxl, *thorough(sd21)])
def test_a_checkpoint_in_a_comfy_folder_draws_offline_what_its_pipeline_draws(make, tmp_path, draw):
    torch.manual_seed(0)
    pipe = make(full=False)
    comfy(tmp_path / "ComfyUI", pipe)
    size = {"width": 64, "height": 64}
    opened = open_base(str(tmp_path / "ComfyUI" / "models" / "dream"), memory=CPU)
    assert type(opened.pipe) is type(pipe)
    assert torch.equal(draw(opened.pipe, **size), draw(pipe, **size))
    assert opened.pipe.unet.config.sample_size == pipe.unet.config.sample_size


@pytest.mark.parametrize("make", [flux, *thorough(sd3)])
def test_t5_is_read_with_the_tokenizer_beside_it(make, tmp_path, draw, monkeypatch):
    """diffusers' converter knows one width of Flux, 3072; here it cuts other widths in the same proportions."""
    torch.manual_seed(0)
    pipe = make(full=False)
    file = comfy(tmp_path / "ComfyUI", pipe)
    split = torch.split
    cut = lambda tensor, sizes, dim=0: split(tensor, [size * len(tensor) // sum(sizes) for size in sizes], dim)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(torch, "split", cut)
        opened = open_base(str(file), memory=CPU).pipe
    size = {"width": 32, "height": 32}
    torch.testing.assert_close(draw(opened, **size), draw(pipe, **size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [flux, *thorough(sd3)])
def test_a_transformer_alone_takes_the_parts_that_its_program_has(make, tmp_path, draw, monkeypatch):
    """Flux as people have it: the transformer, CLIP, T5 and the VAE are files of their own, and others lie beside them."""
    torch.manual_seed(0)
    pipe = make(full=False)
    whole = load_file(comfy(tmp_path, pipe))
    models = tmp_path / "models"
    names = {
        "text_encoders.clip_l.transformer.": "text_encoders/clip_l",
        "text_encoders.t5xxl.transformer.": "clip/t5xxl_fp16",
    }
    names |= {
        "text_encoders.clip_g.transformer.": "text_encoders/clip_g",
        "first_stage_model.": f"vae/{'ae' if make is flux else 'sd3_vae'}",
    }
    names |= {"model.diffusion_model.": "diffusion_models/flux"}
    (models / "checkpoints" / "Dream.safetensors").unlink()
    for keys, name in names.items():
        own = {key.removeprefix(keys): tensor for key, tensor in whole.items() if key.startswith(keys)}
        if own:
            (models / name).parent.mkdir(exist_ok=True)
            save_file(own, models / f"{name}.safetensors")
            save_file({"scaled_fp8": torch.ones(1), **own}, models / f"{name}_scaled.safetensors")
    (models / "diffusion_models" / "flux_scaled.safetensors").unlink()
    next((models / "vae").glob("*_scaled.safetensors")).unlink()
    save_file({"decoder.conv_in.weight": torch.ones(8, 4, 3, 3)}, models / "vae" / "of sd15.safetensors")
    split = torch.split
    cut = lambda tensor, sizes, dim=0: split(tensor, [size * len(tensor) // sum(sizes) for size in sizes], dim)  # noqa: E731
    with monkeypatch.context() as patched:
        patched.setattr(torch, "split", cut)
        opened = open_base(str(models), memory=CPU).pipe
    size = {"width": 32, "height": 32}
    torch.testing.assert_close(draw(opened, **size), draw(pipe, **size), atol=1e-5, rtol=0)
    (models / "vae").rename(tmp_path / "nothing")
    with pytest.raises(ValueError, match="flux.safetensors .* it lacks the VAE: take .* where your program has it"):
        open_base(str(models), memory=CPU)


def test_t5s_tokenizer_is_found_or_asked_for_in_one_sentence(tmp_path):
    torch.manual_seed(0)
    words, elsewhere = hosts.t5()[1], tmp_path / "elsewhere"
    alone = as_file(flux(full=False), tmp_path / "alone.safetensors")
    with pytest.raises(ValueError, match=r"alone.safetensors .* reads prompts with T5, whose .* give the folder") as error:
        open_base(str(alone), memory=CPU)
    assert "\n" not in str(error.value)
    elsewhere.mkdir()
    with pytest.raises(ValueError, match="elsewhere is neither a folder that diffusers saved nor one of T5's tokenizer"):
        open_base(str(alone), config=elsewhere, memory=CPU)
    with pytest.raises(ValueError, match="reads prompts with T5"):
        t5_folder(alone)
    for inside in (
        "forge/backend/huggingface/x/FLUX.1-dev/tokenizer_2",
        "Swarm/dlbackend/comfy/ComfyUI/comfy/text_encoders/",
    ):
        root = tmp_path / inside.partition("/")[0]
        folder = tmp_path / inside / ("t5_tokenizer" if inside.endswith("/") else "")
        words.save_pretrained(folder)
        (root / "Models").mkdir()
        link = root / "Models" / "flux.safetensors"
        link.symlink_to(alone)
        assert t5_folder(link) == folder  # of the program that has the link
        shutil.copy(alone, root / "Models" / "whole.safetensors")
        (tmp_path / f"{root.name}.safetensors").symlink_to(root / "Models" / "whole.safetensors")
        assert t5_folder(tmp_path / f"{root.name}.safetensors") == folder  # and of the one that has the file


def on_meta(make):
    """The pipeline of full size, without weights."""
    schedule = d.EulerDiscreteScheduler(**SD_NOISE)
    with pytest.MonkeyPatch.context() as patched, torch.device("meta"):
        patched.setattr(d, "EulerDiscreteScheduler", lambda **_: schedule)  # which counts at once
        return make(full=True)


def shapes_of(pipe):
    """The shapes that the file of a pipeline on the meta device would have."""
    found = {}

    def save(tensors, path, metadata):
        found.update({key: tuple(tensor.shape) for key, tensor in tensors.items()})

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("single_file.save_file", save)
        as_file(pipe, "nowhere")
    return found


@pytest.mark.parametrize("make", [sd15, sd21, sdxl, sd3, flux])
def test_published_sizes_are_read_from_the_shapes(make):
    shapes = shapes_of(pipe := on_meta(make))
    read = json.loads(json.dumps(configs(shapes, checkpoint_kind(shapes, "x"))))
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    assert set(read) == set(parts)
    for name, part in parts.items():
        written = read[name]
        own = part.config.to_dict() if hasattr(part.config, "to_dict") else dict(part.config)
        as_lists = {key: list(value) if isinstance(value, tuple) else value for key, value in own.items()}
        ours = {key: value for key, value in written.items() if not key.startswith("_") and key != "architectures"}
        ours |= {"sample_size": as_lists["sample_size"]} if name == "vae" else {}  # for tiles alone
        theirs = {key: as_lists[key] for key in ours if key in as_lists}
        if name == "unet" and isinstance(theirs["transformer_layers_per_block"], int):
            ours.pop("transformer_layers_per_block"), theirs.pop("transformer_layers_per_block")
        assert ours == theirs | {key: "clip_text_model" for key in ours if key == "model_type" and "clip" in ours[key]}


@pytest.mark.thorough
@pytest.mark.parametrize("make", [sd15, sdxl])
def test_checkpoints_of_full_size_open_offline(make, tmp_path):
    """Random weights: a block of them again and again, since drawing billions takes minutes."""
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16) * 0.02
    pipe = on_meta(make)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16).to_empty(device="cpu")
            for weight in part.state_dict().values():
                if weight.is_floating_point():
                    flat = weight.view(-1)
                    for start in range(0, len(flat), len(block)):
                        flat[start : start + len(block)] = block[: len(flat) - start]
                else:
                    weight.copy_(torch.arange(weight.numel()).view(weight.shape))
    comfy(tmp_path / "ComfyUI", pipe)
    key, weight = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight", pipe.unet.config.cross_attention_dim
    wanted = pipe.unet.state_dict()[key].clone()
    del pipe
    opened = open_base(str(tmp_path / "ComfyUI" / "models"), memory=Memory("cpu", "bfloat16")).pipe
    assert torch.equal(opened.unet.state_dict()[key], wanted)
    assert wanted.shape[1] == weight
    drawn = opened("a fox", num_inference_steps=1, width=128, height=128, output_type="np").images[0]
    assert drawn.shape == (128, 128, 3)


def test_what_a_file_says_that_it_predicts_counts():
    says_v, says_noise = {"modelspec.prediction_type": "v"}, {"modelspec.prediction_type": "epsilon"}
    told = [
        scheduler(shapes, said, kind).config
        for kind, said, shapes in [
            ("v1", {}, {}), ("v1", says_v, {}), ("v2", {}, {}), ("v2", says_noise, {}), ("xl_base", {}, {}),
            ("xl_base", {}, {"v_pred": (0,), "ztsnr": (0,)}),
        ]
    ]  # fmt: skip
    kinds = ["epsilon", "v_prediction", "v_prediction", "epsilon", "epsilon", "v_prediction"]
    assert [config.prediction_type for config in told] == kinds
    assert [config.get("rescale_betas_zero_snr", False) for config in told[-2:]] == [False, True]


def test_the_vocabulary_is_clips():
    theirs = pytest.importorskip("open_clip").tokenizer.SimpleTokenizer()
    ours = clip_tokenizer()
    for text in ("a koala's café, 2 dogs!! hello-world", "(long hair:1.2), don't I'll 😀", "Ünïcödé ñandú 日本語"):
        assert ours(text).input_ids == [49406, *theirs.encode(text), 49407]
    assert [clip_tokenizer(pad=pad).pad_token_id for pad in ("!", "<|endoftext|>")] == [0, 49407]


def test_a_checkpoint_that_is_built_in_another_way_is_refused_in_one_sentence(tmp_path):
    torch.manual_seed(0)
    whole = load_file(as_file(sd15(full=False), tmp_path / "whole.safetensors"))
    key = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
    for change, message in [
        ({"first_stage_model": None}, "broken.safetensors .*: it lacks the VAE: take a checkpoint with text encoders"),
        ({"cond_stage_model": None}, "broken.safetensors .*: it lacks the text_encoder: take"),
        ({"model.diffusion_model.out.2": None}, "broken.safetensors .*: it is built in another way .*out.2.weight"),
        ({"model.diffusion_model.out.0": None}, "broken.safetensors .*: some of its weights are missing"),
        (
            {key: torch.zeros(7, 64)},
            "broken.safetensors .*: its text_encoder knows 7 tokens, and CLIP's",
        ),
        ({"first_stage_model.encoder.conv_in.weight": torch.zeros(1, 1, 1, 1)}, "broken.safetensors cannot be opened as a"),
        ({"model.diffusion_model.out.2.weight": torch.zeros(0, 1 << 40)}, "broken.safetensors cannot be opened as a"),
    ]:
        left = {k: w for k, w in whole.items() if not any(v is None and k.startswith(start) for start, v in change.items())}
        save_file(left | {k: w for k, w in change.items() if w is not None}, tmp_path / "broken.safetensors")
        with pytest.raises(ValueError, match=message) as error:
            open_base(str(tmp_path / "broken.safetensors"), memory=CPU)
        assert "\n" not in str(error.value)
    assert SimpleNamespace(**bases_in(tmp_path)).whole.name == "whole.safetensors"
