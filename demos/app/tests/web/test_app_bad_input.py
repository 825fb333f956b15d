"""What must not be done, for every endpoint of the app: one clear sentence, and the app goes on."""

import asyncio
import json
import shutil
import struct
import tempfile
import threading
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from app_client import PROMPT, RECIPE, built
from PIL import Image
from tiny import tiny_lora

from mole_app.studio.recipe import Recipe
from mole_diffusers.lora import read_expert
from mole_diffusers.lora.families import check_family
from mole_diffusers.mixture import attach

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")


def test_nothing_from_a_file_becomes_html():
    import gradio

    from mole_app.web.sentences import errors_to, markdown, problem

    evil = '<img src="http://x/y.png" onerror=alert(1)>'
    assert problem(ValueError(evil)) == f"**{markdown(evil)}**"
    assert "went wrong" in problem(RuntimeError("secret"))

    status = gradio.Markdown(render=False)

    @errors_to(status)
    def fails():
        raise ValueError(evil)

    assert fails() == {status: problem(ValueError(evil))}
    assert markdown("![a](b) <i>") == "\\!\\[a\\]\\(b\\) \\<i\\>"


def test_uploads(client, pipe, tmp_path):
    file = tiny_lora(pipe, tmp_path / "owl & co.safetensors", rank=3)
    report = client.predict(gradio_client.handle_file(file), api_name="/upload")
    assert (report["name"].startswith("owl"), report["ranks"]) == (True, "3")
    again = shutil.copy(file, tmp_path / "another name.safetensors")
    assert client.predict(gradio_client.handle_file(again), api_name="/upload") == report  # the same file
    assert "another name" not in [one["name"] for one in client.predict(api_name="/loras")]
    long = tiny_lora(pipe, tmp_path / f"{'x' * 79} y.safetensors", seed=8)
    assert client.predict(gradio_client.handle_file(long), api_name="/upload")["name"] == "x" * 79


def test_what_is_refused_leaves_nothing_and_overwrites_nothing(loras, pipe, tmp_path, monkeypatch):
    import hosts

    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions
    from mole_app.web.loras import Loras

    actions = Actions(Studio(pipe, Catalog(dict(loras), {}), "tiny"), home=tmp_path / "gates")

    def sent(name, data):
        path = tmp_path / "sent" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        return path

    good = tiny_lora(pipe, tmp_path / "good.safetensors", seed=9).read_bytes()
    with monkeypatch.context() as patch:  # it is read once
        patch.delattr("mole_app.studio.catalog.read_expert")
        assert actions.loras.add(sent("owl.safetensors", good)) == "owl"
        assert actions.studio.catalog.expert("owl").sha256 == read_expert(tmp_path / "good.safetensors").sha256
    other = tiny_lora(pipe, tmp_path / "other.safetensors", seed=10).read_bytes()
    kept = {path: path.read_bytes() for path in actions.home.rglob("*") if path.is_file()}
    assert [path.name for path in kept] == ["owl.safetensors"]
    for name, data, message in (
        ("owl.safetensors", other, "already another LoRA 'owl'"),
        ("OWL.safetensors", other, "already another LoRA 'OWL'"),
        ("Fox.safetensors", other, "already another LoRA 'Fox'"),
        ("new.safetensors", other[:-1], "new.safetensors is damaged or truncated"),
        ("page.safetensors", b"<html>", "page.safetensors is an HTML page"),
    ):
        path = sent(name, data)
        with pytest.raises(ValueError, match=message) as error:
            actions.loras.add(path)
        assert str(tmp_path) not in str(error.value)
        assert not path.exists()
    flux = sent("flux.safetensors", tiny_lora(hosts.HOSTS["flux"]()[0], tmp_path / "f.safetensors").read_bytes())
    with pytest.raises(ValueError, match="flux.safetensors: it is made for Flux and this pipeline is SD 3"):
        Loras(Studio(hosts.HOSTS["sd3"]()[0], Catalog({}, {}), "sd3"), actions.folder / "more").add(flux)
    assert not flux.exists()
    for files in ([sent("a.safetensors", b"x"), sent("a.json", b"{}")], [sent("b.json", b"{}"), sent("c.json", b"{}")]):
        with pytest.raises(ValueError):  # noqa: PT011
            actions.add_gates(files, "x")
        assert not any(path.exists() for path in files)
    assert {path: path.read_bytes() for path in actions.home.rglob("*") if path.is_file()} == kept
    assert [path.name for path in actions.home.iterdir()] == [".loras"]


