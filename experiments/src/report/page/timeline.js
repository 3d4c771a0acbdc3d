// The timeline of passes: zoomed by buttons, keys, Ctrl and wheel, or two fingers; moved by dragging.

const TIMELINE_HEIGHT = 260;
const MARGIN = { left: 48, right: 10, top: 22, bottom: 44 };
/** Passes narrower than this many pixels are drawn as means. */
const LEAST_PIXELS = 3;

/** Mean rows by depth in bins of time; time without a pass counts as no rows. */
function binned(passes, from, to, bins) {
  const width = (to - from) / bins;
  const means = passes.rows.map(() => new Float64Array(bins));
  for (let index = 0; index < passes.start_us.length; index += 1) {
    const [start, end] = [passes.start_us[index], passes.start_us[index] + passes.time_us[index]];
    if (end <= from || start >= to) continue;
    const last = Math.min(bins - 1, Math.floor((end - from) / width));
    for (let bin = Math.max(0, Math.floor((start - from) / width)); bin <= last; bin += 1) {
      const overlap = Math.min(end, from + (bin + 1) * width) - Math.max(start, from + bin * width);
      passes.rows.forEach((rows, depth) => { means[depth][bin] += (rows[index] * Math.max(0, overlap)) / width; });
    }
  }
  return means;
}

function passText(passes, index) {
  const rows = passes.rows.map((rows, depth) => [depth, rows[index]]).filter(([, count]) => count > 0)
    .map(([depth, count]) => `${count} at depth ${depth}`).join(", ");
  const prompts = passes.prompt_rows[index] > 0 ? `; ${passes.prompt_rows[index]} of them of prompts` : "";
  const start = number(passes.start_us[index] / 1000);
  return `Pass ${index} starts at ${start} ms and takes ${number(passes.time_us[index])} µs. Rows: ${rows}${prompts}.`;
}

