"""Control maps and reference pictures: ControlNets and IP-Adapters with random weights, in files as artists have them."""

import dataclasses

import diffusers
import hosts
import numpy as np
import pytest
import torch
from PIL import Image
from single_file import save_controlnet
from tiers import thorough
from tiny import tiny_lora

from mole_app.studio import infotext
from mole_app.studio.catalog import Catalog
from mole_app.studio.controlnets import open_controlnet
from mole_app.studio.ip_adapters import open_image_encoder
from mole_app.studio.model_folders import files_of
from mole_app.studio.picture_passes import fitted, with_pictures
from mole_app.studio.recipe import Recipe
from mole_app.studio.render import Studio
from mole_cli.mole import main
from mole_diffusers import attach

RECIPE = Recipe("a fox <lora:fox:0.8>", seed=7, steps=4, width=32, height=32, strength=0.5)
CONTROL = {"controlnet": "Canny", "control_strength": 0.7, "control_end": 0.6}
ADAPTED = {"ip_adapter": "ip-plus", "ip_scale": 0.5}
KINDS = ("controlnet", "ip_adapter", "clip_vision")
PIPES = {"sd15": (hosts.sd, hosts.controlnet), "sdxl": (hosts.sdxl, hosts.xl_controlnet)}


def noise(seed, size=(32, 32)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


MAP, SHOWN, PHOTO = noise(1), noise(2, (40, 32)), noise(3)


def far(a, b):
    return np.abs(np.asarray(a, int) - np.asarray(b, int)).max()


@pytest.fixture(scope="module", params=["sd15", *thorough("sdxl")])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(2)
    return hosts.eye(width=128)


@pytest.fixture(scope="module")
def folder(kind, encoder, tmp_path_factory):
    """The models folder of ComfyUI, with all that this takes."""
    folder = tmp_path_factory.mktemp(kind) / "models"
    for name in ("loras", "checkpoints"):
        (folder / name).mkdir(parents=True)
    make, network = PIPES[kind]
    pipe = make()
    torch.manual_seed(3)
    net = network()
    hosts.save_given(folder, pipe, net, encoder)
    net.save_pretrained(folder / "controlnet" / "depth")
    tiny_lora(pipe, folder / "loras" / "fox.safetensors")
    return folder


@pytest.fixture(scope="module")
def studio(kind, folder):
    files = {each: files_of(folder, each) for each in KINDS}
    return Studio(PIPES[kind][0](), Catalog(files_of(folder, "lora"), {}, files=files), "tiny")


def completed(studio, recipe, **pictures):
    return studio.complete(with_pictures(recipe, **pictures))


def test_each_kind_is_found_in_its_folder_and_in_one_with_others(folder):
    assert list(files_of(folder, "controlnet")) == ["canny", "depth"]
    (folder / "controlnet" / "ip-too.safetensors").symlink_to(folder / "ipadapter" / "ip-plus.safetensors")
    try:
        assert list(files_of(folder, "controlnet")) == ["canny", "depth"]
        assert list(files_of(folder, "ip_adapter")) == ["ip-plus", "ip-too"]
        assert list(files_of(folder / "controlnet", "ip_adapter")) == ["ip-too"]
    finally:
        (folder / "controlnet" / "ip-too.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no \.safetensors files in"):
        files_of(folder / "loras", "clip_vision")


@pytest.mark.parametrize(
    "over", [{}, {"image": PHOTO}, {"image": PHOTO, "mask": Image.linear_gradient("L").resize((32, 32))}]
)
@pytest.mark.parametrize("name", ["Canny", *thorough("depth")])
def test_a_control_map_is_that_of_diffusers_call_with_the_mixture_on(kind, studio, folder, over, name):
    recipe = completed(studio, dataclasses.replace(RECIPE, **CONTROL | {"controlnet": name}), **over, control=MAP)
    drawn = studio.draw(recipe, **over, control=MAP)
    make, network = PIPES[kind]
    pipe = make()
    torch.manual_seed(3)
    net = network()
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    does = "Inpaint" if "mask" in over else "Img2Img" if over else ""
    start = type(pipe).__name__.removesuffix("Pipeline")
    extra = {"feature_extractor": None} if kind == "sd15" else {}
    extra |= {"requires_safety_checker": False} if kind == "sd15" else {"add_watermarker": False}
    pipe = hosts.quiet(getattr(diffusers, f"{start}ControlNet{does}Pipeline")(**parts, **extra, controlnet=net))
    attach(pipe, {"fox": (folder / "loras" / "fox.safetensors", 0.8)}, "sum")
    given = {"control_image": MAP, "image": PHOTO, "strength": 0.5} if over else {"image": MAP}
    given |= {"mask_image": over["mask"]} if "mask" in over else {}
    given |= {"controlnet_conditioning_scale": 0.7, "control_guidance_end": 0.6, "width": 32, "height": 32}
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    wanted = pipe("a fox", **given, **call).images[0]
    if "mask" in over:
        wanted = Image.composite(wanted, PHOTO, over["mask"])
    assert far(drawn, wanted) <= 1
    weaker = completed(studio, dataclasses.replace(recipe, control_strength=0.0))
    assert far(studio.draw(weaker, **over, control=MAP), drawn) > 3


def test_a_file_with_the_original_names_has_the_same_weights(studio, tmp_path):
    torch.manual_seed(4)
    widths = {"conditioning_embedding_out_channels": (2, 4, 6, 8), "load_weights_from_unet": False}
    net = diffusers.ControlNetModel.from_unet(studio.base.pipe.unet, **widths)
    for weight in net.parameters():
        torch.nn.init.normal_(weight)
    found = open_controlnet(studio.base.pipe, save_controlnet(net, tmp_path / "net.safetensors")).state_dict()
    assert found.keys() == net.state_dict().keys()
    assert all(torch.equal(found[name], weight) for name, weight in net.state_dict().items())


def test_a_reference_picture_is_that_of_diffusers_call_and_leaves_nothing_behind(kind, studio, folder, encoder):
    plain = studio.complete(RECIPE)
    before = studio.draw(plain)
    processors = dict(studio.base.pipe.unet.attn_processors)
    recipe = completed(studio, dataclasses.replace(RECIPE, **ADAPTED), reference=SHOWN)
    drawn = studio.draw(recipe, reference=SHOWN)
    pipe = PIPES[kind][0]()
    attach(pipe, {"fox": (folder / "loras" / "fox.safetensors", 0.8)}, "sum")
    hosts.ip_adapter(pipe, encoder)
    pipe.set_ip_adapter_scale(0.5)
    size = {"width": recipe.width, "height": recipe.height}
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(7)}
    wanted = pipe("a fox", ip_adapter_image=SHOWN, **size, **call).images[0]
    assert far(drawn, wanted) <= 1
    assert far(studio.draw(recipe, reference=SHOWN), drawn) == 0  # with what was remembered
    assert far(studio.draw(plain), before) == 0
    assert far(drawn, before) > 3
    assert studio.base.pipe.unet.attn_processors == processors
    assert studio.base.pipe.unet.encoder_hid_proj is None
    assert getattr(studio.base.pipe, "image_encoder", None) is None


