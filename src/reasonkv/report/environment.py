"""The report's section on where results come from: commands to make them again, versions, devices, manifests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from typing import Any

from reasonkv.report.command import command


def environment_section(named: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Every folder's command and manifest, and what they ran on: once where it was the same for all; HTML.

    Args:
        named: a name and the manifest of each folder.
    """
    facts = [_facts(manifest) for _, manifest in named]
    shared = all(one == facts[0] for one in facts)
    parts = []
    for (name, manifest), own in zip(named, facts, strict=True):
        begun, run = (escape(str(manifest.get(key, "?"))) for key in ("date", "run"))
        parts.append(
            f'<h3>{escape(name)}</h3><pre class="command" tabindex="0">{escape(command(manifest))}</pre>'
            f'<p class="muted">Begun {begun}, run {run}.</p>{"" if shared else _table(own)}'
            "<details><summary>The whole manifest</summary>"
            f'<pre tabindex="0">{escape(json.dumps(manifest, indent=2))}</pre></details>'
        )
    if shared:
        parts.append(f"<h3>{'Environment of all' if len(named) > 1 else 'Environment'}</h3>{_table(facts[0])}")
    return "".join(parts)


def _facts(manifest: dict[str, Any]) -> dict[str, str]:
    model = manifest.get("model", {})
    return {
        "model": f"{model.get('name', '?')}, weights {model.get('hash', '?')}",
        "arithmetic": str(manifest.get("arguments", {}).get("dtype", "?")),
        "device": str(manifest.get("device", "?")),
        **{name: str(text) for name, text in manifest.get("versions", {}).items()},
    }


def _table(facts: dict[str, str]) -> str:
    rows = "".join(f'<tr><th scope="row">{escape(key)}</th><td>{escape(text)}</td></tr>' for key, text in facts.items())
    return f'<div class="table-frame environment"><table>{rows}</table></div>'
