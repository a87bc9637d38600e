// What an inspection's data say, without any element of the page. Words used by all scripts of the inspector:
//   cell  one (layer, KV head); index g * heads + h
//   step  0 = before the first event, e = after event e, events + 1 = the end of the run
"use strict";
window.reasonkv = window.reasonkv || {};
(() => {
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const ints = (text, Kind) => (text ? new Kind(bytes(text).buffer) : null);

  function model(data) {
    const count = data.pieces.length, heads = data.heads, cells = data.layers.length * heads;
    const events = data.events.length.length, end = events + 1;
    const dropped = ints(data.fates.dropped, Int16Array);
    const folded = ints(data.fates.folded, Int16Array), into = ints(data.fates.into, Int32Array);
    const seen = (step) => (step >= end || !events ? count : data.events.length[Math.max(0, step - 1)]);

    const fate = (cell, token, step) => {
      const at = cell * count + token;
      if (token >= seen(step)) return "unseen";
      if (dropped[at] >= 0 && dropped[at] < step) return "dropped";
      return folded && folded[at] >= 0 && folded[at] < step ? "folded" : "kept";
    };

    // Attention, quantised on a logarithmic scale, is summed once from the last interval backwards.
    const [G, H, I, N] = data.attention.shape;
    const levels = bytes(data.attention.data);
    const value = Float64Array.from({ length: 256 }, (_, q) => (q ? data.attention.least * data.attention.ratio ** (q - 1) : 0));
    const sums = new Map();
    const fromInterval = (cell) => {
      const row = (G > 1 ? Math.floor(cell / heads) : 0) * H + (H > 1 ? cell % heads : 0);
      if (!sums.has(row)) {
        const total = new Float64Array((I + 1) * N);
        for (let k = I - 1; k >= 0; k--)
          for (let i = 0; i < N; i++) total[k * N + i] = total[(k + 1) * N + i] + value[levels[(row * I + k) * N + i]];
        sums.set(row, total);
      }
      return sums.get(row);
    };
    // from the queries of intervals first .. last - 1 to one token; interval k lies before event k + 1
    const attention = (cell, token, first, last = I) => {
      if (token >= N || first >= last) return 0;
      const total = fromInterval(cell);
      return total[first * N + token] - total[last * N + token];
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
          const held = [];
          for (let i = 0; i < data.events.length[e]; i++) {
            const at = cell * count + i, gone = dropped[at] >= 0 && dropped[at] < e;
            if (!gone && !(folded && folded[at] >= 0 && folded[at] < e)) held.push(i);
          }
          const future = Float64Array.from(held, (i) => attention(cell, i, e + 1));
          const bar = Math.max(1, Float64Array.from(future).sort()[held.length - data.events.after[e]] || 0);
          held.forEach((i, place) => (marks[i] |= dropped[cell * count + i] === e && future[place] >= bar));
        }
        needed.set(cell, marks);
      }
      return needed.get(cell)[token] === 1;
    };

    // The interval whose queries include the one that predicts a token, and what full KV looked at then though the
    // cache had already dropped it: at most `most` tokens, by the largest attention in one cell.
    const interval = (token) => data.events.length.filter((length) => length < token).length;
    const lost = (token, among, most) => {
      const k = interval(token), found = [];
      if (k === 0) return found; // nothing had been dropped
      for (let i = 0; i < seen(k); i++) {
        let amount = 0;
        for (const cell of among) if (fate(cell, i, k) === "dropped") amount = Math.max(amount, attention(cell, i, k, k + 1));
        if (amount >= 0.1) found.push([i, amount]);
      }
      return found.sort((a, b) => b[1] - a[1]).slice(0, most);
    };

    const isProtected = (token, step) =>
      token < data.protected.sinks || (data.protected.prompt && token < data.prompt) ||
      (token < seen(step) && token >= seen(step) - data.protected.recent);

    return { data, count, heads, cells, events, end, dropped, folded, into, seen, fate, attention, later, missed, interval, lost, isProtected };
  }

  const make = (tag, className, text) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  window.reasonkv.inspector = {
    model,
    make,
    group: (n) => n.toLocaleString("en"),
    visible: (piece) => piece.trim() || piece.replace(/\n/g, "↵").replace(/\t/g, "⇥").replace(/ /g, "␣"),
    amount: (x) => (x >= 10 ? x.toFixed(0) : x >= 0.1 ? x.toFixed(2) : x >= 0.00005 ? x.toFixed(4) : "0"),
  };
})();
