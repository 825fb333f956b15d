"""LoRA files as they circulate, on each kind of pipeline: the weights, and what the denoiser makes of them, are those that
diffusers' own loading gives. The names of the layers are written by hand.
"""

from copy import deepcopy

import diffusers as d
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn

import mole_diffusers as mole
from mole_app.studio.catalog import family_of_file
from mole_diffusers import RefusedFileError, models_of
from mole_diffusers.lora import layer_key, match, read_expert, save_expert, with_host_names
from mole_diffusers.pipelines.kept import attach_kept, keep
from tests import hosts


def random(*shape, seed=[0]):  # noqa: B006
    seed[0] += 1
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed[0])) * 0.3


# ---- the pipelines; where no text is encoded, text encoder and VAE are left out


def sdxl():
    return hosts.sdxl()


def qwen():
    torch.manual_seed(0)
    shape = {"num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 16}
    model = d.QwenImageTransformer2DModel(**shape, in_channels=16, out_channels=4, axes_dims_rope=(8, 4, 4)).eval()
    return d.QwenImagePipeline(hosts.flow(), None, None, None, model)


def flux2():
    torch.manual_seed(0)
    shape = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2}
    model = d.Flux2Transformer2DModel(**shape, in_channels=4, joint_attention_dim=16, axes_dims_rope=(4, 4, 4, 4)).eval()
    return d.Flux2KleinPipeline(hosts.flow(), None, None, None, model)


PIPELINES = {
    "sdxl": sdxl, "sd3": hosts.sd3, "flux": hosts.flux, "chroma": hosts.chroma, "flux2": flux2, "qwen": qwen,
    "z_image": hosts.z_image, "wan": hosts.wan, "krea2": hosts.krea2, "lumina2": hosts.lumina2, "ltx": hosts.ltx,
    "hidream": hosts.hidream, "anima": hosts.anima,
}  # fmt: skip
GRID = torch.tensor([[0, row, column] for row in range(2) for column in range(2)])
NOISE_LEVEL = torch.tensor([0.5])
DENOISER_INPUTS = {
    "flux2": {
        "hidden_states": random(1, 4, 4), "encoder_hidden_states": random(1, 3, 16), "timestep": NOISE_LEVEL,
        "img_ids": nn.functional.pad(GRID, (0, 1)), "txt_ids": torch.zeros(3, 4), "guidance": torch.ones(1),
    },
    "qwen": {
        "hidden_states": random(1, 4, 16), "encoder_hidden_states": random(1, 3, 16), "timestep": NOISE_LEVEL,
        "encoder_hidden_states_mask": torch.ones(1, 3).long(), "img_shapes": [[(1, 2, 2)]],
    },
}  # fmt: skip

# ---- the files: form -> (prefix of a key, ending of down and up, file's name of a layer -> the host's layers)

AB, DOWN_UP, DOTTED = (
    ("lora_A.weight", "lora_B.weight"),
    ("lora_down.weight", "lora_up.weight"),
    ("lora.down.weight", "lora.up.weight"),
)
NAMED, PLAIN = ("lora_A.default.weight", "lora_B.default.weight"), ("down.weight", "up.weight")


def same(*layers):
    return {layer: (layer,) for layer in layers}


def flat(layers):
    return {name.replace(".", "_"): targets for name, targets in layers.items()}


XL = "down_blocks.1.attentions.0.transformer_blocks"
ATTENTION = "text_model.encoder.layers.{}.self_attn.{}_proj"
IN_TEXT_ENCODERS = [
    *(f"text_encoder.{ATTENTION.format(0, x)}" for x in ("q", "out")),
    *(f"text_encoder_2.{ATTENTION.format(1, x)}" for x in ("k", "out")),
]
SDXL = same(
    f"unet.{XL}.0.attn1.to_q",
    f"unet.{XL}.1.attn2.to_k",
    f"unet.{XL}.1.ff.net.0.proj",
    "unet.down_blocks.1.attentions.0.proj_in",
    "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    *IN_TEXT_ENCODERS,
)
KOHYA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}


def kohya_sdxl(layer):
    part, _, name = layer.partition(".")
    return f"{KOHYA_PARTS[part]}_{name.replace('.', '_')}"


