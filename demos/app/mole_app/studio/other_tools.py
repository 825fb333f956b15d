"""Pictures of ComfyUI, SwarmUI, Fooocus and InvokeAI: what their text says becomes a recipe, and what it cannot is named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mole_app.studio.found_recipe import (
    DRAWN_OVER,
    FoundRecipe,
    Lora,
    as_number,
    as_text,
    as_whole,
    found_recipe,
    stem,
)
from mole_diffusers.safe_files import RefusedFileError, parse_json


def read(texts: Mapping[str, str], where: str) -> FoundRecipe | None:
    """The recipe in the texts of a picture, by name; None if no such program wrote them.

    Raises ValueError for a text of such a program that cannot be read.
    """
    parameters = texts.get("parameters", "")
    if parameters.lstrip().startswith("{"):
        said = _object(parameters, where)
        swarm = said.get("sui_image_params")
        return _swarm(swarm, where) if isinstance(swarm, dict) else _fooocus(said, where)
    if "invokeai_metadata" in texts:
        return _invoke(_object(texts["invokeai_metadata"], where), where)
    graphs = {"prompt": api_graph, "workflow": workflow_graph}
    found = [graphs[name](_object(texts[name], where)) for name in graphs if name in texts]
    return recipe_of_graph(next(filter(None, found), {}), where) if found else None


def _object(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = parse_json(re.sub(r"\b-?(?:NaN|Infinity)\b", "null", text), where)  # ComfyUI writes them
    except RefusedFileError as error:
        raise ValueError(f"the settings in {error}") from error
    return value if isinstance(value, dict) else {}


def _swarm(said: Mapping[str, Any], where: str) -> FoundRecipe:
    names, weights = said.get("loras"), said.get("loraweights")
    if isinstance(names, str):  # older ones have a text with commas
        names, weights = names.split(","), as_text(weights).split(",")
    weights = weights if isinstance(weights, list) else [1] * len(_listed(names))
    return found_recipe(where, said, _everywhere(zip(_listed(names), weights, strict=False)))


def _fooocus(said: Mapping[str, Any], where: str) -> FoundRecipe:
    if not {"prompt", "seed"} <= said.keys():
        raise ValueError(f"{where} has settings of a program that is not known here")
    said, quiet = dict(said), ("vae", *(["styles"] if said.get("full_prompt") else []))  # which has their words
    pairs = [each[:2] for each in _listed(said.get("loras")) if isinstance(each, list) and len(each) > 1]
    known = [stem(as_text(name)) for name, _ in pairs]
    for key in [key for key in said if key.startswith("lora_combined_")]:
        name, _, weight = as_text(said.pop(key)).rpartition(" : ")
        pairs += [] if stem(name) in known else [[name, weight]]
    if len(size := re.findall(r"\d{1,5}", str(said.get("resolution", "")))) == 2:
        said["width"], said["height"] = size
    if as_text(said.get("refiner_model")) in ("", "None"):
        quiet += ("refiner_model", "refiner_switch", "refiner_model_hash")
    return found_recipe(where, {key: value for key, value in said.items() if key not in quiet}, _everywhere(pairs))


def _invoke(said: Mapping[str, Any], where: str) -> FoundRecipe:
    loras = [each for each in _listed(said.get("loras")) if isinstance(each, dict)]
    pairs = [(_named(each.get("model", each.get("lora"))), each.get("weight")) for each in loras]
    lacking = [DRAWN_OVER] if "strength" in said or "init_image" in said else []
    said = {**said, "model": _named(said.get("model")), "sampler": said.get("scheduler"), "scheduler": ""}
    for side in ("positive", "negative"):
        if as_text(said.get(f"{side}_style_prompt")) == as_text(said.get(f"{side}_prompt")):
            said[f"{side}_style_prompt"] = ""
        said[f"{side}_prompt"] = _compel(as_text(said.get(f"{side}_prompt")))
    if (skip := as_whole(said.get("clip_skip"))) is not None:
        said["clip_skip"] = skip + 1  # Invoke counts the layers that are skipped
    return found_recipe(where, said, _everywhere(pairs), lacking)


def _named(model: Any) -> str:
    return as_text(model.get("name", model.get("model_name"))) if isinstance(model, dict) else ""


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _everywhere(pairs: Iterable[Sequence[Any]]) -> Iterator[Lora]:
    """The LoRAs of names and weights, without those whose weight is no number."""
    for name, value in pairs:
        if as_text(name) and (weight := as_number(value)) is not None:
            yield Lora(as_text(name), weight, weight)


def _compel(prompt: str) -> str:
    """InvokeAI's weights, (a fox)1.3 and fox++, as weights here."""

    def stepped(found: re.Match[str]) -> str:
        words, signs = found[1] or found[2], found[3]
        return f"({words}:{(1.1 if signs[0] == '+' else 0.9) ** len(signs):.4g})"

    prompt = re.sub(r"\(([^()]*)\)(\d+(?:\.\d+)?)", r"(\1:\2)", prompt)
    return re.sub(r"(?:\(([^()]*)\)|([\w']+))(\++|-+)(?![\w-])", stepped, prompt)


