"""Which expert acts on which token of texts and pictures, on a real pipeline."""

import warnings
from contextlib import nullcontext

import hosts
import pytest
import torch
from bound_pictures import FOX, HALVES, IN_A_FOLDER, PROMPT, WORDS, now, own_words
from gate_types import LEARNED, gate_types
from PIL import Image
from tiers import thorough
from tiny import tiny_lora

import mole_diffusers as mole
from mole_diffusers.binding import Bound
from mole_diffusers.patching.gating.settings import PlainSum
from mole_diffusers.patching.install.folding import Averages, evaluate_gates

pytestmark = pytest.mark.usefixtures("decided")


def test_every_word_and_the_whole_picture_are_no_binding(attach, pipe, draw):
    mixture = attach(None)
    unbound = draw(pipe, PROMPT)
    for bound in ("everywhere", (None, (0.0, 0.0, 1.0, 1.0)), (None, Image.new("L", (8, 8), 255))):
        mixture.bind(dict.fromkeys(("fox", "ink", "hat"), bound))
        assert torch.equal(draw(pipe, PROMPT), unbound)


def test_files_without_trigger_words_are_not_bound(attach, pipe, draw):
    attach(None)
    unbound = draw(pipe, PROMPT)
    attach("auto")
    assert torch.equal(draw(pipe, PROMPT), unbound)


def test_weights_by_hand_hold_on_every_token(attach, pipe, draw):
    """`fixed` is how one expert alone and the plain sum are drawn beside a mixture."""
    weights = {"fox": 1.0, "ink": 0.5, "hat": 0.0}
    mixture = attach(HALVES)
    with mixture.bound(None), mixture.fixed(weights):
        unbound = draw(pipe, PROMPT)
    with mixture.fixed(weights):
        assert torch.equal(draw(pipe, PROMPT), unbound)
    assert not torch.equal(draw(pipe, PROMPT), unbound)


SHARED = "'fox' and 'ink' share the words 'fox' and a place"


SAME = "'fox' and 'fox' were given the same region"


@pytest.mark.parametrize(
    ("binding", "warned"),
    [
        *thorough(({"fox": "fox", "ink": "fox", "hat": "owl"}, SHARED)),
        ({"fox": ("fox", "left"), "ink": ("fox", "left"), "hat": "owl"}, SAME),
        ({"fox": ("fox", "left"), "ink": ("fox", "right"), "hat": "owl"}, ""),
        ({"fox": ("fox", "left"), "ink": ("owl", "left"), "hat": "fox"}, "'fox' and 'owl' were given the same region"),
        *thorough((HALVES, "")),
    ],
)
def test_several_experts_in_one_place_are_told_of(attach, pipe, draw, binding, warned):
    mixture = attach(binding)
    if warned != SHARED:
        mixture.strength("hat", 0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # the warning comes once in each call, and is kept
            draw(pipe, PROMPT)
    told = mixture.binding_warnings
    assert [text.partition(":")[0] for text in told] == ([warned] if warned else [])
    assert [str(w.message) for w in caught].count(told[0] if told else "") == 2 * len(told)
    with mixture.only("fox"):
        draw(pipe, PROMPT)
    assert not mixture.binding_warnings


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({"fox": ("fox", Image.new("L", (8, 8), 0)), "ink": "owl"}, "expert 'fox' acts nowhere: its region is empty"),
        ({"fox": ("fox", (0, 0, 1, 1)), "ink": "owl"}, "the given regions leave 'owl' no place"),
        ({"fox": ("cat", "left"), "ink": "owl"}, "expert 'fox' acts in its region: the prompt has none of its words, cat"),
        ({"fox": ("fox", "left"), "ink": ("cat", "everywhere")}, "expert 'ink' acts everywhere: the prompt has none of its"),
        ({"fox": (None, "left"), "ink": "owl"}, ""),
    ],
)
def test_a_region_that_leaves_somebody_no_place_is_told_of_at_every_call(attach, pipe, draw, given, warned):
    mixture = attach(given, names=("fox", "ink"))
    for _ in range(2):
        with pytest.warns(UserWarning, match=warned) if warned else nullcontext():
            draw(pipe, PROMPT)
    assert len(mixture.binding_warnings) == bool(warned)
    assert now(mixture).region_masks[:, 1].min() == (warned != "expert")  # the owl acts in the whole picture


