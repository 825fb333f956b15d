"""Pictures of other programs: what of their text becomes a recipe, and what is said not to."""

import contextlib
import copy
import json
import random

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_pipeline

from mole_app.studio import infotext, other_tools
from mole_app.studio.catalog import Catalog
from mole_app.studio.prompt_syntax import parse
from mole_app.studio.render import Studio
from mole_app.studio.weight_syntax import plain_text
from mole_cli.mole import main

OLD = """a castle on a hill, (stone:1.2) <lora:castle:0.8>
Negative prompt: blurry, ugly
Steps: 20, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 12345, Size: 512x768, Model hash: abc123def0, Model: dream, \
Lora hashes: "castle: deadbeef0123", Version: v1.6.0"""
NEW = """a cat, sitting
Negative prompt: lowres
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 9007199254740993, Size: 768x1024, \
Model hash: 501235c0cd, Model: sdxl, Denoising strength: 0.45, Clip skip: 2, Hires upscale: 1.5, Hires steps: 15, \
Hires upscaler: 4x-UltraSharp, ADetailer model: face_yolov8n.pt, ADetailer prompt: "a face, smiling", Version: v1.10.1"""
OVER = """a cat
Steps: 30, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7, Seed: 5, Size: 512x512, Model: sd, \
Denoising strength: 0.6, Mask blur: 4, Inpaint area: Only masked, Version: v1.10.1"""
FLUX = """a boat
Steps: 20, Sampler: Euler, Schedule type: Simple, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 7, Size: 896x1152, \
Model: flux1-dev, Module 1: ae, Version: f2.0.1, Civitai resources: [{"type":"checkpoint","modelVersionId":691639}]"""


@pytest.fixture
def picture(tmp_path):
    """A PNG with a text of another tool."""

    def made(text, name=infotext.PARAMETERS):
        about = PngInfo()
        about.add_text(name, text)
        Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=about)
        return tmp_path / "theirs.png"

    return made


@pytest.mark.parametrize(
    ("text", "fields", "lacking"),
    [
        (OLD, {"sampler": "DPM++ 2M Karras", "height": 768, "experts": {"castle": "deadbeef0123"}, "hires": 1.0}, ""),
        (
            NEW,
            {"sampler": "DPM++ 2M Karras", "seed": 9007199254740993, "hires": 1.5, "hires_strength": 0.45, "clip_skip": 2},
            "Hires steps 15, Hires upscaler 4x-UltraSharp, ADetailer model face_yolov8n.pt, "
            "ADetailer prompt a face, smiling",
        ),
        (
            OVER,
            {"sampler": "Euler a", "strength": 0.6, "hires": 1.0, "image": ""},
            "the picture that it was drawn over, Mask blur 4, Inpaint area Only masked",
        ),
        *(
            (
                NEW.replace("Hires upscale: 1.5", f"Hires resize: {size}"),
                {"hires": 2.0, "hires_strength": 0.45, "strength": 0.6},
                "Hires steps 15, Hires upscaler 4x-UltraSharp, ADetailer model face_yolov8n.pt, "
                "ADetailer prompt a face, smiling",
            )
            for size in ("1536x2048", "1536x0", "0x2048")  # one side may be left to the other
        ),
        *(
            (OLD.replace("Negative prompt: ", begin), {"prompt": OLD.split("\n")[0], "negative": "blurry, ugly"}, "")
            for begin in ("Negative prompt: ", "Negative prompt:", "  Negative prompt: ")
        ),
        (OLD.replace(" on a", " AND a"), {"steps": 20}, "AND between prompts (a word here)"),
        (OLD.replace("Steps: 20", "Steps: many"), {"steps": 20, "seed": 12345}, "steps many"),
        (FLUX, {"sampler": "Euler", "guidance": 3.5, "steps": 20}, "Module 1 ae"),
    ],
)
def test_their_settings_become_a_recipe_and_the_rest_is_said(picture, text, fields, lacking):
    path = picture(text)
    recipe = infotext.read(path)
    assert {name: getattr(recipe, name) for name in fields} == fields
    assert infotext.contents(path).left_out == (f"not carried over from the picture's text: {lacking}" if lacking else "")


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("a fox, :) and (a hat", "a fox, :\\) and (a hat)", "a fox, :) and a hat"),
        ("a [fox (in] ink", "a [fox (in\\] ink)]", "a fox in] ink"),
        (r"a \) (fox:1.3) \( <lora:fox (old:1>", r"a \) (fox:1.3) \( <lora:fox (old:1>", "a ) fox ("),
    ],
)
def test_brackets_that_are_left_alone_are_read_as_there(picture, theirs, ours, words):
    recipe = infotext.read(picture(OLD.replace(OLD.split("\n")[0], theirs)))
    assert recipe.prompt == ours
    assert plain_text(parse(recipe.prompt).text) == words


