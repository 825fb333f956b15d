"""Hosts whose weights are packed in few bits, as GGUF, bitsandbytes, torchao, quanto and SDNQ pack them.

The models are real and packed in memory; each kind is skipped where its package is not installed.
"""

import pytest
import torch
from hosts import HOSTS, draw
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline
from torch import nn

import mole_diffusers as mole
from mole_diffusers import denoiser, models_of
from mole_diffusers.lora import layer_key

CLOSE = {"atol": 1e-5, "rtol": 0}
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def wide():
    """Blocks of 32 weights share a scale in GGUF, so layers must be as wide."""
    return tiny_pipeline(width=64)


def replace(model, make):
    """Put `make(layer)` in the place of every linear layer."""
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and layer.in_features % 32 == 0:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, make(layer))


def gguf(model, kind, *, compute=torch.float32):
    package = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

    kind = package.GGMLQuantizationType[kind]

    def make(layer):
        packed = GGUFLinear(layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=compute)
        data = package.quants.quantize(layer.weight.detach().float().numpy(), kind)
        packed.weight, packed.bias = GGUFParameter(torch.from_numpy(data), quant_type=kind), layer.bias
        return packed.requires_grad_(False)

    replace(model, make)


def bitsandbytes(model, bits):
    package = pytest.importorskip("bitsandbytes").nn

    def four(layer):
        shape = (layer.in_features, layer.out_features, layer.bias is not None)
        packed = package.Linear4bit(*shape, compute_dtype=torch.float32, quant_type="nf4")
        packed.weight = package.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=packed)
        packed.bias = layer.bias
        return packed.to("cpu")  # which packs

    def eight(layer):
        packed = package.Linear8bitLt(layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False)
        packed.weight = package.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
        packed.bias = layer.bias
        return packed.to("cpu")

    replace(model, four if bits == 4 else eight)
    setattr(model, f"is_loaded_in_{bits}bit", True)


def torchao(model):
    package = pytest.importorskip("torchao.quantization")
    package.quantize_(model, package.Int8WeightOnlyConfig())


def quanto(model):
    package = pytest.importorskip("optimum.quanto")
    package.quantize(model, weights=package.qint8)
    package.freeze(model)


def sdnq(model, bits):
    package = pytest.importorskip("sdnq")
    package.sdnq_post_load_quant(model, weights_dtype=bits, minimum_allowed_numel=1, add_skip_keys=False)


KINDS = {
    "gguf-Q8_0": lambda model: gguf(model, "Q8_0"),
    "gguf-Q4_0": lambda model: gguf(model, "Q4_0"),
    "bitsandbytes-nf4": lambda model: bitsandbytes(model, 4),
    "bitsandbytes-int8": lambda model: bitsandbytes(model, 8),
    "torchao-int8": torchao,
    "quanto-int8": quanto,
    "sdnq-int8": lambda model: sdnq(model, "int8"),
    "sdnq-uint4": lambda model: sdnq(model, "uint4"),
}


EACH = ["gguf-Q8_0", *thorough(*(kind for kind in KINDS if kind != "gguf-Q8_0"))]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder, host = tmp_path_factory.mktemp("wide"), wide()
    return {name: tiny_lora(host, folder / name, rank=2 * i + 2, seed=i, size=0.3) for i, name in enumerate(("fox", "ink"))}


@pytest.fixture(params=EACH)
def packed(request):
    pipe = wide()
    KINDS[request.param](pipe.unet)
    return pipe


@pytest.mark.shows("GGUF, bitsandbytes, torchao, quanto, SDNQ")
def test_experts_ride_on_a_quantised_host(packed, files, awake, tmp_path):
    """The other route: diffusers' own adapters on the same host."""
    weight = packed.unet.get_submodule(LAYER).weight
    base, kinds = draw(packed, {}), [type(module) for module in packed.unet.modules()]
    mixture = awake(mole.attach(packed, files, "mole"))
    gated = draw(packed, {})
    mixture.save_pretrained(tmp_path)
    with mixture.fixed({"fox": 0.8, "ink": -0.5}):
        fixed = draw(packed, {})
    with pytest.raises(ValueError, match=r"weight of .* cannot take the experts: it is quantised or offloaded"):
        mixture.collapsed("a fox", num_inference_steps=1).__enter__()
    assert torch.equal(draw(packed, {}), gated)
    mole.detach(packed)
    assert packed.unet.get_submodule(LAYER).weight is weight
    assert kinds == [type(module) for module in packed.unet.modules()]
    assert torch.equal(draw(packed, {}), base)
    mole.attach(packed, files, tmp_path)
    assert torch.equal(draw(packed, {}), gated)
    mole.detach(packed)
    for name, file in files.items():
        packed.load_lora_weights(file, adapter_name=name)
    packed.set_adapters(list(files), [0.8, -0.5])
    torch.testing.assert_close(fixed, draw(packed, {}), **CLOSE)
    assert not torch.allclose(fixed, gated, atol=1e-3)


@pytest.mark.thorough
@pytest.mark.shows("binding: these work")
def test_a_bound_picture_on_a_quantised_host(packed, files, decided):
    plain = wide()
    read_back(packed.unet, plain.unet)
    bound_alike(packed, plain, files, {})


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.shows("binding: these work")
def test_a_bound_picture_on_other_quantised_hosts(other, kind, decided):
    (plain, _), model = HOSTS[other.name](), denoiser(other.pipe)
    assert repacked(model, KINDS[kind])
    read_back(model, denoiser(plain))
    words = {"max_sequence_length": 16} if other.name == "flux" else {}  # T5 has a token per letter
    bound_alike(other.pipe, plain, other.files, other.options | words)


