// The sections of the page. Each says which folders have its data, what it needs, and how it looks.

/** Columns that set runs apart beside their policies, where they differ. */
const FACETS = [
  "source", "system", "device", "device_memory", "memory_utilization", "max_batch", "token_budget", "exit_wait",
  "rate_per_s", "replicas", "machines",
];
/** What the frontier can be drawn over, the usual first. */
const QUANTITIES = [
  "token_agreement", "exact_match", "throughput_tok_s", "capacity_req_s", "goodput_req_s", "objectives_met", "mean_depth",
  "ttft_mean_ms", "ttft_p50_ms", "ttft_p99_ms", "tpot_mean_ms", "tpot_p50_ms", "tpot_p99_ms", "itl_p99_ms", "e2e_mean_ms",
  "e2e_p50_ms", "e2e_p99_ms", "price_per_million_tokens", "equal_share", "nats_per_token", "busy", "mean_rows",
  "rate_per_s", "max_batch", "threshold",
];
/** Least distance of labels, as a share of the plot's width and height. */
const LABEL_ROOM = [0.07, 0.05];
/** Distributions that are shown at first. */
const FIRST_POLICIES = 6;

const isNumber = (value) => typeof value === "number";

/** The interval of a quantity on a line: ends, or half its width. */
function interval(line, column) {
  const [low, high, half] = [line[`${column}_low`], line[`${column}_high`], line[`${column}_ci95`]];
  if (isNumber(low) && isNumber(high)) return [low, high];
  return isNumber(half) ? [line[column] - half, line[column] + half] : null;
}

/** Lines that no other attainable line beats in both quantities, by rising x. */
function efficient(lines, x, y) {
  const worth = (line, column) => (lessIsBetter(column) ? -line[column] : line[column]);
  const bestFirst = d3.sort(lines.filter((line) => line.role !== "bound"),
    (a, b) => worth(b, x) - worth(a, x) || worth(b, y) - worth(a, y));
  let best = -Infinity;
  const kept = bestFirst.filter((line) => {
    const better = worth(line, y) > best;
    if (better) best = worth(line, y);
    return better;
  });
  return d3.sort(kept, (line) => line[x]);
}

/** What tells a point from the others on its line. */
function pointLabel(line) {
  if (isNumber(line.threshold)) return number(line.threshold);
  return line.role === "baseline" && line.exit !== "mix" ? line.exit_policy : "";
}

/** Lines with a label, without those whose label would lie over one before. */
function labelled(lines, x, y, domains) {
  const place = (line) => [x, y].map((column, index) => (line[column] - domains[index][0]) / (domains[index][1] - domains[index][0]));
  const kept = [];
  for (const line of lines.filter((line) => pointLabel(line) !== "")) {
    const [across, up] = place(line);
    const free = kept.every((other) => {
      const [x, y] = place(other);
      return Math.abs(across - x) > LABEL_ROOM[0] || Math.abs(up - y) > LABEL_ROOM[1];
    });
    if (free) kept.push(line);
  }
  return kept;
}

function tipText(line, columns) {
  const value = (column) => {
    const ends = interval(line, column);
    const range = ends === null ? "" : ` (${number(ends[0])} to ${number(ends[1])})`;
    return `${title(column)}: ${number(line[column])}${range}`;
  };
  return [line.policy, ...columns.map(value)].join("\n");
}

