"""What the attention of a UNet reads and gives, and maps of words written out from it."""

from contextlib import ExitStack, contextmanager
from types import SimpleNamespace

import torch


@contextmanager
def watched(unet):
    """A list with an entry for each call of the UNet: `cross`, (module, hidden [B, T, C], text [B, S, D]) of each
    cross-attention, and `own`, what each self-attention gave, [B, T, C]."""
    calls = []

    def crossed(module, args, kwargs, _):
        calls[-1].cross.append((module, args[0], kwargs["encoder_hidden_states"]))

    with ExitStack() as undo:
        begin = unet.register_forward_pre_hook(lambda *_: calls.append(SimpleNamespace(cross=[], own=[])))
        undo.callback(begin.remove)
        for name, module in unet.named_modules():
            if name.endswith("attn1"):
                undo.callback(module.register_forward_hook(lambda _, __, out: calls[-1].own.append(out)).remove)
            if name.endswith("attn2"):
                undo.callback(module.register_forward_hook(crossed, with_kwargs=True).remove)
        yield calls


def word_map(call, row, words, side):
    """[h, w]: the attention of the base, mean over heads and words, from 0 to 1 in each layer and summed over them."""
    total = torch.zeros(side)
    for module, hidden, text in call.cross:
        q, k = (getattr(layer, "base_layer", layer) for layer in (module.to_q, module.to_k))
        q, k = (x.unflatten(-1, (module.heads, -1)).transpose(0, 1) for x in (q(hidden[row]), k(text[row])))
        shares = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(0)  # [T, S]
        attended = shares[:, list(words)].mean(1).reshape(side)
        total += (attended - attended.min()) / (attended.max() - attended.min())
    return total
