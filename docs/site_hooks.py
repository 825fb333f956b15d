"""On the site, links out of docs/ lead to the repository; in the repository they are relative. Pictures open whole, and the
lists of the reference are whole docstrings."""

import re
from pathlib import Path
from typing import Any

from make_reference import with_docstrings
from PIL import Image


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """A page's text with its lists of docstrings, and with the links that leave docs/ made whole."""
    markdown = with_docstrings(markdown)
    out = "../" * (1 + page.file.src_uri.count("/"))
    return re.sub(rf"\]\({re.escape(out)}(?!\.)", f"]({config.repo_url}/blob/main/", markdown)


def on_page_content(html: str, *, page: Any, **_: Any) -> str:
    """A page's HTML with a link to its file around each drawn picture, which the page shrinks; its class is for site.css."""

    def linked(image: re.Match[str]) -> str:
        with Image.open(Path(page.file.abs_src_path).parent / Path(image[1]).name) as picture:
            shape = "wide" if picture.width > 2 * picture.height else "other"
        return f'<a class="{shape}" href="{image[1]}">{image[0]}</a>'

    return re.sub(r'<img [^>]*?src="([^"]+\.png)"[^>]*>', linked, html)
