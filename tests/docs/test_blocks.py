"""Every fenced block of the documents runs, with tiny models in the places of a reader's own files.

Some are run by other tests (`ELSEWHERE`). What cannot run in a test is in `CANNOT` alone, with the reason.
"""

import json
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from subprocess import PIPE, Popen, run
from urllib.request import urlopen

import hosts
import pytest
import torch
from PIL import Image
from ports import free_port
from single_file import save_single_file
from tiny import tiny_lora

from mole_cli.mole import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
ELSEWHERE = {  # page, language of its blocks -> who runs them
    ("README.md", "python"): "test_readme::test_python_blocks_run",
    ("README.md", "bash"): "CI; test_project::test_ci_runs_the_two_commands_of_the_readme",
    ("bind.md", "python"): "test_docs::test_the_page_of_binding_runs",
    ("evaluation.md", "bash"): "test_docs::test_the_evaluation_runs",
    ("methods.md", "python"): "test_docs::test_an_method_of_the_readers_own_is_one",
    ("tiles.md", "python"): "test_docs::test_a_picture_is_drawn_in_tiles_as_shown",
    ("training.md", "bash"): "test_docs_training::test_every_command_runs",
    ("tutorial.md", "python"): "test_docs::test_the_tutorial_runs",
}
CANNOT = {  # how a command begins -> why no test runs it
    "python3 -m venv .venv": "CI makes an environment by the README's first command",
    ".venv/bin/pip install": "asks a package index; CI installs by the README's first command",
    "pip install": "asks a package index",
    "py -m venv": "needs Windows",
    r".venv\Scripts": "needs Windows",
    "accelerate launch --num_processes 4": "needs four cards; two processes run below",
    ".venv/bin/pytest": "is the tests themselves",
}
TINY = {  # command -> what makes it small; of an option given twice the last counts
    "draw": "--steps 3 --width 32 --height 32 --device cpu",
    "compose": "--steps 2",
    "evaluate": "--steps 1 --seeds 1 --limit 1",
    "merge": "",
    "train": "--steps 2 --batch 2 --device cpu --term collage,seeds=2,steps=2",
}


def commands(text):
    """The commands of a block of a shell, with lines that go on after a backslash as one."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def blocks():
    """(page, language, text) of every block, with a name."""
    for page in PAGES:
        for i, (language, text) in enumerate(BLOCK.findall(page.read_text())):
            yield pytest.param(page.name, language, text, id=f"{page.stem}-{i}{language and '-' + language}")


def why_not(command):
    """The reason for which a command cannot run here, if there is one."""
    return next((why for start, why in CANNOT.items() if command.startswith(start)), None)


def runs_here(page, language, text):
    """What of a block this module runs: its commands, or all of it."""
    if (page, language) in ELSEWHERE:
        return []
    if language in ("json", "py"):
        return [text]
    assert language in ("", "sh", "text", "bat"), f"{page}: a block of {language} is run by no test"
    return [command for command in commands(text) if not why_not(command)]


HERE = [block for block in blocks() if runs_here(*block.values)]


def test_nothing_is_left_out_for_a_reason_that_no_block_has():
    found = [block.values for block in blocks()]
    assert {(page, language) for page, language, _ in found if (page, language) in ELSEWHERE} == ELSEWHERE.keys()
    lines = [line for page, language, text in found if (page, language) not in ELSEWHERE for line in commands(text)]
    assert [start for start in CANNOT if not any(line.startswith(start) for line in lines)] == []
    assert {page for page, language, _ in found if language == "python"} == {
        page for page, language in ELSEWHERE if language == "python"
    }


def test_who_runs_the_other_blocks_is_there():
    for test in ELSEWHERE.values():
        module, _, name = test.rpartition(" ")[2].partition("::")
        assert f"\ndef {name}(" in (Path(__file__).parent / f"{module}.py").read_text(), test


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A folder with the files that the documents' commands name."""
    folder = tmp_path_factory.mktemp("reader")
    pipe = hosts.sd()
    pipe.save_pretrained(folder / "MODEL")
    shutil.copytree(folder / "MODEL", folder / "config", ignore=shutil.ignore_patterns("*.safetensors"))
    save_single_file(pipe, folder / "dreamshaper.safetensors")
    models = folder / "ComfyUI" / "models"
    shutil.copytree(folder / "MODEL", models / "checkpoints" / "dreamshaper")
    torch.manual_seed(3)
    hosts.save_given(models, pipe, hosts.controlnet(), hosts.eye(width=128))
    (models / "controlnet" / "canny.safetensors").rename(models / "controlnet" / "control_v11p_sd15_canny.safetensors")
    (models / "ipadapter" / "ip-plus.safetensors").rename(models / "ipadapter" / "ip-adapter_sd15.safetensors")
    for place in (
        *("fox", "octopus", "dog", "cat", "loras/fox", "FOLDER/objects/fox", "FOLDER/objects/hat", "FOLDER/style/ink"),
        *(f"ComfyUI/models/loras/{name}" for name in ("sks_dog", "red_cat")),
    ):
        file = folder / f"{place}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        tiny_lora(pipe, file)
    for name in ("photo.png", "photo.jpg", "edges.png", "white_where_the_fox_goes.png"):
        Image.linear_gradient("L").convert("RGB").resize((32, 32)).save(folder / name)
    (folder / "demos").symlink_to(ROOT / "demos")
    return folder


