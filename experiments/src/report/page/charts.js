// Charts: colours and symbols of series, legends, controls, and hosts that draw again when their width changes.

const BATCHINGS = ["depth-wise", "sequence-wise", "vanilla"];
const DASHES = { "depth-wise": null, "sequence-wise": "6 4", vanilla: "2 3" };
const SYMBOLS = { "depth-wise": "circle", "sequence-wise": "square", vanilla: "triangle" };
/** Colours by number of what is drawn: baselines have the ink's, bounds one of their own. */
const BASELINE_COLOUR = 4;
const BOUND_COLOUR = 3;
const FREE_COLOURS = [0, 1, 2, 5, 6];

const colour = (index) => `var(--series-${index})`;

/** The batching policy and the rest of a name such as `depth-wise, gate 0.9`. */
function parts(series) {
  const cut = series.indexOf(", ");
  return [series.slice(0, cut), series.slice(cut + 2)];
}

/** Colour by exit policy, dash and symbol by batching policy. */
function looks(names) {
  const exits = new Map();
  return new Map([...new Set(names)].map((name) => {
    const [batching, exit] = parts(name);
    let index = FREE_COLOURS[exits.size % FREE_COLOURS.length];
    if (exit === "baselines" || exit === "no exit") index = BASELINE_COLOUR;
    else if (exit.startsWith("oracle")) index = BOUND_COLOUR;
    else if (exits.has(exit)) index = exits.get(exit);
    else exits.set(exit, index);
    const known = BATCHINGS.includes(batching);
    return [name, {
      colour: colour(index),
      dash: known ? DASHES[batching] : null,
      symbol: known ? SYMBOLS[batching] : "circle",
    }];
  }));
}

/** Colours of depths, light to dark as in the project's figures; not quite as dark on a dark ground. */
function addDepthColours(depths) {
  const colours = (dark) => d3.range(depths).map((depth) => {
    const share = (depth + 0.5) / depths;
    return `--depth-${depth}:${d3.interpolateViridis(dark ? 1 - 0.8 * share : 1 - share)};`;
  }).join("");
  const style = `:root{${colours(false)}}@media screen and (prefers-color-scheme:dark){:root{${colours(true)}}}`;
  document.head.append(el("style", {}, style));
}

const depthColour = (depth) => `var(--depth-${depth})`;

/** A picture with a name, drawn again whenever its width changes. `draw` takes the width and returns an SVG. */
function chart(name, draw) {
  const host = el("div", { class: "chart" });
  let width = 0;
  const redraw = () => {
    if (width === 0) return;
    const svg = draw(width);
    // Parts of an image have no names of their own.
    svg.querySelectorAll("[aria-label]").forEach((part) => part.removeAttribute("aria-label"));
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", name);
    host.replaceChildren(svg);
  };
  new ResizeObserver(([entry]) => {
    const found = Math.floor(entry.contentRect.width);
    if (found !== width) {
      width = found;
      redraw();
    }
  }).observe(host);
  return { host, redraw };
}

/** A captioned chart. */
function figure(caption, drawn, ...below) {
  return el("figure", {}, el("figcaption", {}, caption), drawn.host, ...below);
}

/** Observable Plot with the page's fonts and sizes. */
function plot(width, options) {
  return Plot.plot({
    width,
    height: Math.round(Math.max(260, Math.min(440, 0.62 * width))),
    marginLeft: 58,
    marginBottom: 42,
    style: { fontSize: "12px", fontFamily: "inherit" },
    ...options,
  });
}

/** A sample of a series in a legend. */
function sample({ colour, dash, symbol }) {
  const svg = d3.create("svg").attr("width", 26).attr("height", 12).attr("aria-hidden", "true");
  svg.append("line").attr("x1", 1).attr("x2", 25).attr("y1", 6).attr("y2", 6)
    .attr("stroke", colour).attr("stroke-width", 2).attr("stroke-dasharray", dash);
  const symbols = { circle: d3.symbolCircle, square: d3.symbolSquare, triangle: d3.symbolTriangle };
  svg.append("path").attr("d", d3.symbol(symbols[symbol], 40)()).attr("transform", "translate(13,6)").attr("fill", colour);
  return svg.node();
}

function swatch(fill) {
  const svg = d3.create("svg").attr("width", 12).attr("height", 12).attr("aria-hidden", "true");
  svg.append("rect").attr("width", 12).attr("height", 12).attr("rx", 2).attr("fill", fill);
  return svg.node();
}

/** A legend whose entries show and hide series; `shown` is a set of names. Those that are not shown at first are folded. */
function legend(styles, shown, changed) {
  const entry = ([name, style]) => {
    const button = el("button", {
      type: "button", "aria-pressed": String(shown.has(name)),
      onclick: () => {
        if (!shown.delete(name)) shown.add(name);
        button.setAttribute("aria-pressed", String(shown.has(name)));
        changed();
      },
    }, sample(style), name);
    return el("li", {}, button);
  };
  const list = (label, names) => el("ul", { class: "legend", "aria-label": label }, names.map(entry));
  const first = [...styles].filter(([name]) => shown.has(name));
  const others = [...styles].filter(([name]) => !shown.has(name));
  return el("div", {}, list("Series: press to show or hide", first), others.length === 0 ? null
    : el("details", {}, el("summary", {}, `${others.length} more`), list("Further series: press to show or hide", others)));
}

/** A legend of batching policies alone. */
function batchingLegend(names) {
  const entry = (name) => el("li", {}, el("span", { class: "entry" }, sample({ ...batchingLook(name), dash: null }), name));
  return el("ul", { class: "legend", "aria-label": "Colours of batching policies" }, names.map(entry));
}

function batchingLook(batching) {
  return { colour: colour(Math.max(0, BATCHINGS.indexOf(batching))), symbol: SYMBOLS[batching] ?? "circle" };
}

function depthLegend(depths) {
  const entry = (depth) => el("li", {}, el("span", { class: "entry" }, swatch(depthColour(depth)), `depth ${depth}`));
  return el("ul", { class: "legend", "aria-label": "Colours of depths" }, d3.range(depths).map(entry));
}

/** A choice among values; null if there is none to make. */
function choice(label, values, selected, changed, name = (value) => value) {
  if (values.length < 2) return null;
  const options = values.map((value, index) =>
    el("option", { value: index, selected: value === selected }, String(name(value))));
  return el("label", {}, label, el("select", { onchange: (event) => changed(values[event.target.value]) }, options));
}

function controls(...children) {
  const made = children.flat().filter((child) => child !== null);
  return made.length === 0 ? null : el("div", { class: "controls" }, made);
}

/** A heading within a panel, below that of its folder if there are several. */
function subheading(text) {
  return el(data.folders.length > 1 ? "h4" : "h3", { class: "sub" }, text);
}

/** One panel for each folder, side by side. */
function panels(folders, build) {
  const panel = (folder) => {
    const heading = data.folders.length > 1 ? el("h3", {}, folder.name) : null;
    return el("div", { class: "panel" }, heading, build(folder));
  };
  return el("div", { class: "panels" }, folders.map(panel));
}