@pytest.mark.parametrize(
    ("sampler", "schedule", "name", "lacking"),
    [
        ("DPM++ 2M", None, "DPM++ 2M", ""),
        ("DPM++ 2M", "Automatic", "DPM++ 2M Karras", ""),
        ("dpm++ 2m karras", "Karras", "DPM++ 2M Karras", ""),
        ("DPM++ 2M SDE", "Exponential", "DPM++ 2M SDE", "schedule Exponential"),
        ("DPM++ 2M SDE", "Automatic", "DPM++ 2M SDE", "schedule Exponential"),
        ("Euler", "Karras", "Euler Karras", ""),
        ("Euler a", "Karras", "Euler a", "schedule Karras"),
        ("UniPC", "Uniform", "UniPC", ""),
        ("Restart", "SGM Uniform", "", "sampler Restart SGM Uniform"),
        ("Default", None, "", ""),
    ],
)
def test_sampler_and_schedule_are_one_name(picture, sampler, schedule, name, lacking):
    apart = f", Schedule type: {schedule}" if schedule else ""
    path = picture(f"a cat\nSteps: 20, Sampler: {sampler}{apart}, CFG scale: 7, Seed: 1, Size: 64x64")
    assert infotext.read(path).sampler == name
    assert infotext.contents(path).left_out.rpartition("text: ")[2] == lacking


def test_their_picture_is_drawn_over_the_one_that_is_given(picture, tmp_path):
    text = "a tiger\nSteps: 4, Sampler: Euler, CFG scale: 3, Seed: 1, Size: 64x64, Denoising strength: 0.5"
    start, theirs = tmp_path / "start.png", str(picture(text))
    Image.effect_noise((64, 64), 90).convert("RGB").save(start)
    over = ["--image", str(start), "--device", "cpu", "--out"]
    assert main(["redraw", theirs, *over, str(tmp_path / "a.png")]) == 0
    ours = ["a tiger", "--steps", "4", "--sampler", "Euler", "--seed", "1", "--width", "64", "--height", "64"]
    assert main(["draw", *ours, "--strength", "0.5", *over, str(tmp_path / "b.png")]) == 0
    assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()


def test_another_model_is_said_and_kept_out_of_the_recipe(picture):
    found = infotext.contents(picture(OLD))
    assert (found.model, found.recipe.base) == ("dream", "")
    everywhere = "its LoRAs act everywhere, as in the program that drew it"
    assert found.notes("models/Dream.safetensors") == [everywhere]
    assert found.notes("emoji") == ["it was drawn with the model 'dream', and here is 'emoji'", everywhere]


def test_what_is_left_out_is_said_where_a_picture_is_read(picture, tmp_path, capsys):
    text = "a tiger\nSteps: 1, Sampler: Euler, Schedule type: Karras, Seed: 1, Size: 64x64, Model: a\x1b[0m, Eta: 2\x1b[2J"
    args = ["redraw", str(picture(text)), "--out", str(tmp_path / "ours.png"), "--device", "cpu"]
    assert main(args) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    assert notes == [
        "note: it was drawn with the model 'a\\x1b[0m', and here is 'emoji'",
        "note: not carried over from the picture's text: Eta 2 [2J",  # what moves the cursor is gone
    ]
    assert infotext.read(tmp_path / "ours.png").sampler == "Euler Karras"
    assert infotext.contents(tmp_path / "ours.png").left_out == ""  # which holds all
    infotext.read(tmp_path / "ours.png").save(tmp_path / "ours.json")
    assert infotext.contents(tmp_path / "ours.json").left_out == ""


def link(number, slot=0):
    return [str(number), slot]


