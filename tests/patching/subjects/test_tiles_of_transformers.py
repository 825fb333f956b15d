"""Tiles on SD 3 and Flux against a slow loop over crops that are made by hand, with diffusers' own adapters."""

from contextlib import contextmanager
from dataclasses import replace

import diffusers
import pytest
import torch
from hosts import HOSTS, IMAGE, SIZE, assert_same, flux, load_adapters, quiet, sd3, snapshot
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers import denoiser
from mole_diffusers.lora import read_expert
from mole_diffusers.patching.subjects.windows import silhouette

PROMPT, TOUCHING = "fox and hen", "fox on hen"  # a token per letter
MADE = {"sd3": sd3, "flux": flux}
GUIDED = {"sd3": {"guidance_scale": 3.0}, "flux": {"true_cfg_scale": 3.0, "negative_prompt": "ox"}}
UNGUIDED = {"sd3": {"guidance_scale": 1.0}, "flux": {}}
OVER = {"sd3": diffusers.StableDiffusion3Img2ImgPipeline, "flux": diffusers.FluxImg2ImgPipeline}
HALVES = {"fox": slice(0, 4), "hen": slice(4, 8)}  # columns of tokens


class Host:
    """A pipeline with two LoRAs, and another of the same weights with diffusers' own adapters."""

    def __init__(self, name, folder):
        self.name, self.pipe, self.other = name, MADE[name](), MADE[name]()
        self.options = {"max_sequence_length": 16} if name == "flux" else {}
        self.files = {x: tiny_lora(self.pipe, folder / f"{x}.safetensors", seed=i) for i, x in enumerate(("fox", "hen"))}

    def attach(self, names=("fox", "hen"), pipe=None):
        experts = {x: replace(read_expert(self.files[x], x), triggers=(x,)) for x in names}
        return mole.attach(self.pipe if pipe is None else pipe, experts)

    def noise(self, height=16, width=16, rows=1):
        """Of a picture of this many latent pixels."""
        x = torch.randn(rows, 4, height, width, generator=torch.Generator().manual_seed(0))
        return (
            x if self.name == "sd3" else x.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        )

    def draw(self, prompt=PROMPT, x=None, steps=2, size=(16, 16), pipe=None, **options):
        x = self.noise(*size) if x is None else x
        call = {"num_inference_steps": steps, "output_type": "latent", **UNGUIDED[self.name], **self.options, **options}
        pipe = self.pipe if pipe is None else pipe
        return pipe(prompt, latents=x, height=2 * size[0], width=2 * size[1], **call).images

    def grid(self, tokens, side=(8, 8)):
        """[B, H, W, C], a row of channels for each token."""
        if self.name == "flux":
            return tokens.view(len(tokens), *side, -1)
        return tokens.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 1, 4, 5).flatten(3)

    def encoded(self, names, prompt):
        """What diffusers' adapters of these names make of a prompt."""
        self.other.set_adapters(list(names))
        if self.name == "sd3":
            text, _, pooled, _ = self.other.encode_prompt(prompt, None, None, do_classifier_free_guidance=False)
        else:
            text, pooled, _ = self.other.encode_prompt(prompt, max_sequence_length=16)
        return text, pooled

    @torch.no_grad()
    def predicted(self, names, text, x, rows, columns, time, side=(8, 8)):
        """What the transformer predicts with adapters of these names for a crop of latents, [B, h, w, C]."""
        self.other.set_adapters(list(names))
        text, pooled = (states.expand(len(x), *states.shape[1:]) for states in text)
        call = {"encoder_hidden_states": text, "pooled_projections": pooled, "return_dict": False}
        if self.name == "sd3":
            rows, columns = (slice(2 * of.start, 2 * of.stop) for of in (rows, columns))
            crop = x[:, :, rows, columns]
            return self.grid(self.other.transformer(crop, timestep=time.expand(len(x)), **call)[0])
        crop = self.grid(x, side)[:, rows, columns]
        height, width = crop.shape[1:3]
        ids = torch.tensor([(0, i, j) for i in range(height) for j in range(width)]).float()
        call |= {"img_ids": ids, "txt_ids": torch.zeros(text.shape[1], 3), "timestep": time.expand(len(x)) / 1000}
        return self.grid(self.other.transformer(crop.flatten(1, 2), **call)[0], (height, width))

    def guided(self, name, x, rows, columns, time, *, is_guided, side=(8, 8)):
        """The same for the prompt of one thing, with guidance, and what guidance adds."""
        found = self.predicted([name], self.encoded([name], name), x, rows, columns, time, side)
        if not is_guided:
            return found, None
        nothing = self.encoded(self.files, GUIDED[self.name].get("negative_prompt", ""))
        base = self.predicted([name], nothing, x, rows, columns, time, side)
        return base + 3 * (found - base), found - base


