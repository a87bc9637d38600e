// Figures: one metric against what is held, a line with a band per method, full KV dashed; marks can be read by key.
"use strict";
window.reasonkv = window.reasonkv || {};
(() => {
  const { make, number, cellText } = window.reasonkv;
  const NS = "http://www.w3.org/2000/svg";
  const svg = (tag, attributes = {}, ...children) => {
    const element = document.createElementNS(NS, tag);
    for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) element.setAttribute(name, value);
    element.append(...children);
    return element;
  };

  const SHAPES = {
    o: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z`,
    s: (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
    "^": (r) => `M0 ${-1.2 * r}L${1.15 * r} ${0.9 * r}H${-1.15 * r}z`,
    v: (r) => `M0 ${1.2 * r}L${1.15 * r} ${-0.9 * r}H${-1.15 * r}z`,
    "<": (r) => `M${-1.2 * r} 0L${0.9 * r} ${-1.15 * r}V${1.15 * r}z`,
    ">": (r) => `M${1.2 * r} 0L${-0.9 * r} ${-1.15 * r}V${1.15 * r}z`,
    D: (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0z`,
    P: (r) => { const a = r * 0.45, b = r * 1.25; return `M${-a} ${-b}h${2 * a}v${b - a}h${b - a}v${2 * a}h${a - b}v${b - a}h${-2 * a}v${a - b}h${a - b}v${-2 * a}h${b - a}z`; },
    X: (r) => SHAPES.P(r),
    "*": (r) => Array.from({ length: 10 }, (_, i) => { const l = i % 2 ? r * 0.6 : r * 1.4, t = (Math.PI * (i - 2.5)) / 5; return `${i ? "L" : "M"}${(l * Math.cos(t)).toFixed(2)} ${(l * Math.sin(t)).toFixed(2)}`; }).join("") + "z",
    h: (r) => Array.from({ length: 6 }, (_, i) => { const t = (Math.PI * (2 * i + 1)) / 6; return `${i ? "L" : "M"}${(1.2 * r * Math.cos(t)).toFixed(2)} ${(1.2 * r * Math.sin(t)).toFixed(2)}`; }).join("") + "z",
  };
  const mark = (style, r) => svg("path", { d: (SHAPES[style.marker] || SHAPES.o)(r), class: "mark", transform: style.marker === "X" ? "rotate(45)" : null });

  // black is the text's colour: it has to stand out on dark paper as well
  const paint = (element, style) => {
    element.style.setProperty("--mark", style.colour);
    element.toggleAttribute("data-ink", style.colour === "#000000");
  };

  // a small picture of a line and its mark, for legends
  const swatch = (style) => {
    const picture = svg("svg", { width: 30, height: 14, viewBox: "-15 -7 30 14", "aria-hidden": "true", class: "series" });
    paint(picture, style);
    picture.append(svg("path", { d: "M-14 0H14", class: "line", "stroke-dasharray": style.dash || null }), style.marker ? mark(style, 4) : "");
    return picture;
  };

  const steps = (low, high, about) => {
    const rough = (high - low) / about || 1;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((one) => one * power).find((one) => one >= rough);
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-9; at += step) found.push(at);
    const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step) + 1e-9) + (/^2\.5/.test((step / power).toString()) ? 1 : 0)));
    return found.map((at) => [at, number(at, digits)]);
  };

  const logSteps = (low, high) => {
    const found = [];
    for (let power = 10 ** Math.floor(Math.log10(low)); power <= high; power *= 10)
      for (const one of [1, 2, 5]) if (one * power >= low && one * power <= high) found.push(one * power);
    return found;
  };

  let plots = 0;

  // series: [{style, label, points: [{x, y, se, row, table}]}]; full: {y, se} or null
  const drawChart = (root, { series, full, metric, xs, xLabel, describe }) => {
    const width = Math.max(280, Math.floor(root.clientWidth));
    const height = width < 420 ? 260 : 310;
    const left = 52, right = 14, top = 14, bottom = 46;
    const all = series.flatMap((one) => one.points);
    root.replaceChildren();
    if (!all.length) {
      root.append(make("p", { class: "muted empty", text: "No points here: every shown method is hidden, or this part has no records." }));
      return;
    }
    const scale = metric.scale;
    const ends = all.flatMap((p) => [(p.y - (p.se || 0)) * scale, (p.y + (p.se || 0)) * scale]);
    if (full) ends.push(full.y * scale);
    let low = Math.min(...ends), high = Math.max(...ends);
    const pad = (high - low) * 0.07 || Math.abs(high) * 0.05 || 1;
    const whole = metric.scale === 100;
    [low, high] = [low >= 0 ? Math.max(0, low - pad) : low - pad, whole ? Math.min(100, high + pad) : high + pad];
    if (whole && high - low < 1) low = high - 1;
    const extent = [Math.min(...all.map((p) => p.x)), Math.max(...all.map((p) => p.x))];
    const margin = extent[1] > extent[0] ? (extent[1] / extent[0]) ** 0.06 : 1.5;
    const [x0, x1] = [extent[0] / margin, extent[1] * margin];
    const X = (value) => left + ((width - left - right) * Math.log(value / x0)) / Math.log(x1 / x0);
    const Y = (value) => height - bottom - ((height - top - bottom) * (value - low)) / (high - low);
    const picture = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": `${metric.title} against ${xLabel}` });

    const clip = `plot-${(plots += 1)}`;
    picture.append(svg("clipPath", { id: clip }, svg("rect", { x: left, y: top, width: width - left - right, height: height - top - bottom })));
    for (const [at, text] of steps(low, high, 5)) {
      picture.append(svg("path", { d: `M${left} ${Y(at)}H${width - right}`, class: "grid" }));
      const tick = svg("text", { x: left - 8, y: Y(at) + 4, class: "tick", "text-anchor": "end" });
      tick.textContent = text;
      picture.append(tick);
    }
    let edge = -Infinity;
    for (const at of xs.length && xs.length < 9 ? xs : logSteps(x0, x1)) {
      if (X(at) < edge + 34) continue;
      edge = X(at);
      picture.append(svg("path", { d: `M${X(at)} ${height - bottom}v5`, class: "axis" }));
      const tick = svg("text", { x: X(at), y: height - bottom + 19, class: "tick", "text-anchor": "middle" });
      tick.textContent = number(at, at < 10 && at % 1 ? 1 : 0);
      picture.append(tick);
    }
    picture.append(svg("path", { d: `M${left} ${height - bottom}H${width - right}`, class: "axis" }));
    const title = svg("text", { x: (left + width - right) / 2, y: height - 8, class: "title", "text-anchor": "middle" });
    title.textContent = xLabel;
    picture.append(title);
    if (full) picture.append(svg("path", { d: `M${left} ${Y(full.y * scale)}H${width - right}`, class: "full" }));

    const tip = make("div", { class: "tip", hidden: true });
    const nodes = [];
    const show = (place) => {
      for (const other of nodes) other.node.classList.toggle("on", other === place);
      picture.classList.add("reading");
      for (const group of picture.querySelectorAll("g.series")) group.classList.toggle("front", group === place.group);
      tip.replaceChildren(...place.lines.map((line, index) => make(index ? "span" : "strong", { text: line })));
      tip.hidden = false;
      const room = root.clientWidth;
      tip.style.left = `${Math.max(0, Math.min(room - tip.offsetWidth, place.x - tip.offsetWidth / 2))}px`;
      tip.style.top = place.y > tip.offsetHeight + 18 ? `${place.y - tip.offsetHeight - 14}px` : `${place.y + 16}px`;
    };
    const hide = () => {
      tip.hidden = true;
      picture.classList.remove("reading");
      for (const other of nodes) other.node.classList.remove("on");
      for (const group of picture.querySelectorAll("g.front")) group.classList.remove("front");
    };
    for (const one of series) {
      const group = svg("g", { class: "series", "data-method": one.label });
      paint(group, one.style);
      const spots = one.points.map((p) => [X(p.x), Y(p.y * scale), Math.abs(Y(0) - Y((p.se || 0) * scale))]);
      if (spots.length > 1)
        group.append(svg("path", { d: `M${spots.map(([x, y, e]) => `${x} ${y - e}`).join("L")}L${spots.slice().reverse().map(([x, y, e]) => `${x} ${y + e}`).join("L")}z`, class: "band", "clip-path": `url(#${clip})` }));
      else if (spots.length) group.append(svg("path", { d: `M${spots[0][0]} ${spots[0][1] - spots[0][2]}v${2 * spots[0][2]}`, class: "line" }));
      group.append(svg("path", { d: `M${spots.map(([x, y]) => `${x} ${y}`).join("L")}`, class: "line", "stroke-dasharray": one.style.dash || null }));
      one.points.forEach((p, index) => {
        const lines = describe(one, p);
        const node = svg("g", { transform: `translate(${spots[index][0]} ${spots[index][1]})`, class: "point", tabindex: "-1", role: "img", "aria-label": lines.join(". ") });
        node.append(svg("circle", { r: 9, class: "halo" }), mark(one.style, 4.2));
        const place = { node, lines, x: spots[index][0], y: spots[index][1], series: one, group };
        node.addEventListener("focus", () => show(place));
        node.addEventListener("blur", hide);
        nodes.push(place);
        group.append(node);
      });
      picture.append(group);
    }
    picture.addEventListener("pointermove", (event) => {
      const box = picture.getBoundingClientRect();
      let best = null, least = 44 ** 2;
      for (const place of nodes) {
        const distance = (place.x - event.clientX + box.left) ** 2 + (place.y - event.clientY + box.top) ** 2;
        if (distance < least) [best, least] = [place, distance];
      }
      if (best) show(best);
      else hide();
    });
    picture.addEventListener("pointerleave", hide);
    nodes[0].node.setAttribute("tabindex", "0");
    picture.addEventListener("keydown", (event) => {
      const at = nodes.findIndex((place) => place.node === document.activeElement);
      const move = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      let next = at;
      if (event.key === "Escape") hide();
      if (move) next = (at + move + nodes.length) % nodes.length;
      else if (event.key === "ArrowUp" || event.key === "ArrowDown") {
        const column = nodes.filter((place) => Math.abs(place.x - nodes[at].x) < 3).sort((a, b) => b.y - a.y);
        next = nodes.indexOf(column[(column.indexOf(nodes[at]) + (event.key === "ArrowUp" ? 1 : column.length - 1)) % column.length]);
      } else return;
      event.preventDefault();
      nodes.forEach((place, index) => place.node.setAttribute("tabindex", index === next ? "0" : "-1"));
      nodes[next].node.focus();
    });
    root.append(picture, tip);
  };

  Object.assign(window.reasonkv, { drawChart, swatch, describeCell: cellText });
})();
