"""Tags in a prompt, and the strengths that reach the layers because of them."""

import re

import pytest
import torch
from tiers import thorough

from mole_app.studio.block_weights import block_names, block_weights, layouts
from mole_app.studio.prompt_syntax import LoraTag, constant, parse
from mole_app.studio.strength_schedule import StrengthSchedule
from mole_diffusers import GateConfig, attach, detach


def strengths(text, part="unet", steps=5):
    (tag,) = parse(text).tags
    return [round(tag.strength(part, step, steps), 3) for step in range(steps)]


def test_a_tag_leaves_the_text_and_says_a_strength():
    parsed = parse("a fox <lora:fox:0.8>, in ink <lora:ink>")
    assert parsed.text == "a fox , in ink"
    assert [(tag.name, tag.te, tag.unet) for tag in parsed.tags] == [
        ("fox", constant(0.8), constant(0.8)),
        ("ink", constant(1.0), constant(1.0)),
    ]


@pytest.mark.parametrize(
    ("text", "te", "unet"),
    [
        ("<lora:x:0.5:0.9>", [0.5] * 5, [0.9] * 5),  # A1111: text encoder, then UNet
        ("<lora:x:te=0.2:unet=-7>", [0.2] * 5, [-7] * 5),
        ("<lora:x:unet=2>", [1] * 5, [2] * 5),
        ("<lora:x:1:start=3>", [1] * 5, [0, 0, 0, 1, 1]),
        ("<lora:x:1:stop=2>", [1] * 5, [1, 1, 0, 0, 0]),
        ("<lora:x:1:step=1-3>", [1] * 5, [0, 1, 1, 0, 0]),
        ("<lora:x:0@0,1@1>", [0] * 5, [0, 0.25, 0.5, 0.75, 1]),
        ("<lora:x:1:unet=0~0.5;1~1>", [1] * 5, [0, 0, 0, 0.5, 1]),
        ("<lora:x:1:unet=1@0,0@2>", [1] * 5, [1, 0.5, 0, 0, 0]),  # the last point is over 1, so they are steps
        ("<lora:x:1:unet=0@0,1@1,0.2@3>", [1] * 5, [0, 1, 0.6, 0.2, 0.2]),
        ("<lora:x:1:unet=0@2,1@1>", [1] * 5, [1, 1, 0, 0, 0]),  # in any order
        ("<lora:x:1@1>", [1] * 5, [1] * 5),  # one point holds everywhere
    ],
)
def test_strength_by_part_and_step(text, te, unet):
    assert strengths(text, "text_encoder") == te
    assert strengths(text, "unet") == unet


@pytest.mark.parametrize(
    "text",
    [
        "<lora:x:1:word=a fox|foxes:region=top left>",
        "<lora:x:1:region=0,0,0.5,1>",
        "<lora:x:0.5:unet=0@0,1@0.4:lbw=OUTD:start=1:stop=4>",
        "<lora:a b.v1:-1.5>",
        "<lora:x:1:lbw=1,0,0.5>",
    ],
)
def test_writing_a_tag_and_reading_it_again_gives_the_same_tag(text):
    (tag,) = parse(text).tags
    assert parse(str(tag)).tags == (tag,)


def test_a_tag_says_words_and_a_region():
    assert parse("<lora:x:1>").tags[0].binding is None
    assert parse("<lora:x:1:word=a fox|foxes>").tags[0].binding == (["a fox", "foxes"], "auto")
    assert parse("<lora:x:region=0,0,0.5,1>").tags[0].binding == (None, (0.0, 0.0, 0.5, 1.0))
    assert parse("<lora:x:0.8:word=fox:region=left>").tags[0].binding == (["fox"], "left")
    assert parse("<lora:x:region=everywhere>").tags[0].binding == "everywhere"


