// The trace inspector: the text of a trace, every token coloured by its fate in a compressed KV cache.
// mountInspector(element, data) builds it from what report/inspector.py wrote; see inspector_model.js for the words.
"use strict";
(() => {
  const { model, make, group, visible, strip, details, fateWords, place, sideBySide } = window.reasonkv.inspector;
  // attention of one token, in whole queries: the bounds of the four shades
  const SHADES = [0.1, 0.5, 2, 8];
  const mounted = new WeakMap();

  function mountInspector(element, data) {
    mounted.get(element)?.destroy();
    const m = model(data), gone = new AbortController();
    const state = { step: m.end, layer: -1, head: -1, mode: "fate", token: -1, playing: 0 };
    const differs = new Set(data.scores.differs.map((t) => data.prompt + t));
    const wrongAt = data.kind === "generation" ? data.first_divergence : data.first_mismatch;
    const wrong = wrongAt === null ? -1 : Math.min(data.prompt + wrongAt, m.count - 1);
    const root = make("section", "inspector");
    root.setAttribute("aria-label", "Trace inspector");
    element.replaceChildren(root);
    const part = (tag, className, text, parent = root) => parent.appendChild(make(tag, className, text));
    // the cells of the chosen layer and head
    const chosen = () => {
      const all = [];
      data.layers.forEach((_, g) => {
        for (let h = 0; h < m.heads; h++)
          if ((state.layer < 0 || state.layer === g) && (state.head < 0 || state.head === h)) all.push(g * m.heads + h);
      });
      return all;
    };

    /* What happened, in words. */
    const facts = part("dl", "facts");
    const fact = (name, text, mark, more) => {
      const item = part("div", mark || "", undefined, facts);
      part("dt", "", name, item);
      part("dd", "", text, item);
      if (more) part("dd", "more", more, item);
    };
    const { full, shown } = data.answer;
    // nobody knows whether the answer to a prompt of one's own is right
    const verdict = ({ correct, truncated }) => [correct === null ? "" : correct ? "✓ right" : "✗ wrong", truncated ? "cut off" : ""];
    const quoted = (answer) => [verdict(answer).filter(Boolean).join(", "), answer.text].filter(Boolean).join(": ");
    const colour = ({ correct }) => (correct === null ? "" : correct ? "good" : "bad");
    if (data.expected !== null) fact("Expected", data.expected);
    if (full) fact("Full KV", quoted(full), colour(full));
    if (shown) fact("Compressed", quoted(shown), colour(shown));
    else fact("Same next token as full KV", `${(100 * data.stats.agreement).toFixed(1)} % of ${group(m.count - data.prompt)}, ${differs.size} differ`, differs.size ? "bad" : "good");
    fact("Slots per head", `${group(Math.round(data.stats.mean))} on average, ${group(data.stats.peak)} at most`, "", slotRule());
    function slotRule() {
      if (!data.budget) return "no budget: nothing is evicted";
      const extra = data.budget.prompt === "on_top" ? ` + prompt ${group(data.prompt)}` : "";
      const every = data.budget.size ? ` of every ${group(data.budget.size)}` : "";
      return `budget ${group(data.budget.tokens)}${every}${extra}; full KV ${group(m.count)}`;
    }

    /* Controls. */
    const bar = part("div", "controls");
    const drawStrip = strip(m, bar, { differs, wrong, pick: (i) => select(i, true) });
    const drawMap = () => drawStrip(chosen(), state);
    const line = part("div", "line", undefined, bar);
    const button = (text, label, act, className = "") => {
      const made = part("button", className, text, line);
      made.type = "button";
      made.setAttribute("aria-label", label);
      made.addEventListener("click", act);
      return made;
    };
    const back = button("‹", "Previous event", () => go(state.step - 1), "square");
    const play = button("▶ Play", "Play the compactions", () => (state.playing ? stop() : start()), "play");
    const next = button("›", "Next event", () => go(state.step + 1), "square");
    const slider = part("input", "slider", undefined, line);
    Object.assign(slider, { type: "range", min: 0, max: m.end, step: 1 });
    slider.setAttribute("aria-label", "Event");
    slider.addEventListener("input", () => { stop(); go(+slider.value); });
    const row = part("div", "line", undefined, bar);
    const choice = (label, options, get, set) => {
      const frame = part("div", "choice", undefined, row);
      frame.setAttribute("role", "group");
      frame.setAttribute("aria-label", label);
      part("span", "label", label, frame);
      if (options.length > 9) {
        const list = part("select", "", undefined, frame);
        list.setAttribute("aria-label", label);
        for (const [text, key] of options) list.add(new Option(text, key));
        list.addEventListener("change", () => { set(isNaN(list.value) ? list.value : +list.value); paint(); });
        return;
      }
      const buttons = options.map(([text, key]) => {
        const made = part("button", "", text, frame);
        made.type = "button";
        made.addEventListener("click", () => { set(key); mark(); paint(); });
        return made;
      });
      const mark = () => buttons.forEach((one, i) => one.setAttribute("aria-pressed", String(options[i][1] === get())));
      mark();
      return mark;
    };
    const markMode = choice("Colour", [["fate", "fate"], ["attention", "need"]], () => state.mode, (v) => (state.mode = v));
    choice("Layer", [["all", -1], ...data.layers.map((n, g) => [String(n), g])], () => state.layer, (v) => (state.layer = v));
    choice("KV head", [["all", -1], ...Array.from({ length: m.heads }, (_, h) => [String(h), h])], () => state.head, (v) => (state.head = v));
    const replay = data.kind === "replay";
    const none = replay ? "Every token agrees" : "Both runs are equal";
    const jump = part("button", "primary", wrong < 0 ? none : replay ? "First token that differs" : "Where the runs part", row);
    jump.type = "button";
    jump.disabled = wrong < 0;
    // the token was predicted by the query before it: the events that had happened by then are those that count
    jump.addEventListener("click", () => { stop(); go(m.interval(wrong)); select(wrong, true); });
    const status = part("p", "status", "", bar);
    status.setAttribute("aria-live", "polite");

    const legend = part("ul", "legend");
    legend.setAttribute("aria-label", "Legend");

    /* The text: one span per token; only classes change afterwards. */
    const split = part("div", "split");
    const text = part("div", "text", undefined, split);
    const side = part("aside", "details", undefined, split);
    side.setAttribute("aria-label", "The chosen token");
    const spans = new Array(m.count);
    const newlines = data.pieces.some((piece) => piece.includes("\n"));
    const block = (title, from, to) => {
      part("h3", "", title, text);
      const flow = part("div", "flow", undefined, text);
      flow.setAttribute("role", "listbox");
      flow.setAttribute("aria-label", title);
      let clause = null;
      for (let i = from; i < to; i++) {
        if (!clause) clause = part("span", newlines ? "lines" : "clause", undefined, flow);
        const piece = data.pieces[i];
        if (piece.startsWith(" ") && clause.childNodes.length) clause.append(" ");
        const span = (spans[i] = part("span", "t", visible(piece), clause));
        span.dataset.i = i;
        span.tabIndex = -1;
        span.setAttribute("role", "option");
        if (piece.includes("\n")) clause.append("\n");
        if (newlines ? piece.includes("\n") && clause.childElementCount > 60 : piece.trim() === ";") {
          clause = null;
          flow.append(" ");
        }
      }
    };
    block(`Prompt: ${group(data.prompt)} tokens`, 0, data.prompt);
    const whose = data.source || (replay ? "full KV's trace" : "written by the compressed run");
    block(`Output: ${group(m.count - data.prompt)} tokens, ${whose}`, data.prompt, m.count);
    for (const i of differs) spans[i].classList.add("differs");
    if (wrong >= 0) spans[wrong].classList.add("wrong");
    spans[data.prompt].tabIndex = 0;
    const tokenOf = (event) => { const span = event.target.closest(".t"); return span ? +span.dataset.i : -1; };
    text.addEventListener("mouseover", (event) => { if (tokenOf(event) >= 0) describe(tokenOf(event)); });
    text.addEventListener("mouseleave", () => describe(state.token));
    text.addEventListener("click", (event) => { if (tokenOf(event) >= 0) select(tokenOf(event)); });
    text.addEventListener("focusin", (event) => { if (tokenOf(event) >= 0) select(tokenOf(event)); });
    text.addEventListener("keydown", (event) => {
      const i = state.token, to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: m.count - 1 }[event.key];
      const goal = to !== undefined ? to : event.key === "ArrowUp" ? above(i, -1) : event.key === "ArrowDown" ? above(i, 1) : -1;
      if (goal >= 0 && goal < m.count) { event.preventDefault(); select(goal, true); }
    });
    // the token one line up or down that is nearest in x
    const above = (from, sign) => {
      const here = spans[from].getBoundingClientRect();
      let best = -1, gap = Infinity, top = null;
      for (let i = from + sign; i >= 0 && i < m.count; i += sign) {
        const box = spans[i].getBoundingClientRect();
        if (Math.abs(box.top - here.top) < 6) continue;
        if (top === null) top = box.top;
        if (Math.abs(box.top - top) > 6) break;
        if (Math.abs(box.left - here.left) < gap) [best, gap] = [i, Math.abs(box.left - here.left)];
      }
      return best;
    };
    root.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
      const act = {
        ",": () => go(state.step - 1), ".": () => go(state.step + 1), p: () => play.click(), g: () => jump.click(),
        a: () => { state.mode = state.mode === "fate" ? "need" : "fate"; markMode(); paint(); },
        Escape: () => { state.token = -1; describe(-1); },
      }[event.key];
      if (act) { event.preventDefault(); act(); }
    });

    if (data.full_pieces && wrong >= 0) split.append(sideBySide(data, wrongAt));

    /* Painting. */
    const ring = (n, of) => Math.max(1, Math.ceil((4 * n) / of));
    function paint() {
      const cells = chosen(), need = state.mode === "need", limit = m.seen(state.step);
      const counts = { kept: 0, part: 0, folded: 0, dropped: 0, unseen: 0, missed: 0 };
      for (let i = 0; i < m.count; i++) {
        let name = "t", kept = 0, folded = 0, now = false, missed = false, later = 0;
        if (i >= limit) { name += " unseen"; counts.unseen++; }
        for (const cell of i < limit ? cells : []) {
          const fate = m.fate(cell, i, state.step);
          if (fate === "kept") kept++;
          else if (fate === "folded") folded++;
          else { now = now || m.dropped[cell * m.count + i] === state.step - 1; missed = missed || m.missed(cell, i); }
          if (need) later = Math.max(later, m.later(cell, i, state.step));
        }
        if (i < limit) {
          if (need) name += ` a${SHADES.filter((bound) => later >= bound).length}`;
          if (kept) name += need ? "" : ` k${ring(kept, cells.length)}`;
          else name += folded ? " folded" : " dropped";
          if (kept === cells.length) counts.kept++;
          else counts[kept ? "part" : folded ? "folded" : "dropped"]++;
          if (now && !kept && !folded) name += " now";
          if (missed) { counts.missed++; name += " missed"; }
          if (!need && m.isProtected(i, state.step)) name += " protected";
        }
        if (differs.has(i)) name += " differs";
        if (i === wrong) name += " wrong";
        if (i === state.token) name += " chosen";
        if (spans[i].className !== name) spans[i].className = name;
      }
      slider.value = state.step;
      back.disabled = state.step === 0;
      next.disabled = state.step === m.end;
      const e = state.step - 1;
      const when = state.step === 0 ? (m.events ? "Before the first compaction" : "There was no compaction: everything was kept")
        : state.step === m.end ? "End of the run"
        : `Compaction ${state.step} of ${m.events}, at token ${group(data.events.length[e])}: ${group(data.events.before[e])} → ${group(data.events.after[e])} slots per head`;
      slider.setAttribute("aria-valuetext", when);
      const said = [[counts.kept, "kept by all heads"], [counts.part, "by some"], [counts.folded, "merged"], [counts.dropped, "evicted by all"],
        [counts.missed, "▲ evicted though needed", "lost"], [counts.unseen, "not seen yet"]];
      status.replaceChildren(make("strong", "", when));
      for (const [n, word, mark] of said) if (n) part("span", mark || "", `${group(n)} ${word}`, status);
      writeLegend(need);
      drawMap();
      describe(state.token);
    }

    function writeLegend(need) {
      legend.replaceChildren();
      const sign = (className, words) => { const item = part("li", "", undefined, legend); part("span", `t ${className}`, "n1", item); item.append(` ${words}`); };
      if (need) {
        SHADES.forEach((bound, shade) => sign(`a${shade + 1}`, `${bound}+${shade === 3 ? " queries' attention paid by full KV later" : ""}`));
        sign("dropped", "evicted by all heads");
      } else {
        sign("k4", "kept by all heads");
        sign("k2", "by some (bar: how many)");
        sign("k4 protected", "protected");
        if (m.folded) sign("folded", "merged");
        sign("dropped", "evicted by all");
        if (state.step > 0 && state.step < m.end) sign("dropped now", "at this compaction");
      }
      sign(`${need ? "a3" : "k2"} missed`, "evicted though needed");
      sign("unseen", "not seen yet");
      sign("differs", replay ? "compressed says another" : "full KV would write another");
      if (wrong >= 0) sign("wrong", replay ? "first that differs" : "the runs part here");
    }

    // Pointing describes without a word to screen readers; a focused token says its own label.
    const describe = (i) => details(m, side, i, {
      cells: chosen(), state, differs, wrong, pick: (token) => select(token, true), close: () => { state.token = -1; paint(); },
    });

    function select(i, move = false) {
      const before = state.token;
      if (before >= 0) { spans[before].classList.remove("chosen"); spans[before].removeAttribute("aria-selected"); }
      for (const other of [before, data.prompt]) if (other >= 0) spans[other].tabIndex = -1;
      state.token = i;
      spans[i].tabIndex = 0;
      spans[i].classList.add("chosen");
      spans[i].setAttribute("aria-selected", "true");
      const differing = differs.has(i) ? ` Full KV says ${visible(data.scores.full_top[i - data.prompt])}, compressed says ${visible(data.scores.top[i - data.prompt])}.` : "";
      spans[i].setAttribute("aria-label", `${visible(data.pieces[i])}, ${place(data, i)}. ${fateWords(m, i, chosen(), state.step)}${differing}`);
      if (move) {
        spans[i].focus({ preventScroll: true });
        const box = spans[i].getBoundingClientRect();
        if (box.top < bar.getBoundingClientRect().bottom + 20 || box.bottom > innerHeight * 0.6) spans[i].scrollIntoView({ block: "center" });
      }
      describe(i);
      drawMap();
    }
    function go(step) {
      state.step = Math.max(0, Math.min(m.end, step));
      paint();
    }
    function stop() {
      clearInterval(state.playing);
      state.playing = 0;
      play.textContent = "▶ Play";
      play.setAttribute("aria-label", "Play the compactions");
      status.setAttribute("aria-live", "polite");
    }
    function start() {
      if (state.step >= m.end) state.step = -1;
      play.textContent = "❚❚ Pause";
      play.setAttribute("aria-label", "Pause");
      status.setAttribute("aria-live", "off"); // a sentence every second is too much to listen to
      const tick = () => {
        if (!root.isConnected) return destroy();
        go(state.step + 1);
        if (state.step >= m.end) stop();
      };
      state.playing = setInterval(tick, 900);
      tick();
    }
    // the details stay below the control bar, however tall it is
    const resized = new ResizeObserver(() => {
      if (!root.isConnected) return destroy();
      const stuck = getComputedStyle(bar).position === "sticky" ? bar.offsetHeight : 0;
      root.style.setProperty("--bar", `${stuck}px`);
      drawMap();
    });
    resized.observe(bar);
    window.addEventListener("themechange", () => (root.isConnected ? drawMap() : destroy()), { signal: gone.signal });
    function destroy() {
      stop();
      resized.disconnect();
      gone.abort();
    }
    paint();
    const made = { state, go, select, destroy };
    mounted.set(element, made);
    return made;
  }
  window.reasonkv.mountInspector = mountInspector;
  for (const here of document.querySelectorAll("[data-inspection]"))
    mountInspector(here, JSON.parse(document.getElementById(here.dataset.inspection).textContent));
})();
