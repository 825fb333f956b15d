"""Training on the hosts that people use: as each pipeline draws, on its own way from pictures to noise."""

from dataclasses import replace

import hosts
import pytest
import torch
from tiers import thorough
from tiny import ATTENTION, tiny_clip, tiny_lora, tiny_tokenizer
from torch.nn.functional import pixel_unshuffle

import mole_diffusers as mole
from mole_diffusers.training import (
    OBJECTIVES,
    Clip,
    GateTraining,
    RandomBatch,
    Samples,
    TrainingContext,
    TrainingData,
    Validation,
    default_side,
    network,
    train_gates,
)
from mole_diffusers.training.denoising import sample_latents
from mole_diffusers.training.latents import decode, encode_pixels, latent_shape

LAYERS = (*ATTENTION, "w1", "w2", "w3", "proj_mlp", "img_mlp.net.2", "txt_mlp.net.2")
TEACH = {"seeds": 1, "steps": 2}
SIDE = {"width": 32, "height": 32}
PICTURES = Samples(torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0)), ["a fox"] * 4)
DATA = TrainingData(
    {"fox": ["a fox"], "ink": ["ink art"]},
    ["a fox in ink"],
    plain=["a cat"],
    styles=["ink"],
    parts={"a fox in ink": ["a fox", "ink art"]},
    sizes=dict.fromkeys(("a fox", "ink art", "a cat"), (32, 32)),
    samples=PICTURES,
)
FLOWS = {  # as the published schedulers are: shifted more for larger pictures, so to their last level, or always alike
    "flux": {"use_dynamic_shifting": True, "shift": 3.0},
    "qwen": {"use_dynamic_shifting": True, "shift_terminal": 0.02, "max_shift": 0.9, "max_image_seq_len": 8192},
    "z_image": {"shift": 3.0},
}


def host(name):
    """A pipeline with shifted noise levels and an autoencoder with a scale of its own."""
    pipe, _ = hosts.HOSTS[name]()
    if name in FLOWS:
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **FLOWS[name])
        scale = {"scaling_factor": 0.7, "shift_factor": 0.2}
        own = {"latents_mean": [0.1, 0.2, 0.3, -0.4], "latents_std": [1.0, 1.5, 2.0, 0.5]}
        pipe.vae.register_to_config(**own if name == "qwen" else scale)
        pipe.default_sample_size = 16  # of latents, instead of 128
    return pipe


def mixed(pipe, folder, **options):
    files = {n: tiny_lora(pipe, folder / f"{n}.safetensors", seed=i, ends=LAYERS) for i, n in enumerate(("fox", "ink"))}
    return mole.attach(pipe, files, mole.GateConfig("mole", total="N"), **options)


def gates_of(mixture):
    return {f"{p}.{k}": v.clone() for p, bank in mixture.banks.items() for k, v in bank.state_dict().items()}


@torch.no_grad()
@pytest.mark.parametrize("name", ["z_image", *thorough("flux", "qwen")])
def test_sampling_and_decoding_equal_the_pipelines_own(name, tmp_path):
    """Two routes: the differentiable sampler and decoder, and the pipeline's call with the same noise."""
    pipe, prompts = host(name), ["a fox", "an owl in ink"]
    mixed(pipe, tmp_path, binding=None)
    noise = torch.randn(2, 4, 16, 24, generator=torch.Generator().manual_seed(0))
    unpacked = {"latents": noise if name == "z_image" else pixel_unshuffle(noise, 2).flatten(2).mT}
    call = {"width": 48, "height": 32, "num_inference_steps": 3, "output_type": "np", **unpacked}
    for guidance in (1.0, 3.0):
        guided = {"true_cfg_scale": guidance, "negative_prompt": ["", ""]} if guidance > 1 else {}
        guided = {"guidance_scale": guidance - 1} if name == "z_image" else guided
        if name == "qwen" and guidance > 1:
            continue  # it changes the length of guided predictions
        wanted = torch.from_numpy(pipe(list(prompts), **call, **guided).images).movedim(-1, 1)
        found = decode(pipe, sample_latents(pipe, noise, prompts, steps=3, guidance=guidance))
        torch.testing.assert_close((found / 2 + 0.5).clamp(0, 1), wanted, atol=1e-4, rtol=0)
        assert wanted.std() > 0.01


