"""The protocol for real checkpoints, with tiny random models in every role: scores against the models' own calls."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import timm
import tiny_models
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from single_file import save_single_file
from torchmetrics.functional.image.lpips import learned_perceptual_image_patch_similarity

import mole_diffusers
from mole_diffusers import attach
from mole_diffusers.cli import evaluate as evaluating
from mole_diffusers.cli.mole import main
from mole_diffusers.evaluation import measures
from mole_diffusers.evaluation.checkpoint_protocol import Measures, read_cases
from mole_diffusers.evaluation.judging_sheet import agreement, count_answers, votes, write_sheet
from mole_diffusers.evaluation.measures import Box, Models, seam
from mole_diffusers.evaluation.prompts import Concept
from mole_diffusers.evaluation.rows import Rows, picture_path, save_picture
from mole_diffusers.evaluation.runner import Case
from mole_diffusers.inspection.compare import sample
from mole_diffusers.inspection.gate_figures import block_places, heat_map
from mole_diffusers.testing import tiny_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Options for a folder of each model, with random weights."""
    folder, before = tmp_path_factory.mktemp("models"), os.environ.get("TORCH_HOME")
    os.environ["TORCH_HOME"] = str(tiny_models.save_squeezenet(folder / "torch"))
    saved = {name: getattr(tiny_models, f"save_{name}")(folder / name) for name in ("clip", "dino", "detector")}
    yield {name: str(path) for name, path in saved.items()} | {"lpips": "squeeze"}
    os.environ.pop("TORCH_HOME")
    os.environ |= {"TORCH_HOME": before} if before else {}


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


def test_scores_are_the_models_own(models):
    """Of a wide picture, which becomes a square with grey bars."""
    loaded = Models(**models)
    picture, other = noise(99).resize((56, 28)), noise(98).resize((56, 28))
    square = Image.new("RGB", (56, 56), "grey")
    square.paste(picture, (0, 14))
    clip, transform = open_clip.create_model_from_pretrained(f"local-dir:{models['clip']}")
    tokens = open_clip.get_tokenizer(f"local-dir:{models['clip']}")(["a fox in ink"])
    image, text, _ = clip.eval()(transform(square)[None], tokens)
    assert loaded.fit(picture, "a fox in ink") == pytest.approx((image @ text.T).item(), abs=1e-5)
    dino = timm.create_model(f"local-dir:{models['dino']}", pretrained=True).eval()
    small = torch.tensor(list(square.resize((28, 28), Image.Resampling.BICUBIC).getdata())).T.reshape(1, 3, 28, 28)
    feature = dino(small / 127.5 - 1)
    assert torch.cosine_similarity(loaded.features([picture]), feature).item() == pytest.approx(1, abs=1e-3)
    x, y = (torch.tensor(list(each.getdata())).T.reshape(1, 3, 28, 56) / 127.5 - 1 for each in (picture, other))
    lpips = learned_perceptual_image_patch_similarity(x, y, net_type="squeeze").item()
    assert loaded.change(picture, other)[0] == pytest.approx(lpips, abs=1e-5)
    assert loaded.change(picture, picture) == pytest.approx((0, 1))


def test_a_box_is_inside_of_the_picture_and_counts_once(models):
    """Of boxes that nearly cover each other, the surest is left, whatever was looked for."""
    detector, found = Models(**models).detector, []
    given = [(-5, 0, 20, 20, 0.9), (0, 0, 21, 20, 0.8), (30, 30, 90, 50, 0.7), (60, 0, 70, 9, 0.6)]
    raw = [{"score": score, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))} for *box, score in given]
    detector.run = lambda image, candidate_labels, top_k: found.extend(candidate_labels) or raw
    boxes = detector.boxes(noise(0), ["a fox", "a hat"])
    assert boxes == [Box(0, 0, 20, 20, 0.9), Box(30, 30, 56, 50, 0.7)]
    assert found == ["a fox", "a hat"]


COLOURS = {"fox": "red", "hat": "blue", "owl": "lime"}


class ByColour:
    """Models that see coloured squares: a detector of all squares, and features that are the mean colour."""

    names = {}
    squares = ((0, 0), (32, 0), (0, 32))

    def __init__(self):
        self.detector, self.fit, self.change = SimpleNamespace(boxes=self.boxes), lambda *_: 0.5, lambda *_: (0.25, 0.75)

    def boxes(self, image, things):
        return [Box(x, y, x + 24, y + 24, 0.5) for x, y in self.squares if image.getpixel((x, y)) != (255, 255, 255)]

    def features(self, images):
        means = [torch.tensor(list(image.convert("RGB").getdata())).float().mean(0) for image in images]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1)


