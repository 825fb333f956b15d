"""What people switch on, on transformers of newer models: the same picture by another route, or one clear sentence."""

import diffusers
import hosts
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from test_quantised import KINDS, repacked
from tiers import thorough
from tiny import ATTENTION, tiny_lora

import mole_diffusers as mole

CLOSE = {"atol": 1e-5, "rtol": 0}
LAYERS = (*ATTENTION[:4], "w1", "w2", "to_qkv_mlp_proj", "proj_mlp", "img_mlp.net.2", "ffn.net.2")
NEWER = ("flux", "chroma", "flux2", "qwen", "z_image", "wan")
PROMPT = "a fox and an owl"
BOUND = {"fox": ("fox", "left"), "owl": "owl"}


@pytest.fixture
def host(request, tmp_path):
    """A pipeline, what its call needs, and two LoRAs for its denoiser, which are all that its diffusers loads."""
    pipe, options = hosts.HOSTS[request.param]()
    encoders = {part: model for part, model in pipe.components.items() if part.startswith("text_encoder")}
    for part in encoders:
        setattr(pipe, part, None)
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=LAYERS) for i, n in enumerate(("fox", "owl"))}
    for part, model in encoders.items():
        setattr(pipe, part, model)
    return request.param, pipe, options | {"max_sequence_length": 64}, files


def each(*fast):
    return pytest.mark.parametrize("host", [*fast, *thorough(*(name for name in NEWER if name not in fast))], indirect=True)


def bound(name):
    """Words and a place where the host has places."""
    return {"fox": "fox", "owl": "owl"} if name == "wan" else BOUND


def compiled(pipe):
    pipe.transformer.compile_repeated_blocks(backend="eager")


SWITCHES = {
    "leaf": hosts.OFFLOADS["leaf"],
    "block": hosts.OFFLOADS["block"],
    "compile": compiled,
    "backend": lambda pipe: pipe.transformer.set_attention_backend("_native_math"),
    "flex": lambda pipe: pipe.transformer.set_attention_backend("flex"),
}


@pytest.mark.filterwarnings("ignore:attention runs on PyTorch's own backend")
@pytest.mark.parametrize("switch", ["backend", *thorough(*(name for name in SWITCHES if name != "backend"))])
@each("qwen")
@pytest.mark.shows("attention backends of PyTorch, flex too", "group offload, fp8 casting, `compile_repeated_blocks`")
def test_a_switch_changes_no_picture(host, switch):
    name, pipe, options, files = host
    torch.compiler.reset()
    base, mixture = hosts.draw(pipe, options, PROMPT), mole.attach(pipe, files, binding=None)
    plain = hosts.draw(pipe, options, PROMPT)
    with mixture.bound(bound(name)):
        apart = hosts.draw(pipe, options, PROMPT)
    with attention_backend("native"):  # setting one makes it the default of all models
        SWITCHES[switch](pipe)
        torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), plain, **CLOSE)
        with mixture.bound(bound(name)):
            torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), apart, **CLOSE)
        mole.detach(pipe)
        torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), base, **CLOSE)
    assert not torch.allclose(plain, base, atol=1e-3)
    assert not torch.allclose(apart, plain, atol=1e-4)


def stock(pipe, files):
    for name, file in files.items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(files))


# diffusers' cache fails by itself on Chroma and Flux.2, and Z-Image's transformer takes none.
@pytest.mark.parametrize("host", ["qwen", *thorough("flux", "wan")], indirect=True)
@pytest.mark.shows("`FirstBlockCacheConfig`")
def test_a_cache_of_blocks_skips_what_it_skips_for_diffusers_own_adapters(host):
    name, pipe, options, files = host
    mole.attach(pipe, files, binding=None)
    whole = hosts.draw(pipe, options, PROMPT, steps=4)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))  # so that every step but the first skips
    cached = hosts.draw(pipe, options, PROMPT, steps=4)
    assert not torch.allclose(cached, whole, atol=1e-4)
    mole.detach(pipe)
    pipe.transformer.disable_cache()
    mole.attach(pipe, files, binding=None)  # and the other order
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT, steps=4), whole, **CLOSE)
    mole.detach(pipe)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(threshold=10.0))
    mixture = mole.attach(pipe, files, binding=bound(name))
    assert not torch.allclose(hosts.draw(pipe, options, PROMPT, steps=4), cached, atol=1e-4)
    mixture.bind(None)
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT, steps=4), cached, **CLOSE)
    mole.detach(pipe)
    stock(pipe, files)
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT, steps=4), cached, **CLOSE)


@each("z_image")
@pytest.mark.shows("group offload, fp8 casting, `compile_repeated_blocks`")
def test_fp8_storage_before_and_after_attach_is_the_same(host):
    _, pipe, options, files = host
    mole.attach(pipe, files, binding=None)
    full = hosts.draw(pipe, options, PROMPT)
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    after = hosts.draw(pipe, options, PROMPT)
    mole.detach(pipe)
    mole.attach(pipe, files, binding=None)
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), after, **CLOSE)
    assert not torch.allclose(after, full, atol=1e-5)


@each()
@pytest.mark.shows("`enable_lora_hotswap`")
def test_hotswap_is_prepared_before_attach(host):
    _, pipe, options, files = host
    mole.attach(pipe, {"fox": files["fox"]}, binding=None)
    with pytest.raises(ValueError, match="enable_lora_hotswap must come before attach"):
        pipe.enable_lora_hotswap(target_rank=8)
    mole.detach(pipe)
    pipe.enable_lora_hotswap(target_rank=8)
    mole.attach(pipe, {"fox": files["fox"]}, binding=None)
    pipe.load_lora_weights(files["fox"], adapter_name="beside")
    pipe.load_lora_weights(files["owl"], adapter_name="beside", hotswap=True)
    swapped = hosts.draw(pipe, options, PROMPT)
    pipe.unload_lora_weights()
    stock(pipe, files)
    torch.testing.assert_close(swapped, hosts.draw(pipe, options, PROMPT), **CLOSE)


@pytest.mark.parametrize("kind", ["gguf-Q8_0", *thorough(*(kind for kind in KINDS if "gguf" not in kind))])
@each()
@pytest.mark.shows("GGUF and SDNQ on a transformer")
def test_experts_ride_on_packed_layers_as_diffusers_own_adapters(host, kind):
    _, pipe, options, files = host
    plain = hosts.draw(pipe, options, PROMPT)
    assert repacked(pipe.transformer, KINDS[kind])
    base = hosts.draw(pipe, options, PROMPT)
    assert not torch.equal(base, plain)
    mole.attach(pipe, files, binding=None)
    whole = hosts.draw(pipe, options, PROMPT)
    mole.detach(pipe)
    assert torch.equal(hosts.draw(pipe, options, PROMPT), base)
    stock(pipe, files)
    torch.testing.assert_close(hosts.draw(pipe, options, PROMPT), whole, **CLOSE)
