"""Hooks of mkdocs: links out of this folder, and the roles of docstrings.

Links out of this folder (../examples/x.py) become text, or lead to `repo_url` if that is set. Roles of Sphinx, which
editors understand, become code: :class:`~.config.AutoParallelismConfig` is AutoParallelismConfig.
"""

import re
from typing import Any

_OUT = re.compile(r"\[([^\]]*)\]\(\.\./([^)\s]*)\)")
_ROLE = re.compile(r":(?:mod|class|meth|func|data|attr|exc):<code>(~?)\.*([^<]*)</code>")


def on_page_markdown(markdown: str, config: Any, **_: Any) -> str:
    if config.repo_url:
        return _OUT.sub(rf"[\1]({config.repo_url.rstrip('/')}/blob/main/\2)", markdown)
    return _OUT.sub(r"\1", markdown)


def on_page_content(html: str, **_: Any) -> str:
    def code(role: re.Match[str]) -> str:
        return f"<code>{role[2].rsplit('.', 1)[-1] if role[1] else role[2]}</code>"

    return _ROLE.sub(code, html).replace("::</p>", ":</p>")  # the sentence in front of a literal block
