"""LoraRetriever's parts: phrases, triggers, mean embeddings, ranking, the index on disk."""

import json
import shutil
import sys
from types import ModuleType, SimpleNamespace

import hosts
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionXLImg2ImgPipeline
from libraries import WordEncoder, library
from tiny import tiny_lora, tiny_pipeline
from transformers import CLIPTextModel, CLIPTokenizerFast

from mole_diffusers.emoji import default_folder
from mole_diffusers.emoji.words import BASE_SUBJECTS
from mole_diffusers.emoji.world import concept_files
from mole_diffusers.mixture import attach
from mole_diffusers.retrieval import store
from mole_diffusers.retrieval.encoders import PipelineText, SentenceText, phrases
from mole_diffusers.retrieval.library import THRESHOLD, LoraLibrary, RetrievedLora, embedding, similarity, top
from mole_diffusers.retrieval.store import read_entry

SAMPLES = {
    "fox": ["a red fox in snow", "fox on grass", "a fox"],
    "ink": ["ink drawing of a cat", "black ink drawing"],
    "owl": ["an owl at night", "white owl"],
}


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


def names(found):
    return [each.name for each in found]


# ---- words


def test_phrases_are_what_stands_between_small_words_and_punctuation():
    assert phrases("Ink drawing of a FOX, and <new1> at night!") == ["ink drawing", "fox", "<new1>", "night"]
    assert phrases("a fox asleep under an oak, seen from behind") == ["fox asleep", "oak", "seen"]
    assert phrases("photo of a person, painting style, fox style") == ["fox style"]


# ---- ranking


def test_a_loras_embedding_is_the_mean_of_its_samples():
    encoder = WordEncoder()
    by_hand = torch.stack([encoder([text])[0] for text in ("ink drawing", "cat", "black ink drawing")]).mean(0)
    torch.testing.assert_close(embedding(SAMPLES["ink"], encoder), by_hand / by_hand.norm())


def test_what_samples_share_counts_more_than_what_one_says():
    encoder = WordEncoder()
    shared, once, other = encoder(["fox", "snow", "grass"])
    by_hand = 4 * shared + once + other
    torch.testing.assert_close(embedding(["a fox in snow", "fox on grass"], encoder), by_hand / by_hand.norm())
    torch.testing.assert_close(embedding(["snow, a fox, snow", "fox on grass"], encoder), by_hand / by_hand.norm())


def test_top_k_equals_brute_force():
    generator = torch.Generator().manual_seed(0)
    cards, queries = (F.normalize(torch.randn(n, 16, generator=generator), dim=-1) for n in (50, 4))
    scores, best = similarity(queries, cards)
    pairs = sorted(((max(float(q @ c) for q in queries), i) for i, c in enumerate(cards)), reverse=True)
    assert top(scores, torch.ones(50, dtype=torch.bool), 5, 0.0) == [i for _, i in pairs[:5]]
    for i in range(50):
        assert float(queries[best[i]] @ cards[i]) == pytest.approx(scores[i].item(), abs=1e-6)
    assert top(scores, torch.ones(50, dtype=torch.bool), 50, pairs[2][0] - 1e-5) == [i for _, i in pairs[:3]]


def test_adding_loras_leaves_the_other_scores_as_they_are():
    generator = torch.Generator().manual_seed(1)
    cards, queries = (F.normalize(torch.randn(n, 768, generator=generator), dim=-1) for n in (3000, 3))
    scores, _ = similarity(queries, cards)
    for n in (1, 2, 7, 100, 1025):
        assert torch.equal(similarity(queries, cards[:n])[0], scores[:n])


# ---- retrieval


def test_each_clause_finds_its_own_lora_and_threshold_and_k_limit_them():
    found = library(SAMPLES).retrieve("an owl and a fox in ink drawing")
    assert set(names(found)) == {"owl", "fox", "ink"}
    assert [each.score for each in found] == sorted((each.score for each in found), reverse=True)
    assert {each.name: each.phrase for each in found} == {"owl": "owl", "fox": "fox", "ink": "ink drawing"}
    assert names(library(SAMPLES).retrieve("an owl and a fox in ink drawing", k=1)) == names(found)[:1]
    assert library(SAMPLES).retrieve("a bicycle") == []
    assert library(SAMPLES).retrieve("a fox", threshold=0.999) == []