def squares(*colours):
    picture = Image.new("RGB", (64, 64), "white")
    for (x, y), colour in zip(ByColour.squares, colours, strict=False):
        picture.paste(Image.new("RGB", (24, 24), colour), (x, y))
    return picture


@pytest.mark.parametrize(
    ("drawn", "collapse", "like"),
    [
        (("red", "blue"), False, (1, 1)),  # in any order
        (("blue", "red"), False, (1, 1)),
        (("red",), True, (1, 0)),  # one is missing
        (("red", "red"), True, (1, 0)),  # a second fox in the place of the hat
        (("#a00060", "#a00060"), True, (0.8575, 0.5145)),  # both are a blend, and more of a fox
        ((), True, (0, 0)),
        (("lime", "red", "blue"), False, (1, 1)),  # something else is there, too
    ],
)
def test_a_picture_collapses_if_a_thing_is_missing_or_is_another(drawn, collapse, like):
    references = {name: [squares(colour)] for name, colour in COLOURS.items()}
    concepts = {name: Concept(name, (name,), "object", name) for name in COLOURS}
    found = Measures(ByColour(), concepts, references)(["fox", "hat"], "a fox and a hat", squares(*drawn), None)
    assert found["collapse"] == collapse
    assert list(found["dino"].values()) == pytest.approx(list(like), abs=1e-4)
    assert (found["lpips"], found["ssim"], found["clip_t"]) == (None, None, 0.5)


def test_a_style_is_in_the_whole_picture_and_one_thing_cannot_collapse():
    concepts = {name: Concept(name, (name,), kind, name) for name, kind in (("fox", "object"), ("ink", "style"))}
    references, picture = {"fox": [squares("red")], "ink": [Image.new("RGB", (64, 64), "white")]}, squares("red")
    found = Measures(ByColour(), concepts, references)(["fox", "ink"], "a fox in ink", picture, picture)
    whole = ByColour().features([picture]) @ ByColour().features(references["ink"]).T
    assert found["dino"] == pytest.approx({"fox": 1.0, "ink": whole.item()})
    assert (found["collapse"], found["lpips"], found["ssim"]) == (None, 0.25, 0.75)


def test_a_seam_is_a_line_through_the_whole_picture():
    half, box = Image.new("RGB", (64, 48), "black"), Image.new("RGB", (64, 48), "black")
    half.paste("#646464", (32, 0, 64, 48))
    box.paste("#646464", (20, 20, 40, 40))
    assert seam(half) == seam(half.rotate(90, expand=True)) == 100
    assert seam(box) == 0  # its edges run along 20 of 48 pixels


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


def answer(sheet, choose, judge=""):
    path = sheet / "sheet" / f"answers{judge}.csv"
    if judge:
        shutil.copy(sheet / "sheet" / "answers.csv", path)
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
    assert "| gates | sum | 4 | 0 | 0 | 1.00 [0.21, 1.00] | 1.00 |" in lines
    assert "| gates | mean | 4 | 0 | 0 | 1.00 [0.21, 1.00] | 1.00 |" in lines
    assert "| mean | sum | 1 | 1 | 0 | 0.50 [0.00, 1.00] | 0.00 |" in lines
    assert main(["evaluate", "--judged", "--out", str(sheet)]) == 0
    assert capsys.readouterr().out.splitlines() == lines
    assert main(["evaluate", "--judged", "--json", "--out", str(sheet)]) == 0
    pair = {"first arm": "gates", "second arm": "sum", "first better": 4, "second better": 0, "same": 0}
    pair |= {"share of the first": "1.00 [0.21, 1.00]", "orders agree": 1.0}
    assert pair in json.loads(capsys.readouterr().out)
    with pytest.raises(ValueError, match="holds answers: count them with --judged"):
        write_sheet(sheet, [])
    answer(sheet, lambda q: "both")
    with pytest.raises(ValueError, match="question 0000: 'both' is none of"):
        count_answers(sheet)


