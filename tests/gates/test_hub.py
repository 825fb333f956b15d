"""The model card: what the hub reads from it, and what a reader does."""

import pytest
from huggingface_hub import ModelCard

import mole_diffusers as mole
from mole_diffusers.gates import model_card
from mole_diffusers.lora import read_expert


@pytest.fixture
def experts(loras):
    return {"fox": (read_expert(loras["fox"], "fox"), 1.0), "ink": (read_expert(loras["ink"], "ink"), 0.5)}


def test_a_card_of_gates_says_where_they_come_from(experts):
    options = {"prompt": "a fox in ink", "base": "someone/base", "training": "Trained for 4 updates."}
    card = ModelCard(model_card(experts, mole.GateConfig("flow"), "me/gates", **options))
    assert (card.data.library_name, card.data.base_model) == ("diffusers", "someone/base")
    for text in (
        "# Gates for fox + ink",
        "LoRAs are not included",
        'gates="me/gates")',
        'pipe("a fox in ink")',
        "Trained for 4",
    ):
        assert text in card.text
    assert "`flow` gates. The LoRAs" in card.text  # one for each stream of tokens, and no choice
    by_layer = model_card(experts, mole.GateConfig("mole", granularity="layer"), "me/gates")
    assert "`mole` gates, one per layer. The LoRAs" in by_layer
    for name, (expert, strength) in experts.items():
        assert f"| {name} | {strength:g} | " in card.text
        assert f"`{expert.sha256}`" in card.text


def test_a_card_of_a_pipeline_loads_it_with_all_that_it_holds(experts):
    card = ModelCard(model_card(experts, mole.GateConfig("flow"), "me/mix", pipeline=True))
    assert 'MoLEPipeline.from_pretrained("me/mix")' in card.text
    assert "not included" not in card.text
    assert "base_model" not in card.data.to_dict()


def test_a_card_is_in_utf_8_whatever_the_locale(pipe, loras, hub, ascii_locale):
    mole.attach(pipe, {"füchse": loras["fox"]}).push_to_hub("me/gates")
    assert "# Gates for füchse" in (hub[1] / "README.md").read_text("utf-8")
