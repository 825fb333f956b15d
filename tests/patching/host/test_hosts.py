"""Every pipeline that people run: attach, generate, train a step, save, reload, and detach bit for bit."""

import diffusers
import hosts
import pytest
import torch
from hosts import assert_same, snapshot
from tiers import thorough
from tiny import ATTENTION, CONVOLUTION, FEED_FORWARD, tiny_lora

import mole_diffusers as mole
from mole_diffusers import models_of
from mole_diffusers.patching.host.denoiser_inputs import DenoiserInputs

EVERY = (*ATTENTION, *FEED_FORWARD, *CONVOLUTION, "proj_mlp", "to_add_out", "SelfAttention.q", "linear_1", "norm.linear")
EVERY += ("w1", "w2", "w3", "cap_embedder.1", "2-1.linear", "x_embedder.2-1")  # of Z-Image


def tiers(*fast):
    """All hosts, of which the fast tier has these; what hosts add has tests of its own, as test_host_ip_adapters.py."""
    return [*fast, *thorough(*(name for name in hosts.HOSTS if name not in fast))]


@pytest.fixture(params=tiers("sd15", "flux"))
def host(request):
    return hosts.HOSTS[request.param]()


@pytest.fixture
def experts(host, tmp_path):
    pipe, _ = host
    return {
        "fox": tiny_lora(pipe, tmp_path / "fox", seed=1, ends=EVERY),
        "ink": tiny_lora(pipe, tmp_path / "ink", seed=2, rank=2, ends=ATTENTION),
    }


def train_one_step(pipe, options, mixture):
    """Descend the gates once on a denoiser call of the pipeline itself."""
    denoiser, seen = hosts.denoiser(pipe), []
    hook = denoiser.register_forward_pre_hook(lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    hosts.draw(pipe, options)
    hook.remove()
    args, kwargs = seen[0]
    made = denoiser(*args, **kwargs)[0]
    (torch.stack(made) if isinstance(made, list) else made).square().mean().backward()
    with torch.no_grad():
        for gate in mixture.parameters():
            if gate.grad is not None:
                gate -= 10 * gate.grad / gate.grad.norm().clamp_min(1e-12)
    learned = {id(p) for m in models_of(pipe).values() for p in m.parameters() if p.grad is not None}
    assert learned <= {id(p) for p in mixture.parameters()}


@pytest.mark.shows("Pipelines")
def test_attach_train_save_reload_detach(host, experts, tmp_path):
    pipe, options = host
    base, before = hosts.draw(pipe, options), snapshot(pipe)
    mixture = mole.attach(pipe, experts, "mole")
    for model in models_of(pipe).values():
        model.requires_grad_(False)
    for gate in mixture.parameters():
        gate.requires_grad_(True)
    equal = hosts.draw(pipe, options)
    assert not torch.allclose(equal, base, atol=1e-2)
    train_one_step(pipe, options, mixture)
    trained = hosts.draw(pipe, options)
    assert not torch.allclose(trained, equal, atol=1e-4)
    mixture.save_pretrained(tmp_path / "gates")
    mole.detach(pipe)
    assert_same(before, snapshot(pipe))
    assert torch.equal(hosts.draw(pipe, options), base)
    mole.attach(pipe, experts, tmp_path / "gates")
    assert torch.equal(hosts.draw(pipe, options), trained)
    mole.detach(pipe)
    assert torch.equal(hosts.draw(pipe, options), base)


LEVELS = ("animatediff", "sd3", "z_image", "qwen", "flux2", "wan", "krea2", "lumina2", "hidream", "anima")


@pytest.mark.parametrize("name", ["sd15", "flux", "chroma", *thorough(*LEVELS)])
def test_noise_levels_fall_from_one_whatever_the_denoiser_counts_in(name):
    pipe, options = hosts.HOSTS[name]()
    denoiser, levels = hosts.denoiser(pipe), []
    call = DenoiserInputs(denoiser)
    denoiser.register_forward_pre_hook(lambda _, args, kwargs: levels.append(call.time(args, kwargs)), with_kwargs=True)
    hosts.draw(pipe, options, steps=4)
    assert all(len(level) == len(levels[0]) for level in levels)
    means = list(dict.fromkeys(level.mean().item() for level in levels))  # guidance may be a call of its own
    assert 0.7 < means[0] <= 1
    assert all(0 <= later < earlier for earlier, later in zip(means, means[1:], strict=False))
    assert means[-1] < 0.5


@torch.no_grad()
def test_flux_2_is_drawn_bound(tmp_path):
    """It counts tokens by four numbers, where Flux has three. Others, LongCat's say, do not begin at 0."""
    torch.manual_seed(0)
    shape = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 8}
    size = {"num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": (2,) * 4, "timestep_guidance_channels": 8}
    transformer = diffusers.Flux2Transformer2DModel(**shape, **size).eval()
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": hosts.flow()}
    pipe = diffusers.Flux2Pipeline(transformer=transformer, **parts)
    files = {n: tiny_lora(pipe, tmp_path / n, seed=i, ends=("to_q", "to_k", "to_v")) for i, n in enumerate(("fox", "ink"))}
    noise, text = torch.randn(1, 16, 4, 8), torch.randn(1, 5, 16)
    call = {
        "hidden_states": pipe._pack_latents(noise),
        "img_ids": pipe._prepare_latent_ids(noise),
        "timestep": torch.ones(1),
    }
    call |= {"encoder_hidden_states": text, "txt_ids": pipe._prepare_text_ids(text), "guidance": torch.ones(1)}
    assert DenoiserInputs(transformer).latent_size((), call | {"img_ids": call["img_ids"] + 512}) == (4, 8)
    mixture, outputs = mole.attach(pipe, files), []
    for region in ("left", (0.0, 0.0, 0.5, 1.0), "right"):
        mixture.bind({"fox": (None, region)})
        outputs.append(transformer(**call).sample)
        assert mixture.parts.settings.binding.now.text.region_masks.shape == (1, 2, 4, 8)
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-4)


