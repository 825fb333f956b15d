"""Prompts with weights: what reaches the pipeline, and that binding finds words in them."""

import warnings

import hosts
import numpy as np
import pytest
import torch
from compel import Compel, CompelForFlux, CompelForSD, CompelForSDXL, ReturnedEmbeddingsType
from tiers import thorough

from mole_app.studio.prompt_weights import (
    call_arguments,
    chunks_of,
    cut_off,
    prompts_read,
    tiled_prompt,
    unread,
)
from mole_app.studio.weight_syntax import parse_weights
from mole_diffusers import attach, detach
from mole_diffusers.binding.sentence import parse
from mole_diffusers.patching.gating import prompt_tokens

HOSTS = ["sd15", "sdxl", "flux", *thorough("sd3")]


def picture(pipe, options, prompt, negative="", **more):
    arguments = call_arguments(pipe, prompt, negative)
    call = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(0)}
    return pipe(**(call | options | arguments | more)).images


def test_looking_at_a_prompt_leaves_the_tokenizer_to_who_draws(pipe):
    """A call without padding turns it off for all threads, between another's wish for it and its words."""
    pipe.tokenizer("a fox", padding="max_length")
    before = pipe.tokenizer.backend_tokenizer.padding
    assert before is not None
    assert len(chunks_of(pipe, "a red fox, an ink hat")) == 2
    assert pipe.tokenizer.backend_tokenizer.padding == before
    pipe.tokenizer.add_tokens("fox")  # as a textual inversion does
    assert len(chunks_of(pipe, "a red fox, an ink hat")) == 1


@pytest.mark.parametrize("host", HOSTS)
def test_weights_of_one_change_nothing_and_others_do(host):
    """States that the pipeline would make itself, and the same through the weighing."""
    pipe, options = hosts.HOSTS[host]()
    options.pop("max_sequence_length", None)  # as the pipeline has it by default
    plain = picture(pipe, options, "a fox")
    assert np.array_equal(picture(pipe, options, "(a fox:1)"), plain)
    assert np.array_equal(pipe("a fox", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0),
                               **options).images, plain)  # fmt: skip
    half = picture(pipe, options, "(a fox:1.0001)")  # through the states, with weights of nearly 1
    assert 0 <= np.abs(half - plain).max() < 1e-2
    assert np.abs(picture(pipe, options, "a (fox:1.8)") - plain).max() > 1e-4
    if host != "flux":
        against = picture(pipe, options, "a fox", "hat")
        assert np.abs(picture(pipe, options, "a fox", "(hat:1.8)") - against).max() > 1e-4


@pytest.mark.parametrize(("host", "compel"), [("sd15", CompelForSD), ("sdxl", CompelForSDXL), ("flux", CompelForFlux)])
def test_weights_do_what_they_do_in_compel(host, compel):
    """Against compel's own class for the pipeline, which reads its own syntax."""
    pipe, _ = hosts.HOSTS[host]()
    if host == "flux":
        pipe.tokenizer_2.model_max_length = 512  # as published, and as long as the pipeline reads
    pipe.text_encoder.final_layer_norm.weight.data.uniform_(0.5, 2)  # else two layers' states are nearly alike
    got = call_arguments(pipe, "ink (fox:1.5) [hat]", "(hat:0.5) ink")
    against = {} if host == "flux" else {"negative_prompt": "(hat)0.5 ink"}
    wanted = compel(pipe)(f"ink (fox)1.5 (hat){1 / 1.1}", **against)
    assert torch.allclose(got["prompt_embeds"], wanted.embeds, atol=1e-5)
    if host != "flux":
        assert torch.allclose(got["negative_prompt_embeds"], wanted.negative_embeds, atol=1e-5)
    if host != "sd15":
        words = compel(pipe)("ink fox hat").pooled_embeds  # of the prompt above, compel pools its brackets too
        assert torch.allclose(got["pooled_prompt_embeds"], words, atol=1e-5)
    plain = call_arguments(pipe, "ink (fox:1.00001) hat")["prompt_embeds"]
    assert (got["prompt_embeds"] - plain).abs().max() > 0.1