@pytest.mark.parametrize("name", ["sd15", "sd21", *FLOWS])
def test_a_model_that_predicts_its_target_draws_the_picture(name):
    """From any level that is trained on to the clean latents, by the sampler's own steps."""
    model = network(host(name))
    clean, noise = torch.randn(2, 3, 4, 8, 8)
    every, levels = model.noise(8, 8), model.noise(8, 8, 4)
    assert len(every.timesteps) == 1000
    assert every.timesteps.unique().diff().max() < 10
    x = levels.noised(clean, noise, levels.timesteps[1].expand(3))
    for i in range(1, 4):
        at = levels.timesteps[i].expand(3)
        x = levels.step(levels.target(clean, noise, at), i, x)
    torch.testing.assert_close(x, clean, atol=0.2 if name.startswith("sd") else 1e-5, rtol=0)


@pytest.mark.parametrize(("name", "mean"), [("flux", 0.6), ("z_image", 0.7), ("sd15", 0.5)])
def test_levels_that_are_trained_on_are_shifted_as_those_that_are_drawn_at(name, mean):
    model = network(host(name))
    for steps in (None, 200):
        assert model.noise(16, 16, steps).timesteps.float().mean() / 1000 == pytest.approx(mean, abs=0.05)
    if name == "flux":  # more for a larger picture
        assert model.noise(128, 128).timesteps.mean() > 1.1 * model.noise(16, 16).timesteps.mean()


@torch.no_grad()
@pytest.mark.parametrize("name", FLOWS)
def test_pictures_are_encoded_in_the_scale_that_the_denoiser_reads(name):
    pipe = host(name)
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    if name == "qwen":
        own = pipe.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, spread = (torch.tensor(pipe.vae.config[key]).reshape(4, 1, 1) for key in ("latents_mean", "latents_std"))
    else:
        own, mean, spread = pipe.vae.encode(pixels).latent_dist.mode(), 0.2, 1 / 0.7
    torch.testing.assert_close(encode_pixels(pipe, pixels), (own - mean) / spread)
    assert latent_shape(pipe, 48, 32) == (4, *own.shape[2:3], own.shape[3] * 3 // 2)
    assert default_side(pipe) == latent_shape(pipe)[1] * pipe.vae_scale_factor
    with pytest.raises(ValueError, match="multiple of 8 pixels, got 36"):
        latent_shape(pipe, 36, 32)


ALL = {"single": TEACH, "base": TEACH, "collage": {"pictures": 2, "seeds": 1, "steps": 2}, "composed": TEACH}


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("flux", {"denoise": 1.0}),
        *thorough(*((name, {"denoise": 1.0}) for name in ("sdxl", "qwen", "z_image"))),
        *thorough(*(("qwen", {term: given}) for term, given in ALL.items()), ("z_image", {"single": TEACH})),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else value,
)
def test_the_loss_falls_and_only_gates_move(name, terms, awake, tmp_path):
    pipe = host(name)
    mixture = awake(mixed(pipe, tmp_path), size=2.0)
    models = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    before = {(i, n): p.clone() for i, m in enumerate(models) for n, p in m.named_parameters() if "mole_gates" not in n}
    gates = gates_of(mixture)
    config = GateTraining(terms, steps=12, lr=3e-2, batch=4, **SIDE)
    (term,) = terms
    loss = OBJECTIVES[term](TrainingContext(pipe, mixture, DATA, config=config), config.parsed[term])

    def now():
        with torch.no_grad():
            return loss(RandomBatch(torch.Generator().manual_seed(1), 8)).item()

    first = now()
    train_gates(pipe, mixture, DATA, config=config)
    assert now() < first
    after = {(i, n): p for i, m in enumerate(models) for n, p in m.named_parameters() if "mole_gates" not in n}
    assert all(torch.equal(value, after[key]) and after[key].grad is None for key, value in before.items())
    trained = gates_of(mixture)
    parts = {key.split(".")[0] for key, value in gates.items() if not torch.equal(value, trained[key])}
    assert {"transformer", "unet"} & parts


