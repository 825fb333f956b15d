"""diffusers' own LoRA tests on the drop-in pipelines.

    python tests/diffusers_tests.py FOLDER sd sdxl sd3 flux flux2 qwenimage z_image krea2 lumina2 wan ltx_video

FOLDER is `tests` of a checkout of diffusers. A family is a file lora/test_lora_layers_FAMILY.py there. The tests need
`parameterized` and `requests-mock`. They open tiny models of the hub, which are made here with random weights instead. With
`--stock`, they run on diffusers' own pipelines. Other options go to pytest.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

import diffusers
import pytest
import torch
import transformers.integrations.peft
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    GemmaConfig,
    GemmaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from mole_diffusers.pipelines.classes import DROP_INS

sys.path.insert(0, str(Path(__file__).parent))
import hosts


def clip_words():
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters)]
    return CLIPTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[], model_max_length=77)


def t5_words():
    letters = [(chr(c), -2.0) for c in [*range(65, 91), *range(97, 123)]]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0), *letters], model_max_length=512)


def make_models(folder):
    """Write every model and tokenizer that the tests name, where `from_pretrained` finds them by these names."""
    torch.manual_seed(0)
    words, qwen, (_, gemma) = clip_words(), hosts.letters(), hosts.gemma()
    shape = {"hidden_size": 32, "intermediate_size": 37, "num_attention_heads": 4, "num_hidden_layers": 5}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": words.pad_token_id}
    clip = CLIPTextConfig(**shape, **ids, vocab_size=1000, projection_dim=32)
    t5 = T5Config(vocab_size=1103, d_model=32, d_kv=8, d_ff=37, num_layers=5, num_heads=4)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"num_key_value_heads": 1, "vocab_size": len(qwen)}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
    eye = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    vision = Qwen2_5_VLConfig(text_config=size | rope, vision_config=eye)
    small = GemmaConfig(**size | {"hidden_size": 8, "vocab_size": len(gemma)}, head_dim=4)
    for name, parts in {
        "peft-internal-testing/tiny-clip-text-2": (words, CLIPTextModelWithProjection(clip)),
        "hf-internal-testing/tiny-random-clip": (words,),
        "hf-internal-testing/tiny-sd3-text_encoder": (CLIPTextModelWithProjection(clip),),
        "hf-internal-testing/tiny-sd3-text_encoder-2": (CLIPTextModelWithProjection(clip),),
        "hf-internal-testing/tiny-random-t5": (t5_words(), T5EncoderModel(t5)),
        "hf-internal-testing/tiny-random-Qwen25VLForCondGen": (qwen, Qwen2_5_VLForConditionalGeneration(vision)),
        "hf-internal-testing/tiny-random-Qwen2VLForConditionalGeneration": (qwen,),
        "hf-internal-testing/tiny-mistral3-diffusers": hosts.mistral(width=16),
        "hf-internal-testing/dummy-gemma": (gemma,),
        "hf-internal-testing/dummy-gemma-diffusers": (GemmaForCausalLM(small),),
    }.items():
        for part in parts:
            part.save_pretrained(folder / name)


def main():
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("folder", type=Path)
    asked.add_argument("gate_types", nargs="+")
    asked.add_argument("--stock", action="store_true")
    given, rest = asked.parse_known_args()
    files = [given.folder.resolve() / "lora" / f"test_lora_layers_{family}.py" for family in given.families]
    transformers.integrations.peft.MIN_PEFT_VERSION = "0.17.0"  # it asks for a peft that is not out yet
    if not given.stock:
        for name, kind in DROP_INS.items():
            setattr(diffusers, name, kind)  # which the tests import
    with tempfile.TemporaryDirectory() as folder:
        make_models(Path(folder))
        os.chdir(folder)
        how = ["-q", "-p", "no:cacheprovider", "--rootdir", str(given.folder.resolve().parent), "-c", os.devnull]
        return pytest.main([*how, *map(str, files), *rest])


if __name__ == "__main__":
    sys.exit(main())
