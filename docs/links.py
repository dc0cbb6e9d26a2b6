"""Hook of mkdocs: links out of this folder (../examples/x.py) become text, or lead to `repo_url` if that is set."""

import re
from typing import Any

_OUT = re.compile(r"\[([^\]]*)\]\(\.\./([^)\s]*)\)")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    if config.repo_url:
        return _OUT.sub(rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)", markdown)
    return _OUT.sub(r"\1", markdown)
