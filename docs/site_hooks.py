"""On the site, links out of docs/ lead to the repository; in the repository they are relative."""

import re
from typing import Any


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """A page's text with the links that leave docs/ made whole."""
    out = "../" * (1 + page.file.src_uri.count("/"))
    return re.sub(rf"\]\({re.escape(out)}(?!\.)", f"]({config.repo_url}/blob/main/", markdown)
