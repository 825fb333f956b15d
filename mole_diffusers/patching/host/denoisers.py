"""What differs between denoisers: one record for each class.

To add a denoiser, add its record to `RECORDS`, and a tiny pipeline to the tests' hosts. What a record says can be read in
diffusers' source: the arguments of the class's `forward`, what its pipeline passes as the noise level, the attention
processor, and the names of the modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from torch import nn

from mole_diffusers.binding.regions import GridSize
from mole_diffusers.patching.host.cropping import Cropping, FluxCropping, SD3Cropping, UNetCropping

Read = Callable[[str], Any]  # the name of an argument of a call -> its value


@dataclass(frozen=True)
class Blocks:
    """What the blocks of a denoiser do with text and picture.

    Attributes:
        entries: of a block, the module that its input enters first: the first of these that it has. The last one is its
            attention.
        attention: "cross" if it is over text or picture, one at a time: then cross-attention takes a mask. Otherwise it is
            over both together, with one of them first: then PyTorch's attention inside the processor takes a mask.
        text: a name, or dotted part of one, of layers that read the text's tokens. Those not named here read the picture's.
        joint: what the names of layers begin with that read the tokens of both, in the order of attention.
        frames: parts of names of layers that read neither: the frames of a video at one place of the picture, or a picture
            that says what to draw.
        multiple: text and picture, each by itself, are padded to a multiple of this number of tokens.
        masks_rows: the mask that cross-attention takes is of each row, [B, 1, T, S], not of each head, [B heads, T, S].
        oblong: a picture that is not square is padded to this number of tokens; 0: as any other.
    """

    entries: tuple[str, ...]
    attention: Literal["cross", "text first", "picture first"]
    text: tuple[str, ...]
    joint: tuple[str, ...] = ()
    frames: tuple[str, ...] = ()
    multiple: int = 1
    masks_rows: bool = False
    oblong: int = 0

    @property
    def is_joint(self) -> bool:
        """Whether attention is over text and picture together."""
        return self.attention != "cross"

    def padded(self, tokens: int) -> int:
        """The number of tokens in blocks, of a text or a picture of so many."""
        return -(-tokens // self.multiple) * self.multiple

    def tokens_of(self, latent_size: GridSize) -> int:
        """The number of tokens in blocks of a picture with this height and width."""
        height, width = latent_size
        return self.oblong if self.oblong and height != width else self.padded(height * width)

    def apart(self, picture: int, text: int, padded: int | None = None) -> tuple[slice, slice]:
        """The picture's tokens, and the text's, among those of both; `text` is padded, and the picture to `padded`."""
        if self.attention == "text first":
            return slice(text, text + picture), slice(0, text)
        start = self.padded(picture) if padded is None else padded
        return slice(0, picture), slice(start, start + text)

    def token_type_of(self, layer: str) -> str | None:
        """The tokens that a layer reads: "image", "text", or "joint", those of both in the order of attention.

        None if its tokens are neither (the frames of a video).
        """
        name = f".{layer}."
        if any(f".{part}." in name for part in self.frames):
            return None
        if any(f".{part}." in name for part in self.text):
            return "text"
        return "joint" if layer.startswith(self.joint) else "image"


class Arguments(NamedTuple):
    """What a denoiser's forward calls its inputs.

    Attributes:
        latents: what is denoised: [B, C, H, W], [B, C, F, H, W] for a video, tokens [B, T, C], of given pictures too if they
            follow, or a list of B pictures [C, F, H, W].
        text: its states [B, S, C], of several layers [B, S, L, C], or of a list of B texts [S, C].
        time: the noise level.
        text_shown: the text's mask [B, S], if the model leaves out the padding behind it where it attends to text and
            picture together.
        text_before: another text, [B, S, C], in front of it. The text is then all layers' states [L, B, S, C], of which
            each block reads the last and behind them those of one layer.
        places: row and column of each token, if they say the picture's side.
    """

    latents: str = "hidden_states"
    text: str = "encoder_hidden_states"
    time: str = "timestep"
    text_shown: str | None = None
    text_before: str | None = None
    places: str | None = None


class Pipelines(NamedTuple):
    """What the pipelines of a denoiser give it.

    Attributes:
        pure_noise, clean: the noise level of pure noise, and of a finished picture.
        prompts_first: whether guidance puts the rows of prompts before those of negative prompts.
        unguided: the guidance scale that means no guidance.
        text_layers: the hidden states of text encoders that the text is made of.
        beside: the part that they must have; others with this denoiser are of another model.
    """

    pure_noise: float
    clean: float = 0
    prompts_first: bool = False
    unguided: float = 1
    text_layers: tuple[int, ...] = (-4, -3, -2, -1)
    beside: str | None = None


@dataclass(frozen=True)
class Denoiser:
    """What is special about one class.

    Attributes:
        pipelines: what its pipelines give it.
        latent_size: height and width of the picture, from a call's arguments and the model's config; None if the call does
            not say it. Then nothing has a place. None instead of the function: nothing ever has one, and regions are
                refused.
        text_width: name in its config of the text's channels; those of several texts are alike.
        blocks: what they do with text and picture.
        cropping: how a part of a picture is drawn as a picture of its own; None: nothing is drawn in tiles.
        oblong: name of the model's attribute with the number of `Blocks.oblong`.
    """

    pipelines: Pipelines
    latent_size: Callable[[Read, Any], GridSize | None] | None
    text_width: str
    blocks: Blocks
    arguments: Arguments = Arguments()
    cropping: type[Cropping] | None = None
    oblong: str | None = None


def _of_sample(read: Read, config: Any) -> GridSize:
    height, width = read("sample").shape[-2:]
    return height, width


def _of_patches(read: Read, config: Any) -> GridSize:
    height, width = read("hidden_states").shape[2:]
    return height // config.patch_size, width // config.patch_size


def _of_frame(read: Read, config: Any) -> GridSize | None:
    frames, height, width = read("hidden_states").shape[2:]
    return (height // config.patch_size[1], width // config.patch_size[2]) if frames == 1 else None


def _of_ids(read: Read, config: Any) -> GridSize:
    """Row and column come after the picture's number; given pictures have others. Flux 2 has one number more, and LongCat
    starts after its text.
    """
    ids = read("img_ids").flatten(0, -2)
    places = ids[ids[:, 0] == ids[0, 0]][:, 1:3]
    height, width = (places.amax(0) - places.amin(0) + 1).long().tolist()
    return height, width


def _of_both(read: Read, config: Any) -> GridSize:
    """The rows of text and picture follow each other."""
    return _of_ids(lambda _: read("position_ids")[-read("hidden_states").shape[1] :], config)


def _beside_texts_of_one_length(read: Read, config: Any) -> GridSize | None:
    """The picture follows the text, which is of one length in all rows or else its places are not known."""
    lengths = read("encoder_attention_mask").sum(1)
    return _of_patches(read, config) if (lengths == lengths[0]).all() else None


def _of_shapes(read: Read, config: Any) -> GridSize | None:
    """Frames, height and width of each picture of each row; those after the first are given pictures."""
    frames, height, width = read("img_shapes")[0][0]
    return (height, width) if frames == 1 else None


def _of_pictures(read: Read, config: Any) -> GridSize | None:
    """Pictures [C, F, H, W], of one frame each."""
    (frames, height, width), patch = read("x")[0].shape[1:], config.all_patch_size[0]
    return (height // patch, width // patch) if frames == 1 else None


TEXT_LAYERS = ("attn2.to_k", "attn2.to_v")  # of a block with cross-attention: its keys and values
JOINT = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", "norm1_context", "context_embedder")
UNET = Denoiser(
    Pipelines(1000),
    _of_sample,
    "cross_attention_dim",
    Blocks(("attn1",), "cross", TEXT_LAYERS),
    Arguments(latents="sample"),
    cropping=UNetCropping,
)
# In single blocks, which read text and picture, `proj_mlp` runs beside the attention, on the same input.
FLUX = Denoiser(
    Pipelines(1),
    _of_ids,
    "joint_attention_dim",
    Blocks(("proj_mlp", "attn"), "text first", JOINT, joint=("single_transformer_blocks.",)),
    Arguments(places="img_ids"),
)
RECORDS: Mapping[str, Denoiser] = {
    "UNet2DConditionModel": UNET,
    "UNetMotionModel": replace(UNET, blocks=replace(UNET.blocks, frames=("motion_modules",))),
    "SD3Transformer2DModel": Denoiser(
        Pipelines(1000),
        _of_patches,
        "joint_attention_dim",
        Blocks(("attn",), "picture first", JOINT),
        cropping=SD3Cropping,
    ),
    "FluxTransformer2DModel": replace(FLUX, cropping=FluxCropping),
    # The layers of klein, and of dev.
    "Flux2Transformer2DModel": replace(FLUX, pipelines=Pipelines(1, text_layers=(9, 18, 27, 10, 20, 30))),
    "ChromaTransformer2DModel": FLUX,
    "LongCatImageTransformer2DModel": FLUX,
    "OvisImageTransformer2DModel": FLUX,
    "QwenImageTransformer2DModel": Denoiser(
        Pipelines(1),
        _of_shapes,
        "joint_attention_dim",
        Blocks(("attn",), "text first", (*JOINT, "txt_mod", "txt_mlp", "txt_in")),
    ),
    "ZImageTransformer2DModel": Denoiser(
        Pipelines(0, clean=1, prompts_first=True, unguided=0),
        _of_pictures,
        "cap_feat_dim",
        Blocks(
            ("attention",),
            "picture first",
            ("context_refiner", "cap_embedder"),
            joint=("layers.", "all_final_layer."),
            multiple=32,
        ),
        Arguments("x", "cap_feats", "t"),
    ),
    "Lumina2Transformer2DModel": Denoiser(
        Pipelines(0, clean=1),
        _beside_texts_of_one_length,
        "cap_feat_dim",
        Blocks(("attn",), "text first", ("context_refiner", "caption_embedder"), joint=("layers.", "norm_out.")),
        Arguments(text_shown="encoder_attention_mask"),
    ),
    "Krea2Transformer2DModel": Denoiser(
        Pipelines(1),
        _of_both,
        "text_hidden_dim",
        Blocks(
            ("attn",),
            "text first",
            ("refiner_blocks", "txt_in"),
            joint=("transformer_blocks.",),
            frames=("layerwise_blocks", "projector"),
        ),
    ),
    "HiDreamImageTransformer2DModel": Denoiser(
        Pipelines(1000),
        _of_patches,
        "caption_channels",
        Blocks(
            ("attn1",),
            "picture first",
            ("to_q_t", "to_k_t", "to_v_t", "to_out_t", "ff_t"),
            joint=("single_stream_blocks.",),
            frames=("caption_projection",),
        ),
        Arguments(text="encoder_hidden_states_llama3", time="timesteps", text_before="encoder_hidden_states_t5"),
        oblong="max_seq",
    ),
    "CosmosTransformer3DModel": Denoiser(  # of Anima
        Pipelines(1, beside="text_conditioner"),
        _of_frame,
        "text_embed_dim",
        Blocks(("attn1",), "cross", TEXT_LAYERS, masks_rows=True),
    ),
    "LTXVideoTransformer3DModel": Denoiser(
        Pipelines(1000), None, "caption_channels", Blocks(("attn1",), "cross", (*TEXT_LAYERS, "caption_projection"))
    ),
    "WanTransformer3DModel": Denoiser(
        Pipelines(1000),
        None,  # a token is of a few frames
        "text_dim",
        Blocks(
            ("attn1",),
            "cross",
            (*TEXT_LAYERS, "text_embedder"),
            frames=("add_k_proj", "add_v_proj", "image_embedder"),
        ),
    ),
}


def record(denoiser: nn.Module) -> Denoiser:
    """The record of a denoiser's class, or of the nearest one that it inherits from; ValueError if there is none."""
    found = next((RECORDS[kind.__name__] for kind in type(denoiser).__mro__ if kind.__name__ in RECORDS), None)
    if found is None:
        raise ValueError(f"experts cannot act in a {type(denoiser).__name__}; known denoisers: {', '.join(RECORDS)}")
    if found.oblong is None:
        return found
    return replace(found, blocks=replace(found.blocks, oblong=getattr(denoiser, found.oblong)))
