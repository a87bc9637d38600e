// The strip above the inspector's text: the whole trace from left to right, one row per cell.
"use strict";
(() => {
  const { make } = window.reasonkv.inspector;
  const MOST_ROWS = 24; // many heads share a row each, so that a row stays visible

  /* A strip inside `parent`; `pick(token)` is called for a click. Returns draw(cells, state). */
  function strip(m, parent, { differs, wrong, pick }) {
    const { data } = m;
    const frame = parent.appendChild(make("div", "strip"));
    const names = frame.appendChild(make("div", "rows"));
    const map = frame.appendChild(make("canvas", "map"));
    names.setAttribute("aria-hidden", "true"); // the same is in the text below
    map.setAttribute("aria-hidden", "true");
    map.title = "The whole trace from left to right, one row per layer and KV head; click to go there";
    const axis = frame.appendChild(make("div", "axis"));
    const promptName = axis.appendChild(make("span", "", "prompt"));
    const outputName = axis.appendChild(make("span", "", "output →"));
    const key = axis.appendChild(make("span", "key"));
    for (const [mark, word] of [["keep", "kept"], ["gone", "evicted"], ["miss", "evicted though needed"], ["bad", "differs from full KV"]]) {
      key.append(make("i", mark), `${word} `);
    }
    const share = data.prompt / m.count;
    if (share < 0.1) promptName.hidden = true;
    outputName.hidden = share > 0.5; // there is no room beside the key
    outputName.style.left = `${100 * share}%`;
    map.addEventListener("click", (event) =>
      pick(Math.max(0, Math.min(m.count - 1, Math.floor((event.offsetX / map.clientWidth) * m.count)))));

    return (cells, state) => {
      const style = getComputedStyle(frame), ink = (name) => style.getPropertyValue(name).trim();
      const width = Math.max(1, Math.floor(map.clientWidth)), scale = window.devicePixelRatio || 1;
      const rows = inRows(cells);
      const tall = Math.max(3, Math.min(9, Math.floor(60 / rows.length))), high = tall * rows.length + 9;
      nameRows(rows, tall);
      map.style.height = `${high}px`;
      map.width = width * scale;
      map.height = high * scale;
      const pen = map.getContext("2d");
      pen.scale(scale, scale);
      const limit = m.seen(state.step), x = (i) => (i * width) / m.count;
      const keep = ink("--keep"), gone = ink("--gone"), fold = ink("--fold"), miss = ink("--miss");
      rows.forEach((row, r) => {
        const bar = (px, colour, opacity) => {
          pen.fillStyle = colour;
          pen.globalAlpha = opacity;
          pen.fillRect(px, r * tall, 1, tall - 1);
        };
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
          bar(px, gone, 1);
          if (kept) bar(px, keep, kept / all);
          if (folded) bar(px, fold, folded / all);
          if (lost) bar(px, miss, 1);
        }
      });
      pen.globalAlpha = 1;
      pen.fillStyle = ink("--bad");
      for (const i of differs) pen.fillRect(x(i), high - 7, Math.max(1.5, width / m.count), 7);
      if (wrong >= 0) { // a flag at the first of them
        pen.beginPath();
        pen.moveTo(x(wrong), high - 8);
        pen.lineTo(x(wrong) - 5, high);
        pen.lineTo(x(wrong) + 5, high);
        pen.fill();
      }
      pen.fillStyle = ink("--ink");
      pen.fillRect(x(data.prompt) - 0.5, 0, 1, high);
      if (state.step > 0 && state.step < m.end) pen.fillRect(x(limit) - 1, 0, 2, high);
      if (state.token >= 0) {
        pen.strokeStyle = ink("--ink");
        pen.lineWidth = 2;
        pen.strokeRect(Math.max(1, Math.min(width - 7, x(state.token) - 3)), 1, 6, high - 2);
      }
    };

    // one row per head where they fit, else one per layer or per some neighbouring layers
    function inRows(cells) {
      const layers = [...new Set(cells.map((cell) => Math.floor(cell / m.heads)))];
      if (cells.length <= MOST_ROWS) return cells.map((cell) => [cell]);
      const each = Math.ceil(layers.length / MOST_ROWS), rows = [];
      for (let k = 0; k < layers.length; k += each) {
        const here = new Set(layers.slice(k, k + each));
        rows.push(cells.filter((cell) => here.has(Math.floor(cell / m.heads))));
      }
      return rows;
    }

    // a name at the first row of a layer, as often as there is room for one
    function nameRows(rows, tall) {
      names.replaceChildren();
      let last = -1, free = 0;
      rows.forEach(([cell], r) => {
        const g = Math.floor(cell / m.heads);
        if (g !== last && r * tall >= free) {
          const name = names.appendChild(make("span", "", `layer ${data.layers[g]}`));
          name.style.top = `${r * tall}px`;
          free = r * tall + 11;
        }
        last = g;
      });
    }
  }
  Object.assign(window.reasonkv.inspector, { strip });
})();
