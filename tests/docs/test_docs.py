"""The documents: code that runs, pictures that are there, tests that exist."""

import csv
import gzip
import re
import runpy
import shlex
from pathlib import Path
from pkgutil import resolve_name

import pytest
from PIL import Image
from tiers import thorough
from typer import BadParameter

import mole_diffusers as mole
from mole_cli.mole import NAMED, main, parser

DOCS = Path(__file__).parents[2] / "docs"


def blocks(name, language):
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / name).read_text(), re.DOTALL)


def test_costs_are_what_was_measured():
    made = runpy.run_path(str(DOCS / "make_speed.py"))["document"]()
    assert (DOCS / "speed.md").read_text() == made, "run: python docs/make_speed.py"


RESULTS = runpy.run_path(str(DOCS / "make_results.py"))


WITH_TABLES = [p for p in RESULTS["PAGES"] if RESULTS["TABLE"].search(p.read_text())]
LONG = [p for p in WITH_TABLES if p.name == "appendix.md"]


@pytest.mark.parametrize("path", [*(p for p in WITH_TABLES if p not in LONG), *thorough(*LONG)], ids=lambda p: p.name)
def test_successes_are_what_was_judged(path):
    assert path.read_text() == RESULTS["page"](path.read_text()), "run: python docs/make_results.py"


def test_a_success_is_the_share_of_pictures_that_were_judged_right():
    rows = [row for row in packed("test") if row["kind"] == "two subjects"]
    first = sorted({row["seed"] for row in rows})[0]
    right = {
        method: {row["concepts"]: int(row["success"]) for row in rows if (row["method"], row["seed"]) == (method, first)}
        for method in ("sum", "bound")
    }
    shares = {method: sum(found.values()) / len(found) for method, found in right.items()}
    assert right["sum"].keys() == right["bound"].keys()
    assert cell(RESULTS["success"]("test; sum / bound; 1 seeds"), "bound", "two subjects") == f"{shares['bound']:.2f}"
    with_more = [row["another"] == "True" for row in rows if row["method"] == "tiles" and row["success"] == "1"]
    table = RESULTS["kinds"]("test; bound / tiles; 8 seeds")
    assert cell(table, "two subjects", "tiles, right but with one more") == str(sum(with_more))
    assert cell(table, "two subjects", "bound") == cell(RESULTS["success"]("test; bound; 8 seeds"), "bound", "two subjects")
    less = f"{shares['bound'] - shares['sum']:.2f}"
    assert cell(RESULTS["success"]("test; bound; 1 seeds; less sum"), "bound", "two subjects") == less


def test_sentences_say_what_was_judged():
    """Each is in a page, and its numbers are those of the file's rows."""
    counted = RESULTS["numbers"]()
    text = "\n".join(path.read_text() for path in WITH_TABLES)
    for sentence in RESULTS["SENTENCES"]:
        assert RESULTS["said"](sentence, counted, text) == text
        assert RESULTS["said"](sentence, dict.fromkeys(counted, "7777"), text) != text, sentence
    rows = [row for row in packed("test") if row["method"] in ("tiles", "freefuse")]
    right = {(row["kind"], row["concepts"], row["seed"], row["method"]): row["success"] == "1" for row in rows}
    pairs = [(right[(*of, "tiles")], right[(*of, method)]) for *of, method in right if method == "freefuse"]
    alone = [sum(a > b for a, b in pairs), sum(b > a for a, b in pairs)]
    assert [counted[name] for name in ("pictures", "freefuse", "won", "lost")] == [
        str(number) for number in (len(pairs), sum(b for _, b in pairs), *alone)
    ]
    hard = [row for row in rows if row["kind"] in ("contact", "two subjects, close")]
    three = [row for row in rows if row["kind"].startswith("three")]
    more = [row["another"] == "True" for row in hard + three if row["success"] == "1"]
    assert (counted["all_hard"], counted["with_more"]) == (str(len(more)), str(sum(more)))
    assert (counted["of_hard"], counted["of_three"]) == (str(len(hard)), str(len(three)))


def packed(name):
    with gzip.open(DOCS / "results" / f"{name}.csv.gz", "rt") as file:
        return list(csv.DictReader(file))


def test_a_table_of_trained_gates_has_what_all_of_its_methods_have():
    """The sum was drawn of more compositions than gates were trained for."""
    methods, kind = ("sum", "tiles, mole gates"), "three subjects"
    rows = [row for row in packed("test") if row["kind"] == kind and row["method"] in methods]
    asked = {
        method: {(row["concepts"], row["seed"]): int(row["success"]) for row in rows if row["method"] == method}
        for method in methods
    }
    table = RESULTS["success"]("test; sum / tiles, mole gates; 8 seeds; shared")
    both = asked[methods[0]].keys() & asked[methods[1]].keys()
    assert len(both) == len(asked[methods[1]]) < len(asked[methods[0]])
    for method in methods:
        assert cell(table, method, kind) == f"{sum(asked[method][each] for each in both) / len(both):.2f}"


