//! The documents against the program and the repository: the reference of the command line is what `--help` prints, every
//! column and key that is written is documented, links resolve, and commands that are shown parse.
//!
//! `UPDATE_DOCUMENTS=1 cargo test --release -p depthwise --test documents` rewrites the reference of the command line.

#[path = "../../client/tests/common/mod.rs"]
mod server;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use clap::Parser as _;
use clap::error::ErrorKind;
use depthwise::Cli;
use parquet::file::reader::{FileReader, SerializedFileReader};
use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};
use serde_yaml::Value;
use server::Server;
use shlex::Shlex;
use traces::Component;
use training::trainer::options::TrainingOptions;

/// The generated page; what stands before [`MARKER`] is written by hand.
const REFERENCE: &str = "docs/reference/commands.md";
/// Where the generated part begins.
const MARKER: &str = "<!-- Generated from here on by cli/tests/documents.rs -->\n";
/// Columns that help is wrapped to: fewer than `max_term_width`, so that they do not depend on a terminal.
const COLUMNS: &str = "100";
/// Folders whose paths must exist where commands name them: the others are made by commands, or are placeholders.
const SHIPPED: [&str; 2] = ["configs/", "models/kjv"];

#[test]
fn the_reference_of_the_command_line_is_what_help_prints() {
    let path = root().join(REFERENCE);
    let page = fs::read_to_string(&path).unwrap();
    let (by_hand, found) = page.split_once(MARKER).unwrap_or_else(|| panic!("{REFERENCE} lacks the line {MARKER}"));
    let expected = help_of(&[]);
    if std::env::var_os("UPDATE_DOCUMENTS").is_some() {
        return fs::write(&path, format!("{by_hand}{MARKER}{expected}")).unwrap();
    }
    let differs = found.lines().zip(expected.lines()).find(|(found, expected)| found != expected);
    if let Some((found, expected)) = differs {
        panic!("{REFERENCE}: found `{found}`, expected `{expected}`: rewrite it with UPDATE_DOCUMENTS=1");
    }
    assert!(found == expected, "{REFERENCE} is cut off or too long: rewrite it with UPDATE_DOCUMENTS=1");
}

#[test]
fn relative_links_lead_to_tracked_files_and_to_headings() {
    let files = tracked();
    let pages: BTreeMap<PathBuf, Page> = markdown(&files).map(|file| (file.clone(), Page::read(file))).collect();
    let mut broken = Vec::new();
    for (file, page) in &pages {
        for (line, link) in &page.links {
            if let Err(expected) = resolve(file, link, &files, &pages) {
                broken.push(format!("{}:{line}: found `{link}`, expected {expected}", file.display()));
            }
        }
    }
    assert!(broken.is_empty(), "{}", broken.join("\n"));
    assert!(pages.values().map(|page| page.links.len()).sum::<usize>() > 100, "links are found");
}

#[test]
fn commands_that_are_shown_parse() {
    let files = tracked();
    let (mut refused, mut shown) = (Vec::new(), 0);
    for file in markdown(&files) {
        for (line, command) in Page::read(file).commands {
            shown += 1;
            if let Err(why) = check_command(&command, &files) {
                refused.push(format!("{}:{line}: `{}`: {why}", file.display(), command.join(" ")));
            }
        }
    }
    assert!(refused.is_empty(), "{}", refused.join("\n"));
    assert!(shown > 30, "commands are found: {shown}");
}