SD3 = same(
    "transformer.transformer_blocks.0.attn.to_q",
    "transformer.transformer_blocks.0.attn.add_k_proj",
    "transformer.transformer_blocks.0.attn2.to_v",
    "transformer.transformer_blocks.1.attn.to_out.0",
    "transformer.transformer_blocks.0.ff.net.0.proj",
    *IN_TEXT_ENCODERS,
)
IN_BOTH_STREAMS = {
    "double_blocks.0.img_attn.qkv": tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"),
    "double_blocks.0.txt_attn.qkv": tuple(f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn.to_out.0",),
    "double_blocks.0.txt_attn.proj": ("transformer_blocks.0.attn.to_add_out",),
}
# diffusers splits Flux's linear1 only at its full width; test_formats.py has it
CHROMA = IN_BOTH_STREAMS | {
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.net.0.proj",),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.net.2",),
    "single_blocks.1.linear2": ("single_transformer_blocks.1.proj_out",),
}
FLUX = CHROMA | {
    "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1.linear",),
    "double_blocks.0.txt_mod.lin": ("transformer_blocks.0.norm1_context.linear",),
    "single_blocks.1.modulation.lin": ("single_transformer_blocks.1.norm.linear",),
}
FLUX_XLABS = {
    "double_blocks.0.processor.qkv_lora1": IN_BOTH_STREAMS["double_blocks.0.img_attn.qkv"],
    "double_blocks.0.processor.qkv_lora2": IN_BOTH_STREAMS["double_blocks.0.txt_attn.qkv"],
    "double_blocks.0.processor.proj_lora1": ("transformer_blocks.0.attn.to_out.0",),
    "double_blocks.0.processor.proj_lora2": ("transformer_blocks.0.attn.to_add_out",),
    "single_blocks.1.processor.qkv_lora": tuple(f"single_transformer_blocks.1.attn.to_{x}" for x in "qkv"),
    "single_blocks.1.processor.proj_lora": ("single_transformer_blocks.1.proj_out",),
}
FLUX_DIFFUSERS = same(
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.add_v_proj", "transformer_blocks.0.ff.net.2",
    "single_transformer_blocks.0.attn.to_k", "single_transformer_blocks.1.proj_mlp", "single_transformer_blocks.1.proj_out",
)  # fmt: skip
FLUX2_KOHYA = IN_BOTH_STREAMS | {
    "double_blocks.0.img_mlp.0": ("transformer_blocks.0.ff.linear_in",),
    "double_blocks.0.txt_mlp.2": ("transformer_blocks.0.ff_context.linear_out",),
    "single_blocks.1.linear1": ("single_transformer_blocks.1.attn.to_qkv_mlp_proj",),
    "single_blocks.1.linear2": ("single_transformer_blocks.1.attn.to_out",),
    "img_in": ("x_embedder",),
}
FLUX2 = FLUX2_KOHYA | {
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
}
QWEN = same(
    "transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0", "transformer_blocks.1.attn.add_q_proj",
    "transformer_blocks.1.attn.to_add_out", "transformer_blocks.0.img_mlp.net.0.proj", "transformer_blocks.0.txt_mlp.net.2",
    "transformer_blocks.1.img_mod.1", "img_in", "txt_in", "proj_out", "norm_out.linear",
    "time_text_embed.timestep_embedder.linear_2",
)  # fmt: skip
Z_IMAGE = same(
    "layers.0.attention.to_q", "layers.1.attention.to_out.0", "layers.0.feed_forward.w1", "layers.1.adaLN_modulation.0",
    "noise_refiner.0.attention.to_k", "context_refiner.0.feed_forward.w2", "all_x_embedder.2-1", "cap_embedder.1",
    "all_final_layer.2-1.linear", "t_embedder.mlp.0",
)  # fmt: skip
Z_IMAGE_FUSED = {
    "layers.0.attention.qkv": tuple(f"layers.0.attention.to_{x}" for x in "qkv"),
    "layers.0.attention.out": ("layers.0.attention.to_out.0",),
    "layers.1.feed_forward.w3": ("layers.1.feed_forward.w3",),
    "noise_refiner.0.attention.out": ("noise_refiner.0.attention.to_out.0",),
}
WAN = {
    f"blocks.{i}.{old}": (f"blocks.{i}.{new}",)
    for i in range(2)
    for old, new in {
        **{f"self_attn.{a}": f"attn1.{b}" for a, b in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
        **{f"cross_attn.{a}": f"attn2.{b}" for a, b in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"), strict=True)},
        "ffn.0": "ffn.net.0.proj",
        "ffn.2": "ffn.net.2",
    }.items()
}
KREA2 = {
    "blocks.0.attn.wq": ("transformer_blocks.0.attn.to_q",),
    "blocks.0.attn.wo": ("transformer_blocks.0.attn.to_out.0",),
    "blocks.0.attn.gate": ("transformer_blocks.0.attn.to_gate",),
    "blocks.0.mlp.gate": ("transformer_blocks.0.ff.gate",),
    "txtfusion.refiner_blocks.0.attn.wv": ("text_fusion.refiner_blocks.0.attn.to_v",),
    "txtfusion.projector": ("text_fusion.projector",),
    "first": ("img_in",),
}
LUMINA2 = same(
    "layers.0.attn.to_q", "layers.1.attn.to_out.0", "layers.0.feed_forward.linear_1", "layers.1.norm1.linear",
    "noise_refiner.0.attn.to_k", "context_refiner.0.feed_forward.linear_2",
)  # fmt: skip
LTX = same(
    "transformer_blocks.0.attn1.to_q", "transformer_blocks.0.attn2.to_k", "transformer_blocks.1.attn1.to_out.0",
    "transformer_blocks.1.ff.net.0.proj", "transformer_blocks.1.ff.net.2",
)  # fmt: skip
HIDREAM = same(
    "double_stream_blocks.0.block.attn1.to_q", "double_stream_blocks.0.block.attn1.to_out_t",
    "double_stream_blocks.0.block.ff_t.w1", "single_stream_blocks.1.block.attn1.to_out",
    "single_stream_blocks.0.block.ff_i.shared_experts.w2", "single_stream_blocks.1.block.adaLN_modulation.1",
)  # fmt: skip
ANIMA = {
    "blocks.0.self_attn.q_proj": ("transformer_blocks.0.attn1.to_q",),
    "blocks.0.cross_attn.k_proj": ("transformer_blocks.0.attn2.to_k",),
    "blocks.1.self_attn.output_proj": ("transformer_blocks.1.attn1.to_out.0",),
    "blocks.1.mlp.layer2": ("transformer_blocks.1.ff.net.2",),
    "blocks.1.adaln_modulation_mlp.2": ("transformer_blocks.1.norm3.linear_2",),
}
FILES = {  # host -> {form: (prefix, endings, layers)}
    "sdxl": {
        "peft": ("", AB, SDXL),
        "kohya": ("", DOWN_UP, {kohya_sdxl(layer): targets for layer, targets in SDXL.items()}),
        "diffusers": ("", DOTTED, {layer: targets for layer, targets in SDXL.items() if layer.startswith("unet.")}),
    },
    "sd3": {"ai-toolkit": ("", AB, SD3)},
    "flux": {
        "ai-toolkit": ("transformer.", AB, FLUX_DIFFUSERS),
        "kohya": ("lora_unet_", DOWN_UP, flat(FLUX)),
        "ComfyUI": ("diffusion_model.", DOWN_UP, FLUX),
        "XLabs": ("", PLAIN, FLUX_XLABS),
    },
    "chroma": {"kohya": ("lora_unet_", DOWN_UP, flat(CHROMA)), "ai-toolkit": ("transformer.", AB, FLUX_DIFFUSERS)},
    "flux2": {
        "ai-toolkit": ("diffusion_model.", AB, FLUX2),
        "kohya": ("lora_unet_", DOWN_UP, flat(FLUX2_KOHYA)),
        "peft": ("base_model.model.", AB, FLUX2),
        "diffusers": ("transformer.", AB, {t: (t,) for targets in FLUX2.values() for t in targets}),
    },
    "qwen": {
        "ai-toolkit": ("diffusion_model.", AB, QWEN),
        "kohya": ("lora_unet_", DOWN_UP, flat(QWEN)),
        "diffusers": ("transformer.", AB, QWEN),
        "named adapter": ("", NAMED, QWEN),
    },
    "z_image": {
        "ai-toolkit": ("diffusion_model.", AB, Z_IMAGE),
        "kohya": ("lora_unet_", DOWN_UP, flat(Z_IMAGE)),
        "fused": ("lora_unet_", DOWN_UP, flat(Z_IMAGE_FUSED)),
        "diffusers": ("transformer.", AB, Z_IMAGE),
        "named adapter": ("", NAMED, Z_IMAGE),
    },
    "wan": {
        "ai-toolkit": ("diffusion_model.", AB, WAN),
        "kohya": ("lora_unet_", DOWN_UP, flat(WAN)),
        "ComfyUI": ("diffusion_model.", DOWN_UP, WAN),
        "diffusers": ("transformer.", AB, {t: (t,) for targets in WAN.values() for t in targets}),
    },
    "krea2": {"ai-toolkit": ("base_model.model.", AB, KREA2), "ComfyUI": ("diffusion_model.", AB, KREA2)},
    "lumina2": {"diffusers": ("transformer.", AB, LUMINA2)},  # others are converted at full width alone
    "ltx": {"diffusers": ("transformer.", AB, LTX), "ComfyUI": ("diffusion_model.", AB, LTX)},
    "anima": {
        "ComfyUI": ("diffusion_model.", AB, ANIMA),
        "diffusers": ("transformer.", AB, {t: (t,) for targets in ANIMA.values() for t in targets}),
    },
    "hidream": {"ai-toolkit": ("diffusion_model.", AB, HIDREAM), "diffusers": ("transformer.", AB, HIDREAM)},
}  # fmt: skip
GATE_TYPES = {"flux": "Flux", "flux2": "Flux.2", "qwen": "Qwen-Image", "z_image": "Z-Image", "wan": "Wan", "krea2": "Krea 2"}
GATE_TYPES |= {"lumina2": "Lumina 2", "hidream": "HiDream", "anima": "Anima"}
CASES = [(host, form, not i) for host, forms in FILES.items() for i, form in enumerate(forms)]


def weight_of(pipe, layer):
    part, _, name = layer.partition(".")
    part, name = (part, name) if part in models_of(pipe) else ("transformer", layer)
    modules = {layer_key(n): module for n, module in models_of(pipe)[part].named_modules()}
    return modules[layer_key(name)].weight


def write(pipe, form, path, *, rank=2):
    """A file of a form; alphas are those of kohya's trainer."""
    prefix, (down, up), layers = form
    tensors = {}
    for name, targets in layers.items():
        weights = [weight_of(pipe, target) for target in targets]
        tensors[f"{prefix}{name}.{down}"] = random(rank, *weights[0].shape[1:])
        tensors[f"{prefix}{name}.{up}"] = random(sum(map(len, weights)), rank, *(1,) * (weights[0].dim() - 2))
        if down == DOWN_UP[0]:
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)
    return path


def loaded_by_diffusers(pipe):
    """Part and module -> the change of weight of the LoRA that diffusers has loaded."""
    return {
        (part, name): module.get_delta_weight("x").detach()
        for part, model in models_of(pipe).items()
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    }


def matched(path, pipe, **options):
    models = models_of(pipe)
    return match(with_host_names(read_expert(path, **options), pipe, models), models)


@pytest.fixture(scope="module")
def pipelines():
    made = {}

    def of(host):
        if host not in made:
            pipe = PIPELINES[host]()
            made[host] = pipe[0] if isinstance(pipe, tuple) else pipe
        return made[host]

    return of


@pytest.mark.parametrize(
    ("host", "form"),
    [pytest.param(host, form, marks=() if first else pytest.mark.thorough) for host, form, first in CASES],
)
@pytest.mark.shows(
    "LoRA files of each kind",
    "XLabs, Flux",
    "newer transformers",
)
def test_a_file_gives_the_weights_and_the_picture_that_diffusers_gives(pipelines, tmp_path, host, form):
    pipe = pipelines(host)
    path = write(pipe, FILES[host][form], tmp_path / "x.safetensors")
    plain = see(pipe, host)
    try:
        pipe.load_lora_weights(path, adapter_name="x")
        theirs, seen = loaded_by_diffusers(pipe), see(pipe, host)
    finally:
        pipe.unload_lora_weights()
    found = matched(path, pipe)
    assert not found.unmatched
    ours = {(part, name): weights.delta() for part, layers in found.layers.items() for name, weights in layers.items()}
    assert ours.keys() == theirs.keys()
    assert len(ours) == sum(map(len, FILES[host][form][2].values()))
    for key, delta in theirs.items():
        torch.testing.assert_close(ours[key].reshape(delta.shape), delta, msg=lambda m, key=key: f"{key}: {m}")
    if seen is not None:
        assert (seen - plain).abs().max() > 1e-3
        mole.attach(pipe, {"x": path}, "sum", binding=None)
        try:
            torch.testing.assert_close(see(pipe, host), seen, atol=1e-5, rtol=0)
        finally:
            mole.detach(pipe)


SHORT = ("flux", "chroma", "z_image", "wan", "krea2", "lumina2", "ltx", "hidream", "anima")
OPTIONS = {name: hosts.SIZE | {"max_sequence_length": 32} for name in SHORT}
OPTIONS["wan"]["num_frames"] = 5
OPTIONS["ltx"]["num_frames"] = 9


@torch.no_grad()
def see(pipe, host):
    """What a pipeline draws, or its denoiser gives; None for hosts that experts cannot be attached to."""
    if host in DENOISER_INPUTS:
        return pipe.transformer(**DENOISER_INPUTS[host], return_dict=False)[0]
    if host in hosts.HOSTS:
        return hosts.draw(pipe, OPTIONS.get(host, {}), steps=1)
    return None


# ---- the family of a file


@pytest.mark.parametrize("host", GATE_TYPES)
def test_the_family_is_known_by_the_names_of_layers_from_the_header_alone_too(pipelines, tmp_path, host):
    for form in FILES[host].keys() - {"fused"}:  # Z-Image and Lumina 2 have the same original names
        path = write(pipelines(host), FILES[host][form], tmp_path / form)
        assert read_expert(path).base == family_of_file(path) == GATE_TYPES[host]


@pytest.mark.parametrize("host", GATE_TYPES)
@pytest.mark.shows("LoRA files of each kind")
def test_a_file_of_another_family_is_refused_in_one_sentence(pipelines, tmp_path, host):
    for other, family in GATE_TYPES.items():
        path = write(pipelines(other), next(iter(FILES[other].values())), tmp_path / "x.safetensors")
        pipe, said = (
            pipelines(host),
            rf"'x' \(.*, {family}\): it is made for {family} and this pipeline is {GATE_TYPES[host]}$",
        )
        if other != host:
            with pytest.raises(RefusedFileError, match=said):
                matched(path, pipe)


def test_a_file_for_stable_diffusion_1_5_is_refused_by_sdxl(tmp_path):
    pipe = hosts.sd(host=hosts.unet(cross_attention_dim=768))
    path = write(pipe, ("", AB, same("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k")), tmp_path / "x")
    with pytest.raises(RefusedFileError, match="it is made for SD 1.x and this pipeline is SDXL$"):
        mole.attach(hosts.sd(host=hosts.unet(cross_attention_dim=2048)), {"x": path})


def test_files_with_the_attention_of_qwen_alone_are_told_from_flux_by_their_blocks(pipelines, tmp_path):
    """Both are as wide at full size."""
    width = pipelines("flux").transformer.inner_dim
    tensors = {}
    for block in range(60):
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "to_add_out"):
            for end, shape in zip(AB, ((1, width), (width, 1)), strict=True):
                tensors[f"transformer_blocks.{block}.attn.{layer}.{end}"] = random(*shape)
    save_file(tensors, tmp_path / "x")
    with pytest.raises(RefusedFileError, match="it is made for Qwen-Image and this pipeline is Flux$"):
        mole.attach(pipelines("flux"), {"x": tmp_path / "x"})


