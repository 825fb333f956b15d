"""Pictures of ComfyUI, SwarmUI, Fooocus and InvokeAI: what their text says becomes a recipe, and what it cannot is named."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from mole_diffusers.lora.safe_files import RefusedFileError, parse_json
from mole_diffusers.studio.comfy_workflow import api_graph, recipe_of_graph, workflow_graph
from mole_diffusers.studio.their_settings import (
    Lora,
    TheirRecipe,
    as_number,
    as_text,
    as_whole,
    recipe_of,
    sampler_of,
    seed_of,
    stem,
)

# Names of settings that a recipe has, or needs nothing of.
OF_SWARM = {
    "prompt", "negativeprompt", "seed", "steps", "cfgscale", "fluxguidancescale", "width", "height", "model", "loras",
    "loraweights", "sampler", "scheduler", "comfyuisampler", "comfyuischeduler", "swarm_version", "aspectratio", "images",
    "automaticvae", "sidelength",
}  # fmt: skip
OF_FOOOCUS = {
    "prompt", "negative_prompt", "full_prompt", "full_negative_prompt", "loras", "seed", "steps", "guidance_scale",
    "resolution", "clip_skip", "sampler", "scheduler", "base_model", "base_model_hash", "metadata_scheme", "version",
    "created_by", "vae",
}  # fmt: skip
OF_INVOKE = {
    "positive_prompt", "negative_prompt", "loras", "model", "scheduler", "seed", "steps", "cfg_scale", "guidance", "width",
    "height", "clip_skip", "strength", "app_version", "generation_mode", "rand_device", "init_image",
}  # fmt: skip


def read(texts: Mapping[str, str], where: str) -> TheirRecipe | None:
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


def _swarm(said: Mapping[str, Any], where: str) -> TheirRecipe:
    names, weights = said.get("loras"), said.get("loraweights")
    if isinstance(names, str):  # older ones have a text with commas
        names, weights = names.split(","), as_text(weights).split(",")
    pairs = (
        zip(names, weights if isinstance(weights, list) else [1] * len(names), strict=False)
        if isinstance(names, list)
        else ()
    )
    loras = [Lora(as_text(name), w, w) for name, weight in pairs for w in [as_number(weight)] if w is not None]
    sampler, lost = sampler_of(
        said.get("sampler", said.get("comfyuisampler")), said.get("scheduler", said.get("comfyuischeduler"))
    )
    recipe, lost_loras = recipe_of(
        where, as_text(said.get("prompt")), as_text(said.get("negativeprompt")), loras, sampler,
        seed=seed_of(said.get("seed")), steps=as_whole(said.get("steps")),
        guidance=as_number(said.get("fluxguidancescale", said.get("cfgscale"))),
        width=as_whole(said.get("width")) or 0, height=as_whole(said.get("height")) or 0,
    )  # fmt: skip
    return TheirRecipe(recipe, lost + lost_loras + _rest(said, OF_SWARM), stem(as_text(said.get("model"))))


def _fooocus(said: Mapping[str, Any], where: str) -> TheirRecipe:
    if not {"prompt", "seed"} <= said.keys():
        raise ValueError(f"{where} has settings of a program that is not known here")
    full, negative = (_joined(said.get(f"full_{name}")) for name in ("prompt", "negative_prompt"))
    loras = []
    for value in _listed(said.get("loras")):
        if isinstance(value, list) and len(value) > 1 and (weight := as_number(value[1])) is not None:
            loras.append(Lora(as_text(value[0]), weight, weight))
    for key, value in said.items():
        name, _, weight_text = as_text(value).rpartition(" : ")
        is_new = key.startswith("lora_combined_") and stem(name) not in [stem(lora.name) for lora in loras]
        if is_new and (weight := as_number(weight_text)) is not None:
            loras.append(Lora(name, weight, weight))
    size = re.findall(r"\d{1,5}", str(said.get("resolution", "")))
    sampler, lost = sampler_of(said.get("sampler"), said.get("scheduler"))
    recipe, lost_loras = recipe_of(
        where, full or as_text(said.get("prompt")), negative or as_text(said.get("negative_prompt")), loras, sampler,
        seed=seed_of(said.get("seed")), steps=as_whole(said.get("steps")), guidance=as_number(said.get("guidance_scale")),
        width=int(size[0]) if len(size) == 2 else 0, height=int(size[1]) if len(size) == 2 else 0,
        clip_skip=as_whole(said.get("clip_skip")),
    )  # fmt: skip
    known = OF_FOOOCUS | {key for key in said if key.startswith("lora_combined_")}
    if full:
        known.add("styles")  # which are in it
    if as_text(said.get("refiner_model")) in ("", "None"):
        known |= {"refiner_model", "refiner_switch", "refiner_model_hash"}
    return TheirRecipe(recipe, lost + lost_loras + _rest(said, known), stem(as_text(said.get("base_model"))))


def _joined(texts: Any) -> str:
    return ", ".join(filter(None, map(as_text, _listed(texts))))


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _invoke(said: Mapping[str, Any], where: str) -> TheirRecipe:
    loras = []
    for each in _listed(said.get("loras")):
        about = each.get("model", each.get("lora")) if isinstance(each, dict) else None
        name = as_text(about.get("name", about.get("model_name"))) if isinstance(about, dict) else ""
        if name and (weight := as_number(each.get("weight"))) is not None:
            loras.append(Lora(name, weight, weight))
    found = said.get("model")
    model: Mapping[str, Any] = found if isinstance(found, dict) else {}
    sampler, lost = sampler_of(said.get("scheduler"), "")
    skip = as_whole(said.get("clip_skip"))
    is_over = "strength" in said or "init_image" in said
    recipe, lost_loras = recipe_of(
        where, _compel(as_text(said.get("positive_prompt"))), _compel(as_text(said.get("negative_prompt"))), loras, sampler,
        seed=seed_of(said.get("seed")), steps=as_whole(said.get("steps")),
        guidance=as_number(said.get("guidance", said.get("cfg_scale"))),
        width=as_whole(said.get("width")) or 0, height=as_whole(said.get("height")) or 0,
        clip_skip=None if skip is None else skip + 1,  # Invoke counts the layers that are skipped
        strength=as_number(said.get("strength")),
    )  # fmt: skip
    known = set(OF_INVOKE)
    for name in ("positive", "negative"):
        if as_text(said.get(f"{name}_style_prompt")) in ("", as_text(said.get(f"{name}_prompt"))):
            known.add(f"{name}_style_prompt")
    lacking = ["the picture that it was drawn over"] * is_over
    named = as_text(model.get("name", model.get("model_name")))
    return TheirRecipe(recipe, lacking + lost + lost_loras + _rest(said, known), stem(named))


def _compel(prompt: str) -> str:
    """InvokeAI's weights, (a fox)1.3 and fox++, as weights here."""

    def stepped(found: re.Match[str]) -> str:
        words, signs = found[1] or found[2], found[3]
        return f"({words}:{(1.1 if signs[0] == '+' else 0.9) ** len(signs):.4g})"

    prompt = re.sub(r"\(([^()]*)\)(\d+(?:\.\d+)?)", r"(\1:\2)", prompt)
    return re.sub(r"(?:\(([^()]*)\)|([\w']+))(\++|-+)(?![\w-])", stepped, prompt)


def _rest(said: Mapping[str, Any], known: set[str]) -> list[str]:
    """The settings that a recipe does not have, as they are written; without those that are off or empty."""
    off: tuple[Any, ...] = (None, "", False, "None", [], {})
    left = {key: value for key, value in said.items() if key not in known and value not in off}
    shown = {key: value if isinstance(value, str | int | float) else "" for key, value in left.items()}
    return [f"{key[:40]} {str(value)[:40]}".strip() for key, value in list(shown.items())[:20]]
