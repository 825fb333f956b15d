"""Embeddings that were trained with a LoRA, against diffusers' own loading of the same vectors."""

import hosts
import pytest
import torch
from hosts import assert_same, snapshot
from safetensors.torch import load_file, save_file
from tiers import thorough
from tiny import tiny_lora, tiny_pipeline

import mole_diffusers as mole

TRAINED = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))


def with_embedding(source, path, **embeddings):
    save_file(load_file(source) | {f"bundle_emb.{name}": vectors for name, vectors in embeddings.items()}, path)
    return path


@pytest.mark.parametrize("vectors", [1, 2])
def test_words_are_loaded_and_taken_out_again(pipe, loras, draw, tmp_path, vectors):
    prompt, own = "a zwx in ink", TRAINED[:vectors]
    before, plain, ids = snapshot(pipe), draw(pipe, prompt), pipe.tokenizer(prompt).input_ids
    file = with_embedding(loras["fox"], tmp_path / "fox.safetensors", **{"zwx.string_to_param.*": own})
    mixture = mole.attach(pipe, {"fox": file}, binding=None)
    found = draw(pipe, prompt)
    theirs = tiny_pipeline()
    theirs.load_textual_inversion(own, token="zwx")
    mole.attach(theirs, {"fox": loras["fox"]}, binding=None)
    assert torch.equal(found, draw(theirs, prompt))
    with mixture.lifted():
        assert torch.equal(draw(pipe, prompt), plain)
    assert torch.equal(draw(pipe, prompt), found)
    again = mole.attach(pipe, {"fox": file}, binding=None)  # in the place of itself
    assert (again.file_words["fox"].words, again.parts.installation.without_embedding) == (("zwx",), [])
    assert torch.equal(draw(pipe, prompt), found)
    pipe.save_pretrained(tmp_path / "saved")
    saved = type(pipe).from_pretrained(tmp_path / "saved")
    rows = len(saved.text_encoder.get_input_embeddings().weight)
    assert len(saved.tokenizer) == rows == len(pipe.text_encoder.get_input_embeddings().weight) - vectors
    mole.detach(pipe)
    assert_same(before, snapshot(pipe))
    assert pipe.tokenizer(prompt).input_ids == ids
    assert "zwx" not in pipe.tokenizer.get_added_vocab()
    assert torch.equal(draw(pipe, prompt), plain)


def test_what_others_load_meanwhile_stays(pipe, loras, draw, tmp_path):
    mole.attach(pipe, {"fox": with_embedding(loras["fox"], tmp_path / "fox.safetensors", **{"zwx.clip_l": TRAINED})})
    pipe.load_textual_inversion(TRAINED[0] + 1, token="other")
    mole.detach(pipe)
    theirs = tiny_pipeline()
    theirs.load_textual_inversion(TRAINED[0] + 1, token="other")
    assert torch.equal(draw(pipe, "an other"), draw(theirs, "an other"))


@pytest.mark.parametrize("host", ["sdxl", *thorough("flux", "sd3")])
def test_each_text_encoder_has_its_own(host, tmp_path):
    pipe, options = hosts.HOSTS[host]()
    plain = hosts.draw(pipe, options, "a zwx")
    file = tiny_lora(pipe, tmp_path / "fox.safetensors", ends=("attn2.to_k", "attn.to_k"))
    file = with_embedding(file, tmp_path / "zwx.safetensors", **{"zwx.clip_l": TRAINED[:1], "zwx.clip_g": TRAINED[1:]})
    if host == "flux":  # its second text encoder is T5
        with pytest.warns(UserWarning, match="'zwx' is not used in the text_encoder_2"):
            mixture = mole.attach(pipe, {"fox": file}, binding=None)
    else:
        mixture = mole.attach(pipe, {"fox": file}, binding=None)
    assert not [part for part in mixture.parts.banks if part.startswith("text")]
    assert not torch.equal(hosts.draw(pipe, options, "a zwx"), plain)
    mole.detach(pipe)
    assert torch.equal(hosts.draw(pipe, options, "a zwx"), plain)