def test_uploads_have_a_limit_together(loras, pipe, tmp_path, monkeypatch):
    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio
    from mole_app.web import files
    from mole_app.web.actions import Actions
    from mole_diffusers.gates import GATE_CONFIG, GATE_WEIGHTS

    actions = Actions(Studio(pipe, Catalog(dict(loras), {}), "tiny"), home=tmp_path / "gates")
    sent = [tiny_lora(pipe, tmp_path / f"{name}.safetensors", seed=i + 9) for i, name in enumerate(("owl", "cat"))]
    attach(pipe, loras, "mole").save_pretrained(tmp_path / "mine")
    gates = [tmp_path / "mine" / name for name in (GATE_WEIGHTS, GATE_CONFIG)]
    monkeypatch.setattr(files, "MOST_KEPT", sent[0].stat().st_size)
    assert actions.loras.add(sent[0]) == "owl"
    for add in (lambda: actions.loras.add(sent[1]), lambda: actions.add_gates(gates, "mine")):
        with pytest.raises(ValueError, match="there is no room: uploads take at most 0 GiB here"):
            add()
    assert [path.name for path in actions.home.rglob("*") if path.is_file()] == ["owl.safetensors"]
    assert not any(path.exists() for path in (sent[1], *gates))


def test_uploads_stay_and_files_that_are_copied_are_found(loras, pipe, tmp_path):
    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions
    from mole_app.web.files import export_gates
    from mole_app.web.jobs import ignore

    def started():
        (tmp_path / "library").mkdir(exist_ok=True)
        library = {"fox": shutil.copy(loras["fox"], tmp_path / "library")}
        catalog = Catalog({name: Path(file) for name, file in library.items()}, {})
        return Actions(Studio(pipe, catalog, "tiny"), home=tmp_path / "gates")

    first, sent = started(), tiny_lora(pipe, tmp_path / "owl.safetensors", seed=9)
    content = sent.read_bytes()
    assert first.loras.add(sent) == "owl"
    attach(pipe, loras, "mole").save_pretrained(tmp_path / "owl")
    first.studio.catalog.add_gates("owl", tmp_path / "owl")
    export_gates(first.studio.catalog, "owl", first.new_folder())
    exported = first.export(Recipe("an owl <lora:owl:1>", width=32, height=32))(ignore)
    assert exported.path.name == "owl.safetensors"
    again = started()
    assert list(again.studio.catalog.loras) == ["fox", "owl"]
    assert again.studio.catalog.loras["owl"].read_bytes() == content
    assert again.loras.look_for_new() == []
    for name in ("hat", "OWL"):
        shutil.copy(loras["hat"], tmp_path / "library" / f"{name}.safetensors")
    assert again.loras.look_for_new() == ["library/OWL", "hat"]
    assert again.studio.catalog.name("hat") == "hat"
    assert again.loras.look_for_new() == []
    others = [tmp_path / side / "library" / "hat.safetensors" for side in ("left", "right")]
    for other in others:
        other.parent.mkdir(parents=True)
        shutil.copy(loras["hat"], other)
    assert again.studio.catalog.find_loras([other.parent for other in others]) == [
        "library/hat",
        str(others[1].with_suffix("")),
    ]


