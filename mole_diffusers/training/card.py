"""The model card of trained gates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from mole_diffusers.gates.checkpoint import CONFIG, WEIGHTS
from mole_diffusers.gates.hub import upload
from mole_diffusers.mixture import Mixture
from mole_diffusers.training.config import GateTraining
from mole_diffusers.training.study import Lesson, triggers

CARD = "README.md"


def write_card(
    folder: Path, mixture: Mixture, lesson: Lesson, *, base: str, config: GateTraining, log: Sequence[dict[str, Any]]
) -> None:
    """Write README.md: which experts, which gates, how they were trained, and how to use them."""
    data = ModelCardData(library_name="diffusers", tags=["lora", "text-to-image", "mole-diffusers"], base_model=base)
    experts = "\n".join(
        f"| {name} | {', '.join(triggers(mixture, name))} | `{expert.sha256}` |" for name, expert in mixture.experts.items()
    )
    files = ", ".join(f'"{name}": "{name}.safetensors"' for name in mixture.experts)
    terms = ", ".join(f"{name} (weight {weighted.weight:g})" for name, weighted in config.parsed().items())
    reached = ", ".join(f"{name} {value:.4g}" for name, value in log[-1].items() if name != "step")
    gates = ", ".join(f"{name} {value}" for name, value in mixture.config.to_dict().items())
    prompt = next(iter(lesson.composed), "...")
    text = f"""# Gates for {" + ".join(mixture.experts)}

Gates of [mole_diffusers](https://pypi.org/project/mole-diffusers) that compose the LoRAs below; the LoRAs are not included.

```python
import mole_diffusers as mole

mixture = mole.attach(pipe, {{{files}}}, gates="this repository")
image = pipe({prompt!r}).images[0]
```

| expert | trigger words | SHA-256 of its file |
|---|---|---|
{experts}

Gates: {gates}.
Trained for {len(log)} updates on {terms}. Last update: {reached}.
"""
    (folder / CARD).write_text(f"---\n{data.to_yaml()}\n---\n\n{text}")


def push(folder: Path, repo: str) -> str:
    """Upload gates and card; returns the commit's address."""
    ModelCard.load(folder / CARD)  # a card that the hub would refuse is refused here
    return upload(folder, repo, allow_patterns=[WEIGHTS, CONFIG, CARD])
