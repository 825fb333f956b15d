"""The protocol for real checkpoints, with tiny random CLIP and DINOv2 models: scores against the models' own calls."""

import csv
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionPipeline
from PIL import Image
from single_file import save_single_file
from transformers import (
    AutoModel,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
)

from mole_diffusers import attach
from mole_diffusers.cli import main
from mole_diffusers.evaluation.checkpoint_protocol import ClipDinoMetrics, read_cases, windows
from mole_diffusers.evaluation.judging_sheet import count_answers, write_sheet
from mole_diffusers.evaluation.rows import picture_path, save_picture
from mole_diffusers.evaluation.runner import Case
from mole_diffusers.inspection.compare import sample
from mole_diffusers.inspection.gate_figures import block_places, heat_map
from mole_diffusers.testing import tiny_pipeline, tiny_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a CLIP and a DINOv2 with random weights, as the hub has them."""
    torch.manual_seed(0)
    clip, dino, tokenizer = tmp_path_factory.mktemp("clip"), tmp_path_factory.mktemp("dino"), tiny_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    marks = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    text = sizes | marks | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14}, projection_dim=8)
    CLIPModel(config).save_pretrained(clip)
    tokenizer.save_pretrained(clip)
    pixels = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessor(**pixels).save_pretrained(clip)
    Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=28)).save_pretrained(
        dino
    )
    BitImageProcessor(**pixels).save_pretrained(dino)
    return str(clip), str(dino)


def noise(seed, size=56):
    values = torch.rand(size // 8, size // 8, 3, generator=torch.Generator().manual_seed(seed)) * 255
    return Image.fromarray(values.byte().numpy()).resize((size, size), Image.Resampling.NEAREST)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """concept -> folder of its own pictures."""
    folders = {}
    for i, name in enumerate(("fox", "ink")):
        folders[name] = tmp_path_factory.mktemp(name)
        for j in range(2):
            noise(10 * i + j).save(folders[name] / f"{j}.png")
    return folders


def test_scores_are_the_models_own(models, own):
    clip, metrics = CLIPModel.from_pretrained(models[0]), ClipDinoMetrics(*models, own)
    picture, case = noise(99), Case(("fox", "ink", "hat"), "three", "a fox in ink")
    (scores,) = metrics(case, [picture])
    pixels = CLIPImageProcessor.from_pretrained(models[0])
    joint = clip(
        **metrics.clip.tokenizer(["a fox in ink"], return_tensors="pt"),
        pixel_values=pixels(picture, return_tensors="pt").pixel_values,
    )
    assert scores["clip_t"] == pytest.approx((joint.logits_per_image / clip.logit_scale.exp()).item(), abs=1e-5)
    dino, processor = AutoModel.from_pretrained(models[1]), BitImageProcessor.from_pretrained(models[1])

    def features(images):
        return F.normalize(dino(processor(images, return_tensors="pt").pixel_values).last_hidden_state[:, 0], dim=-1)

    wanted = (features(windows(picture)) @ features([noise(0), noise(1)]).T).mean(1).max().item()
    assert scores["dino"]["fox"] == pytest.approx(wanted, abs=1e-5)
    assert set(scores["clip_i"]) == set(scores["dino"]) == {"fox", "ink"}  # hat has no pictures of its own


def test_a_concept_is_found_where_it_is(models, own):
    """A concept's own picture in a corner scores as the picture alone does, by the window that holds it."""
    metrics = ClipDinoMetrics(*models, own)
    canvas = Image.new("RGB", (112, 112), "grey")
    canvas.paste(noise(0), (56, 56))
    (corner,) = metrics(Case(("fox",), "one", "a fox"), [canvas])
    whole, itself = (metrics._dino([image]) @ metrics.own_dino["fox"].T for image in (canvas, noise(0)))  # [1, own pictures]
    assert corner["dino"]["fox"] >= itself.mean().item() - 1e-5
    assert corner["dino"]["fox"] > whole.mean().item() + 1e-3  # a score of the whole alone would miss it
    assert [w.size for w in windows(canvas)] == [(112, 112)] + [(56, 56)] * 9
    assert windows(canvas)[-1].tobytes() == noise(0).tobytes()


