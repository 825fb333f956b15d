"""Files as each tool writes them, and the changes of weight that are computed here from the same numbers by hand."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import save_file

from mole_diffusers import RefusedFileError
from mole_diffusers.lora import read_expert
from mole_diffusers.lora.metadata import PEFT_CONFIG, PEFT_FILE, PEFT_METADATA

BLOCK = "mid_block.attentions.0.transformer_blocks.0"
ENCODER = "encoder.layers.0.self_attn"
LAYERS = {  # host layer -> its weight's shape
    f"unet.{BLOCK}.attn1.to_q": (6, 4),
    f"unet.{BLOCK}.attn2.to_out.0": (6, 6),
    "unet.mid_block.resnets.0.conv1": (6, 4, 3, 3),
    f"text_encoder.{ENCODER}.q_proj": (8, 8),
}
KOHYA_SDXL = {  # the keys that kohya's trainer writes for SDXL -> part and layer
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k": (
        "unet", "down_blocks_1_attentions_0_transformer_blocks_1_attn2_to_k", (640, 2048),
    ),
    "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj": (
        "unet", "mid_block_attentions_0_transformer_blocks_9_ff_net_0_proj", (24, 8),
    ),
    "lora_unet_output_blocks_2_1_proj_in": ("unet", "up_blocks_0_attentions_2_proj_in", (8, 8)),
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": ("text_encoder", "encoder_layers_11_mlp_fc1", (16, 8)),
    "lora_te2_text_model_encoder_layers_31_self_attn_out_proj": (
        "text_encoder_2", "encoder_layers_31_self_attn_out_proj", (8, 8),
    ),
}  # fmt: skip


def halves(shape, rank, seed):
    """down [r, Cin, ...] and up [Cout, r, ...]."""
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    return down, torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)


def product(down, up):
    return torch.einsum("or,r...->o...", up.flatten(1), down)


def peft(part, layer):
    return f"{part}.{layer}.lora_A.weight", f"{part}.{layer}.lora_B.weight", None


def named_adapter(part, layer):
    return f"{part}.{layer}.lora_A.default.weight", f"{part}.{layer}.lora_B.default.weight", None


def diffusers(part, layer):
    return f"{part}.{layer}.lora.down.weight", f"{part}.{layer}.lora.up.weight", f"{part}.{layer}.alpha"


def old_diffusers(part, layer):
    if part == "text_encoder":
        stem = f"text_encoder.text_model.{layer}.lora_linear_layer"
        return f"{stem}.down.weight", f"{stem}.up.weight", None
    if layer.endswith((".to_q", ".to_out.0")):
        block, _, leaf = layer.removesuffix(".0").rpartition(".")
        return f"unet.{block}.processor.{leaf}_lora.down.weight", f"unet.{block}.processor.{leaf}_lora.up.weight", None
    return diffusers(part, layer)[:2] + (None,)


def kohya(part, layer):
    stem = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part] + layer.replace(".", "_")
    return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"


def file_of(path, key_of, alphas, metadata=None):
    """A file of `LAYERS`, the ranks rising; returns {layer: (rank, up @ down)}."""
    tensors, products = {}, {}
    for rank, (name, shape) in enumerate(LAYERS.items(), start=1):
        down, up = halves(shape, rank, seed=rank)
        keys = key_of(*name.split(".", 1))
        tensors |= {keys[0]: down, keys[1]: up}
        if keys[2] is not None and alphas is not None:
            tensors[keys[2]] = torch.tensor(alphas[rank - 1])
        products[name] = rank, product(down, up)
    save_file(tensors, path, metadata)
    return products


def layer_of(expert, name):
    part, _, layer = name.partition(".")
    return expert.layers[part][layer.replace(".", "_")]


@pytest.mark.parametrize(
    ("key_of", "alphas", "form"),
    [
        (peft, None, "peft"),
        (named_adapter, None, "peft"),
        (diffusers, None, "diffusers"),
        (diffusers, [4.0, 1.0, 0.5, -8.0], "diffusers"),
        (old_diffusers, None, "diffusers"),
        (kohya, None, "kohya"),
        (kohya, [4.0, 1.0, 0.5, -8.0], "kohya"),
    ],
)
@pytest.mark.shows(
    "diffusers",
    "PEFT without metadata",
    "kohya, SD 1.x and 2.x",
    "A1111",
)
def test_each_tools_keys_of_stable_diffusion(tmp_path, key_of, alphas, form):
    """No alpha is an alpha equal to the rank."""
    products = file_of(tmp_path / "x", key_of, alphas)
    expert = read_expert(tmp_path / "x")
    assert expert.format == form
    assert sum(len(layers) for layers in expert.layers.values()) == len(products)
    for (name, (rank, whole)), alpha in zip(products.items(), alphas or [1, 2, 3, 4], strict=True):
        torch.testing.assert_close(layer_of(expert, name).delta(), alpha / rank * whole)


@pytest.mark.shows("kohya, SDXL")
def test_kohyas_keys_of_sdxl(tmp_path):
    tensors, deltas = {}, {}
    for i, (stem, (_, _, shape)) in enumerate(KOHYA_SDXL.items()):
        down, up = halves(shape, 2, seed=i)
        alpha = torch.tensor(float(i))
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": alpha}
        deltas[stem] = i / 2 * product(down, up)
    save_file(tensors, tmp_path / "x")
    expert = read_expert(tmp_path / "x")
    assert (expert.format, expert.base) == ("kohya", "SDXL")
    for stem, (part, layer, _) in KOHYA_SDXL.items():
        torch.testing.assert_close(expert.layers[part][layer].delta(), deltas[stem])


# ---- what PEFT writes of alphas


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.shows("PEFT with metadata")
def test_peft_with_its_config_in_the_header(tmp_path, root):
    config = {
        "unet.r": 2, "unet.lora_alpha": 6, "unet.use_rslora": root, "unet.alpha_pattern": {"attn1.to_q": 1.5},
        "text_encoder.lora_alpha": 10,
    }  # fmt: skip
    products = file_of(tmp_path / "x", peft, None, {PEFT_METADATA: json.dumps(config)})
    expert = read_expert(tmp_path / "x")
    for (name, (rank, whole)), alpha in zip(products.items(), [1.5, 6, 6, 10], strict=True):
        divisor = rank**0.5 if root and name.startswith("unet") else rank
        torch.testing.assert_close(layer_of(expert, name).delta(), alpha / divisor * whole)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.shows("PEFT's own folder", "rsLoRA")
def test_peft_with_its_config_beside_it(tmp_path, root):
    """As `PeftModel.save_pretrained` writes a UNet's adapter."""

    def key_of(part, layer):
        return tuple(f"base_model.model.{layer}.lora_{half}.weight" for half in "AB") + (None,)

    config = {"r": 2, "lora_alpha": 6, "use_rslora": root, "alpha_pattern": {"attn1.to_q": 1.5}, "peft_type": "LORA"}
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config))
    products = file_of(tmp_path / PEFT_FILE, key_of, None)
    expert = read_expert(tmp_path / PEFT_FILE)
    for (name, (rank, whole)), alpha in zip(products.items(), [1.5, 6, 6, 6], strict=True):
        torch.testing.assert_close(layer_of(expert, name).delta(), alpha / (rank**0.5 if root else rank) * whole)
    (tmp_path / PEFT_FILE).rename(tmp_path / "other.safetensors")  # no adapter of PEFT's: the config is not its own
    expert = read_expert(tmp_path / "other.safetensors")
    for name, (_, whole) in products.items():
        torch.testing.assert_close(layer_of(expert, name).delta(), whole)


