//! What the page shows of one folder: everything that its files hold, made short enough.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use itertools::Itertools;
use serde::Serialize;
use serde_yaml::Value;
use simulator::Summary;
use traces::{ExitTrace, LatencyProfile, PassLog};
use training::trainer::{LOSS_FILE, OPTIONS_FILE};

use super::Detail;
use super::depths::{Exits, Passes, RowsByDepth, exits, rows_by_depth, timeline};
use super::runs::{Latencies, Names, add_intervals, add_policies, headlines, latencies};
use super::table::{Column, Table};
use crate::figures::read;
use crate::results::{CONFIG, MARKER, Marker, PASS_LOG};
use crate::sweep::figures::{CAPACITY_SUMMARY, SWEEP_SUMMARY};

/// Tables of runs, of which a folder has at most one.
const SUMMARIES: [&str; 3] = ["summary.csv", SWEEP_SUMMARY, CAPACITY_SUMMARY];
/// Tables of what was predicted beside what was measured.
const COMPARISONS: [&str; 4] = ["validation.csv", "speedups.csv", "absolute.csv", "at_rates.csv"];
/// Files with a line for each request, slice or seed: only what follows from them is in the page.
const NOT_AS_TABLES: [&str; 4] = ["requests.csv", "depth_rows.csv", "sweep.csv", "capacity.csv"];
/// Texts that are shown as they are.
const DOCUMENTS: [&str; 3] = [CONFIG, OPTIONS_FILE, "inputs.yaml"];
/// Points of a loss curve.
const LOSS_POINTS: usize = 400;
/// Bytes of a document that are shown.
const MOST_DOCUMENT: usize = 100_000;
/// Settings that are compared between folders.
const MOST_SETTINGS: usize = 1000;

/// A folder, or a load in it.
#[derive(Debug, Default, Serialize)]
pub(super) struct Folder {
    name: String,
    /// The command that wrote it.
    kind: String,
    complete: bool,
    title: Option<String>,
    /// What was measured, on what, by which program.
    facts: Vec<(String, String)>,
    /// How to make it again.
    reproduce: Vec<String>,
    /// Sentences on the fastest policies.
    headlines: Vec<String>,
    /// The configuration, key by key.
    settings: Vec<(String, String)>,
    /// Names and texts of files.
    documents: Vec<(String, String)>,
    runs: Option<Table>,
    latencies: Vec<Latencies>,
    rows_by_depth: Vec<RowsByDepth>,
    exits: Option<Exits>,
    timeline: Vec<Passes>,
    comparisons: Vec<Table>,
    loss: Option<Table>,
    profile: Option<Table>,
    tables: Vec<Table>,
    /// What was sampled or left out.
    notes: Vec<String>,
}

impl Folder {
    /// What the page calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Reads a folder, and the folders of the loads in it.
    ///
    /// # Errors
    /// If no command wrote it, or a file does not read.
    pub fn read(path: &Path, name: &str, detail: &Detail) -> Result<Vec<Self>> {
        let marker = Marker::read(path)?;
        let is_one_of_ours = marker.is_some() || path.join("profile.yaml").exists() || path.join("exits.yaml").exists();
        if !is_one_of_ours {
            let found = if path.is_dir() { "a folder without it" } else { "no such folder" };
            bail!("{}: found {found}, expected a folder with {MARKER}, which commands write", path.display());
        }
        let mut folder = Self { name: name.to_owned(), complete: true, ..Self::default() };
        if let Some(marker) = &marker {
            folder.add_marker(marker);
        }
        let loads = loads(path)?;
        let at: Vec<PathBuf> = loads.iter().map(|load| path.join(load)).chain([path.to_owned()]).collect();
        let summaries: Vec<Table> =
            at.iter().filter_map(|path| summary(path)).map(|file| Table::read(&file)).collect::<Result<_>>()?;
        let names = Names::of(&summaries);
        folder.add_configuration(path)?;
        folder.add_records(path, names, detail)?;
        let mut folders = vec![folder];
        for load in loads {
            let mut of_load = Self {
                name: format!("{name}, {}", load.replace('-', " ")),
                kind: folders[0].kind.clone(),
                complete: folders[0].complete,
                title: folders[0].title.clone(),
                ..Self::default()
            };
            of_load.add_runs(&path.join(load), names, detail, &[])?;
            folders.push(of_load);
        }
        let policies: Vec<String> = folders.iter().flat_map(|folder| folder.texts("exit_policy")).unique().collect();
        folders[0].add_exits(path, &policies)?;
        Ok(folders)
    }

    fn add_marker(&mut self, marker: &Marker) {
        self.kind.clone_from(&marker.kind);
        self.complete = marker.complete;
        self.add_fact("written by", format!("depthwise {} {}", marker.kind, marker.version));
        self.add_fact("commit", marker.commit.clone().unwrap_or_else(|| "not recorded".to_owned()));
        for (file, seal) in &marker.sealed {
            self.add_fact(file, format!("sealed before the measurement: {seal}"));
        }
    }

