"""docs/training_table.md from the cells of objectives.py."""

import math
import statistics
from collections.abc import Sequence

from mole_diffusers.evaluation import tables

PAIRS = "subject + subject"
REFERENCE = "flow, collage"
HEADER = """# Training gates: objectives, gates and starts compared

Made by `python demos/emoji/objectives.py` on validation compositions of the emoji world; seeds 2000 to 2003, {steps}
DDIM steps, guidance {guidance:g}. Gates were trained for 60 updates of 6 rows (clip: 40 of 2, rollout: 16 of 2) at rate
1e-2, or the one in the row (expert outputs and flattened states: 0.05 over the root of their length), bf16. One run per
cell; brackets: 95 % bootstrap interval over cases and seeds. With so few compositions intervals are wide: small
differences mean nothing. When these cells were made, each composition was trained on one prompt, over white, and half of
them were drawn on that prompt, so success is higher here than on prompts that were never trained on, which is what
[results.md](results.md) has. Every cell's verdicts: [demos/emoji/rows](../demos/emoji/rows).

- success: every concept is seen by the judge, with the number of compositions behind it;
- in style: the pairs of subjects that succeed and are in the style that their prompt asks for, one that the base knows;
- recovery: the share of a concept's pictures that show it, of the share under its LoRA alone, at most 1;
- entropy: of the gates while drawing, over its largest value ln 2: 1 where both LoRAs weigh the same everywhere;
- time: processor time of training, teachers' pictures included, as a ratio to the first trained row's on the same
  compositions, median."""


def document(found: Sequence[dict], settings: Sequence[str], *, steps: int, guidance: float) -> str:
    """The table of the cells `found`, settings in the order given, drawn in `steps` with `guidance`."""
    groups = {s: [cell for cell in found if cell["setting"] == s] for s in settings}
    alone = [row for cell in found for row in cell["rows"] if row["arm"].startswith("alone ")]
    kinds = list(tables.by((row for cell in found for row in cell["rows"]), "kind"))
    reference = {_case(cell): cell["seconds"] for cell in groups[REFERENCE]}
    body = [
        [s, *_values(cells, kinds, bounds=tables.upper_bounds(alone), reference=reference)]
        for s, cells in groups.items()
        if cells
    ]
    head = ["setting", *kinds, "in style", "recovery", "entropy", "time"]
    return f"{HEADER.format(steps=steps, guidance=guidance)}\n\n{tables.markdown(head, body)}\n"


def _values(cells: Sequence[dict], kinds: Sequence[str], *, bounds: dict, reference: dict) -> list[str]:
    rows = [row for cell in cells for row in cell["rows"] if row["arm"] == cell["setting"]]
    shown = [f"{tables.interval(own, lambda r: float(r['success']))} of {len(tables.by(own, 'case'))}" for own in (
        [row for row in rows if row["kind"] == kind] for kind in kinds
    )]  # fmt: skip
    entropy = statistics.mean(cell["entropy"] for cell in cells) / math.log(2)
    times = [cell["seconds"] / reference[_case(cell)] for cell in cells if cell["log"] and _case(cell) in reference]
    time = f"{statistics.median(times):.2f}" if times else "-"
    pairs = [row for row in rows if row["kind"] == PAIRS]
    styled = tables.interval(pairs, lambda r: float(r["success"] and r["style"]))
    return [*shown, styled, _recovery(rows, bounds), f"{entropy:.2f}", time]


def _recovery(rows: Sequence[dict], bounds: dict) -> str:
    shares = [
        min(1.0, sum(row["seen"][concept] for row in group) / len(group) / bounds[case, concept])
        for case, group in tables.by(rows, "case").items()
        for concept in group[0]["seen"]
        if bounds.get((case, concept))
    ]
    return f"{statistics.mean(shares):.2f}" if shares else "-"


def _case(cell: dict) -> str:
    return cell["rows"][0]["case"]