def saved_by_peft(folder, config):
    """PEFT's own file of a tiny UNet: {layer: our weights, PEFT's change of weight}."""
    from diffusers import UNet2DConditionModel
    from peft import PeftModel, get_peft_model
    from peft.tuners.tuners_utils import BaseTunerLayer

    unet = UNet2DConditionModel(
        block_out_channels=(8,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=2, norm_num_groups=2,
    )  # fmt: skip
    get_peft_model(deepcopy(unet), config).save_pretrained(folder)
    model = PeftModel.from_pretrained(unet, folder)
    layers = read_expert(folder / PEFT_FILE, tolerance=0).layers["unet"]
    modules = {name: m for name, m in model.base_model.model.named_modules() if isinstance(m, BaseTunerLayer)}
    assert len(layers) == len(modules) > 4
    return [(layers[n.replace(".", "_")], m.get_delta_weight("default").detach()) for n, m in modules.items()]


# Of several names that fit the first counts, as they are sorted in the file; "q" is not the end of one.
WHOLE = r"^mid_block.attentions.0.transformer_blocks.0.attn2.to_q"
ALPHAS = {WHOLE: 2, r"a.attn2\.to_q$": 9, "transformer_blocks.0.attn1.to_q": 5, "q": 9, "attn1.to_q": 7, "to_q": 3}


@pytest.mark.shows("PEFT's own folder")
def test_what_peft_itself_saves(tmp_path):
    """PEFT's own file, and the change of weight that PEFT reads from it."""
    from peft import LoraConfig

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False, rank_pattern={"conv1": 3},
        alpha_pattern=ALPHAS,
    )  # fmt: skip
    for weights, delta in saved_by_peft(tmp_path, config):
        torch.testing.assert_close(weights.delta(), delta)


