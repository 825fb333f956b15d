"""The words that call a LoRA, from its header, the notes beside it, or its training tags."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import mole_diffusers as mole
from mole_diffusers.lora import own_words, preferred_weight, read_expert, words_of
from mole_diffusers.lora.own_words import is_generic

CASES = json.loads(Path(__file__).with_name("own_words.json").read_text())  # as trainers and tools write them; read by hand


def written(path, header, notes=()):
    key = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    generator = torch.Generator().manual_seed(len(path.name))
    tensors = {key.format(half): torch.randn(2, 2, generator=generator) for half in "AB"}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in header.items()}
    save_file(tensors, path, texts)
    for ending, note in dict(notes).items():
        path.with_name(path.stem + ending).write_text(json.dumps(note))
    return read_expert(path)


@pytest.mark.parametrize("case", CASES, ids=[case["what"] for case in CASES])
def test_words_are_those_that_call_it(tmp_path, case):
    name = case["file"]
    experts = {name: written(tmp_path / f"{name}.safetensors", case.get("header", {}), case.get("notes", {}))}
    for i, header in enumerate(case.get("beside", ()), start=1):
        experts[f"other{i}"] = written(tmp_path / f"{'other' * i}.safetensors", header)
    wanted = tuple(case["words"]), case["stated"]
    assert own_words(experts)[name] == wanted
    assert len(experts) > 1 or words_of(experts[name]) == wanted


def test_the_same_file_twice_has_the_same_words(tmp_path):
    fox = written(tmp_path / "fox.safetensors", {"ss_tag_frequency": {"1_fox": {"foxxo": 9}}})
    assert own_words({"a": fox, "b": read_expert(tmp_path / "fox.safetensors")}) == {"a": (("foxxo",), False)} | {
        "b": (("foxxo",), False)
    }


@pytest.mark.parametrize(
    ("word", "generic"),
    [
        *((word, True) for word in ("1girl", "2boys", "6+girls", "Looking at viewer", "looking_at_viewer", "masterpiece")),
        *(
            (word, True)
            for word in ("simple background", "white background", "(best quality:1.2)", "score_9", "8k", "woman")
        ),
        *((word, False) for word in ("fox", "sks woman", "hat", "mikudef", "backgroundx", "girl with a pearl", "ink", "")),
    ],
)
def test_generic_words_are_no_ones(word, generic):
    assert is_generic(word) is generic


@pytest.mark.parametrize(
    ("notes", "weight"),
    [
        ({".json": {"preferred weight": 0.7}}, 0.7),
        ({".json": {"preferred weight": "0.65"}}, 0.65),
        ({".json": {"preferred weight": 0}}, None),
        ({".json": {"preferred weight": "often"}}, None),
        ({".json": {"preferred weight": 1e9}}, None),
        ({".metadata.json": {"usage_tips": '{"strength": 0.8}'}}, 0.8),
        ({".metadata.json": {"usage_tips": "{"}}, None),
        ({}, None),
    ],
)
def test_the_strength_that_a_note_says(tmp_path, notes, weight):
    written(tmp_path / "fox.safetensors", {}, notes)
    assert preferred_weight(tmp_path / "fox.safetensors") == weight


def test_words_of_attached_files_depend_on_each_other(pipe, loras, tmp_path):
    from safetensors.torch import load_file

    files = {}
    for name, tags in {"miku": {"1girl": 9, "bow": 9, "mikux": 9}, "rin": {"1girl": 9, "bow": 2, "rinxx": 8}}.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_file(
            load_file(loras["fox" if name == "miku" else "ink"]), files[name], {"ss_tag_frequency": json.dumps({"1": tags})}
        )
    alone = mole.attach(pipe, {"miku": files["miku"]})
    assert alone.binding["miku"].words == ("mikux",)
    both = mole.attach(pipe, files)
    assert {name: (bound.words, bound.needs_words) for name, bound in both.binding.items()} == {
        "miku": (("mikux",), False), "rin": (("rinxx",), False)
    }  # fmt: skip
