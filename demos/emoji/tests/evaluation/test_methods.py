"""Methods: every composer is what its name says, and leaves nothing behind."""

import json
import re
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from drawn_methods import CASE, OPTIONS, by_hand, drawn, settings_of, setup_of
from hosts import sdxl
from tiers import thorough

import mole_diffusers as mole
import mole_world
import rivals
from mole_diffusers import safe_files
from mole_diffusers.inspection.compare import sample
from mole_diffusers.merging.merge import METHODS as MERGE_METHODS
from mole_world import emoji_world
from mole_world.evaluation import emoji_protocol, methods
from mole_world.evaluation.runner import Case, add_idle_experts
from mole_world.evaluation.strength_search import VALUES, best_weights, search_methods

WEIGHTS = {"subject x style": {"subject": 0.7, "style": 1.3}}
KNOWN = methods.METHODS | rivals.METHODS


@pytest.fixture
def setup(pipe, loras):
    return setup_of(pipe, loras)


@pytest.fixture
def gates(setup, tmp_path, awake):
    """A folder of gates for the case, as training would leave it."""
    awake(mole.attach(setup.pipe, {n: setup.experts[n] for n in CASE.concepts}, "mole")).save_pretrained(
        tmp_path / "fox+ink"
    )
    mole.detach(setup.pipe)
    return tmp_path


def made(names, setup, gates=None):
    """All methods of these names, of which none lacks anything."""
    setup = replace(setup, gates=gates, searched=WEIGHTS)
    found, lacking = methods.chosen_methods(names, setup, known=KNOWN)
    assert not lacking
    return found


@pytest.mark.parametrize(
    "names",
    [tuple(a for a in KNOWN if a == "svd" or a not in methods.MERGES), *thorough((KNOWN,))],
    ids=["one merge", "all"],
)
def test_every_method_draws_its_own_picture_and_gives_the_pipeline_back(setup, gates, names):
    before = drawn(setup, methods.base())
    chosen = made(names, setup, gates)
    assert {a.name for a in chosen} == {*names, *(f"alone {n}" for n in setup.experts)} - {"alone"}
    pictures = {a.name: drawn(setup, a)[0] for a in chosen if a.covers(CASE)}
    assert set(pictures) == {a.name for a in chosen} - {"alone hat"}
    assert drawn(setup, methods.base()) == before
    json.dumps([dict(a.settings(setup, CASE)) for a in chosen if a.covers(CASE)])
    # The same by definition: a subject without a rival; equal gates that sum to N, and one whose words are attended
    # everywhere, as random weights do; and the first of turns of five steps.
    alike = (
        ("bound", "words only", "tiles", "freefuse"),
        ("sum", "gates uniform", "masked blend"),
        ("alone fox", "switch", "w-switch"),
    )
    twins = {frozenset(pair) for group in alike for pair in combinations(group, 2)}
    names = list(pictures)
    same = {frozenset((a, b)) for i, a in enumerate(names) for b in names[i + 1 :] if pictures[a] == pictures[b]}
    assert same <= twins


def test_other_words_in_a_file_are_another_row_for_the_methods_that_read_them(setup, gates):
    unread = ("sum", "gates", "svd", "switch")
    named = (*unread, "bound", "words only", "tiles", "bound gates", "masked blend", "freefuse", "w-switch", "w-composite")
    chosen = made(named, setup, gates)
    before = {a.name: dict(a.settings(setup, CASE)) for a in chosen}
    assert not any("words" in settings for settings in before.values())  # each LoRA's word is its name
    setup.experts = {**setup.experts, "fox": replace(setup.experts["fox"], triggers=("vixen",))}
    after = {a.name: dict(a.settings(setup, CASE)) for a in chosen}
    assert [name for name in named if after[name] != before[name]] == list(named[len(unread) :])


def test_weights_other_than_1_are_in_the_row(setup):
    """They depend on the styles, too, which no row states."""
    searched = methods.searched({"subject x style": {"subject": 1.0, "style": 1.0}})
    ones = (
        methods.summed(),
        methods.in_tiles(),
        methods.merged("svd"),
        methods.weighted("s", methods.by_role(1, 1)),
        searched,
    )
    assert not any("expert_weights" in settings_of(setup, method) for method in ones)
    assert settings_of(setup, methods.mean())["expert_weights"] == {"fox": 0.5, "ink": 0.5}
    for method in (methods.weighted("s", methods.by_role(0.5, 1.5)), methods.merged("svd", "s", methods.by_role(0.5, 1.5))):
        seen = []
        for styles in ({"ink"}, set(), {"hat"}):
            setup.styles = frozenset(styles)
            seen.append((drawn(setup, method), settings_of(setup, method)))
        assert seen[0][0] != seen[1][0]
        assert seen[0][1] != seen[1][1]
        assert seen[1] == seen[2]