def test_names():
    assert parse("<lora:style.v1.5.safetensors:1>").tags[0].name == "style.v1.5"
    assert parse("<lora:a:b:0.5>", known=["a", "a:b"]).tags[0] == LoraTag("a:b", constant(0.5), constant(0.5))
    spaced = LoraTag("my fox ", constant(0.5), constant(0.5))
    assert parse(str(spaced), known=["my fox "]).tags == (spaced,)
    assert parse("<lora: my fox :0.5>", known=["my fox"]).tags[0].name == "my fox"
    assert parse("I <3 foxes > cats").text == "I <3 foxes > cats"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<hypernet:x:1>", "the only tag is <lora:NAME:STRENGTH>"),
        ("<lora:x:big>", "'big' is not a number"),
        ("<lora:x:nan>", "'nan' is not a finite number"),
        ("<lora:x:-1e7>", "<lora:x:-1e7>: '-1e7' is not in -1e+06..1e+06"),
        ("<lora:x:1:unet=0@0,1e39@1>", "'1e39' is not in -1e+06..1e+06"),
        ("<lora:x:1:1:IN02>", "'IN02' is one number too many; other arguments are named: te, unet, lbw"),
        ("<lora:x:1:hr=1>", "unknown argument 'hr'; known: te"),
        ("<lora:x:1:step=3>", "is not FIRST-LAST"),
        ("<lora:x:1:step=1-3:start=2>", "step= already says"),
        ("<lora:x:1:start=-1>", "a step is a whole number"),
        ("<lora:x:1,0@0.2>", "is not a list of STRENGTH@POINT"),
        ("<lora:x:1,2>", "is not a list of STRENGTH@POINT"),
        ("<lora:x:1@-1>", "a point is 0 or more"),
        ("<lora::1>", "names no LoRA"),
        ("<lora:x:1:region=nowhere>", "the region of 'x' is 'nowhere'; a region is 'auto'"),
        ("<lora:x:1:region=mask.png>", "the region of 'x' is 'mask.png'"),  # a stranger's prompt opens no file
        ("<lora:x:1> <lora:x:2>", "two tags for 'x'"),
        ("<lora:x:1:te=.5:te=1>", "te= is there twice"),
        ("a fox <lora:fox:1, and a hat", "the tag '<lora:fox:1, and a hat' is not read; a tag is <lora:NAME:STRENGTH>"),
        ("a fox < lora:fox:1>", "the tag '< lora:fox:1>' is not read"),
        ("a fox <LoRA fox:1>", "the tag '<LoRA fox:1>' is not read"),
    ],
)
def test_bad_tags_are_one_clear_error(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(text)


def test_sd15_has_the_17_and_26_blocks_that_artists_know():
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=8, block_out_channels=(8, 8, 8, 8), norm_num_groups=2)
    short, whole = layouts(unet)
    assert " ".join(short) == (
        "BASE IN01 IN02 IN04 IN05 IN07 IN08 M00 OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 OUT11"
    )
    assert len(whole) == 26
    names = block_names(unet)
    assert (names["down_blocks.0.downsamplers.0"], names["down_blocks.3.resnets.1"]) == ("IN03", "IN11")
    assert (names["up_blocks.1.attentions.2"], names["up_blocks.0.upsamplers.0"]) == ("OUT05", "OUT02")
    assert [label for label, w in block_weights("MIDD", unet).items() if w] == (
        ["BASE", "IN05", "IN07", "IN08", "M00", "OUT03", "OUT04", "OUT05", "OUT06"]
    )
    assert block_weights("1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0", unet) == block_weights("ins", unet)
    assert block_weights("ALL0.5", unet) == {name: 0.5 * (name in short) for name in whole}  # off where no attention is
    assert set(block_weights("0.5", unet).values()) == {0.5}
    assert list(block_weights("0.5", unet)) == whole
    for bad in ("1,2", "nan", "ALLinf", f"{'1,' * 16}nan"):
        with pytest.raises(ValueError, match=r"not a preset .*\(17\) or .*\(26\)"):
            block_weights(bad, unet)


def drawn(pipe, draw, mixture, tags, steps=3):
    plan = StrengthSchedule(list(mixture.experts), parse(tags).tags, unet=pipe.unet, steps=steps)
    with mixture.parts.planned(plan):
        return draw(pipe, num_inference_steps=steps, callback_on_step_end=plan.on_step())


