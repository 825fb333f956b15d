"""`mole train`: settings from flags and files, and everything that a run leaves behind."""

import json
from importlib import import_module

import hosts
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from tiers import thorough
from tiny import tiny_clip, tiny_pipeline, tiny_tokenizer

import mole_diffusers as mole
import mole_world
from mole_cli.mole import main
from mole_cli.train import READ_BY, _canvas
from mole_diffusers.training.clip import Clip
from mole_diffusers.training.config import TERMS, GateTraining
from mole_diffusers.training.context import TrainingContext
from mole_diffusers.training.data import RandomBatch, Samples, TrainingData
from mole_diffusers.training.objectives import OBJECTIVES
from mole_diffusers.whole_files import only_run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def flags(loras, base):
    words = ["--prompt", "a fox in ink", "--single", "fox=a fox", "--single", "ink=ink art", "--other", "fox=cat"]
    how = ["--term", "single=1,seeds=2,steps=2", "--term", "balance=0.5", "--steps", "2", "--batch", "2", "--every", "1"]
    gates = ["--gate-type", "static", "--total", "1", "--bins", "2"]
    return ["--base", base, "--expert", f"fox={loras['fox']}", "--expert", f"ink={loras['ink']}:0.7", *words, *how, *gates]


def test_options_of_a_term_may_be_lists(flags, tmp_path):
    file = tmp_path / "run.json"
    assert (
        main(["train", *flags, "--term", "clip=0.5,lengths=[20,50],steps=3", "--drop", "0.5", "--write-config", str(file)])
        == 0
    )
    training = json.loads(file.read_text())["training"]
    assert training["terms"]["clip"] == {"weight": 0.5, "lengths": [20, 50], "steps": 3}
    assert training["drop"] == 0.5


def test_the_emoji_world_trains_at_a_size_with_room_for_each_composed_prompt():
    prompts = ["a fox", "a fox, an owl, a hat and a doughnut", "a fox and an owl"]
    assert [mole_world.canvas(prompt) for prompt in prompts] == [(64, 64), (128, 128), (128, 64)]
    assert _canvas("emoji", TrainingData(composed=prompts)) == {"width": 128, "height": 128}
    assert _canvas("emoji", TrainingData()) == _canvas("other", TrainingData(composed=prompts)) == {}


def test_settings_are_written_whole_over_nothing_and_only_if_they_can_run(tmp_path, capsys):
    file = tmp_path / "new" / "run.yaml"
    for argv, message in (
        (["train", "--gate-type", "nonsense"], "'nonsense' is not one of 'factors', "),
        (["train", "--term", "bogus"], "unknown term 'bogus'; known: "),
        (["train", "--batch", "-3"], "batch of the training must be 1 or more, got -3"),
        (["train-lora", "--rank", "0"], "rank of the training must be 1 or more, got 0"),
    ):
        assert main([*argv, "--write-config", str(file)]) == 1
        assert message in capsys.readouterr().err
        assert not file.exists()
    assert main(["train", "--steps", "3", "--write-config", str(file)]) == 0
    before = file.read_text()
    for command in ("train", "train-lora"):
        assert main([command, "--steps", "4", "--write-config", str(file)]) == 1
        assert f"{file} is there already; give --write-config another name" in capsys.readouterr().err
    assert file.read_text() == before
    assert [each.name for each in file.parent.iterdir()] == ["run.yaml"]


@pytest.mark.parametrize("suffix", ["yaml", *thorough("json")])
def test_a_file_of_settings_gives_the_run_of_its_flags(flags, tmp_path, suffix, capsys):
    file, (one, two) = tmp_path / f"run.{suffix}", (tmp_path / n for n in ("one", "two"))
    assert main(["train", *flags, "--precision", "no", "--write-config", str(file)]) == 0
    assert not one.exists()
    assert main(["train", *flags, "--out", str(one)]) == 0
    rows = [json.loads(line) for line in (one / "log.jsonl").read_text().splitlines()]
    ends = f"loss {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}, means over a tenth of the updates"
    assert capsys.readouterr().out.splitlines()[-1] == f"{one}: {ends}"
    assert main(["train", "--config", str(file), "--out", str(two)]) == 0
    assert (one / "gates.safetensors").read_bytes() == (two / "gates.safetensors").read_bytes()
    assert (one / "log.jsonl").read_text() == (two / "log.jsonl").read_text()
    other, written = ["--steps", "1", "--expert", "hat=hat.safetensors"], tmp_path / "other.json"
    assert main(["train", "--config", str(file), *other, "--write-config", str(written)]) == 0
    found = json.loads(written.read_text())
    assert found["training"]["steps"] == 1  # a flag goes before the file
    assert found["experts"] == {"hat": "hat.safetensors"}


