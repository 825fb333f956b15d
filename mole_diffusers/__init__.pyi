"""The public names of the package and where they are, see `lazy`."""

from mole_diffusers.binding.picture_warning import PictureWarning as PictureWarning
from mole_diffusers.emoji.world import EmojiWorld as EmojiWorld
from mole_diffusers.emoji.world import emoji_world as emoji_world
from mole_diffusers.gates import GateConfig as GateConfig
from mole_diffusers.gates.transforms import Strongest as Strongest
from mole_diffusers.lora import Expert as Expert
from mole_diffusers.lora import read_expert as read_expert
from mole_diffusers.lora.safe_files import RefusedFileError as RefusedFileError
from mole_diffusers.lora.writing import save_expert as save_expert
from mole_diffusers.merging.activations import Activations as Activations
from mole_diffusers.merging.merge import merge as merge
from mole_diffusers.mixture import Mixture as Mixture
from mole_diffusers.mixture import attach as attach
from mole_diffusers.mixture import attached as attached
from mole_diffusers.mixture import detach as detach
from mole_diffusers.patching.gating.trace import Trace as Trace
from mole_diffusers.patching.install.gate_inputs import MoLEAttnProcessor as MoLEAttnProcessor
from mole_diffusers.pipelines.classes import MoLEChromaPipeline as MoLEChromaPipeline
from mole_diffusers.pipelines.classes import MoLEFlux2KleinPipeline as MoLEFlux2KleinPipeline
from mole_diffusers.pipelines.classes import MoLEFlux2Pipeline as MoLEFlux2Pipeline
from mole_diffusers.pipelines.classes import MoLEFluxControlPipeline as MoLEFluxControlPipeline
from mole_diffusers.pipelines.classes import MoLEFluxPipeline as MoLEFluxPipeline
from mole_diffusers.pipelines.classes import MoLEHiDreamImagePipeline as MoLEHiDreamImagePipeline
from mole_diffusers.pipelines.classes import MoLEKrea2Pipeline as MoLEKrea2Pipeline
from mole_diffusers.pipelines.classes import MoLELTXPipeline as MoLELTXPipeline
from mole_diffusers.pipelines.classes import MoLELumina2Pipeline as MoLELumina2Pipeline
from mole_diffusers.pipelines.classes import MoLEPipeline as MoLEPipeline
from mole_diffusers.pipelines.classes import MoLEQwenImagePipeline as MoLEQwenImagePipeline
from mole_diffusers.pipelines.classes import MoLEStableDiffusion3Pipeline as MoLEStableDiffusion3Pipeline
from mole_diffusers.pipelines.classes import (
    MoLEStableDiffusionControlNetImg2ImgPipeline as MoLEStableDiffusionControlNetImg2ImgPipeline,
)
from mole_diffusers.pipelines.classes import (
    MoLEStableDiffusionControlNetInpaintPipeline as MoLEStableDiffusionControlNetInpaintPipeline,
)
from mole_diffusers.pipelines.classes import MoLEStableDiffusionControlNetPipeline as MoLEStableDiffusionControlNetPipeline
from mole_diffusers.pipelines.classes import MoLEStableDiffusionImg2ImgPipeline as MoLEStableDiffusionImg2ImgPipeline
from mole_diffusers.pipelines.classes import MoLEStableDiffusionInpaintPipeline as MoLEStableDiffusionInpaintPipeline
from mole_diffusers.pipelines.classes import MoLEStableDiffusionPipeline as MoLEStableDiffusionPipeline
from mole_diffusers.pipelines.classes import (
    MoLEStableDiffusionXLControlNetImg2ImgPipeline as MoLEStableDiffusionXLControlNetImg2ImgPipeline,
)
from mole_diffusers.pipelines.classes import (
    MoLEStableDiffusionXLControlNetInpaintPipeline as MoLEStableDiffusionXLControlNetInpaintPipeline,
)
from mole_diffusers.pipelines.classes import (
    MoLEStableDiffusionXLControlNetPipeline as MoLEStableDiffusionXLControlNetPipeline,
)
from mole_diffusers.pipelines.classes import MoLEStableDiffusionXLImg2ImgPipeline as MoLEStableDiffusionXLImg2ImgPipeline
from mole_diffusers.pipelines.classes import MoLEStableDiffusionXLInpaintPipeline as MoLEStableDiffusionXLInpaintPipeline
from mole_diffusers.pipelines.classes import MoLEStableDiffusionXLPipeline as MoLEStableDiffusionXLPipeline
from mole_diffusers.pipelines.classes import MoLEWanPipeline as MoLEWanPipeline
from mole_diffusers.pipelines.classes import MoLEZImagePipeline as MoLEZImagePipeline
from mole_diffusers.pipelines.modular import MoLEAnimaBlocks as MoLEAnimaBlocks
from mole_diffusers.pipelines.modular import MoLEFlux2KleinBlocks as MoLEFlux2KleinBlocks
from mole_diffusers.pipelines.modular import MoLEFluxBlocks as MoLEFluxBlocks
from mole_diffusers.pipelines.modular import MoLEKrea2Blocks as MoLEKrea2Blocks
from mole_diffusers.pipelines.modular import MoLELTXBlocks as MoLELTXBlocks
from mole_diffusers.pipelines.modular import MoLEQwenImageBlocks as MoLEQwenImageBlocks
from mole_diffusers.pipelines.modular import MoLEStableDiffusion3Blocks as MoLEStableDiffusion3Blocks
from mole_diffusers.pipelines.modular import MoLEStableDiffusionXLBlocks as MoLEStableDiffusionXLBlocks
from mole_diffusers.pipelines.modular import MoLEWanBlocks as MoLEWanBlocks
from mole_diffusers.pipelines.modular import MoLEZImageBlocks as MoLEZImageBlocks

__version__: str