# ---- ComfyUI


Graph = Mapping[str, Mapping[str, Any]]  # nodes: number -> {"class_type": .., "inputs": {name: value or link}}
WIDGETS: dict[str, tuple[str, ...]] = {  # in a workflow, ComfyUI's nodes have the values of these inputs without their names
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler", "start_at_step"),
    "RandomNoise": ("noise_seed",),
    "KSamplerSelect": ("sampler_name",),
    "BasicScheduler": ("scheduler", "steps", "denoise"),
    "CFGGuider": ("cfg",),
    "FluxGuidance": ("guidance",),
    "CheckpointLoaderSimple": ("ckpt_name",),
    "UNETLoader": ("unet_name",),
    "LoraLoader": ("lora_name", "strength_model", "strength_clip"),
    "LoraLoaderModelOnly": ("lora_name", "strength_model"),
    "CLIPSetLastLayer": ("stop_at_clip_layer",),
    "CLIPTextEncode": ("text",),
    "CLIPTextEncodeSDXL": ("", "", "", "", "", "", "text_g", "text_l"),
    "CLIPTextEncodeFlux": ("clip_l", "t5xxl", "guidance"),
    "EmptyLatentImage": ("width", "height"),
    "EmptySD3LatentImage": ("width", "height"),
    "PrimitiveNode": ("value",),
}
SAMPLING = ("KSampler", "KSamplerAdvanced", "SamplerCustom", "SamplerCustomAdvanced")
QUIET = {  # nodes that a recipe needs nothing of
    *WIDGETS, *SAMPLING, "BasicGuider", "VAEDecode", "VAELoader", "CLIPLoader", "DualCLIPLoader", "TripleCLIPLoader",
    "SaveImage", "PreviewImage", "Note", "MarkdownNote", "Reroute", "ModelSamplingFlux", "ModelSamplingSD3",
    "ConditioningZeroOut",
}  # fmt: skip
POWER_LORAS = "Power Lora Loader"  # of rgthree, with several LoRAs
MOST_NODES = 2000


def api_graph(said: Mapping[str, Any]) -> Graph:
    """The nodes of ComfyUI's "prompt"."""
    return {
        number: {"class_type": as_text(node.get("class_type")), "inputs": node["inputs"]}
        for number, node in list(said.items())[:MOST_NODES]
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
    }


def workflow_graph(said: Mapping[str, Any]) -> Graph:
    """The nodes of ComfyUI's "workflow", of which muted ones (mode 2) and bypassed ones (4) are left out."""
    listed, links = said.get("nodes"), said.get("links")
    if not isinstance(listed, list) or not isinstance(links, list):
        return {}
    known = (link for link in links if isinstance(link, list) and len(link) > 2 and isinstance(link[0], int))
    begins = {link[0]: [str(link[1]), link[2]] for link in known}
    graph: dict[str, dict[str, Any]] = {}
    for node in (node for node in listed[:MOST_NODES] if isinstance(node, dict) and node.get("mode") not in (2, 4)):
        kind, values = as_text(node.get("type")), node.get("widgets_values")
        values = values if isinstance(values, list) else []
        inputs = {name: value for name, value in zip(WIDGETS.get(kind, ()), values, strict=False) if name}
        if kind.startswith(POWER_LORAS):
            inputs |= {f"lora_{i}": value for i, value in enumerate(values) if isinstance(value, dict)}
        slots = node.get("inputs")
        for slot in slots if isinstance(slots, list) else []:
            if isinstance(slot, dict) and isinstance(slot.get("link"), int) and slot["link"] in begins:
                inputs[as_text(slot.get("name"))] = begins[slot["link"]]
        graph[str(node.get("id"))] = {"class_type": kind, "inputs": inputs}
    return graph


