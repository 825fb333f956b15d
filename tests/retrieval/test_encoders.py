"""What reads the texts of a library: phrases, and text encoders."""

import sys
from types import ModuleType

import hosts
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline

from mole_diffusers import attach
from mole_diffusers.retrieval import PipelineText, SentenceText
from mole_diffusers.retrieval.encoders import phrases


def test_phrases_are_what_stands_between_small_words_and_punctuation():
    assert phrases("Ink drawing of a FOX, and <new1> at night!") == ["ink drawing", "fox", "<new1>", "night"]
    assert phrases("a fox asleep under an oak, seen from behind") == ["fox asleep", "oak", "seen"]
    assert phrases("photo of a person, painting style, fox style") == ["fox style"]


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
