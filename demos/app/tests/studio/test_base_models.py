"""What `--base` opens: checkpoint files, folders and models folders; and how a pipeline is put on a machine."""

import math
import re
import shutil
from functools import partial

import hosts
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from single_file import save_single_file, save_transformer_file
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole
from mole_app.studio.base_models import checkpoint_kind, open_base
from mole_app.studio.memory import Memory, place
from mole_app.studio.model_folders import bases_in, find_base
from mole_diffusers import MoLEPipeline

GB = 1 << 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved pipeline as `saved`, its weights as one file, and the same folder without weights as `config`."""
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder / "saved")
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(folder / "saved", folder / "config", ignore=ignored)
    save_single_file(tiny_pipeline(), folder / "Dream.safetensors")
    return folder


@pytest.fixture
def models(folder, tmp_path):
    """Forge's folder with three checkpoints, two of one name."""
    root = tmp_path / "forge"
    for name in ("Dream", "other/Dream", "Toon"):
        path = root / "models" / "Stable-diffusion" / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(folder / "Dream.safetensors") if name != "Toon" else shutil.copy(folder / "Dream.safetensors", path)
    return root


def test_a_checkpoint_file_draws_what_its_pipeline_draws(folder, draw):
    wanted = draw(tiny_pipeline())
    opened = open_base(str(folder / "Dream.safetensors"), config=folder / "config", memory=Memory(device="cpu"))
    assert torch.equal(draw(opened.pipe), wanted)
    assert str(opened).endswith("Dream.safetensors: StableDiffusionPipeline, cpu, float32")
    assert torch.equal(draw(open_base(str(folder / "saved"), memory=Memory(device="cpu")).pipe), wanted)


def sdxl():
    """Its text encoders differ in width, and the second is as deep as a checkpoint of SDXL is known by."""
    pipe, _ = hosts.HOSTS["sdxl"]()
    torch.manual_seed(0)
    second = pipe.text_encoder_2.config
    second.update({"num_hidden_layers": 10, "hidden_size": 24})
    pipe.register_modules(text_encoder=hosts.text(width=8), text_encoder_2=type(pipe.text_encoder_2)(second).eval())
    return pipe


def sd21():
    """As wide in its text as a checkpoint of 2.1 is known by."""
    shape = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "layers_per_block": 2}
    shape |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "cross_attention_dim": 1024}
    torch.manual_seed(0)
    encoder = hosts.text(width=1024, activation="gelu")
    host = hosts.unet(**shape, use_linear_projection=True)
    return hosts.sd(host=host, encoder=encoder, scheduler=hosts.noise(clip_sample=False, prediction_type="v_prediction"))


@pytest.mark.parametrize("make", [sdxl, *thorough(sd21)])
def test_checkpoints_of_other_kinds_draw_what_their_pipelines_draw(make, tmp_path, draw):
    pipe = make()
    pipe.save_pretrained(tmp_path / "config")
    for weights in (tmp_path / "config").rglob("*.safetensors"):
        weights.unlink()
    file = save_single_file(pipe, tmp_path / "one.safetensors")
    opened = open_base(str(file), config=tmp_path / "config", memory=Memory(device="cpu"))
    assert type(opened.pipe) is type(pipe)
    assert torch.equal(draw(opened.pipe), draw(pipe))


def sd3(t5):
    """As deep as a checkpoint of 3.5 Large is known by; its text encoders differ in width, the first projects nothing."""
    torch.manual_seed(0)
    pipe, _ = hosts.HOSTS["sd3"]()
    encoder, words = hosts.t5(32) if t5 else (None, None)
    shape = {**pipe.transformer.config, "num_layers": 38, "dual_attention_layers": (0, 1), "joint_attention_dim": 32}
    first = hosts.text(type(pipe.text_encoder))
    first.text_projection.weight.data = torch.eye(16)
    second = hosts.text(type(pipe.text_encoder), width=8, projected=16, activation="gelu")
    parts = {"transformer": type(pipe.transformer)(**shape).eval(), "text_encoder": first, "text_encoder_2": second}
    pipe.register_modules(**parts, text_encoder_3=encoder, tokenizer_3=words)
    return pipe


def flux(guided):
    """Its guidance is read, as that of FLUX.1 dev, or not."""
    pipe, _ = hosts.HOSTS["flux"]()
    torch.manual_seed(0)
    kind = type(pipe.transformer)
    pipe.register_modules(transformer=kind(**{**pipe.transformer.config, "guidance_embeds": guided}).eval())
    return pipe


MADE = [(sd3, True), *thorough((flux, True), (sd3, False), (flux, False))]


