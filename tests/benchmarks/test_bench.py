"""What `python -m benchmarks` measures, at tiny size: what needs no clock, and that every arm is what it says."""

import json
import runpy
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from tiers import thorough

import mole_diffusers as mole
from benchmarks import clock, hosts, once, settings, steps
from benchmarks.__main__ import COUNTED, main, parser
from benchmarks.arms import ARMS, entered, own_pipeline, twin
from benchmarks.hosts import inputs, lora_files
from benchmarks.steps import operation_counts

SUM = mole.GateConfig("sum")


@pytest.fixture
def outputs(pipe, tmp_path):
    """outputs(arms, gates) -> what a step of each arm gives; the host must end as it began."""

    @torch.no_grad()
    def run(arms, gates=SUM):
        files, given = lora_files(pipe.unet, tmp_path, 2, rank=4), inputs(pipe, pixels=64)
        bits, found = {k: v.clone() for k, v in pipe.unet.state_dict().items()}, {}
        for arm in arms:
            with ExitStack() as stack:
                found[arm] = entered(stack, arm, own_pipeline(arm, pipe), files, gates, given)()[0]
        assert all(torch.equal(v, bits[k]) for k, v in pipe.unet.state_dict().items())
        assert set(bits) == set(pipe.unet.state_dict())
        return found

    return run


@pytest.mark.parametrize(
    ("arms", "experts"), [(["mole", "flow", "bound sum"], [3]), *thorough((list(COUNTED), [3, 8]))], ids=["some", "all"]
)
def test_the_page_has_the_operations_of_this_code(arms, experts):
    page = json.loads((Path(__file__).parents[2] / "docs/speed/operations.json").read_text())["rows"]
    counted = operation_counts(settings.Settings(size="thin", rank=4, pixels=64), arms, experts)
    asked = [row for row in page if row["arm"] in ("base", *arms) and row["experts"] in (0, *experts)]
    assert [asdict(row) for row in counted] == asked


