"""The two ways through a gated linear layer, per layer shape, each against the host's own product.

    python benchmarks/layers.py --dtype bf16 --size sd15 --pixels 512

One line per shape: the cost of either way over the host's product, and which one `functional.folding_pays` chooses. A "!"
marks a choice that cost more than 2 % of the product.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F

from benchmarks.clock import interleaved, ratio, seconds
from benchmarks.settings import DTYPES
from mole_diffusers import functional

TEXT = {"sd15": 768, "sdxl": 2048}
LEVELS = {"sd15": ((320, 8), (640, 16), (1280, 32), (1280, 64)), "sdxl": ((640, 16), (1280, 32))}  # channels, pixels a token


def shapes(size: str, pixels: int) -> list[tuple[int, int, int]]:
    """(tokens, Cin, Cout) of the attention layers of a UNet; the text's keys and values have 77 tokens."""
    found = []
    for channels, factor in LEVELS[size]:
        found += [((pixels // factor) ** 2, channels, channels), (77, TEXT[size], channels)]
    return list(dict.fromkeys(found))


@torch.no_grad()
def line(shape: tuple[int, int, int], experts: int, dtype: torch.dtype, *, repeats: int) -> str:
    """Measure one shape with rank 16 and a batch of 2."""
    (tokens, inside, out), rank = shape, 16 * experts
    x, w, b = (torch.randn(s).to(dtype) for s in ((2, tokens, inside), (out, inside), (out,)))
    down, up, factor = (torch.randn(s).to(dtype) for s in ((rank, inside), (out, rank), (2, 1, rank)))
    runs = {
        "host": lambda: F.linear(x, w, b),
        "beside": lambda: functional.added_low_rank(F.linear(x, w, b), functional.scaled(F.linear(x, down), factor), up),
        "inside": lambda: functional.folded_linear(x, (w, b), (down, up * factor)),
    }
    times = interleaved({way: partial(seconds, run, clock="cpu") for way, run in runs.items()}, repeats=repeats, warmup=2)
    costs = {way: ratio(times[way], times["host"])[0] - 1 for way in ("beside", "inside")}
    chosen = "inside" if functional.folding_pays(x, w, factor) else "beside"
    flag = "!" if costs[chosen] > min(costs.values()) + 0.02 else ""
    return (
        f"{tokens:>6} x {inside:>4} -> {out:<5}{experts:>3}{costs['beside']:>9.3f}{costs['inside']:>9.3f}  {chosen} {flag}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument("--size", default="sd15", choices=LEVELS)
    parser.add_argument("--pixels", type=int, default=512)
    parser.add_argument("--experts", type=int, nargs="+", default=[3, 8, 16])
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    print(f"{'tokens':>6}   {'Cin':>4}    Cout   N   beside   inside  chosen")
    for shape in shapes(args.size, args.pixels):
        for experts in args.experts:
            print(line(shape, experts, DTYPES[args.dtype], repeats=args.repeats), flush=True)


if __name__ == "__main__":
    main()