    fn add_fact(&mut self, name: &str, value: impl Into<String>) {
        self.facts.push((name.to_owned(), value.into()));
    }

    /// Adds what was asked for: titles, settings, documents.
    fn add_configuration(&mut self, path: &Path) -> Result<()> {
        for name in DOCUMENTS {
            let file = path.join(name);
            if !file.exists() {
                continue;
            }
            let shown = || file.display().to_string();
            let mut text = std::fs::read_to_string(&file).with_context(shown)?;
            let value: Value = serde_yaml::from_str(&text).with_context(shown)?;
            if name != "inputs.yaml" {
                self.title = value.get("title").and_then(Value::as_str).map(str::to_owned).or(self.title.take());
                flatten(&value, "", &mut self.settings);
                self.settings.truncate(MOST_SETTINGS);
                self.reproduce = reproduce(&self.kind, name, &value);
            }
            let end = (0..=MOST_DOCUMENT).rev().find(|&end| text.is_char_boundary(end)).unwrap_or_default();
            if text.len() > end {
                text.truncate(end);
                self.notes.push(format!("{name}: the first {end} bytes are in the page"));
            }
            self.documents.push((name.to_owned(), text));
        }
        Ok(())
    }

    /// Adds what was recorded and measured: profile, passes, runs, training.
    fn add_records(&mut self, path: &Path, names: Names, detail: &Detail) -> Result<()> {
        self.add_profile(path, detail)?;
        let loss = path.join(LOSS_FILE);
        if loss.exists() {
            let mut loss = Table::read(&loss)?;
            self.notes.extend(loss.averaged(LOSS_POINTS));
            self.loss = Some(loss);
        }
        let passes = path.join(PASS_LOG);
        if passes.exists() {
            let log = PassLog::read(&passes)?;
            let (timeline, note) = timeline(&log, names, detail.passes)?;
            self.timeline = timeline;
            self.notes.extend(note);
        }
        let used = [SUMMARIES.as_slice(), &COMPARISONS, &NOT_AS_TABLES, &[LOSS_FILE, "latency.csv"]].concat();
        self.add_runs(path, names, detail, &used)
    }

    fn add_profile(&mut self, path: &Path, detail: &Detail) -> Result<()> {
        let Some(folder) =
            [path.join("profile"), path.to_owned()].into_iter().find(|at| at.join("profile.yaml").exists())
        else {
            return Ok(());
        };
        let LatencyProfile { meta, .. } = LatencyProfile::read(&folder)?;
        let named = [("model", meta.model), ("device", meta.device), ("software", meta.software)];
        named.into_iter().for_each(|(name, value)| self.add_fact(name, value));
        self.add_fact("loops", meta.num_loops.to_string());
        self.add_fact("times come from", meta.source);
        if self.kind.is_empty() {
            self.kind = "profile".to_owned();
        }
        let mut table = Table::read(&folder.join("latency.csv"))?;
        self.notes.extend(table.sample(detail.cells / 4));
        self.profile = Some(table);
        Ok(())
    }

    /// Adds runs, and every table of the folder but those in `used`.
    fn add_runs(&mut self, path: &Path, names: Names, detail: &Detail, used: &[&str]) -> Result<()> {
        if let Some(file) = summary(path) {
            self.add_summary(&file, path, names, detail)?;
        }
        let requests = path.join("requests.csv");
        if requests.exists() {
            self.latencies = latencies(&requests, names, detail.quantiles)?;
        }
        let depth_rows = path.join("depth_rows.csv");
        if depth_rows.exists() {
            let (rows, note) = rows_by_depth(&depth_rows, names, detail.slices)?;
            self.rows_by_depth = rows;
            self.notes.extend(note);
        }
        for name in COMPARISONS.into_iter().filter(|name| path.join(name).exists()) {
            let mut table = Table::read(&path.join(name))?;
            add_names(&mut table, names)?;
            self.comparisons.push(table);
        }
        let used: BTreeSet<&str> =
            used.iter().copied().chain(SUMMARIES).chain(COMPARISONS).chain(NOT_AS_TABLES).collect();
        for name in csv_files(path)?.into_iter().filter(|name| !used.contains(name.as_str())) {
            let mut table = Table::read(&path.join(&name))?;
            self.notes.extend(table.sample(detail.cells / 16));
            self.tables.push(table);
        }
        let left_out = NOT_AS_TABLES.into_iter().filter(|name| path.join(name).exists()).join(", ");
        if !left_out.is_empty() {
            self.notes.push(format!("{left_out}: not in the page line by line"));
        }
        Ok(())
    }

    fn add_summary(&mut self, file: &Path, path: &Path, names: Names, detail: &Detail) -> Result<()> {
        let mut table = Table::read(file)?;
        add_policies(&mut table, names).with_context(|| file.display().to_string())?;
        if table.name == "summary" {
            let summaries: Vec<Summary> = read(file)?;
            add_intervals(&mut table, &summaries, path)?;
            self.headlines = headlines(&summaries, path)?;
        }
        self.notes.extend(table.sample(detail.cells));
        self.runs = Some(table);
        let devices = self.texts("device").into_iter().unique().join("; ");
        if !devices.is_empty() {
            self.add_fact("devices", devices);
        }
        Ok(())
    }