def test_the_agreement_of_judges_is_krippendorffs_alpha(sheet):
    """Of two judges on twelve questions, by hand: alpha = 1 - observed / expected disagreement."""
    assert agreement(sheet) is None  # one judge, who has not answered
    answer(sheet, lambda q: max(("left", "right"), key=q.get), "-anna")
    answer(sheet, lambda q: max(("left", "right"), key=q.get), "-bob")
    assert agreement(sheet) == 1
    assert {(own["first better"], own["second better"]) for own in votes(sheet)} == {(0, 8)}  # "sum" is the last name
    first = json.loads((sheet / "sheet" / "key.json").read_text())[0]
    answer(sheet, lambda q: "same" if q == first else max(("left", "right"), key=q.get), "-bob")
    given = [max((q["left"], q["right"])) for q in json.loads((sheet / "sheet" / "key.json").read_text())]
    values = [*given, *given[1:], "same"]
    pairs = sum(a != b for i, a in enumerate(values) for j, b in enumerate(values) if i != j)
    assert agreement(sheet) == pytest.approx(1 - (2 / 24) / (pairs / (24 * 23)))
    assert f"Krippendorff's alpha (1: full, 0: as by chance): {agreement(sheet):.2f}" in count_answers(sheet)
    with pytest.raises(ValueError, match="holds answers"):
        write_sheet(sheet, [])


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


