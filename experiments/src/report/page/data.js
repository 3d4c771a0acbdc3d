// The data of the page, elements, names and numbers.

const data = JSON.parse(document.getElementById("data").textContent);

/** A table by column; a column has one cell for all lines, or one for each. */
class Table {
  constructor({ name, lines, columns }) {
    this.name = name;
    this.lines = lines;
    this.columns = new Map(columns.map((column) => [column.name, column]));
  }

  has(name) {
    return this.columns.has(name);
  }

  cell(name, line) {
    const column = this.columns.get(name);
    if (column === undefined) return null;
    return "same" in column ? column.same : column.each[line];
  }

  /** The cells of a line by the names of their columns. */
  line(line) {
    return Object.fromEntries([...this.columns.keys()].map((name) => [name, this.cell(name, line)]));
  }

  allLines() {
    return d3.range(this.lines).map((line) => this.line(line));
  }

  /** Different cells of a column, in the order in which they first come. */
  values(name) {
    return [...new Set(d3.range(this.lines).map((line) => this.cell(name, line)))];
  }

  varies(name) {
    return this.has(name) && this.values(name).length > 1;
  }

  isNumeric(name) {
    const values = this.values(name).filter((value) => value !== null);
    return values.length > 0 && values.every((value) => typeof value === "number");
  }
}

/** Makes an element. Texts become text, never markup. */
function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

/** What columns are called in charts. */
const TITLES = {
  throughput_tok_s: "throughput (tokens/s)",
  token_agreement: "token agreement",
  exact_match: "right answers (exact match)",
  equal_share: "tokens equal to full depth's text",
  mean_depth: "passes per token",
  goodput_req_s: "goodput (requests/s)",
  capacity_req_s: "capacity (requests/s)",
  objectives_met: "share of requests within objectives",
  price_per_million_tokens: "price of a million tokens",
  rate_per_s: "arrivals (requests/s)",
  max_batch: "batch limit",
  token_budget: "token budget",
  kv_fill: "KV fill",
  policy: "policy",
  busy: "share of time in which a pass ran",
  mean_rows: "rows of a pass",
  device_memory: "device memory",
};

function title(column) {
  const latency = /^(ttft|tpot|itl|e2e)_(mean|p\d+)_ms$/.exec(column);
  if (latency !== null) {
    const name = latency[1] === "e2e" ? "latency" : latency[1].toUpperCase();
    return `${name}, ${latency[2] === "mean" ? "mean" : latency[2]} (ms)`;
  }
  return TITLES[column] ?? column.replaceAll("_", " ");
}

/** Whether less of a quantity is better. */
function lessIsBetter(column) {
  return /_ms$|price|nats|makespan|loss|perplexity|mean_depth/.test(column);
}

/** A number for people: at least three digits, no more than needed. */
function number(value) {
  if (typeof value !== "number") return value ?? "";
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e15) return size < 1e4 ? String(value) : d3.format(",")(value);
  if (size >= 1e4) return d3.format(",.0f")(value);
  if (size >= 100) return d3.format(",.1f")(value);
  if (size >= 1) return d3.format(".2f")(value);
  return size >= 1e-3 ? d3.format(".4~f")(value) : d3.format(".3~g")(value);
}

/** How to write the numbers of a column: with equal decimals. */
function columnFormat(values) {
  const numbers = values.filter((value) => typeof value === "number");
  const most = d3.max(numbers, Math.abs) ?? 0;
  if (numbers.every(Number.isInteger)) return most < 1e4 ? String : d3.format(",");
  if (most < 1e-3) return d3.format(".3~g");
  return d3.format(most >= 1e4 ? ",.0f" : most >= 100 ? ",.1f" : most > 1 ? ",.2f" : ".4f");
}

function plural(count, noun, many = `${noun}s`) {
  return `${d3.format(",")(count)} ${count === 1 ? noun : many}`;
}

const folders = data.folders.map((folder) => ({
  ...folder,
  runs: folder.runs && new Table(folder.runs),
  loss: folder.loss && new Table(folder.loss),
  profile: folder.profile && new Table(folder.profile),
  comparisons: folder.comparisons.map((table) => new Table(table)),
  tables: folder.tables.map((table) => new Table(table)),
}));
