"""The public names of training and where they are, see `mole_diffusers.lazy`."""

from mole_diffusers.training.clip import Clip as Clip
from mole_diffusers.training.clip import read_clip as read_clip
from mole_diffusers.training.config import GateTraining as GateTraining
from mole_diffusers.training.config import LoraTraining as LoraTraining
from mole_diffusers.training.config import Validation as Validation
from mole_diffusers.training.data import Samples as Samples
from mole_diffusers.training.data import TrainingData as TrainingData
from mole_diffusers.training.data import read_folder as read_folder
from mole_diffusers.training.gate_trainer import mean_losses as mean_losses
from mole_diffusers.training.gate_trainer import train_gates as train_gates
from mole_diffusers.training.latents import encode as encode
from mole_diffusers.training.lora_adapter import save_lora as save_lora
from mole_diffusers.training.lora_trainer import class_samples as class_samples
from mole_diffusers.training.lora_trainer import train_lora as train_lora
