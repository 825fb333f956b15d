"""`mole merge`: several LoRA files as one ordinary LoRA file."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated, Literal

from typer import Option

from mole_cli.commands import Result
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
from mole_cli.console import busy
from mole_cli.options import Machine, Output

Method = Literal[
    "sum", "mean", "svd", "ties", "dare", "knots", "lego", "np", "ssr", "regmean", "iteris", "scalars"
]  # fmt: skip


def merge(
    files: Sequence[str],
    method: Method = "svd",
    rank: Annotated[int | None, Option(min=1)] = None,
    protect: Sequence[str] = (),
    option: Sequence[str] = (),
    format: Literal["diffusers", "kohya"] = "diffusers",
    base: str | None = None,
    own: Sequence[str] = (),
    *,
    machine: Machine,
    output: Output,
) -> Result:
    """Merge several LoRA files into one ordinary LoRA file, without training.

    Args:
        files ([NAME=]FILE[:STRENGTH]): LoRA files. A LoRA is named after its file unless you give a NAME.
        method: how to merge. The last four run the LoRAs on a pipeline and need --base.
        rank: the highest rank of the result.
        protect (NAME): np: keep this LoRA unchanged.
        option (KEY=VALUE): an option of the method: drop=0.5.
        format: kohya is for A1111 and ComfyUI.
        base (MODEL): the pipeline to run the LoRAs on.
        own (NAME=PROMPT): a prompt for one LoRA alone. Default: its trigger words.
    """
    lora_files(named := by_name(files))
    from mole_diffusers.lora import own_words, save_expert
    from mole_diffusers.merging import METHODS, by_activations, resolved
    from mole_diffusers.merging import merge as merge_experts

    runs = by_activations(method)
    running = {"base": base, "own": own, "device": machine.device, "base-config": machine.base_config}
    if unread := [f"--{name}" for name, value in running.items() if value and not runs]:
        others = ", ".join(filter(by_activations, METHODS))
        raise ValueError(f"--method {method} runs no LoRA and would not read {', '.join(unread)}, as {others} do")
    if protect and method != "np":
        raise ValueError(f"--protect is for --method np; {method} protects no LoRA")
    out = target(output, "merged.safetensors")
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

        activations = Activations(opened(base, machine).pipe, prompts)
    with nullcontext() if activations else busy(f"merging by {method}"):  # a pipeline shows its own bars
        merged = merge_experts(experts, method, rank=rank, protect=protect, activations=activations, **settings)
    save_expert(merged, out, format=format)
    facts = {"file": str(out), "ranks": list(merged.ranks), "triggers": list(merged.triggers), **merged.metadata}
    return Result(facts, "\n".join(f"{key:>17}  {value}" for key, value in facts.items()))


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