#[test]
fn every_column_and_key_that_is_written_is_documented() {
    let scratch = tempfile::tempdir().unwrap();
    let place = |name: &str| scratch.path().join(name);
    let paper = |name: &str| root().join("configs/paper").join(name).canonicalize().unwrap().display().to_string();
    let (profile, exits) = (paper("profiles/gemma-2-loops-rank-64"), paper("exits/relaxed"));
    let requests = "generate: {count: 9, arrivals: {poisson: {rate_per_s: 9}}, prompt_tokens: {fixed: 5}, \
                    output_tokens: {fixed: 4}}";
    let serving = "{batching: [depth], exit: [none, oracle], max_batch: 4, token_budget: 8}";
    let system = format!("{{name: a, profile: {profile}, exits: {exits}}}");
    let common = format!("schema_version: 1\ntitle: t\nrequests: {{{requests}}}\nserving: {serving}\n");
    fs::write(place("requests.yaml"), requests).unwrap();
    fs::write(place("run.yaml"), format!("{common}systems: [{system}]\n")).unwrap();
    let grid = "objectives: {ttft_ms: 60}\ngrid: {seed: [1, 2], device_memory: [80GB], max_batch: [2]}\n";
    fs::write(place("sweep.yaml"), format!("{common}systems: [{system}]\n{grid}")).unwrap();
    let file = |name: &str| place(name).display().to_string();
    let simulate = ["--requests", &file("requests.yaml"), "--profile", &profile, "--exits", &exits, "--ttft-ms", "9"];
    succeed(&[&["simulate", "--out", &file("simulated")], &simulate[..]].concat());
    let machines = "machines: [{role: prompt}, {role: decode}]\ntransfer: {gigabytes_per_s: 50, latency_us: 20}\n";
    fs::write(place("machines.yaml"), machines).unwrap();
    let with_roles = ["--batching", "depth", "--machines", &file("machines.yaml"), "--out", &file("with-roles")];
    succeed(&[&["simulate"], &simulate[..], &with_roles].concat());
    succeed(&["run", &file("run.yaml"), "--out", &file("run")]);
    succeed(&["sweep", &file("sweep.yaml"), "--out", &file("sweep")]);
    succeed(&["sweep", &file("sweep.yaml"), "--shard", "1/2", "--out", &file("shard")]);
    succeed(&["capacity", &file("sweep.yaml"), "--out", &file("capacity")]);
    measure(scratch.path(), requests);
    bench(scratch.path(), &file("requests.yaml"));

    let (mut files, mut folders) = (Vec::new(), vec![scratch.path().to_owned(), profile.into(), exits.into()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() { folders.push(path) } else { files.push(path) }
        }
    }
    let mut written = BTreeSet::new();
    for file in &files {
        let name = file.file_name().unwrap().to_string_lossy();
        let names = match file.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => traces::table::read_header(file).unwrap(),
            Some("parquet") => columns_of_parquet(file),
            Some("yaml" | "json") if name != "tokenizer.json" => keys_of(&fs::read_to_string(file).unwrap()),
            _ => Vec::new(),
        };
        written.extend(names.into_iter().map(|column| format!("{name}: {}", column.trim_end_matches("_ci95"))));
    }
    let training = serde_yaml::to_string(&TrainingOptions::default()).unwrap();
    written.extend(keys_of(&training).into_iter().map(|key| format!("training.yaml: {key}")));
    written.extend(Component::ALL.map(|component| format!("latency.csv: {component}")));
    assert!(written.len() > 200, "{}", written.len());

    let pages = ["files", "results", "metrics", "configuration", "checkpoints"];
    let documented: BTreeSet<String> = pages.into_iter().flat_map(words_in_code).collect();
    let is_documented = |name: &str| documented.contains(name) || !name.chars().all(is_of_name);
    let missing: Vec<&String> =
        written.iter().filter(|name| !is_documented(name.split(": ").nth(1).unwrap_or_default())).collect();
    assert!(missing.is_empty(), "in docs/reference, expected {missing:?}");
}

