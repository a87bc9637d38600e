// Sorts and filters the tables of .leaderboard. Without it they are plain tables.
for (const board of document.querySelectorAll(".leaderboard")) {
  const table = board.querySelector("table");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows];
  const names = heads.map((head) => head.textContent);
  const number = (text) => (text === "" ? NaN : Number(text.split(" ")[0]));
  const wanted = {};

  const show = () => {
    for (const row of rows) {
      row.hidden = Object.entries(wanted).some(([at, value]) => value && row.cells[at].textContent !== value);
    }
  };

  const bar = document.createElement("p");
  bar.className = "leaderboard-filters";
  for (const name of board.dataset.filters.split(",")) {
    const at = names.indexOf(name);
    const values = [...new Set(rows.map((row) => row.cells[at].textContent))];
    values.sort((a, b) => number(a) - number(b) || a.localeCompare(b));
    const select = document.createElement("select");
    select.setAttribute("aria-label", name);
    select.add(new Option(`${name}: all`, ""));
    for (const value of values) if (value) select.add(new Option(`${name}: ${value}`, value));
    select.addEventListener("change", () => { wanted[at] = select.value; show(); });
    bar.append(select, " ");
  }
  board.prepend(bar);

  heads.forEach((head, at) => {
    const button = document.createElement("button");
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const isUp = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", isUp ? "ascending" : "descending");
      const text = (row) => row.cells[at].textContent;
      const isNumeric = rows.every((row) => text(row) === "" || !Number.isNaN(number(text(row))));
      const order = (a, b) => (isNumeric ? number(text(a)) - number(text(b)) : text(a).localeCompare(text(b)));
      rows.sort((a, b) => {
        const missing = (text(a) === "") - (text(b) === "");  // what is missing stays at the end
        return missing || (isUp ? order(a, b) : order(b, a));
      });
      body.append(...rows);
    });
  });
}