@pytest.fixture(params=["sd3", "flux"])
def host(request, tmp_path):
    return Host(request.param, tmp_path)


@contextmanager
def steps_of(pipe):
    """(prediction, noise level, latents) of each step of the scheduler."""
    seen, step = [], pipe.scheduler.step

    def stepped(prediction, time, latents, **options):
        seen.append((prediction, time, latents))
        return step(prediction, time, latents, **options)

    pipe.scheduler.step = stepped
    yield seen
    del pipe.scheduler.step


@contextmanager
def sizes_of(pipe):
    """The number of tokens of the picture in each call of the transformer."""
    seen = []
    hook = (
        denoiser(pipe)
        .transformer_blocks[0]
        .register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs["hidden_states"].shape[1]), with_kwargs=True)
    )
    yield seen
    hook.remove()


def check_halves(host, seen, *, is_guided):
    """Each half of the predictions is that of its subject alone."""
    assert seen
    for prediction, time, x in seen:
        parts = [host.guided(n, x, slice(0, 8), columns, time, is_guided=is_guided)[0] for n, columns in HALVES.items()]
        torch.testing.assert_close(host.grid(prediction), torch.cat(parts, 2), rtol=0, atol=1e-4)


@pytest.mark.parametrize("is_guided", [True, False])
def test_a_picture_in_tiles_is_what_each_lora_alone_predicts_for_its_crop(host, is_guided):
    """SD 3 guides in one call, Flux in two, or by a number that every call gets."""
    mixture, options = host.attach(), GUIDED[host.name] if is_guided else {"negative_prompt": "ox"}  # which nothing reads
    with mixture.tiled(1.0, since=0), steps_of(host.pipe) as seen:
        found = host.draw(**options)
    assert (found - host.draw(**options)).abs().max() > 1e-2
    load_adapters(host.other, host.files)
    check_halves(host, seen, is_guided=is_guided)


def test_a_flux_that_reads_guidance_as_a_number_reads_it_in_every_tile(tmp_path):
    host = Host("flux", tmp_path)
    own, heard = {name: value for name, value in host.pipe.transformer.config.items() if not name.startswith("_")}, []
    host.pipe.register_modules(transformer=diffusers.FluxTransformer2DModel(**own | {"guidance_embeds": True}))
    host.pipe.transformer.time_text_embed.register_forward_pre_hook(lambda _, args: heard.append(args[1].tolist()))
    with host.attach().tiled(1.0, since=0):
        host.draw(guidance_scale=7.0)
    assert heard == [[7000.0]] * 4


@pytest.mark.parametrize("is_guided", [True, False])
def test_two_that_touch_overlap_and_guidance_that_is_known_divides_them(tmp_path, is_guided):
    host = Host("sd3", tmp_path)
    host.pipe.transformer.register_to_config(sample_size=8)  # 4 tokens
    options, side = GUIDED["sd3"] if is_guided else {}, (6, 4)
    with host.attach().tiled(1.0, since=0), steps_of(host.pipe) as seen:
        host.draw(TOUCHING, steps=1, size=(12, 8), **options)
    load_adapters(host.other, host.files)
    ((prediction, time, x),) = seen
    (fox, change), (hen, _) = (
        host.guided(name, x, rows, slice(0, 4), time, is_guided=is_guided, side=side)
        for name, rows in (("fox", slice(0, 4)), ("hen", slice(2, 6)))
    )
    wanted = torch.cat([fox[:, :3], hen[:, 1:]], 1)
    if is_guided:
        share = silhouette(change.permute(0, 3, 1, 2))[0, 2:4, :, None]  # three sixteenths of 4 tokens on both sides
        wanted[:, 2:4] = share * fox[:, 2:4] + (1 - share) * hen[:, :2]
    torch.testing.assert_close(host.grid(prediction), wanted, rtol=0, atol=1e-4)