def test_every_arm_of_equal_gates_computes_the_same_step(outputs):
    found = outputs([arm for arm in ARMS if arm not in ("mole", "flow") and not arm.startswith("bound")])
    base = found.pop("base")
    assert torch.equal(found.pop("again"), base)
    for arm, y in found.items():
        assert (y - base).abs().max() > 1e-3, arm
        torch.testing.assert_close(y, found["set_adapters"], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("arm", ["bound sum", "bound mole"])
def test_what_is_bound_has_words_places_and_closed_words(pipe, tmp_path, arm):
    files, given = lora_files(pipe.unet, tmp_path, 2, rank=4), inputs(pipe, pixels=32)
    with ExitStack() as stack:
        step = entered(stack, arm, pipe, files, SUM, given)
        step()
        mixture = mole.attached(pipe)
        assert [mask.mean().item() for mask in mixture.layouts[0].regions.values()] == [0.5, 0.5]
        bound = step()[0]
        with mixture.bound(None):
            assert (step()[0] - bound).abs().max() > 1e-4
    mole.detach(pipe)


@pytest.mark.thorough
def test_gates_of_the_arms_depend_on_what_they_read(outputs):
    found, same = outputs(["gated", "mole", "flow"]), outputs(["gated"], mole.GateConfig("mole"))["gated"]
    assert (found["mole"] - found["gated"]).abs().max() > 1e-4
    assert (found["flow"] - found["gated"]).abs().max() > 1e-4
    assert torch.equal(same, found["mole"])


def test_the_thin_host_has_sd15s_modules():
    thin = hosts.SIZES["thin"].build(torch.float32).unet
    with torch.device("meta"):
        real = type(thin)(sample_size=64, cross_attention_dim=768)
    assert [(n, type(m)) for n, m in thin.named_modules()] == [(n, type(m)) for n, m in real.named_modules()]


@pytest.mark.thorough
def test_dispatch_measures_the_families(capsys):
    assert main(["--what", "dispatch", "--experts", "2", "--repeats", "1", "--threads", "1", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    gated = ["sum", "mole", "flow", "factors", "bound sum", "bound mole"]
    assert [r["arm"] for r in rows] == ["base", "again", "set_adapters", *gated]


def test_a_twin_shares_the_weights_but_those_it_owns(pipe):
    where = {name: p.data_ptr() for name, p in pipe.unet.named_parameters()}
    for own in (False, True):
        other = dict(twin(pipe, own=own).unet.named_parameters())
        kept = {name for name, p in other.items() if p.data_ptr() == where[name]}
        assert {n for n in where if n not in kept} == {n for n in where if own and n.endswith(ENDS)}


ENDS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")


def test_rounds_take_turns_and_ratios_are_by_round():
    order: list[str] = []
    times = clock.interleaved({name: lambda n=name: order.append(n) or 1.0 for name in "abc"}, repeats=3)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"
    assert {len(t) for t in times.values()} == {3}
    middle, low, high = clock.ratio([2, 6, 8, 5, 9], [1, 2, 2, 1, 3])  # 2, 3, 4, 5, 3
    assert (middle, low, high) == (3, 3, 4)


def test_published_sizes(monkeypatch):
    monkeypatch.setattr(hosts, "random_weights", lambda build, **_: _on_meta(build))
    assert sum(p.numel() for p in hosts.SIZES["sd15"].build(torch.float32).unet.parameters()) == 859_520_964
    big = hosts.SIZES["sdxl"].build(torch.float32)
    assert sum(p.numel() for p in big.unet.parameters()) == 2_567_463_684
    assert sum(p.numel() for p in big.text_encoder_2.parameters()) == 694_659_840


def _on_meta(build):
    with torch.device("meta"):
        return build()


def test_random_weights_are_made_where_and_as_they_are_used():
    made = hosts.random_weights(lambda: torch.nn.Linear(3, 2), torch.bfloat16, "meta")
    assert {(p.dtype, p.device.type) for p in made.parameters()} == {(torch.bfloat16, "meta")}
    one, other = (hosts.random_weights(lambda: torch.nn.Linear(3, 2), torch.float32, "cpu") for _ in range(2))
    assert torch.equal(one.weight, other.weight)
    assert torch.get_default_dtype() == torch.float32


def test_the_command(capsys):
    small = ["--repeats", "1", "--arms", "set_adapters", "gated", "--experts", "1", "2", "--threads", "1"]
    assert main([*small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [(r["arm"], r["experts"]) for r in result["rows"]] == [
        ("base", 0),
        ("set_adapters", 1),
        ("gated", 1),
        ("set_adapters", 2),
        ("gated", 2),
    ]
    assert result["rows"][0]["ratio"] == 1
    assert all(r["ms"] > 0 and r["low"] <= r["ratio"] <= r["high"] for r in result["rows"])
    assert result["machine"] == "1 CPU threads"
    assert main([*small, "--experts", "1", "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["arm", "experts", "ms", "ratio", "low", "high"]


@pytest.mark.parametrize(
    ("what", "arms"),
    [
        *thorough(("attach", ["load", "attach"]), ("collapse", ["30 steps", "collapse static", "collapse prompt"])),
        ("update", ["base", "update"]),
        ("moving", ["step", "others"]),
    ],
)
def test_what_is_paid_once(what, arms, capsys):
    small = ["--what", what, "--repeats", "2", "--experts", "2", "--threads", "1", "--clock", "cpu"]
    assert main([*small, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["arm"] for r in result["rows"]] == arms
    assert result["rows"][0]["ratio"] == 1
    for row in result["rows"]:
        assert len(row["seconds"]) == 2
        assert row["ms"] == pytest.approx(500 * sum(row["seconds"]))


def test_attaching_and_folding_are_undone_between_rounds(pipe, tmp_path):
    files, bits = lora_files(pipe.unet, tmp_path, 2, rank=4), {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    small = settings.Settings(repeats=1)
    given = inputs(pipe, pixels=32)
    for measured in (once.attaching, once.collapsing):
        for measure in measured(small, pipe, given, files).values():
            assert measure() > 0
    assert mole.attached(pipe) is None
    assert all(torch.equal(v, bits[k]) for k, v in pipe.unet.state_dict().items())


@pytest.mark.thorough
def test_memory_over_the_base(capsys):
    small = ["--what", "memory", "--experts", "1", "4", "--arms", "set_adapters", "gated", "--threads", "1"]
    assert main([*small, "--json"]) == 0
    rows = {(r["arm"], r["experts"]): r for r in json.loads(capsys.readouterr().out)["rows"]}
    one, four = rows["gated", 1], rows["gated", 4]
    assert four["own"] == 4 * one["own"]
    pipe = hosts.SIZES["tiny"].build(torch.float32)
    layers = sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name, _ in pipe.unet.named_modules())
    kept = layers * 2 * pipe.tokenizer.model_max_length * 3 * 16 * 4  # A x of two texts, for three more LoRAs
    assert 0.9 < (four["over"] - one["over"] - kept) / (four["own"] - one["own"]) < 1.8
    assert rows["set_adapters", 4]["over"] > 0.9 * rows["set_adapters", 4]["own"]
    assert main([*small, "--experts", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["arm", "experts", "over", "own", "ratio"]


@pytest.mark.thorough
@pytest.mark.parametrize("compile", ["whole", "graphs", "blocks"])
def test_compiled(compile, capsys):
    small = ["--repeats", "1", "--arms", "set_adapters", "gated", "--experts", "2", "--threads", "1", "--json"]
    assert main([*small, "--compile", compile]) == 0
    assert [r["arm"] for r in json.loads(capsys.readouterr().out)["rows"]] == ["base", "set_adapters", "gated"]


def test_what_is_not_known_is_said(capsys):
    assert main(["--experts", "0"]) == 1
    assert "must be 1 or more, got [0]" in capsys.readouterr().err
    assert main(["--pixels", "100"]) == 1
    assert "a multiple of 64" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--dtype", "int8"])
    assert "invalid choice: 'int8'" in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.parametrize(("what", "first"), [("scaling", "base"), ("picture", "open, diffusers"), ("cold", "cold, script")])
def test_curves_and_pictures(what, first, capsys, monkeypatch):
    monkeypatch.setattr(steps, "CURVES", {"experts": (1, 2), "rank": (4,), "pictures": (2,), "steps": (3,)})
    small = ["--what", what, "--experts", "2", "--repeats", "1", "--pixels", "64", "--threads", "1", "--json"]
    assert main(small) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert (rows[0]["arm"], rows[0]["ratio"]) == (first, 1)
    assert all(row["ms"] > 0 for row in rows)
    if what == "scaling":
        assert {(row["curve"], row["at"]) for row in rows} == {
            ("experts", 1),
            ("experts", 2),
            ("rank", 4),
            ("pictures", 2),
            ("steps", 3),
        }


def test_every_file_of_the_page_can_be_measured_again():
    docs = Path(__file__).parents[2] / "docs"
    runs = runpy.run_path(str(docs / "make_speed.py"))["RUNS"]
    kept = {path.stem for path in (docs / "speed").glob("*.json")}
    assert kept - {"reuse"} <= set(runs)  # that is of benchmarks/reuse.py
    for argv in runs.values():
        assert parser().parse_args([*argv, "--json"]).json


@pytest.mark.gpu
@torch.no_grad()
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("arm", ["sum", "mole", "flow", "bound mole"])
def test_a_step_waits_for_no_card(arm, dtype):
    small = settings.Settings(size="thin", dtype=dtype, rank=4, device="cuda")
    with small.host([3]) as (pipe, given, files), ExitStack() as stack:
        step = entered(stack, arm, pipe, files[3], SUM, given)
        for _ in range(3):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("arm", ["gated", "bound mole"])
def test_memory_on_a_gpu(dtype, arm, capsys):
    given = ["--what", "memory", "--size", "sd15", "--dtype", dtype, "--experts", "8", "--arms", arm, "--device", "cuda"]
    assert main([*given, "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    text = 9e6  # keys and values of it, and what the experts make of it first
    closed = 17e6 if arm == "bound mole" else 0  # words outside of their places, for each head, at four sizes
    assert row["over"] <= 1.05 * (row["own"] + text + closed)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("compile", ["no", "whole", "graphs", "blocks"])
def test_on_a_gpu(compile, dtype, capsys):
    arms = ["set_adapters", "gated", "collapsed"]
    given = ["--size", "sd15", "--dtype", dtype, "--experts", "3", "8", "--arms", *arms, "--device", "cuda"]
    assert main([*given, "--compile", compile, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["machine"] == torch.cuda.get_device_name("cuda")
    ratios = {(r["arm"], r["experts"]): r["ratio"] for r in result["rows"]}
    assert all(ratios["gated", n] < ratios["set_adapters", n] for n in (3, 8)), ratios