@pytest.mark.parametrize(("size", "place"), [((112, 56), (56, 0)), ((56, 112), (0, 0))])
def test_a_concept_is_found_at_the_end_of_a_wide_or_tall_picture(models, own, size, place):
    """Where its square is a window, and none of the picture is cut off by the models' processors."""
    metrics = ClipDinoMetrics(*models, own)
    canvas = Image.new("RGB", size, "white")
    canvas.paste(noise(0), place)
    (found,) = metrics(Case(("fox",), "one", "a fox"), [canvas])
    alone = metrics._dino([noise(0)]) @ metrics.own_dino["fox"].T  # [1, own pictures]
    assert found["dino"]["fox"] >= alone.mean().item() - 1e-5
    assert all(width == height for width, height in (window.size for window in windows(canvas)))
    bars = Image.new("RGB", (112, 112), "grey")
    bars.paste(canvas, (0, 28) if size[0] > size[1] else (28, 0))
    assert windows(canvas)[0].tobytes() == bars.tobytes()


def test_cases_are_read_and_checked(tmp_path, ascii_locale):
    path = tmp_path / "cases.jsonl"
    path.write_text('{"concepts": ["fox", "ink"], "prompt": "p"}\n\n{"concepts": ["fox"], "prompt": "q", "kind": "one"}\n')
    assert read_cases(path, ["fox", "ink"]) == [Case(("fox", "ink"), "2 concepts", "p"), Case(("fox",), "one", "q")]
    path.write_text('{"concepts": ["fox"], "prompt": "p", "size": [768, 512]}')
    assert read_cases(path, ["fox"])[0].size == (768, 512)
    path.write_text('{"concepts": ["fox"], "prompt": "füchse\u2028in a row"}', "utf-8")
    assert read_cases(path, ["fox"])[0].prompt == "füchse\u2028in a row"
    for text, message in (
        ("{", "line 1, is not JSON"),
        ('{"concepts": ["cat"], "prompt": "p"}', "no expert for ['cat']; known: ['fox', 'ink']"),
        ("[1]", "line 1: not"), ('"fox"', "line 1: not"), ('{"concepts": "fox", "prompt": "p"}', "line 1: not"),
        ("", "holds no cases"), ('{"prompt": "p"}', "line 1: not"),
        ('{"concepts": [], "prompt": "p"}', "line 1: not"), ('{"concepts": [["fox"]], "prompt": "p"}', "line 1: not"),
        ('{"concepts": ["fox", "fox"], "prompt": "p"}', "different names, one or more, got ['fox', 'fox']"),
        ('{"concepts": ["fox"], "prompt": "p", "knd": "one"}', "unknown options ['knd'] of a case"),
        ('{"concepts": ["fox"], "prompt": "p", "size": [768]}', '"size" is [width, height] in pixels, got [768]'),
        ('{"concepts": ["fox"], "prompt": "p", "size": [64, "2"]}', "size of a case must be a list of whole numbers"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError) as error:  # noqa: PT011
            read_cases(path, ["ink", "fox"])
        assert message in str(error.value)


@pytest.fixture
def sheet(tmp_path):
    """A sheet over three arms and two prompts of the same concepts; each arm has a colour."""
    rows = []
    for arm, colour in (("sum", "red"), ("mean", "green"), ("gates", "blue")):
        for prompt in ("a fox in ink", "ink: a fox"):
            rows.append({"arm": arm, "case": "fox+ink", "kind": "pair", "seed": 1, "prompt": prompt, "settings": {}})
            save_picture(Image.new("RGB", (8, 8), colour), picture_path(tmp_path, rows[-1]))
    assert write_sheet(tmp_path, rows) == 12
    return tmp_path


def test_the_sheet_asks_each_pair_in_both_orders_and_blind(sheet):
    key = json.loads((sheet / "sheet" / "key.json").read_text())
    asked = {(q["prompt"], q["left"], q["right"]) for q in key}
    assert len(asked) == 12
    assert {(s, b, a) for s, a, b in asked} == asked
    colours = {"sum": (255, 0, 0), "mean": (0, 128, 0), "gates": (0, 0, 255)}
    for number, question in enumerate(key):
        image = Image.open(sheet / "sheet" / f"{number:04}.png")
        left, right = (image.getpixel((image.width * x // 4, image.height // 2)) for x in (1, 3))
        assert (left, right) == (colours[question["left"]], colours[question["right"]])
    text = (sheet / "sheet" / "answers.csv").read_text()
    assert not any(arm in text for arm in colours)


def test_a_sheet_is_in_utf_8_whatever_the_locale(tmp_path, ascii_locale):
    row = {"case": "fox", "kind": "one", "seed": 1, "prompt": "füchse", "settings": {}}
    rows = [{"arm": arm, **row} for arm in ("sum", "mean")]
    for each in rows:
        save_picture(Image.new("RGB", (8, 8)), picture_path(tmp_path, each))
    write_sheet(tmp_path, rows)
    assert "füchse" in (tmp_path / "sheet" / "answers.csv").read_text("utf-8")
    assert count_answers(tmp_path)


def answer(sheet, choose):
    path = sheet / "sheet" / "answers.csv"
    lines = list(csv.reader(path.open()))
    for line, question in zip(lines[1:], json.loads((sheet / "sheet" / "key.json").read_text()), strict=True):
        line[2] = choose(question)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)


def test_answers_are_counted_for_arms_and_not_for_sides(sheet, capsys):
    def choose(q):
        if "gates" in (q["left"], q["right"]):
            return "left" if q["left"] == "gates" else "Right "
        return "left" if q["prompt"] == "a fox in ink" else ""  # sum against mean: always the left one, or no answer

    answer(sheet, choose)
    lines = count_answers(sheet).splitlines()
    assert "| gates | sum | 4 | 0 | 0 | 1.00 |" in lines
    assert "| gates | mean | 4 | 0 | 0 | 1.00 |" in lines
    assert "| mean | sum | 1 | 1 | 0 | 0.00 |" in lines
    assert main(["evaluate", "--judged", "--out", str(sheet)]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["evaluate", "--judged", "--json", "--out", str(sheet)]) == 0
    pair = {"first arm": "gates", "second arm": "sum", "first better": 4, "second better": 0, "same": 0, "orders agree": 1.0}
    assert pair in json.loads(capsys.readouterr().out)
    with pytest.raises(ValueError, match="holds answers: count them with --judged"):
        write_sheet(sheet, [])
    answer(sheet, lambda q: "both")
    with pytest.raises(ValueError, match="question 0000: 'both' is none of"):
        count_answers(sheet)


def test_a_sheet_that_was_edited_by_hand_is_counted_or_says_what_is_wrong(sheet):
    path = sheet / "sheet" / "answers.csv"
    answer(sheet, lambda q: "left")
    table, text = count_answers(sheet), path.read_text()
    path.write_text(text.replace("\n", "\n\n", 3) + "\n")
    assert count_answers(sheet) == table
    path.write_text(text)
    answer(sheet, lambda q: "left" if q["left"] == "gates" else "right" if q["right"] == "gates" else "same")
    table, (head, *lines) = count_answers(sheet), path.read_text().splitlines()
    path.write_text("\n".join([head, *sorted(lines, key=lambda line: line[::-1])]))  # as a spreadsheet sorts by answer
    assert count_answers(sheet) == table
    path.write_text("\n".join([head, *(line.lstrip("0") for line in lines[1:]), "0" + lines[0][4:]]))  # and writes numbers
    assert count_answers(sheet) == table
    for edited, message in (
        (text.replace(",", ";"), "is not question, prompt and answer, with commas between them"),
        (text.rsplit("\n", 2)[0], "a row for each question from 0000 to 0011, each once"),
        (text.replace("0001,", "0002,"), "a row for each question from 0000 to 0011, each once"),
        (text.replace("0001,", "one,"), "is not question, prompt and answer"),
    ):
        path.write_text(edited)
        with pytest.raises(ValueError, match=message):
            count_answers(sheet)


@pytest.fixture
def checkpoint(models, own, loras, tmp_path):
    """`mole evaluate` on a tiny checkpoint file, with what a real one needs."""
    tiny_pipeline().save_pretrained(tmp_path / "base")
    file = str(save_single_file(tiny_pipeline(), tmp_path / "base.safetensors"))
    (tmp_path / "cases.jsonl").write_text('{"concepts": ["fox", "ink"], "prompt": "a fox in ink"}\n')
    args = ["evaluate", "--base", file, "--base-config", str(tmp_path / "base"), "--device", "cpu"]
    args += ["--steps", "1", "--seeds", "2"]
    for name in ("fox", "ink"):
        args += ["--images", f"{name}={own[name]}"]
    args += ["--cases", str(tmp_path / "cases.jsonl"), "--clip", models[0], "--dino", models[1]]
    return [*args, "--expert", f"ink={loras['ink']}", "--style", "ink", "--out", str(tmp_path / "out")]


def test_bad_cases_and_arms_are_refused_before_models_are_asked_for(loras, tmp_path, capsys):
    (tmp_path / "cases.jsonl").write_text('{"concepts": ["cat"], "prompt": "a cat"}\n')
    command = ["evaluate", "--base", "nowhere", "--expert", f"fox={loras['fox']}", "--device", "cpu"]
    assert main([*command, "--cases", str(tmp_path / "cases.jsonl")]) == 1
    assert "line 1: no expert for ['cat']; known: ['fox']" in capsys.readouterr().err
    assert main([*command, "--arm", "best"]) == 1
    assert "unknown arms ['best']; known: ['base'," in capsys.readouterr().err


@pytest.mark.thorough
def test_evaluate_on_any_checkpoint(checkpoint, loras, tmp_path, capsys):
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--own", "fox=a fox", "--own", "ink=a ink", "--sheet"]
    args += [word for arm in ("base", "np", "ssr", "k-lora", "sum") for word in ("--arm", arm)]
    assert main(args) == 0
    text, said = capsys.readouterr()
    assert text.startswith("| arm | CLIP-T | CLIP-I | DINO |")
    names = ["| base", "| np", "| ssr", "| k-lora"]
    assert [line.split(" | ")[0] for line in text.splitlines()[2:7]] == [*names, "| sum"]
    paired = text.splitlines()[8:]
    assert [line.split(" | ")[0] for line in paired[:6]] == ["| arm, less sum", "| ---", *names]
    assert "note: 40 questions in" in said
    assert main([*args, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 10
    assert (tmp_path / "out" / "samples.png").exists()
    assert main([*args, "--search"]) == 1
    assert main([*args, "--style", "cat"]) == 1
    assert "no such experts" in capsys.readouterr().err


def test_a_checkpoint_has_every_figure(checkpoint, loras, awake, tmp_path, capsys):
    """And kinds of a table for those that stand by; the heat map is that of the gates in their folder."""
    experts = {name: loras[name] for name in ("fox", "ink")}
    awake(attach(tiny_pipeline(), experts, "mole"), size=0.5).save_pretrained(tmp_path / "gates" / "fox+ink")
    args = [*checkpoint, *(word for name in ("fox", "hat") for word in ("--expert", f"{name}={loras[name]}"))]
    args += ["--gates", str(tmp_path / "gates"), "--seeds", "1"]
    assert main([*args, "--arm", "sum", "--arm", "gates", "--attached", "2", "--attached", "3"]) == 0
    heads = [line for line in capsys.readouterr().out.splitlines() if line.endswith("concepts:") or line.endswith("LoRAs:")]
    assert (
        heads == ["2 concepts:", "2 concepts, 3 LoRAs:"] * 3
    )  # scores, and less the sum with cases and with concepts drawn
    out = tmp_path / "out"
    assert {path.name for path in out.glob("*.png")} == {"samples.png", "bars.png", "experts.png", "gates.png"}
    pipe = tiny_pipeline()
    with attach(pipe, experts, tmp_path / "gates" / "fox+ink").trace() as trace:
        sample(pipe, "a fox in ink", [0], num_inference_steps=1, guidance_scale=3.0)
    heat_map(trace, block_places(trace)).save(tmp_path / "wanted.png")
    assert (out / "gates.png").read_bytes() == (tmp_path / "wanted.png").read_bytes()


@pytest.mark.thorough
def test_a_frontier_is_drawn_where_subjects_and_styles_are_asked_for(checkpoint, loras, tmp_path, capsys):
    args = [*checkpoint, *(word for name in ("fox", "hat") for word in ("--expert", f"{name}={loras[name]}"))]
    args += ["--seeds", "1"]
    moved = ["--arm", "sum", "--share", "0.3", "--share", "0.7"]
    assert main([*args, *moved]) == 0
    assert (tmp_path / "out" / "frontier.png").exists()
    at = args.index("--style")
    assert main([*args[:at], *args[at + 2 :], *moved, "--out", str(tmp_path / "other")]) == 0
    assert "no frontier.png: no picture asks for both a subject and a style" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "other").glob("*.png")} == {"samples.png", "bars.png"}


@pytest.mark.thorough
def test_weights_can_be_written_by_hand(checkpoint, loras, tmp_path, capsys):
    """For a case's own kind; on any checkpoint they draw what the same strengths of the experts draw."""
    path = tmp_path / "weights.json"
    args = [*checkpoint, "--seeds", "1", "--json"]
    chosen = [*args, "--expert", f"fox={loras['fox']}", "--arm", "grid search", "--weights", str(path)]
    path.write_text('{"2 concepts": {"subject": 0.4, "style": 1.3}}')
    assert main(chosen) == 0
    (row,) = json.loads(capsys.readouterr().out)
    pipe = tiny_pipeline()
    attach(pipe, {"fox": (loras["fox"], 0.4), "ink": (loras["ink"], 1.3)}, "sum")
    (image,) = sample(pipe, "a fox in ink", [1000], num_inference_steps=1, guidance_scale=3.0)
    assert Image.open(picture_path(tmp_path / "out", row)).tobytes() == image.tobytes()
    for text, message in (
        ("{", "weights.json is not JSON: Expecting"), ("[]", 'not {"KIND"'), ("{}", 'not {"KIND"'),
        ('{"subject": 0.4, "style": 1}', "'subject' has 0.4"),
        ('{"pair": {"subject": 0.4}}', "'pair' has"), ('{"pair": {"subject": "1", "style": 1}}', "'pair' has"),
        ('{"pair": {"subject": NaN, "style": 1}}', "weights.json is not JSON: NaN"),
        ('{"pair": {"subject": 1, "style": 1}}', "none of the cases"),
    ):  # fmt: skip
        path.write_text(text)
        assert main(chosen) == 1
        assert message in capsys.readouterr().err, text


@pytest.mark.thorough
def test_strengths_reach_the_pictures_and_the_rows(checkpoint, loras, tmp_path, capsys):
    assert main([*checkpoint, "--expert", f"fox={loras['fox']}:0.4", "--arm", "sum", "--arm", "mean", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {json.dumps(row["settings"]["strengths"]) for row in rows} == {'{"fox": 0.4, "ink": 1.0}'}
    pipe = tiny_pipeline()
    for arm, fox, ink in (("sum", 0.4, 1.0), ("mean", 0.2, 0.5)):
        attach(pipe, {"fox": (loras["fox"], fox), "ink": (loras["ink"], ink)}, "sum")
        (image,) = sample(pipe, "a fox in ink", [1000], num_inference_steps=1, guidance_scale=3.0)
        row = next(row for row in rows if row["arm"] == arm and row["seed"] == 1000)
        assert Image.open(picture_path(tmp_path / "out", row)).tobytes() == image.tobytes()


def test_what_a_checkpoint_lacks_is_said_before_anything_is_drawn(checkpoint, loras, tmp_path, capsys, monkeypatch):
    fox = ["--expert", f"fox={loras['fox']}"]
    several = ["'ssr' runs every expert on prompts of its own, and there are none for ['fox', 'ink']"]
    several += ["'grid search' needs the weights of a search", "'gates' needs a folder of trained gates"]
    for asked, message in (
        (["--arm", "ssr", "--arm", "grid search", "--arm", "gates"], "; ".join(several)),
        (["--images", f"typo={tmp_path}"], "--images 'typo': no such LoRA; known: ['fox', 'ink']"),
        (["--own", "typo=a fox"], "--own 'typo': no such LoRA; known: ['fox', 'ink']"),
        (["--arm", "gates", "--gates", str(tmp_path / "none")], "['gates'] can draw none of the cases"),
    ):
        assert main([*checkpoint, *fox, "--arm", "sum", *asked]) == 1
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("rows*"))
    monkeypatch.setattr("mole_diffusers.evaluation.arms.ARMS", ("base", "ssr", "switch", "gates", "k-lora"))
    assert main([*checkpoint, *fox, "--gates", str(tmp_path / "none"), "--seeds", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {row["arm"] for row in json.loads(out)} == {"base", "switch", "k-lora"}
    assert "left out: 'ssr' runs every expert" in err
    assert "left out: ['gates'] can draw none of the cases" in err


@pytest.mark.thorough
def test_pictures_measured_by_other_models_are_other_rows(checkpoint, models, loras, tmp_path, capsys):
    """A second CLIP, or another picture of a concept, does not answer with the first one's scores."""
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--arm", "base", "--seeds", "1", "--json"]
    shutil.copytree(models[0], tmp_path / "clip")
    (tmp_path / "fox").mkdir()
    noise(7).save(tmp_path / "fox" / "0.png")
    other = f"fox={tmp_path / 'fox'}"
    pictured = [*args]
    pictured[args.index("--images") + 1] = other  # of the fox
    scores = []
    for given in (args, [*args, "--clip", str(tmp_path / "clip")], pictured, args):
        assert main(given) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[3]
    assert scores[0][0]["dino"]["fox"] != scores[2][0]["dino"]["fox"]
    assert len((tmp_path / "out" / "rows-0.jsonl").read_text().splitlines()) == 3


def test_a_limit_is_of_each_kind(checkpoint, loras, tmp_path, capsys):
    lines = [
        {"concepts": concepts, "prompt": prompt}
        for concepts, prompt in ((["fox"], "a fox"), (["fox"], "fox"), (["fox", "ink"], "a fox in ink"), (["ink"], "ink"))
    ]
    (tmp_path / "cases.jsonl").write_text("\n".join(map(json.dumps, lines)))
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--seeds", "1", "--arm", "base", "--limit", "1", "--json"]
    assert main(args) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["prompt"]) for row in rows] == [("1 concepts", "a fox"), ("2 concepts", "a fox in ink")]


def test_a_sheet_needs_two_arms_before_anything_is_drawn(checkpoint, loras, capsys, monkeypatch):
    monkeypatch.setattr("mole_diffusers.evaluation.runner.evaluate", lambda *_, **__: pytest.fail("drawn"))
    assert main([*checkpoint, "--expert", f"fox={loras['fox']}", "--arm", "base", "--sheet"]) == 1
    assert "a sheet needs two arms or more" in capsys.readouterr().err


def test_the_card_is_taken_where_there_is_one(checkpoint, loras, monkeypatch):
    """The pipeline and what measures alike; what they are put on is all that is looked at, since there may be no card."""
    places = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.PartialState", lambda cpu: None)

    def put(_, device):
        places.append(device)
        raise ValueError("far enough")

    monkeypatch.setattr(CLIPModel, "to", put)
    monkeypatch.setattr(StableDiffusionPipeline, "to", put)
    given = [arg for arg in checkpoint if arg not in ("--device", "cpu")]
    for command in ([*given, "--expert", f"fox={loras['fox']}"], ["evaluate"]):
        assert main(command) == 1
    assert places == ["cuda", "cuda"]


def test_the_embedded_world_takes_no_parts_of_another(loras, capsys, monkeypatch):
    monkeypatch.setattr("mole_diffusers.emoji.world.emoji_world", lambda **_: pytest.fail("opened"))
    assert main(["evaluate", "--expert", f"fox={loras['fox']}:0.5", "--clip", "x"]) == 1
    assert "--expert, --clip: the embedded world has its own" in capsys.readouterr().err
    assert main(["evaluate", "--base-config", "sd15"]) == 1
    assert "--base-config: the embedded world has its own" in capsys.readouterr().err
    assert main(["evaluate", "--search", "--arm", "sum", "--share", "0.5"]) == 1
    assert "--search draws arms of its own: leave out --arm, --share" in capsys.readouterr().err