def test_parts_are_those_of_the_prompt_that_is_asked_for(flags, tmp_path, capsys, ascii_locale):
    file = tmp_path / "run.yaml"

    def lesson(*words):
        at = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        assert main(["train", *words, "--config", str(file), "--write-config", str(at)]) == 0
        return {name: value for name, value in json.loads(at.read_text())["lesson"].items() if name in ("composed", "parts")}

    file.write_text("lesson: {composed: [a fox in ink], parts: {a fox in ink: [a fox, ink art]}}")
    assert lesson() == {"composed": ["a fox in ink"], "parts": {"a fox in ink": ["a fox", "ink art"]}}
    assert lesson("--prompt", "ink of a cat") == {"composed": ["ink of a cat"]}
    assert lesson("--part", "a fox in ink") == {"composed": ["a fox in ink"], "parts": {"a fox in ink": ["a fox in ink"]}}
    assert lesson("--prompt", "a cat", "--part", "cat") == {"composed": ["a cat"], "parts": {"a cat": ["cat"]}}
    file.write_text("lesson: {composed: [füchse]}", "utf-8")
    assert lesson() == {"composed": ["füchse"]}
    file.write_text("lesson: {composed: [a fox, ink art]}")
    assert main(["train", "--part", "a fox", "--config", str(file), "--out", str(tmp_path / "x")]) == 1
    assert "--part tells the subjects of one --prompt, got 2 prompts" in capsys.readouterr().err


@pytest.mark.thorough
def test_parts_of_a_prompt_are_learned_from_as_collages(loras, base, tmp_path, capsys):
    experts = [f"--expert={name}={loras[name]}" for name in ("fox", "hat")]
    words = ["--prompt", "a fox and a hat", "--part", "a fox", "--part", "a hat"]
    out = tmp_path / "out"
    command = ["train", "--base", base, *experts, *words, "--steps", "1", "--batch", "1"]
    assert main([*command, "--out", str(out)]) == 0
    log = json.loads((out / "log.jsonl").read_text())
    assert "collage" in log
    assert not {"single", "composed"} & set(log)
    assert json.loads((out / "config.json").read_text())["gates"]["gate_type"] == "factors"  # unless asked otherwise
    singles = ["--single", "fox=a fox", "--single", "hat=a hat"]
    assert main([*command, *singles, "--out", str(tmp_path / "all")]) == 0
    assert not {"single", "composed"} & set(json.loads((tmp_path / "all" / "log.jsonl").read_text()))
    assert main([*command, "--prompt", "a hat and a fox", "--out", str(out)]) == 1
    assert "--part tells the subjects of one --prompt, got 2 prompts" in capsys.readouterr().err