def named(models):
    """The options of the models."""
    return [word for name, value in models.items() for word in (f"--{name}", value)]


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
    args += ["--cases", str(tmp_path / "cases.jsonl"), *named(models)]
    return [*args, "--expert", f"ink={loras['ink']}", "--kind", "ink=style", "--out", str(tmp_path / "out")]


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
    assert text.startswith("| arm | collapse | DINO | CLIP-T | LPIPS | SSIM | seam |")
    names = ["| base", "| np", "| ssr", "| k-lora"]
    assert [line.split(" | ")[0] for line in text.splitlines()[2:7]] == [*names, "| sum"]
    paired = text.splitlines()[8:]
    assert [line.split(" | ")[0] for line in paired[:6]] == ["| arm, less sum", "| ---", *names]
    assert "note: 40 questions in" in said
    assert main([*args, "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 10
    assert (tmp_path / "out" / "samples.png").exists()
    assert main([*args, "--search"]) == 1
    assert main([*args, "--kind", "cat=style"]) == 1
    assert "--kind 'cat': no such LoRA; known: ['fox', 'ink']" in capsys.readouterr().err
    assert main([*args, "--kind", "fox=animal"]) == 1
    assert (
        "the kind of 'fox' is one of character, object, clothing, style, background, got 'animal'" in capsys.readouterr().err
    )
    assert main([*args, "--protocol", "pairs"]) == 1
    assert "--cases and --protocol exclude each other" in capsys.readouterr().err


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
    at = args.index("--kind")
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
    several = ["'grid search' needs the weights of a search", "'gates' needs a folder of trained gates"]
    for asked, message in (
        (["--arm", "grid search", "--arm", "gates"], "; ".join(several)),
        (["--images", f"typo={tmp_path}"], "--images 'typo': no such LoRA; known: ['fox', 'ink']"),
        (["--own", "typo=a fox"], "--own 'typo': no such LoRA; known: ['fox', 'ink']"),
        (["--arm", "gates", "--gates", str(tmp_path / "none")], "['gates'] can draw none of the cases"),
    ):
        assert main([*checkpoint, *fox, "--arm", "sum", *asked]) == 1
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("rows*"))
    monkeypatch.setattr(evaluating, "DEFAULT_ARMS", ("base", "grid search", "k-lora"))
    assert main([*checkpoint, *fox, "--gates", str(tmp_path / "none"), "--seeds", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {row["arm"] for row in json.loads(out)} == {"base", "k-lora"}
    assert "left out: 'grid search' needs the weights of a search" in err
    assert "left out: ['gates', 'bound gates'] can draw none of the cases" in err


@pytest.mark.thorough
def test_other_models_and_references_measure_anew_what_is_drawn_once(checkpoint, models, loras, tmp_path, capsys):
    """A second detector, or another picture of a concept, does not answer with the first one's scores."""
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--arm", "base", "--seeds", "1", "--json"]
    shutil.copytree(models["detector"], tmp_path / "detector")
    (tmp_path / "fox").mkdir()
    noise(7).save(tmp_path / "fox" / "0.png")
    pictured = [*args]
    pictured[args.index("--images") + 1] = f"fox={tmp_path / 'fox'}"
    scores = []
    for given in (args, [*args, "--detector", str(tmp_path / "detector")], pictured, args):
        assert main(given) == 0
        scores.append(json.loads(capsys.readouterr().out))
    assert scores[0] == scores[3]
    assert scores[0][0]["dino"]["fox"] != scores[2][0]["dino"]["fox"]
    assert len((tmp_path / "out" / "rows-0.jsonl").read_text().splitlines()) == 1
    assert len((tmp_path / "out" / "measures-0.jsonl").read_text().splitlines()) == 3


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
    monkeypatch.setattr("accelerate.PartialState", lambda **_: None)

    def put(_, device):
        places.append(device)
        raise ValueError("far enough")

    monkeypatch.setattr(measures, "Detector", lambda _, device: put(_, device))
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


@pytest.fixture(scope="module")
def folders(loras, tmp_path_factory):
    """A base and a folder of LoRAs: two subjects and a style."""
    folder = tmp_path_factory.mktemp("given")
    tiny_pipeline().save_pretrained(folder / "base")
    for name, kind in (("fox", "objects"), ("hat", "objects"), ("ink", "style")):
        (folder / "loras" / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(loras[name], folder / "loras" / kind)
    return folder


@pytest.fixture
def command(folders, models):
    command = [
        "evaluate",
        "--base",
        str(folders / "base"),
        "--loras",
        str(folders / "loras"),
        *named(models),
        "--device",
        "cpu",
    ]
    return [*command, "--seeds", "2", "--steps", "1", "--protocol", "pairs", "--protocol", "styles"]


ARMS = ["--arm", "base", "--arm", "alone", "--arm", "sum", "--arm", "bound"]


def test_a_base_and_a_folder_of_loras_are_enough_and_a_killed_run_goes_on(command, tmp_path, monkeypatch, capsys):
    """Killed while pictures are drawn, and while they are measured: the page is byte for byte that of one run."""
    assert main([*command, *ARMS, "--out", str(tmp_path / "whole")]) == 0
    text, said = capsys.readouterr()
    assert "note: 30 pictures: 6 arms, 3 cases, 2 seeds" in said
    assert [line for line in text.splitlines() if line in ("pairs:", "styles:")] == ["pairs:", "styles:"] * 3
    assert text.splitlines()[4].startswith("| base | ")
    assert text.rstrip().endswith("Too few cases to call any arm better, which takes 20: pairs (1), styles (2).")
    page = (tmp_path / "whole" / "index.html").read_text()
    assert page.count("<img") == len(set((tmp_path / "whole" / "pictures").rglob("*.png"))) - 12  # four references of each

    class Killed(BaseException):
        pass

    def fails_after(count, what):
        calls = []

        def run(*given, **options):
            calls.append(given)
            if len(calls) > count:
                raise Killed
            return what(*given, **options)

        return run

    again = [*command, *ARMS, "--out", str(tmp_path / "again")]
    for name, count, what in (
        ("mole_diffusers.evaluation.runner.save_picture", 9, save_picture),
        ("mole_diffusers.evaluation.checkpoint_protocol.seam", 5, seam),
    ):
        with monkeypatch.context() as broken:
            broken.setattr(name, fails_after(count, what))
            with pytest.raises(Killed):
                main(again)
    with (tmp_path / "again" / "measures-0.jsonl").open("a") as file:
        file.write('{"picture": "0')  # the line that was being written
    drawn = len(Rows(tmp_path / "again").read())
    assert drawn == 30 + 12
    assert main(again) == 0
    assert len(Rows(tmp_path / "again").read()) == drawn
    assert capsys.readouterr().out == text
    for name in ("index.html", "table.md"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.thorough
def test_two_processes_make_the_page_of_one(command, tmp_path, capsys):
    """Without a GPU, what accelerate calls several GPUs are processes on the CPU."""
    assert main([*command, *ARMS, "--out", str(tmp_path / "one")]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m", "mole_diffusers"]
    root = str(Path(mole_diffusers.__file__).parent.parent)
    subprocess.run([*launch, *command, *ARMS, "--out", str(tmp_path / "two")], check=True, cwd=root)
    for name in ("rows", "measures"):
        counts = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "two").glob(f"{name}-*.jsonl"))]
        assert len(counts) == 2
        assert min(counts) > 0
        assert sum(counts) == (42 if name == "rows" else 30)
    one, two = tmp_path / "one", tmp_path / "two"
    for name in ("index.html", "table.md"):
        assert (two / name).read_text() == (one / name).read_text()


def test_a_missing_library_is_named_with_its_extra(command, monkeypatch, capsys):
    monkeypatch.setattr(evaluating, "NEEDED", ("pandas", "timmy", "open_clap"))
    assert main(command) == 1
    assert "mole evaluate: this needs timmy, open_clap: pip install 'mole-diffusers[evaluate]'" in capsys.readouterr().err