def test_a_lora_left_out_gives_its_place_to_the_next():
    indexed = library({**SAMPLES, "wolf": ["grey fox", "wolf"]})
    first, second = names(indexed.retrieve("fox", k=2, threshold=0.1))
    others = library({name: lines for name, lines in {**SAMPLES, "wolf": ["grey fox", "wolf"]}.items() if name != first})
    assert names(others.retrieve("fox", k=1, threshold=0.1)) == [second]
    with pytest.raises(ValueError, match="k must be 1 or more, got 0"):
        indexed.retrieve("fox", k=0)


def test_a_trigger_wins_over_similarity_and_is_searched_no_more():
    indexed = library(SAMPLES, {"owl": ["Sks Fox"], "ink": ["inkstyle"]})
    assert names(indexed.retrieve("a fox", k=1)) == ["fox"]
    found = indexed.retrieve("inkstyle, a sks fox", k=3, threshold=0.3)
    assert names(found) == ["ink", "owl"]
    assert [each.trigger for each in found] == ["inkstyle", "Sks Fox"]
    assert found[1].why == "the prompt says its trigger 'Sks Fox'"
    assert indexed.retrieve("fox")[0].why == f"'fox' is like its samples ({indexed.retrieve('fox')[0].score:.2f})"


def test_a_trigger_is_found_as_binding_finds_words():
    """In the plural, inside a hyphenated word, but not in another word; the longest of several."""
    indexed = library(SAMPLES, {"fox": ["zwx fox"], "owl": ["fox"], "ink": ["wolf"]})
    for prompt, called in (("two zwx foxes", ["fox"]), ("a pack of WOLVES", ["ink"]), ("a fox-like hat", ["owl"])):
        assert names(indexed.retrieve(prompt, threshold=0.99)) == called, prompt
    assert indexed.retrieve("a foxy hat", threshold=0.99) == []


def test_triggers_that_overlap_leave_the_rest_of_the_prompt():
    indexed = library(SAMPLES, {"fox": ["zwx fox"], "ink": ["fox red"]})
    assert names(indexed.retrieve("a zwx fox red, owl")) == ["fox", "ink", "owl"]


def test_a_trigger_that_several_claim_calls_the_most_similar_and_one_that_all_claim_calls_none():
    indexed = library(SAMPLES, {"fox": ["1girl"], "owl": ["1girl"], "ink": ["1girl"]})
    (owl,) = indexed.retrieve("1girl, white owl", k=3, threshold=0.99)
    assert (owl.name, owl.passed_over) == ("owl", ("fox", "ink"))
    assert owl.why == "the prompt says its trigger '1girl'; passed over, less like the prompt: fox, ink"
    assert indexed.retrieve("1girl, white owl", k=2, threshold=0.99) == []


def test_what_is_found_otherwise_was_not_passed_over():
    indexed = library(SAMPLES, {"fox": ["beast", "sks"], "owl": ["beast"], "ink": ["sks"]})
    found = indexed.retrieve("a sks beast, a red fox", k=3, threshold=0.99)
    assert [(each.name, each.passed_over) for each in found] == [("fox", ("ink", "owl"))]
    indexed = library(SAMPLES, {"fox": ["beast"], "owl": ["beast", "bird"]})
    assert [each.passed_over for each in indexed.retrieve("a beast, a red fox, a bird")] == [(), ()]


def test_only_loras_of_the_pipelines_family():
    indexed = library(SAMPLES, {"fox": ["fox"]}, {"fox": "SDXL", "ink": "unknown"})
    assert names(indexed.retrieve("a fox, ink drawing, owl", base="SD 1.x")) == ["ink", "owl"]


