"""Self-contained HTML pages: styles, scripts and data inlined, and a policy that lets nothing leave the file."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

INSPECTOR_STYLES = ("inspector.css", "inspector_tokens.css", "inspector_panels.css")
INSPECTOR_SCRIPTS = ("inspector_model.js", "inspector_map.js", "inspector_details.js", "inspector.js")
"""The trace inspector's parts, in the order they need each other."""


def render(
    template: str,
    *,
    styles: Sequence[str] = (),
    scripts: Sequence[str] = (),
    code: Sequence[str] = (),
    data: Mapping[str, Any] = {},
    **values: Any,
) -> str:
    """Return a whole HTML document that needs no other file and no network.

    The page's policy forbids every request, and runs only the scripts inlined here, by their hash. Style attributes
    stay allowed: the tokens of the inspector and the marks of a figure are coloured by them.

    Args:
        template: a file in `report/templates` that extends `page.html.j2`.
        styles: stylesheets in `report/assets`, after `base.css`.
        data: JSON-ready values; each becomes `<script type="application/json" id="NAME">`.
        values: what the template shows, `title` among them; text is escaped.

    Raises:
        ValueError: data with a number that is not finite.
    """
    environment = Environment(
        loader=PackageLoader("reasonkv.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    code = [_asset("base.js"), *code, *(_asset(name) for name in scripts)]
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code)
    return environment.get_template(template).render(
        css=Markup("\n".join(_asset(name) for name in ("base.css", *styles))),
        code=[Markup(text) for text in code],
        hashes=Markup(" ".join(f"'sha256-{one}'" for one in hashes)),
        data={name: embedded_json(value) for name, value in data.items()},
        **values,
    )


def embedded_json(value: Any) -> Markup:
    """Return JSON that cannot end the script element it stands in.

    Raises:
        ValueError: a number is not finite.
    """
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    # U+2028 and U+2029 need no care: json.dumps writes everything outside ASCII as escapes
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def _asset(name: str) -> str:
    return files("reasonkv.report").joinpath("assets", name).read_text(encoding="utf-8")
