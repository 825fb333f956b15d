"""The protocol for real checkpoints, with tiny random models in every role."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from ports import free_port
from protocol_parts import noise
from single_file import save_single_file
from tiny import tiny_pipeline

import mole_diffusers
from mole_cli import evaluate as evaluating
from mole_cli.mole import main
from mole_diffusers import attach
from mole_diffusers.inspection.compare import sample
from mole_diffusers.inspection.gate_figures import block_places, heat_map
from mole_world.evaluation import measures
from mole_world.evaluation.checkpoint_protocol import Measures, read_cases
from mole_world.evaluation.measures import Detection, seam
from mole_world.evaluation.prompts import Concept
from mole_world.evaluation.rows import Rows, picture_path, save_picture
from mole_world.evaluation.runner import Case

COLOURS = {"fox": "red", "hat": "blue", "owl": "lime"}


class ByColour:
    """Models that see coloured squares: a detector of all squares, and features that are the mean colour."""

    names = {}
    squares = ((0, 0), (32, 0), (0, 32))

    def __init__(self):
        self.detector, self.fit, self.change = SimpleNamespace(boxes=self.boxes), lambda *_: 0.5, lambda *_: (0.25, 0.75)

    def boxes(self, image, subjects):
        return [Detection(x, y, x + 24, y + 24, 0.5) for x, y in self.squares if image.getpixel((x, y)) != (255, 255, 255)]

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
def test_a_picture_collapses_if_a_subject_is_missing_or_is_another(drawn, collapse, like):
    references = {name: [squares(colour)] for name, colour in COLOURS.items()}
    concepts = {name: Concept(name, (name,), "object", name) for name in COLOURS}
    found = Measures(ByColour(), concepts, references)(["fox", "hat"], "a fox and a hat", squares(*drawn), None)
    assert found["collapse"] == collapse
    assert list(found["dino"].values()) == pytest.approx(list(like), abs=1e-4)
    assert (found["lpips"], found["ssim"], found["clip_t"]) == (None, None, 0.5)


def test_a_style_is_in_the_whole_picture_and_one_subject_cannot_collapse():
    concepts = {name: Concept(name, (name,), kind, name) for name, kind in (("fox", "object"), ("ink", "style"))}
    references, picture = {"fox": [squares("red")], "ink": [Image.new("RGB", (64, 64), "white")]}, squares("red")
    found = Measures(ByColour(), concepts, references)(["fox", "ink"], "a fox in ink", picture, picture)
    whole = ByColour().features([picture]) @ ByColour().features(references["ink"]).T
    assert found["dino"] == pytest.approx({"fox": 1.0, "ink": whole.item()})
    assert (found["collapse"], found["lpips"], found["ssim"]) == (None, 0.25, 0.75)


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


def test_bad_cases_and_methods_are_refused_before_models_are_asked_for(loras, tmp_path, capsys):
    (tmp_path / "cases.jsonl").write_text('{"concepts": ["cat"], "prompt": "a cat"}\n')
    command = ["evaluate", "--base", "nowhere", "--expert", f"fox={loras['fox']}", "--device", "cpu"]
    assert main([*command, "--cases", str(tmp_path / "cases.jsonl")]) == 1
    assert "line 1: no expert for ['cat']; known: ['fox']" in capsys.readouterr().err
    assert main([*command, "--method", "best"]) == 1
    assert "unknown methods ['best']; known: ['base'," in capsys.readouterr().err


@pytest.mark.thorough
def test_evaluate_on_any_checkpoint(checkpoint, loras, tmp_path, capsys):
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--own", "fox=a fox", "--own", "ink=a ink", "--sheet"]
    args += [word for method in ("base", "np", "ssr", "mean", "sum") for word in ("--method", method)]
    assert main(args) == 0
    text, said = capsys.readouterr()
    assert text.startswith("| method | collapse | DINO | CLIP-T | LPIPS | SSIM | seam |")
    names = ["| base", "| np", "| ssr", "| mean"]
    assert [line.split(" | ")[0] for line in text.splitlines()[2:7]] == [*names, "| sum"]
    paired = text.splitlines()[8:]
    assert [line.split(" | ")[0] for line in paired[:6]] == ["| method, less sum", "| ---", *names]
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
    assert main([*args, "--method", "sum", "--method", "gates", "--attached", "2", "--attached", "3"]) == 0
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
    moved = ["--method", "sum", "--share", "0.3", "--share", "0.7"]
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
    chosen = [*args, "--expert", f"fox={loras['fox']}", "--method", "grid search", "--weights", str(path)]
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
    assert main([*checkpoint, "--expert", f"fox={loras['fox']}:0.4", "--method", "sum", "--method", "mean", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {json.dumps(row["settings"]["strengths"]) for row in rows} == {'{"fox": 0.4, "ink": 1.0}'}
    pipe = tiny_pipeline()
    for method, fox, ink in (("sum", 0.4, 1.0), ("mean", 0.2, 0.5)):
        attach(pipe, {"fox": (loras["fox"], fox), "ink": (loras["ink"], ink)}, "sum")
        (image,) = sample(pipe, "a fox in ink", [1000], num_inference_steps=1, guidance_scale=3.0)
        row = next(row for row in rows if row["method"] == method and row["seed"] == 1000)
        assert Image.open(picture_path(tmp_path / "out", row)).tobytes() == image.tobytes()


def test_what_a_checkpoint_lacks_is_said_before_anything_is_drawn(checkpoint, loras, tmp_path, capsys, monkeypatch):
    fox = ["--expert", f"fox={loras['fox']}"]
    (tmp_path / "none").mkdir()
    several = ["'grid search' needs the weights of a search", "'gates' needs a folder of trained gates"]
    for asked, message in (
        (["--method", "grid search", "--method", "gates"], "; ".join(several)),
        (["--images", f"typo={tmp_path}"], "--images 'typo': no such LoRA; known: ['fox', 'ink']"),
        (["--own", "typo=a fox"], "--own 'typo': no such LoRA; known: ['fox', 'ink']"),
        (["--method", "gates", "--gates", str(tmp_path / "none")], "['gates'] can draw none of the cases"),
    ):
        assert main([*checkpoint, *fox, "--method", "sum", *asked]) == 1
        assert message in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("rows*"))
    monkeypatch.setattr(evaluating, "DEFAULT_METHODS", ("base", "grid search"))
    lines = ["from mole_world.evaluation.methods import mean", 'METHODS = {"half": mean()}']
    (tmp_path / "methods_of_halves.py").write_text("\n".join(lines))
    others = ["--methods-from", str(tmp_path / "methods_of_halves.py")]
    assert main([*checkpoint, *fox, *others, "--gates", str(tmp_path / "none"), "--seeds", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert {row["method"] for row in json.loads(out)} == {"base", "mean"}
    assert "left out: 'grid search' needs the weights of a search" in err
    assert "left out: ['gates', 'bound gates'] can draw none of the cases" in err


@pytest.mark.thorough
def test_other_models_and_references_measure_anew_what_is_drawn_once(checkpoint, models, loras, tmp_path, capsys):
    """A second detector, or another picture of a concept, does not answer with the first one's scores."""
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--method", "base", "--seeds", "1", "--json"]
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
    args = [*checkpoint, "--expert", f"fox={loras['fox']}", "--seeds", "1", "--method", "base", "--limit", "1", "--json"]
    assert main(args) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["kind"], row["prompt"]) for row in rows] == [("1 concepts", "a fox"), ("2 concepts", "a fox in ink")]


