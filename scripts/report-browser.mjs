#!/usr/bin/env node
// Opens reports in headless Chromium, as their readers do, and fails at what they would stumble over.
//
//     depthwise report results/quickstart --out report.html
//     node scripts/report-browser.mjs FOLDER report.html...
//
// Needs Node, npm and Chromium (Debian: chromium; CHROMIUM names another). puppeteer-core and axe-core come from npm into
// target/report-browser. Each report is opened light and dark, wide and 390 pixels narrow. The script checks that
//   - nothing is logged as an error, and nothing is loaded beside the file;
//   - axe-core finds no serious violation, and the page is not wider than the screen;
//   - every section has its chart or table; tables sort and filter, and the timeline zooms, without a mouse;
//   - the page prints.
// Screenshots and the printed page go to FOLDER: look at them.

import { execFileSync } from "node:child_process";
import { existsSync, mkdirSync, readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { fileURLToPath, pathToFileURL } from "node:url";

const PACKAGES = ["puppeteer-core@24.43.1", "axe-core@4.14.1"];
const root = path.resolve(path.dirname(fileURLToPath(import.meta.url)), "..");
const [folder, ...reports] = process.argv.slice(2);
if (reports.length === 0) {
  console.error("usage: report-browser.mjs FOLDER REPORT.html...");
  process.exit(2);
}

const packages = path.join(root, "target/report-browser");
if (!existsSync(path.join(packages, "node_modules"))) {
  mkdirSync(packages, { recursive: true });
  execFileSync("npm", ["install", "--silent", "--no-save", "--ignore-scripts", "--prefix", packages, ...PACKAGES], { stdio: "inherit" });
}
const require = createRequire(path.join(packages, "index.js"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

mkdirSync(folder, { recursive: true });
const problems = [];
const browser = await puppeteer.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox", "--force-color-profile=srgb"],
});

/** Opens a report under a theme at a width, and checks what can be checked of a page at rest. */
async function open(report, theme, width) {
  const page = await browser.newPage();
  const name = `${path.basename(report, ".html")}-${theme}-${width}`;
  const problem = (text) => problems.push(`${name}: ${text}`);
  page.on("console", (message) => message.type() === "error" && problem(`console: ${message.text()}`));
  page.on("pageerror", (error) => problem(`script: ${error.message}`));
  const url = pathToFileURL(path.resolve(report)).href;
  page.on("request", (request) => {
    if (request.url().split("#")[0] !== url && !/^(data|blob):/.test(request.url())) problem(`loads ${request.url()}`);
  });
  await page.setBypassCSP(true); // for axe; the page itself is checked by the requests
  await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: theme }]);
  await page.setViewport({ width, height: 900, deviceScaleFactor: 1 });
  const begun = Date.now();
  await page.goto(url, { waitUntil: "load" });
  await page.waitForFunction(() => document.querySelectorAll(".chart").length === 0 || document.querySelector(".chart svg") !== null);
  const opened = Date.now() - begun;
  await new Promise((done) => setTimeout(done, 500));

  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  if (wide > 0) problem(`is ${wide} pixels wider than the screen`);
  const empty = await page.evaluate(() => [...document.querySelectorAll("main section")]
    .filter((section) => section.querySelector("svg, table, dl, pre, details, p") === null).map((section) => section.id));
  if (empty.length > 0) problem(`empty sections: ${empty}`);
  const unnamed = await page.evaluate(() => [...document.querySelectorAll(".chart svg")].filter((svg) => !svg.getAttribute("aria-label")).length);
  if (unnamed > 0) problem(`${unnamed} charts without a name`);
  await page.evaluate(axe);
  const found = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  for (const violation of found.violations) {
    const where = violation.nodes.slice(0, 3).map((node) => node.target.join(" ")).join("; ");
    const text = `axe ${violation.impact}: ${violation.id}: ${violation.help} (${violation.nodes.length}): ${where}`;
    if (["serious", "critical"].includes(violation.impact)) problem(text);
    else console.log(`${name}: ${text}`);
  }
  await page.screenshot({ path: path.join(folder, `${name}.png`), fullPage: true });
  console.log(`${name}: ${found.passes.length} rules of axe pass, opened in ${opened} ms`);
  return { page, problem };
}

/** Works with the page by keys alone. */
async function useKeys(page, problem) {
  const sort = await page.$("#runs thead button");
  if (sort !== null) {
    const first = () => page.$eval("#runs tbody tr", (row) => row.textContent);
    const column = "#runs th[data-column=throughput_tok_s]";
    const button = await page.$(`${column} button`);
    if (button !== null) {
      await button.focus();
      await page.keyboard.press("Enter");
      const values = await page.$$eval("#runs tbody tr", (rows) => rows.map((row) => row.textContent));
      const order = await page.$eval(column, (header) => header.getAttribute("aria-sort"));
      if (order !== "descending") problem(`sorted by throughput: ${order}`);
      const top = await first();
      await page.keyboard.press("Enter");
      if (values.length > 1 && (await first()) === top) problem("sorting the other way does not change the first line");
    }
    await page.focus("#runs input[type=search]");
    await page.keyboard.type("no line has this");
    const left = await page.$$eval("#runs tbody tr", (rows) => rows.length);
    if (left !== 0) problem(`a filter that nothing passes leaves ${left} lines`);
  }
  if ((await page.$("#timeline svg.timeline")) !== null) {
    const ticks = () => page.$eval("#timeline svg.timeline", (svg) => [...svg.querySelectorAll(".tick text")].map((tick) => tick.textContent).join(" "));
    const before = await ticks();
    await page.$eval("#timeline svg.timeline", (svg) => svg.focus());
    for (const key of ["+", "+", "+"]) await page.keyboard.press(key);
    const zoomed = await ticks();
    await page.keyboard.press("ArrowRight");
    const moved = await ticks();
    await page.keyboard.press("Home");
    if (zoomed === before || moved === zoomed || (await ticks()) !== before) problem(`the timeline does not follow the keys: ${[before, zoomed, moved].join(" | ")}`);
  }
}

for (const report of reports) {
  for (const [theme, width] of [["light", 1440], ["dark", 1440], ["light", 390], ["dark", 390]]) {
    const { page, problem } = await open(report, theme, width);
    if (theme === "light" && width === 1440) {
      await page.pdf({ path: path.join(folder, `${path.basename(report, ".html")}.pdf`), format: "A4" });
      await useKeys(page, problem);
    }
    await page.close();
  }
}
await browser.close();
problems.forEach((problem) => console.error(problem));
console.log(`${reports.length} reports, ${problems.length} problems; pictures are in ${folder}`);
process.exit(problems.length === 0 ? 0 : 1);