def test_places_that_attention_does_not_tell_say_what_to_do(attach, pipe, draw, monkeypatch):
    monkeypatch.setattr("mole_diffusers.binding.picture_layout.UNDECIDED", 2.0)
    mixture = attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    what = r"of 'fox' and 'owl' are undecided, .*: give a region, as in mixture.bind\(\{'fox': \(None, 'left'\)\}\)"
    with pytest.warns(UserWarning, match=what):
        draw(pipe, PROMPT)
    mixture.bind({"fox": (None, "left")})
    draw(pipe, PROMPT)
    assert not mixture.binding_warnings


@pytest.mark.parametrize(
    "prompt", ["fox & owl", "fox & owl, far away", "far, far, far, fox & owl", "far away, fox & owl & hat"]
)
def test_no_more_is_explained_than_the_text_encoder_reads(attach, pipe, draw, prompt):
    mixture = attach({"fox": "fox", "ink": "owl", "hat": "hat"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        draw(pipe, prompt)
    said, reading = mixture.explain(prompt), now(mixture).picture.readings[-1]
    assert [bool(role.words) for role in said.experts.values()] == list(reading.mentioned)
    assert [role.place == "own" for role in said.experts.values()] == [
        any(k in subject.experts for subject in reading.subjects) for k in range(3)
    ]
    assert prompt.replace(" ", "")[14:] == said.unread.replace(" ", "")  # a token per letter, and two marks
    assert (f"no text encoder reads {said.unread!r}" in str(said)) == bool(said.unread)


def test_a_tag_of_other_tools_is_no_word_of_a_lora_and_is_told_of(attach, pipe, draw):
    for binding in (WORDS, None):
        mixture = attach(binding)
        with pytest.warns(UserWarning, match="<lora:fox:1> in the prompt is read as words"):
            draw(pipe, "<lora:fox:1>")
        if binding is not None:
            assert now(mixture).picture.readings[-1].mentioned == (False, False, False)
            assert mixture.binding_warnings[0].startswith("<lora:fox:1> in the prompt is read as words")


def test_without_an_expert_the_base_is_drawn_and_its_attention_read(attach, pipe, draw):
    base = draw(pipe, PROMPT, num_inference_steps=4)
    mixture = attach(WORDS)
    bound = draw(pipe, PROMPT, num_inference_steps=4)
    for off in (mixture.only(), mixture.strengths(dict.fromkeys(mixture.experts, 0))):
        with off, mixture.trace(maps=True) as trace:
            assert torch.equal(draw(pipe, PROMPT, num_inference_steps=4), base)
        assert [*trace.maps] == [0, 1, 2, 3]
    assert torch.equal(draw(pipe, PROMPT, num_inference_steps=4), bound)
    with mixture.only("hat"):  # one alone is the plain LoRA
        beside = draw(pipe, PROMPT)
    attach(None, names=["hat"])
    torch.testing.assert_close(beside, draw(pipe, PROMPT), atol=1e-5, rtol=0)


@pytest.mark.parametrize("gates", gate_types("mole", among=["sum", *LEARNED]))
def test_an_absent_word_is_strength_0_in_a_folder(attach, pipe, draw, awake, gates):
    mixture = awake(attach({"fox": "fox", "ink": Bound(("cat",), required=True), "hat": "everywhere"}, gates))
    with pytest.warns(UserWarning, match="expert 'ink' is inactive: the prompt has none of its words, cat"):
        absent = draw(pipe, PROMPT)
    mixture.bind({"ink": "everywhere"})
    mixture.strength("ink", 0)
    assert torch.equal(draw(pipe, PROMPT), absent)


def test_prompts_of_a_batch_silence_experts_row_by_row(attach, pipe, draw):
    """The same pictures as one by one, whichever words each prompt has."""
    attach({name: Bound((word,), required=True) for name, word in {"fox": "fox", "ink": "owl", "hat": "cat"}.items()})
    generators = [torch.Generator().manual_seed(0) for _ in range(3)]
    prompts = ["a fox", "a cat owl", "a house"]
    options = {"num_inference_steps": 2, "output_type": "np"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        together = torch.from_numpy(pipe(prompts, generator=generators, **options).images)
        alone = torch.cat([draw(pipe, prompt) for prompt in prompts])
        mole.detach(pipe)
        base = draw(pipe, "a house")
    torch.testing.assert_close(together, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(together[2:], base, atol=2e-5, rtol=0)  # the base, though others of the batch have experts


def test_a_word_of_two_experts_is_shared(attach, pipe):
    mixture = attach({"fox": "fox", "ink": "fox", "hat": "owl"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe(PROMPT, num_inference_steps=1, output_type="latent")
    text = now(mixture).acting_tokens[-1]
    assert torch.equal(text[:, 0], text[:, 1])
    assert not text[list(FOX), 2].any()
    assert text[list(FOX), 0].all()


def test_each_text_is_encoded_with_its_own_masks(attach, pipe):
    """Two texts in one call, whose words stand in other places; the same states as each alone."""
    attach(WORDS)
    texts, found = [PROMPT, "an owl+a fox"], []
    with torch.no_grad():
        for text in (*texts, *texts):
            ids = pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
            found.append(pipe.text_encoder(ids)[0])
    alone = []
    for text in texts:
        attach(WORDS)
        with torch.no_grad():
            alone.append(pipe.text_encoder(pipe.tokenizer(text, padding="max_length", return_tensors="pt").input_ids)[0])
    for one, other in zip(found, alone * 2, strict=True):
        assert torch.equal(one, other)


def test_negative_prompts_are_read_by_their_own_words(attach, pipe):
    mixture = attach(WORDS)
    pipe(PROMPT, negative_prompt="an owl", num_inference_steps=1, output_type="latent")
    negative, positive = now(mixture).acting_tokens.float()
    torch.testing.assert_close(positive, own_words())
    assert not negative[list(range(3, 6)), 0].any()  # the owl's word there
    assert negative[:, 0].sum() == len(negative) - 3
    assert negative[:, 1].all()


def test_states_of_elsewhere_are_not_bound_and_say_so(attach, pipe):
    attach(HALVES)
    before = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    for states in (torch.randn(1, 16, 16), before):
        mixture = attach(HALVES)
        with pytest.warns(UserWarning, match="words are not known, .* before LoRAs or gates were last attached"):
            pipe(prompt_embeds=states, num_inference_steps=1, output_type="latent", guidance_scale=1)
        assert now(mixture).acting_tokens is None


def test_a_call_with_states_keeps_nothing_of_the_last_encoded_text(attach, pipe):
    attach(WORDS)
    house = pipe.encode_prompt("a house", "cpu", 1, False)[0]

    def drawn():
        noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
        return pipe(prompt_embeds=house, latents=noise, num_inference_steps=1, output_type="latent", guidance_scale=1).images

    before = drawn()
    pipe(PROMPT, num_inference_steps=1, output_type="latent", guidance_scale=1)
    assert torch.equal(drawn(), before)


def test_weighted_words_are_found_by_their_direction(attach, pipe):
    mixture = attach(WORDS)
    embeds, _ = pipe.encode_prompt(PROMPT, "cpu", 1, False)
    pipe(prompt_embeds=1.3 * embeds, num_inference_steps=1, output_type="latent", guidance_scale=1)
    torch.testing.assert_close(now(mixture).acting_tokens[0].float(), own_words())


def test_a_long_prompt_is_read_in_parts(attach, pipe):
    mixture = attach(WORDS)
    parts = [pipe.encode_prompt(text, "cpu", 1, False)[0] for text in ("a house", PROMPT)]
    pipe(prompt_embeds=torch.cat(parts, 1), num_inference_steps=1, output_type="latent", guidance_scale=1)
    text = now(mixture).acting_tokens[0].float()
    torch.testing.assert_close(text[16:], own_words())
    assert text[:16].all()


@pytest.mark.thorough
def test_clip_skip_finds_the_words(attach, pipe):
    mixture = attach(WORDS)
    pipe(PROMPT, clip_skip=1, num_inference_steps=1, output_type="latent", guidance_scale=1)
    torch.testing.assert_close(now(mixture).acting_tokens[0].float(), own_words())


def test_bound_is_for_a_block_and_bind_stays(attach, pipe, draw):
    mixture = attach(None)
    unbound = draw(pipe, PROMPT)
    with mixture.bound(HALVES):
        inside = draw(pipe, PROMPT)
        assert mixture.binding["fox"].region == "left"
    assert mixture.binding is None
    assert torch.equal(draw(pipe, PROMPT), unbound)
    mixture.bind(HALVES)
    assert torch.equal(draw(pipe, PROMPT), inside)
    mixture.bind(None)
    assert torch.equal(draw(pipe, PROMPT), unbound)
    with pytest.raises(ValueError, match="region of 'fox'"):
        mixture.bind({"fox": ("fox", "nowhere")})
    assert mixture.binding is None


def test_gates_learn_under_binding(attach, pipe, awake):
    """Gradients reach the gates through the masks, and nothing else."""
    mixture = awake(attach(WORDS, "mole"))
    ids = pipe.tokenizer(PROMPT, padding="max_length", return_tensors="pt").input_ids
    text = pipe.text_encoder(ids)[0]
    pipe.unet(torch.randn(1, 4, 16, 16), torch.tensor([10]), text).sample.square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in mixture.parameters())
    assert all(p.grad is None for n, p in pipe.unet.named_parameters() if "lora_" in n)


def test_detach_is_exact_after_bound_pictures(attach, pipe, draw):
    before = draw(pipe, PROMPT)
    attach(HALVES)
    draw(pipe, PROMPT)
    mole.detach(pipe)
    assert torch.equal(draw(pipe, PROMPT), before)


def test_a_prompt_that_loses_its_words_midway_silences_their_experts(attach, pipe):
    """Guidance's rows stand beside it, so it is no negative prompt of a call of its own."""
    mixture = attach(IN_A_FOLDER, names=("fox", "ink"))
    prompt, empty = pipe.encode_prompt("a tree", "cpu", 1, True, "")

    def change(pipe, step, timestep, kwargs):
        return {"prompt_embeds": torch.cat([empty, prompt])} if step == 0 else {}

    with pytest.warns(UserWarning, match="'fox' is inactive"):
        pipe(PROMPT, num_inference_steps=3, output_type="latent", callback_on_step_end=change,
             callback_on_step_end_tensor_inputs=["prompt_embeds"])  # fmt: skip
    assert now(mixture).inactive.experts == (True, True)


@pytest.mark.thorough
def test_an_encoder_without_a_tokenizer_has_no_words_of_another(tmp_path):
    pipe, _ = hosts.HOSTS["sdxl"]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    ids = torch.tensor([pipe.tokenizer(PROMPT, padding="max_length").input_ids])
    pipe.tokenizer_2 = None
    mole.attach(pipe, files, binding=None)
    unbound = pipe.text_encoder_2(ids)[0]
    mole.attach(pipe, files, binding={"fox": "fox", "ink": "cat"})
    pipe.text_encoder(ids)
    assert torch.equal(pipe.text_encoder_2(ids)[0], unbound)


def test_what_has_no_place_is_named(attach, pipe):
    attach({"fox": "fox", "ink": "owl"}, names=("fox", "ink"))
    with pytest.warns(UserWarning, match="'fox' and 'owl' got no places of their own"):
        pipe(PROMPT, num_inference_steps=1, output_type="latent")


@pytest.mark.thorough
def test_averages_of_several_prompts_count_each(attach, pipe):
    mixture = attach(IN_A_FOLDER, names=("fox", "ink"))
    found = []
    for prompts in (["a fox", "an owl"], ["an owl", "a fox"]):
        averages = Averages()
        with warnings.catch_warnings(), mixture.parts.listen(averages):
            warnings.simplefilter("ignore")
            evaluate_gates(pipe, mixture.parts.components, prompts)
        found.append({key: weights for key, weights in averages.weights.items() if key[0].startswith("unet")})
    for (place, present), weights in found[0].items():
        torch.testing.assert_close(weights, 0.5 * torch.tensor(present))
        torch.testing.assert_close(weights, found[1][place, present])


class OneEncoder:
    """A plan in which some experts do not act on some components."""

    def __init__(self, absent, count):
        self.absent, self.count = absent, count

    def part(self, part):
        return [0.0 if (part, k) in self.absent else 1.0 for k in range(self.count)]

    def block(self, module):
        return [1.0] * self.count

    def gates(self, place):
        return None


@pytest.mark.parametrize("name", ["sdxl", *thorough("sd3")])
@pytest.mark.shows("binding with `prompt_2`")
def test_words_of_a_second_prompt_are_found_in_its_own_text(name, tmp_path):
    """The other route: an expert is off by hand in the encoder whose text has none of its words."""
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    options |= {"guidance_scale": 1.0, "prompt_2": "a fox"}
    mixture = mole.attach(pipe, files, binding=IN_A_FOLDER | {"ink": "everywhere"})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that it is inactive, say
        bound = hosts.draw(pipe, options, "a hen")
    mixture.bind({"ink": IN_A_FOLDER["ink"]})  # in neither text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = hosts.draw(pipe, options, "a hen")
    mixture.bind(None)
    with mixture.planned(OneEncoder({("text_encoder", 0)}, 2)):
        torch.testing.assert_close(bound, hosts.draw(pipe, options, "a hen"), atol=1e-5, rtol=0)
    with mixture.planned(OneEncoder({("text_encoder", 0)}, 2)), mixture.strengths({"ink": 0}):
        torch.testing.assert_close(alone, hosts.draw(pipe, options, "a hen"), atol=1e-5, rtol=0)
    assert not torch.allclose(bound, hosts.draw(pipe, options, "a hen"), atol=1e-4)


@pytest.mark.parametrize("gates", ["sum", "factors"])
def test_weights_by_hand_know_which_texts_of_a_batch_have_whose_words(attach, pipe, gates):
    mixture = attach({"fox": "fox", "ink": "owl"}, gates, names=("fox", "ink"))

    def encoded(*texts):
        ids = pipe.tokenizer(list(texts), padding="max_length", max_length=16, return_tensors="pt").input_ids
        with torch.no_grad(), mixture.planned(PlainSum(2)):
            return pipe.text_encoder(ids)[0]

    both = encoded("a fox", "an owl")
    torch.testing.assert_close(both, torch.cat([encoded("a fox"), encoded("an owl")]), atol=1e-5, rtol=0)
    with mixture.bound(None):
        assert not torch.allclose(both, encoded("a fox", "an owl"), atol=1e-4)


@pytest.mark.parametrize("name", ["sdxl", *thorough("sd3")])
@pytest.mark.shows("binding with `prompt_2`")
def test_words_of_two_prompts_share_the_tokens_of_both(name, tmp_path):
    pipe, options = hosts.HOSTS[name]()
    files = {n: tiny_lora(pipe, tmp_path / f"{n}.safetensors", seed=i) for i, n in enumerate(("fox", "ink"))}
    mixture = mole.attach(pipe, files, binding=IN_A_FOLDER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hosts.draw(pipe, options | {"prompt_2": "a fox"}, "an owl", steps=3)
        assert not mixture.layouts[0].regions  # neither prompt lists them
        own = now(mixture).acting_tokens[1].clone()
        hosts.draw(pipe, options | {"prompt_2": "an owl"}, "a fox", steps=3)
        assert torch.equal(now(mixture).acting_tokens[1], own)  # whichever text has which
        hosts.draw(pipe, options, "an owl", steps=1)
        assert now(mixture).inactive.experts == (True, False)
    fox, owl = {2, 3, 4}, {3, 4, 5}
    for k, others in ((0, owl - fox), (1, fox - owl)):
        assert (~own[:, k]).nonzero().flatten().tolist() == sorted(others)