@pytest.mark.parametrize("gates", [*thorough("sum"), "mole"])
def test_plain_numbers_are_the_mixtures_strengths(pipe, loras, draw, gates):
    mixture = attach(pipe, {"fox": (loras["fox"], 0.6), "ink": (loras["ink"], -0.4)}, gates)
    expected = draw(pipe, num_inference_steps=3)
    mixture = attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]}, gates)
    assert torch.equal(drawn(pipe, draw, mixture, "<lora:fox:0.6> <lora:ink:-0.4>"), expected)
    with mixture.fixed({"fox": 1, "ink": 1}):  # the plain sum has the same strengths
        summed = drawn(pipe, draw, mixture, "<lora:fox:0.6> <lora:ink:-0.4>")
    assert torch.allclose(summed, expected, atol=1e-5)  # mole gates start at the plain sum
    detach(pipe)


def test_parts_and_blocks_are_those_of_a_lora_cut_to_size(pipe, loras, draw, tmp_path):
    """Block weights on one LoRA with convolutions give what a file with the same layers scaled gives."""
    from safetensors.torch import load_file, save_file

    tensors, names = load_file(loras["hat"]), block_names(pipe.unet)
    weights = {label: round(1 - 0.2 * i, 1) for i, label in enumerate(layouts(pipe.unet)[1])}
    lbw = ",".join(f"{w:g}" for w in weights.values())
    for key in tensors:
        if "lora_B" in key:
            part, _, module = key.partition(".")
            label = next((v for k, v in names.items() if part == "unet" and module.startswith(f"{k}.")), "BASE")
            tensors[key] = tensors[key] * weights.get(label, 1.0) * (0.5 if part == "text_encoder" else 2.0)
    save_file(tensors, tmp_path / "cut.safetensors")
    attach(pipe, {"hat": tmp_path / "cut.safetensors"})
    expected = draw(pipe, num_inference_steps=3)
    for gates in (GateConfig("sum"), GateConfig("mole", granularity="model")):
        mixture = attach(pipe, {"hat": loras["hat"]}, gates)
        assert torch.allclose(drawn(pipe, draw, mixture, f"<lora:hat:0.5:2:lbw={lbw}>"), expected, atol=1e-5)
    detach(pipe)


def test_an_expert_that_stops_is_absent_and_the_gates_share_among_the_others(pipe, loras, draw):
    mixture = attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]}, "mean")
    with mixture.trace() as trace:
        drawn(pipe, draw, mixture, "<lora:fox:1:stop=1> <lora:ink:unet=1@0,0.5@1>")
    place = next(p for p in trace.locations if p.startswith("unet.mid_block") and "(" not in p)
    assert torch.allclose(trace.weights(place), torch.tensor([[0.5, 0.5], [0, 0.75], [0, 0.5]]))
    detach(pipe)


def test_a_locked_gate_says_what_it_was_told(pipe, loras, draw):
    mixture = attach(pipe, {"fox": loras["fox"], "ink": loras["ink"]}, "mean")
    place = "unet.mid_block.attentions.0.transformer_blocks.0"
    tags = parse("<lora:fox:2> <lora:ink>").tags
    plan = StrengthSchedule(["fox", "ink"], tags, unet=pipe.unet, steps=2, locks={place: {"fox": 0.1, "ink": 0.9}})
    with mixture.parts.planned(plan), mixture.trace() as trace:
        draw(pipe, callback_on_step_end=plan.on_step())
    assert torch.allclose(trace.weights(place)[-1], torch.tensor([0.2, 0.9]))
    detach(pipe)


def test_a_tag_without_its_expert_is_an_error(pipe):
    with pytest.raises(ValueError, match=r"no expert for the tag <lora:owl:1>; there are \['fox'\]"):
        StrengthSchedule(["fox"], parse("<lora:owl>").tags, unet=pipe.unet, steps=2)