/** The timeline of one run, with its controls. */
function timelineOf(passes, name) {
  const last = passes.start_us.length - 1;
  const end = passes.start_us[last] + passes.time_us[last];
  const readout = el("p", { class: "readout", "aria-live": "polite" });
  const most = d3.max(passes.start_us, (_, index) => d3.sum(passes.rows, (rows) => rows[index]));
  let domain = [0, end];
  let show = () => {};

  /** Shows another part: moved by a share of what is shown, then narrowed around its middle. */
  function look(share, factor) {
    const span = Math.min(end, (domain[1] - domain[0]) / factor);
    const middle = (domain[0] + domain[1]) / 2 + share * (domain[1] - domain[0]);
    const from = Math.min(Math.max(0, middle - span / 2), end - span);
    show([from, from + span]);
  }
  const [earlier, later] = [() => look(-0.5, 1), () => look(0.5, 1)];
  const [closer, farther] = [() => look(0, 2), () => look(0, 0.5)];
  const all = () => show([0, end]);

  const drawn = chart(name, (width) => {
    const svg = d3.create("svg").attr("width", width).attr("height", TIMELINE_HEIGHT)
      .attr("viewBox", `0 0 ${width} ${TIMELINE_HEIGHT}`)
      .attr("class", "timeline").attr("tabindex", 0).attr("font-size", 12).style("font-family", "inherit");
    const whole = d3.scaleLinear([0, end], [MARGIN.left, width - MARGIN.right]);
    const y = d3.scaleLinear([0, most], [TIMELINE_HEIGHT - MARGIN.bottom, MARGIN.top]).nice();
    const clip = `clip-${Math.random().toString(36).slice(2)}`;
    svg.append("clipPath").attr("id", clip).append("rect").attr("x", MARGIN.left).attr("y", 0)
      .attr("width", Math.max(0, width - MARGIN.left - MARGIN.right)).attr("height", TIMELINE_HEIGHT);
    const body = svg.append("g").attr("clip-path", `url(#${clip})`);
    const xAxis = svg.append("g").attr("transform", `translate(0,${TIMELINE_HEIGHT - MARGIN.bottom})`);
    svg.append("g").attr("transform", `translate(${MARGIN.left},0)`).call(d3.axisLeft(y).ticks(5))
      .attr("font-size", 12).style("font-family", "inherit");
    svg.append("text").attr("x", 4).attr("y", 10).attr("fill", "currentColor").text("↑ rows");
    svg.append("text").attr("x", width - MARGIN.right).attr("y", TIMELINE_HEIGHT - 3).attr("fill", "currentColor")
      .attr("text-anchor", "end").text("time since the first pass (ms) →");

    function drawPasses(x) {
      const [from, to] = x.domain();
      const first = Math.max(0, d3.bisectRight(passes.start_us, from) - 1);
      const beyond = d3.bisectLeft(passes.start_us, to);
      const rects = [];
      if ((x.range()[1] - x.range()[0]) / Math.max(1, beyond - first) < LEAST_PIXELS) {
        const bins = Math.max(1, Math.floor((x.range()[1] - x.range()[0]) / 2));
        const means = binned(passes, from, to, bins);
        const step = (x.range()[1] - x.range()[0]) / bins;
        for (let bin = 0; bin < bins; bin += 1) {
          let below = 0;
          means.forEach((mean, depth) => {
            rects.push([x.range()[0] + bin * step, step + 0.2, below, below + mean[bin], depth]);
            below += mean[bin];
          });
        }
      } else {
        for (let index = first; index < beyond; index += 1) {
          const left = x(passes.start_us[index]);
          const wide = Math.max(0.5, x(passes.start_us[index] + passes.time_us[index]) - left - 0.8);
          let below = 0;
          passes.rows.forEach((rows, depth) => {
            rects.push([left, wide, below, below + rows[index], depth]);
            below += rows[index];
          });
        }
      }
      body.selectAll("rect").data(rects.filter(([, , below, above]) => above > below)).join("rect")
        .attr("x", ([left]) => left).attr("width", ([, wide]) => wide)
        .attr("y", ([, , , above]) => y(above)).attr("height", ([, , below, above]) => y(below) - y(above))
        .attr("fill", ([, , , , depth]) => depthColour(depth));
      const ms = x.copy().domain(x.domain().map((at) => at / 1000));
      xAxis.call(d3.axisBottom(ms).ticks(Math.max(2, width / 110))).attr("font-size", 12).style("font-family", "inherit");
    }

    const zoom = d3.zoom()
      .scaleExtent([1, Math.max(1, passes.start_us.length / 8)])
      .extent([[MARGIN.left, 0], [width - MARGIN.right, TIMELINE_HEIGHT]])
      .translateExtent([[MARGIN.left, 0], [width - MARGIN.right, TIMELINE_HEIGHT]])
      // A wheel or one finger alone scrolls the page.
      .filter((event) => !event.button && (event.type !== "wheel" || event.ctrlKey || event.metaKey)
        && (event.type !== "touchstart" || event.touches.length > 1))
      .on("zoom", ({ transform }) => {
        const x = transform.rescaleX(whole);
        domain = x.domain();
        drawPasses(x);
      });
    svg.call(zoom);
    show = ([from, to]) => {
      const scale = end / (to - from);
      svg.call(zoom.transform, d3.zoomIdentity.translate(MARGIN.left - scale * whole(from), 0).scale(scale));
    };
    show(domain);
    svg.on("keydown", (event) => {
      const action = { ArrowLeft: earlier, ArrowRight: later, "+": closer, "=": closer, "-": farther, Home: all }[event.key];
      if (action === undefined) return;
      action();
      event.preventDefault();
    });
    svg.on("pointermove", (event) => {
      const at = d3.zoomTransform(svg.node()).rescaleX(whole).invert(d3.pointer(event)[0]);
      const index = d3.bisectRight(passes.start_us, at) - 1;
      const runs = index >= 0 && at < passes.start_us[index] + passes.time_us[index];
      readout.textContent = runs ? passText(passes, index) : "";
    });
    return svg.node();
  });
  const button = (label, action) => el("button", { type: "button", onclick: action }, label);
  const buttons = el("div", { class: "controls" },
    button("zoom in", closer), button("zoom out", farther), button("earlier", earlier), button("later", later), button("all", all));
  const shown = passes.start_us.length < passes.passes ? `the first ${plural(passes.start_us.length, "pass", "passes")} of ${d3.format(",")(passes.passes)}` : plural(passes.passes, "pass", "passes");
  return el("div", {}, buttons, figure(`${name}: ${shown}`, drawn), readout);
}
