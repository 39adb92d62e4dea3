"""Turn LaTeX into MathML while the pages are built, so that no script from outside draws the formulas.

`$$...$$` is a formula on its own line, `$...$` one within a sentence. Code blocks and code spans are left alone.
"""

import re

from latex2mathml.converter import convert

_CODE_OR_FORMULA = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)[^\n]*$|`+[^`\n]+`+)"
    r"|\$\$(?P<display>.+?)\$\$"
    r"|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])",
    re.DOTALL | re.MULTILINE,
)


def on_page_markdown(markdown: str, **_: object) -> str:
    """Return the page with every formula as MathML."""
    return _CODE_OR_FORMULA.sub(_replace, markdown)


def _replace(found: re.Match[str]) -> str:
    if found["code"]:
        return found["code"]
    if found["display"]:
        formula = convert(" ".join(found["display"].split()), display="block")
        return f'\n<div class="formula" markdown="0">{formula}</div>\n'
    # A line that begins with <math> would be a block of its own.
    return f'<span class="math">{convert(" ".join(found["inline"].split()))}</span>'