    fn add_exits(&mut self, path: &Path, policies: &[String]) -> Result<()> {
        let folder = [path.join("exits"), path.to_owned()].into_iter().find(|at| at.join("exits.yaml").exists());
        if let Some(folder) = folder {
            let trace = ExitTrace::read(&folder)?;
            if self.kind.is_empty() {
                self.kind = "record".to_owned();
            }
            self.exits = Some(exits(&trace, policies));
        }
        Ok(())
    }

    fn texts(&self, column: &str) -> Vec<String> {
        self.runs.as_ref().and_then(|runs| runs.texts(column)).unwrap_or_default()
    }
}

/// Adds the names of policies to a table that has their columns.
fn add_names(table: &mut Table, names: Names) -> Result<()> {
    let texts = |name: &str| table.texts(name).unwrap_or_default();
    let (batchings, exits, fills) = (texts("batching"), texts("exit_policy"), texts("kv_fill"));
    let lines = batchings.iter().zip(&exits).zip(&fills);
    let policies = lines
        .map(|((batching, exit), fill)| -> Result<String> { Ok(names.policy(batching.parse()?, exit, fill.parse()?)) });
    let policies: Vec<String> = policies.collect::<Result<_>>()?;
    table.columns.push(Column::new("policy", policies));
    Ok(())
}

/// The table of runs of a folder.
fn summary(path: &Path) -> Option<PathBuf> {
    SUMMARIES.into_iter().map(|name| path.join(name)).find(|file| file.exists())
}

/// The folders of loads in a folder of results, by rising load.
fn loads(path: &Path) -> Result<Vec<String>> {
    let names = names_in(path)?.into_iter().filter(|name| path.join(name).join("summary.csv").exists());
    let load = |name: &String| name.strip_prefix("load-").and_then(|load| load.parse().ok());
    let with_loads = names.filter_map(|name| load(&name).map(|load: f64| (load, name)));
    Ok(with_loads.sorted_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, name)| name).collect())
}

fn csv_files(path: &Path) -> Result<Vec<String>> {
    let is_csv = |name: &String| name.ends_with(".csv") && path.join(name).is_file();
    Ok(names_in(path)?.into_iter().filter(is_csv).collect())
}

/// What is in a folder, in the order of names.
fn names_in(path: &Path) -> Result<Vec<String>> {
    let cannot = || format!("cannot read {}", path.display());
    let entries =
        std::fs::read_dir(path).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).with_context(cannot)?;
    Ok(entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).sorted().collect())
}

/// The scalars in a YAML value, by their keys from the top.
fn flatten(value: &Value, key: &str, into: &mut Vec<(String, String)>) {
    let below = |name: String| if key.is_empty() { name } else { format!("{key}.{name}") };
    match value {
        Value::Mapping(entries) => {
            entries.iter().for_each(|(name, value)| flatten(value, &below(scalar(name)), into));
        }
        Value::Sequence(items) if items.iter().any(|item| item.is_mapping() || item.is_sequence()) => {
            items.iter().enumerate().for_each(|(place, item)| flatten(item, &below(place.to_string()), into));
        }
        Value::Sequence(items) => into.push((key.to_owned(), items.iter().map(scalar).join(", "))),
        Value::Tagged(tagged) => flatten(&tagged.value, key, into),
        _ => into.push((key.to_owned(), scalar(value))),
    }
}

fn scalar(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        _ => serde_yaml::to_string(value).unwrap_or_default().trim_end().to_owned(),
    }
}

/// What to do for the same results, step by step.
fn reproduce(kind: &str, document: &str, value: &Value) -> Vec<String> {
    let arguments = value.get("arguments").and_then(Value::as_str);
    match (kind, arguments) {
        (_, Some(arguments)) => {
            vec![format!("Run `depthwise {kind}` with the options that it understood as:"), arguments.trim().to_owned()]
        }
        ("train", _) => {
            vec![format!("Save {document} below."), format!("depthwise train --config {document} --out results/again")]
        }
        ("run" | "validate" | "sweep" | "capacity", _) => {
            let command = if kind == "validate" { "run" } else { kind };
            vec![
                format!("Save {document} below in the folder that its paths are relative to."),
                format!("depthwise {command} {document} --out results/again"),
            ]
        }
        _ => vec![format!("Run `depthwise {kind}` with the options in {document} below.")],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_named_by_their_keys() {
        let value: Value = serde_yaml::from_str("a: {b: 1, c: [x, y]}\nd: [{e: true}, {e: ~}]\n").unwrap();
        let mut settings = Vec::new();
        flatten(&value, "", &mut settings);
        let settings: Vec<_> = settings.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
        assert_eq!(settings, [("a.b", "1"), ("a.c", "x, y"), ("d.0.e", "true"), ("d.1.e", "")]);
    }
}