def test_what_no_term_learns_from_is_said_and_not_read(flags, tmp_path, capsys):
    nowhere = ["--data", str(tmp_path / "nowhere"), "--clip", str(tmp_path / "nowhere"), "--plain", "a cat"]
    nowhere += ["--width", "32"]
    assert main(["train", *flags, *nowhere, "--style", "ink", "--steps", "1", "--out", str(tmp_path / "x")]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes == [
        "note: nothing is learned from --style (--term composed or separate), --plain (--term base), --other "
        "(--term rollout), --data (--term denoise or clip), --clip (--term clip or rollout), --prompt (--term composed or "
        "separate or clip or rollout), --width (--term composed or separate or collage or rollout); the terms are single, "
        "balance"
    ]


def test_single_prompts_beside_parts_are_of_use_to_first_weights_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(import_module("mole_cli.train"), "trained_pipeline", lambda *_: [][0])  # far enough
    words = ["--prompt", "a fox", "--part", "a fox", "--single", "fox=a fox", "--out", str(tmp_path)]
    for initial, said in (("uniform", True), ("scalars", False)):
        with pytest.raises(IndexError):
            main(["train", *words, "--initial", initial])
        assert ("nothing is learned from --single (--term single or rollout)" in capsys.readouterr().err) == said


def test_terms_learn_from_what_the_note_says(pipe, loras):
    """From what each of them reads of the training data, and of its context."""
    read = set()

    class Watched:
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    class Data(Watched, TrainingData):
        pass

    class Context(Watched, TrainingContext):
        pass

    class Config(Watched, GateTraining):
        pass

    mixture = mole.attach(pipe, {name: loras[name] for name in ("fox", "ink")}, "static")
    pictures = Samples(torch.randn(1, 4, 16, 16), ["a fox"])
    words = {"fox": ["a fox"]}, ["a fox in ink"], {"fox": ["cat"]}, ["a cat"], [], {"a fox in ink": ["a fox", "ink"]}
    context = Context(pipe, mixture, Data(*words, samples=pictures), Clip(tiny_clip(), tiny_tokenizer()), Config())
    fields = {"parts": "part", "singles": "single", "styles": "style", "plain": "plain", "others": "other"}
    fields |= {"samples": "data", "clip": "clip", "composed": "prompt", "width": "width", "height": "height"}
    for name, objective in OBJECTIVES.items():
        kinds = TERMS[name].__dataclass_fields__
        read.clear()
        loss = objective(context, TERMS[name](**{n: 1 for n in ("seeds", "steps", "pictures") if n in kinds}))
        loss(RandomBatch(torch.Generator().manual_seed(0), 1))
        assert {fields[each] for each in read & set(fields)} == {each for each in READ_BY if name in READ_BY[each]}, name


def test_a_run_goes_on_where_asked(flags, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["train", *flags, "--out", out]) == 0
    assert main(["train", *flags, "--out", out]) == 1
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err
    before = (tmp_path / "out" / "gates.safetensors").read_bytes()
    assert main(["train", *flags, "--out", out, "--resume", "checkpoint-1"]) == 0
    assert (tmp_path / "out" / "gates.safetensors").read_bytes() == before


def test_loras_of_the_embedded_world_are_found_in_every_prompt(tmp_path, monkeypatch):
    found = []

    def attach(_, experts, __):
        found.append(list(experts))
        raise ValueError("far enough")

    monkeypatch.setattr("mole_diffusers.attach", attach)
    monkeypatch.setattr(import_module("mole_cli.train"), "trained_pipeline", lambda *_: tiny_pipeline())
    for words in (
        ["--prompt", "a picture", "--part", "a fox", "--part", "a tiger"],
        ["--single", "fox=noto drawing of a fox", "--single", "tiger=a tiger", "--term", "single"],
    ):
        assert main(["train", *words, "--out", str(tmp_path / "x")]) == 1
    assert found == [["fox", "tiger"]] * 2


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(import_module("mole_cli.train"), "_train_gates", interrupted)
    command = ["train", "--prompt", "a fox", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "note: interrupted: there is no checkpoint yet" in capsys.readouterr().err
    for step in (4, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "training.pt").touch()
    assert main([*command, "--resume", "latest"]) == 130
    assert f"{tmp_path / 'checkpoint-12'} is kept; --resume latest goes on from there" in capsys.readouterr().err


def test_a_base_that_cannot_be_trained_on_is_one_line(loras, tmp_path, capsys):
    hosts.flux().save_pretrained(tmp_path / "flux")
    hosts.sd3().save_pretrained(tmp_path / "sd3")
    Image.new("RGB", (32, 32)).save(tmp_path / "1.png")
    given = ["--data", str(tmp_path), "--out", str(tmp_path / "x")]
    gates = ["train", "--expert", f"fox={loras['fox']}", "--term", "denoise"]
    assert main([*gates, *given, "--base", str(tmp_path / "sd3")]) == 1
    assert "StableDiffusion3Pipeline cannot be trained on: it needs a text_encoder, and" in capsys.readouterr().err
    assert main(["train-lora", "--trigger", "a fox", *given, "--base", str(tmp_path / "flux")]) == 1
    assert "training a LoRA needs a UNet, and FluxPipeline has none" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["train", "--prompt", "a fox"], ["train-lora", "--data", ".", "--trigger", "fox"]])
def test_a_folder_that_a_run_may_not_write_to_is_said_before_the_base_is_opened(tmp_path, monkeypatch, capsys, command):
    monkeypatch.setattr(import_module("mole_cli.train"), "trained_pipeline", lambda *_: pytest.fail("opened"))
    with only_run(tmp_path):
        assert main([*command, "--out", str(tmp_path)]) == 1
    assert "another run is writing to" in capsys.readouterr().err
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "training.pt").touch()
    assert main([*command, "--out", str(tmp_path)]) == 1
    assert "holds checkpoint-2 of an earlier run" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path), "--resume", "checkpoint-3"]) == 1
    assert "no checkpoint 'checkpoint-3'" in capsys.readouterr().err


