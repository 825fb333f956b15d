"""The index of a folder on disk: what is read again, what is refused, and what stands for a LoRA."""

import json
import os
import shutil
import sys

import pytest
import torch
from libraries import SAMPLES, WordEncoder, names
from tiny import tiny_lora, tiny_pipeline

from mole_diffusers.retrieval import LoraLibrary, store
from mole_diffusers.retrieval.store import read_entry


@pytest.fixture
def folder(tmp_path):
    """Three LoRAs with captions beside them, one in a subfolder."""
    host = tiny_pipeline()
    for i, (name, lines) in enumerate(SAMPLES.items()):
        path = tmp_path / "birds" / name if name == "owl" else tmp_path / name
        path.parent.mkdir(exist_ok=True)
        tiny_lora(host, path.with_suffix(".safetensors"), rank=2, seed=i, ends=("to_q",))
        path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
    return tmp_path


def spoil(path):
    """Put other bytes into a file whose size and time stay: whoever reads it finds no LoRA."""
    stat = path.stat()
    path.write_bytes(b"x" * stat.st_size)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_index_and_open_say_the_same(folder):
    made = LoraLibrary.index(folder, WordEncoder())
    assert sorted(entry.name for entry in made.entries) == ["birds/owl", "fox", "ink"]
    again = LoraLibrary.open(folder, WordEncoder())
    assert again.entries == made.entries
    assert torch.equal(again.embeddings, made.embeddings)
    assert again.retrieve("a white owl") == made.retrieve("a white owl")
    assert made.expert("fox").sha256 == read_entry(folder, "fox.safetensors")[0].sha256
    with pytest.raises(ValueError, match="has no LoRA 'cat'"):
        made.expert("cat")


def test_indexing_again_reads_only_what_changed(folder):
    made = LoraLibrary.index(folder, WordEncoder())
    (folder / "fox.txt").write_text("grey fox\n")
    spoil(folder / "birds" / "owl.safetensors")
    again = LoraLibrary.index(folder, WordEncoder())
    assert (names(again.entries), again.skipped) == (names(made.entries), {})
    assert next(entry for entry in again.entries if entry.name == "fox").samples == ("grey fox",)
    (folder / "ink.json").write_text('{"activation text": "inky"}')
    assert names(LoraLibrary.index(folder, WordEncoder()).retrieve("inky owl", k=1)) == ["ink"]


def test_files_from_anywhere_are_found_under_names_of_their_own(folder, tmp_path_factory):
    away = tmp_path_factory.mktemp("away")
    for end in (".safetensors", ".txt"):
        shutil.move(folder / f"ink{end}", away / f"0{end}")
    files = {"red": folder / "fox.safetensors", "night": folder / "birds" / "owl.safetensors", "ink": away / "0.safetensors"}
    found = LoraLibrary.of(files, WordEncoder())
    assert names(found.retrieve("a fox on grass and black ink drawing")) == ["ink", "red"]  # names before likeness
    assert found.retrieve("red car")[0].trigger == "red"  # a name calls as a trigger does
    assert found.expert("ink").sha256 == found.entries[2].sha256
    assert not (folder / store.FOLDER).exists()
    LoraLibrary.index(folder, WordEncoder())
    spoil(folder / "birds" / "owl.safetensors")  # what the index knows is not read
    again = LoraLibrary.of(files, WordEncoder())
    assert torch.equal(again.embeddings, found.embeddings)
    (folder / "link.safetensors").symlink_to(folder / "fox.safetensors")
    linked = LoraLibrary.of(files | {"blue": folder / "link.safetensors"}, WordEncoder())
    assert [(linked.retrieve(text)[0].name, linked.retrieve(text)[0].trigger) for text in ("red car", "blue car")] == [
        ("red", "red"),
        ("red", "blue"),
    ]
    with pytest.raises(ValueError, match="holds no LoRA"):
        LoraLibrary.of({}, WordEncoder())


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_not_utf_8_is_left_out_and_named(folder):
    shutil.copy(folder / "fox.safetensors", folder / "caf\udce9.safetensors")
    made = LoraLibrary.index(folder, WordEncoder())
    assert made.skipped == {"caf?.safetensors": "its name is not UTF-8: rename it"}
    assert LoraLibrary.open(folder, WordEncoder()).skipped == made.skipped
    (folder / "caf\udce9.safetensors").rename(folder / "café.safetensors")
    assert "café" in names(LoraLibrary.open(folder, WordEncoder()).entries)