def test_two_uploads_of_one_name_at_once_overwrite_nothing(loras, pipe, tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions

    actions = Actions(Studio(pipe, Catalog(dict(loras), {}), "tiny"), home=tmp_path / "gates")
    both = threading.Barrier(2)

    def slowly(*given):
        with suppress(threading.BrokenBarrierError):  # where they come one after the other
            both.wait(0.5)
        return check_family(*given)

    monkeypatch.setattr("mole_app.web.loras.check_family", slowly)
    sent = []
    for i in range(2):
        (tmp_path / str(i)).mkdir()
        sent.append(tiny_lora(pipe, tmp_path / str(i) / "owl.safetensors", seed=i + 9))
    content = [path.read_bytes() for path in sent]
    with ThreadPoolExecutor(2) as threads:
        ends = [threads.submit(actions.loras.add, path) for path in sent]
    said = [str(end.exception()) for end in ends if end.exception()]
    assert said == ["there is already another LoRA 'owl'; rename the file"]
    (first,) = (i for i, end in enumerate(ends) if not end.exception())
    assert actions.studio.catalog.loras["owl"].read_bytes() == content[first]


def test_a_lora_that_cannot_be_read_hides_no_other(loras, tmp_path):
    """In the list, which keeps no weights in memory, and among the cards."""
    from mole_app.web.mixer_cards import cards_of

    (tmp_path / "cut.safetensors").write_bytes(loras["fox"].read_bytes()[:-10])
    files = {"fox": loras["fox"], "cut": tmp_path / "cut.safetensors", "gone": tmp_path / "gone.safetensors"}
    blocks = built(files, tmp_path / "app")
    (listed,) = [event.fn for event in blocks.fns.values() if event.fn and event.fn.__name__ == "loras"]
    fox, cut, gone = asyncio.run(listed())
    assert (fox["layers"], fox["problem"], gone["problem"]) == (40, "", "no LoRA file at gone.safetensors")
    assert cut["problem"].startswith("cut.safetensors is damaged or truncated")
    (add,) = [one for one in blocks.blocks.values() if getattr(one, "elem_id", None) == "add"]
    assert [label for label, _ in add.choices] == ["fox", "cut (cannot be read)", "gone (cannot be read)"]
    text = "a fox <lora:fox:1> <lora:cut:1> <lora:gone:1>"
    (cards,) = [one for one in blocks.default_config.renderables if one.fn.__name__ == "draw"]
    with blocks:
        made = cards_of(text, [], files)
        cards.fn({"cards": made, "at": 0}, text, made, [])
    facts = [one.value for one in blocks.blocks.values() if getattr(one, "elem_classes", None) == ["facts"]]
    assert facts[0].startswith("for this base, matched **40 of 40** layers, rank 4, hash ")
    assert [fact.startswith("**refused:**") for fact in facts] == [False, True, True]
    folded = [one.open for one in blocks.blocks.values() if getattr(one, "elem_classes", None) == ["rest"]]
    assert folded == [False, True, True]  # what is wrong with them is in view


def test_what_is_only_listed_stays_in_no_memory(loras):
    from mole_app.studio.catalog import Catalog

    catalog = Catalog(loras, {})
    first = catalog.expert("fox", keep=False)
    assert catalog.expert("fox") is not first
    assert catalog.expert("fox", keep=False) is catalog.expert("fox")


def test_loras_and_gates_that_come_while_a_list_is_read_break_nothing(loras, pipe, tmp_path, monkeypatch):
    from mole_app.studio import catalog as catalog_module
    from mole_app.studio.catalog import Catalog
    from mole_app.studio.render import Studio
    from mole_app.web.actions import Actions
    from mole_diffusers.gates import load_gates

    file = tiny_lora(pipe, tmp_path / "owl.safetensors", seed=9)
    attach(pipe, {name: loras[name] for name in ("fox", "ink")}, "mole").save_pretrained(tmp_path / "old")
    actions = Actions(Studio(pipe, Catalog(dict(loras), {"old": tmp_path / "old"}), "tiny"), home=tmp_path / "gates")
    catalog, misfit, load = actions.studio.catalog, actions.studio.misfit, load_gates

    def meanwhile(name):
        if "owl" not in catalog.loras:
            catalog.add_lora("owl", file)
        return misfit(name)

    def trained(folder):
        if "new" not in catalog.gates:
            attach(pipe, {name: loras[name] for name in ("fox", "hat")}, "mole").save_pretrained(tmp_path / "new")
            catalog.add_gates("new", tmp_path / "new")
        return load(folder)

    monkeypatch.setattr(actions.studio, "misfit", meanwhile)
    monkeypatch.setattr(catalog_module, "load_gates", trained)
    assert [name for _, name in actions.loras.choices()] == list(loras)
    assert [name for _, name in actions.loras.choices()] == [*loras, "owl"]
    assert catalog.gates_for(["fox", "ink"]) == "old"
    assert catalog.gates_for(["fox", "hat"]) == "new"


def test_a_message_has_no_temporary_folder_and_no_library():
    from mole_app.web.mixer_cards import cards_of
    from mole_app.web.sentences import without_folders

    inside = f"{tempfile.gettempdir()}/gradio/0123/my file.safetensors"
    assert (
        without_folders(f"{inside} is broken, '{inside}' too") == "my file.safetensors is broken, 'my file.safetensors' too"
    )
    for path in ("/home/me/models/x.safetensors", "C:\\Users\\me\\x.safetensors", "C:\\\\Users\\\\me\\\\x.safetensors"):
        assert without_folders(f"no file at {path}; and ({path}) is '{path}'") == (
            "no file at x.safetensors; and (x.safetensors) is 'x.safetensors'"
        )
    for plain in ("there is no LoRA '../../etc'", "known: people/fox, ink", "and/or 1/2", "OWNER/NAME", "https://x.org/y/z"):
        assert without_folders(plain) == plain
    with pytest.raises(ValueError, match="there is no LoRA 'owi'") as error:
        cards_of("<lora:owi:1>", [], {f"lora {i}": None for i in range(500)} | {"owl": None})
    assert "owl" in str(error.value)
    assert len(str(error.value)) < 200


BLENDED = {"prompt": "<lora:fox:1>"}, "one", {"fox": ["a fox"]}, ["fox"], 2
BAD = [
    ("find", (5,), "prompt of find must be a text, got 5"),
    ("find", ("<hypernet:x:1>",), "the only tag is <lora:NAME:STRENGTH>"),
    ("compose", ("x <lora:owl:1>",), "there is no LoRA 'owl'; known: fox"),
    ("compose", ("x <lora:fox:very>",), "'very' is not a number"),
    ("compose", ("x <lora:fox:1:lbw=1,2>",), "lbw=1,2 is not a preset"),
    ("compose", ("x <lora:fox:0@0,1@-1>",), "a point is 0 or more"),
    ("compose", ("x <lora:fox:nan>",), "'nan' is not a finite number"),
    ("compose", ("x <lora:../../etc/passwd:1>",), "there is no LoRA '../../etc/passwd'"),
    ("compose", {"prompt": "x", "seed": -5}, "seed must be in -1.."),
    ("compose", {"prompt": "x", "steps": "many"}, "steps of a recipe must be a whole number, got 'many'"),
    ("compose", {"prompt": "x", "guidance": 99.0}, "guidance must be in"),
    ("compose", {"prompt": "x", "gates": "../../etc"}, "there are no gates '../../etc'"),
    ("compose", {"prompt": "x", "count": 1000}, "the number of pictures must be in 1..16"),
    ("compose", {"prompt": "x", "count": "two"}, "count of compose must be a whole number"),
    ("compose", ("y" * 6000,), "at most 5000 characters"),
    (
        "grid",
        ({"prompt": "x", "width": 2048, "height": 2048, "steps": 150}, "seed=1,2,3", "guidance=1,2"),
        "times what one job may take: 6 pictures of 2048",
    ),
    ("redraw", ({"prompt": "<lora:fox:1:region=painted>"},), "the region of 'fox' is painted, but the recipe has no mask"),
    ("redraw", ({"prompt": "<lora:fox:1:region=painted>", "masks": {"fox": "png:AAAA"}},), "a PNG in base64"),
    ("redraw", ({"prompt": "x", "masks": {"fox": "x" * 600_000}},), "of at most 512 KiB"),
    ("redraw", ({"prompt": "x", "masks": ["x"]},), "masks of a recipe must be names, each with a text"),
    ("redraw", ({"prompt": "x", "width": 4000},), "at most 2048"),
    ("redraw", ({"seed": 1},), "prompt of a recipe must be a text"),
    ("redraw", ({"prompt": "x", "colour": 1},), "unknown fields ['colour']"),
    ("redraw", (["x"],), "recipe of redraw must be an object"),
    ("redraw", ({"prompt": "<lora:fox:1>", "experts": {"fox": "0" * 64}},), "with hash 000000000000 is not here"),
    ("redraw", ({"prompt": "<lora:fox:1>", "locks": {"unet.mid_block": "all"}},), "locks"),
    ("look", ({"prompt": "x"},), "there is nothing to see"),
    ("compare", ({"prompt": "x"},), "there is nothing to compare"),
    ("redraw", ({"prompt": "x", "prompt_2": "<lora:fox:1>"},), "stand in the first prompt"),
    ("compare", ({"prompt": "x", "arm": "worst"},), "unknown arm 'worst'"),
    ("compare", (RECIPE, ["best"]), "unknown merge 'best'; known: mean, svd"),
    ("compare", (RECIPE, "svd"), "merges of compare must be a list of texts"),
    ("compare", ({"prompt": "<lora:fox:1:stop=1>"}, ["svd"]), "one LoRA has one strength"),
    ("grid", (RECIPE, "weight fox", "seed=1"), "is not KIND=VALUE"),
    ("grid", (RECIPE, 5, "seed=1"), "x of grid must be a text"),
    ("grid", (RECIPE, "seed=" + ",".join("1" * 500), "steps=4"), "is too large"),
    ("grid", (RECIPE, "gates=../x", "seed=1"), "there are no gates '../x'"),
    ("train", (RECIPE, "one", {"fox": ["a fox"]}, ["fox"] * 64, 2), "at most 64 prompts"),
    ("train", (RECIPE, "one", {"fox": ["a fox"]}, ["x" * 5001], 2), "of at most 5000 characters each"),
    ("train", (RECIPE, "one", {"fox": ["y" * 5001]}, ["fox"], 2), "of at most 5000 characters each"),
    ("train", ({**RECIPE, "width": 4096}, "one", {"fox": ["a fox"]}, ["fox"], 2), "at most 2048 pixels a side, got 4096"),
    (
        "train",
        (RECIPE, "one", {"fox": ["a fox"]}, ["fox"], 2, [], "flow", "collage", "both"),
        "again is one of continue, overwrite",
    ),
    ("compose", {"prompt": "x", "sampler": "Best"}, "unknown sampler 'Best'"),
    ("base", ("other",), "there is no base model 'other'; known: tiny"),
    ("base", (None,), "name of base must be a text, got None"),
    ("gallery", (5,), "text of gallery must be a text"),
    ("favourite", ("../x.png",), "there is no picture '../x.png'"),
    ("code", ({"prompt": "x", "sampler": "Best"},), "unknown sampler 'Best'"),
    ("export", ({"prompt": "x"},), "nothing to export"),
    ("export", (RECIPE, -1), "rank"),
    ("export", (RECIPE, "full"), "rank of export must be a whole number"),
    ("export", ({"prompt": "<lora:fox:1:stop=1>"},), "one LoRA has one strength"),
    ("train", (RECIPE, "../up", {}, [], 2), "a name has letters"),
    ("train", (RECIPE, "sum", {}, [], 2), "is the name of a gate type"),
    ("train", BLENDED, "gates weigh two LoRAs or more"),
    ("train", (RECIPE, "one", {}, [], 2), "a collage needs a prompt for each subject"),
    (
        "train",
        (RECIPE, "one", {"fox": "a fox"}, ["x"], 2),
        "singles of a training must be names, each with a list of texts, got",
    ),
    ("train", (RECIPE, "one", {}, "x", 2), "composed of a training must be a list of texts, got 'x'"),
    ("train", (RECIPE, "one", {}, [], 10**6), "the number of updates must be in"),
    ("train", (RECIPE, "one", {"fox": ["x"]}, ["x"], 2, [], "best"), "unknown gate type 'best'; known: factors"),
    (
        "train",
        (RECIPE, "one", {"fox": ["x"]}, ["x"], 2, [], "flow", "by heart"),
        "unknown way 'by heart'",
    ),
    ("read", ("/etc/passwd",), "send the file itself"),
    ("read", ({"path": __file__, "url": None, "orig_name": "x"},), "send the file itself"),
    ("upload", ({"path": "/etc/passwd", "url": None, "orig_name": "x"},), "send the file itself"),
    ("download_gates", ("../../etc",), "there are no trained gates '../../etc'"),
    ("download_gates", (None,), "name of download_gates must be a text"),
    ("upload_gates", ("/etc/passwd", "/etc/passwd"), "send the file itself"),
]


def refused(client, name, *arguments):
    """The sentence with which an endpoint refuses."""
    with pytest.raises(gradio_client.exceptions.AppError) as error:
        client.predict(*arguments, api_name=f"/{name}")
    return str(error.value)


def test_bad_input_gets_one_sentence_and_the_app_goes_on(client, tmp_path):
    def sent(arguments):
        return ((), arguments) if isinstance(arguments, dict) else (arguments, {})

    calls = [(name, *sent(arguments)) for name, arguments, _ in BAD]
    jobs = [client.submit(*args, **kwargs, api_name=f"/{name}") for name, args, kwargs in calls]
    for job, (name, arguments, message) in zip(jobs, BAD, strict=True):
        assert message in str(job.exception()), (name, arguments)
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert {f"/{name}" for name, _, _ in BAD} == set(named) - {"/loras", "/gates", "/bases"}  # these take nothing
    assert len(client.predict(PROMPT, api_name="/compose")[0]) == 1


FILES = {
    "page.safetensors": b"<!DOCTYPE html><script>alert(1)</script>",
    "half.safetensors": (1 << 40).to_bytes(8, "little") + b"{}",
    "pickle.safetensors": b"\x80\x04\x95" + bytes(60),
    "zip.safetensors": b"PK\x03\x04" + bytes(60),
    "pointer.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
    "none.safetensors": b"",
    "text.json": b"not JSON",
    "deep.json": b"[" * 10**6,
    "other.json": b'{"format": "something else"}',
}


def header(width, height):
    """A PNG that claims a size and ends."""
    chunks = b""
    for kind, data in ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b"")):
        chunks += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return b"\x89PNG\r\n\x1a\n" + chunks


def test_bad_files_get_one_sentence(client, tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (8, 8)).save(tmp_path / "none.png")
    (tmp_path / "wide.png").write_bytes(header(60000, 60000))
    sent = {path.name: gradio_client.handle_file(path) for path in tmp_path.iterdir()}
    for name in (name for name in FILES if name.endswith(".safetensors")):
        assert name in (said := refused(client, "upload", sent[name]))
        assert "/" not in said
    for name in ("none.png", "wide.png", "text.json", "deep.json", "other.json"):
        assert name in (said := refused(client, "read", sent[name]))
        assert str(tmp_path) not in said
    assert "one .safetensors and one .json" in refused(client, "upload_gates", sent["none.png"], sent["wide.png"])
    assert client.predict(api_name="/gates") == []


def test_a_recipe_file_is_read(client, tmp_path):
    (tmp_path / "r.json").write_text(json.dumps({**Recipe(PROMPT, steps=2, width=32, height=32).to_dict()}))
    assert client.predict(gradio_client.handle_file(tmp_path / "r.json"), api_name="/read")[0]["prompt"] == PROMPT