def test_prompts_that_the_judge_cannot_judge_are_said_before_the_base_is_opened(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(import_module("mole_cli.train"), "trained_pipeline", lambda *_: pytest.fail("opened"))
    file = tmp_path / "run.yaml"
    file.write_text("training: {validation: {every: 1, prompts: [noto drawing of a fox, a spaceship]}}")
    words = ["--single", "fox=noto drawing of a fox", "--config", str(file)]
    assert main(["train", *words, "--out", str(tmp_path / "x")]) == 1
    assert "the prompt 'a spaceship' names no subject of the emoji world" in capsys.readouterr().err


def test_the_card_says_what_the_gates_are(flags, loras, tmp_path, hub):
    api, out = hub[0], tmp_path / "out"
    assert main(["train", *flags, "--out", str(out), "--push-to-hub", "me/gates"]) == 0
    sent = api.upload_folder.call_args.kwargs
    assert (sent["repo_id"], sent["folder_path"]) == ("me/gates", out)
    assert sorted(sent["allow_patterns"]) == ["README.md", "config.json", "gates.safetensors"]
    written = ModelCard.load(out / "README.md")
    assert (written.data.library_name, written.data.base_model) == ("diffusers", None)  # the base is a folder here
    sha = mole.attach(tiny_pipeline(), {"fox": loras["fox"]}).experts["fox"].sha256
    for part in (
        "# Gates for fox + ink",
        "| fox | 1 | ",
        "| ink | 0.7 | ",
        f"`{sha}` |",
        "single (weight 1), balance (weight 0.5)",
        "2 updates",
    ):
        assert part in written.text


@pytest.mark.parametrize(
    ("file", "argv", "message"),
    [
        ("[1, 2]", [], "must hold sections of"),
        ("{a: ", [], "is neither YAML nor JSON"),
        ("training: {steps: 1, steps: 2}", [], "run.yaml: the key 'steps' is given more than once"),
        ("{}", ["--term", "single", "--term", "single=2"], "--term 'single' is given more than once"),
        ("trainning: {}", [], "unknown options ['trainning'] of "),
        ("training: {stepps: 1, terms: {single: 1}}", [], "unknown options ['stepps'] of the training; known: ['steps'"),
        ("gates: {gate_type: moe}", [], "unknown gate type 'moe'; known: "),
        ("experts: {hat: 'hat.safetensors:big'}", [], "the strength 'big' is not a number"),
        ("{}", ["--lr", "fast"], "Invalid value for '--lr'"),
        ("gates: {gate_type: mole, bias: 'yes'}", [], "must be true or false, got 'yes'"),
        ("{}", ["--gate-type", "flow", "--no-bias"], "'flow' gates have no option 'bias'; their options: ['start']"),
        ("{}", ["--term", "single,seeds"], "--term 'seeds' is not NAME=VALUE"),
        ("{}", ["--term", "single=much"], "weight of the single term must be a number, got 'much'"),
        ("experts: [a, b]", [], "experts of "),
        ("experts: {hat: 3}", [], "hat of the experts must be a text, got 3"),
        ("data: photos", [], "must be a list of texts, got 'photos'"),
        ("training: 3", [], "must be names, each with a value, got 3"),
        ("training: {lr: fast}", [], "lr of the training must be a number, got 'fast'"),
        ("training: {steps: 1.5}", [], "steps of the training must be a whole number, got 1.5"),
        ("training: {terms: [single]}", [], "terms of the training must be names, each with a number"),
        ("training: {terms: {single: {seeds: many}}}", [], "seeds of the single term must be a whole number, got 'many'"),
        ("training: {validation: {prompts: a fox}}", [], "prompts of the validation must be a list of texts, got 'a fox'"),
        ("training: {validation: 5}", ["--validate", "3"], "validation of the training must be names, each with a value"),
        ("lesson: {composd: [x]}", [], "unknown options ['composd'] of the training data; known: ['singles', 'composed', "),
        ("lesson: {plain: a fox}", [], "plain of the training data must be a list of texts, got 'a fox'"),
        ("lesson: {singles: {fox: a fox}}", [], "singles of the training data must be names, each with a list of texts"),
    ],
)
def test_bad_settings_are_one_line(flags, tmp_path, capsys, file, argv, message):
    path = tmp_path / "run.yaml"
    path.write_text(file)
    ours = flags[:2] if "experts" in file else flags[:6]
    given = [*ours, "--config", str(path), "--prompt", "a fox in ink", "--out", str(tmp_path / "out"), *argv]
    assert main(["train", *given]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_yaml_means_what_it_says(flags, tmp_path):
    file = tmp_path / "run.yaml"
    assert main(["train", *flags, "--precision", "no", "--validate", "3", "--write-config", str(file)]) == 0
    training = yaml.safe_load(file.read_text())["training"]
    assert training["validation"] == {"every": 3}
    assert training["terms"] == {"single": {"weight": 1, "seeds": 2, "steps": 2}, "balance": {"weight": 0.5}}
    bare = file.read_text().replace("precision: 'no'", "precision: no\n  lr: 1e-3")
    assert "data: []" in bare
    file.write_text(bare.replace("data: []", "data:"))
    assert main(["train", "--config", str(file), "--out", str(tmp_path / "out"), "--steps", "1"]) == 0


@pytest.mark.thorough
def test_the_embedded_world_brings_its_own_judge(tmp_path, capsys):
    words = ["--prompt", "ink drawing of a fox", "--single", "fox=noto drawing of a fox"]
    how = ["--term", "single=1,seeds=2,steps=2", "--steps", "2", "--validate", "1", "--gate-type", "static"]
    assert main(["train", *words, *how, "--out", str(tmp_path), "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["success"] <= 1
    assert sorted(p.name for p in (tmp_path / "validation").iterdir()) == ["step-1.png", "step-2.png"]
