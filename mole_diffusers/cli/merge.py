"""`mole merge`: several LoRA files as one ordinary LoRA file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from mole_diffusers.cli import options
from mole_diffusers.cli.common import (
    grouped_values,
    json_or_text,
    named_values,
    parse_file,
    pipeline,
    read_experts,
    target,
)
from mole_diffusers.cli.console import busy
from mole_diffusers.cli.options import NONE

Method = Literal[
    "sum", "mean", "svd", "ties", "dare", "knots", "lego", "np", "ssr", "regmean", "iteris", "scalars"
]  # fmt: skip


def merge(
    files: Annotated[
        list[str], Argument(metavar="[NAME=]FILE[:STRENGTH]", help="LoRA files; each is named as its file, or NAME.")
    ],
    out: Annotated[Path, Option(metavar="FILE", help="The file to write.")],
    method: Annotated[Method, Option(help="How. The last four run the LoRAs on a pipeline and need --base.")] = "svd",
    rank: Annotated[int | None, Option(help="The rank of the result, at most.")] = None,
    protect: Annotated[list[str], Option(metavar="NAME", help="np: leave this LoRA as it is. Repeatable.")] = NONE,
    option: Annotated[list[str], Option(metavar="KEY=VALUE", help="Of the method: drop=0.5. Repeatable.")] = NONE,
    format: Annotated[Literal["diffusers", "kohya"], Option(help="kohya is for A1111 and ComfyUI.")] = "diffusers",
    base: Annotated[str | None, Option(metavar="MODEL", help="The pipeline to run the LoRAs on.")] = None,
    base_config: options.BaseConfig = None,
    own: Annotated[
        list[str],
        Option(metavar="NAME=PROMPT", help="A prompt for one LoRA alone. Default: its trigger words. Repeatable."),
    ] = NONE,
    device: options.Device = None,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Merge several LoRA files into one ordinary LoRA file, without training."""
    from mole_diffusers.lora.writing import save_expert
    from mole_diffusers.merging.activations import Activations
    from mole_diffusers.merging.merge import by_activations
    from mole_diffusers.merging.merge import merge as merge_experts

    out = target(out, "merged.safetensors", overwrite=overwrite)
    experts = read_experts(by_name(files))
    settings = {key: json_or_text(value) for key, value in named_values(option, "--option").items()}
    prompts = {name: [" ".join(expert.triggers)] for name, (expert, _) in experts.items() if expert.triggers}
    prompts |= grouped_values(own, "--own", known=experts)
    activations = None
    if by_activations(method):
        if base is None:
            raise ValueError(f"--method {method} runs the LoRAs: give --base")
        activations = Activations(pipeline(base, device, config=base_config), prompts)
    with nullcontext() if activations else busy(f"merging by {method}"):  # a pipeline has bars of its own
        merged = merge_experts(experts, method, rank=rank, protect=protect, activations=activations, **settings)
    save_expert(merged, out, format=format)
    facts = {"file": str(out), "ranks": list(merged.ranks), "triggers": list(merged.triggers), **merged.metadata}
    print(json.dumps(facts) if as_json else "\n".join(f"{key:>17}  {value}" for key, value in facts.items()))


def by_name(texts: Sequence[str]) -> dict[str, str]:
    """[NAME=]FILE[:STRENGTH] texts as name -> FILE[:STRENGTH]. Raises ValueError where two have one name."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or "/" in name or parse_file(text)[0].is_file():  # the = is of the file's own name
            name, file = parse_file(text)[0].stem, text
        if name in named:
            raise ValueError(f"two files are named {name!r}; name one yourself: {name}2={file}")
        named[name] = file
    return named