def test_a_sheet_needs_two_methods_before_anything_is_drawn(checkpoint, loras, tmp_path, capsys):
    assert main([*checkpoint, "--expert", f"fox={loras['fox']}", "--method", "base", "--sheet"]) == 1
    assert "a sheet needs two methods or more" in capsys.readouterr().err
    assert not list((tmp_path / "out").rglob("*.png"))


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
    monkeypatch.setattr("mole_world.world.emoji_world", lambda **_: pytest.fail("opened"))
    assert main(["evaluate", "--expert", f"fox={loras['fox']}:0.5", "--clip", "x"]) == 1
    assert "--expert, --clip: the embedded world has its own" in capsys.readouterr().err
    assert main(["evaluate", "--base-config", "sd15"]) == 1
    assert "--base-config: the embedded world has its own" in capsys.readouterr().err
    assert main(["evaluate", "--search", "--method", "sum", "--share", "0.5"]) == 1
    assert "--search draws methods of its own: leave out --method, --share" in capsys.readouterr().err


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


METHODS = ["--method", "base", "--method", "alone", "--method", "sum", "--method", "bound"]


def test_a_base_and_a_folder_of_loras_are_enough_and_a_killed_run_goes_on(command, tmp_path, monkeypatch, capsys):
    """Killed while pictures are drawn, and while they are measured: the page is byte for byte that of one run."""
    assert main([*command, *METHODS, "--out", str(tmp_path / "whole")]) == 0
    text, said = capsys.readouterr()
    assert "note: 30 pictures: 6 methods, 3 cases, 2 seeds" in said
    assert [line for line in text.splitlines() if line in ("pairs:", "styles:")] == ["pairs:", "styles:"] * 3
    assert text.splitlines()[4].startswith("| base | ")
    assert text.rstrip().endswith("Too few cases to call any method better, which takes 20: pairs (1), styles (2).")
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

    again = [*command, *METHODS, "--out", str(tmp_path / "again")]
    for name, count, what in (
        ("mole_world.evaluation.runner.save_picture", 9, save_picture),
        ("mole_world.evaluation.checkpoint_protocol.seam", 5, seam),
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


def launchers(way):
    """The words before `-m mole_cli` for two processes: of one machine, or as two machines start them, one each."""
    python = [sys.executable, "-m"]
    if way == "machines":
        at = ["--nproc_per_node", "1", "--master_addr", "127.0.0.1", "--master_port", free_port()]
        return [[*python, "torch.distributed.run", "--nnodes", "2", "--node_rank", str(rank), *at] for rank in range(2)]
    accelerate = [*python, "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    return [[*accelerate, "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]]


@pytest.mark.thorough
@pytest.mark.parametrize("way", ["processes", "machines"])
def test_two_processes_make_the_page_of_one(command, tmp_path, capsys, way):
    """Without a GPU, what accelerate calls several GPUs are processes on the CPU."""
    assert main([*command, *METHODS, "--out", str(tmp_path / "one")]) == 0
    root, own = str(Path(mole_diffusers.__file__).parent.parent), ["-m", "mole_cli", *command, *METHODS]
    started = [subprocess.Popen([*launcher, *own, "--out", str(tmp_path / "two")], cwd=root) for launcher in launchers(way)]
    assert [process.wait(timeout=900) for process in started] == [0] * len(started)
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
