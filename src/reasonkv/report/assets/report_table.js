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

  const raw = (column, row) => column.texts[column.at[row]];

  // rows in the order of a column's texts; by their first number where the column is one
  const order = (column) => {
    const value = (text) => parseFloat(text.replace(/,/g, ""));
    const compare = column.words ? (a, b) => a.localeCompare(b, "en", { numeric: true }) : (a, b) => value(a) - value(b);
    const places = column.texts.map((text, index) => index).sort((a, b) => compare(column.texts[a], column.texts[b]));
    const rank = [];
    places.forEach((index, place) => (rank[index] = place));
    return (row) => (raw(column, row) === "-" && !column.words ? null : rank[column.at[row]]);
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
      const texts = columns.filter((column) => column.words);
      for (let row = 0; row < table.rows; row += 1) {
        let keep = true;
        for (const [key, wanted] of state.chosen) if (raw(byKey.get(key), row) !== wanted) keep = false;
        if (keep && words) keep = texts.some((column) => raw(column, row).toLowerCase().includes(words));
        if (keep) rows.push(row);
      }
      if (state.sort) {
        const rank = order(state.sort), sign = state.descending ? -1 : 1;
        const missing = (row) => rank(row) === null;
        rows.sort((a, b) => missing(a) - missing(b) || (missing(a) ? 0 : sign * (rank(a) - rank(b))) || a - b);
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
              const text = raw(column, row), end = column.words ? -1 : text.indexOf(" ");
              const [value, aside] = end < 0 ? [text, ""] : [text.slice(0, end), text.slice(end + 1)];
              const tag = index === 1 ? "th" : "td";
              const cell = make(tag, { class: column.words ? "words" : "number", scope: tag === "th" ? "row" : null, text: value });
              if (aside) cell.append(" ", make("small", { text: aside }));
              return cell;
            }),
          ),
        ),
      );
      const many = state.order.length;
      const group = (n) => n.toLocaleString("en"), whole = many === table.rows ? "" : ` of ${group(table.rows)}`;
      count.textContent = many > page ? `Rows ${group(from + 1)} to ${group(Math.min(many, from + page))} of ${group(many)}` : `${group(many)}${whole} rows`;
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
      const values = column.texts.filter((text) => text !== "-");
      if (values.length < 2) continue;
      if (!column.words) values.sort((a, b) => parseFloat(a.replace(/,/g, "")) - parseFloat(b.replace(/,/g, "")));
      const select = make("select", { "data-filter": key, onchange: () => {
        if (select.value === "") state.chosen.delete(key);
        else state.chosen.set(key, select.value);
        refresh();
      } }, make("option", { value: "", text: "all" }), ...values.map((value) => make("option", { value, text: value })));
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
      const head = make("th", { scope: "col", "aria-sort": "none", "data-key": column.key, class: column.words ? "words" : "number" });
      head.append(make("button", { type: "button", class: "sort", title: column.meaning, text: column.label, onclick: () => {
        state.descending = state.sort === column ? !state.descending : !column.words && column.key !== "tokens";
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

  Object.assign(window.reasonkv, { make, mountTable });
})();