def test_all_three_encoders_of_sd3_read_the_weights():
    """The two of CLIP side by side, then T5: each as compel weighs that encoder alone."""
    pipe, _ = hosts.HOSTS["sd3"]()
    pipe.text_encoder_3, pipe.tokenizer_3 = hosts.t5(32)
    got = call_arguments(pipe, "ink (fox:1.5)")["prompt_embeds"][0]
    length, width = pipe.tokenizer_max_length, 2 * pipe.text_encoder.config.hidden_size

    def alone(name, layer, **options):
        encoder = getattr(pipe, name.replace("tokenizer", "text_encoder"))
        return Compel(getattr(pipe, name), encoder, returned_embeddings_type=layer, **options)("ink (fox)1.5")[0]

    of_clip = ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED
    of_t5 = ReturnedEmbeddingsType.LAST_HIDDEN_STATES_NORMALIZED
    clip = torch.cat([alone("tokenizer", of_clip), alone("tokenizer_2", of_clip)], -1)
    assert torch.allclose(got[:length, :width], clip, atol=1e-5)
    assert torch.allclose(got[length:], alone("tokenizer_3", of_t5, model_max_length=len(got) - length), atol=1e-5)


def test_brackets_inside_a_word_part_it(pipe):
    """The encoder reads the tokens that compel weighs."""
    read = []
    with pipe.text_encoder.register_forward_pre_hook(lambda _, args: read.append(args[0][0].tolist())):
        call_arguments(pipe, "(fo:1.5)x, a hat")
    assert len({tuple(ids) for ids in read if len(ids) > 5 and ids[2] != pipe.tokenizer.eos_token_id}) == 1


def test_an_embedding_of_two_vectors_is_weighed_whole(pipe):
    width = pipe.text_encoder.config.hidden_size
    pipe.load_textual_inversion({"<fox>": torch.randn(2, width)}, token="<fox>")
    got = call_arguments(pipe, "ink (<fox>:1.5)")["prompt_embeds"]
    plain = call_arguments(pipe, "ink (<fox>:1.00001)")["prompt_embeds"]
    changed = (got - plain)[0].abs().amax(-1) > 1e-3
    assert changed.nonzero().flatten().tolist() == [4, 5]  # after the begin and the letters of "ink"


@pytest.mark.parametrize("offloading", hosts.OFFLOADS)
def test_weights_where_the_encoder_is_offloaded(pipe, offloading):
    plain = call_arguments(pipe, "ink (fox:1.5) [hat]")["prompt_embeds"]
    hosts.OFFLOADS[offloading](pipe)
    assert torch.equal(call_arguments(pipe, "ink (fox:1.5) [hat]")["prompt_embeds"], plain)


@pytest.mark.parametrize("host", ["sd15", *thorough("sdxl")])
@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("(ink:1.2), a fox and a [cat] at sea", ["(ink:1.2), a fox at sea", "(ink:1.2), a [cat] at sea"]),
        ("a (fox:1.4) and a cat, sea", ["a (fox:1.4), sea", "a cat, sea"]),
        ("a red fox and a (red:1.5) cat", ["a red fox", "a (red:1.5) cat"]),
        ("a (red:1.5) fox and a red cat", ["a (red:1.5) fox", "a red cat"]),
        ("(a:1.5) fox and a cat", ["(a:1.5) fox", "a cat"]),
        ("a (fox and a cat:1.3)", ["a (fox:1.3)", "(a cat:1.3)"]),
    ],
)
def test_a_part_of_a_prompt_is_encoded_with_the_weights_that_it_has_there(host, prompt, parts):
    pipe, _ = hosts.HOSTS[host]()
    tiles = tiled_prompt(pipe, prompt)
    sentence = parse(tiles["prompt"], [["fox"], ["cat"]])
    for part, written in zip(sentence.parts, parts, strict=True):
        states, pooled = tiles["encode"](part)
        wanted = call_arguments(pipe, written, guided=False)
        if "prompt" in wanted:
            wanted = call_arguments(pipe, f"({written}:1.00001)", guided=False)
        torch.testing.assert_close(states, wanted["prompt_embeds"], atol=1e-3, rtol=0)
        assert (pooled is None) == (host == "sd15")
        assert pooled is None or torch.equal(pooled, wanted["pooled_prompt_embeds"])


@pytest.mark.parametrize("host", ["sd15", *thorough("sdxl")])
def test_a_part_is_as_long_as_the_prompt_beside_a_long_negative_one(host):
    pipe, _ = hosts.HOSTS[host]()
    negative = "ink, " * 40
    tiles = tiled_prompt(pipe, "a fox and a (cat:1.3)", negative)
    part = parse(tiles["prompt"], [["fox"], ["cat"]]).parts[1]
    wanted = call_arguments(pipe, "a (cat:1.3)", negative)
    assert wanted["prompt_embeds"].shape[1] > call_arguments(pipe, "a (cat:1.3)")["prompt_embeds"].shape[1]
    states, pooled = tiles["encode"](part)
    assert torch.equal(states, wanted["prompt_embeds"])
    assert pooled is None or torch.equal(pooled, wanted["pooled_prompt_embeds"])
    unguided = tiled_prompt(pipe, "a fox and a (cat:1.3)", negative, guided=False)["encode"](part)[0]
    assert torch.equal(unguided, call_arguments(pipe, "a (cat:1.3)", negative, guided=False)["prompt_embeds"])


