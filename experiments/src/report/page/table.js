// Tables that sort and filter.

const FIRST_LINES = 100;

/** Shown of a table of runs before all columns are asked for. */
const MAIN_COLUMNS = [
  "folder", "source", "system", "policy", "max_batch", "rate_per_s", "capacity_req_s", "throughput_tok_s", "mean_depth",
  "token_agreement", "exact_match", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "e2e_p99_ms",
  "goodput_req_s", "price_per_million_tokens",
];

const COMPARE = {
  ">": (a, b) => a > b,
  "<": (a, b) => a < b,
  ">=": (a, b) => a >= b,
  "<=": (a, b) => a <= b,
};

/** Whether a line has every word of a filter; `column>3` and the like compare numbers, `column=text` a whole cell. */
function matcher(filter) {
  const tests = filter.toLowerCase().split(/\s+/).filter(Boolean).map((word) => {
    const [, column, operator, value] = /^([\w.]+)(>=|<=|>|<|=)(.*)$/.exec(word) ?? [];
    if (column === undefined) {
      return (line) => Object.values(line).some((cell) => String(cell ?? "").toLowerCase().includes(word));
    }
    if (operator === "=") return (line) => String(line[column] ?? "").toLowerCase() === value;
    return (line) => typeof line[column] === "number" && COMPARE[operator](line[column], Number(value));
  });
  return (line) => tests.every((test) => test(line));
}

function compareCells(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  if (typeof a === "number" && typeof b === "number") return a - b;
  return String(a).localeCompare(String(b), "en", { numeric: true });
}

/** A table with its controls. `main` are the columns that are shown at first, if the table has any of them. */
function sortableTable(name, columns, lines, main = MAIN_COLUMNS) {
  const shownFirst = main.filter((column) => columns.includes(column) && lines.some((line) => (line[column] ?? "") !== ""));
  const state = { filter: "", all: shownFirst.length < 3, sort: null, descending: false, limit: FIRST_LINES };
  const isNumeric = new Map(columns.map((column) => [
    column, lines.some((line) => typeof line[column] === "number"),
  ]));
  const formats = new Map(columns.map((column) => [column, columnFormat(lines.map((line) => line[column]))]));
  const count = el("span", { role: "status", class: "note" });
  const table = el("table", { "aria-label": name });
  const more = el("button", { type: "button", onclick: () => { state.limit = Infinity; draw(); } });

  function header(column) {
    const sorted = state.sort === column;
    const sort = sorted ? (state.descending ? "descending" : "ascending") : "none";
    const turn = () => {
      // Numbers are looked at from the greatest down.
      state.descending = sorted ? !state.descending : isNumeric.get(column);
      state.sort = column;
      draw();
      table.querySelector(`th[data-column="${CSS.escape(column)}"] button`).focus();
    };
    const button = el("button", { type: "button", onclick: turn, title: column }, title(column));
    const kind = isNumeric.get(column) ? "number" : null;
    return el("th", { scope: "col", "aria-sort": sort, "data-column": column, class: kind }, button);
  }

  function draw() {
    const shown = state.all ? columns : shownFirst;
    let kept = lines.filter(matcher(state.filter));
    if (state.sort !== null) {
      const direction = state.descending ? -1 : 1;
      kept = d3.sort(kept, (a, b) => {
        const [x, y] = [a[state.sort] ?? null, b[state.sort] ?? null];
        return x === null || y === null ? compareCells(x, y) : direction * compareCells(x, y);
      });
    }
    const row = (line) => el("tr", {}, shown.map((column) => {
      const value = line[column] ?? "";
      return el("td", { class: isNumeric.get(column) ? "number" : null }, typeof value === "number" ? formats.get(column)(value) : value);
    }));
    table.replaceChildren(
      el("thead", {}, el("tr", {}, shown.map(header))),
      el("tbody", {}, kept.slice(0, state.limit).map(row)),
    );
    count.textContent = `${d3.format(",")(kept.length)} of ${plural(lines.length, "line")}`;
    more.hidden = kept.length <= state.limit;
    more.textContent = `Show all ${d3.format(",")(kept.length)} lines`;
  }

  function download() {
    const cell = (value) => (/[",\n]/.test(String(value)) ? `"${String(value).replaceAll('"', '""')}"` : value ?? "");
    const kept = lines.filter(matcher(state.filter));
    const text = [columns, ...kept.map((line) => columns.map((column) => line[column]))]
      .map((cells) => cells.map(cell).join(",")).join("\n");
    const link = el("a", { href: URL.createObjectURL(new Blob([text + "\n"], { type: "text/csv" })), download: `${name}.csv` });
    link.click();
    URL.revokeObjectURL(link.href);
  }

  const filter = el("input", {
    type: "search", placeholder: "depth-wise throughput_tok_s>1000", size: 30,
    oninput: (event) => { state.filter = event.target.value; draw(); },
  });
  const all = el("input", { type: "checkbox", onchange: (event) => { state.all = event.target.checked; draw(); } });
  const controls = el("div", { class: "controls" },
    el("label", {}, "Filter lines", filter),
    shownFirst.length < columns.length && !state.all ? el("label", { class: "inline" }, all, `all ${columns.length} columns`) : null,
    el("button", { type: "button", onclick: download }, "Save as CSV"),
    count);
  draw();
  const region = el("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": `${name}, table` }, table);
  return el("div", {}, controls, region, more);
}

/** A table of a file. */
function fileTable(table, main) {
  return sortableTable(table.name, [...table.columns.keys()], table.allLines(), main);
}

/** Details with a table that is made when they are opened. */
function foldedTable(summary, make) {
  const details = el("details", {
    ontoggle: () => { if (details.open && details.children.length === 1) details.append(make()); },
  }, el("summary", {}, summary));
  return details;
}