def test_layers_that_get_single_tokens_of_all_pictures_are_refused(pipelines, tmp_path):
    form = ("diffusion_model.", AB, HIDREAM | same("single_stream_blocks.0.block.ff_i.experts.1.w1"))
    path = write(pipelines("hidream"), form, tmp_path / "x")
    said = r"'transformer.single_stream_blocks.0.block.ff_i.experts.1.w1' gets single tokens of all pictures, .*; leave th"
    with pytest.raises(RefusedFileError, match=said):
        mole.attach(pipelines("hidream"), {"x": path})


def test_layers_of_the_text_conditioner_of_anima_are_refused_or_told_of(pipelines, tmp_path):
    pipe, path = pipelines("anima"), tmp_path / "x.safetensors"
    layer = "llm_adapter.blocks.0.cross_attn.q_proj"
    tensors = {f"diffusion_model.{layer}.{end}": random(*shape) for end, shape in zip(AB, ((2, 16), (16, 2)), strict=True)}
    save_file(load_file(write(pipe, FILES["anima"]["ComfyUI"], path)) | tensors, path)
    with pytest.raises(RefusedFileError, match="the pipeline has only 5 of its 6 layers"):
        mole.attach(pipe, {"x": path})
    with pytest.warns(UserWarning, match="the pipeline lacks 1 of its layers, 'transformer.llm_adapter_blocks_0_cross"):
        mole.attach(pipe, {"x": path}, binding=None, allow_missing_layers=True)
    mole.detach(pipe)
    save_file({key.replace("diffusion_model.llm_adapter", "text_conditioner"): t for key, t in tensors.items()}, path)
    with pytest.raises(RefusedFileError, match="'text_conditioner.blocks.0.cross_attn.q_proj' begins with none of"):
        mole.attach(pipe, {"x": path})


