// Puts the page together.

const shownSections = SECTIONS.filter((section) => folders.filter(section.has).length >= (section.least ?? 1));

addDepthColours(d3.max(folders, (folder) => Math.max(
  folder.exits?.agreement.length ?? 1,
  d3.max(folder.rows_by_depth, (run) => run.rows.length) ?? 1,
  d3.max(folder.timeline, (run) => run.rows.length) ?? 1,
  d3.max(evaluation(folder)?.values("passes") ?? [1]),
)));

const heading = folders.length === 1 ? (folders[0].title ?? folders[0].name) : folders.map((folder) => folder.name).join(", ");
document.getElementById("header").append(
  el("h1", {}, heading),
  el("p", { class: "lead" }, [
    folders.length > 1 ? plural(folders.length, "folder") : folders[0].name === heading ? `depthwise ${folders[0].kind}` : folders[0].name,
    [...new Set(folders.flatMap((folder) => folder.facts.filter(([name]) => name === "device").map(([, value]) => value)))].join("; "),
  ].filter(Boolean).join(" · ")));

document.getElementById("contents").append(el("ol", {}, shownSections.map((section) =>
  el("li", {}, el("a", { href: `#${section.id}` }, section.title)))));

document.getElementById("main").replaceChildren(...shownSections.map((section) => {
  const shown = folders.filter(section.has);
  const lacking = folders.filter((folder) => !section.has(folder)).map((folder) => folder.name);
  return el("section", { id: section.id, "aria-labelledby": `${section.id}-title` },
    el("h2", { id: `${section.id}-title` }, section.title),
    section.lead ? el("p", { class: "lead" }, section.lead) : null,
    section.build(shown),
    lacking.length > 0 && section.needs ? el("p", { class: "note" }, `Not in ${lacking.join(", ")}: ${section.needs}.`) : null);
}));

document.getElementById("footer").prepend(el("p", {},
  `Written by depthwise ${data.version}. Charts are drawn with D3 and Observable Plot, which are in this page. The page loads nothing.`));

// Nothing unfolds on paper. Tables stay folded, since they are long.
addEventListener("beforeprint", () => document.querySelectorAll("details.on-paper").forEach((details) => { details.open = true; }));