@pytest.mark.parametrize(("make", "option"), MADE)
def test_checkpoints_of_transformers_draw_what_their_pipelines_draw(make, option, tmp_path, draw, monkeypatch):
    """diffusers' converter knows one width of Flux, 3072; here it cuts other widths in the same proportions."""
    pipe = make(option)
    pipe.save_pretrained(tmp_path / "config")
    for weights in (tmp_path / "config").rglob("*.safetensors"):
        weights.unlink()
    file = save_transformer_file(pipe, tmp_path / "one.safetensors")
    split = torch.split
    with monkeypatch.context() as patched:
        cut = lambda tensor, sizes, dim=0: split(tensor, [size * len(tensor) // sum(sizes) for size in sizes], dim)  # noqa: E731
        patched.setattr(torch, "split", cut)
        opened = open_base(str(file), config=tmp_path / "config", memory=Memory(device="cpu", dtype="float32"))
    assert type(opened.pipe) is type(pipe)
    torch.testing.assert_close(draw(opened.pipe), draw(pipe), atol=1e-5, rtol=0)
    assert torch.equal(draw(opened.pipe), draw(opened.pipe))


def test_a_models_folder_has_its_models_by_name(models, folder):
    names = ["Toon", "models/Stable-diffusion/Dream", "models/Stable-diffusion/other/Dream"]
    assert list(bases_in(models)) == names
    assert list(bases_in(folder)) == ["Dream", "config", "saved"]
    assert find_base(f"{models}/TOON").name == "Toon.safetensors"
    with pytest.raises(ValueError, match="is a folder of models; add the name of one of its 3 models: Toon, models/Stable"):
        find_base(str(models))
    with pytest.raises(ValueError, match=r"no model 'tune' in .*forge; known: Toon, models/Stable"):
        find_base(f"{models}/tune")
    alone = models / "alone"
    alone.mkdir()
    with pytest.raises(ValueError, match="is a folder of models; it has no .safetensors checkpoint"):
        find_base(str(alone))
    tiny_lora(tiny_pipeline(), alone / "fox.safetensors")
    with pytest.raises(ValueError, match="is a folder of models; it has no .safetensors checkpoint"):
        find_base(str(alone))  # a LoRA is none
    shutil.copy(folder / "Dream.safetensors", alone)
    assert find_base(str(alone)) == alone / "Dream.safetensors"


def test_folders_that_are_links_have_models_too(models, folder):
    inside = models / "models" / "Stable-diffusion"
    (inside / "drive").symlink_to(folder)
    (inside / "other" / "round").symlink_to(inside)
    found = bases_in(models)
    assert found["saved"] == inside / "drive" / "saved"
    assert found["models/Stable-diffusion/drive/Dream"] == inside / "drive" / "Dream.safetensors"
    assert len(found) == 6


def test_what_is_no_base_model_is_said_in_one_sentence(folder, models, tmp_path, monkeypatch):
    torch.save({"a": torch.ones(1)}, tmp_path / "old.ckpt")
    (tmp_path / "page.safetensors").write_text("<html>")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(1, 1)}, tmp_path / "lora.safetensors")
    save_single_file(tiny_pipeline(), tmp_path / "half.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for base, message in [
        (tmp_path / "old.ckpt", "old.ckpt is a zip archive, as PyTorch's pickle files are, which can run code"),
        (tmp_path / "page.safetensors", "is an HTML page"),
        (tmp_path / "lora.safetensors", "lora.safetensors is not a checkpoint of Stable Diffusion .*: it has no denoiser"),
        (tmp_path / "half.safetensors", "its text_encoder knows 138 tokens, and CLIP's vocabulary has 49408: give --base"),
        (tmp_path / "missing.ckpt", "no model 'missing.ckpt' in"),
        ("dreamshaper", "'dreamshaper' is no file or folder here, and not a hub id such as OWNER/NAME"),
        ("somebody/dreamshaper", "somebody/dreamshaper cannot be opened as a base model: the hub has no such"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            open_base(str(base), memory=Memory(device="cpu"))
        assert "\n" not in str(error.value)
    weights = load_file(folder / "Dream.safetensors")
    weights = {k: v for k, v in weights.items() if not k.startswith("cond_stage_model")}
    save_file(weights, tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match="this machine has no device 'nowhere': "):
        open_base(str(folder / "saved"), memory=Memory(device="nowhere"))
    with pytest.raises(ValueError, match="bare.safetensors .*: it lacks the text_encoder: take a checkpoint with text enc"):
        open_base(str(tmp_path / "bare.safetensors"), config=folder / "config")


@pytest.mark.parametrize("index", ["{}", "[]", '{"_class_name": ["x"]}'])
def test_an_index_without_a_class_is_one_error_for_every_way_to_open_it(tmp_path, index):
    (tmp_path / "model_index.json").write_text(index)
    for load in (partial(open_base, memory=Memory(device="cpu")), MoLEPipeline.from_pretrained):
        with pytest.raises(ValueError, match=f"{tmp_path} is no saved pipeline: its model_index.json must name"):
            load(str(tmp_path))


UNET, FLUX = "model.diffusion_model.input_blocks.", "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale"


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("v1", {f"{UNET}0.0.weight": (320, 4, 3, 3)}),
        ("v2", {f"{UNET}2.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}),
        (
            "xl_base",
            {
                f"{UNET}0.0.weight": (320, 4, 3, 3),
                "conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias": (1280,),
            },
        ),
        (
            "sd3",
            {
                "model.diffusion_model.joint_blocks.0.context_block.adaLN_modulation.1.bias": (9216,),
                "model.diffusion_model.pos_embed": (1, 36864, 1536),
            },
        ),
        ("flux-schnell", {FLUX: (128,)}),
        (
            "flux-dev",
            {
                FLUX: (128,),
                "model.diffusion_model.guidance_in.in_layer.bias": (3072,),
                "model.diffusion_model.img_in.weight": (3072, 64),
            },
        ),
    ],
)
def test_the_kind_of_a_checkpoint_is_in_its_shapes(kind, shapes):
    assert checkpoint_kind(shapes, "x") == kind


def test_a_checkpoint_of_another_kind_is_named():
    with pytest.raises(ValueError, match="x is not a checkpoint of .*: it looks like inpainting"):
        checkpoint_kind({f"{UNET}0.0.weight": (320, 9, 3, 3)}, "x")


def test_memory_is_chosen_by_what_the_machine_has():
    sizes = [5 * GB, 2 * GB, GB]
    asked = Memory("cuda").completed("StableDiffusionXLPipeline")
    assert [str(asked.fitted(sizes, free * GB)) for free in (14, 12, 8, 4)] == [
        "cuda, float16",
        "cuda, float16, VAE tiling",
        "cuda, float16, model offload, VAE tiling",
        "cuda, float16, sequential offload, VAE tiling",
    ]
    assert str(Memory("cuda").completed("FluxPipeline").fitted(sizes, math.inf)) == "cuda, bfloat16"
    own = Memory("cuda", dtype="bfloat16", offload="model", tiling=False, slicing=True, compiled=True)
    own = own.completed("StableDiffusionPipeline")
    assert str(own.fitted(sizes, 80 * GB)) == "cuda, bfloat16, model offload, attention slicing, compiled"
    assert str(Memory(device="cpu").completed("FluxPipeline").fitted(sizes, math.inf)) == "cpu, float32"
    with pytest.raises(ValueError, match="unknown dtype 'int8'; known: float32, float16, bfloat16"):
        Memory(dtype="int8")
    with pytest.raises(ValueError, match="offload 'model' keeps what is not used off the GPU, and there is none"):
        Memory(device="cpu", offload="model").completed("StableDiffusionPipeline")


def test_slicing_and_tiling_and_bfloat16_reach_the_pipeline(folder, draw):
    wanted = draw(tiny_pipeline())
    memory = Memory(device="cpu", slicing=True, tiling=True)
    pipe = open_base(str(folder / "saved"), memory=memory).pipe
    assert pipe.vae.use_tiling
    assert torch.allclose(draw(pipe), wanted, atol=1e-4)
    half = open_base(str(folder / "Dream.safetensors"), config=folder / "config", memory=Memory("cpu", "bfloat16")).pipe
    assert {model.dtype for model in (half.unet, half.vae, half.text_encoder)} == {torch.bfloat16}


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_offloading_draws_the_same(draw, offload):
    """The CPU plays the GPU."""
    wanted, pipe = draw(tiny_pipeline()), tiny_pipeline()
    if offload == "sequential":  # accelerate takes "cpu" and diffusers' "cpu:0" for two devices
        pipe.enable_sequential_cpu_offload = lambda device: hosts.OFFLOADS["sequential"](pipe)
    place(pipe, Memory("cpu", "float32", offload))
    assert hasattr(pipe.unet, "_hf_hook")
    assert torch.equal(draw(pipe), wanted)


@pytest.mark.thorough
def test_compiled_draws_the_same_and_bound(draw, loras):
    pipes, pictures = (tiny_pipeline(), tiny_pipeline()), []
    place(pipes[0], Memory("cpu", "float32", compiled=True))
    assert any(getattr(module, "_compiled_call_impl", None) for module in pipes[0].unet.modules())
    for pipe in pipes:
        plain = draw(pipe)
        mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]}, binding={"fox": ("fox", "left"), "ink": "ink"})
        pictures.append(torch.stack([plain, draw(pipe)]))
    assert torch.allclose(*pictures, atol=1e-3)


def test_names_of_many_are_not_listed():
    from mole_app.studio.names import known_names

    many = [f"lora {i}" for i in range(500)]
    assert re.fullmatch(r"closest of 500: lora 7(, lora \d+){4}", known_names("LORA 7", many))
    assert known_names("zzz", many) == "none of the 500 is like it"