@pytest.fixture(scope="module")
def judges(tmp_path_factory):
    """Options of `mole evaluate`: a tiny model for each score."""
    for library in ("open_clip", "timm", "torchmetrics"):
        pytest.importorskip(library)
    import tiny_models

    with tiny_models.saved(tmp_path_factory.mktemp("judges")) as models:
        yield [word for name, value in models.items() for word in (f"--{name}", value)]


def tiny(words, judges=()):
    """The arguments of a command of `mole`, made small. "..." stands for those of the page's first command."""
    words = [word for word in words if word != "..."]
    if words[:1] == ["evaluate"] and "--split" not in words:
        own = ["--base", "MODEL", "--loras", "FOLDER", "--device", "cpu"]
        words = [*words, *own, "--protocol", "pairs", "--method", "base", "--method", "sum", *judges]
    if "MODEL" not in words and "--base" in words and words[words.index("--base") + 1].endswith(".safetensors"):
        words = [*words, "--base-config", "config"]
    return [*words, *TINY[words[0]].split()]


def run_command(command, folder, request):
    """Run one command of a document in the reader's folder."""
    words = shlex.split(command, comments=True)
    if words[0] in ("accelerate", "torchrun"):
        launch(words, folder, request.getfixturevalue("judges") if "evaluate" in words else ())
        return
    assert words[0].rpartition("/")[2] == "mole", command
    if words[1] == "app":
        serve(words[1:], folder)
    else:
        at_page = words[1] == "evaluate" and "--split" not in words
        assert main(tiny(words[1:], request.getfixturevalue("judges") if at_page else ())) == 0


def launch(words, folder, judges):
    """Run what a launcher starts. For several machines, both launchers run here."""
    at = words.index("mole_diffusers") + 1
    given, own = words[:at], tiny(words[at:], judges)
    if own[0] == "train":
        experts = ["--expert", "fox=fox.safetensors", "--expert", "octopus=octopus.safetensors"]
        config = ["train", "--base", "MODEL", *experts, "--prompt", "a fox and an octopus", "--part", "a fox"]
        assert main(tiny([*config, "--part", "an octopus", "--write-config", "run.yaml"])) == 0
        own = [*words[at:], "--steps", "2"]
    own = [*own, "--out", tempfile.mkdtemp(dir=folder)]
    if given[0] == "torchrun":
        edits = {"HOST": "127.0.0.1", "4": "1", "29500": free_port()}
        given = [sys.executable, "-m", "torch.distributed.run", *(edits.get(word, word) for word in given[1:])]
        rank = given.index("--node_rank") + 1
        starts = [[*given[:rank], str(node), *given[rank + 1 :]] for node in range(2)]
    else:
        port = ["--main_process_port", free_port(), "--mixed_precision", "no", "--dynamo_backend", "no"]
        starts = [[sys.executable, "-m", "accelerate.commands.launch", *port, *given[2:]]]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [Popen([*start, *own], cwd=folder, env=environment) for start in starts]
    assert [process.wait(timeout=900) for process in started] == [0] * len(started)
    made = Path(own[-1])
    if own[0] == "train":
        assert (made / "gates.safetensors").is_file()
    else:
        assert (made / "index.html").is_file()
        assert len([path for path in made.glob("rows-*.jsonl") if path.read_text()]) == 2