/// Runs the commands that need a model: an experiment, an evaluation, a calibration and a training run, all small.
fn measure(folder: &Path, requests: &str) {
    let file = |name: &str| folder.join(name).display().to_string();
    let model = root().join("models/kjv").canonicalize().unwrap().display().to_string();
    let prompts = format!("{model}/prompts.txt");
    let serving = "{batching: [depth], exit: [none, \"margin:0.05\"], max_batch: 2, token_budget: 8}";
    let engine = format!("{{model: {model}, prompts: {prompts}, repeats: 1, rounds: 1}}");
    let sweeps = "{thresholds: {margin: [0.1]}, max_batch: [1]}";
    let experiment = format!(
        "schema_version: 1\ntitle: t\nrequests: {{{requests}}}\nserving: {serving}\nengine: {engine}\nsweeps: {sweeps}\n"
    );
    fs::write(folder.join("measured.yaml"), experiment).unwrap();
    fs::write(folder.join("text.txt"), &fs::read_to_string(&prompts).unwrap()[..2000]).unwrap();
    succeed(&["run", &file("measured.yaml"), "--out", &file("measured")]);
    let validation = "{in_flight: 2, rates: [1.2]}\nobjectives: {ttft_ms: 60}";
    let validated = format!(
        "schema_version: 1\ntitle: t\nrequests: {{{requests}}}\nserving: {serving}\nengine: {engine}\nvalidation: {validation}\n"
    );
    fs::write(folder.join("validated.yaml"), validated).unwrap();
    succeed(&["run", &file("validated.yaml"), "--out", &file("validated")]);
    succeed(&["evaluate", &model, "--text", &file("text.txt"), "--out", &file("evaluation")]);
    let exits = file("measured/exits");
    let lax = ["--measure", "margin", "--tolerance", "0.9", "--confidence", "0.5"];
    succeed(
        &[&["calibrate", "--exits", &exits, "--held-out", &exits, "--out", &file("calibration")], &lax[..]].concat(),
    );
    let sizes = ["--hidden-size", "16", "--num-heads", "1", "--num-kv-heads", "1", "--head-dim", "16", "--seq", "16"];
    let steps = ["--steps", "2", "--warmup-steps", "1", "--block-layers", "1", "--vocab-size", "257", "--gate"];
    let (text, out, cache) = (file("text.txt"), file("training"), file("tokens"));
    let train = ["train", "--text", &prompts, "--held-out", &text, "--out", &out, "--cache", &cache];
    succeed(&[&train[..], &sizes, &steps].concat());
}

/// Runs a bench of a server that fails one request.
fn bench(folder: &Path, requests: &str) {
    let file = |name: &str| folder.join(name).display().to_string();
    let served = AtomicUsize::new(0);
    let server = Server::start(move |body| match served.fetch_add(1, Ordering::Relaxed) {
        0 => Vec::new(),
        _ => server::answer(body, Duration::ZERO),
    });
    let bench = ["bench", "--url", &server.url(), "--requests", requests, "--allow-failures"];
    succeed(&[&bench[..], &["--out", &file("bench")]].concat());
}

/// Letters of columns and keys.
fn is_of_name(letter: char) -> bool {
    letter.is_ascii_alphanumeric() || letter == '_'
}

/// The names that a page of the reference shows as code.
fn words_in_code(page: &str) -> Vec<String> {
    let text = fs::read_to_string(root().join(format!("docs/reference/{page}.md"))).unwrap();
    let code = Parser::new_ext(&text, Options::ENABLE_TABLES).filter_map(|event| match event {
        Event::Code(code) => Some(code.into_string()),
        _ => None,
    });
    code.flat_map(|code| code.split(|letter| !is_of_name(letter)).map(str::to_owned).collect::<Vec<_>>()).collect()
}

fn columns_of_parquet(file: &Path) -> Vec<String> {
    let reader = SerializedFileReader::new(fs::File::open(file).unwrap()).unwrap();
    let schema = reader.metadata().file_metadata().schema_descr();
    schema.root_schema().get_fields().iter().map(|field| field.name().to_owned()).collect()
}

/// The keys of a YAML file, those of its objects included.
fn keys_of(yaml: &str) -> Vec<String> {
    let (mut keys, mut values) = (Vec::new(), vec![serde_yaml::from_str::<Value>(yaml).unwrap()]);
    while let Some(value) = values.pop() {
        match value {
            Value::Mapping(mapping) => {
                for (key, value) in mapping {
                    keys.extend(key.as_str().map(str::to_owned));
                    values.push(value);
                }
            }
            Value::Sequence(items) => values.extend(items),
            _ => {}
        }
    }
    keys
}