def test_a_file_that_fits_in_part_is_refused_unless_asked_for(pipelines, tmp_path):
    pipe = pipelines("qwen")
    path = write(pipe, FILES["qwen"]["diffusers"], tmp_path / "x.safetensors")
    tensors = load_file(path)
    fits = len(QWEN)
    more = {k.replace("blocks.1.", "blocks.7."): v.clone() for k, v in tensors.items() if "blocks.1." in k}
    save_file(tensors | more, path)
    said = f"has only {fits} of its {fits + 3} layers, so it looks like a LoRA for Qwen-Image, .* allow_missing_layers=True"
    with pytest.raises(RefusedFileError, match=said):
        mole.attach(pipe, {"x": path}, binding=None)
    assert mole.attached(pipe) is None
    with pytest.warns(UserWarning, match="'x': the pipeline lacks 3 of its layers"):
        mixture = mole.attach(pipe, {"x": path}, binding=None, allow_missing_layers=True)
    keep(mixture, tmp_path / "kept")
    for again in (lambda: mole.attach(pipe, mixture.experts, binding=None), lambda: attach_kept(pipe, tmp_path / "kept")):
        with pytest.warns(UserWarning, match="'x': the pipeline lacks 3 of its layers"):  # accepted before
            again()
    mole.detach(pipe)