def test_the_layout_of_two_that_touch_is_the_base_drawing_the_whole_prompt(host):
    """A crop that is the whole picture changes no bit."""
    with steps_of(host.pipe) as base:
        host.draw(TOUCHING, steps=5)
    with host.attach().tiled(), steps_of(host.pipe) as seen:
        host.draw(TOUCHING, steps=5)
    assert torch.equal(seen[0][0], base[0][0])
    assert not torch.equal(seen[2][0], base[2][0])


def test_the_other_steps_are_bound_to_the_places_of_the_tiles(host):
    mixture = host.attach()
    with sizes_of(host.pipe) as sizes, mixture.tiled(0.75, since=0.25), steps_of(host.pipe) as seen:
        host.draw(steps=4)
    assert sizes == [64, 32, 32, 32, 32, 64]
    mixture.bind({"fox": (None, "left"), "hen": (None, "right")})
    with mixture.tiled(0), steps_of(host.pipe) as bound:
        host.draw(steps=4)
    assert torch.equal(seen[0][0], bound[0][0])
    assert not torch.equal(seen[1][0], bound[1][0])
    (wanted, time, x) = seen[-1]
    with mixture.tiled(0), steps_of(host.pipe) as last:
        host.draw(x=x, steps=1, sigmas=[float(time) / 1000])
    torch.testing.assert_close(last[0][0], wanted, rtol=0, atol=1e-5)


def test_rows_of_a_batch_are_drawn_as_alone(host):
    x, guided = host.noise(rows=2), GUIDED[host.name] | {"negative_prompt": "ox"}
    with host.attach().tiled():
        for options, of_two in (({}, {}), (guided, guided | {"negative_prompt": ["ox"] * 2})):
            both = host.draw([PROMPT] * 2, x, **of_two)
            each = torch.cat([host.draw(PROMPT, row[None], **options) for row in x])
            torch.testing.assert_close(both, each, rtol=0, atol=1e-4)


def test_one_subject_is_drawn_as_set_adapters_does(host):
    with host.attach(["fox"]).tiled():
        found = host.draw("fox")
    load_adapters(host.other, {"fox": host.files["fox"]})
    torch.testing.assert_close(found, host.draw("fox", pipe=host.other), rtol=0, atol=1e-4)


def test_the_pipeline_is_given_back(host):
    base, before = host.draw(), snapshot(host.pipe)
    with host.attach().tiled():
        host.draw(**GUIDED[host.name])
    assert "forward" not in vars(host.pipe.transformer)
    mole.detach(host.pipe)
    assert_same(before, snapshot(host.pipe))
    assert torch.equal(host.draw(), base)


