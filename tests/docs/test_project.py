"""What stands around the code: metadata of the wheel, CI, pre-commit and the citation agree with the README and the code."""

import re
from pathlib import Path

import pytest
import yaml
from test_layout import PACKAGE, STAGES

import mole_diffusers as mole

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it under its older name
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
README = (ROOT / "README.md").read_text()
SEE, TEST = (block.strip() for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)[:2])


def commands(workflow_or_hooks):
    """All values of `run` and `entry` in a YAML file, however deep."""
    if isinstance(workflow_or_hooks, dict):
        yield from (str(v) for k, v in workflow_or_hooks.items() if k in ("run", "entry"))
        workflow_or_hooks = workflow_or_hooks.values()
    elif not isinstance(workflow_or_hooks, list):
        return
    for inner in workflow_or_hooks:
        yield from commands(inner)


def test_ci_runs_the_two_commands_of_the_readme():
    ran = list(commands(yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())))
    assert SEE.endswith(".venv/bin/mole compose")
    assert (ROOT / ".ci" / "run").read_text().strip().endswith(TEST)
    assert {".ci/run", SEE, ".venv/bin/pytest -m thorough"} <= set(ran)


def test_every_requirement_states_the_lowest_version_and_ci_tries_them():
    optional = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *optional["app"], *optional["weights"], *optional["evaluate"]]
    assert [each for each in requirements if ">=" not in each and not each.startswith("mole-diffusers[")] == []
    ran = " ".join(commands(yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())))
    assert "--resolution lowest-direct" in ran


def test_pre_commit_runs_the_checks_of_the_readmes_test_command():
    hooks = list(commands(yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())))
    assert hooks == TEST.split(" && ")[2:]


def test_the_citation_is_of_this_version():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (cited["version"], cited["license"]) == (mole.__version__, PROJECT["license"])
    assert cited["repository-code"] == PROJECT["urls"]["Source"]
    assert [paper["url"] for paper in cited["references"]] == [
        "https://arxiv.org/abs/2404.13628",
        "https://arxiv.org/abs/2302.02412",
    ]


def test_the_changelog_knows_this_version_and_its_date():
    text = (ROOT / "CHANGELOG.md").read_text()
    released = yaml.safe_load((ROOT / "CITATION.cff").read_text())["date-released"]
    assert text.split("\n## ")[1].startswith(f"{mole.__version__}, {released}\n")


@pytest.mark.parametrize("path", [*PROJECT["license-files"], "mole_diffusers/py.typed", PROJECT["readme"]])
def test_what_the_wheel_takes_along_is_there(path):
    assert (ROOT / path).is_file()


def test_the_map_of_contributing_names_every_folder_and_only_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    package = text.partition("| in `mole_diffusers/` |")[2].partition("\n\n")[0]
    stages = [re.sub(r"/$|\.py$", "", name) for name in re.findall(r"^\| `(.+?)` \|", package, re.MULTILINE)]
    assert stages == list(STAGES)
    beside = text.partition("| beside it |")[2].partition("\n\n")[0]
    for name in re.findall(r"^\| `(.+?)/` \|", beside, re.MULTILINE):
        assert (ROOT / name).is_dir(), name
    parts = [ROOT / part for part in ("demos", "demos/app/mole_app", "demos/cli", "demos/emoji", "demos/emoji/mole_world")]
    near = (ROOT, PACKAGE, PACKAGE / "merging", PACKAGE / "patching", ROOT / "tests" / "lora", *parts)
    for path in set(re.findall(r"`([\w/.]+/[\w.]*|\w+\.py)`", text)) - {"tests/x.py"}:
        assert any((folder / path).exists() for folder in near), path