def bound_alike(packed, plain, files, options):
    """The other route: a picture that is the same for layers that were packed and read back as plain ones.

    Layout, masks and closed words come from what the packed host attends to.
    """
    pictures, layouts = [], []
    for pipe in (packed, plain):
        mixture = mole.attach(pipe, files, binding={"fox": "fox", "ink": "owl"})
        pictures.append(draw(pipe, options, "fox and owl", steps=3))
        layouts.append(mixture.layouts[0])
        with mixture.bound(None):
            unbound = draw(pipe, options, "fox and owl", steps=3)
        assert not torch.allclose(pictures[-1], unbound, atol=1e-3)
    torch.testing.assert_close(*pictures, **CLOSE)
    torch.testing.assert_close(layouts[0].regions, layouts[1].regions)
    torch.testing.assert_close(layouts[0].maps, layouts[1].maps, atol=1e-4, rtol=0)
    assert set(layouts[0].regions) == {"fox", "ink"}


def read_back(packed, plain):
    """Give `plain` the weights that the packed layers stand for: what they make of unit vectors, less their bias."""
    with torch.no_grad():
        for name, layer in plain.named_modules():
            if isinstance(layer, nn.Conv2d) and type(packed.get_submodule(name)) is not nn.Conv2d:  # quanto packs them, too
                layer.weight.copy_(packed.get_submodule(name).weight.dequantize())
            elif isinstance(layer, nn.Linear):
                zero = packed.get_submodule(name)(torch.zeros(1, layer.in_features))
                layer.weight.copy_((packed.get_submodule(name)(torch.eye(layer.in_features)) - zero).T)


def compared(model, part, weighed, run):
    """The names of the layers whose every output in `run()` was their own product and the files' matrices, weighed."""
    experts = [(mole.read_expert(file).layers[part], weight) for file, weight in weighed]
    made, calls = {}, []
    for name, layer in model.named_modules():
        if found := [weight * expert[layer_key(name)].delta() for expert, weight in experts if layer_key(name) in expert]:
            made[name] = sum(found)  # [Cout, Cin]
            layer.register_forward_hook(lambda layer, x, y, name=name: calls.append((name, layer, x[0], y)))
    with torch.no_grad():
        run()
        for name, layer, x, y in calls:
            torch.testing.assert_close(y, layer.base_layer(x) + x @ made[name].T, atol=1e-5, rtol=1e-5)
    return {name for name, *_ in calls}


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.shows("these work")
def test_experts_ride_on_a_quantised_text_encoder(files, kind):
    """The other route is by hand, since transformers' loading of adapters changes packed weights."""
    pipe = wide()
    KINDS[kind](pipe.text_encoder)
    mole.attach(pipe, {name: (file, 0.5) for name, file in files.items()})
    weighed = [(file, 0.5) for file in files.values()]
    layers = compared(pipe.text_encoder, "text_encoder", weighed, lambda: pipe.text_encoder(torch.arange(16)[None]))
    assert len(layers) == 8


@pytest.mark.parametrize("kind", EACH)
@pytest.mark.shows("GGUF, bitsandbytes, torchao, quanto, SDNQ", "these work")
def test_experts_ride_on_other_quantised_hosts(other, kind):
    """Those layers of the denoiser and of the first text encoder that are wide enough are packed."""
    weights = {"fox": 0.8, "ink": -0.5}
    parts = {name: part for name, part in models_of(other.pipe).items() if name != "text_encoder_2"}
    packed = {name: repacked(model, KINDS[kind]) for name, model in parts.items()}
    mixture, weighed = other.attach(), [(other.files[name], weight) for name, weight in weights.items()]
    with mixture.fixed(weights):
        for name, model in parts.items():
            assert compared(model, name, weighed, lambda: draw(other.pipe, other.options, steps=1)) & packed[name]


def repacked(model, pack):
    """Pack a model; the names of the layers that have another class or another kind of weight since."""
    before = {name: type(module.weight.data) for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    pack(model)
    now = {name: model.get_submodule(name) for name in before}
    return {name for name in before if type(now[name]) is not nn.Linear or type(now[name].weight.data) is not before[name]}


@pytest.mark.shows("GGUF, bitsandbytes, torchao, quanto, SDNQ")
def test_gates_learn_on_a_quantised_host(packed, files):
    mixture = mole.attach(packed, files, "mole")
    for gate in mixture.parameters():
        gate.requires_grad_(True)
    states = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    sample = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    packed.unet(sample, 500, states).sample.square().mean().backward()
    bank = mixture.banks["unet"]
    assert all(p.grad.abs().sum() > 0 for n, p in bank.named_parameters() if "blocks" in n and n.endswith("matrix"))


def test_experts_are_computed_in_what_the_packed_host_computes_in(files):
    pipe = wide().to(torch.bfloat16)
    gguf(pipe.unet, "Q8_0", compute=torch.bfloat16)
    mole.attach(pipe, files)
    layer = pipe.unet.get_submodule(LAYER)
    assert layer.lora_A["mole_experts"].weight.dtype == torch.bfloat16
    assert draw(pipe, {}).isfinite().all()


class Packed(nn.Module):
    """A quantised layer of a class that is no linear layer of torch's, as those of GPTQ and nunchaku are."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", layer.weight.detach().to(torch.int8))


@pytest.mark.shows("GGUF, bitsandbytes, torchao, quanto, SDNQ")
def test_layers_that_take_no_lora_are_named(files):
    pipe = wide()
    for model in (pipe.unet, pipe.text_encoder):
        replace(model, Packed)
    where = r"text_encoder.\w+_proj since the text_encoder has a Packed there, which takes no LoRA"
    with pytest.raises(ValueError, match=f"none of its 40 layers is in this pipeline, {where}"):
        mole.attach(pipe, files)
    assert mole.attached(pipe) is None