def test_tiles_are_not_given_a_prompt_that_they_would_not_read_whole():
    pipe, _ = hosts.HOSTS["sdxl"]()
    assert tiled_prompt(pipe, "a (fox)", prompt_2="a hat") == {}
    one_encoder, _ = hosts.HOSTS["sd15"]()
    assert tiled_prompt(one_encoder, "a (fox)", prompt_2="a hat")["prompt"] == "a fox"


def test_no_encoder_reads_a_text_twice():
    """The prompt, the empty one, and one without each weak word, for compel; and the pipeline's own run."""
    for host, count in (("sdxl", 5), ("flux", 5)):
        pipe, _ = hosts.HOSTS[host]()
        encoder, read = pipe.text_encoder_2, []
        with encoder.register_forward_pre_hook(lambda *_, read=read: read.append(1)):
            call_arguments(pipe, "a (fox:1.3) [hat] [ink]", guided=False)
        assert len(read) == count


def test_words_are_counted_as_they_are_read():
    """T5 begins a word anew where a weight ends; what it does not read is said, or is the next chunk."""
    pipe, _ = hosts.HOSTS["flux"]()
    tokenizer = pipe.tokenizer_2
    (chunk,) = parse_weights("(fox:1.3)x, a hat")
    assert len(chunk.spans(tokenizer)) == len(tokenizer(chunk.words, add_special_tokens=False).input_ids)
    long = "(a:1.2), " * 150
    chunks = chunks_of(pipe, long)
    assert len(chunks) > 1
    assert all(len(tokenizer(chunk.words, add_special_tokens=False).input_ids) <= 511 for chunk in chunks)
    assert [said.split()[1] for said in cut_off(pipe, long)] == ["tokenizer"]


def test_words_at_0_are_gone(pipe):
    """The other words' states are those of a text where nobody reads them, and theirs those of the empty prompt."""
    got = call_arguments(pipe, "ink (fox:0) hat")["prompt_embeds"][0]
    ids, empty = (pipe.tokenizer(t, padding="max_length", return_tensors="pt").input_ids for t in ("ink fox hat", ""))
    mask, fox = torch.ones_like(ids), slice(4, 7)  # a letter is a token
    mask[0, fox] = 0
    wanted = pipe.text_encoder(ids, mask)[0][0].detach()
    wanted[fox] = pipe.text_encoder(empty)[0][0, fox]
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)


def test_a_long_prompt_is_read_to_its_end(pipe, draw):
    """It is cut after commas and between words, and its states are those of its parts."""
    long = "a red fox, an ink hat and a tree"
    chunks = [chunk.text for chunk in chunks_of(pipe, long)]
    assert chunks == ["a red fox,", "an ink hat and a", "tree"]
    states = call_arguments(pipe, long)["prompt_embeds"]
    assert states.shape[1] == 3 * 16
    device = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    parts = [pipe.encode_prompt(chunk, **device)[0] for chunk in chunks]
    assert torch.equal(states, torch.cat(parts, 1))
    by_hand = call_arguments(pipe, "a red fox, BREAK an ink hat and a BREAK tree")["prompt_embeds"]
    assert torch.equal(by_hand, states)
    assert call_arguments(pipe, "a fox", long)["negative_prompt_embeds"].shape == states.shape


def test_tokens_are_counted_for_each_encoder():
    pipe, _ = hosts.HOSTS["sd15"]()
    assert cut_off(pipe, "a (red:1.2) fox, an ink hat") == []
    pipe, _ = hosts.HOSTS["flux"]()
    assert cut_off(pipe, "a red fox and an ink hat") == ["the tokenizer reads 14 tokens of the prompt, not 'k hat'"]


TWO = ["flux", *thorough("sdxl", "sd3")]