def test_a_table_of_wordings_joins_the_forms_of_captions_alone():
    method = "bound"
    rows = [row for row in packed("robustness") if row["axis"] == "wording" and row["method"] == method]
    forms = [int(row["success"]) for row in rows if "{style}" in row["setting"]]
    other = [int(row["success"]) for row in rows if row["setting"] == "other words"]
    table = RESULTS["wordings"]("sum / bound")
    assert cell(table, "the 8 forms of the base's captions", method) == f"{sum(forms) / len(forms):.2f}"
    assert cell(table, "words that no caption has", method) == f"{sum(other) / len(other):.2f}"
    assert len(rows) == len(forms) + 3 * len(other)


def test_a_table_of_joint_loras_counts_the_pictures_of_each():
    lines = RESULTS["joint"]("everywhere / in tiles").splitlines()[2:]
    for pair, rank, updates, *methods in (line.strip("| ").split(" | ") for line in lines):
        for method, shown in zip(("everywhere", "in tiles"), methods, strict=True):
            of = (pair.replace(", ", "+"), rank, updates, method)
            right = [
                int(row["success"])
                for row in packed("joint")
                if (row["concepts"], row["rank"], row["updates"], row["method"]) == of
            ]
            assert shown.startswith(f"{sum(right)} of {len(right)} [")


def cell(table, row, column):
    """The number in a table's cell, without its interval."""
    head, _, *lines = [line.strip("| ").split(" | ") for line in table.splitlines()]
    (found,) = [line for line in lines if line[0] == row]
    return found[head.index(column)].split()[0]


def shortened(code):
    """The same code with fewer steps and pictures."""
    for long, short in (
        ('"num_inference_steps": 20', '"num_inference_steps": 2'),
        ("seeds=[1, 2]", "seeds=[1]"),
        ('["seed 1", "seed 2"]', '["seed 1"]'),
    ):
        assert long in code
        code = code.replace(long, short)
    return code


@pytest.mark.thorough
def test_the_tutorial_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(shortened("\n".join(blocks("tutorial.md", "python"))), "tutorial.md", "exec"), {})
    assert (tmp_path / "one_lora.safetensors").stat().st_size > 10_000
    assert (tmp_path / "fox_and_octopus.png").is_file()
    assert {path.name for path in tmp_path.glob("tutorial_*.png")} == {path.name for path in DOCS.glob("tutorial_*.png")}


@pytest.mark.thorough
def test_the_page_of_binding_runs(tmp_path, monkeypatch, capsys):
    names: dict = {}
    monkeypatch.chdir(tmp_path)
    for block in blocks("bind.md", "python"):
        exec(compile(block, "bind.md", "exec"), names)
    explained, regions = capsys.readouterr().out.strip().rsplit("\n", 1)
    assert "tile 1: relief drawing of a koala" in explained
    assert regions == "{'doughnut': 0.5, 'tiger': 0.5}"  # in the order of the prompt


@pytest.mark.thorough
def test_a_picture_is_drawn_in_tiles_as_shown():
    (block,) = blocks("tiles.md", "python")
    shown: dict = {}
    exec(compile(block, "tiles.md", "exec"), shown)
    assert shown["image"].size == (128, 128)
    mole.detach(shown["world"].pipe)


@pytest.mark.thorough
def test_the_evaluation_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (command,) = blocks("evaluation.md", "bash")
    words = command.replace("--seeds 2", "--seeds 1").split()
    assert words[0] == "mole"
    assert main([*words[1:], "--steps", "2"]) == 0
    assert (tmp_path / "evaluation" / "table.md").is_file()


PAGES = [*sorted(DOCS.rglob("*.md")), *(DOCS.parent / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md"))]
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def test_an_method_of_the_readers_own_is_one():
    (block,) = blocks("methods.md", "python")
    names: dict = {}
    exec(compile(block, "methods.md", "exec"), names)
    assert [method.name for method in names["METHODS"].values()] == ["weak styles"]


@pages
def test_links_and_pictures_lead_somewhere(page):
    for path, anchor in re.findall(r"\]\((?!https?:)([\w./-]+)?#?([\w-]*)\)", page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings]
            assert anchor in slugs, f"{path}#{anchor}"


def test_pictures_are_small():
    for path in DOCS.glob("*.png"):
        assert path.stat().st_size < 500_000, path
        with Image.open(path) as image:
            image.verify()


@pages
def test_every_command_of_a_page_is_one_that_mole_takes(page):
    """Also those that no test runs; test_blocks.py runs the others."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    fenced = [(language, block.replace("\\", "/") if language == "bat" else block) for language, block in fenced]
    lines = [line for language, block in fenced if language in ("", "sh", "bash", "text", "bat") for line in joined(block)]
    for words in (shlex.split(command, comments=True) for line in lines for command in line.split("&&")):
        if words and words[0].rpartition("/")[2] == "mole":
            name, *given = words[1:]
            try:
                parser(*NAMED).commands[name].make_context(name, given)
            except BadParameter as error:  # the reader's own file or folder
                if "does not exist" not in str(error):
                    raise


def joined(block):
    """The lines of a block, those that go on after a backslash as one."""
    return block.replace("\\\n", " ").splitlines()


@pages
def test_what_a_document_imports_or_names_by_its_module_is_there(page):
    for name in set(re.findall(r"\bmole_diffusers(?:\.\w+)+", page.read_text())):
        resolve_name(name)


@pages
def test_examples_for_files_of_the_readers_own_are_python(page):
    for block in re.findall(r"```py\n(.*?)```", page.read_text(), re.DOTALL):
        compile(block, page.name, "exec")
