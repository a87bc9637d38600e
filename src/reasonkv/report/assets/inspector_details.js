// What the inspector says about one token, and the two runs side by side from where they part.
"use strict";
(() => {
  const { make, group, visible, amount } = window.reasonkv.inspector;
  const SUSPECTS = 6;
  const add = (parent, tag, className, text) => parent.appendChild(make(tag, className, text));
  const number = (n, word) => `${group(n)} ${word}${n === 1 ? "" : "s"}`;

  const place = (data, i) => (i < data.prompt ? `prompt token ${group(i)}` : `output token ${group(i - data.prompt)}`);

  /* One sentence: what became of token i in the chosen cells, at a step. */
  function fateWords(m, i, cells, step) {
    const many = cells.length > 1, of = many ? ` of ${number(cells.length, "head")}` : "";
    const holding = cells.filter((c) => m.fate(c, i, step) === "kept").length;
    const gone = cells.filter((c) => m.fate(c, i, step) === "dropped");
    const into = cells.length - holding - gone.length;
    if (i >= m.seen(step)) {
      const k = m.interval(i);
      if (i < m.data.prompt) return "Not in the cache yet.";
      return `Not in the cache yet: it is predicted from what was kept ${k ? `after compaction ${k}` : "before the first compaction"}.`;
    }
    if (holding === cells.length) {
      const why = m.isProtected(i, step) ? " and protected" : "";
      return many ? `Kept by all ${number(cells.length, "head")}${why}.` : `Kept${why}.`;
    }
    const said = [];
    if (gone.length) {
      const events = gone.map((c) => m.dropped[c * m.count + i] + 1), first = Math.min(...events), last = Math.max(...events);
      const when = first === last ? `at compaction ${first}` : `between compactions ${first} and ${last}`;
      said.push(`Evicted ${many ? (gone.length === cells.length ? `by all ${number(gone.length, "head")} ` : `by ${gone.length}${of} `) : ""}${when}.`);
    }
    if (into) said.push(`Merged into another slot${many ? ` by ${into}${of}` : ""}.`);
    const missed = gone.filter((c) => m.missed(c, i));
    if (missed.length) {
      const most = Math.max(...missed.map((c) => m.later(c, i, step)));
      said.push(`▲ Needed: full KV paid it ${amount(most)} queries' attention after its eviction${many ? `, ${missed.length === 1 ? "in one head" : `at most, in ${missed.length} heads`}` : ""}.`);
    }
    return said.join(" ");
  }

  /* Fill `side` with what is known about token i; `close` and `pick(token)` are what its buttons do. */
  function details(m, side, i, { cells, state, differs, wrong, close, pick }) {
    const { data } = m;
    side.replaceChildren();
    side.classList.toggle("empty", i < 0);
    if (i < 0) {
      add(side, "p", "muted", "Point at a token to see what became of it, or move with Tab and the arrow keys.");
      return;
    }
    const head = add(side, "div", "head");
    add(head, "strong", "token", visible(data.pieces[i]));
    add(head, "span", "muted", place(data, i));
    const button = add(head, "button", "square close", "×");
    button.type = "button";
    button.setAttribute("aria-label", "Close");
    button.addEventListener("click", close);
    if (i === wrong) add(side, "p", "fate bad", data.kind === "generation" ? "The two runs part here." : "The first token that differs.");
    add(side, "p", "fate", fateWords(m, i, cells, state.step));

    const list = add(side, "dl", "");
    const say = (name, words, mark) => { add(list, "dt", "", name); add(list, "dd", mark || "", words); };
    const t = i - data.prompt;
    if (t >= 0) {
      say("Full KV says", visible(data.scores.full_top[t]));
      say("Compressed says", visible(data.scores.top[t]) + (differs.has(i) ? "  ✗ differs" : ""), differs.has(i) ? "bad" : "");
      say("NLL", `${data.scores.nll[t].toFixed(3)}, full KV ${data.scores.full_nll[t].toFixed(3)}`);
    }
    if (i < m.seen(state.step)) {
      const cut = Math.max(1, Math.min(state.step, m.events + 1));
      const best = (f) => amount(Math.max(...cells.map(f)));
      say(state.step < m.end ? "Attention before" : "Attention", best((c) => m.attention(c, i, 0, cut)));
      if (state.step < m.end) say("Attention after", best((c) => m.attention(c, i, cut)));
      const moment = state.step < m.end ? "before and after the compaction shown" : "over the whole run";
      add(side, "p", "muted small", `What full KV's queries pay this token ${moment}${cells.length > 1 ? ", in the head that pays most" : ""}; 1 is one query's whole attention.`);
    }

    const suspects = t >= 0 ? m.lost(i, cells, SUSPECTS) : [];
    if (suspects.length) {
      const box = add(side, "div", `suspects${i === wrong || differs.has(i) ? " strong" : ""}`);
      add(box, "h4", "", "Full KV looked here, the cache could not");
      const row = add(box, "p", "");
      for (const [token, much] of suspects) {
        const chip = add(row, "button", "chip", visible(data.pieces[token]));
        chip.type = "button";
        add(chip, "small", "", amount(much));
        chip.title = `${place(data, token)}: attention ${amount(much)}`;
        chip.setAttribute("aria-label", `${visible(data.pieces[token])}, ${place(data, token)}, attention ${amount(much)}`);
        chip.addEventListener("click", () => pick(token));
      }
      add(box, "p", "muted small", `Evicted tokens with the most attention between compactions ${m.interval(i)} and ${m.interval(i) + 1}, where this token was predicted.`
        .replace(`compactions ${m.events} and ${m.events + 1}`, `compaction ${m.events} and the end`));
    }
    if (i < m.seen(state.step)) fateTable(m, side, i, state);
  }

  function fateTable(m, side, i, state) {
    const table = add(side, "table", "fates");
    const top = add(add(table, "thead", ""), "tr", "");
    add(top, "th", "", "layer");
    for (let h = 0; h < m.heads; h++) add(top, "th", "", `head ${h}`);
    const body = add(table, "tbody", "");
    m.data.layers.forEach((layer, g) => {
      if (state.layer >= 0 && g !== state.layer) return;
      const line = add(body, "tr", "");
      add(line, "th", "", String(layer));
      for (let h = 0; h < m.heads; h++) {
        const cell = g * m.heads + h, at = cell * m.count + i, fate = m.fate(cell, i, state.step);
        const words = {
          kept: m.isProtected(i, state.step) ? "protected" : "kept",
          dropped: `compaction ${m.dropped[at] + 1}`,
          folded: m.into ? `→ ${m.into[at]}, compaction ${m.folded[at] + 1}` : "merged",
        }[fate];
        const box = add(line, "td", fate, fate === "dropped" ? `✗ ${words}` : words);
        if (fate === "dropped" && m.missed(cell, i)) {
          box.append(" ▲");
          box.title = `later attention ${amount(m.later(cell, i, state.step))}: an oracle would have kept it`;
        }
      }
    });
  }

  /* Both runs from a little before they part. */
  function sideBySide(data, at) {
    const both = make("div", "both");
    const show = (title, pieces, className) => {
      const card = add(both, "section", "card");
      add(card, "h3", "", title);
      const body = add(card, "p", "excerpt");
      const from = Math.max(0, at - 24);
      body.append((from ? "… " : "") + pieces.slice(from, at).join(""));
      if (at < pieces.length) add(body, "mark", className, visible(pieces[at])).before(" ");
      body.append(pieces.slice(at + 1, at + 90).join("") + (pieces.length > at + 90 ? " …" : ""));
    };
    add(both, "h2", "", `The two runs part at output token ${group(at)}`);
    show("Full KV went on", data.full_pieces, "right");
    show("The compressed run went on", data.pieces.slice(data.prompt), "wrong");
    return both;
  }
  Object.assign(window.reasonkv.inspector, { details, fateWords, place, sideBySide });
})();
