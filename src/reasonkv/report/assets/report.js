// The report's page: switches, figures and tables from the data embedded in the file, the inspector when it is reached.
"use strict";
(() => {
  const { make, mountTable } = window.reasonkv;
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

  // the first table: one budget at a time
  for (const element of document.querySelectorAll("[data-glances]")) {
    const tables = [...element.children];
    if (tables.length < 2) continue;
    const show = (at) => tables.forEach((one, index) => (one.hidden = String(index) !== at));
    element.prepend(choice("Budget", tables.map((one, index) => [String(index), one.dataset.budget]), element.dataset.glances, show));
    show(element.dataset.glances); // where methods lie farthest apart
  }

  const AXES = [
    ["tokens", "budget", "budget, slots per KV head after a compaction"],
    ["physical_mean", "mean slots", "mean slots per output token"],
    ["bytes_held", "bytes in use", "KiB in use at the end"],
  ];

  // the page's own colours, so that a chart fits the light and the dark page
  const theme = () => {
    const style = getComputedStyle(document.documentElement);
    const [ink, muted, line] = ["--ink", "--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
    const font = "system-ui, sans-serif";
    return {
      background: "transparent", font, view: { stroke: null },
      axis: { labelColor: muted, titleColor: muted, gridColor: line, domainColor: muted, tickColor: muted, titleFontWeight: "normal", labelFontSize: 12, titleFontSize: 12 },
      legend: { labelColor: ink, orient: "bottom", columns: innerWidth < 500 ? 3 : 5, labelFontSize: 12, symbolStrokeColor: ink },
    };
  };
  // black is the text's colour: it has to stand out on dark paper as well
  const inked = (value, ink) => {
    if (Array.isArray(value)) return value.map((one) => inked(one, ink));
    if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, inked(one, ink)]));
    return value === "#000000" ? ink : value;
  };

  const mountCharts = (root) => {
    const cohorts = report.cohorts.filter((one) => one.chart);
    const state = { cohort: cohorts[0], axis: "tokens", metrics: {} };
    const controls = make("div", { class: "switches" });
    const panels = make("div", { class: "panels" });
    root.append(controls, panels);

    const draw = (area, metric, title) => {
      const { spec, ...offer } = state.cohort.chart;
      const ink = getComputedStyle(document.documentElement).getPropertyValue("--ink").trim();
      const own = { ...inked({ ...spec, datasets: undefined, data: undefined }, ink), data: spec.data, datasets: spec.datasets };
      const set = { task: state.task, metric };
      own.params = own.params.map((one) => (one.name in set ? { ...one, value: set[one.name] } : one));
      own.description = `${title} of every method against ${AXES.find(([key]) => key === state.axis)[2]}, ${state.task}`;
      const rows = (spec.data.values || []).filter((one) => one.task === state.task && one.metric === metric);
      const ticks = [...new Set(rows.map((one) => one[state.axis]).filter((one) => one))].sort((a, b) => a - b);
      for (const layer of own.layer) {
        if (!layer.encoding.x) continue;
        const axis = { ...layer.encoding.x.axis };
        if (state.axis === "tokens" && ticks.length < 9) axis.values = ticks;
        layer.encoding.x = { ...layer.encoding.x, field: state.axis, title: AXES.find(([key]) => key === state.axis)[2], axis };
      }
      // interpreted, not compiled: the page's policy allows no code made from text
      window.vegaEmbed(area, own, { ast: true, actions: false, renderer: "svg", config: theme() });
    };

    const redraw = () => {
      const { chart, kind } = state.cohort;
      const chosen = (state.metrics[kind] = state.metrics[kind] || chart.metrics.slice(0, 2).map(([key]) => key));
      panels.replaceChildren();
      const waiting = chosen.map((key, place) => {
        const area = make("div", { class: "chart", "data-metric": key });
        panels.append(make("figure", { class: "panel" }, make("figcaption", {}, picker("Metric", chart.metrics, key, (value) => {
          chosen[place] = value;
          redraw();
        })), area));
        return () => draw(area, key, Object.fromEntries(chart.metrics)[key]);
      });
      for (const one of waiting) one(); // both panels stand before either measures its width
    };

    const setUp = () => {
      const { tasks } = state.cohort.chart;
      if (!tasks.includes(state.task)) state.task = tasks[0];
      const set = (name) => (value) => { state[name] = value; redraw(); };
      const same = (names) => names.map((one) => [one, one]);
      controls.replaceChildren(
        choice("Results", cohorts.map((one) => [one.label, one.label]), state.cohort.label, (value) => { state.cohort = cohorts.find((one) => one.label === value); setUp(); }),
        choice("Task", same(tasks), state.task, set("task")),
        choice("Against", AXES.map(([key, name]) => [key, name]), state.axis, set("axis")),
      );
      redraw();
    };
    setUp();
    addEventListener("themechange", redraw);
  };

  const mountSummaries = (root) => {
    const area = make("div");
    const show = (index) => mountTable(area, report.cohorts[index], { label: `Summary: ${report.cohorts[index].label}`, filters: ["task", "method", "regime", "tokens"], page: 500 });
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
