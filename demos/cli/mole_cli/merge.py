"""`mole merge`: several LoRA files as one ordinary LoRA file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Literal

from typer import Argument, Option

from mole_cli import options
from mole_cli.common import (
    grouped_values,
    json_or_text,
    lora_files,
    named_values,
    opened,
    parse_file,
    read_experts,
    target,
)
from mole_cli.console import busy, show


def merge(
    files: Annotated[
        list[str],
        Argument(
            metavar="[NAME=]FILE[:STRENGTH]", help="LoRA files. A LoRA is named after its file unless you give a NAME."
        ),
    ],
    method: Annotated[
        Literal["sum", "mean", "svd", "ties", "dare", "knots", "lego", "np", "ssr", "regmean", "iteris", "scalars"],
        Option(help="how to merge. The last four run the LoRAs on a pipeline and need --base."),
    ] = "svd",
    rank: Annotated[int | None, Option(min=1, help="the highest rank of the result.")] = None,
    protect: Annotated[list[str], Option(metavar="NAME", help="np: keep this LoRA unchanged. Repeatable.")] = [],
    option: Annotated[list[str], Option(metavar="KEY=VALUE", help="an option of the method: drop=0.5. Repeatable.")] = [],
    format: Annotated[Literal["diffusers", "kohya"], Option(help="kohya is for A1111 and ComfyUI.")] = "diffusers",
    base: Annotated[str | None, Option(metavar="MODEL", help="the pipeline to run the LoRAs on.")] = None,
    own: Annotated[
        list[str],
        Option(
            metavar="NAME=PROMPT",
            show_default=False,
            help="a prompt for one LoRA alone. Default: its trigger words. Repeatable.",
        ),
    ] = [],
    device: options.Device = None,
    base_config: options.BaseConfig = None,
    out: options.Out = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
    verbose: options.Verbose = False,
) -> None:
    """Merge several LoRA files into one ordinary LoRA file, without training."""
    lora_files(named := by_name(files))
    from mole_diffusers.lora import own_words, save_expert
    from mole_diffusers.merging import METHODS, by_activations, resolved
    from mole_diffusers.merging import merge as merge_experts

    runs = by_activations(method)
    running = {"base": base, "own": own, "device": device, "base-config": base_config}
    if unread := [f"--{name}" for name, value in running.items() if value and not runs]:
        others = ", ".join(filter(by_activations, METHODS))
        raise ValueError(f"--method {method} runs no LoRA and would not read {', '.join(unread)}, as {others} do")
    if protect and method != "np":
        raise ValueError(f"--protect is for --method np; {method} protects no LoRA")
    path = target(out, "merged.safetensors", overwrite=overwrite)
    experts = read_experts(named)
    settings = {key: json_or_text(value) for key, value in named_values(option, "--option").items()}
    resolved(method, settings)
    own_of = own_words({name: expert for name, (expert, _) in experts.items()})
    prompts = {name: [" ".join(each.words)] for name, each in own_of.items() if each.words}
    prompts |= grouped_values(own, "--own", known=experts)
    activations = None
    if runs:
        if base is None:
            raise ValueError(f"--method {method} runs the LoRAs: give --base")
        if silent := [name for name in experts if name not in prompts]:
            raise ValueError(f"--method {method} runs the LoRAs, and {silent} have no trigger words: give --own NAME=PROMPT")
        from mole_diffusers.merging import Activations

        activations = Activations(opened(base, {"device": device, "base_config": base_config}).pipe, prompts)
    with nullcontext() if activations else busy(f"merging by {method}"):  # a pipeline shows its own bars
        merged = merge_experts(experts, method, rank=rank, protect=protect, activations=activations, **settings)
    save_expert(merged, path, format=format)
    facts = {"file": str(path), "ranks": list(merged.ranks), "triggers": list(merged.triggers), **merged.metadata}
    show(facts, "\n".join(f"{key:>17}  {value}" for key, value in facts.items()), as_json=as_json)


def by_name(texts: Sequence[str]) -> dict[str, str]:
    """[NAME=]FILE[:STRENGTH] texts as name -> FILE[:STRENGTH]. Raises ValueError if a name comes twice."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, file = text.partition("=")
        if not equals or "/" in name or parse_file(text)[0].is_file():  # the = belongs to the file's name
            name, file = parse_file(text)[0].stem, text
        if name in named:
            raise ValueError(f"two files are named {name!r}; name one yourself: {name}2={file}")
        named[name] = file
    return named