def test_what_is_no_lora_is_left_out_and_named(folder, tmp_path_factory):
    (folder / "page.safetensors").write_text("<html>")
    outside = tmp_path_factory.mktemp("outside") / "secret.txt"
    outside.write_text("secret")
    (folder / "ink.txt").unlink()
    (folder / "ink.txt").symlink_to(outside)
    (folder / "link.safetensors").symlink_to(folder.parent / "elsewhere.safetensors")
    (folder / "gone.safetensors").symlink_to("nowhere")
    (folder / "folder.safetensors").mkdir()
    made = LoraLibrary.index(folder, WordEncoder())
    assert set(made.skipped) == {f"{name}.safetensors" for name in ("page", "ink", "link", "gone", "folder")}
    assert "is an HTML page" in made.skipped["page.safetensors"]
    assert "leads out of the folder" in made.skipped["ink.safetensors"]
    assert LoraLibrary.open(folder, WordEncoder()).skipped == made.skipped
    (folder / "page.safetensors").write_text("<html><body>")  # other stamps, and no LoRA either
    assert LoraLibrary.open(folder, WordEncoder()).skipped == made.skipped
    with pytest.raises(ValueError, match="holds no LoRA that can be read; 0 files were skipped"):
        LoraLibrary.index(tmp_path_factory.mktemp("empty"), WordEncoder())
    with pytest.raises(FileNotFoundError, match="no folder at"):
        LoraLibrary.index(folder / "nowhere", WordEncoder())


def test_a_library_that_is_opened_is_what_the_folder_holds_now(folder):
    """Only what has changed is read."""
    (folder / "page.safetensors").write_text("<html>")
    made = LoraLibrary.index(folder, WordEncoder())
    spoil(folder / "birds" / "owl.safetensors")
    assert LoraLibrary.open(folder, WordEncoder()).entries == made.entries
    shutil.copy(folder / "fox.safetensors", folder / "new.safetensors")
    shutil.copy(folder / "ink.safetensors", folder / "page.safetensors")
    (folder / "birds" / "owl.safetensors").unlink()
    (folder / "fox.txt").write_text("a wolf")
    spoil(folder / "ink.safetensors")
    opened = LoraLibrary.open(folder, WordEncoder())
    assert (names(opened.entries), opened.skipped) == (["fox", "ink", "new", "page"], {})
    again = LoraLibrary.index(folder, WordEncoder())
    assert opened.entries == again.entries
    assert torch.equal(opened.embeddings, again.embeddings)


class Other(WordEncoder):
    id = "other"


class Deaf(WordEncoder):
    def __call__(self, texts):
        return super().__call__([text[::-1] for text in texts])


@pytest.mark.parametrize(
    ("change", "encoder", "message"),
    [
        (lambda f: None, Other(), r"was made with another encoder \('words'; this one is other\)"),
        (lambda f: None, Deaf(), r"was made with other weights of its encoder \(words\)"),
        (
            lambda f: (f / store.ABOUT).write_text("{}"),
            WordEncoder(),
            "cannot be used: it is not mole_diffusers.retrieval version 1",
        ),
        (lambda f: (f / store.ABOUT).write_text("[" * 100_000), WordEncoder(), "cannot be used: .* nested too deeply"),
        (lambda f: edit(f, embeddings="0"), WordEncoder(), "its two files are not from the same run"),
        (lambda f: edit(f, entries=None), WordEncoder(), "entries of the index must be a list of names"),
        (lambda f: edit(f, entries=[]), WordEncoder(), "fp32 matrices with 0 and 4 rows"),
        (lambda f: edit_entry(f, file="../../etc/passwd"), WordEncoder(), "leads out of the folder"),
        (lambda f: edit_entry(f, file="/etc/passwd"), WordEncoder(), "leads out of the folder"),
        (lambda f: edit_entry(f, name="ink"), WordEncoder(), "two entries have one name"),
        (
            lambda f: edit_entry(f, triggers="fox"),
            WordEncoder(),
            "triggers of the entry 'birds/owl' must be a list",
        ),
        (
            lambda f: edit_entry(f, stamps=[[1, 2]]),
            WordEncoder(),
            "stamps of the entry 'birds/owl' must be a list of whole numbers",
        ),
        (lambda f: edit_entry(f, sha256=None), WordEncoder(), "sha256 of the entry 'birds/owl' must be a text, got None"),
        (lambda f: (f / store.VECTORS).write_bytes(b"\x80\x02pickle.."), WordEncoder(), "a pickle, which can run code"),
    ],
)
@pytest.mark.shows("Files")
def test_a_foreign_or_forged_index_is_one_sentence(folder, change, encoder, message):
    LoraLibrary.index(folder, WordEncoder())
    change(folder)
    with pytest.raises(ValueError, match=message) as error:
        LoraLibrary.open(folder, encoder)
    assert str(error.value).startswith(f"the index of {folder} ")
    assert str(error.value).endswith(f"; make it again with: mole index {folder}")
    assert LoraLibrary.index(folder, encoder).entries


