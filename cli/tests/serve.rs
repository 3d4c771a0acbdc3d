//! `depthwise serve` as a user runs it: from the command line, until a signal.

mod common;
#[cfg(target_os = "linux")]
#[path = "common/killed.rs"]
mod killed;
#[path = "common/made_up.rs"]
#[expect(dead_code, reason = "made-up exits are for other tests")]
mod made_up;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use common::Scene;
use traces::{ExitTrace, PassLog, RequestTrace};

/// A server that serves the model that ships, and its address.
struct Serving(Child, String);

/// The model that ships.
fn model() -> String {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    model.to_str().unwrap().to_owned()
}

/// The arguments that serve it at a free port.
fn serve<'a>(model: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&["serve", model, "--port", "0", "--exit", "margin:0.05"], more].concat()
}

/// The address in the line that a server begins with.
fn address_in(line: &str) -> Option<String> {
    Some(line.split("http://").nth(1)?.split_once(": ")?.0.to_owned())
}

/// Posts a completion and leaves the answer to be read.
fn post(address: &str, body: &str) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    let length = body.len();
    let head =
        format!("POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes())?;
    Ok(stream)
}

impl Serving {
    fn start(scene: &Scene, more: &[&str]) -> Self {
        let mut child = scene.command(&serve(&model(), more)).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = address_in(&line).unwrap_or_else(|| panic!("{line}"));
        Self(child, address)
    }

    fn ask(&self, body: &str) -> TcpStream {
        post(&self.1, body).unwrap()
    }

