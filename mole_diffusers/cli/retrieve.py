"""`mole retrieve`: the LoRAs of a library that a prompt asks for, and why."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mole_diffusers.cli.common import pipeline
from mole_diffusers.cli.libraries import add_search, in_words, opened
from mole_diffusers.retrieval.composing import report, retrieve_for


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("retrieve", help="the LoRAs of a library that a prompt asks for, and why")
    command.add_argument("prompt")
    add_search(command, required=True)
    command.add_argument("--base", default="emoji", help="the pipeline they are for; default: the embedded world")
    command.add_argument("--device", default=None, help="default: cuda where there is one")
    command.add_argument("--json", action="store_true")
    command.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what was found, best first after the triggers."""
    pipe = pipeline(args.base, args.device)
    library = opened(args, pipe)
    found = retrieve_for(library, pipe, args.prompt, k=args.k, threshold=args.threshold)
    print(json.dumps(report(library, found), indent=1) if args.json else in_words(found, library))
    return 0
