"""The public names of this package and the modules they are in."""

from .composing import composed as composed
from .composing import report as report
from .composing import retrieve_for as retrieve_for
from .encoders import Encoder as Encoder
from .encoders import PipelineText as PipelineText
from .encoders import SentenceText as SentenceText
from .encoders import text_beside as text_beside
from .library import LoraLibrary as LoraLibrary
from .library import RetrievedLora as RetrievedLora
from .modes import THRESHOLD as THRESHOLD
from .modes import Mode as Mode
from .store import LibraryEntry as LibraryEntry
