// Tables from columns: sorted by heading buttons, filtered by selects and words, built one page at a time.
"use strict";
window.reasonkv = window.reasonkv || {};
(() => {
  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "text") element.textContent = value;
      else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
      else element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  };

  const number = (value, digits, sign = false) => {
    const text = Math.abs(value).toLocaleString("en-US", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    const zero = !/[1-9]/.test(text);
    return (zero ? "" : value < 0 ? "\u2212" : sign ? "+" : "") + text;
  };

  const raw = (column, row) => (column.kind === "words" ? column.words[column.at[row]] : column.values[row]);

  // what a cell says, as [value, aside]
  const cellText = (column, row) => {
    const value = raw(column, row);
    if (value === null || value === undefined) return ["\u2013", ""];
    if (column.kind === "words") return [value, ""];
    const scaled = value * column.scale;
    if (column.kind === "number") return [number(scaled, column.digits), ""];
    if (column.kind === "estimate") {
      const se = column.se[row];
      return [number(scaled, column.digits), se === null ? "" : `\u00b1${number(se * column.scale, column.digits)}`];
    }
    const ends = [column.low[row], column.high[row]].map((end) => number(end * column.scale, column.digits, true));
    return [number(scaled, column.digits, true), `[${ends.join(", ")}]`];
  };

  const compare = (column) => {
    if (column.kind === "words") {
      const order = column.words.map((word, index) => [word, index]).sort((a, b) => a[0].localeCompare(b[0], "en", { numeric: true }));
      const rank = [];
      order.forEach(([, index], place) => (rank[index] = place));
      return (a, b) => rank[column.at[a]] - rank[column.at[b]];
    }
    return (a, b) => column.values[a] - column.values[b];
  };

  const mountTable = (root, table, { label, filters = [], search = false, page = 50 }) => {
    const columns = table.columns;
    const byKey = new Map(columns.map((column) => [column.key, column]));
    const state = { sort: null, descending: false, page: 0, chosen: new Map(), words: "", order: [] };
    const count = make("p", { class: "count", role: "status" });
    const body = make("tbody");
    const pager = make("div", { class: "pager" });
    const tools = make("div", { class: "tools" });

    const visible = () => {
      const rows = [];
      const words = state.words.toLowerCase();
      const texts = columns.filter((column) => column.kind === "words");
      for (let row = 0; row < table.rows; row += 1) {
        let keep = true;
        for (const [key, wanted] of state.chosen) if (String(raw(byKey.get(key), row)) !== wanted) keep = false;
        if (keep && words) keep = texts.some((column) => column.words[column.at[row]].toLowerCase().includes(words));
        if (keep) rows.push(row);
      }
      if (state.sort) {
        const column = state.sort;
        const order = compare(column);
        const missing = (row) => column.kind !== "words" && column.values[row] === null;
        rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : order(a, b) * (state.descending ? -1 : 1)) || a - b);
      }
      return rows;
    };

    const draw = () => {
      const from = state.page * page;
      const rows = state.order.slice(from, from + page);
      body.replaceChildren(
        ...rows.map((row) =>
          make(
            "tr",
            {},
            ...columns.map((column, index) => {
              const [value, aside] = cellText(column, row);
              const tag = index === 1 ? "th" : "td";
              const cell = make(tag, { class: column.kind === "words" ? "words" : "number", scope: tag === "th" ? "row" : null, text: value });
              if (aside) cell.append(" ", make("small", { text: aside }));
              return cell;
            }),
          ),
        ),
      );
      const many = state.order.length;
      const words = many === table.rows ? "" : ` of ${number(table.rows, 0)}`;
      count.textContent = many > page ? `Rows ${number(from + 1, 0)} to ${number(Math.min(many, from + page), 0)} of ${number(many, 0)}` : `${number(many, 0)}${words} rows`;
      pager.hidden = many <= page;
      const last = Math.max(0, Math.ceil(many / page) - 1);
      buttons.forEach(([button, target]) => (button.disabled = target(last) === state.page));
    };

    const refresh = () => {
      state.order = visible();
      state.page = 0;
      draw();
    };

    const buttons = [
      ["First", () => 0],
      ["Previous", () => Math.max(0, state.page - 1)],
      ["Next", (last) => Math.min(last, state.page + 1)],
      ["Last", (last) => last],
    ].map(([text, target]) => {
      const button = make("button", { type: "button", text, onclick: () => {
        state.page = target(Math.max(0, Math.ceil(state.order.length / page) - 1));
        draw();
      } });
      pager.append(button);
      return [button, target];
    });

    for (const key of filters) {
      const column = byKey.get(key);
      if (!column) continue;
      const values = [...new Set(Array.from({ length: table.rows }, (_, row) => raw(column, row)))].filter((value) => value !== null);
      if (values.length < 2) continue;
      if (column.kind !== "words") values.sort((a, b) => a - b);
      const select = make("select", { "data-filter": key, onchange: () => {
        if (select.value === "") state.chosen.delete(key);
        else state.chosen.set(key, select.value);
        refresh();
      } }, make("option", { value: "", text: "all" }), ...values.map((value) => make("option", { value: String(value), text: column.kind === "words" ? value : number(value, 0) })));
      tools.append(make("label", {}, make("span", { text: column.label }), select));
    }
    if (search) {
      const field = make("input", { type: "search", placeholder: "words in any column", oninput: () => {
        state.words = field.value.trim();
        refresh();
      } });
      tools.append(make("label", {}, make("span", { text: "search" }), field));
    }

    const heads = columns.map((column) => {
      const head = make("th", { scope: "col", "aria-sort": "none", "data-key": column.key, class: column.kind === "words" ? "words" : "number" });
      head.append(make("button", { type: "button", class: "sort", title: column.meaning, text: column.label, onclick: () => {
        state.descending = state.sort === column ? !state.descending : column.kind !== "words" && column.key !== "tokens";
        state.sort = column;
        for (const other of heads) other.setAttribute("aria-sort", other === head ? (state.descending ? "descending" : "ascending") : "none");
        refresh();
      } }));
      return head;
    });
    const frame = make("div", { class: "table-frame data", tabindex: "0", role: "region", "aria-label": label }, make("table", {}, make("thead", {}, make("tr", {}, ...heads)), body));
    root.replaceChildren(make("div", { class: "table-tools" }, tools, count), frame, pager);
    refresh();
  };

  Object.assign(window.reasonkv, { make, number, cellText, mountTable });
})();
