"""Pictures of A1111 and Forge: what of their text becomes a recipe, and what is said not to."""

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import tiny_pipeline

from mole_app.studio import infotext
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
