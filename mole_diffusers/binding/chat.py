"""Which tokens are the user's prompt, for text encoders that are language models: they read it as a turn of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

TURN, TURN_ENDS = "<|im_start|>", "<|im_end|>"  # of Qwen: a role and a new line follow the first
BEGINS, ENDS = ("[INST]",), ("[/INST]", "[SYSTEM_PROMPT]")  # of Mistral
NEW_LINE = "Ċ"  # of byte-level tokenizers
PROMPT_STARTS = "<Prompt▁Start>"  # of Lumina 2 with Gemma, in several tokens; before it there are instructions


def of_user(tokens: Sequence[str]) -> Iterator[bool]:
    """For each token, by its name in the tokenizer: whether it is of the user. All are if there is no chat.

    Pipelines cut off beginnings, so the first tokens count until a turn of somebody else begins.
    """
    if (found := "".join(tokens).find(PROMPT_STARTS)) >= 0:
        yield from (end > found + len(PROMPT_STARTS) for end in accumulate(map(len, tokens)))
        return
    is_users, role = True, None
    for token in tokens:
        if token == TURN:
            is_users, role = False, ""
        elif role is not None:
            role += token
            if NEW_LINE in token:
                is_users, role = role.startswith("user"), None
            yield False
            continue
        elif token in BEGINS:
            is_users = True
        elif token == TURN_ENDS or token in ENDS:
            is_users = False
        yield is_users