def recipe_of_graph(graph: Graph, where: str) -> FoundRecipe:
    """The recipe of the first sampler. Raises ValueError if there is none, and what `found_recipe` raises."""
    samplers = [number for number, node in graph.items() if node["class_type"] in SAMPLING]
    after = {each for each in samplers if any(up in samplers for up in _upstream(graph, each, "latent_image", "samples"))}
    if (first := next((each for each in samplers if each not in after), None)) is None:
        raise ValueError(f"{where} has a ComfyUI workflow without a sampler that is known here: {', '.join(SAMPLING)}")

    def value(*names: str) -> Any:
        """The first of these inputs that the sampler has, or a node that it takes its noise, its steps or the like from."""
        near = [first, *_upstream(graph, first, "noise", "guider", "sampler", "sigmas")]
        values = (_followed(graph, graph[each]["inputs"].get(name), name) for each in near for name in names)
        return next((each for each in values if each is not None), None)

    def prompt(*names: str) -> tuple[str, float | None]:
        guiders = [first, *_linked(graph, first, "guider")]
        return _prompt(graph, next((up for each in guiders for up in _linked(graph, each, *names)), None))

    (positive, guidance), (negative, _) = prompt("positive", "conditioning"), prompt("negative")
    chain, inputs = list(_upstream(graph, first, "model", "guider")), {n: node["inputs"] for n, node in graph.items()}
    latent = list(_upstream(graph, first, "latent_image"))
    empty = (inputs[up] for up in latent if "Empty" in graph[up]["class_type"] and "width" in inputs[up])
    size: Mapping[str, Any] = next(empty, {})
    loader: Mapping[str, Any] = next((inputs[up] for up in chain if {"ckpt_name", "unet_name"} & inputs[up].keys()), {})
    skips = [as_whole(inputs[n].get("stop_at_clip_layer")) for n in graph if graph[n]["class_type"] == "CLIPSetLastLayer"]
    strength = as_number(value("denoise")) or 1.0
    said = {
        "prompt": positive,
        "negative": negative,
        "sampler": value("sampler_name"),
        "scheduler": value("scheduler"),
        "seed": value("seed", "noise_seed"),
        "steps": value("steps"),
        "guidance": value("cfg") if guidance is None else guidance,
        "width": _followed(graph, size.get("width"), "width"),
        "height": _followed(graph, size.get("height"), "height"),
        "strength": strength if 0 < strength < 1 else None,
        "clip_skip": next((min(-skip, 12) for skip in skips if skip is not None and skip < 0), None),
        "model": loader.get("ckpt_name") or loader.get("unet_name"),
    }
    lacking = {1: [], 2: ["the second sampling pass"]}.get(len(samplers), [f"{len(samplers) - 1} more sampling passes"])
    lacking += [DRAWN_OVER] if any("VAEEncode" in graph[up]["class_type"] for up in latent) else []
    kinds = dict.fromkeys(node["class_type"] for node in graph.values())
    others = [f"node {kind}" for kind in kinds if kind and kind not in QUIET and not kind.startswith(POWER_LORAS)]
    return found_recipe(where, said, _loras(graph, chain), [*lacking, *others[:20]])


def _prompt(graph: Graph, start: str | None) -> tuple[str, float | None]:
    """The text of a conditioning, and the guidance of Flux, if it has one; the first of several that are combined."""
    guidance = None
    for up in [] if start is None else [start, *_upstream(graph, start)]:
        node = graph[up]
        if guidance is None and "guidance" in node["inputs"]:
            guidance = as_number(_followed(graph, node["inputs"]["guidance"], "guidance"))
        if node["class_type"] == "ConditioningZeroOut":
            return "", guidance
        for name in ("text", "text_g", "t5xxl", "clip_l", "prompt", "positive"):
            if text := as_text(_followed(graph, node["inputs"].get(name), name)):
                return re.sub(r"\bembedding:\S*[\\/]", "embedding:", text), guidance  # without folders
    return "", guidance


def _loras(graph: Graph, chain: Sequence[str]) -> Iterator[Lora]:
    """The LoRAs on the way of the model, those next to the checkpoint first; without those that are switched off."""
    for up in reversed(chain):
        inputs = graph[up]["inputs"]
        if name := as_text(inputs.get("lora_name")):
            unet = as_number(_followed(graph, inputs.get("strength_model"), "strength_model"))
            te = as_number(_followed(graph, inputs.get("strength_clip"), "strength_clip"))
            if unet or te:
                yield Lora(name, 1.0 if unet is None else unet, te or 0.0)
        for slot in (value for value in inputs.values() if isinstance(value, dict)):  # rgthree's
            unet, te = as_number(slot.get("strength")), as_number(slot.get("strengthTwo"))
            if slot.get("on") and unet is not None and as_text(slot.get("lora")) not in ("", "None"):
                yield Lora(slot["lora"], unet, unet if te is None else te)


def _followed(graph: Graph, value: Any, name: str) -> Any:
    """A value, also if it comes from another node; None if that has none."""
    for _ in range(8):
        if not _is_link(graph, value):
            return value if isinstance(value, str | int | float) else None
        inputs = graph[value[0]]["inputs"]
        names = (name, "value", "text", "string", "seed", "int", "float", "Number", "Text")
        value = next((inputs[each] for each in names if each in inputs), None)
    return None


def _upstream(graph: Graph, number: str, *names: str) -> Iterator[str]:
    """The nodes that one takes its inputs from, near ones first: at first those of these names, further up all."""
    seen, waiting = {number}, list(_linked(graph, number, *names))
    while waiting:
        if (up := waiting.pop(0)) not in seen:
            seen.add(up)
            yield up
            waiting += _linked(graph, up)


def _linked(graph: Graph, number: str, *names: str) -> Iterator[str]:
    for name, value in graph[number]["inputs"].items():
        if (not names or name in names) and _is_link(graph, value):
            yield value[0]


def _is_link(graph: Graph, value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and value[0] in graph
