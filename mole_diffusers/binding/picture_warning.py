"""Warnings about a picture that is being drawn. Python shows them for each picture, unless the user has filtered them."""

import warnings


class PictureWarning(UserWarning):
    """Something that was asked for a picture does not act in it."""


warnings.filterwarnings("always", category=PictureWarning, append=True)
