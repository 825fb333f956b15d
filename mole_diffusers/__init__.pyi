"""The public names of the package and the modules they are in."""

from .binding.picture_warning import PictureWarning as PictureWarning
from .gates import GateConfig as GateConfig
from .gates.transforms import Strongest as Strongest
from .lora import Expert as Expert
from .lora import read_expert as read_expert
from .lora.writing import save_expert as save_expert
from .merging.activations import Activations as Activations
from .merging.merge import merge as merge
from .mixture import Mixture as Mixture
from .mixture import attach as attach
from .mixture import attached as attached
from .mixture import detach as detach
from .patching.gating.settings import StrengthPlan as StrengthPlan
from .patching.gating.trace import Trace as Trace
from .patching.host.denoiser_inputs import denoiser as denoiser
from .patching.host.denoiser_inputs import models_of as models_of
from .patching.install.gate_inputs import MoLEAttnProcessor as MoLEAttnProcessor
from .patching.subjects.per_subject import explain as explain
from .patching.subjects.prompt_subjects import Tiling as Tiling
from .pipelines.classes import MoLEChromaPipeline as MoLEChromaPipeline
from .pipelines.classes import MoLEFlux2KleinPipeline as MoLEFlux2KleinPipeline
from .pipelines.classes import MoLEFlux2Pipeline as MoLEFlux2Pipeline
from .pipelines.classes import MoLEFluxControlPipeline as MoLEFluxControlPipeline
from .pipelines.classes import MoLEFluxPipeline as MoLEFluxPipeline
from .pipelines.classes import MoLEHiDreamImagePipeline as MoLEHiDreamImagePipeline
from .pipelines.classes import MoLEKrea2Pipeline as MoLEKrea2Pipeline
from .pipelines.classes import MoLELTXPipeline as MoLELTXPipeline
from .pipelines.classes import MoLELumina2Pipeline as MoLELumina2Pipeline
from .pipelines.classes import MoLEPipeline as MoLEPipeline
from .pipelines.classes import MoLEQwenImagePipeline as MoLEQwenImagePipeline
from .pipelines.classes import MoLEStableDiffusion3Pipeline as MoLEStableDiffusion3Pipeline
from .pipelines.classes import (
    MoLEStableDiffusionControlNetImg2ImgPipeline as MoLEStableDiffusionControlNetImg2ImgPipeline,
)
from .pipelines.classes import (
    MoLEStableDiffusionControlNetInpaintPipeline as MoLEStableDiffusionControlNetInpaintPipeline,
)
from .pipelines.classes import MoLEStableDiffusionControlNetPipeline as MoLEStableDiffusionControlNetPipeline
from .pipelines.classes import MoLEStableDiffusionImg2ImgPipeline as MoLEStableDiffusionImg2ImgPipeline
from .pipelines.classes import MoLEStableDiffusionInpaintPipeline as MoLEStableDiffusionInpaintPipeline
from .pipelines.classes import MoLEStableDiffusionPipeline as MoLEStableDiffusionPipeline
from .pipelines.classes import (
    MoLEStableDiffusionXLControlNetImg2ImgPipeline as MoLEStableDiffusionXLControlNetImg2ImgPipeline,
)
from .pipelines.classes import (
    MoLEStableDiffusionXLControlNetInpaintPipeline as MoLEStableDiffusionXLControlNetInpaintPipeline,
)
from .pipelines.classes import (
    MoLEStableDiffusionXLControlNetPipeline as MoLEStableDiffusionXLControlNetPipeline,
)
from .pipelines.classes import MoLEStableDiffusionXLImg2ImgPipeline as MoLEStableDiffusionXLImg2ImgPipeline
from .pipelines.classes import MoLEStableDiffusionXLInpaintPipeline as MoLEStableDiffusionXLInpaintPipeline
from .pipelines.classes import MoLEStableDiffusionXLPipeline as MoLEStableDiffusionXLPipeline
from .pipelines.classes import MoLEWanPipeline as MoLEWanPipeline
from .pipelines.classes import MoLEZImagePipeline as MoLEZImagePipeline
from .pipelines.modular import MoLEAnimaBlocks as MoLEAnimaBlocks
from .pipelines.modular import MoLEFlux2KleinBlocks as MoLEFlux2KleinBlocks
from .pipelines.modular import MoLEFluxBlocks as MoLEFluxBlocks
from .pipelines.modular import MoLEKrea2Blocks as MoLEKrea2Blocks
from .pipelines.modular import MoLELTXBlocks as MoLELTXBlocks
from .pipelines.modular import MoLEQwenImageBlocks as MoLEQwenImageBlocks
from .pipelines.modular import MoLEStableDiffusion3Blocks as MoLEStableDiffusion3Blocks
from .pipelines.modular import MoLEStableDiffusionXLBlocks as MoLEStableDiffusionXLBlocks
from .pipelines.modular import MoLEWanBlocks as MoLEWanBlocks
from .pipelines.modular import MoLEZImageBlocks as MoLEZImageBlocks
from .safe_files import RefusedFileError as RefusedFileError

__version__: str