def test_merges_protect_the_style_and_take_strengths(setup):
    experts = {n: setup.experts[n] for n in CASE.concepts}
    kept = mole.merge(experts, "np", protect=["ink"])
    assert drawn(setup, methods.merged("np")) == by_hand(setup, {"m": kept})
    turned = Case(("ink", "fox"), CASE.kind, CASE.prompt)  # the style is known by name, not by place
    assert drawn(setup, methods.merged("np"), turned) != drawn(
        setup, methods.merged("np", weights=methods.by_role(1.0, 0.2)), turned
    )
    weak = mole.merge({"fox": (experts["fox"], 0.4), "ink": (experts["ink"], 1.6)}, "svd")
    method = methods.merged("svd", "weak", methods.by_role(0.4, 1.6))
    assert method.name == "weak"
    assert drawn(setup, method) == by_hand(setup, {"m": weak})


def test_a_search_sets_strengths_by_kind_and_role(setup):
    method = methods.searched(WEIGHTS)
    wanted = by_hand(setup, {n: setup.experts[n] for n in CASE.concepts}, lambda m: m.fixed({"fox": 0.7, "ink": 1.3}))
    assert drawn(setup, method) == wanted
    assert not method.covers(Case(("fox", "hat"), "two subjects", ""))


def test_idle_experts_are_attached_and_named(setup):
    case = Case(("fox",), "single", CASE.prompt, idle=("ink",))
    assert case.name == "fox (ink)"
    assert drawn(setup, methods.summed(), case) == drawn(setup, methods.summed())


def test_averaged_gates_stand_still_and_keep_guidance_rows_apart(setup, gates):
    folder = methods.gates_of(gates)
    method = methods.weighted("gates averaged", gates=folder, context=methods.averaged)
    with method.draws(setup, CASE), mole.attached(setup.pipe).trace() as trace:
        sample(setup.pipe, CASE.prompt, [3, 4], **OPTIONS)
    place = "unet.mid_block.attentions.0.transformer_blocks.0"
    first, second = (w for name, _, w in trace.records if name == place)
    assert torch.equal(first, second)
    assert torch.equal(first[0], first[1])
    assert torch.equal(first[2], first[3])
    assert not torch.allclose(first[0], first[2], atol=1e-4)
    with methods.weighted("gates", gates=folder).draws(setup, CASE) as mixture, mixture.trace() as live:
        sample(setup.pipe, CASE.prompt, [0], **OPTIONS)  # as the pictures are drawn
    at = torch.stack([w for name, _, w in live.records if name == place])  # [steps, 2, N]
    assert len(at) == OPTIONS["num_inference_steps"]
    torch.testing.assert_close(first[[0, 2]], at.mean(0))


def pixels(setup, method):
    with method.draws(setup, CASE):
        return sample(setup.pipe, CASE.prompt, [3], output_type="pt", **setup.options)


def scaled(expert, strength):
    layers = {
        part: {key: replace(weights, scale=weights.scale * strength) for key, weights in found.items()}
        for part, found in expert.layers.items()
    }
    return replace(expert, layers=layers, sha256=f"{expert.sha256} at {strength}")


@pytest.mark.thorough
def test_the_users_strengths_reach_every_method(setup, gates):
    """A strength of 1.6 draws what the same LoRA scaled by 1.6 draws, by every composer."""
    setup.options = OPTIONS | {"num_inference_steps": 1}
    alike = {*methods.MERGES} - {"svd", "ssr"} | {"gates uniform", "gates random", "gates hardened"}  # as those that stay
    names = [name for name in KNOWN if name not in alike]
    chosen = [method for method in made(names, setup, gates) if method.covers(CASE)]
    plain = {method.name: pixels(setup, method) for method in chosen}
    setup.strengths = {"fox": 1.6, "hat": 0.3}
    strong = {method.name: pixels(setup, method) for method in chosen}
    assert settings_of(setup, methods.summed())["strengths"] == {"fox": 1.6, "ink": 1.0}
    assert "strengths" not in settings_of(setup, methods.alone("ink"))
    setup.strengths, setup.experts = {}, setup.experts | {"fox": scaled(setup.experts["fox"], 1.6)}
    for method in chosen:
        torch.testing.assert_close(strong[method.name], pixels(setup, method), atol=2e-3, rtol=0, msg=method.name)
        assert torch.equal(strong[method.name], plain[method.name]) == (method.name in ("base", "alone ink")), method.name


