//! `depthwise serve` as a user runs it: from the command line, until a signal.

mod common;
#[path = "common/made_up.rs"]
#[expect(dead_code, reason = "made-up exits are for other tests")]
mod made_up;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Stdio};

use common::Scene;
use traces::{ExitTrace, PassLog, RequestTrace};

/// A server that serves the model that ships, and its address.
struct Serving(Child, String);

impl Serving {
    fn start(scene: &Scene, more: &[&str]) -> Self {
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
        let arguments = [&["serve", model.to_str().unwrap(), "--port", "0", "--exit", "margin:0.05"], more].concat();
        let mut child = scene.command(&arguments).stderr(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stderr.as_mut().unwrap()).read_line(&mut line).unwrap();
        let address = line.split("http://").nth(1).unwrap_or_else(|| panic!("{line}")).split(": ").next().unwrap();
        Self(child, address.to_owned())
    }

    /// Posts a completion and leaves the answer to be read.
    fn ask(&self, body: &str) -> TcpStream {
        let mut stream = TcpStream::connect(&self.1).unwrap();
        let length = body.len();
        let head = format!(
            "POST /v1/completions HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
        );
        stream.write_all(format!("{head}{body}").as_bytes()).unwrap();
        stream
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
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let running: Vec<TcpStream> =
        (0..8).map(|_| serving.ask(r#"{"prompt": "In", "max_tokens": 900, "ignore_eos": true}"#)).collect();
    while read().len() < 28 {
        std::thread::sleep(std::time::Duration::from_millis(50));
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

#[test]
fn a_server_that_cannot_start_says_why() {
    let scene = Scene(tempfile::tempdir().unwrap());
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv");
    let model = model.to_str().unwrap();
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