def test_layers_of_models_that_a_pipeline_was_opened_without_do_not_count(pipelines, tmp_path):
    pipe = pipelines("qwen")
    path = write(pipe, FILES["qwen"]["diffusers"], tmp_path / "x.safetensors")
    text = {f"text_encoder.encoder.layers.{i}.mlp.fc1.{end}": torch.ones(2, 2) for i in range(9) for end in AB}
    save_file(load_file(path) | text, path)
    with pytest.warns(UserWarning, match="'x': the pipeline lacks 9 of its layers, 'text_encoder"):
        mole.attach(pipe, {"x": path}, binding=None)
    mole.detach(pipe)


# ---- what only we keep


def test_each_layer_keeps_its_own_alpha_and_algorithm_through_the_pipelines_names(pipelines, tmp_path):
    """diffusers loses the alphas of ai-toolkit's keys on Flux.2, and LoKr on a fused layer fuses the model's own."""
    stem, pipe = "diffusion_model.double_blocks.0.txt_attn.qkv", pipelines("flux2")
    w1, w2, down, up = random(3, 4), random(32, 8), random(2, 32), random(192, 2)
    tensors = {f"{stem}.lokr_w1": w1, f"{stem}.lokr_w2": w2}
    other = "diffusion_model.double_blocks.0.img_mlp.0"
    tensors |= {f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": up, f"{other}.alpha": torch.tensor(6.0)}
    save_file(tensors, tmp_path / "x")
    layers = matched(tmp_path / "x", pipe, tolerance=0).layers["transformer"]
    for name, delta in zip("qkv", torch.kron(w1, w2).chunk(3), strict=True):
        found = layers.pop(f"transformer_blocks.0.attn.add_{name}_proj").delta()
        torch.testing.assert_close(found, delta, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layers.pop("transformer_blocks.0.ff.linear_in").delta(), 6 / 2 * up @ down)
    assert not layers


LOKR = {
    "flux2": ("lycoris_transformer_blocks_0_attn_to_q", "lycoris_single_transformer_blocks_1_attn_to_qkv_mlp_proj"),
    "z_image": ("diffusion_model.layers.0.attention.to_q", "diffusion_model.layers.1.attention.to_out.0"),
}


@pytest.mark.parametrize("host", LOKR)
def test_lokr_of_lycoris_and_ai_toolkit_is_what_diffusers_loads(pipelines, tmp_path, host):
    pipe, tensors = pipelines(host), {}
    for stem in LOKR[host]:
        layer = stem.removeprefix("lycoris_").removeprefix("diffusion_model.").replace(".", "_")
        rows, columns = weight_of(pipe, layer).shape
        tensors |= {f"{stem}.lokr_w1": random(4, 4), f"{stem}.alpha": torch.tensor(1.0)}
        tensors |= {f"{stem}.lokr_w2_a": random(rows // 4, 2), f"{stem}.lokr_w2_b": random(2, columns // 4)}
    save_file(tensors, path := tmp_path / "x.safetensors")
    try:
        pipe.load_lora_weights(path, adapter_name="x")
        theirs = loaded_by_diffusers(pipe)
    finally:
        pipe.unload_lora_weights()
    ours = matched(path, pipe, tolerance=0).layers["transformer"]
    assert {("transformer", name) for name in ours} == theirs.keys()
    for name, weights in ours.items():
        torch.testing.assert_close(weights.delta(), theirs["transformer", name], rtol=1e-4, atol=1e-5)


def test_a_layer_that_the_pipeline_does_not_know_leaves_the_others_their_names(pipelines, tmp_path):
    """diffusers' conversion raises at the first of them."""
    pipe = pipelines("flux2")
    strange = {"double_blocks.0.strange": ("x_embedder",), "img_in": ("x_embedder",)}
    path = write(pipe, ("diffusion_model.", AB, FILES["flux2"]["ai-toolkit"][2] | strange), tmp_path / "x.safetensors")
    found = matched(path, pipe)
    assert found.unmatched == {"transformer.double_blocks_0_strange": "the transformer has no such layer"}
    assert set(found.layers["transformer"]) == {target for targets in FLUX2.values() for target in targets}


def test_a_layer_under_two_names_is_refused(pipelines, tmp_path):
    twice = {
        "img_in": ("x_embedder",),
        "x_embedder": ("x_embedder",),
        "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    }
    path = write(pipelines("flux2"), ("diffusion_model.", AB, twice), tmp_path / "x.safetensors")
    with pytest.raises(RefusedFileError, match="layer 'transformer.x_embedder' is there twice under different keys"):
        mole.attach(pipelines("flux2"), {"x": path})


@pytest.mark.parametrize("size", [(36864, 4096), (55296, 6144)])
def test_the_largest_layers_of_flux_2_are_read(tmp_path, size):
    """Those of klein 9B and dev."""
    stem = "transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj"
    save_file({f"{stem}.{AB[0]}": random(1, size[1]), f"{stem}.{AB[1]}": random(size[0], 1)}, tmp_path / "x")
    assert read_expert(tmp_path / "x").base == "Flux.2"


# ---- writing


@pytest.mark.parametrize("host", [host for host in PIPELINES if host not in ("sdxl", "sd3")])
def test_a_written_file_has_the_names_of_every_layer(pipelines, tmp_path, host):
    pipe = pipelines(host)
    names = [n for n, m in pipe.transformer.named_modules() if isinstance(m, nn.Linear) and ".experts." not in n]
    path = write(pipe, ("transformer.", AB, same(*names)), tmp_path / "x.safetensors")
    for form in ("diffusers", "kohya"):
        found = matched(save_as(read_expert(path), tmp_path, form), pipe)
        assert not found.unmatched
        assert set(found.layers["transformer"]) == set(names)


def save_as(expert, folder, form):
    save_expert(expert, folder / form, format=form, dtype=torch.float32)
    return folder / form


# ---- DoRA


def dora(pipe, form, path, end):
    """The file of a form with magnitudes, which are the base's own and then changed."""
    prefix, (down, _), layers = form
    tensors = load_file(write(pipe, form, path))
    for name, targets in layers.items():
        norms = torch.cat([weight_of(pipe, target).detach().flatten(1).norm(dim=1) for target in targets])
        whole = norms * (1 + random(len(norms)))
        dims = tensors[f"{prefix}{name}.{down}"].dim()
        shapes = {"dora_scale": (-1, *(1,) * (dims - 1)), "lora_magnitude_vector": (1, -1, 1, 1) if dims == 4 else (-1,)}
        tensors[f"{prefix}{name}.{end}"] = whole.reshape(shapes[end])
    save_file(tensors, path)
    return path


@pytest.mark.parametrize("host", ["sdxl", "flux", pytest.param("sd3", marks=pytest.mark.thorough)])
@pytest.mark.shows(
    "DoRA",
)
def test_dora_draws_the_picture_that_diffusers_draws(pipelines, tmp_path, host):
    """Convolutions and text encoders too; a UNet's layers are wider than high, and higher than wide."""
    pipe = pipelines(host)
    prefix, ends, layers = FILES[host]["peft" if host == "sdxl" else "ai-toolkit"]
    form = prefix, ends, {name: targets for name, targets in layers.items() if not name.startswith("text_encoder")}
    if host == "sdxl":
        form[2].update(same("unet.mid_block.resnets.0.conv1", "unet.conv_out"))
    path = dora(pipe, form, tmp_path / "x.safetensors", "lora_magnitude_vector")
    plain = see(pipe, host)
    try:
        pipe.load_lora_weights(path, adapter_name="x")
        seen = see(pipe, host)
    finally:
        pipe.unload_lora_weights()
    assert (seen - plain).abs().max() > 1e-3
    save_file(load_file(path), copy := tmp_path / "copy.safetensors")
    for file in (copy, save_as(read_expert(path), tmp_path, "diffusers"), save_as(read_expert(path), tmp_path, "kohya")):
        mole.attach(pipe, {"x": file}, "sum", binding=None)
        try:
            torch.testing.assert_close(see(pipe, host), seen, atol=1e-5, rtol=0)
        finally:
            mole.detach(pipe)
    assert torch.equal(see(pipe, host), plain)


def test_kohyas_dora_of_fused_layers_is_that_of_their_parts(pipelines, tmp_path):
    pipe = pipelines("flux2")
    expert = read_expert(dora(pipe, FILES["flux2"]["kohya"], tmp_path / "x.safetensors", "dora_scale"))
    assert expert.notes.algorithms == {"DoRA": len(FLUX2_KOHYA)}
    mole.attach(pipe, {"x": (expert, 0.5)}, "sum", binding=None)
    try:
        half = see(pipe, "flux2")
    finally:
        mole.detach(pipe)
    before = {layer: weight_of(pipe, layer).detach().clone() for targets in FLUX2_KOHYA.values() for layer in targets}
    tensors = load_file(tmp_path / "x.safetensors")
    try:
        for name, targets in flat(FLUX2_KOHYA).items():
            stem = f"lora_unet_{name}"
            change = 1 / 2 * tensors[f"{stem}.lora_up.weight"] @ tensors[f"{stem}.lora_down.weight"]
            whole = torch.cat([before[layer] for layer in targets])
            changed = whole + change
            changed *= tensors[f"{stem}.dora_scale"] / changed.norm(dim=1, keepdim=True)
            for layer, part in zip(targets, changed.split([len(before[layer]) for layer in targets]), strict=True):
                weight_of(pipe, layer).data.copy_((before[layer] + part) / 2)
        torch.testing.assert_close(half, see(pipe, "flux2"), atol=1e-5, rtol=0)
    finally:
        for layer, weight in before.items():
            weight_of(pipe, layer).data.copy_(weight)


@pytest.mark.shows("DoRA")
def test_dora_needs_the_bases_own_weights(pipelines, tmp_path):
    pipe = deepcopy(pipelines("flux2"))
    path = dora(pipe, FILES["flux2"]["kohya"], tmp_path / "x.safetensors", "dora_scale")
    with pytest.raises(ValueError, match="'x' is DoRA, whose change depends .*; it cannot be merged"):
        mole.merge({"x": path})
    layer = pipe.transformer.x_embedder
    layer.weight = nn.Parameter(layer.weight.to("meta"))
    with pytest.raises(RefusedFileError, match="transformer.x_embedder is DoRA, .* they are offloaded; attach it"):
        mole.attach(pipe, {"x": path}, binding=None)
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape, dtype=torch.int8), requires_grad=False)
    with pytest.raises(RefusedFileError, match="transformer.x_embedder is DoRA, .*and they are quantised"):
        mole.attach(pipe, {"x": path}, binding=None)
    layer.weight = nn.Parameter(torch.zeros(layer.weight.shape))
    tensors = load_file(path)
    save_file({k: torch.zeros_like(v) if "img_in" in k else v for k, v in tensors.items()}, path)
    with pytest.raises(RefusedFileError, match="transformer.x_embedder: a row of the base's weight is 0 with DoRA's change"):
        mole.attach(pipe, {"x": path}, binding=None)