@pytest.mark.parametrize(
    ("name", "kinds"), [("flux", ("transformer_blocks", "single_transformer_blocks")), ("sd3", ("transformer_blocks",))]
)
def test_gates_speak_in_every_block_of_a_transformer(name, kinds, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    mixture = mole.attach(pipe, {str(i): tiny_lora(pipe, tmp_path / str(i), seed=i) for i in range(2)}, "mole")
    with mixture.trace() as trace:
        hosts.draw(pipe, options)
    blocks = {f"transformer.{kind}.{i}" for kind in kinds for i in range(len(getattr(pipe.transformer, kind)))}
    assert len(blocks) >= 2
    assert blocks <= set(trace.locations)


def test_a_denoiser_without_text_is_refused(tmp_path):
    shape = {"block_out_channels": (8,), "layers_per_block": 1, "norm_num_groups": 2}
    kinds = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("AttnUpBlock2D",)}
    pipe = diffusers.DDPMPipeline(unet=diffusers.UNet2DModel(**shape, **kinds), scheduler=diffusers.DDPMScheduler())
    with pytest.raises(ValueError, match="experts cannot act in a UNet2DModel; known denoisers: UNet2DConditionModel, "):
        mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox", ends=("to_q",))})


@pytest.mark.parametrize("name", tiers("sd15", "flux"))
@pytest.mark.shows("Pipelines")
def test_weights_held_are_those_of_diffusers_own_adapters(name, awake, tmp_path):
    """What the host adds, residuals, masks, image prompts, perturbed rows, meets the experts as it meets plain LoRAs."""
    pipe, options = hosts.HOSTS[name]()
    loads_encoders = "text_encoder" in getattr(
        pipe, "_lora_loadable_modules", ["text_encoder"] if hasattr(pipe, "unet") else []
    )
    ends = ATTENTION + FEED_FORWARD if loads_encoders else EVERY[:4] + EVERY[-6:]
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i, ends=ends) for i, n in enumerate(("fox", "ink"))}
    mixture = awake(mole.attach(pipe, files, "mole"))
    with mixture.fixed({"fox": 0.7, "ink": -0.4}):
        held = hosts.draw(pipe, options)
    gated = hosts.draw(pipe, options)
    mole.detach(pipe)
    hosts.load_adapters(pipe, files, [0.7, -0.4])
    torch.testing.assert_close(held, hosts.draw(pipe, options), atol=1e-4, rtol=0)
    assert not torch.allclose(held, gated, atol=1e-3)


def test_a_unet_that_names_no_size_has_gates_but_of_flattened_tokens(pipe, loras, draw):
    pipe.unet.register_to_config(sample_size=None)
    call = {"height": 16, "width": 16}
    base = draw(pipe, **call)
    mole.attach(pipe, loras, "mole")
    assert not torch.equal(draw(pipe, **call), base)
    with pytest.raises(ValueError, match="flattened features need a fixed number of tokens"):
        mole.attach(pipe, loras, mole.GateConfig("mole", features="flattened"))