@pytest.mark.parametrize("algorithm", ["LoHa", "LoKr", "LoKr of whole matrices"])
@pytest.mark.shows("PEFT's own folder")
def test_what_peft_itself_saves_of_loha_and_lokr(tmp_path, algorithm):
    """Their alpha has another name in the config, and whole matrices of LoKr are divided by the config's rank."""
    from peft import LoHaConfig, LoKrConfig

    given = {"alpha": 6, "target_modules": ["to_q", "conv1"], "init_weights": False, "alpha_pattern": ALPHAS}
    if algorithm == "LoHa":
        config = LoHaConfig(r=4, rank_pattern={"conv1": 3}, use_effective_conv2d=True, **given)
    elif algorithm == "LoKr":  # 1 x 1 and 8 x 8, the second in factors
        config = LoKrConfig(r=2, rank_pattern={"conv1": 3}, decompose_factor=1, use_effective_conv2d=True, **given)
    else:
        config = LoKrConfig(r=4, rank_pattern={r"attn1\.to_q$": 5, "conv1": 3}, **given)
    for weights, delta in saved_by_peft(tmp_path, config):
        torch.testing.assert_close(weights.delta().reshape(delta.shape), delta)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "adapter_config.json is not JSON"),
        ("[1]", "its adapter_config.json is not a JSON object"),
        ('{"lora_alpha": "8"}', "its adapter_config.json holds an alpha that is not a finite number"),
        ('{"lora_alpha": 1e999}', "1e999 is not a finite number"),
        ('{"alpha_pattern": {".*to_q": 8}}', "its adapter_config.json has an alpha for '.*to_q', which is not the"),
        ('{"alpha": "8"}', "its adapter_config.json holds an alpha that is not a finite number"),
        ('{"peft_type": "LOKR", "r": 0}', "its adapter_config.json holds a rank below 1"),
        ('{"peft_type": "LOKR", "rank_pattern": {"q|k": 8}}', "its adapter_config.json has a rank for 'q.k', which is not"),
        ('{"use_dora": true}', "its PEFT config says DoRA, and it has no magnitudes"),
    ],
)
@pytest.mark.shows("Files")
def test_a_broken_config_beside_a_file_is_refused(tmp_path, config, message):
    file_of(tmp_path / PEFT_FILE, peft, None)
    (tmp_path / PEFT_CONFIG).write_text(config)
    with pytest.raises(RefusedFileError, match=f"{PEFT_FILE}: .*{message}"):
        read_expert(tmp_path / PEFT_FILE)
