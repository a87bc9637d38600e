// The report's page: switches, figures and tables from the data embedded in the file, the inspector when it is reached.
"use strict";
(() => {
  const { make, number, cellText, mountTable, drawChart, swatch } = window.reasonkv;
  const embedded = (id) => JSON.parse(document.getElementById(id).textContent);
  const report = embedded("report");
  const mount = (name) => document.querySelector(`[data-mount="${name}"]`);

  // a row of buttons of which one is pressed; nothing to choose, nothing shown
  const choice = (label, options, chosen, onchange) => {
    const group = make("div", { class: "pick", role: "group", "aria-label": label });
    group.append(make("span", { class: "pick-label", text: label }));
    options.forEach(([value, text]) => {
      const button = make("button", { type: "button", text, "data-value": value, "aria-pressed": String(value === chosen), onclick: () => {
        for (const other of group.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
        onchange(value);
      } });
      group.append(button);
    });
    group.hidden = options.length < 2;
    return group;
  };

  const picker = (label, options, chosen, onchange) => {
    const select = make("select", { onchange: () => onchange(select.value) }, ...options.map(([value, text]) => make("option", { value, text })));
    select.value = chosen;
    return make("label", { class: "picker" }, make("span", { text: label }), select);
  };

  const whenNear = (element, act) => {
    if (!("IntersectionObserver" in window)) return act();
    const watcher = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      watcher.disconnect();
      act();
    }, { rootMargin: "300px" });
    watcher.observe(element);
  };

  const column = (table, key) => table.columns.find((one) => one.key === key);
  const word = (table, key, row) => { const one = column(table, key); return one.words[one.at[row]]; };
  const distinct = (values) => [...new Set(values)];

  // the first table: one budget at a time
  for (const element of document.querySelectorAll("[data-glances]")) {
    const tables = [...element.children];
    if (tables.length < 2) continue;
    const show = (at) => tables.forEach((one, index) => (one.hidden = String(index) !== at));
    element.prepend(choice("Budget", tables.map((one, index) => [String(index), one.dataset.budget]), "0", show));
    show("0");
  }

  const AXES = { tokens: "budget, slots per KV head after a compaction", physical_mean: "mean slots read per output token", bytes_held: "KiB held at the end" };

  const mountCharts = (root) => {
    const cohorts = report.cohorts.map((one, index) => ({ ...one, index })).filter((one) => one.methods.length);
    const state = { cohort: (cohorts.find((one) => one.kind === "evaluate") || cohorts[0]).index, x: "tokens", hidden: new Set(), metrics: {} };
    const controls = make("div", { class: "switches" });
    const legend = make("div", { class: "names", role: "group", "aria-label": "Methods" });
    const panels = make("div", { class: "panels" });
    const aside = make("p", { class: "muted note" });
    root.append(controls, legend, panels, aside);
    const here = () => report.cohorts[state.cohort];

    const pointsOf = (table, method, metric, task, regime) => {
      const found = [];
      const values = column(table, metric), x = column(table, state.x);
      for (let row = 0; row < table.rows; row += 1) {
        if (word(table, "method", row) !== method || word(table, "task", row) !== task || (regime && word(table, "regime", row) !== regime)) continue;
        const at = x.values[row], y = values.values[row];
        if (at !== null && at > 0 && y !== null) found.push({ x: at * (state.x === "bytes_held" ? x.scale : 1), y, se: values.se[row], row, table });
      }
      return found.sort((a, b) => a.x - b.x);
    };

    const baseline = () => {
      const { baseline: other } = here();
      return other && (state.x !== "tokens" || other.counted) ? other : null;
    };

    const describe = (one, p) => {
      const value = (key) => cellText(column(p.table, key), p.row);
      const tell = (key) => { const [text, more] = value(key); return more ? `${text} ${more}` : text; };
      const label = (key) => column(p.table, key).label;
      const lines = [`${one.label}, ${value("tokens")[0]} slots`, `${label(one.metric)} ${tell(one.metric)}`];
      for (const other of ["full", "random"]) {
        const key = `${one.metric}_versus_${other}`;
        if (column(p.table, key) && value(key)[0] !== "\u2013") lines.push(`to ${other === "full" ? "full KV" : "random"} ${tell(key)}`);
      }
      lines.push(`mean ${value("physical_mean")[0]} slots, ${value("saved_bytes")[0]} % bytes saved`, `n = ${value("n")[0]}`);
      return lines;
    };

    const draw = () => {
      const cohort = here(), table = cohort.table;
      panels.replaceChildren();
      const offered = table.columns.filter((one) => one.plotted);
      const chosen = (state.metrics[cohort.kind] = state.metrics[cohort.kind] || offered.slice(0, 2).map((one) => one.key));
      const waiting = [];
      chosen.forEach((key, place) => {
        const metric = column(table, key);
        const area = make("div", { class: "chart", "data-metric": key });
        const panel = make("figure", { class: "panel" }, make("figcaption", {}, picker("Metric", offered.map((one) => [one.key, one.title]), key, (value) => {
          chosen[place] = value;
          draw();
        })), area);
        panels.append(panel);
        const series = cohort.methods
          .filter((style) => !state.hidden.has(style.label) || style.label === cohort.fixed)
          .map((style) => ({ style, label: style.label, metric: key, points: pointsOf(table, style.label, key, state.task, state.regime) }));
        const other = baseline();
        if (other)
          for (const method of distinct(Array.from({ length: other.table.rows }, (_, row) => word(other.table, "method", row))))
            series.unshift({ style: { colour: "#000000", marker: "o", dash: "2 3" }, label: other.label, metric: key, points: pointsOf(other.table, method, key, state.task, state.regime) });
        let full = null;
        for (let row = 0; row < table.rows; row += 1)
          if (word(table, "regime", row) === cohort.full && word(table, "task", row) === state.task && metric.values[row] !== null) full = { y: metric.values[row], se: metric.se[row] };
        const xs = state.x === "tokens" ? distinct(series.flatMap((one) => one.points.map((p) => p.x))).sort((a, b) => a - b) : [];
        waiting.push(() => drawChart(area, { series, full, metric, xs, xLabel: AXES[state.x], describe }));
      });
      for (const one of waiting) one(); // both panels stand before either measures its width
      const rows = Array.from({ length: table.rows }, (_, row) => row).filter((row) => word(table, "task", row) === state.task && word(table, "regime", row) !== cohort.full);
      const elsewhere = rows.filter((row) => word(table, "regime", row) !== state.regime).length;
      aside.textContent = elsewhere ? `${elsewhere} cell${elsewhere === 1 ? "" : "s"} of this task ${elsewhere === 1 ? "is" : "are"} in another regime and not drawn here.` : "";
    };

    const drawLegend = () => {
      const cohort = here();
      legend.replaceChildren(make("span", { class: "entry" }, swatch({ colour: "#808080", dash: "5 3" }), "full KV"));
      if (baseline()) legend.append(make("span", { class: "entry" }, swatch({ colour: "#000000", marker: "o", dash: "2 3" }), cohort.baseline.label));
      for (const style of cohort.methods) {
        if (style.label === cohort.fixed) {
          legend.append(make("span", { class: "entry", title: "the yardstick is always shown" }, swatch(style), `${style.label} (prompt kept)`));
          continue;
        }
        const button = make("button", { type: "button", class: "toggle", "data-method": style.label, "aria-pressed": String(!state.hidden.has(style.label)), onclick: () => {
          if (!state.hidden.delete(style.label)) state.hidden.add(style.label);
          button.setAttribute("aria-pressed", String(!state.hidden.has(style.label)));
          draw();
        } }, swatch(style), style.label);
        legend.append(button);
      }
    };

    const setUp = () => {
      const { table, full } = here();
      const tasks = column(table, "task").words;
      const regimes = column(table, "regime").words.filter((one) => one !== full);
      if (!tasks.includes(state.task)) state.task = tasks[0];
      if (!regimes.includes(state.regime)) state.regime = regimes.includes("decode-active") ? "decode-active" : regimes[0];
      controls.replaceChildren(
        choice("Results", cohorts.map((one) => [String(one.index), one.label]), String(state.cohort), (value) => { state.cohort = Number(value); setUp(); }),
        choice("Task", tasks.map((one) => [one, one]), state.task, (value) => { state.task = value; draw(); }),
        choice("Against", [["tokens", "budget"], ["physical_mean", "mean slots"], ["bytes_held", "bytes held"]], state.x, (value) => { state.x = value; drawLegend(); draw(); }),
        choice("Regime", regimes.map((one) => [one, one]), state.regime, (value) => { state.regime = value; draw(); }),
      );
      drawLegend();
      draw();
    };
    setUp();
    let width = root.clientWidth;
    new ResizeObserver(() => {
      if (root.clientWidth === width) return;
      width = root.clientWidth;
      draw();
    }).observe(root);
  };

  const mountSummaries = (root) => {
    const area = make("div");
    const show = (index) => mountTable(area, report.cohorts[index].table, { label: `Summary: ${report.cohorts[index].label}`, filters: ["task", "method", "regime", "tokens"], page: 500 });
    root.append(choice("Results", report.cohorts.map((one, index) => [String(index), one.label]), "0", show), area);
    show(0);
  };

  const mountRecords = (root) => {
    const area = make("div");
    const show = (index) => mountTable(area, embedded(`records-${index}`), { label: `Records of ${report.folders[index]}`, filters: ["task", "method", "prompt", "tokens", "regime", "answer"], search: true });
    root.append(choice("Folder", report.folders.map((name, index) => [String(index), name]), "0", show), area);
    show(0);
  };

  const mountInspector = (root) => {
    const area = make("div", { class: "inspector-area" });
    const show = (id) => window.reasonkv.mountInspector(area, embedded(id)); // one element: what was there ends
    if (report.inspections.length > 1) root.append(picker("Trace", report.inspections.map((one) => [one.id, one.name]), report.inspections[0].id, show));
    root.append(area);
    show(report.inspections[0].id);
  };

  const mounts = { charts: mountCharts, summary: mountSummaries, records: mountRecords, inspector: mountInspector };
  for (const [name, act] of Object.entries(mounts)) {
    const root = mount(name);
    if (!root) continue;
    if (name === "charts" || name === "summary") act(root);
    else {
      root.classList.add("waiting");
      whenNear(root, () => { root.classList.remove("waiting"); act(root); root.dataset.ready = ""; });
    }
  }

  // the contents say where the reader is
  const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
  const follow = () => {
    let current = null;
    for (const id of links.keys()) if (document.getElementById(id).getBoundingClientRect().top < 140) current = id;
    for (const [id, link] of links) {
      if (id === (current || [...links.keys()][0])) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  let waiting = false;
  addEventListener("scroll", () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => { waiting = false; follow(); });
  }, { passive: true });
  follow();
})();