function overview() {
  const card = (folder) => {
    const missing = SECTIONS.filter((section) => section.needs && !section.has(folder))
      .map((section) => `${section.title.toLowerCase()} (${section.needs})`);
    return el("div", { class: "panel" },
      el("h3", {}, folder.name),
      el("p", { class: "lead" }, [folder.title, folder.kind && `depthwise ${folder.kind}`].filter(Boolean).join(" · ")),
      folder.complete ? null : el("p", { class: "warning" }, "The run that writes this folder has not ended: what is here is a part."),
      folder.headlines.map((headline) => el("p", { class: "headline" }, `${headline[0].toUpperCase()}${headline.slice(1)}.`)),
      el("dl", {}, folder.facts.flatMap(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
      folder.notes.length === 0 ? null : el("details", { class: "on-paper" }, el("summary", {}, "What was left out or sampled"),
        el("ul", { class: "note" }, folder.notes.map((note) => el("li", {}, note)))),
      missing.length === 0 ? null : el("details", { class: "on-paper" }, el("summary", {}, "What this folder does not hold"),
        el("ul", { class: "note" }, missing.map((name) => el("li", {}, name)))));
  };
  return el("div", { class: "panels" }, folders.map(card));
}

function settings(shown) {
  const keys = [...new Set(shown.flatMap((folder) => folder.settings.map(([key]) => key)))];
  const values = shown.map((folder) => new Map(folder.settings));
  const line = (key) => Object.fromEntries([["setting", key], ...shown.map((folder, index) =>
    [folder.name, values[index].get(key) ?? ""])]);
  const differ = keys.filter((key) => new Set(values.map((value) => value.get(key) ?? "")).size > 1).map(line);
  if (differ.length === 0) return el("p", {}, "The configurations of all folders are equal.");
  return sortableTable("settings that differ", ["setting", ...shown.map((folder) => folder.name)], differ, []);
}

function frontier(shown) {
  const lines = new Map(shown.map((folder) => [folder, folder.runs.allLines()]));
  const all = [...lines.values()].flat();
  const has = (column) => all.some((line) => isNumber(line[column]));
  const quantities = QUANTITIES.filter(has);
  const measured = all.filter((line) => line.source === "measured");
  const first = measured.length > 0 ? measured : all;
  const differs = (column) => new Set(first.map((line) => line[column]).filter(isNumber)).size > 1;
  const state = {
    x: ["token_agreement", "exact_match", "mean_depth"].find(differs) ?? quantities[0],
    y: ["capacity_req_s", "throughput_tok_s"].find(has) ?? quantities[0],
    facets: new Map(),
  };
  // What is the same in a folder sets its runs apart from those of other folders only, which have panels of their own.
  const facets = FACETS.filter((column) => shown.some((folder) => folder.runs.varies(column)));
  const facetValues = (column) => [...new Set(shown.filter((folder) => folder.runs.varies(column)).flatMap((folder) => folder.runs.values(column)))];
  for (const column of facets) {
    const values = facetValues(column);
    state.facets.set(column, column === "source" && values.includes("measured") ? "measured" : values[0]);
  }
  const styles = looks(all.map((line) => line.series));
  const visible = new Set(styles.keys());
  const kept = (folder) => lines.get(folder).filter((line) => visible.has(line.series)
    && isNumber(line[state.x]) && isNumber(line[state.y])
    && facets.every((column) => state.facets.get(column) === ALL || !folder.runs.varies(column) || line[column] === state.facets.get(column)));

  /** All folders on the same axes. */
  function domain(column) {
    const values = shown.flatMap(kept).flatMap((line) => [line[column], ...(interval(line, column) ?? [])]);
    const [low, high] = d3.extent(values);
    const room = 0.06 * (high - low || Math.abs(high) || 1);
    return [low >= 0 ? Math.max(0, low - room) : low - room, high + room];
  }

  const charts = shown.map((folder) => chart(`Frontier of ${folder.name}: runs by the quantities that are chosen above; the table of runs has the numbers`, (width) => {
    const found = kept(folder);
    if (found.length === 0) return plot(width, { marks: [Plot.text(["no run has both quantities under these settings"], { frameAnchor: "middle" })] });
    const { x, y } = state;
    const line = (run) => `${run.series} ${facets.map((column) => run[column])}`;
    const ordered = d3.sort(found, (run) => run[x]);
    const perSeries = (batching) => ordered.filter((run) => parts(run.series)[0] === batching);
    const batchings = [...new Set(found.map((run) => parts(run.series)[0]))];
    const stroke = (run) => styles.get(run.series).colour;
    const bars = (column, mark, ends) => mark(found.filter((run) => interval(run, column) !== null), ends);
    return plot(width, {
      x: { label: `${title(x)} →`, domain: domain(x), grid: true, ticks: Math.max(3, width / 90) },
      y: { label: `↑ ${title(y)}`, domain: domain(y), grid: true, tickFormat: "~s" },
      marks: [
        Plot.line(efficient(found, x, y), { x, y, stroke: "var(--bound)", strokeWidth: 9, strokeLinejoin: "round", strokeLinecap: "round", curve: "linear" }),
        batchings.map((batching) => Plot.line(perSeries(batching), {
          x, y, z: line, stroke, strokeWidth: 1.6, strokeDasharray: DASHES[batching] ?? undefined,
        })),
        bars(x, Plot.link, { x1: (run) => interval(run, x)[0], x2: (run) => interval(run, x)[1], y1: y, y2: y, stroke, strokeOpacity: 0.65 }),
        bars(y, Plot.link, { y1: (run) => interval(run, y)[0], y2: (run) => interval(run, y)[1], x1: x, x2: x, stroke, strokeOpacity: 0.65 }),
        batchings.map((batching) => Plot.dot(perSeries(batching), {
          x, y, fill: stroke, stroke: "var(--panel)", strokeWidth: 0.8, r: 4.5, symbol: SYMBOLS[batching] ?? "circle",
        })),
        Plot.text(labelled(found, x, y, [domain(x), domain(y)]), { x, y, text: pointLabel, dy: -10, fill: "currentColor", stroke: "var(--panel)", strokeWidth: 4, fontSize: 10.5 }),
        Plot.tip(found, Plot.pointer({ x, y, title: (run) => tipText(run, [y, x, "mean_depth"].filter((column, place, list) => isNumber(run[column]) && list.indexOf(column) === place)) })),
      ],
    });
  }));
  const redraw = () => charts.forEach((drawn) => drawn.redraw());
  const facetChoice = (column) => choice(title(column),
    [...facetValues(column), ALL], state.facets.get(column),
    (value) => { state.facets.set(column, value); redraw(); }, (value) => (value === ALL ? "all" : number(value) || "none"));
  return el("div", {},
    controls(
      choice("across", quantities, state.x, (value) => { state.x = value; redraw(); }, title),
      choice("up", quantities, state.y, (value) => { state.y = value; redraw(); }, title),
      facets.map(facetChoice)),
    legend(styles, visible, redraw),
    el("div", { class: "panels" }, shown.map((folder, index) => el("div", { class: "panel" },
      data.folders.length > 1 ? el("h3", {}, folder.name) : null, charts[index].host))),
    el("p", { class: "note" }, "Numbers at points are thresholds, or the policy of a baseline. Whiskers are 95% intervals of qualities and of means over seeds; of measured throughput, the least and the most of a repeat. The broad pale line joins the runs that no other attainable run beats in both quantities. Baselines read no signal; the oracle bounds what any signal can reach."));
}
const ALL = Symbol("all");

function runs(shown) {
  const columns = [...new Set(shown.flatMap((folder) => [...folder.runs.columns.keys()]))];
  const several = data.folders.length > 1;
  const lines = shown.flatMap((folder) => folder.runs.allLines().map((line) => ({ folder: folder.name, ...line })));
  return sortableTable("runs", several ? ["folder", ...columns] : columns, lines);
}

/** Policies to look at first: full depth, and those that are efficient. */
function firstPolicies(folder, names) {
  if (!folder.runs) return names.slice(0, FIRST_POLICIES);
  const runs = folder.runs.allLines();
  const measured = runs.filter((run) => run.source === "measured");
  const efficientRuns = efficient((measured.length > 0 ? measured : runs).filter((run) => isNumber(run.token_agreement)), "token_agreement", "throughput_tok_s");
  const first = [...runs.filter((run) => run.exit === "none"), ...efficientRuns.reverse()].map((run) => run.policy);
  const found = [...new Set(first)].filter((name) => names.includes(name)).slice(0, FIRST_POLICIES);
  return found.length > 0 ? found : names.slice(0, FIRST_POLICIES);
}

/** A run to look at first: one whose exits depend on the token, batched depth-wise, if there is any. */
function firstRun(folder, names) {
  const adaptive = new Set(folder.runs?.allLines().filter((run) => run.role === "adaptive").map((run) => run.policy));
  const isFirst = (name) => name.startsWith("depth-wise") && adaptive.has(name);
  return firstPolicies(folder, names).find(isFirst) ?? names.find(isFirst) ?? names[0];
}

/** A look for each of many policies: colours in turn, dashes by batching. */
function policyLooks(names) {
  return new Map(names.map((name, index) => {
    const batching = parts(name)[0];
    return [name, { colour: colour(index % 7), dash: DASHES[batching] ?? null, symbol: SYMBOLS[batching] ?? "circle" }];
  }));
}

function latencies(folder) {
  const sources = [...new Set(folder.latencies.map((run) => run.source))];
  const metrics = ["ttft_ms", "tpot_ms", "e2e_ms"].filter((metric) => folder.latencies.some((run) => run[metric].length > 0));
  const state = { source: sources[0], metric: metrics[0], log: true };
  const names = [...new Set(folder.latencies.map((run) => run.policy))];
  const visible = new Set(firstPolicies(folder, names));
  const styles = policyLooks([...visible, ...names.filter((name) => !visible.has(name))]);
  const labels = { ttft_ms: "time to first token (ms)", tpot_ms: "time per output token (ms)", e2e_ms: "end-to-end latency (ms)" };
  const drawn = chart(`Cumulative distributions of latencies of ${folder.name}`, (width) => {
    const found = folder.latencies.filter((run) => run.source === state.source && visible.has(run.policy));
    const points = found.flatMap((run) => run[state.metric].map((value, index, values) =>
      ({ policy: run.policy, value, share: values.length === 1 ? 1 : index / (values.length - 1) })));
    const log = state.log && points.every((point) => point.value > 0);
    return plot(width, {
      x: { label: `${labels[state.metric]} →`, grid: true, type: log ? "log" : "linear", ticks: Math.max(3, width / 110), tickFormat: log ? "~s" : undefined },
      y: { label: "↑ share of requests", domain: [0, 1], percent: false, grid: true },
      marks: [
        BATCHINGS.map((batching) => Plot.line(points.filter((point) => parts(point.policy)[0] === batching), {
          x: "value", y: "share", z: "policy", stroke: (point) => styles.get(point.policy).colour, strokeWidth: 1.8, strokeDasharray: DASHES[batching] ?? undefined,
        })),
        Plot.ruleY([0.5, 0.99], { stroke: "currentColor", strokeOpacity: 0.25 }),
        Plot.tip(points, Plot.pointer({ x: "value", y: "share", title: (point) => `${point.policy}\n${number(100 * point.share)}% of requests: at most ${number(point.value)} ms` })),
      ],
    });
  });
  const log = el("input", { type: "checkbox", checked: true, onchange: (event) => { state.log = event.target.checked; drawn.redraw(); } });
  const redraw = drawn.redraw;
  return el("div", {},
    controls(
      choice("latency", metrics, state.metric, (value) => { state.metric = value; redraw(); }, (metric) => labels[metric]),
      choice("source", sources, state.source, (value) => { state.source = value; redraw(); }),
      el("label", { class: "inline" }, log, "logarithmic")),
    figure("Share of requests up to a latency", drawn),
    legend(styles, visible, redraw));
}

function rowsByDepth(folder) {
  const names = [...new Set(folder.rows_by_depth.map((run) => run.policy))];
  const state = { policy: firstRun(folder, names) };
  const host = el("div", { class: "pair" });
  const most = (found) => d3.max(found, (run) => d3.max(run.rows[0], (_, slice) => d3.sum(run.rows, (rows) => rows[slice])));
  function draw() {
    const found = folder.rows_by_depth.filter((run) => run.policy === state.policy);
    const top = most(found);
    const end = d3.max(found, (run) => run.rows[0].length * run.width_s);
    host.replaceChildren(...found.map((run) => {
      const slices = run.rows.flatMap((rows, depth) => rows.map((count, slice) => ({ depth, count, slice })));
      const caption = `${run.policy}, ${run.source}`;
      return figure(caption, chart(`Mean rows by depth over time: ${caption}`, (width) => plot(width, {
        height: 240,
        x: { label: "time (s) →", domain: [0, end] },
        y: { label: "↑ rows", domain: [0, top], grid: true },
        color: { domain: d3.range(run.rows.length), range: d3.range(run.rows.length).map(depthColour), type: "ordinal" },
        marks: [Plot.rectY(slices, Plot.stackY({
          x1: (d) => d.slice * run.width_s, x2: (d) => (d.slice + 1) * run.width_s, y: "count", fill: "depth", order: "depth", insetLeft: -0.3, insetRight: -0.3,
        }))],
      })));
    }));
  }
  draw();
  const depths = d3.max(folder.rows_by_depth, (run) => run.rows.length);
  return el("div", {},
    controls(choice("run", names, state.policy, (value) => { state.policy = value; draw(); })),
    depthLegend(depths), host);
}

function exits(folder) {
  const { exits } = folder;
  const depths = exits.agreement.length;
  const state = { policy: exits.policies.length > 1 ? exits.policies[1] : exits.policies[0] };
  const width = exits.positions.length > 1 ? exits.positions[1] : 1;
  const total = d3.sum(exits.position_tokens);
  const share = (policy, depth) => d3.sum(policy.shares[depth], (share, range) => share * exits.position_tokens[range]) / total;
  const byDepth = chart(`Exits and agreement by depth of ${folder.name}`, (size) => plot(size, {
    height: 240,
    x: { label: "depth →", type: "band", domain: d3.range(depths) },
    y: { label: "↑ share of tokens", domain: [0, 1], grid: true },
    marks: [
      Plot.barY(d3.range(depths), { x: (depth) => depth, y: (depth) => share(state.policy, depth), fill: depthColour, inset: 1 }),
      Plot.line(d3.range(depths), { x: (depth) => depth, y: (depth) => exits.agreement[depth], stroke: "currentColor", strokeWidth: 1.6 }),
      Plot.dot(d3.range(depths), { x: (depth) => depth, y: (depth) => exits.agreement[depth], fill: "currentColor" }),
      Plot.tip(d3.range(depths), Plot.pointerX({ x: (depth) => depth, y: (depth) => exits.agreement[depth], title: (depth) => `depth ${depth}\nexits here: ${number(100 * share(state.policy, depth))}% of tokens\nits prediction is that of full depth: ${number(100 * exits.agreement[depth])}%` })),
    ],
  }));
  const byPosition = chart(`Exits by position in the generated text of ${folder.name}`, (size) => {
    const cells = state.policy.shares.flatMap((shares, depth) => shares.map((share, range) => ({ depth, share, range })))
      .filter(({ range }) => exits.position_tokens[range] > 0);
    return plot(size, {
      height: 240,
      x: { label: "position in the generated text →" },
      y: { label: "↑ share of tokens", domain: [0, 1] },
      color: { domain: d3.range(depths), range: d3.range(depths).map(depthColour), type: "ordinal" },
      marks: [
        Plot.rectY(cells, Plot.stackY({ x1: (d) => exits.positions[d.range], x2: (d) => exits.positions[d.range] + width, y: "share", fill: "depth", order: "depth", insetLeft: -0.3, insetRight: -0.3 })),
        Plot.ruleY([0]),
      ],
    });
  });
  const redraw = () => { byDepth.redraw(); byPosition.redraw(); };
  const table = () => sortableTable(`exits of ${folder.name}`,
    ["policy", "mean_depth", ...d3.range(depths).map((depth) => `share at depth ${depth}`)],
    exits.policies.map((policy) => ({
      policy: policy.policy, mean_depth: policy.mean_depth,
      ...Object.fromEntries(d3.range(depths).map((depth) => [`share at depth ${depth}`, share(policy, depth)])),
    })), []);
  return el("div", {},
    controls(choice("exit policy", exits.policies, state.policy, (value) => { state.policy = value; redraw(); }, (policy) => `${policy.policy} (${number(policy.mean_depth)} passes per token)`)),
    depthLegend(depths),
    el("div", { class: "pair" },
      figure("Where tokens exit (bars), and how often a depth predicts as full depth does (line)", byDepth),
      figure("Where tokens exit, by position", byPosition)),
    foldedTable("Shares of all policies", table),
    el("p", { class: "note" }, `${plural(exits.tokens, "token")} of ${plural(exits.generations, "generation")} of ${exits.model}, ${exits.source}. Policies are applied to the recording, except those that it was served under.`));
}

function timeline(folder) {
  const name = (run) => (run.load === null ? run.policy : `${run.policy}, load ${number(run.load)}`);
  const first = firstRun(folder, folder.timeline.map((run) => run.policy));
  const selected = folder.timeline.find((run) => run.policy === first);
  const host = el("div");
  const draw = (run) => host.replaceChildren(timelineOf(run, name(run)));
  draw(selected);
  return el("div", {},
    controls(choice("run", folder.timeline, selected, draw, name)),
    host, depthLegend(d3.max(folder.timeline, (run) => run.rows.length)));
}

const COMPARISON_TITLES = {
  validation: "Replays in turn",
  speedups: "Ratios to sequence-wise batching without exits, in a closed loop",
  absolute: "Values in a closed loop",
  at_rates: "Values at shares of each combination's own capacity",
};

function comparison(table) {
  const lines = table.allLines();
  const metrics = table.values("metric");
  const loads = table.has("load") ? table.values("load") : [null];
  const state = { metric: metrics[0], load: loads[0] };
  const look = (line) => batchingLook(parts(line.policy)[0]);
  const quantity = (metric) => (table.name === "speedups" ? `ratio of ${title(metric).replace(/ \(.*/, "")}` : title(metric));
  const kept = () => lines.filter((line) => line.metric === state.metric && (line.load ?? null) === state.load);
  const tip = (line) => `${line.policy}\npredicted ${number(line.predicted)}, measured ${number(line.measured)}\nerror ${number(line.error_pct)}%${isNumber(line.error_low_pct) ? ` (${number(line.error_low_pct)} to ${number(line.error_high_pct)})` : ""}`;
  const errors = chart("Errors of predictions by policy; the table below has the numbers", (width) => {
    const found = kept();
    return plot(width, {
      height: 60 + 21 * found.length,
      marginLeft: Math.min(0.5 * width, 24 + 6.6 * d3.max(found, (line) => line.policy.length)),
      x: { label: "predicted over measured, less 1 (%) →", grid: true, ticks: Math.max(3, width / 120) },
      y: { label: null, domain: found.map((line) => line.policy), tickSize: 0 },
      marks: [
        Plot.ruleX([0]),
        Plot.link(found.filter((line) => isNumber(line.error_low_pct)), { x1: "error_low_pct", x2: "error_high_pct", y1: "policy", y2: "policy", stroke: (line) => look(line).colour, strokeWidth: 2 }),
        Plot.dot(found, { x: "error_pct", y: "policy", fill: (line) => look(line).colour, symbol: (line) => look(line).symbol, r: 4.5 }),
        Plot.tip(found, Plot.pointerY({ x: "error_pct", y: "policy", title: tip })),
      ],
    });
  });
  const scatter = chart("Predicted against measured values; the table below has the numbers", (width) => {
    const found = kept();
    const domain = d3.extent(found.flatMap((line) => [line.predicted, line.measured]));
    const room = 0.06 * (domain[1] - domain[0] || domain[1]);
    const both = [domain[0] - room, domain[1] + room];
    return plot(width, {
      height: Math.min(width, 380),
      x: { label: `measured ${quantity(state.metric)} →`, domain: both, grid: true, tickFormat: "~s", ticks: Math.max(3, width / 90) },
      y: { label: `↑ predicted ${quantity(state.metric)}`, domain: both, grid: true, tickFormat: "~s" },
      marks: [
        Plot.line([[both[0], both[0]], [both[1], both[1]]], { stroke: "currentColor", strokeDasharray: "3 3" }),
        Plot.dot(found, { x: "measured", y: "predicted", fill: (line) => look(line).colour, symbol: (line) => look(line).symbol, r: 5 }),
        Plot.tip(found, Plot.pointer({ x: "measured", y: "predicted", title: tip })),
      ],
    });
  });
  const redraw = () => { errors.redraw(); scatter.redraw(); };
  return el("div", {},
    subheading(COMPARISON_TITLES[table.name] ?? table.name),
    controls(
      choice("metric", metrics, state.metric, (value) => { state.metric = value; redraw(); }, quantity),
      choice("load", loads, state.load, (value) => { state.load = value; redraw(); }, (load) => `${number(load)} of the capacity`)),
    batchingLegend([...new Set(lines.map((line) => parts(line.policy)[0]))]),
    el("div", { class: "pair" }, figure("Error, with its 95% interval", errors), figure("Predicted against measured", scatter)),
    foldedTable(`Table ${table.name}`, () => fileTable(table, ["policy", "load", "metric", "predicted", "measured", "error_pct", "error_low_pct", "error_high_pct", "abs_error_pct"])));
}

function validation(folder) {
  const means = folder.tables.find((table) => table.name === "errors");
  return el("div", {}, folder.comparisons.map(comparison),
    means ? [subheading("Mean absolute errors over combinations"), sortableTable(`mean errors of ${folder.name}`, [...means.columns.keys()], means.allLines(), [])] : null);
}

const LOSSES = {
  loss_nats_per_token: "last loop, training",
  held_out_nats_per_token: "last loop, held out",
  objective: "objective",
  teacher_nats_per_token: "divergence from the teacher",
  self_distillation_nats_per_token: "divergence of earlier loops",
  gate_nats_per_token: "gates",
};

/** The held-out evaluation of a trained model. */
function evaluation(folder) {
  return folder.tables.find((table) => table.name === "eval");
}

function training(folder) {
  const lines = folder.loss.allLines();
  const columns = Object.keys(LOSSES).filter((column) => lines.some((line) => isNumber(line[column])));
  const styles = new Map(columns.map((column, index) => [LOSSES[column], { colour: colour(index), dash: null, symbol: "circle" }]));
  const visible = new Set(columns.slice(0, 2).map((column) => LOSSES[column]));
  const drawn = chart(`Losses over training steps of ${folder.name}`, (width) => {
    const points = columns.filter((column) => visible.has(LOSSES[column])).flatMap((column) =>
      lines.filter((line) => isNumber(line[column])).map((line) => ({ step: line.step, loss: line[column], name: LOSSES[column] })));
    return plot(width, {
      x: { label: "step →", grid: true },
      y: { label: "↑ nats per token", grid: true, zero: false },
      marks: [
        Plot.line(points, { x: "step", y: "loss", z: "name", stroke: (point) => styles.get(point.name).colour, strokeWidth: 1.8 }),
        Plot.dot(points.filter((point) => point.name === LOSSES.held_out_nats_per_token), { x: "step", y: "loss", fill: (point) => styles.get(point.name).colour, r: 3 }),
        Plot.tip(points, Plot.pointer({ x: "step", y: "loss", title: (point) => `${point.name}\nstep ${number(point.step)}: ${number(point.loss)}` })),
      ],
    });
  });
  const evaluated = evaluation(folder);
  const byLoop = evaluated && chart(`Quality by loop of ${folder.name}`, (width) => {
    const loops = evaluated.allLines();
    return plot(width, {
      x: { label: "passes →", type: "band" },
      y: { label: "↑ nats per token, held out", grid: true, domain: [0, 1.1 * d3.max(loops, (line) => line.loss_nats_per_token)] },
      marks: [
        Plot.barY(loops, { x: "passes", y: "loss_nats_per_token", fill: (line) => depthColour(line.passes - 1), inset: 2 }),
        Plot.text(loops, { x: "passes", y: "loss_nats_per_token", text: (line) => number(line.loss_nats_per_token), dy: -8, fill: "currentColor" }),
        Plot.ruleY([0]),
      ],
    });
  });
  return el("div", {}, el("div", { class: "pair" },
    figure("Losses over training", drawn, legend(styles, visible, drawn.redraw)),
    byLoop ? figure("Loss of the saved model by loop", byLoop) : null));
}

function profile(folder) {
  const points = folder.profile.allLines();
  const components = folder.profile.values("component");
  const state = { component: components.includes("block") ? "block" : components[0] };
  const drawn = chart(`Measured times of a component of a pass of ${folder.name}`, (width) => {
    const found = d3.sort(points.filter((point) => point.component === state.component), (point) => point.rows);
    const name = (point) => [point.kv_tokens > 0 && `history ${point.kv_tokens}`, point.depths > 1 && `${point.depths} depths`].filter(Boolean).join(", ") || "all";
    const names = [...new Set(found.map(name))];
    return plot(width, {
      height: 280,
      x: { label: "rows →", type: "log", base: 2, grid: true, tickFormat: "~s" },
      y: { label: "↑ time (µs)", type: "log", grid: true, tickFormat: "~s" },
      marks: [
        Plot.line(found, { x: "rows", y: "time_us", z: name, stroke: (point) => d3.interpolateViridis(0.75 * (names.indexOf(name(point)) / Math.max(1, names.length))), strokeWidth: 1.6 }),
        Plot.dot(found, { x: "rows", y: "time_us", r: 2.5, fill: "currentColor" }),
        Plot.tip(found, Plot.pointer({ x: "rows", y: "time_us", title: (point) => `${point.component}, ${name(point)}\n${point.rows} rows: ${number(point.time_us)} µs ± ${number(point.spread_us)}` })),
      ],
    });
  });
  return el("div", {},
    controls(choice("component", components, state.component, (value) => { state.component = value; drawn.redraw(); }, title)),
    figure("Median time of a component, by rows of the pass", drawn),
    foldedTable("Table latency", () => fileTable(folder.profile, [])));
}

function otherTables(folder) {
  return el("div", {}, folder.tables.filter((table) => table.name !== "errors").map((table) =>
    foldedTable(`${table.name}.csv, ${plural(table.lines, "line")}`, () => fileTable(table, []))));
}

function configuration(folder) {
  const isCommand = (step) => step.startsWith("depthwise ");
  return el("div", {},
    folder.reproduce.length === 0 ? null : subheading("How to reproduce"),
    el("ol", {}, folder.reproduce.map((step) => el("li", {}, isCommand(step) ? el("code", {}, step) : step))),
    folder.documents.map(([name, text], index) => el("details", { open: index === 0, class: "on-paper" }, el("summary", {}, name),
      el("pre", { tabindex: 0, role: "region", "aria-label": `${name} of ${folder.name}` }, text))));
}

const perFolder = (build) => (shown) => panels(shown, build);

const SECTIONS = [
  { id: "overview", title: "At a glance", has: () => true, build: overview },
  { id: "settings", title: "Settings that differ", has: (folder) => folders.length > 1 && folder.settings.length > 0, build: settings,
    least: 2 },
  { id: "frontier", title: "Throughput against quality", has: (folder) => folder.runs !== null && folder.runs.lines > 0, build: frontier,
    needs: "a summary of runs" },
  { id: "runs", title: "Runs", has: (folder) => folder.runs !== null, build: runs,
    lead: "Press a column to sort. A filter takes words, and comparisons such as throughput_tok_s>1000 or batching=depth." },
  { id: "latencies", title: "Latencies", has: (folder) => folder.latencies.length > 0, build: perFolder(latencies),
    needs: "requests.csv" },
  { id: "rows", title: "Rows by depth over time", has: (folder) => folder.rows_by_depth.length > 0, build: perFolder(rowsByDepth),
    needs: "depth_rows.csv", lead: "How many rows of each depth share the running pass: means over slices of time, idle time included." },
  { id: "exits", title: "Exits by depth and position", has: (folder) => folder.exits !== null, build: perFolder(exits),
    needs: "an exit trace" },
  { id: "timeline", title: "Timeline of passes", has: (folder) => folder.timeline.length > 0, build: perFolder(timeline),
    needs: "a pass log",
    lead: "Every bar is a pass, its height its rows. Zoom with the buttons, with + and − or Ctrl and the wheel; move with the arrow keys or by dragging. From afar, bars are means over time." },
  { id: "validation", title: "Predicted against measured", has: (folder) => folder.comparisons.length > 0, build: perFolder(validation),
    needs: "a comparison with the engine" },
  { id: "training", title: "Training", has: (folder) => folder.loss !== null, build: perFolder(training), needs: "loss.csv" },
  { id: "profile", title: "Latency profile", has: (folder) => folder.profile !== null, build: perFolder(profile),
    needs: "a latency profile" },
  { id: "tables", title: "Other tables", has: (folder) => folder.tables.length > 0, build: perFolder(otherTables) },
  { id: "configuration", title: "Configuration", has: (folder) => folder.documents.length > 0, build: perFolder(configuration),
    needs: "config.yaml" },
];
