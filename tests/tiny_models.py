"""Tiny random models in every role of `mole evaluate`, in the forms in which their libraries load real ones."""

import json
from contextlib import contextmanager

import open_clip
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from tiny import tiny_tokenizer
from transformers import CLIPTokenizer, OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor


@contextmanager
def saved(folder):
    """A folder of each model, by the option of `mole evaluate` that takes it. Torch finds that of LPIPS meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(save_squeezenet(folder / "torch")))
        models = {"clip": save_clip, "dino": save_dino, "detector": save_detector}
        yield {name: str(save(folder / name)) for name, save in models.items()} | {"lpips": "squeeze"}


def save_clip(folder):
    """A CLIP of open_clip. Its tokenizer comes with open_clip."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "layers": 1, "width": 16, "patch_size": 16, "head_width": 8}
    text = {"context_length": 32, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    model = open_clip.CLIP(**config)
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return folder


def save_dino(folder):
    """A vision transformer of timm, without a head, like its DINOv2."""
    torch.manual_seed(1)
    sizes = {"img_size": 28, "patch_size": 14, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0}
    model = timm.create_model("vit_tiny_patch16_224", **sizes)
    folder.mkdir()
    pixels = {"input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0, "first_conv": None}
    sizes.pop("num_classes")
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": sizes, "pretrained_cfg": pixels}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def save_detector(folder):
    """An OWL-ViT of transformers, which gives a box for each of four patches."""
    torch.manual_seed(2)
    vocabulary = sorted(tiny_tokenizer().get_vocab())  # "!" first: OWL-ViT ignores texts that start with token 0
    tokenizer = CLIPTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, merges=[], model_max_length=16)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": len(tokenizer), "max_position_embeddings": tokenizer.model_max_length}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = OwlViTConfig(text_config=text, vision_config=sizes | {"image_size": 32, "patch_size": 16}, projection_dim=16)
    OwlViTForObjectDetection(config).eval().save_pretrained(folder)
    images = OwlViTImageProcessor(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32})
    OwlViTProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_squeezenet(folder):
    """Weights of the smallest network for LPIPS, in torch's hub folder below `folder`, where torchvision looks first."""
    torch.manual_seed(3)
    (folder / "hub" / "checkpoints").mkdir(parents=True)
    name = torchvision.models.SqueezeNet1_1_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]
    torch.save(torchvision.models.squeezenet1_1().state_dict(), folder / "hub" / "checkpoints" / name)
    return folder