@pytest.mark.parametrize("host", TWO)
def test_a_second_prompt_is_what_the_second_encoder_reads(host):
    """As text, and through states with weights of nearly 1, for both prompts and against both."""
    pipe, options = hosts.HOSTS[host]()
    options.pop("max_sequence_length", None)
    against = {} if host == "flux" else {"negative_prompt": "hat", "negative_prompt_2": "ink"}

    def drawn(**texts):
        generator = torch.Generator().manual_seed(0)
        return pipe(num_inference_steps=2, output_type="np", generator=generator, **options, **texts).images

    plain = drawn(prompt="a hen", prompt_2="a fox", **against)
    assert np.array_equal(drawn(**call_arguments(pipe, "a hen", "hat", prompt_2="a fox", negative_2="ink")), plain)
    near = call_arguments(pipe, "a (hen:1.00001)", "(hat:1)", prompt_2="a fox", negative_2="ink")
    assert "prompt_embeds" in near
    assert np.abs(drawn(**near) - plain).max() < 1e-2
    for other in ({"prompt_2": ""}, {"prompt_2": "a (fox:1.8)"}, {} if host == "flux" else {"negative_2": ""}):
        changed = {"prompt_2": "a fox", "negative_2": "ink"} | other
        assert other == {} or np.abs(drawn(**call_arguments(pipe, "a hen", "hat", **changed)) - plain).max() > 1e-4


def test_texts_of_two_encoders_may_have_several_parts():
    """Each part is what the pipeline makes of the two parts; where one text ends, its encoder reads nothing."""
    pipe, _ = hosts.HOSTS["sdxl"]()
    made = call_arguments(pipe, "a fox BREAK a hat", "", prompt_2="ink", negative_2="hat BREAK fox BREAK tree")
    width = pipe.text_encoder.config.hidden_size
    assert made["prompt_embeds"].shape[1] == made["negative_prompt_embeds"].shape[1] == 3 * 16

    def states(first, second):
        return pipe.encode_prompt([first], [second], "cpu", 1, False)[0]

    assert torch.equal(made["prompt_embeds"], torch.cat([states("a fox", "ink"), states("a hat", ""), states("", "")], 1))
    wanted = torch.cat([states("", text)[..., width:] for text in ("hat", "fox", "tree")], 1)
    assert torch.equal(made["negative_prompt_embeds"][..., width:], wanted)
    assert made["negative_prompt_embeds"][..., :width].any()  # not the zeros of no negative prompt
    assert cut_off(pipe, "a fox", "a red fox and an ink hat, far away") == []


def test_what_a_pipeline_does_not_read_is_said_and_left_out(pipe):
    given = {"prompt_2": "a hat", "negative_2": "ink"}
    assert call_arguments(pipe, "a fox", "blur", **given) == {"prompt": "a fox", "negative_prompt": "blur"}
    assert unread(pipe, negative="blur", guidance=7, **given) == [
        "StableDiffusionPipeline is drawn without a second prompt",
        "StableDiffusionPipeline is drawn without a second negative prompt",
    ]
    flux, _ = hosts.HOSTS["flux"]()
    assert call_arguments(flux, "a fox", "blur", **given) == {"prompt": "a fox", "prompt_2": "a hat"}
    assert [note.partition("without ")[2] for note in unread(flux, negative="blur", guidance=1, **given)] == [
        "the negative prompt",
        "a second negative prompt",
    ]
    refiner, _ = hosts.HOSTS["sdxl-refiner"]()
    assert prompts_read(refiner) == {"negative_prompt"}


@pytest.mark.parametrize("host", ["sd15", *thorough("sdxl")])
def test_binding_finds_words_in_a_prompt_with_weights(host, loras, tmp_path, monkeypatch):
    from tiny import tiny_lora

    pipe, options = hosts.HOSTS[host]()
    files = {name: tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i) for i, name in enumerate(("fox", "hat"))}
    bind = {"fox": ("fox", "left"), "hat": ("hat", "right")}
    mixture = attach(pipe, files, binding=bind)
    monkeypatch.setattr(prompt_tokens, "MOST_BYTES", 0)  # as large encoders' states are: few texts are remembered
    for prompt in (
        "a fox BREAK a [red] [old] [hat] in [ink]",
        "a (fox:1.4) [hat]",
        "(a fox:1.2), of ink and dust, in the far east, a hat",
        "a fox BREAK a (hat)",
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of words that are not known, or experts that are silent
            bound = picture(pipe, options, prompt)
        masks = mixture.parts.settings.binding.now
        own = masks.text.acting_tokens[-1].any(0).tolist() if masks.text is not None else None
        assert own == [True, True], prompt
        with mixture.bound(None):
            assert np.abs(picture(pipe, options, prompt) - bound).max() > 1e-3
    mixture.bind({"hat": "hat"})
    with pytest.warns(UserWarning, match="'hat' acts everywhere: the prompt has none of its words"):
        picture(pipe, options, "a (fox:1.3) in the far, far, far east")
    detach(pipe)
