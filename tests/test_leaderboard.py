"""The leaderboard's script sorts and filters; without it the page is a plain table."""

from __future__ import annotations

import re
from pathlib import Path

from browser import OpenPage, needs_browser, open_page  # noqa: F401

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "results" / "leaderboard" / "tables.md"
FIRST = (
    "() => [...document.querySelectorAll('tbody tr')].filter(one => !one.hidden).map(one => one.cells[AT].textContent)"
)


@needs_browser
def test_a_heading_sorts_and_a_choice_filters(open_page: OpenPage, tmp_path: Path) -> None:  # noqa: F811
    board = re.search(r"<div class=\"leaderboard\".*</div>", PAGE.read_text(), re.S)
    assert board is not None
    script = (ROOT / "docs" / "js" / "leaderboard.js").read_text()
    file = tmp_path / "page.html"
    file.write_text(f"<meta charset=utf-8>{board[0]}<script>{script}</script>")
    with open_page(file, 500) as page:
        rows = len(page.evaluate(FIRST.replace("AT", "0")))
        for order in (1, -1):
            page.handle.click("th:nth-child(2) button")
            kl = [float(one.split()[0]) for one in page.evaluate(FIRST.replace("AT", "1"))]
            assert kl == sorted(kl)[::order] and len(kl) == rows
        page.handle.select_option("select[aria-label=slots]", "128")
        assert set(page.evaluate(FIRST.replace("AT", "5"))) == {"128"}
        page.handle.select_option("select[aria-label=model]", "SmolLM2-135M")
        assert 0 < len(page.evaluate(FIRST.replace("AT", "0"))) < rows
        page.handle.click("th:nth-child(5) button")  # a column with empty cells, which stay at the end
        assert not page.errors and not page.outside()