class Cut(BaseException):
    """What stops a run in the tests."""


@pytest.mark.parametrize("name", ["z_image", *thorough("sdxl", "flux", "qwen")])
def test_a_run_cut_off_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    def run(folder, **options):
        pipe = host(name)
        mixture = mixed(pipe, tmp_path)
        config = GateTraining({"denoise": 1.0, "single": TEACH}, steps=3, batch=2, every=1, **SIDE)
        log = train_gates(pipe, mixture, DATA, config=config, folder=folder, **options)
        return gates_of(mixture), log

    def die(row):
        if row["step"] == 1:
            raise Cut

    gates, log = run(tmp_path / "whole")
    with pytest.raises(Cut):
        run(tmp_path / "cut", report=die)
    again, rest = run(tmp_path / "cut", resume_from="latest")
    assert rest == log
    assert all(torch.equal(value, again[key]) for key, value in gates.items())


@pytest.mark.parametrize("name", thorough("flux", "qwen", "z_image"))
def test_checkpointing_changes_no_gradient(name, awake, tmp_path):
    found = []
    for checkpointing in (False, True):
        pipe = host(name)
        mixture = awake(mixed(pipe, tmp_path), size=2.0)
        config = GateTraining({"denoise": 1.0}, steps=1, batch=2, checkpointing=checkpointing, lr=1e-2, **SIDE)
        log = train_gates(pipe, mixture, DATA, config=config)
        found.append((log[0]["loss"], gates_of(mixture)))
    assert found[0][0] == found[1][0]
    for key, value in found[0][1].items():
        torch.testing.assert_close(found[1][1][key], value)


@pytest.mark.parametrize("name", ["qwen", *thorough("flux", "z_image")])
def test_validation_draws_with_guidance(name, tmp_path):
    """Two routes: the pictures that validation draws, and the pipeline's call."""
    pipe, drawn = host(name), []
    mixture = mixed(pipe, tmp_path)
    pipe.encode_prompt = lambda *given, own=pipe.encode_prompt, **named: own(*given, **{**named, "max_sequence_length": 64})
    looks = Validation(every=1, prompts=["a fox"], seeds=2, steps=2, guidance=3.0)
    config = GateTraining({"denoise": 1.0}, steps=1, batch=2, validation=looks, **SIDE)

    def success(images, prompt):
        drawn.extend(images)
        return 1.0

    train_gates(pipe, mixture, DATA, config=config, success=success)
    guided = {"true_cfg_scale": 3.0, "negative_prompt": [" ", " "]} if name == "qwen" else {"guidance_scale": 3.0}
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    again = pipe(["a fox"] * 2, generator=generators, num_inference_steps=2, **SIDE, **guided).images
    assert [list(image.getdata()) for image in drawn] == [list(image.getdata()) for image in again]


def test_terms_that_need_a_unet_say_so(tmp_path):
    pipe = host("flux")
    mixture, clip = mixed(pipe, tmp_path), Clip(tiny_clip(), tiny_tokenizer())
    two = replace(DATA, styles=[])
    for terms, what in (
        ({"separate": {"steps": 1}}, "the separate term"),
        ({"composed": TEACH}, "the composed term of several subjects"),
        ({"clip": {"lengths": (3, 3)}}, "the clip term"),
    ):
        with pytest.raises(ValueError, match=f"{what} needs a UNet, and FluxPipeline has none"):
            train_gates(pipe, mixture, two, config=GateTraining(terms, steps=1, **SIDE), clip=clip)