def test_what_a_text_encoder_cannot_take_is_said(pipe, loras, tmp_path):
    for own, why in (
        ({"zwx.clip_l": TRAINED[:, :4].contiguous()}, "text_encoder: its vectors have 4 numbers, and the encoder's 16"),
        ({"zwx.clip_g": TRAINED}, "text_encoder_2: the pipeline has none"),
        ({"a</w>.clip_l": TRAINED[:1]}, "text_encoder: the tokenizer or another LoRA has that word already"),
        ({"zwx.t5": TRAINED}, "an embedding for a text encoder that takes no new words"),
    ):
        file = with_embedding(loras["fox"], tmp_path / "fox.safetensors", **own)
        with pytest.warns(UserWarning, match=f"expert 'fox': .* is not used.* {why}"):
            mixture = mole.attach(pipe, {"fox": file})
        assert len(mixture.parts.installation.without_embedding) == 1
        mole.detach(pipe)


def same_embeddings(found, wanted):
    assert {word: list(parts) for word, parts in found.items()} == {word: list(parts) for word, parts in wanted.items()}
    return all(torch.equal(found[word][part], vectors) for word, parts in wanted.items() for part, vectors in parts.items())


def test_a_file_with_kohya_keys_keeps_them_and_one_with_diffusers_says_that_it_does_not(pipe, loras, draw, tmp_path):
    file = with_embedding(loras["fox"], tmp_path / "fox.safetensors", **{"zwx.clip_l": TRAINED})
    expert = mole.read_expert(file)
    mole.save_expert(expert, tmp_path / "kohya.safetensors", format="kohya", dtype=torch.float32)
    assert same_embeddings(mole.read_expert(tmp_path / "kohya.safetensors").embeddings, expert.embeddings)
    with pytest.warns(UserWarning, match="without the embeddings of 'zwx': only a file with kohya keys has some"):
        mole.save_expert(expert, tmp_path / "plain.safetensors")
    assert not mole.read_expert(tmp_path / "plain.safetensors").embeddings
    mixture = mole.attach(pipe, {"fox": file}, binding=None)
    whole = draw(pipe, "a zwx")
    mixture.export_lora(tmp_path / "export.safetensors", format="kohya", dtype=torch.float32)
    mole.attach(pipe, {"fox": tmp_path / "export.safetensors"}, binding=None)
    torch.testing.assert_close(draw(pipe, "a zwx"), whole, atol=1e-5, rtol=0)


def test_a_merge_has_those_of_all_and_says_which_word_two_have(loras, tmp_path):
    files = {
        name: with_embedding(loras[name], tmp_path / f"{name}.safetensors", **own)
        for name, own in {
            "fox": {"zwx.clip_l": TRAINED},
            "ink": {"zwx.clip_l": TRAINED[:1], "qy.clip_l": TRAINED[1:]},
        }.items()
    }
    with pytest.warns(UserWarning, match="the trained embedding of 'zwx' of 'ink' is left out"):
        merged = mole.merge(files, "sum")
    wanted = {"zwx": {"text_encoder": TRAINED}, "qy": {"text_encoder": TRAINED[1:]}}
    assert same_embeddings(merged.embeddings, wanted)


def test_a_drop_in_keeps_them_and_says_that_it_fuses_none(pipe, loras, draw, tmp_path):
    file = with_embedding(loras["fox"], tmp_path / "fox.safetensors", **{"zwx.clip_l": TRAINED})
    ours = hosts.quiet(mole.MoLEPipeline.from_pipe(pipe))
    ours.load_lora_weights(mole.merge({"fox": file}, "sum"), adapter_name="fox")  # in memory alone
    whole = draw(ours, "a zwx")
    ours.save_pretrained(tmp_path / "saved")
    again = hosts.quiet(mole.MoLEPipeline.from_pretrained(tmp_path / "saved"))
    torch.testing.assert_close(draw(again, "a zwx"), whole, atol=1e-5, rtol=0)
    with pytest.warns(UserWarning, match="without the words that their files trained"), ours.mixture.collapsed():
        folded = draw(ours, "a zwx")
    with pytest.warns(UserWarning, match="the trained embeddings of 'zwx' are not fused: load_textual_inversion loads some"):
        ours.fuse_lora()
    torch.testing.assert_close(draw(ours, "a zwx"), folded, atol=1e-5, rtol=0)
    assert not torch.allclose(folded, whole, atol=1e-4)
