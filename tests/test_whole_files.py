"""Whatever breaks a writer off, a reader meets the old or the new; and one run writes to a folder at a time."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from tiny import tiny_pipeline

import mole_diffusers as mole
from mole_diffusers.gates import load_gates
from mole_diffusers.pipelines.kept import keep
from mole_diffusers.whole_files import new_file, new_folder, only_run, whole_folder


def test_after_an_error_a_file_is_as_it_was(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with suppress(KeyboardInterrupt), new_file(path) as part:
        part.write_text("ne")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert path.read_text() == "old"
    with new_file(path) as part:
        part.write_text("new")
    assert path.read_text() == "new"


def test_after_an_error_a_folder_is_as_it_was(tmp_path):
    path = tmp_path / "a"
    for text in ("old", "new"):
        with new_folder(path) as part:
            (part / text).write_text(text)
        assert [p.name for p in path.iterdir()] == [text]
    with suppress(KeyboardInterrupt), new_folder(path) as part:
        (part / "newest").write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (path / "new").read_text() == "new"


@pytest.mark.parametrize("writer", [new_folder, new_file])
def test_two_may_write_at_once_and_the_last_to_end_stays(tmp_path, writer):
    def write(part, text):
        (part / "weights" if writer is new_folder else part).write_text(text)

    with writer(tmp_path / "a") as part:
        write(part, "first")
        with writer(tmp_path / "a") as later:
            write(later, "second")
        write(part, "last")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "weights" if writer is new_folder else tmp_path / "a").read_text() == "last"


def test_a_rename_that_fails_is_taken_back(tmp_path, monkeypatch):
    path, renamed = tmp_path / "a", []
    with new_folder(path) as part:
        (part / "old").write_text("old")
    rename = Path.rename

    def second_fails(self, target):
        renamed.append(target)
        if len(renamed) == 2:  # the new one to its place
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", second_fails)
    with suppress(OSError), new_folder(path) as part:
        (part / "new").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (path / "old").read_text() == "old"


def test_links_and_modes_stay_and_the_current_directory_is_not_replaced(tmp_path, monkeypatch):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir(mode=0o700)
    link.symlink_to(real)
    for text in ("one", "two"):
        with new_folder(link) as part:
            (part / "a").write_text(text)
        assert link.is_symlink()
        assert (real / "a").read_text() == text
        assert real.stat().st_mode & 0o777 == 0o700
    (real / "a").chmod(0o600)
    with new_file(real / "a") as part:
        part.write_text("three")
    assert (real / "a").stat().st_mode & 0o777 == 0o600
    (real / "inside").mkdir()
    monkeypatch.chdir(real / "inside")
    with pytest.raises(ValueError, match="where this process runs"), new_folder(real):
        pass
    assert (real / "a").read_text() == "three"


def test_two_files_may_be_written_at_once(tmp_path):
    with new_file(tmp_path / "a.json") as a, new_file(tmp_path / "b.json") as b:
        a.write_text("a")
        b.write_text("b")
    assert ((tmp_path / "a.json").read_text(), (tmp_path / "b.json").read_text()) == ("a", "b")


def test_a_folder_put_aside_is_found(tmp_path, monkeypatch):
    path, renamed = tmp_path / "a", []
    with new_folder(path) as part:
        (part / "old").write_text("old")
    rename = Path.rename

    def once(self, target):
        renamed.append(target)
        if len(renamed) > 1:  # the old one is aside, the new one not yet in its place, and nothing more is done
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(KeyboardInterrupt), new_folder(path) as part:
        (part / "new").write_text("new")
    assert not path.exists()
    assert (whole_folder(path) / "old").read_text() == "old"
    monkeypatch.undo()
    with new_folder(path) as part:
        (part / "new").write_text("new")
    assert [p.name for p in whole_folder(path).iterdir()] == ["new"]


SAVING = """
import os
import sys
import torch
import mole_diffusers as mole
from mole_diffusers.gates import GateConfig
from mole_diffusers.pipelines.kept import keep
from tiny import tiny_pipeline
fox, ink, folder = sys.argv[1:]
kept = []
for value, total, experts in ((1.0, "1", {"fox": fox, "ink": ink}), (2.0, "N", {"ink": ink, "fox": fox})):
    mixture = mole.attach(tiny_pipeline(), experts, GateConfig("static", total=total))
    with torch.no_grad():
        for p in mixture.parameters():
            p.fill_(value)
    kept.append(mixture)
for _ in sys.stdin:  # a line for each process that saves until it is killed
    if child := os.fork():
        os.waitpid(child, 0)
        print("killed", flush=True)
        continue
    while True:
        for mixture in kept:
            mixture.save_pretrained(f"{folder}/gates")
            keep(mixture, f"{folder}/kept")
            print(os.getpid(), flush=True)
"""


def check(folder):
    """Gates of one kind alone, with the config that they were saved with."""
    saved = load_gates(folder)
    values = {float(v) for tensor in saved.tensors.values() for v in tensor.flatten()}
    assert values == ({1.0} if saved.config.options.total == "1" else {2.0})
    assert list(saved.experts) == (["fox", "ink"] if values == {1.0} else ["ink", "fox"])


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is not what .* was saved with")
def test_a_killed_save_leaves_the_old_or_the_new(loras, tmp_path):
    rng = random.Random(0)
    command, pipe = [sys.executable, "-c", SAVING, *map(str, (loras["fox"], loras["ink"], tmp_path))], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=Path(__file__).parent) as parent:
        for _ in range(40):
            parent.stdin.write("\n")
            parent.stdin.flush()
            child = int(parent.stdout.readline())  # it has saved once
            time.sleep(rng.uniform(0.3, 0.6))
            os.kill(child, signal.SIGKILL)
            while not parent.stdout.readline().endswith("killed\n"):
                pass
            check(tmp_path / "gates")
            kept = whole_folder(tmp_path / "kept")
            check(kept / "gates")
            rows = json.loads((kept / "mixture.json").read_text())["experts"]
            assert [row["name"] for row in rows] == list(load_gates(kept / "gates").experts)
    mixture = mole.attach(tiny_pipeline(), {"fox": loras["fox"]}, "static")
    mixture.save_pretrained(tmp_path / "gates")
    keep(mixture, tmp_path / "kept")
    whole = {path.name for path in tmp_path.iterdir() if not path.name.endswith(".part")}  # left by the killed
    assert whole == {"gates", "kept"}


@pytest.mark.shows("Training")
def test_one_run_writes_to_a_folder(tmp_path):
    with only_run(tmp_path), pytest.raises(ValueError, match=f"another run is writing to {tmp_path}"), only_run(tmp_path):
        pass
    with only_run(tmp_path), only_run(None), only_run(tmp_path / "other"):
        pass


def test_files_are_known_by_their_hashes_not_their_names(loras, draw, awake, tmp_path):
    pipe = tiny_pipeline()
    mixture = awake(mole.attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]}, "mole", binding=None))
    picture = draw(pipe)
    mixture.save_pretrained(tmp_path)
    for names in ({"ink": "fox", "fox": "ink"}, {"b": "fox", "a": "ink"}, {"b": "ink", "a": "fox"}):
        mole.attach(pipe, {name: loras[file] for name, file in names.items()}, tmp_path, binding=None)
        torch.testing.assert_close(draw(pipe), picture, atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="know the file of expert 'fox' as 'ink'"):
        mole.attach(pipe, {"fox": loras["ink"], "ink": loras["hat"]}, tmp_path)
