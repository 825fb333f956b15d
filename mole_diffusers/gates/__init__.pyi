"""The public names of this package and the modules they are in."""

from .bank import GateBank as GateBank
from .checkpoint import GATE_CONFIG as GATE_CONFIG
from .checkpoint import GATE_WEIGHTS as GATE_WEIGHTS
from .checkpoint import Checkpoint as Checkpoint
from .checkpoint import UnfitGatesError as UnfitGatesError
from .checkpoint import load_gates as load_gates
from .checkpoint import save_gates as save_gates
from .config import GATE_TYPES as GATE_TYPES
from .config import RECOMMENDED as RECOMMENDED
from .config import GateConfig as GateConfig
from .contract import Context as Context
from .contract import Gate as Gate
from .contract import GatePlace as GatePlace
from .contract import GateType as GateType
from .contract import Layer as Layer
from .hub import CARD as CARD
from .hub import model_card as model_card
from .hub import upload as upload
from .transforms import Strongest as Strongest
from .transforms import frozen_random as frozen_random
from .transforms import hardened as hardened
from .transforms import uniform as uniform
