"""The public names of this package and the modules they are in."""

from .activations import Activations as Activations
from .factors import Layer as Layer
from .factors import Pair as Pair
from .factors import present as present
from .layers import as_expert as as_expert
from .layers import layers_of as layers_of
from .layers import merge_key as merge_key
from .merge import METHODS as METHODS
from .merge import by_activations as by_activations
from .merge import check_fits as check_fits
from .merge import merge as merge
from .merge import resolved as resolved
