"""Pictures of ComfyUI, SwarmUI, Fooocus and InvokeAI: what their text says becomes a recipe, and what it cannot is named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from mole_diffusers.lora.safe_files import RefusedFileError, parse_json
from mole_diffusers.studio.comfy_workflow import api_graph, recipe_of_graph, workflow_graph
from mole_diffusers.studio.found_recipe import (
    DRAWN_OVER,
    FoundRecipe,
    Lora,
    as_number,
    as_text,
    as_whole,
    found_recipe,
    stem,
)


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
