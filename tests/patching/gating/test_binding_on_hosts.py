"""Binding on hosts other than Stable Diffusion 1.5."""

import warnings

import hosts
import pytest
import torch
from bound_pictures import PROMPT, bound_pictures, draw_other
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.binding import Bound

pytestmark = pytest.mark.usefixtures("decided")


def test_all_words_and_places_are_no_binding_on_any_host(other):
    _, unbound = bound_pictures(other, None)
    _, everywhere = bound_pictures(other, dict.fromkeys(other.files, "everywhere"))
    _, whole = bound_pictures(other, dict.fromkeys(other.files, (None, (0.0, 0.0, 1.0, 1.0))))
    assert torch.equal(everywhere, unbound)
    torch.testing.assert_close(whole, unbound, atol=1e-5, rtol=0)


def test_an_absent_word_is_strength_0_on_any_host(other):
    mixture, absent = bound_pictures(other, {"fox": "fox", "ink": Bound(("cat",), required=True)})
    mixture.bind({"ink": "everywhere"})
    mixture.strength("ink", 0)
    torch.testing.assert_close(draw_other(other), absent, atol=1e-5, rtol=0)


def test_prompts_with_and_without_words_are_drawn_as_alone_on_any_host(other):
    other.attach().bind({"fox": "fox", "ink": "owl"})

    def draw(*prompts):
        generators = [torch.Generator().manual_seed(len(prompt)) for prompt in prompts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return hosts.draw(other.pipe, other.options | {"generator": generators}, list(prompts))

    torch.testing.assert_close(draw("a house", "a fox"), torch.cat([draw("a house"), draw("a fox")]), atol=1e-4, rtol=0)


@pytest.mark.shows("binding: these work")
def test_a_layout_is_planned_on_any_host(other):
    mixture, picture = bound_pictures(other, {"fox": "fox", "ink": "owl"}, steps=3)
    (layout,) = mixture.layouts
    assert set(layout.regions) == {"fox", "ink"}
    assert torch.equal(layout.regions["fox"] + layout.regions["ink"], torch.ones_like(layout.regions["fox"]))
    assert all(map.shape[0] * map.shape[1] >= 4 and map.max() > 0 for map in layout.maps.values())
    _, unbound = bound_pictures(other, None, steps=3)
    assert (picture - unbound).abs().max() > 1e-3
    mole.detach(other.pipe)
    base = draw_other(other, steps=3)
    absent = {name: Bound((word,), required=True) for name, word in {"fox": "cat", "ink": "dog"}.items()}
    mole.attach(other.pipe, other.files, binding=absent)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(draw_other(other, steps=3), base, atol=1e-5, rtol=0)
    mixture, _ = bound_pictures(other, {"fox": "fox", "ink": "owl"}, steps=1)
    with mixture.only():
        torch.testing.assert_close(draw_other(other, steps=3), base, atol=1e-5, rtol=0)


@pytest.mark.thorough
@pytest.mark.parametrize("other", ["flux"], indirect=True)
def test_guidance_by_a_second_text_has_one_layout(other):
    """Flux's true guidance calls the transformer twice a step."""
    mixture = mole.attach(other.pipe, other.files, binding={"fox": "fox", "ink": "owl"})
    options = {"max_sequence_length": 16, "negative_prompt": "a cat", "true_cfg_scale": 2.0, "num_inference_steps": 3}
    other.pipe("fox and owl", output_type="latent", **hosts.SIZE, **options)
    assert set(mixture.layouts[0].regions) == {"fox", "ink"}
    spoken, negative = mixture.parts.settings.binding.now._texts
    assert spoken.region_masks is not None
    assert negative.region_masks is spoken.region_masks
    assert negative.inactive.experts == spoken.inactive.experts == (False, False)


@pytest.mark.thorough
def test_pictures_of_one_call_have_their_own_layouts_where_guidance_calls_for_each_text(tmp_path):
    pipe, options = hosts.HOSTS["chroma"]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, binding={"fox": "fox", "ink": "owl"})
    noise, found = [torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)], []
    for latents in (torch.cat(noise), *noise):
        options = options | {"max_sequence_length": 16, "latents": latents, "num_inference_steps": 3}
        pipe(["fox and owl"] * len(latents), output_type="latent", **options)  # the tiny T5 knows letters alone
        found.append([layout.maps["fox"] for layout in mixture.layouts])
    torch.testing.assert_close(found[0], [*found[1], *found[2]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "name", ["sd15-ip-adapter", *thorough("sd15-inpaint", "sd15-img2img", "sd15-controlnet", "sd15-pag", "sdxl-img2img")]
)
@pytest.mark.shows("binding: these work")
def test_binding_is_drawn_under_what_hosts_add(name, tmp_path):
    """The layout is planned, and closing everything everywhere gives the unbound picture."""
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, binding={"fox": "fox", "ink": "owl"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        bound = hosts.draw(pipe, options, PROMPT, steps=3)
        assert set(mixture.layouts[0].regions) == {"fox", "ink"}
        with mixture.bound(dict.fromkeys(files, "everywhere")):
            everywhere = hosts.draw(pipe, options, PROMPT, steps=3)
        with mixture.bound(None):
            unbound = hosts.draw(pipe, options, PROMPT, steps=3)
    assert torch.equal(everywhere, unbound)
    assert not torch.equal(bound, unbound)


@pytest.mark.parametrize(("edits", "plain"), [("sd15-pix2pix", "sd15"), *thorough(("sdxl-pix2pix", "sdxl"))])
@pytest.mark.parametrize(("count", "guidance"), [(3, 3.0), *thorough((1, 3.0), (3, 1.0))])
@pytest.mark.shows("binding: these work")
def test_an_edit_that_cannot_see_its_picture_is_an_ordinary_drawing(edits, plain, count, guidance, tmp_path):
    """Pix2Pix has the prompts' rows first, and two groups of other texts; where the picture counts for nothing in the UNet
    its guidance is the ordinary one."""
    (pipe, options), (other, _) = hosts.HOSTS[edits](), hosts.HOSTS[plain]()
    prompts = ["an owl+a fox", "a hen a fox", PROMPT][-count:]
    with torch.no_grad():
        pipe.unet.conv_in.weight[:, 4:] = 0
        states = pipe.unet.state_dict() | {"conv_in.weight": pipe.unet.conv_in.weight[:, :4]}
    other.unet.load_state_dict(states)
    other.text_encoder.load_state_dict(pipe.text_encoder.state_dict())
    other.vae.load_state_dict(pipe.vae.state_dict())
    if hasattr(pipe, "text_encoder_2"):
        other.text_encoder_2.load_state_dict(pipe.text_encoder_2.state_dict())
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    pictures, regions = [], []
    for one, given in ((pipe, options | {"image": torch.cat([hosts.PICTURE] * len(prompts))}), (other, hosts.SIZE)):
        mixture = mole.attach(one, files, binding={"fox": "fox", "ink": "owl"})
        given = given | {"latents": noise.clone(), "guidance_scale": guidance}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pictures.append(hosts.draw(one, given, prompts, steps=3))
            regions.append([layout.regions for layout in mixture.layouts])
            with mixture.bound(None):
                unbound = hosts.draw(one, given, prompts, steps=3)
        assert not torch.allclose(pictures[-1], unbound, atol=1e-3)
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
    torch.testing.assert_close(*regions)
    assert len(regions[0]) == len(prompts)
    assert set(regions[0][-1]) == {"fox", "ink"}
