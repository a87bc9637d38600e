"""The trace inspector: its data say what the cache did, its page works in a browser and asks the network for nothing."""

from __future__ import annotations

import base64
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import OpenPage, needs_browser
from tiny import TASK, tiny_loaded

from reasonkv import Budget, get_method
from reasonkv.evaluate.cells import RunConfig
from reasonkv.evaluate.fates import fates
from reasonkv.evaluate.job import TraceSettings
from reasonkv.evaluate.manifest import ResultsError
from reasonkv.evaluate.replay import replay_batch
from reasonkv.evaluate.traces import Trace, load_or_make_traces
from reasonkv.report.html import embedded_json, render
from reasonkv.report.inspector import Inspection, Inspector, Subject, inspector_page, load_inspections, save_inspection
from reasonkv.report.packing import token_pieces
from reasonkv.tasks import get_task

CELL = RunConfig(get_method("rkv:window=6,kernel=3"), Budget(40, interval=12, sinks=2, recent=8, prompt="count"))


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    loaded = tiny_loaded()
    folder = tmp_path_factory.mktemp("traces")
    settings = TraceSettings(max_new_tokens=70)
    return load_or_make_traces(
        loaded.model, loaded.tokenizer, get_task(TASK), task_spec=TASK, examples=[1], seed=0, settings=settings,
        folder=folder, batch_size=1,
    )[0]  # fmt: skip


def inspector() -> Inspector:
    return Inspector(tiny_loaded(), CELL)


@pytest.fixture(scope="module")
def replayed(trace: Trace) -> Inspection:
    return inspector().replay(trace.row, Subject.of_task(get_task(TASK), TASK, 1))


@pytest.fixture(scope="module")
def generated(trace: Trace) -> Inspection:
    return inspector().generation(trace.row, Subject.of_task(get_task(TASK), TASK, 1), max_new_tokens=60)


