"""The public names of this package and the modules they are in."""

from .compare import columns as columns
from .compare import compare as compare
from .compare import image_grid as image_grid
from .compare import sample as sample
from .compare import ways as ways
from .contributions import Contributions as Contributions
from .contributions import contributions as contributions
from .gate_figures import COLOURS as COLOURS
from .gate_figures import block_places as block_places
from .gate_figures import colours as colours
from .gate_figures import heat_map as heat_map
from .gate_figures import losses as losses
from .gate_figures import places as places
from .gate_figures import shares as shares
from .layout_figure import as_grey as as_grey
from .layout_figure import overlay as overlay