def serve(words, folder):
    """Start the app, open its page, and end it."""
    words = [word.replace("/path/to/", "") for word in words]
    port = free_port()
    process = Popen(
        [sys.executable, "-m", "mole_cli", *words, "--port", port, "--device", "cpu"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    try:
        end = time.monotonic() + 300
        while True:
            assert process.poll() is None, "the app ended"
            try:
                with urlopen(f"http://127.0.0.1:{port}", timeout=30) as page:
                    assert page.status == 200
                    return
            except OSError:
                assert time.monotonic() < end, "the app does not answer"
                time.sleep(0.5)
    finally:
        process.terminate()
        process.wait(timeout=60)


def cloned(text, folder):
    """Run the lines that clone the repository, from the checkout instead of the network."""
    (url,) = re.findall(r"https://\S+", text)
    (folder / "clones").mkdir()
    config = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{ROOT}.insteadOf", "GIT_CONFIG_VALUE_0": url}
    done = run(["bash", "-ec", f"{text}\nls"], cwd=folder / "clones", env=os.environ | config, stdout=PIPE, text=True)
    assert done.returncode == 0
    assert {"README.md", "mole_diffusers"} <= set(done.stdout.split())


def in_python(page, code, folder, request):
    """Run code for a reader's own files."""
    if page == "app.md":
        pytest.importorskip("gradio_client")
        client = request.getfixturevalue("client")
        request.getfixturevalue("monkeypatch").setattr("gradio_client.Client", lambda address: client)
        names: dict = {}
        exec(compile(code, page, "exec"), names)
        assert names["pictures"]
        assert names["again"]
    elif page == "tutorial.md":
        pipe, _ = hosts.HOSTS["sdxl"]()
        pipe.save_pretrained(folder / "xl")
        for name in ("mia", "rex"):
            tiny_lora(pipe, folder / f"{name}.safetensors")
        for there, here in (
            ('"stabilityai/stable-diffusion-xl-base-1.0"', '"xl"'),
            ("float16", "float32"),
            ('.to("cuda")', ""),
            ("width=2048, height=1024", "width=64, height=32, num_inference_steps=2"),
        ):
            assert there in code
            code = code.replace(there, here)
        imports = "import torch\nfrom diffusers import StableDiffusionXLPipeline\nimport mole_diffusers as mole\n"
        names = {}
        exec(compile(imports + code, page, "exec"), names)
        assert names["image"].size == (64, 32)
    else:
        assert page == "models.md"
        code = code.replace('open_base("dreamshaper.safetensors")', 'open_base("dreamshaper.safetensors", config="config")')
        exec(compile(code, page, "exec"), {})
        assert (folder / "dreamshaper" / "model_index.json").is_file()


def in_json(text, folder):
    """Read a file of cases, or of strengths."""
    found = json.loads(text)
    if "concepts" in found:
        from mole_world.evaluation.checkpoint_protocol import read_cases

        (folder / "cases.jsonl").write_text(text)
        (case,) = read_cases(folder / "cases.jsonl", found["concepts"])
        assert (list(case.concepts), case.size) == (found["concepts"], tuple(found["size"]))
    else:
        from mole_world.evaluation.strength_search import read_weights

        (folder / "weights.json").write_text(text)
        assert read_weights(folder / "weights.json") == found


@pytest.mark.thorough
@pytest.mark.parametrize(("page", "language", "text"), HERE)
def test_a_block_runs(page, language, text, readers, request, monkeypatch):
    monkeypatch.chdir(readers)
    if language == "py":
        in_python(page, text, readers, request)
    elif language == "json":
        in_json(text, readers)
    elif text.startswith("git clone"):
        cloned(text, readers)
    else:
        for command in runs_here(page, language, text):
            run_command(command, readers, request)
