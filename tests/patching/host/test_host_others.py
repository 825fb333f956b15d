"""A mixture on hosts other than Stable Diffusion 1.5: sizes, sharing, training, interrupts, threads, compiling."""

from concurrent.futures import ThreadPoolExecutor

import diffusers
import hosts
import pytest
import torch
import torch._dynamo
from hosts import breaking
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.patching.install.peft_injection import ADAPTER

CLOSE = {"atol": 1e-4, "rtol": 0}
HELD = {"fox": 0.7, "ink": -0.4}


@pytest.mark.shows("these work")
def test_any_resolution(other):
    """The other route: diffusers' own adapters at the same weights."""
    pipe, options = other.pipe, other.options | {"height": 16, "width": 64}
    with other.attach().fixed(HELD):
        held = hosts.draw(pipe, options)
    mole.detach(pipe)
    for name, file in other.files.items():
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(list(HELD), list(HELD.values()))
    assert held.shape[-3:] == (16, 64, 3)
    torch.testing.assert_close(held, hosts.draw(pipe, options), **CLOSE)


@pytest.mark.shows("`from_pipe`")
def test_from_pipe_shares_the_mixture(other):
    kind = type(other.pipe)
    mixture = other.attach()
    picture = hosts.draw(other.pipe, other.options)
    second = hosts.quiet(kind.from_pipe(other.pipe, dtype=torch.float32))
    assert mole.attached(second) is mixture
    assert torch.equal(hosts.draw(second, other.options), picture)


def seen_by_the_denoiser(other):
    """What the pipeline calls its denoiser with at the first step."""
    calls = []
    hook = hosts.denoiser(other.pipe).register_forward_pre_hook(
        lambda _, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    hosts.draw(other.pipe, other.options, steps=1)
    hook.remove()
    return calls[0]


@pytest.mark.shows("these work")
def test_gradient_checkpointing_gives_the_same_gradients(other):
    mixture, denoiser = other.attach(), hosts.denoiser(other.pipe)
    args, kwargs = seen_by_the_denoiser(other)
    for gate in mixture.parameters():
        gate.requires_grad_(True)

    def gradients():
        denoiser(*args, **kwargs)[0].square().mean().backward()
        made = [p.grad for p in mixture.parameters() if p.grad is not None]
        for p in mixture.parameters():
            p.grad = None
        return made

    plain = gradients()
    denoiser.enable_gradient_checkpointing()
    denoiser.train()
    assert plain
    for one, again in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, again, atol=1e-6, rtol=1e-4)


PLACES = {  # what is interrupted -> the modules one of which it happens in
    "text encoder": lambda pipe: pipe.text_encoder,
    "denoiser": hosts.denoiser,
}


@pytest.mark.parametrize("place", ["denoiser", "callback", *thorough("text encoder")])
@pytest.mark.shows("exceptions, interrupts, threads")
def test_an_interrupt_leaves_a_usable_pipeline(other, place):
    pipe, options = other.pipe, other.options
    base = hosts.draw(pipe, options)
    mixture = other.attach()
    whole = hosts.draw(pipe, options)
    interrupt = breaking(KeyboardInterrupt, 1)
    asked, hooks = options, []
    if place in PLACES:
        experts = [m for n, m in PLACES[place](pipe).named_modules() if n.endswith(f"lora_B.{ADAPTER}")]
        hooks = [expert.register_forward_hook(interrupt) for expert in experts]
    else:
        asked = options | {"callback_on_step_end": interrupt}
    with pytest.raises(KeyboardInterrupt), mixture.only("fox"), mixture.strengths({"fox": 2}), mixture.trace():
        hosts.draw(pipe, asked)
    for hook in hooks:
        hook.remove()
    assert torch.equal(hosts.draw(pipe, options), whole)
    mole.detach(pipe)
    assert torch.equal(hosts.draw(pipe, options), base)


@pytest.mark.shows("exceptions, interrupts, threads")
def test_threads_draw_what_each_would_alone(other):
    mixture = other.attach()

    def work(name):
        with mixture.only(name):
            return hosts.draw(other.pipe, other.options)

    alone = {name: work(name) for name in other.files}
    with ThreadPoolExecutor(len(alone)) as threads:
        together = dict(zip(alone, threads.map(work, alone), strict=True))
    assert all(torch.equal(alone[name], together[name]) for name in alone)
    assert not torch.allclose(alone["fox"], alone["ink"], atol=1e-3)


CONTROLLERS = {  # the models that are made of a denoiser's weights; there is none for videos
    "sdxl": lambda unet: diffusers.ControlNetModel.from_unet(unet),
    "sd21": lambda unet: diffusers.ControlNetModel.from_unet(unet),
    "flux": lambda transformer: diffusers.FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    ),
    "sd3": lambda transformer: diffusers.SD3ControlNetModel.from_transformer(transformer, num_layers=1),
}


@pytest.mark.parametrize("name", ["flux", *thorough("sdxl", "sd21", "sd3")])
@pytest.mark.shows("`ControlNetModel.from_unet`")
def test_a_controlnet_is_made_of_the_original(name, tmp_path):
    pipe, _ = hosts.HOSTS[name]()
    make, denoiser = CONTROLLERS[name], hosts.denoiser(pipe)
    wanted = {k: v for k, v in make(denoiser).state_dict().items() if k in denoiser.state_dict()}
    mixture = mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox")})
    with pytest.raises(ValueError, match=r"carries the experts of a mixture.*inside `with mixture.lifted\(\):`"):
        make(denoiser)
    with mixture.lifted():
        made = make(denoiser).state_dict()
    assert wanted
    assert all(torch.equal(made[k], v) for k, v in wanted.items())


@pytest.mark.parametrize("name", thorough("sdxl", "sd21", "animatediff"))
@pytest.mark.shows("these work")
def test_attention_slicing_on_and_off(name, awake, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    awake(mole.attach(pipe, {n: tiny_lora(pipe, tmp_path / n, seed=i) for i, n in enumerate(HELD)}, "mole"))
    picture = hosts.draw(pipe, options)
    pipe.enable_attention_slicing(1)
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)
    pipe.disable_attention_slicing()
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)


@pytest.mark.thorough
@torch._dynamo.config.patch(recompile_limit=64)
@pytest.mark.shows("`torch.compile`")
def test_compiled_in_one_graph(other):
    torch.compiler.reset()
    pipe, options = other.pipe, other.options
    base = hosts.draw(pipe, options)
    mixture = other.attach()
    with mixture.only("ink"), mixture.strengths({"ink": 0.5}):
        ink = hosts.draw(pipe, options)
    picture = hosts.draw(pipe, options)
    hosts.denoiser(pipe).compile(fullgraph=True, backend="eager")
    torch.testing.assert_close(hosts.draw(pipe, options), picture, **CLOSE)
    with torch._dynamo.config.patch(error_on_recompile=True), mixture.only("ink"), mixture.strengths({"ink": 0.5}):
        torch.testing.assert_close(hosts.draw(pipe, options), ink, **CLOSE)
    mole.detach(pipe)
    torch.testing.assert_close(hosts.draw(pipe, options), base, **CLOSE)