def test_what_cannot_be_drawn_is_known_before(setup, gates):
    made(KNOWN, setup, gates)
    setup.prompts["hat"].clear()
    setup.pipe = sdxl()
    found, lacking = methods.chosen_methods(KNOWN, setup, known=KNOWN)
    assert {said.split("'")[1] for said in lacking} == {
        "ssr", "regmean", "iteris", "scalars", "switch", "composite", "masked blend", "freefuse", "grid search",
        "w-switch", "w-composite", "loratorio", *methods.CONTROLS, "bound gates"
    }  # fmt: skip
    assert not {method.name for method in found} & {said.split("'")[1] for said in lacking}
    assert "'ssr' cannot be drawn: no prompts for expert 'hat'; there are some for ['fox', 'ink']" in lacking
    assert "'freefuse' needs a unet and one text encoder, unlike StableDiffusionXLPipeline" in lacking
    moved, lacking = methods.chosen_methods(["sum", "gates"], setup, shares=[0.5, 1])
    assert [method.name for method in moved] == ["sum @ 0.5", "sum @ 1"]
    assert lacking == ["'gates' needs a folder of trained gates"]


def test_a_merge_that_memory_cannot_hold_is_left_out(setup, monkeypatch):
    monkeypatch.setattr(safe_files.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    found, lacking = methods.chosen_methods(["sum", "dare", "svd", "ties"], setup)
    assert [method.name for method in found] == ["sum", "svd"]
    assert re.fullmatch(
        r"'dare' cannot be drawn: a merge by 'dare' without a rank takes \d+ bytes, more than the 1000 bytes .*", lacking[0]
    )
    assert lacking[1].startswith("'ties' ")


def test_a_file_adds_methods_of_its_own(setup, tmp_path):
    lines = ["from mole_world.evaluation.methods import by_role, weighted"]
    lines += ['METHODS = {"weak": weighted("weak", by_role(0.4, 0.4))}']
    (tmp_path / "weak_methods.py").write_text("\n".join(lines))
    others = methods.methods_from(tmp_path / "weak_methods.py")
    (weak,), _ = methods.chosen_methods(["weak"], setup, known=methods.METHODS | others)
    wanted = by_hand(setup, {n: setup.experts[n] for n in CASE.concepts}, lambda m: m.fixed({"fox": 0.4, "ink": 0.4}))
    assert drawn(setup, weak) == wanted
    assert methods.methods_from(None) == {}
    (tmp_path / "no_methods.py").touch()
    for name, why in (
        ("no_methods.py", "no_methods.py has no METHODS"),
        ("missing.py", "cannot be imported: No module named"),
    ):
        with pytest.raises(ValueError, match=why):
            methods.methods_from(tmp_path / name)


def test_rows_say_what_their_pictures_depend_on(setup, gates, monkeypatch):
    """A changed file, option, default, prompt or style is another setting; the same again is the same."""
    everything = lambda: {a.name: settings_of(setup, a) for a in made(KNOWN, setup, gates)}  # noqa: E731
    before = everything()
    assert everything() == before
    trained = {"gates", "gates uniform", "gates random", "gates hardened", "gates averaged", "bound gates"}

    def changed():
        now = everything()
        return {name for name, settings in before.items() if now[name] != settings}

    for name in ("gates.safetensors", "config.json"):
        kept = (gates / "fox+ink" / name).read_bytes()
        (gates / "fox+ink" / name).write_bytes(kept + b" ")
        assert changed() == trained
        (gates / "fox+ink" / name).write_bytes(kept)
    own, setup.experts["fox"] = setup.experts["fox"], setup.experts["hat"]
    assert changed() == set(before) - {"base", "alone ink", "alone hat"}
    setup.experts["fox"] = own
    setup.prompts["ink"].append("ink")
    assert changed() == {"ssr", "regmean", "iteris", "scalars"}
    setup.prompts["ink"].pop()
    setup.styles = frozenset()
    assert changed() == {"np", "masked blend", "freefuse", "grid search"}
    setup.styles = frozenset({"ink"})
    monkeypatch.setitem(MERGE_METHODS["np"].__kwdefaults__, "mu", 0.25)
    monkeypatch.setattr(rivals, "ALPHA", 1.0)
    assert changed() == {"np", "k-lora"}


def test_a_merge_says_the_defaults_of_its_options(setup):
    settings = settings_of(setup, methods.merged("dare"))
    assert {name: settings[name] for name in ("method", "rank", "drop", "elect", "seed")} == {
        "method": "dare", "rank": None, "drop": 0.9, "elect": False, "seed": 0
    }  # fmt: skip


def row(kind, subject, style, *seen):
    settings = {"subject": subject, "style": style}
    method = f"sum ({subject:g}, {style:g})"
    return {"kind": kind, "method": method, "settings": settings, "seen": dict(enumerate(seen)), "success": all(seen)}


def test_the_best_weights_win_by_success_then_by_what_is_seen_then_by_nearness_to_1():
    rows = [
        row("a", 0.5, 0.5, True, False), row("a", 0.5, 1.1, True, True), row("a", 1.1, 0.5, False, False),
        row("b", 0.5, 0.5, False, False), row("b", 1.1, 0.5, True, False), row("b", 1.1, 1.1, False, False),
        row("c", 0.5, 0.5, True), row("c", 0.9, 0.9, True),
        {"kind": "a", "method": "base", "settings": {}, "seen": {"x": True}, "success": True},
    ]  # fmt: skip
    assert best_weights(rows) == {
        "a": {"subject": 0.5, "style": 1.1}, "b": {"subject": 1.1, "style": 0.5}, "c": {"subject": 0.9, "style": 0.9}
    }  # fmt: skip
    with pytest.raises(ValueError, match="no rows of a grid search"):
        best_weights(rows[-1:])


def test_the_grid_covers_styles_only_where_there_is_one(setup):
    tried = search_methods(setup)
    assert len(tried) == len(VALUES) ** 2
    assert sum(method.covers(CASE) for method in tried) == len(VALUES) ** 2
    assert sum(method.covers(Case(("fox", "hat"), "pair", "")) for method in tried) == len(VALUES)
    assert drawn(setup, search_methods(setup, [1.0])[0]) == drawn(setup, methods.summed())


def test_the_world_knows_its_styles():
    assert emoji_protocol.setup(emoji_world(), OPTIONS).styles == set(mole_world.words.HELD_OUT_STYLES)


def test_moved_strengths_go_from_subjects_to_styles(setup, gates):
    chosen, _ = methods.chosen_methods(["sum", "svd", "gates"], replace(setup, gates=gates), shares=[0.25, 1.0])
    assert [a.name for a in chosen] == [f"{n} @ {s}" for n in ("sum", "svd", "gates") for s in ("0.25", "1")]
    experts = {n: setup.experts[n] for n in CASE.concepts}
    assert drawn(setup, chosen[0]) == by_hand(setup, experts, lambda m: m.fixed({"fox": 1.5, "ink": 0.5}))
    weak = mole.merge({"fox": (experts["fox"], 1.5), "ink": (experts["ink"], 0.5)}, "svd")
    assert drawn(setup, chosen[2]) == by_hand(setup, {"m": weak})
    with chosen[4].draws(setup, CASE):
        mixture = mole.attached(setup.pipe)
        assert [mixture.strength(n) for n in CASE.concepts] == [1.5, 0.5]
    with pytest.raises(ValueError, match=r"the strengths of \['base'\] cannot be moved"):
        methods.chosen_methods(["base"], setup, shares=[0.5])
    with pytest.raises(ValueError, match="a share must be from 0 to 1, got 2"):
        methods.chosen_methods(["sum"], setup, shares=[2])


def test_crowds_grow_to_the_number_asked_for():
    pool = ("a", "b", "c", "d", "e")
    found = add_idle_experts([Case(("a", "b"), "pair", "p"), Case(("a", "b", "c"), "three", "q")], pool, (2, 4, 9))
    assert [(len(c.experts), c.concepts) for c in found] == [(2, ("a", "b")), (4, ("a", "b")), (4, ("a", "b", "c"))]
    assert all(len(set(c.experts)) == len(c.experts) for c in found)
    pair = Case(("a", "b"), "pair", "p")
    assert add_idle_experts([pair], ("a", "b"), (2, 3)) == [pair]  # nobody is left to stand by
    with pytest.raises(ValueError, match=r"no case can have \[1, 6\] experts attached: it has more, or there are only 5"):
        add_idle_experts([pair], pool, (6, 1))