def test_an_image_encoder_is_read_from_its_file_alone(folder, encoder):
    found = open_image_encoder(folder / "clip_vision" / "CLIP-ViT.safetensors")
    pixels = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(found(pixels).image_embeds, encoder(pixels).image_embeds)


def test_both_act_in_every_pass_and_the_picture_comes_back_from_itself(studio, tmp_path):
    asked = dataclasses.replace(RECIPE, hires=1.5, hires_strength=0.5, width=0, height=0, **CONTROL, **ADAPTED)
    recipe = completed(studio, asked, control=MAP, reference=SHOWN)
    assert (recipe.width, recipe.height, recipe.controlnet, len(recipe.controlnet_sha256)) == (32, 32, "canny", 64)
    pictures = {"control": MAP, "reference": SHOWN}
    drawn = studio.draw(recipe, **pictures)
    infotext.save(drawn, tmp_path / "a.png", recipe)
    again = infotext.read(tmp_path / "a.png")
    assert far(studio.draw(completed(studio, again, **pictures), **pictures), drawn) == 0
    first = studio.draw(dataclasses.replace(recipe, hires=1.0), **pictures)
    larger = fitted(first, 48, 48)
    over = dataclasses.replace(recipe, hires=1.0, width=48, height=48, image="", control="", reference="")
    over = completed(studio, over, image=larger, **pictures)
    assert far(studio.draw(over, image=larger, **pictures), drawn) == 0


