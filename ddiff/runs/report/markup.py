"""HTML and SVG text whose content is escaped.

>>> element("p", "a < b", _class="note")
'<p class="note">a &lt; b</p>'
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any


class Markup(str):
    """Text that is HTML or SVG already, and is not escaped again."""


EMPTY = Markup("")
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def escape(text: object) -> Markup:
    """Escape a text for HTML. `Markup` is returned unchanged."""
    if isinstance(text, Markup):
        return text
    # XML, and so an SVG file, allows no control characters
    printable = CONTROLS.sub("\N{REPLACEMENT CHARACTER}", str(text))
    return Markup(html.escape(printable))


def join(parts: Iterable[object], separator: str = "") -> Markup:
    """Join parts, each of which is escaped unless it is `Markup`."""
    return Markup(separator.join(escape(part) for part in parts))


def element(name: str, /, *children: object, **attributes: object) -> Markup:
    """Return an HTML or SVG element with escaped children and attribute values.

    An attribute is named by its keyword, without leading `_` and with `-` instead of `_`. An
    attribute with the value None is left out.
    """
    return Markup(f"<{name}{_write_attributes(attributes)}>{join(children)}</{name}>")


def void_element(name: str, /, **attributes: object) -> Markup:
    """Return an HTML element without content and end tag, such as an image."""
    return Markup(f"<{name}{_write_attributes(attributes)}>")


def _write_attributes(attributes: Mapping[str, object]) -> str:
    written = []
    for keyword, value in attributes.items():
        if value is not None:
            # viewBox and other names of SVG keep their capitals
            key = keyword.lstrip("_").replace("_", "-")
            written.append(f' {key}="{escape(value)}"')
    return "".join(written)


def json_script(name: str, content: Any) -> Markup:
    """Return a script element with JSON data, which the page reads by its id `name`."""
    text = json.dumps(content, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    # "</script>" or "<!--" in a text would end or change the element
    text = text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return Markup(f'<script type="application/json" id="{escape(name)}">{text}</script>')
