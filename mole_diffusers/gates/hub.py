"""The model card of a mixture, and its upload to the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mole_diffusers.gates import GateConfig
from mole_diffusers.lora import Expert
from mole_diffusers.lora.own_words import own_words
from mole_diffusers.whole_files import write_text

CARD = "README.md"
PIPELINE_USE = """\
from mole_diffusers import MoLEPipeline

pipe = MoLEPipeline.from_pretrained("{repo}")  # base, experts, gates and strengths
image = pipe("{prompt}").images[0]"""
GATES_USE = """\
import mole_diffusers as mole

mixture = mole.attach(pipe, {experts}, gates="{repo}")
image = pipe("{prompt}").images[0]"""
TEXT = """\
---
{about}
---

# {title}

{what} by [mole_diffusers](https://github.com/mole-diffusers/mole-diffusers): {count} concept LoRAs in one picture, weighed
by `{gate_type}` gates{granularity}.{missing}

| expert | strength | trigger words | trained for | SHA-256 of its file |
|---|---|---|---|---|
{rows}

```python
{use}
```
{training}"""


def model_card(
    experts: Mapping[str, tuple[Expert, float]],
    config: GateConfig,
    repo: str = "this repository",
    *,
    pipeline: bool = False,
    prompt: str | None = None,
    base: str | None = None,
    training: str = "",
) -> str:
    """README.md of a repository that holds a whole pipeline, or only gates.

    Args:
        experts: name -> (expert, strength).
        repo: the repository's id, for the example.
        prompt: of the example; by default the experts' trigger words.
        base: hub id of the base model.
        training: text on how the gates were trained.
    """
    from huggingface_hub import ModelCardData

    words = own_words({name: expert for name, (expert, _) in experts.items()})
    prompt = prompt or " ".join(word for own in words.values() for word in own.words[:1]) or "a prompt"
    files = ", ".join(f'"{name}": "{name}.safetensors"' for name in experts)
    rows = (
        f"| {name} | {strength:g} | {', '.join(words[name].words)} | {e.base} | `{e.sha256}` |"
        for name, (e, strength) in experts.items()
    )
    granularity = config.to_dict().get("granularity")
    use = PIPELINE_USE if pipeline else GATES_USE
    tags = ["lora", "text-to-image", "mixture-of-loras", "mole-diffusers"]
    return TEXT.format(
        about=ModelCardData(library_name="diffusers", tags=tags, base_model=base).to_yaml(),
        title=f"{'Pipeline' if pipeline else 'Gates'} for {' + '.join(experts)}",
        what="A pipeline" if pipeline else "Gates",
        count=len(experts),
        gate_type=config.gate_type,
        granularity=f", one per {granularity}" if granularity else "",
        missing="" if pipeline else " The LoRAs are not included.",
        rows="\n".join(rows),
        use=use.format(repo=repo, prompt=prompt, experts=f"{{{files}}}"),
        training=f"\n{training}\n" if training else "",
    )


def push(save: Callable[[str], object], card: str, repo_id: str, **options: Any) -> str:
    """Upload what `save(folder)` writes, with a model card. Returns the commit's address. `options` are those of
    `upload`.
    """
    with TemporaryDirectory() as folder:
        save(folder)
        write_text(Path(folder, CARD), card)
        return upload(folder, repo_id, **options)


def upload(folder: str | Path, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Create the repository if it is missing, and upload a folder. Returns the commit's address.

    `private` applies to a repository that is created here; `options` go to `HfApi.upload_folder`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
