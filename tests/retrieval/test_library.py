"""Which LoRAs of a library a prompt finds: by triggers, by the means of their samples, ranked and limited."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from libraries import SAMPLES, WordEncoder, library, names
from transformers import CLIPTextModel, CLIPTokenizerFast

from mole_diffusers.retrieval import LoraLibrary, PipelineText
from mole_diffusers.retrieval.library import THRESHOLD, embedding, similarity, top
from mole_world import default_folder
from mole_world.words import BASE_SUBJECTS
from mole_world.world import concept_files

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
    loras, queries = (F.normalize(torch.randn(n, 16, generator=generator), dim=-1) for n in (50, 4))
    scores, best = similarity(queries, loras)
    pairs = sorted(((max(float(q @ c) for q in queries), i) for i, c in enumerate(loras)), reverse=True)
    assert top(scores, torch.ones(50, dtype=torch.bool), 5, 0.0) == [i for _, i in pairs[:5]]
    for i in range(50):
        assert float(queries[best[i]] @ loras[i]) == pytest.approx(scores[i].item(), abs=1e-6)
    assert top(scores, torch.ones(50, dtype=torch.bool), 50, pairs[2][0] - 1e-5) == [i for _, i in pairs[:3]]


def test_adding_loras_leaves_the_other_scores_as_they_are():
    generator = torch.Generator().manual_seed(1)
    loras, queries = (F.normalize(torch.randn(n, 768, generator=generator), dim=-1) for n in (3000, 3))
    scores, _ = similarity(queries, loras)
    for n in (1, 2, 7, 100, 1025):
        assert torch.equal(similarity(queries, loras[:n])[0], scores[:n])


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