def test_it_is_never_done_without_being_asked(host):
    """Nobody has measured what it gains there."""
    if host.name == "sd3":
        host.pipe.transformer.register_to_config(sample_size=8)  # so that each has room
    mixture = host.attach()
    found = host.draw()
    with mixture.tiled(0):
        assert torch.equal(host.draw(), found)
    with mixture.tiled(always=False):
        assert torch.equal(host.draw(), found)
    kind = type(host.pipe.transformer).__name__
    assert mixture.explain(PROMPT).why_no_tiles == f"a {kind} draws in tiles inside `mixture.tiled()` alone"
    with mixture.tiled():
        assert mixture.explain(PROMPT, 32, 32).tiles == ["fox", "hen"]
        assert mixture.explain("fox", 32, 32).tiles is None
        side = {"sd3": 16, "flux": 256}[host.name]  # pixels of a picture that the transformer was trained with
        assert mixture.explain(PROMPT, 2 * side, side).tiled == (0.4, 0.8)
        assert mixture.explain(PROMPT, side + side // 2, side).tiled == (0.2, 0.8)  # windows overlap
    with mixture.tiled(0):
        assert mixture.explain(PROMPT).why_no_tiles == "tiles are off"


@pytest.mark.parametrize("name", ["flux", *thorough("sd3")])
def test_a_picture_can_be_drawn_over_in_tiles(tmp_path, name):
    host = Host(name, tmp_path)
    over = quiet(OVER[name](**host.pipe.components))
    options = SIZE | IMAGE | UNGUIDED[name] | host.options | {"num_inference_steps": 2, "output_type": "latent"}
    with host.attach(pipe=over).tiled(1.0, since=0), steps_of(over) as seen:
        over(PROMPT, generator=torch.Generator().manual_seed(0), **options)
    load_adapters(host.other, host.files)
    check_halves(host, seen, is_guided=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_counted_however_the_noise_level_is_rounded(tmp_path, dtype):
    """Flux gets it divided, and in the precision of the latents."""
    host = Host("flux", tmp_path)
    host.pipe.to(dtype)
    with host.attach().tiled(), sizes_of(host.pipe) as sizes:
        host.draw(steps=50, x=host.noise().to(dtype))
    assert sizes == [64] * 20 + [32, 32] * 20 + [64] * 10


def test_the_scale_of_a_call_reaches_every_tile(host):
    mixture = host.attach()
    with mixture.tiled(1.0, since=0):
        with mixture.strengths({"fox": 0.5, "hen": 0.5}):
            half = host.draw()
        torch.testing.assert_close(host.draw(joint_attention_kwargs={"scale": 0.5}), half, rtol=0, atol=1e-5)


def test_blocks_may_be_compiled_one_by_one(tmp_path):
    host = Host("flux", tmp_path)  # SD 3 does not say which of its blocks repeat
    with host.attach().tiled(0.8, since=0.4):
        found = host.draw(steps=5)
        host.pipe.transformer.compile_repeated_blocks(backend="eager")
        torch.testing.assert_close(host.draw(steps=5), found, rtol=0, atol=1e-5)
        host.pipe.transformer.compile(backend="eager")
        with pytest.raises(ValueError, match="the denoiser is compiled as one graph"):
            host.draw()


def test_what_cannot_be_drawn_in_tiles_is_said(host):
    mixture, call, asked = host.attach(), {}, {"prompt": PROMPT}
    hook = host.pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: call.update(kwargs), with_kwargs=True)
    host.draw()
    hook.remove()
    control = "block_controlnet_hidden_states" if host.name == "sd3" else "controlnet_block_samples"
    with mixture.tiled(), mixture.drawing(asked), pytest.raises(ValueError, match="a ControlNet sees the whole"):
        host.pipe.transformer(**call, **{control: [torch.zeros(1, 64, 16)]})
    if host.name == "flux":  # Kontext puts the tokens of given pictures behind those of the drawn one
        given = torch.cat([call["img_ids"], call["img_ids"] + torch.tensor([1.0, 0, 0])])
        more = {"hidden_states": torch.cat([call["hidden_states"]] * 2, 1), "img_ids": given}
        with mixture.tiled(), mixture.drawing(asked), pytest.raises(ValueError, match="this call has given pictures"):
            host.pipe.transformer(**{**call, **more})
        host.pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig())
        with mixture.tiled(), pytest.raises(ValueError, match="call disable_cache"):
            host.draw()
        host.pipe.transformer.disable_cache()
    for more in ("prompt_2", *(["prompt_3"] if host.name == "sd3" else [])):
        with mixture.tiled(), pytest.raises(ValueError, match=f"draw without {more}$"):
            host.draw(**{more: "ox"})
    with mixture.tiled(), pytest.raises(ValueError, match="not 'mine': draw without it"):
        host.draw(joint_attention_kwargs={"mine": 1})


def test_other_transformers_are_refused(tmp_path):
    pipe, options = HOSTS["chroma"]()
    mixture = mole.attach(pipe, {"fox": tiny_lora(pipe, tmp_path / "fox.safetensors")})
    with mixture.tiled(), pytest.raises(ValueError, match="by UNets, SD 3 and Flux, not by a ChromaTransformer2DModel"):
        pipe("a fox", num_inference_steps=1, **options)
