"""The public names of this package and the modules they are in."""

from .expert import COMPONENTS as COMPONENTS
from .expert import Expert as Expert
from .expert import LoraWeights as LoraWeights
from .families import base_of as base_of
from .families import check_family as check_family
from .families import family_of as family_of
from .families import fits as fits
from .families import stated_base as stated_base
from .host_names import with_host_names as with_host_names
from .keys import layer_key as layer_key
from .keys import parse_key as parse_key
from .metadata import NOTES as NOTES
from .metadata import as_read as as_read
from .metadata import preferred_weight as preferred_weight
from .metadata import summarize as summarize
from .metadata import training_tags as training_tags
from .own_words import own_words as own_words
from .own_words import words_of as words_of
from .reading import read_expert as read_expert
from .stacking import match as match
from .strengths import MAX_STRENGTH as MAX_STRENGTH
from .writing import save_expert as save_expert