def test_what_cannot_act_is_refused_in_one_sentence(kind, studio, folder, tmp_path):
    controlled, adapted = (dataclasses.replace(RECIPE, **each) for each in (CONTROL, ADAPTED))
    for recipe, pictures, message in (
        (controlled, {}, "'canny' needs its control map: give one as control"),
        (adapted, {}, "'ip-plus' needs its reference picture: give one as reference"),
    ):
        with pytest.raises(ValueError, match=message):
            studio.draw(completed(studio, recipe, **pictures))
    for pictures, message in (
        ({"control": MAP}, "a control map is for a ControlNet: choose one"),
        ({"reference": MAP}, "a reference picture is read by an IP-Adapter: choose one"),
    ):
        with pytest.raises(ValueError, match=message):
            with_pictures(RECIPE, **pictures)
    recipe = completed(studio, controlled, control=MAP)
    with pytest.raises(ValueError, match="the recipe was made with another picture as its control"):
        studio.draw(recipe, control=SHOWN)
    with pytest.raises(ValueError, match="there is no ControlNet 'depht'; known: canny, depth"):
        studio.complete(dataclasses.replace(controlled, controlnet="depht"))
    with pytest.raises(ValueError, match="the IP-Adapter 'ip-plus' here is another file than the recipe's"):
        studio.complete(dataclasses.replace(adapted, ip_adapter_sha256="0" * 64))
    with pytest.raises(ValueError, match="FluxPipeline cannot draw with such pictures here; those that can: "):
        Studio(hosts.flux(), studio.catalog, "flux").complete(controlled)
    other = Studio(hosts.sd21(), studio.catalog, "other")
    recipe = other.complete(with_pictures(dataclasses.replace(controlled, prompt="a fox"), control=MAP))
    with pytest.raises(ValueError, match=r"canny\.safetensors is (no|a) ControlNet for"):
        other.draw(recipe, control=MAP)
    if kind == "sd15":
        recipe = other.complete(with_pictures(dataclasses.replace(adapted, prompt="a fox"), reference=MAP))
        with pytest.raises(ValueError, match=r"ip-plus\.safetensors is no IP-Adapter for"):
            other.draw(recipe, reference=MAP)
    lone = Studio(studio.base.pipe, Catalog({}, {}, files={"ip_adapter": files_of(folder, "ip_adapter")}), "lone")
    recipe = lone.complete(with_pictures(dataclasses.replace(adapted, prompt="a fox"), reference=MAP))
    with pytest.raises(ValueError, match="needs its image encoder, a .safetensors file in the folder clip_vision"):
        lone.draw(recipe, reference=MAP)


def test_with_a_given_picture_loras_are_bound_and_no_tile_is_promised(studio):
    recipe = completed(studio, dataclasses.replace(RECIPE, width=64, binding="tiles", **ADAPTED), reference=SHOWN)
    assert recipe.binding_of_pass() == "bound"
    assert not studio.draws_in_tiles(recipe)
    assert studio.explain(recipe).why_no_tiles == "tiles are off"
    said = "tiles are drawn from noise alone: with a given picture LoRAs are bound, and draw it as one"
    assert said in studio.notes(recipe, recipe)


def test_a_command_takes_the_same_names(kind, folder, tmp_path, capsys):
    if kind == "sdxl":
        return
    PIPES[kind][0]().save_pretrained(folder / "diffusers" / "tiny")
    MAP.save(tmp_path / "map.png")
    SHOWN.save(tmp_path / "shown.png")
    base = ["--base", str(folder / "diffusers" / "tiny"), "--device", "cpu"]
    size = ["--width", "32", "--height", "32", "--steps", "2", "--out", str(tmp_path / "a.png")]
    control = ["--controlnet", "canny", "--control", str(tmp_path / "map.png"), "--control-end", "0.5"]
    shown = ["--ip-adapter", "ip-plus", "--reference", str(tmp_path / "shown.png"), "--ip-scale", "0.3"]
    assert main(["draw", "a fox <lora:fox:1>", *base, *size, *control, *shown]) == 0, capsys.readouterr().err
    recipe = infotext.read(tmp_path / "a.png")
    assert (recipe.controlnet, recipe.control_end, recipe.ip_adapter, recipe.ip_scale) == ("canny", 0.5, "ip-plus", 0.3)
    again = ["redraw", str(tmp_path / "a.png"), *base, *control[2:4], *shown[2:4], "--out", str(tmp_path / "b.png")]
    assert main(again) == 0, capsys.readouterr().err
    assert far(Image.open(tmp_path / "a.png"), Image.open(tmp_path / "b.png")) == 0
    capsys.readouterr()
    assert main(["draw", "a fox", *base, *control[:2]]) == 1
    assert "--controlnet goes with --control: give that as well" in capsys.readouterr().err