fn succeed(arguments: &[&str]) {
    let output = depthwise(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// The files that git knows, relative to the repository.
fn tracked() -> BTreeSet<PathBuf> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output().expect("git is installed");
    assert!(listed.status.success(), "git ls-files: {}", String::from_utf8_lossy(&listed.stderr));
    let names = String::from_utf8(listed.stdout).unwrap();
    names.split_terminator('\0').map(PathBuf::from).filter(|file| root().join(file).exists()).collect()
}

fn markdown(files: &BTreeSet<PathBuf>) -> impl Iterator<Item = &PathBuf> {
    files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "md"))
}

fn depthwise(arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_depthwise"));
    command.args(arguments).env("COLUMNS", COLUMNS).env_remove("CLICOLOR_FORCE").stdin(Stdio::null());
    command.output().unwrap()
}

/// A section for a command, and one for each command below it.
fn help_of(command: &[&str]) -> String {
    let output = depthwise(&[command, &["--help"]].concat());
    assert!(output.status.success(), "{command:?} --help: {}", String::from_utf8_lossy(&output.stderr));
    let help = String::from_utf8(output.stdout).unwrap();
    let title = [&["depthwise"], command].concat().join(" ");
    let lines: Vec<&str> = help.lines().map(str::trim_end).collect();
    let section = format!("\n## `{title}`\n\n```text\n{}\n```\n", lines.join("\n").trim_end());
    let listed = lines.iter().skip_while(|line| **line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    // Lines that are wrapped are indented more deeply.
    let names = listed.filter_map(|line| line.strip_prefix("  ").filter(|line| !line.starts_with(' ')));
    let names = names.filter_map(|line| line.split(' ').next()).filter(|name| *name != "help");
    section + &names.map(|name| help_of(&[command, &[name]].concat())).collect::<String>()
}

/// What a Markdown file shows.
#[derive(Default)]
struct Page {
    /// The anchors of its headings, as GitHub makes them.
    anchors: BTreeSet<String>,
    /// Its links and images that lead to no other site, by line.
    links: Vec<(usize, String)>,
    /// The commands of its shell blocks that are ours, as words, by line.
    commands: Vec<(usize, Vec<String>)>,
}

impl Page {
    fn read(file: &Path) -> Self {
        let text = fs::read_to_string(root().join(file)).unwrap();
        let line_of = |place: &Range<usize>| text[..place.start].lines().count().max(1);
        let (mut page, mut heading, mut repeats) = (Self::default(), None::<String>, HashMap::<String, usize>::new());
        let mut in_shell = false;
        for (event, place) in Parser::new_ext(&text, Options::ENABLE_TABLES).into_offset_iter() {
            match event {
                Event::Start(Tag::Heading { .. }) => heading = Some(String::new()),
                Event::End(TagEnd::Heading(_)) => {
                    let anchor = anchor(&heading.take().unwrap_or_default());
                    let repeat = repeats.entry(anchor.clone()).and_modify(|repeat| *repeat += 1).or_insert(0);
                    page.anchors.insert(if *repeat == 0 { anchor } else { format!("{anchor}-{repeat}") });
                }
                Event::Start(Tag::Link { dest_url, .. } | Tag::Image { dest_url, .. })
                    if !dest_url.contains("://") && !dest_url.starts_with("mailto:") =>
                {
                    page.links.push((line_of(&place), dest_url.into_string()));
                }
                Event::Start(Tag::CodeBlock(CodeBlockKind::Fenced(language))) => {
                    in_shell = ["", "sh", "bash", "shell", "console"].contains(&&*language);
                }
                Event::End(TagEnd::CodeBlock) => in_shell = false,
                Event::Text(code) if in_shell => page.add_commands(line_of(&place), &code),
                Event::Text(part) | Event::Code(part) => {
                    if let Some(heading) = &mut heading {
                        *heading += &part;
                    }
                }
                _ => {}
            }
        }
        page
    }

    /// Adds the commands of a block that are ours; a line that ends in a backslash goes on.
    fn add_commands(&mut self, first_line: usize, code: &str) {
        let mut lines = code.lines().enumerate();
        while let Some((index, line)) = lines.next() {
            let mut whole = line.to_owned();
            while whole.ends_with('\\') {
                whole.pop();
                whole += lines.next().map_or("", |(_, line)| line);
            }
            let mut shell = Shlex::new(whole.trim_start_matches("$ "));
            let words: Vec<String> = shell.by_ref().collect();
            let commands = words.split(|word| ["|", "||", "&&", ";"].contains(&word.as_str()));
            let ours = commands.filter_map(our_arguments).map(|command| (first_line + index, command));
            self.commands.extend(ours);
        }
    }
}

/// The arguments of a command that is ours; none of another.
fn our_arguments(words: &[String]) -> Option<Vec<String>> {
    let end = words.iter().position(|word| word.starts_with('>') || word.starts_with("2>"));
    let words = &words[..end.unwrap_or(words.len())];
    let first = words.first()?.as_str();
    if ["depthwise", "target/release/depthwise", "./target/release/depthwise"].contains(&first) {
        return Some(words[1..].to_vec());
    }
    let is_run = first == "cargo" && words.get(1).is_some_and(|word| word == "run");
    let of_package = words.iter().any(|word| ["-p", "--package", "--example"].contains(&word.as_str()));
    let end = words.iter().position(|word| word == "--").filter(|_| is_run && !of_package)?;
    Some(words[end + 1..].to_vec())
}

/// Whether a command parses, and whether what it names of the repository is there.
fn check_command(arguments: &[String], files: &BTreeSet<PathBuf>) -> Result<(), String> {
    if arguments.iter().any(|word| word == "...") {
        return Err("`...` is no argument: write the command out, or as inline code".to_owned());
    }
    let is_missing = |word: &&String| SHIPPED.iter().any(|shipped| word.starts_with(shipped)) && !is_there(word, files);
    if let Some(missing) = arguments.iter().find(is_missing) {
        return Err(format!("{missing} is not in the repository"));
    }
    let parsed = Cli::try_parse_from(["depthwise"].into_iter().chain(arguments.iter().map(String::as_str)));
    match parsed.map_err(|error| (error.kind(), error.to_string())) {
        Ok(_) | Err((ErrorKind::DisplayHelp | ErrorKind::DisplayVersion, _)) => Ok(()),
        Err((_, message)) => Err(message.split("\n\n").next().unwrap_or_default().to_owned()),
    }
}

/// Whether git knows a file, or a file in a folder.
fn is_there(path: impl AsRef<Path>, files: &BTreeSet<PathBuf>) -> bool {
    files.iter().any(|file| file.starts_with(&path))
}

/// Whether a link of a file leads somewhere; else what was expected.
fn resolve(
    file: &Path,
    link: &str,
    files: &BTreeSet<PathBuf>,
    pages: &BTreeMap<PathBuf, Page>,
) -> Result<(), &'static str> {
    let (path, anchor) = link.split_once('#').map_or((link, None), |(path, anchor)| (path, Some(anchor)));
    let mut target = if path.is_empty() { file.to_owned() } else { file.parent().unwrap_or(file).to_owned() };
    for part in Path::new(path) {
        match part.to_str() {
            Some("..") if !target.pop() => return Err("a path within the repository"),
            Some(".." | ".") => {}
            _ => target.push(part),
        }
    }
    match (anchor, pages.get(&target)) {
        _ if !is_there(&target, files) => Err("a file of the repository"),
        (None, _) => Ok(()),
        (Some(anchor), Some(page)) if page.anchors.contains(anchor) => Ok(()),
        (Some(_), _) => Err("a heading of that page"),
    }
}

/// The anchor of a heading: its letters and numbers in lower case, with hyphens for spaces.
fn anchor(heading: &str) -> String {
    let kept = |letter: char| match letter {
        ' ' => Some('-'),
        '-' | '_' => Some(letter),
        _ => letter.is_alphanumeric().then_some(letter),
    };
    heading.to_lowercase().chars().filter_map(kept).collect()
}