API = {  # as ComfyUI writes it: SDXL with two LoRAs, one of them in the denoiser alone, and a second pass
    "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sdxl/dream XL.safetensors"}},
    "2": {"class_type": "LoraLoader", "inputs": {"lora_name": "people/fox.safetensors", "strength_model": 0.8,
          "strength_clip": 0.5, "model": link(1), "clip": link(1, 1)}},
    "3": {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "ink.safetensors", "strength_model": 1.2,
          "model": link(2)}},
    "4": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": link(2, 1)}},
    "5": {"class_type": "CLIPTextEncode", "inputs": {"text": link(15), "clip": link(4)}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": link(4)}},
    "7": {"class_type": "EmptyLatentImage", "inputs": {"width": 768, "height": 512, "batch_size": 4}},
    "8": {"class_type": "KSampler", "inputs": {"seed": 18446744073709551615, "steps": 25, "cfg": 6.5,
          "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0, "model": link(16), "positive": link(17),
          "negative": link(6), "latent_image": link(7)}},
    "9": {"class_type": "LatentUpscaleBy", "inputs": {"samples": link(8), "scale_by": 1.5}},
    "10": {"class_type": "KSampler", "inputs": {"seed": 2, "steps": 9, "cfg": 7, "sampler_name": "euler",
           "scheduler": "normal", "denoise": 0.5, "model": link(3), "positive": link(5), "negative": link(6),
           "latent_image": link(9)}},
    "11": {"class_type": "VAEDecode", "inputs": {"samples": link(10), "vae": link(1, 2)}},
    "12": {"class_type": "SaveImage", "inputs": {"images": link(11)}},
    "15": {"class_type": "Text Multiline", "inputs": {"text": "a (fox:1.2) in [ink", "is_changed": [float("nan")]}},
    "16": {"class_type": "FreeU_V2", "inputs": {"model": link(3), "b1": 1.3}},
    "17": {"class_type": "ControlNetApplyAdvanced", "inputs": {"positive": link(5), "negative": link(6), "strength": 1}},
}  # fmt: skip
FLUX_API = {
    "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux1-dev.safetensors"}},
    "2": {"class_type": "Power Lora Loader (rgthree)", "inputs": {"model": link(1), "lora_1": {"on": True, "strength": 0.9,
          "lora": "fox.safetensors"}, "lora_2": {"on": False, "lora": "off.safetensors", "strength": 1}, "header": "x"}},
    "3": {"class_type": "CLIPTextEncode", "inputs": {"text": "a boat"}},
    "4": {"class_type": "FluxGuidance", "inputs": {"guidance": 3.5, "conditioning": link(3)}},
    "5": {"class_type": "BasicGuider", "inputs": {"model": link(2), "conditioning": link(4)}},
    "6": {"class_type": "RandomNoise", "inputs": {"noise_seed": 7}},
    "7": {"class_type": "KSamplerSelect", "inputs": {"sampler_name": "euler"}},
    "8": {"class_type": "BasicScheduler", "inputs": {"scheduler": "simple", "steps": 20, "denoise": 1, "model": link(2)}},
    "9": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 896, "height": 1152}},
    "10": {"class_type": "SamplerCustomAdvanced", "inputs": {"noise": link(6), "guider": link(5), "sampler": link(7),
           "sigmas": link(8), "latent_image": link(9)}},
}  # fmt: skip
WORKFLOW = {  # the same things as the page saves them: values without names, links in a list, one LoRA bypassed
    "nodes": [
        {"id": 1, "type": "CheckpointLoaderSimple", "widgets_values": ["dream.safetensors"]},
        {"id": 2, "type": "LoraLoader", "widgets_values": ["fox.safetensors", 0.8, 0.8], "inputs": [
            {"name": "model", "link": 1}]},
        {"id": 3, "type": "LoraLoader", "widgets_values": ["no.safetensors", 1, 1], "mode": 4, "inputs": []},
        {"id": 4, "type": "CLIPTextEncode", "widgets_values": ["a fox"], "inputs": []},
        {"id": 5, "type": "CLIPTextEncode", "widgets_values": [""], "inputs": []},
        {"id": 6, "type": "VAEEncode", "inputs": []},
        {"id": 7, "type": "KSampler", "widgets_values": [5, "fixed", 12, 4.5, "euler_ancestral", "beta", 0.6], "inputs": [
            {"name": "model", "link": 2}, {"name": "positive", "link": 3}, {"name": "negative", "link": 4},
            {"name": "latent_image", "link": 5}]},
    ],
    "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 7, 0, "MODEL"], [3, 4, 0, 7, 1, "CONDITIONING"],
              [4, 5, 0, 7, 2, "CONDITIONING"], [5, 6, 0, 7, 3, "LATENT"]],
}  # fmt: skip
FOOOCUS = {
    "prompt": "a fox", "full_prompt": ["a fox", "cinematic still a fox . emotional"], "negative_prompt": "",
    "full_negative_prompt": ["anime"], "styles": "['Fooocus Cinematic']", "performance": "Speed", "steps": 30,
    "resolution": "(1152, 896)", "guidance_scale": 4.0, "sharpness": 2.0, "base_model": "juggernautXL_v8",
    "base_model_hash": "aeb7e9e689", "refiner_model": "None", "refiner_switch": 0.5, "sampler": "dpmpp_2m_sde_gpu",
    "scheduler": "karras", "seed": "7163462912817262", "loras": [["sdxl_offset", 0.1, "4852686128"]],
    "lora_combined_1": "sdxl_offset.safetensors : 0.1", "version": "Fooocus v2.5.0", "metadata_scheme": "fooocus",
}  # fmt: skip
INVOKE = {
    "app_version": "5.0.0", "generation_mode": "sdxl_txt2img", "positive_prompt": "a fox++ in (the snow)1.3, blue-green",
    "negative_prompt": "(bad)-", "width": 1024, "height": 768, "seed": 99, "rand_device": "cpu", "cfg_scale": 7.5,
    "steps": 30, "scheduler": "dpmpp_2m_k", "model": {"key": "x", "hash": "blake3:1", "name": "Juggernaut", "base": "sdxl"},
    "loras": [{"model": {"key": "y", "name": "fox"}, "weight": 0.75}], "positive_style_prompt": "", "vae": {"name": "v"},
    "hrf_enabled": False, "seamless_x": True,
}  # fmt: skip
SWARM = {"sui_image_params": {
    "prompt": "a fox", "negativeprompt": "bad", "model": "OfficialStableDiffusion/sd_xl_base", "seed": 3, "steps": 20,
    "cfgscale": 7.0, "width": 1024, "height": 1024, "sampler": "euler", "scheduler": "karras", "loras": ["x/fox"],
    "loraweights": ["0.7"], "refinerupscale": 1.5, "swarm_version": "0.9.6",
}}  # fmt: skip
THEIRS = [
    (
        {"prompt": json.dumps(API)},
        {"prompt": r"a (fox:1.2) in [ink] <lora:fox:0.5:unet=0.8> <lora:ink:0:unet=1.2>", "negative": "blurry", "width": 768,
         "height": 512, "seed": 2**63 - 1, "steps": 25, "guidance": 6.5, "sampler": "DPM++ 2M Karras", "clip_skip": 2},
        "the second sampling pass, node LatentUpscaleBy, node Text Multiline, node FreeU_V2, node ControlNetApplyAdvanced",
        "dream XL",
    ),
    (
        {"prompt": json.dumps(FLUX_API), "workflow": "{}"},
        {"prompt": "a boat <lora:fox:0.9>", "guidance": 3.5, "seed": 7, "steps": 20, "sampler": "Euler", "height": 1152},
        "",
        "flux1-dev",
    ),
    (
        {"workflow": json.dumps(WORKFLOW)},
        {"prompt": "a fox <lora:fox:0.8>", "seed": 5, "steps": 12, "guidance": 4.5, "strength": 0.6, "width": 0},
        "schedule beta, the picture that it was drawn over, node VAEEncode",
        "dream",
    ),
    (
        {"parameters": json.dumps(FOOOCUS), "fooocus_scheme": "fooocus"},
        {"prompt": "a fox, cinematic still a fox . emotional <lora:sdxl_offset:0.1>", "negative": "anime", "width": 1152,
         "height": 896, "seed": 7163462912817262, "steps": 30, "guidance": 4.0, "sampler": "DPM++ 2M SDE Karras"},
        "performance Speed, sharpness 2.0",
        "juggernautXL_v8",
    ),
    (
        {"invokeai_metadata": json.dumps(INVOKE)},
        {"prompt": "a (fox:1.21) in (the snow:1.3), blue-green <lora:fox:0.75>", "negative": "(bad:0.9)", "height": 768,
         "seed": 99, "sampler": "DPM++ 2M Karras", "guidance": 7.5},
        "vae, seamless_x True",
        "Juggernaut",
    ),
    (
        {"parameters": json.dumps(SWARM)},
        {"prompt": "a fox <lora:fox:0.7>", "negative": "bad", "sampler": "Euler Karras", "guidance": 7.0, "width": 1024},
        "refinerupscale 1.5",
        "sd_xl_base",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("texts", "fields", "lacking", "model"), THEIRS)
def test_the_texts_of_other_programs_become_a_recipe_and_the_rest_is_said(tmp_path, texts, fields, lacking, model):
    about = PngInfo()
    for name, text in texts.items():
        about.add_text(name, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "theirs.png", pnginfo=about)
    found = infotext.contents(tmp_path / "theirs.png")
    assert {name: getattr(found.recipe, name) for name in fields} == fields
    assert (found.recipe.binding, found.model) == ("none", model)
    assert found.left_out == (f"not carried over from the picture's text: {lacking}" if lacking else "")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "prompt",
            '{"1": {"class_type": "SaveImage", "inputs": {}}}',
            "theirs.png has a ComfyUI workflow without a sampler",
        ),
        ("prompt", "{", "the settings in theirs.png is not JSON"),
        (
            "prompt",
            '{"1": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "steps": 1000}}}',
            "steps must be in 1..150",
        ),
        ("parameters", '{"a": 1}', "theirs.png has settings of a program that is not known here"),
        ("prompt", '{"1": 5, "2": {"inputs": []}}', "theirs.png has a ComfyUI workflow without a samp"),
    ],
)
def test_texts_of_other_programs_that_say_nothing_are_refused_in_one_sentence(picture, name, text, message):
    path = picture(text, name)
    with pytest.raises(ValueError, match=message) as error:
        infotext.contents(path)
    assert "\n" not in str(error.value)