def array(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


def test_the_data_are_the_fates_of_the_recorded_plans(replayed: Inspection, generated: Inspection) -> None:
    for made in (replayed, generated):
        data = made.data
        count = len(data["pieces"])
        found = fates(made.plans, count)
        assert len(data["events"]["length"]) > 3
        dropped = array(data["fates"]["dropped"], "<i2").reshape(len(data["layers"]), data["heads"], count)
        assert np.array_equal(dropped, found.dropped_GHN.numpy())
        assert data["fates"]["folded"] is None
        assert json.loads(embedded_json(data)) == json.loads(json.dumps(data))


def test_the_scores_are_those_of_replay(replayed: Inspection, trace: Trace) -> None:
    (outcome,) = replay_batch(tiny_loaded().model, [trace], CELL)
    data = replayed.data
    assert data["stats"]["agreement"] == pytest.approx(outcome.metrics.top1, abs=1e-5)
    assert data["stats"]["nll"] == pytest.approx(outcome.metrics.nll, abs=1e-4)
    assert data["first_mismatch"] == outcome.metrics.first_mismatch
    assert data["scores"]["differs"][0] == data["first_mismatch"]


def test_attention_is_what_full_kv_paid_within_one_step_of_the_scale(replayed: Inspection) -> None:
    data = replayed.data["attention"]
    levels = array(data["data"], "u1").reshape(data["shape"]).astype(float)
    amounts = np.where(levels > 0, data["least"] * data["ratio"] ** (levels - 1), 0)
    edges = [0, *replayed.data["events"]["length"], len(replayed.data["pieces"]) - 1]
    # every query pays one unit in all, to itself and to what came before it
    expected = np.diff(edges)
    assert np.allclose(amounts.sum(-1), expected[None, None], rtol=0.04)


def test_a_generation_shows_both_runs_up_to_where_they_part(generated: Inspection, trace: Trace) -> None:
    data = generated.data
    at = data["first_divergence"]
    own = data["pieces"][data["prompt"] :]
    assert at is not None
    assert data["full_pieces"][1:at] == own[1:at]
    assert data["answer"]["shown"]["truncated"]
    assert data["answer"]["full"]["correct"] == trace.correct


def test_pieces_join_to_the_text_and_none_is_invisible() -> None:
    tokenizer = tiny_loaded().tokenizer
    ids = torch.tensor(tokenizer("n08 5 : n08 q ;", add_special_tokens=False)["input_ids"])
    pieces = token_pieces(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all(piece.strip() for piece in token_pieces(tokenizer, torch.arange(len(tokenizer))))


def big(tokens: int = 2000, layers: int = 3, heads: int = 2) -> dict[str, Any]:
    """An inspection of a size that no tiny model reaches; fates by a fixed rule, with folds."""
    events = list(range(300, tokens, 128))
    place = np.arange(tokens)
    dropped = np.full((layers, heads, tokens), -1, "<i2")
    for cell in range(layers * heads):
        gone = (place * (cell + 3)) % 7 > 2
        for number, length in enumerate(events):
            fresh = gone & (place < length - 64) & (dropped[cell // heads, cell % heads] < 0)
            dropped[cell // heads, cell % heads][fresh] = number
    folded = np.full_like(dropped, -1)
    folded[:, :, 5::11] = 2
    levels = np.random.default_rng(0).integers(0, 200, (layers, heads, len(events) + 1, tokens - 1), "u1")

    def text(values: np.ndarray) -> str:
        return base64.b64encode(values.tobytes()).decode()

    return {
        "format": 1, "kind": "replay", "model": "tiny", "method": "toy", "task": "program", "example": 0, "seed": 0,
        "budget": Budget(128, prompt="count").to_dict(), "prompt": 300, "layers": list(range(layers)), "heads": heads,
        "pieces": [(" ;" if i % 9 == 8 else f" n{i % 90:02d}") for i in range(tokens)],
        "events": {"length": events, "before": [256] * len(events), "after": [128] * len(events)},
        "fates": {"dropped": text(dropped), "folded": text(folded), "into": text(np.full(dropped.shape, 9, "<i4"))},
        "protected": {"sinks": 4, "recent": 64, "prompt": False},
        "attention": {"shape": list(levels.shape), "least": 1e-4, "ratio": 1.075, "data": text(levels)},
        "scores": {
            "nll": [0.25] * (tokens - 300), "full_nll": [0.125] * (tokens - 300), "top": ["n00"] * (tokens - 300),
            "full_top": ["</script>"] * (tokens - 300), "differs": [700],
        },
        "first_mismatch": 700, "first_divergence": None, "full_pieces": None, "expected": "<b>1</b>",
        "answer": {"full": {"text": "1", "closed": True, "correct": True}},
        "stats": {"mean": 190.0, "peak": 300, "held": 128, "agreement": 0.999, "nll": 0.1},
    }  # fmt: skip


def test_two_thousand_tokens_of_six_heads_stay_below_one_and_a_half_megabytes() -> None:
    assert len(inspector_page(big())) < 1_500_000


def test_saved_inspections_are_found_again(tmp_path: Path, replayed: Inspection) -> None:
    path = save_inspection(tmp_path, replayed.data)
    assert path.parent.name == "inspections"
    assert load_inspections(tmp_path) == {path.stem: json.loads(json.dumps(replayed.data))}
    path.write_text("{}")
    with pytest.raises(ResultsError, match="delete it and make it again"):
        load_inspections(tmp_path)


def test_no_text_can_end_its_script_element() -> None:
    hostile = {"d": {"x": "</script><script>alert(1)</script>"}}
    text = render("inspector.html.j2", title="a & <b>", heading="", data=hostile)
    assert "alert(1)</script>" not in text
    assert "<title>a &amp; &lt;b&gt;</title>" in text
    with pytest.raises(ValueError, match="JSON compliant"):
        embedded_json(float("nan"))


@needs_browser
@pytest.mark.parametrize("width", [1440, 390])
def test_the_page_works_in_a_browser_and_no_request_leaves_it(open_page: OpenPage, tmp_path: Path, width: int) -> None:
    path = tmp_path / "page.html"
    path.write_text(inspector_page(big()))
    with open_page(path, width, 900, dark=width == 390) as tab:
        keys = tab.handle.keyboard

        def classes(token: int) -> set[str]:
            return set(tab.evaluate("i => document.querySelector(`[data-i='${i}']`).className", token).split())

        assert tab.evaluate("document.querySelectorAll('.flow .t').length") == 2000
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert "unseen" not in classes(1999)
        tab.handle.click("text=First token that differs")
        assert {"chosen", "wrong", "differs"} <= classes(1000)
        assert tab.evaluate("document.activeElement.dataset.i") == "1000"
        assert "✗ differs" in tab.evaluate("document.querySelector('.details').textContent")
        assert "unseen" in classes(1999)
        keys.press("ArrowRight")
        assert tab.evaluate("document.activeElement.dataset.i") == "1001"
        keys.press("ArrowUp")
        assert int(tab.evaluate("document.activeElement.dataset.i")) < 1001
        event = int(tab.evaluate("document.querySelector('.slider').value"))
        keys.press(".")
        assert int(tab.evaluate("document.querySelector('.slider').value")) == event + 1
        keys.press("a")
        assert tab.evaluate("document.querySelectorAll('.flow .missed').length") > 0
        keys.press("a")
        tab.handle.click(".choice[aria-label=Layer] button >> nth=1")
        tab.handle.click(".choice[aria-label='KV head'] button >> nth=1")
        shown = tab.evaluate("Array.from(document.querySelectorAll('.flow .t'), t => t.className)")
        assert any("folded" in name for name in shown) and any("dropped" in name for name in shown)
        assert not any("k2" in name.split() for name in shown)  # one head keeps a token or does not
        assert tab.evaluate("document.querySelector('.facts dd').textContent") == "<b>1</b>"
        assert tab.errors == []
        assert tab.outside() == []
        assert len(tab.requests) == 1


def opened(tmp_path: Path) -> Path:
    path = tmp_path / "page.html"
    path.write_text(inspector_page(big()))
    return path


@needs_browser
def test_the_details_stay_below_the_controls_and_speak_only_of_focused_tokens(
    open_page: OpenPage, tmp_path: Path
) -> None:
    with open_page(opened(tmp_path)) as tab:
        tab.handle.click("text=First token that differs")
        for share in (0.3, 0.8, 1.0):
            tab.evaluate("s => scrollTo(0, s * document.body.scrollHeight)", share)
            edges = "['.controls', '.details'].map(s => document.querySelector(s).getBoundingClientRect())"
            controls, side = tab.evaluate(f"{edges}.map(b => [b.top, b.bottom])")
            assert side[0] >= controls[1]
        assert tab.evaluate("document.querySelector('.details').getAttribute('aria-live')") is None
        tab.handle.hover("[data-i='1003']")
        assert tab.evaluate("document.querySelector(\"[data-i='1003']\").getAttribute('aria-label')") is None
        tab.handle.focus("[data-i='1004']")
        label = tab.evaluate("document.activeElement.getAttribute('aria-label')")
        assert "output token 704. Not in the cache yet" in label


@needs_browser
def test_a_removed_inspector_stops_playing(open_page: OpenPage, tmp_path: Path) -> None:
    with open_page(opened(tmp_path)) as tab:
        left = tab.evaluate(
            """async () => {
                const place = document.querySelector('[data-inspection]');
                const data = JSON.parse(document.getElementById('inspection').textContent);
                const made = reasonkv.mountInspector(place, data);
                document.querySelector('.play').click();
                const before = made.state.playing;
                place.remove();
                await new Promise((done) => setTimeout(done, 1100));
                return [before > 0, made.state.playing];
            }"""
        )
        assert left == [True, 0]
        assert tab.errors == []


@needs_browser
def test_what_full_kv_looked_at_and_the_cache_had_dropped_is_named(open_page: OpenPage, tmp_path: Path) -> None:
    data = big()
    levels = np.zeros(data["attention"]["shape"], "u1")
    length, query = data["events"]["length"], 1000
    interval = sum(n < query for n in length)
    levels[1, 1, interval, 10] = 200  # token 10 is dropped in layer 1, head 1
    data["attention"]["data"] = base64.b64encode(levels.tobytes()).decode()
    dropped = array(data["fates"]["dropped"], "<i2").reshape(3, 2, -1)
    assert 0 <= dropped[1, 1, 10] < interval
    path = tmp_path / "page.html"
    path.write_text(inspector_page(data))
    with open_page(path, 390, 800, dark=True) as tab:
        tab.handle.click("text=First token that differs")
        chips = tab.evaluate("Array.from(document.querySelectorAll('.suspects .chip'), (chip) => chip.title)")
        assert len(chips) == 1 and chips[0].startswith("prompt token 10: attention")
        box = tab.evaluate("(({ left, right, bottom }) => [left, right, bottom])"
                           "(document.querySelector('.details').getBoundingClientRect())")  # fmt: skip
        assert box == [0, 390, 800]  # the bottom sheet
        tab.handle.click(".suspects .chip")
        assert tab.evaluate("document.activeElement.dataset.i") == "10"


@needs_browser
@pytest.mark.parametrize("kind", ["replay", "generation"])
def test_a_run_that_never_parts_says_so_whatever_its_answer_is_worth(
    open_page: OpenPage, tmp_path: Path, kind: str
) -> None:
    data = big(600)
    wrong = {"text": "7", "closed": True, "correct": False, "truncated": False}
    data |= {"kind": kind, "first_mismatch": None, "answer": {"full": wrong, "shown": wrong}}
    data["scores"]["differs"] = []
    if kind == "generation":
        data["full_pieces"] = data["pieces"][300:]
    path = tmp_path / "page.html"
    path.write_text(inspector_page(data))
    with open_page(path) as tab:
        text = tab.handle.locator(".inspector").inner_text()
        assert "Nothing went wrong" not in text
        assert ("Every token agrees" if kind == "replay" else "Both runs are equal") in text


@needs_browser
def test_thirty_layers_keep_the_names_of_their_rows(open_page: OpenPage, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text(inspector_page(big(1200, layers=30, heads=2)))
    with open_page(path) as tab:
        names = tab.evaluate("Array.from(document.querySelectorAll('.strip .rows span'), one => one.textContent)")
        assert names[0] == "layer 0" and len(names) >= 5 and all(name.startswith("layer") for name in names)
        boxes = tab.evaluate(
            "Array.from(document.querySelectorAll('.strip .rows span'), one => { const b = one.getBoundingClientRect(); return [b.top, b.bottom]; })"
        )
        assert all(one[1] <= other[0] + 1 for one, other in pairwise(boxes))