def test_a_trigger_calls_as_its_file_writes_it_and_without_weights():
    indexed = library(SAMPLES, {"owl": [r"miku \(vocaloid\)", "(rin:1.2)"]})
    for prompt in (r"a miku \(vocaloid\)", "a miku (vocaloid)", "a (rin:1.2)", "a rin"):
        (found,) = indexed.retrieve(prompt, k=1)
        assert found.trigger in indexed.file_triggers("owl")


def test_recall_at_one_on_held_out_prompts():
    indexed = library(SAMPLES)
    prompts = {"fox": "photo of a fox in the desert", "ink": "ink drawing of a teapot", "owl": "statue of an owl"}
    assert {n: names(indexed.retrieve(p, k=1)) for n, p in prompts.items()} == {n: [n] for n in prompts}


MEANT = {  # words that no trigger has, and whom they mean
    "cheese": "cheese wedge", "wedge": "cheese wedge", "cake": "birthday cake", "birthday": "birthday cake",
    "fries": "french fries", "french fry": "french fries",
}  # fmt: skip


def test_the_default_threshold_is_the_lowest_at_which_seven_of_eight_base_subjects_find_nothing():
    """Of all the emoji world's LoRAs, by its own encoder: how many prompts find a LoRA that they do not mean, and how many
    one that they mean in other words. docs/methods.md has these numbers."""
    base = default_folder() / "base"
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", local_files_only=True)
    tokenizer = CLIPTokenizerFast.from_pretrained(base / "tokenizer", local_files_only=True)
    indexed = LoraLibrary.of(concept_files(), PipelineText(SimpleNamespace(text_encoder=encoder, tokenizer=tokenizer)))

    def best(words):
        return indexed.retrieve(f"noto drawing of a {words}", k=1, threshold=-1)[0]

    wrong = torch.tensor([best(subject).score for subject in BASE_SUBJECTS])
    meant = [(best(words), name) for words, name in MEANT.items()]
    assert [found.name for found, _ in meant if found.score >= 0.7] == [name for found, name in meant if found.score >= 0.7]
    assert not any(found.trigger for found, _ in meant)
    thresholds = (0.7, 0.75, 0.8, 0.85, 0.9)
    assert [round(100 * (wrong >= at).float().mean().item()) for at in thresholds] == [50, 25, 8, 2, 0]
    assert [sum(found.score >= at for found, _ in meant) for at in thresholds] == [5, 3, 2, 0, 0]
    assert next(at for at in thresholds if (wrong < at).float().mean() >= 7 / 8) == THRESHOLD


# ---- the index


def test_index_and_open_say_the_same(folder, monkeypatch):
    made = LoraLibrary.index(folder, WordEncoder())
    assert sorted(entry.name for entry in made.entries) == ["birds/owl", "fox", "ink"]
    again = LoraLibrary.open(folder, WordEncoder())
    assert again.entries == made.entries
    assert torch.equal(again.embeddings, made.embeddings)
    assert again.retrieve("a white owl") == made.retrieve("a white owl")
    assert made.expert("fox").sha256 == read_entry(folder, "fox.safetensors")[0].sha256
    with pytest.raises(ValueError, match="has no LoRA 'cat'"):
        made.expert("cat")


def test_indexing_again_reads_only_what_changed(folder, monkeypatch):
    LoraLibrary.index(folder, WordEncoder())
    read = []
    monkeypatch.setattr(
        "mole_diffusers.retrieval.library.read_entry", lambda f, file: read.append(file) or read_entry(f, file)
    )
    (folder / "fox.txt").write_text("grey fox\n")
    again = LoraLibrary.index(folder, WordEncoder())
    assert read == ["fox.safetensors"]
    assert next(entry for entry in again.entries if entry.name == "fox").samples == ("grey fox",)
    (folder / "ink.json").write_text('{"activation text": "inky"}')
    assert names(LoraLibrary.index(folder, WordEncoder()).retrieve("inky owl", k=1)) == ["ink"]