def edit(folder, **changes):
    about = json.loads((folder / store.ABOUT).read_text())
    (folder / store.ABOUT).write_text(json.dumps({**about, **changes}))


def edit_entry(folder, **changes):
    about = json.loads((folder / store.ABOUT).read_text())
    about["entries"][0].update(changes)
    (folder / store.ABOUT).write_text(json.dumps(about))


def test_no_index_and_a_copied_folder(folder, tmp_path_factory, monkeypatch):
    with pytest.raises(FileNotFoundError, match="has no index; make one with: mole index"):
        LoraLibrary.open(folder, WordEncoder())
    LoraLibrary.index(folder, WordEncoder())
    copy = tmp_path_factory.mktemp("copy") / "loras"
    shutil.copytree(folder, copy, copy_function=shutil.copyfile)  # every time of change is another
    library = "mole_diffusers.retrieval.library"
    monkeypatch.setattr(f"{library}.embedding", lambda *_: pytest.fail("a text was read that had not changed"))
    assert len(LoraLibrary.open(copy, WordEncoder()).entries) == 3


def test_an_index_folder_that_is_a_link_is_not_written_through(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / store.FOLDER).symlink_to(outside)
    with pytest.raises(ValueError, match="leads out of the folder"):
        LoraLibrary.index(folder, WordEncoder())
    assert not list(outside.iterdir())


def test_a_lora_that_changed_since_the_library_was_opened_is_refused(folder):
    made = LoraLibrary.index(folder, WordEncoder())
    shutil.copy(folder / "ink.safetensors", folder / "fox.safetensors")
    with pytest.raises(ValueError, match="stale: 'fox.safetensors' has changed"):
        made.expert("fox")


def test_samples_come_from_captions_tags_descriptions_triggers_or_the_name(folder):
    from safetensors.torch import load_file, save_file

    (folder / "fox.txt").unlink()

    def samples(**metadata):
        save_file(load_file(folder / "fox.safetensors"), folder / "my_fox-2.safetensors", metadata)
        return read_entry(folder, "my_fox-2.safetensors")[0].samples

    phrase = {"modelspec.trigger_phrase": "sks fox"}
    described = {"modelspec.title": "Fox", "modelspec.description": "a red fox"}
    tags = {"ss_tag_frequency": json.dumps({"1_fox": {"fox": 9, "snow": 3}})}
    assert samples(**tags, **described, **phrase) == ("fox", "snow")
    assert samples(ss_tag_frequency="[1]", **described, **phrase) == ("Fox", "a red fox")
    assert samples(**phrase) == ("sks fox",)
    assert samples() == ("my fox 2",)


def test_words_guessed_from_training_tags_select_nothing_and_count_by_meaning(folder):
    from safetensors.torch import load_file, save_file

    def tagged(**metadata):
        tags = {"ss_tag_frequency": json.dumps({"1_fox": {"vixen": 9, "1girl": 9, "solo": 8, "snow": 3}})}
        save_file(load_file(folder / "fox.safetensors"), folder / "tagged.safetensors", tags | metadata)
        return LoraLibrary.index(folder, WordEncoder())

    made = tagged()
    entry = next(entry for entry in made.entries if entry.name == "tagged")
    assert (entry.triggers, entry.samples) == ((), ("vixen", "1girl", "solo", "snow"))
    assert made.retrieve("1girl, red hair", threshold=0.99) == []
    (found,) = made.retrieve("vixen", threshold=0.4)
    assert (found.name, found.trigger) == ("tagged", None)
    (found,) = tagged(**{"modelspec.trigger_phrase": "xgirl"}).retrieve("xgirl, red hair", threshold=0.99)
    assert found.trigger == "xgirl"