JUNK = (None, [], {}, "x", 5, -1, True, 1e300, [[]], ["8", 0], {"a": []}, "9" * 30)


def places(value, path=()):
    """The paths of everything in a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in list(inner):
        yield (*path, key)
        yield from places(each, (*path, key))


@pytest.mark.parametrize("texts", [texts for texts, *_ in THEIRS])
def test_whatever_stands_in_their_texts_is_read_or_refused(texts):
    random_one = random.Random(0)
    (name, text), *_ = ((n, t) for n, t in texts.items() if t.startswith("{"))
    for _ in range(300):
        value = json.loads(text)
        for _ in range(random_one.randint(1, 3)):
            *inside, last = random_one.choice(list(places(value)))
            at = value
            for key in inside:
                at = at[key]
            at[last] = copy.deepcopy(random_one.choice(JUNK))
        with contextlib.suppress(ValueError):
            other_tools.read({name: json.dumps(value)}, "theirs.png")


def test_a_recipe_of_a1111_draws_a1111s_sum(picture, loras):
    """The sum of diffusers itself, in which every LoRA acts everywhere, although the prompt has the words of both."""
    text = "a fox and a hat <lora:fox:0.8> <lora:hat>\nSteps: 2, Sampler: DDIM, CFG scale: 3, Seed: 4, Size: 32x32"
    files = {name: loras[name] for name in ("fox", "hat")}
    studio = Studio(tiny_pipeline(), Catalog(files, {}), "tiny")
    ours = studio.draw(studio.complete(infotext.read(picture(text))))
    pipe = tiny_pipeline()
    for name, file in files.items():
        pipe.load_lora_weights(str(file), adapter_name=name)
    pipe.set_adapters(["fox", "hat"], [0.8, 1.0])
    drawn = {"num_inference_steps": 2, "guidance_scale": 3.0, "width": 32, "height": 32}
    theirs = pipe("a fox and a hat", generator=torch.Generator().manual_seed(4), **drawn).images[0]
    off = torch.tensor([list(ours.getdata()), list(theirs.getdata())]).float().diff(dim=0).abs()
    assert off.max() <= 1