def test_files_from_anywhere_are_found_under_names_of_their_own(folder, tmp_path_factory, monkeypatch):
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
    read = []
    monkeypatch.setattr("mole_diffusers.retrieval.library.read_entry", lambda *a: read.append(a[1]) or read_entry(*a))
    again = LoraLibrary.of(files, WordEncoder())
    assert len(read) == 1  # what the index knows is not read
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


def test_a_library_that_is_opened_is_what_the_folder_holds_now(folder, monkeypatch):
    (folder / "page.safetensors").write_text("<html>")
    LoraLibrary.index(folder, WordEncoder())
    read = []
    monkeypatch.setattr("mole_diffusers.retrieval.library.read_entry", lambda *a: read.append(a[1]) or read_entry(*a))
    LoraLibrary.open(folder, WordEncoder())
    assert read == ["page.safetensors"]  # only what could not be read
    shutil.copy(folder / "fox.safetensors", folder / "new.safetensors")
    shutil.copy(folder / "ink.safetensors", folder / "page.safetensors")
    (folder / "birds" / "owl.safetensors").unlink()
    (folder / "fox.txt").write_text("a wolf")
    read.clear()
    opened = LoraLibrary.open(folder, WordEncoder())
    assert (read, names(opened.entries), opened.skipped) == (
        ["fox.safetensors", "new.safetensors", "page.safetensors"],
        ["fox", "ink", "new", "page"],
        {},
    )
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
        (lambda f: edit(f, cards=None), WordEncoder(), "cards of the index must be a list of names"),
        (lambda f: edit(f, cards=[]), WordEncoder(), "fp32 matrices with 0 and 4 rows"),
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
    about["cards"][0].update(changes)
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


# ---- encoders


def test_the_pipelines_own_encoder_by_hand_and_under_a_mixture(pipe, loras):
    encoder = PipelineText(pipe)
    ids = pipe.tokenizer(["a fox"], return_tensors="pt").input_ids
    by_hand = pipe.text_encoder(ids).last_hidden_state[0, 1:-1].mean(0) - encoder._mean_states(["photo"])[0]
    encoder._common = encoder._mean_states(["photo"])[0]
    plain = encoder(["a fox", "a long sentence"])
    torch.testing.assert_close(plain[0], by_hand.detach() / by_hand.detach().norm(), atol=1e-5, rtol=0)
    attach(pipe, loras)
    assert not torch.allclose(
        pipe.text_encoder(ids).last_hidden_state[0, 1:-1].mean(0) - encoder._common, by_hand, atol=1e-3
    )
    assert torch.equal(encoder(["a fox", "a long sentence"]), plain)
    assert encoder.id == "CLIPTextModel of 2 layers and width 16"


def test_pipelines_whose_first_encoder_is_t5_or_none():
    encoder = PipelineText(hosts.chroma())
    one, both = encoder(["a fox"]), encoder(["a fox", "a long sentence with many more letters"])
    torch.testing.assert_close(both[:1], one, atol=1e-5, rtol=0)
    assert not torch.allclose(both[1], both[0], atol=0.1)
    with pytest.raises(ValueError, match="StableDiffusionXLImg2ImgPipeline has no text encoder to read texts with"):
        PipelineText(hosts.sdxl(StableDiffusionXLImg2ImgPipeline, refiner=True))


def test_sentence_transformers_by_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ValueError, match=r"'mini' needs the package sentence-transformers: pip install mole-diffusers\[library\]"
    ):
        SentenceText("mini")
    module = ModuleType("sentence_transformers")

    class SentenceTransformer:
        def __init__(self, name):
            self.name = name

        def encode(self, texts, *, convert_to_tensor, show_progress_bar):
            return torch.tensor([[3.0, 4.0]] * len(texts), dtype=torch.float16)

    module.SentenceTransformer = SentenceTransformer
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    encoder = SentenceText("mini")
    assert encoder.id == "sentence-transformers mini"
    torch.testing.assert_close(encoder(["x"]), torch.tensor([[0.6, 0.8]]))


def test_found_is_a_value():
    assert RetrievedLora("a", 0.5, "x") == RetrievedLora("a", 0.5, "x")
