"""What goes to the hub: the model card of a mixture, and the way there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mole_diffusers.gates import GateConfig
from mole_diffusers.lora import Expert

PIPELINE_USE = """\
from mole_diffusers import MoLEPipeline

pipe = MoLEPipeline.from_pretrained("{repo}")  # base, experts, gates and strengths
image = pipe("{prompt}").images[0]"""
GATES_USE = """\
import mole_diffusers as mole

mixture = mole.attach(pipe, {experts}, gates="{repo}")
image = pipe("{prompt}").images[0]"""
CARD = """\
---
library_name: diffusers
tags:
- lora
- mixture-of-loras
- mole-diffusers
---
# {repo}

{what} by [mole_diffusers](https://pypi.org/project/mole-diffusers/): {count} concept LoRAs in one picture, weighed by
`{family}` gates, one per {granularity}.

| expert | strength | trigger words | trained for | file (sha256 of its tensors) |
|---|---|---|---|---|
{rows}

```python
{use}
```
"""


def model_card(experts: Mapping[str, tuple[Expert, float]], config: GateConfig, repo: str, *, pipeline: bool) -> str:
    """README.md of a repository that holds a whole pipeline, or gates alone."""
    prompt = " ".join(trigger for expert, _ in experts.values() for trigger in expert.triggers[:1]) or "a prompt"
    files = ", ".join(f'"{name}": "{name}.safetensors"' for name in experts)
    use = PIPELINE_USE if pipeline else GATES_USE
    rows = (
        f"| {name} | {strength:g} | {', '.join(e.triggers)} | {e.base} | `{e.sha256[:12]}` |"
        for name, (e, strength) in experts.items()
    )
    return CARD.format(
        repo=repo,
        what="A pipeline" if pipeline else "Gates",
        count=len(experts),
        family=config.family,
        granularity=config.granularity,
        rows="\n".join(rows),
        use=use.format(repo=repo, prompt=prompt, experts=f"{{{files}}}"),
    )


def upload(folder: str | Path, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
    """Make the repository where it is missing and put a folder there; returns the commit's address.

    `private` is for a repository that is made here; `options` go to `HfApi.upload_folder`.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=options.pop("token", None))
    api.create_repo(repo_id, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
