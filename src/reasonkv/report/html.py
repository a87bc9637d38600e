"""One self-contained HTML page: styles, scripts and data inlined, and a policy that lets nothing leave the file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import Any

ALWAYS = ("base.css", "base.js")
"""Assets of every page: the look, and the button that switches between light and dark."""
INSPECTOR_STYLES = ("inspector.css", "inspector_tokens.css", "inspector_panels.css")
INSPECTOR_SCRIPTS = ("inspector_model.js", "inspector_map.js", "inspector_details.js", "inspector.js")
"""The trace inspector's parts, in the order they need each other."""


def asset(name: str) -> str:
    """The text of a file in `report/assets`.

    Raises:
        FileNotFoundError: there is no such asset.
    """
    return files("reasonkv.report").joinpath("assets", name).read_text(encoding="utf-8")


def page(
    title: str,
    body: str,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    data: Mapping[str, Any] = {},
) -> str:
    """A whole HTML document that needs no other file and no network.

    Args:
        title: plain text.
        body: HTML of everything inside `<body>`; `base.css` and `base.js` belong to every page.
        styles: names of stylesheets in `report/assets`, inlined in this order.
        scripts: names of scripts in `report/assets`, inlined in this order after the body and the data.
        data: JSON-ready values; each becomes `<script type="application/json" id="NAME">`.

    Raises:
        ValueError: data with a number that is not finite.
    """
    css = "\n".join(asset(name) for name in _each_once([ALWAYS[0], *styles]))
    code = [asset(name) for name in _each_once([ALWAYS[1], *scripts])]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(code)}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            '<meta name="color-scheme" content="light dark">',
            f"<title>{escape(title)}</title>",
            f"<style>\n{css}</style>",
            "</head>",
            "<body>",
            body,
            *(
                f'<script type="application/json" id="{escape(name)}">{embedded_json(value)}</script>'
                for name, value in data.items()
            ),
            *(f"<script>{text}</script>" for text in code),
            "</body>",
            "</html>",
            "",
        ]
    )


def embedded_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    # U+2028 and U+2029 need no care: json.dumps writes everything outside ASCII as escapes
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(code: Sequence[str]) -> str:
    """No request of any kind; only the scripts inlined here may run, by their hash.

    Style attributes stay allowed: the tokens of the inspector and the marks of a figure are coloured by them.
    """
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in code)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _each_once(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(names))