    fn answer(&self, body: &str) -> String {
        let mut answer = String::new();
        self.ask(body).read_to_string(&mut answer).unwrap();
        answer
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Sends a signal to the server.
#[cfg(unix)]
fn signal(child: &Child, signal: i32) {
    // SAFETY: it sends a signal to a child that was not waited for.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}

#[cfg(unix)]
#[test]
fn a_server_that_is_terminated_finishes_what_runs() {
    let scene = Scene(tempfile::tempdir().unwrap());
    let mut serving = Serving::start(&scene, &[]);
    let mut running = serving.ask(r#"{"prompt": "In the beginning", "max_tokens": 300, "stream": true}"#);
    running.read_exact(&mut [0; 15]).unwrap();
    signal(&serving.0, libc::SIGTERM);
    let mut rest = String::new();
    running.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("data: [DONE]"), "{rest}");
    assert_eq!(serving.0.wait().unwrap().code(), Some(0));
}

#[cfg(unix)]
#[test]
fn what_a_killed_server_has_recorded_reads_and_simulates_as_it_is() {
    let scene = Scene(tempfile::tempdir().unwrap());
    let mut serving = Serving::start(&scene, &["--record", "record", "--max-batch", "4"]);
    for _ in 0..20 {
        let answer =
            serving.answer(r#"{"prompt": "And God said", "max_tokens": 12, "temperature": 0, "ignore_eos": true}"#);
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let record = scene.path("record");
    // A trace without requests, as before the first writing, is refused.
    let read = || RequestTrace::read(record.join("requests.csv")).map_or(Vec::new(), |trace| trace.requests);
    while read().iter().filter(|request| request.output_tokens == 12).count() < 20 {
        std::thread::sleep(Duration::from_millis(50));
    }
    let running: Vec<TcpStream> =
        (0..8).map(|_| serving.ask(r#"{"prompt": "In", "max_tokens": 900, "ignore_eos": true}"#)).collect();
    while read().len() < 28 {
        std::thread::sleep(Duration::from_millis(50));
    }
    serving.0.kill().unwrap();
    serving.0.wait().unwrap();
    drop(running);
    let exits = ExitTrace::read(&record).unwrap();
    assert_eq!((read().len(), exits.num_generations()), (28, 28));
    assert!(!PassLog::read(record.join("passes-000000.parquet")).unwrap().runs[0].passes.is_empty());
    let mut profile = made_up::profile();
    profile.meta.fingerprint = exits.meta.fingerprint;
    profile.meta.num_loops = exits.meta.num_loops;
    profile.write(scene.path("profile")).unwrap();
    let printed = scene.succeed(&[
        "simulate",
        "--requests",
        "record/requests.csv",
        "--exits",
        "record",
        "--profile",
        "profile",
        "--batching",
        "sequence,depth",
        "--exit",
        "none,margin:0.05",
    ]);
    assert!(printed.contains("margin:0.05"), "{printed}");
}

/// Checks a recording at any moment after the first request was written: each file reads, and the exit trace has every
/// token of the request trace. The number of requests.
#[cfg(target_os = "linux")]
fn check_recording(folder: &Path) -> usize {
    let requests = RequestTrace::read(folder.join("requests.csv")).unwrap().requests;
    let exits = ExitTrace::read(folder).unwrap();
    assert!(exits.num_generations() >= requests.len(), "{} {}", exits.num_generations(), requests.len());
    for (index, request) in requests.iter().enumerate() {
        assert!(exits.generation(index).len() >= request.output_tokens as usize, "{request:?}");
    }
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        if name.starts_with("passes-") && name.ends_with(".parquet") {
            assert!(!PassLog::read(&path).unwrap().runs[0].passes.is_empty(), "{name}");
        }
    }
    requests.len()
}

#[cfg(target_os = "linux")]
#[test]
fn a_recording_reads_after_a_kill_before_any_change_to_its_files() {
    let model = model();
    let mut recorded = Vec::new();
    // The first changes make the folder and its files, the others follow from one writing to the next. How many there are before
    // the first request depends on the machine.
    for change in 1..80 {
        if change > 17 && recorded.iter().any(|&requests| requests > 0) {
            break;
        }
        let scene = Scene(tempfile::tempdir().unwrap());
        let said = scene.path("said.txt");
        let mut command = scene.command(&serve(&model, &["--record", "record", "--max-batch", "8"]));
        command.stderr(File::create(&said).unwrap());
        // Users who ask again and again, each until the server is gone.
        let user = |number: usize| {
            let said = said.clone();
            move || {
                let address = loop {
                    match address_in(&fs::read_to_string(&said).unwrap()) {
                        Some(address) => break address,
                        None => std::thread::sleep(Duration::from_millis(20)),
                    }
                };
                let tokens = 3 + 40 * number;
                let body = format!(r#"{{"prompt": "And God said", "max_tokens": {tokens}, "ignore_eos": true}}"#);
                while let Ok(mut stream) = post(&address, &body) {
                    if stream.read_to_end(&mut Vec::new()).is_err() {
                        break;
                    }
                }
            }
        };
        let users: Vec<_> = (0..6).map(|number| std::thread::spawn(user(number))).collect();
        let Some(end) = killed::killed_before(change, |path| path.contains("record"), &mut command) else {
            eprintln!("skipped: no process can be traced here");
            return;
        };
        assert_eq!(end, killed::End::Killed);
        users.into_iter().for_each(|user| user.join().unwrap());
        let lines = fs::read_to_string(scene.path("record/requests.csv")).map_or(0, |text| text.lines().count());
        // Before the first request, there is a line of columns only, if any.
        recorded.push(if lines > 1 { check_recording(&scene.path("record")) } else { 0 });
    }
    assert!(recorded[0] == 0 && recorded.iter().any(|&requests| requests > 0), "{recorded:?}");
}

#[cfg(unix)]
#[test]
fn a_recording_is_taken_as_it_is_by_simulate_replay_and_validate() {
    let (scene, model) = (Scene(tempfile::tempdir().unwrap()), model());
    let limits = ["--max-batch", "2", "--token-budget", "16", "--prefill-chunk", "8"];
    let mut serving = Serving::start(&scene, &[&["--record", "record"], &limits[..]].concat());
    // Two users, who ask four times each and begin alike.
    let beginning: Vec<u32> = (300..332).collect();
    let mut generated = 0;
    for turn in 0..8 {
        let (tokens, user) = (3 + turn, turn % 2);
        let prompt = serde_json::json!([&beginning[..], &[turn]].concat());
        let body = format!(
            r#"{{"prompt": {prompt}, "max_tokens": {tokens}, "ignore_eos": true, "depthwise": {{"session": "user {user}"}}}}"#
        );
        assert!(serving.answer(&body).starts_with("HTTP/1.1 200"));
        generated += tokens;
    }
    signal(&serving.0, libc::SIGTERM);
    assert_eq!(serving.0.wait().unwrap().code(), Some(0));
    let trace = RequestTrace::read(scene.path("record/requests.csv")).unwrap();
    assert_eq!(trace.sessions.unwrap().num_following(), 6);

    let profile = ["profile", "--model", &model, "--max-tokens", "64", "--rounds", "1", "--out", "profile"];
    scene.succeed(&[&profile[..], &limits].concat());
    let requests = ["--requests", "record/requests.csv"];
    let policies = ["--batching", "sequence,depth", "--exit", "none,margin:0.05,margin:0.1"];
    let prompts = format!("{model}/prompts.txt");
    let engine = ["--model", &model, "--prompts", &prompts];
    let simulate = ["simulate", "--exits", "record", "--profile", "profile", "--prefix-caching", "--out", "simulated"];
    scene.succeed(&[&simulate[..], &requests, &policies, &limits].concat());
    scene.succeed(&[&["replay"], &engine[..], &requests, &policies, &limits, &["--out", "replayed"]].concat());
    let validate = ["--repeats", "1", "--rounds", "1", "--no-rates", "--out", "validated"];
    scene.succeed(&[&["validate"], &engine[..], &requests, &policies, &limits, &validate].concat());
    for (results, runs) in [("simulated", 6), ("replayed", 6), ("validated", 12)] {
        let mut table = csv::Reader::from_path(scene.path(results).join("summary.csv")).unwrap();
        let lines: Vec<std::collections::HashMap<String, String>> = table.deserialize().map(Result::unwrap).collect();
        assert_eq!(lines.len(), runs, "{results}");
        for line in lines {
            assert_eq!((&*line["requests"], &*line["output_tokens"]), ("8", &*generated.to_string()), "{results}");
            if results == "simulated" {
                assert!(line["prefix_hit_rate"].parse::<f64>().unwrap() > 0.5, "{line:?}");
            }
        }
    }
}

#[test]
fn a_server_that_cannot_start_says_why() {
    let scene = Scene(tempfile::tempdir().unwrap());
    let model = model();
    let model = &*model;
    std::fs::create_dir(scene.path("full")).unwrap();
    scene.write("full/notes.txt", "");
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for (more, expected) in [
        (&["--port", "0", "--record", "full"][..], "a folder that is not empty"),
        (&["--port", &port], "cannot listen at 127.0.0.1"),
        (&["--port", "0", "--exit", "oracle"], "the oracle knows the requests beforehand"),
        (&["--port", "0", "--exit", "static:9"], "static exit depth 9 is outside"),
        (&["--port", "0", "--temperature=-1"], "--temperature -1: expected 0 or more"),
        (&["--port", "0", "--chat-template", "none.jinja"], "none.jinja: cannot read it"),
    ] {
        let error = scene.fail(&[&["serve", model], more].concat());
        assert!(error.contains(expected), "{error}");
    }
}
