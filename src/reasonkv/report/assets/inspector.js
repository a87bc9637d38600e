// The trace inspector: the text of a trace, every token coloured by its fate in a compressed KV cache.
// mountInspector(element, data) builds it from what report/inspector.py wrote. Words used below:
//   cell  one (layer, KV head); index g * heads + h
//   step  0 = before the first event, e = after event e, events + 1 = the end of the run
"use strict";
window.reasonkv = window.reasonkv || {};
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const ints = (text, Kind) => (text ? new Kind(bytes(text).buffer) : null);
  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  const group = (n) => n.toLocaleString("en");
  const visible = (piece) => piece.trim() || piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣");
  const amount = (x) => (x >= 10 ? x.toFixed(0) : x >= 0.1 ? x.toFixed(2) : x > 0 ? x.toFixed(4) : "0");

  /* What the data says, without any element of the page. */
  function model(data) {
    const count = data.pieces.length, heads = data.heads, cells = data.layers.length * heads;
    const events = data.events.length.length, end = events + 1;
    const dropped = ints(data.fates.dropped, Int16Array);
    const folded = ints(data.fates.folded, Int16Array), into = ints(data.fates.into, Int32Array);
    const [G, H, I, N] = data.attention.shape;
    const levels = bytes(data.attention.data);
    const value = Float32Array.from({ length: 256 }, (_, q) => (q ? data.attention.least * data.attention.ratio ** (q - 1) : 0));
    const row = (cell) => (G > 1 ? Math.floor(cell / heads) : 0) * H + (H > 1 ? cell % heads : 0);
    const seen = (step) => (step >= end ? count : events ? data.events.length[Math.max(0, step - 1)] : count);
    // attention from the queries of intervals first .. last - 1 to one token
    const attention = (cell, token, first, last = I) => {
      let sum = 0;
      if (token < N) for (let k = first; k < last; k++) sum += value[levels[(row(cell) * I + k) * N + token]];
      return sum;
    };
    const fate = (cell, token, step) => {
      const at = cell * count + token;
      if (token >= seen(step)) return "unseen";
      if (dropped[at] >= 0 && dropped[at] < step) return "dropped";
      return folded && folded[at] >= 0 && folded[at] < step ? "folded" : "kept";
    };
    // attention after the moment that counts: the token's drop in this cell, or else the step that is shown
    const later = (cell, token, step) => {
      const event = dropped[cell * count + token];
      return attention(cell, token, event >= 0 && event < step ? event + 1 : step >= end ? 0 : Math.min(Math.max(1, step), I));
    };
    // A token was dropped though needed where an oracle that chose equally many of the same slots would have kept it,
    // and later queries gave it at least as much as one query's whole attention.
    const needed = new Map();
    const missed = (cell, token) => {
      if (!needed.has(cell)) {
        const marks = new Uint8Array(count);
        for (let e = 0; e < events; e++) {
          const length = data.events.length[e], held = [];
          for (let i = 0; i < length; i++) {
            const at = cell * count + i, gone = dropped[at] >= 0 && dropped[at] < e;
            if (!gone && !(folded && folded[at] >= 0 && folded[at] < e)) held.push(i);
          }
          const future = held.map((i) => attention(cell, i, e + 1));
          const bar = Math.max(1, [...future].sort((a, b) => b - a)[data.events.after[e] - 1] || 0);
          held.forEach((i, place) => (marks[i] |= dropped[cell * count + i] === e && future[place] >= bar));
        }
        needed.set(cell, marks);
      }
      return needed.get(cell)[token];
    };
    const isProtected = (token, step) =>
      token < data.protected.sinks || (data.protected.prompt && token < data.prompt) ||
      (token < seen(step) && token >= seen(step) - data.protected.recent);
    return { data, count, heads, cells, events, end, dropped, folded, into, seen, attention, fate, later, missed, isProtected };
  }

  function mountInspector(element, data) {
    const m = model(data);
    const state = { step: m.end, layer: -1, head: -1, mode: "fate", token: -1, playing: 0 };
    const differs = new Set(data.scores.differs.map((t) => data.prompt + t));
    const wrongAt = data.kind === "generation" ? data.first_divergence : data.first_mismatch;
    const wrong = wrongAt === null ? -1 : Math.min(data.prompt + wrongAt, m.count - 1);
    const root = make("section", "inspector");
    root.setAttribute("aria-label", "Trace inspector");
    element.replaceChildren(root);
    const part = (tag, className, text, parent = root) => parent.appendChild(make(tag, className, text));
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
    const fact = (name, text, mark) => {
      const item = part("div", mark || "", undefined, facts);
      part("dt", "", name, item);
      part("dd", "", text, item);
    };
    const verdict = (answer) => (answer.correct ? "✓ right" : "✗ wrong") + (answer.truncated ? ", cut off" : "");
    const quoted = (answer) => verdict(answer) + (answer.text ? `: ${answer.text}` : "");
    fact("Expected answer", data.expected);
    fact("Full KV", quoted(data.answer.full), data.answer.full.correct ? "good" : "bad");
    if (data.answer.shown) fact("Compressed", quoted(data.answer.shown), data.answer.shown.correct ? "good" : "bad");
    else fact("Same next token as full KV", `${(100 * data.stats.agreement).toFixed(1)} % of ${group(m.count - data.prompt)}`);
    fact("Slots per head", `mean ${group(data.stats.mean)}, peak ${group(data.stats.peak)}, of ${group(m.count)} tokens`);

    /* Controls. */
    const bar = part("div", "controls");
    const map = part("canvas", "map", undefined, bar);
    map.title = "The whole trace, one row per layer and head; click to go there";
    map.setAttribute("aria-hidden", "true"); // the same is in the text below
    const line = part("div", "line", undefined, bar);
    const button = (text, label, act, className = "") => {
      const made = part("button", className, text, line);
      made.type = "button";
      made.setAttribute("aria-label", label);
      made.addEventListener("click", act);
      return made;
    };
    const back = button("‹", "Previous event", () => go(state.step - 1), "square");
    const play = button("▶ Play", "Play the events", () => (state.playing ? stop() : start()), "play");
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
    const jump = part("button", "primary", wrong < 0 ? "Nothing went wrong" : "Where the answer went wrong", row);
    if (wrong >= 0 && data.kind === "replay") jump.textContent = "First token that differs";
    if (wrong >= 0 && data.answer.full.correct && data.answer.shown && !data.answer.shown.correct) jump.textContent = "Where the answer went wrong";
    jump.type = "button";
    jump.disabled = wrong < 0;
    // the token was predicted by the query before it: the events that had happened by then are those that count
    jump.addEventListener("click", () => { stop(); go(data.events.length.filter((n) => n < wrong).length); select(wrong, true); });
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
    const whose = data.kind === "generation" ? "written by the compressed run" : "full KV's trace";
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

    if (data.full_pieces && wrong >= 0) {
      const both = part("div", "both", undefined);
      const show = (title, pieces, className) => {
        const card = part("section", "card", undefined, both);
        part("h3", "", title, card);
        const body = part("p", "excerpt", undefined, card);
        const from = Math.max(0, wrongAt - 24);
        body.append((from ? "… " : "") + pieces.slice(from, wrongAt).join(""));
        if (wrongAt < pieces.length) part("mark", className, visible(pieces[wrongAt]), body).before(" ");
        body.append(pieces.slice(wrongAt + 1, wrongAt + 90).join("") + (pieces.length > wrongAt + 90 ? " …" : ""));
      };
      part("h2", "", `The two runs part at output token ${group(wrongAt)}`, both);
      show("Full KV went on", data.full_pieces, "right");
      show("The compressed run went on", data.pieces.slice(data.prompt), "wrong");
    }

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
          if (need) name += ` a${later < 0.03 ? 0 : later < 0.1 ? 1 : later < 0.5 ? 2 : later < 2 ? 3 : 4}`;
          if (kept) name += need ? "" : ` k${ring(kept, cells.length)}`;
          else name += folded ? " folded" : " dropped";
          if (kept === cells.length) counts.kept++;
          else counts[kept ? "part" : folded ? "folded" : "dropped"]++;
          if (now && !kept && !folded) name += " now";
          if (missed) { counts.missed++; if (need) name += " missed"; }
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
      const when = state.step === 0 ? (m.events ? "Before the first event" : "There was no event: everything was kept")
        : state.step === m.end ? "End of the run"
        : `Event ${state.step} of ${m.events}, at token ${group(data.events.length[e])}: ${group(data.events.before[e])} → ${group(data.events.after[e])} slots per head`;
      slider.setAttribute("aria-valuetext", when);
      const said = [[counts.kept, "kept by all"], [counts.part, "by some"], [counts.folded, "folded"], [counts.dropped, "dropped by all"],
        [counts.missed, "dropped though needed ▲"], [counts.unseen, "not seen yet"]];
      status.replaceChildren(make("strong", "", when));
      for (const [n, word] of said) if (n) status.append(make("span", "", ` ${group(n)} ${word}`));
      legend.replaceChildren();
      const sign = (className, sample, words) => { const item = part("li", "", undefined, legend); part("span", className, sample, item); item.append(` ${words}`); };
      if (need) {
        sign("t a1", "a", "little"); sign("t a2", "b", ""); sign("t a3", "c", ""); sign("t a4", "d", "much attention paid by full KV later");
        sign("t a3 dropped missed", "e", "dropped though needed"); sign("t dropped", "f", "dropped");
      } else {
        sign("t k4 protected", "a", "protected"); sign("t k4", "b", "kept by all heads"); sign("t k2", "c", "by some (bar: how many)");
        if (m.folded) sign("t folded", "d", "folded");
        sign("t dropped now", "e", "dropped at this event"); sign("t dropped", "f", "dropped before");
      }
      sign("t unseen", "g", "not seen yet");
      sign("t differs", "h", "next token differs from full KV's");
      drawMap(cells);
      describe(state.token);
    }

    function drawMap(cells) {
      const style = getComputedStyle(root), ink = (name) => style.getPropertyValue(name).trim();
      const width = Math.max(1, Math.floor(map.clientWidth)), scale = window.devicePixelRatio || 1;
      // many heads share a row each, so that a row stays visible
      const rows = [];
      const each = Math.ceil(cells.length / 24);
      for (let k = 0; k < cells.length; k += each) rows.push(cells.slice(k, k + each));
      const tall = Math.max(3, Math.min(9, Math.floor(60 / rows.length))), high = tall * rows.length + 9;
      map.style.height = `${high}px`;
      map.width = width * scale;
      map.height = high * scale;
      const pen = map.getContext("2d");
      pen.scale(scale, scale);
      const limit = m.seen(state.step), x = (i) => (i * width) / m.count;
      rows.forEach((row, r) => {
        for (let px = 0; px < width; px++) {
          const from = Math.floor((px * m.count) / width), to = Math.max(from + 1, Math.floor(((px + 1) * m.count) / width));
          if (from >= limit) break;
          let kept = 0, folded = 0, all = 0, lost = 0;
          for (let i = from; i < to && i < limit; i++) for (const cell of row) {
            const fate = m.fate(cell, i, state.step);
            all++;
            if (fate === "kept") kept++;
            else if (fate === "folded") folded++;
            else if (m.missed(cell, i)) lost++;
          }
          const paintIt = (colour, share) => { pen.fillStyle = colour; pen.globalAlpha = share; pen.fillRect(px, r * tall, 1, tall - 1); };
          paintIt(ink2.gone, 1);
          if (kept) paintIt(ink2.keep, kept / all);
          if (folded) paintIt(ink2.fold, folded / all);
          if (lost && state.mode === "need") paintIt(ink2.miss, 1);
        }
      });
      pen.globalAlpha = 1;
      pen.fillStyle = ink("--bad");
      for (const i of differs) pen.fillRect(x(i), high - 7, Math.max(1.5, width / m.count), 7);
      pen.fillStyle = ink("--ink");
      pen.fillRect(x(data.prompt) - 0.5, 0, 1, high);
      if (state.step > 0 && state.step < m.end) pen.fillRect(x(limit) - 1, 0, 2, high);
      if (state.token >= 0) { pen.strokeStyle = ink("--ink"); pen.lineWidth = 2; pen.strokeRect(x(state.token) - 3, 1, 6, high - 2); }
    }
    let ink2 = {};
    const readInks = () => {
      const style = getComputedStyle(root);
      for (const name of ["keep", "gone", "fold", "miss"]) ink2[name] = style.getPropertyValue(`--${name}`).trim();
    };
    map.addEventListener("click", (event) => select(Math.min(m.count - 1, Math.floor((event.offsetX / map.clientWidth) * m.count)), true));

    /* One token. */
    function describe(i) {
      side.replaceChildren();
      side.classList.toggle("empty", i < 0);
      if (i < 0) return void part("p", "muted", "Point at a token, or move with Tab and the arrow keys, to see what became of it.", side);
      const head = part("div", "head", undefined, side);
      part("strong", "token", visible(data.pieces[i]), head);
      const where = i < data.prompt ? `prompt token ${group(i)}` : `token ${group(i)}, output ${group(i - data.prompt)}`;
      part("span", "muted", where, head);
      const close = part("button", "square close", "×", head);
      close.type = "button";
      close.setAttribute("aria-label", "Close");
      close.addEventListener("click", () => { state.token = -1; paint(); });
      const list = part("dl", "", undefined, side);
      const say = (name, words, mark) => { part("dt", "", name, list); part("dd", mark || "", words, list); };
      const t = i - data.prompt;
      if (t >= 0) {
        const same = !differs.has(i);
        say("Full KV says", `${visible(data.scores.full_top[t])}`);
        say("Compressed says", visible(data.scores.top[t]) + (same ? "" : "  ✗ differs"), same ? "" : "bad");
        say("NLL here", `${data.scores.nll[t].toFixed(3)} (full KV ${data.scores.full_nll[t].toFixed(3)})`);
      }
      const cells = chosen(), cut = Math.max(1, Math.min(state.step, m.events + 1));
      const best = (f) => Math.max(...cells.map(f));
      say("Attention before", `${amount(best((c) => m.attention(c, i, 0, cut)))} at most, in one head`);
      if (state.step < m.end) say("Attention after", `${amount(best((c) => m.attention(c, i, cut)))} at most, in one head`);
      part("p", "muted small", "What full KV's queries pay this token before and after the event shown, in whole queries.", side);
      const table = part("table", "fates", undefined, side);
      const top = part("tr", "", undefined, part("thead", "", undefined, table));
      part("th", "", "layer", top);
      for (let h = 0; h < m.heads; h++) part("th", "", `head ${h}`, top);
      const body = part("tbody", "", undefined, table);
      data.layers.forEach((layer, g) => {
        if (state.layer >= 0 && g !== state.layer) return;
        const line = part("tr", "", undefined, body);
        part("th", "", String(layer), line);
        for (let h = 0; h < m.heads; h++) {
          const cell = g * m.heads + h, at = cell * m.count + i, fate = m.fate(cell, i, state.step);
          const words = { unseen: "not yet", kept: m.isProtected(i, state.step) ? "protected" : "kept",
            dropped: `dropped at ${m.dropped[at] + 1}`, folded: m.into ? `→ ${m.into[at]} at ${m.folded[at] + 1}` : "folded" }[fate];
          const box = part("td", fate, words, line);
          if (fate === "dropped" && m.missed(cell, i)) { box.append(" ▲"); box.title = `later attention ${amount(m.later(cell, i, state.step))}: an oracle would have kept it`; }
        }
      });
      spans[i].setAttribute("aria-label", `${visible(data.pieces[i])}, ${where}, kept by ${cells.filter((c) => m.fate(c, i, state.step) === "kept").length} of ${cells.length} heads`);
    }
    side.setAttribute("aria-live", "polite");

    function select(i, move = false) {
      const before = state.token;
      if (before >= 0) { spans[before].classList.remove("chosen"); spans[before].removeAttribute("aria-selected"); }
      for (const other of [before, data.prompt]) if (other >= 0) spans[other].tabIndex = -1;
      state.token = i;
      spans[i].tabIndex = 0;
      spans[i].classList.add("chosen");
      spans[i].setAttribute("aria-selected", "true");
      if (move) {
        spans[i].focus({ preventScroll: true });
        const box = spans[i].getBoundingClientRect();
        if (box.top < bar.getBoundingClientRect().bottom + 20 || box.bottom > innerHeight * 0.6) spans[i].scrollIntoView({ block: "center" });
      }
      describe(i);
      drawMap(chosen());
    }
    function go(step) {
      state.step = Math.max(0, Math.min(m.end, step));
      paint();
    }
    function stop() {
      clearInterval(state.playing);
      state.playing = 0;
      play.textContent = "▶ Play";
    }
    function start() {
      if (state.step >= m.end) state.step = -1;
      play.textContent = "❚❚ Pause";
      const tick = () => { go(state.step + 1); if (state.step >= m.end) stop(); };
      state.playing = setInterval(tick, 900);
      tick();
    }
    readInks();
    window.addEventListener("themechange", () => { readInks(); paint(); });
    new ResizeObserver(() => drawMap(chosen())).observe(map);
    paint();
    return { state, go, select };
  }
  window.reasonkv.mountInspector = mountInspector;
  for (const place of document.querySelectorAll("[data-inspection]"))
    mountInspector(place, JSON.parse(document.getElementById(place.dataset.inspection).textContent));
})();
