//! `depthwise bench` against a server whose answers are scripted.

mod common;
#[path = "../../client/tests/common/mod.rs"]
mod server;

use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::Scene;
use serde_json::Value;
use server::{Server, Step, answer, asked_tokens, event, head, token, whole};
use simulator::Summary;

const GAP: Duration = Duration::from_millis(1);

/// Twelve requests; request `i` has `i + 3` prompt tokens and `i + 1` output tokens.
fn scene() -> Scene {
    let scene = Scene(tempfile::tempdir().unwrap());
    let lines: String = (0..12).map(|id| format!("{id},0,{},{}\n", id + 3, id + 1)).collect();
    scene.write("requests.csv", &format!("request,arrival_us,prompt_tokens,output_tokens\n{lines}"));
    scene
}

fn rows(scene: &Scene, file: &str) -> Vec<csv::StringRecord> {
    csv::Reader::from_path(scene.path(file)).unwrap().into_records().collect::<Result<_, _>>().unwrap()
}

fn column(scene: &Scene, file: &str, name: &str) -> Vec<String> {
    let header = csv::Reader::from_path(scene.path(file)).unwrap().headers().unwrap().clone();
    let place = header.iter().position(|column| column == name).unwrap();
    rows(scene, file).iter().map(|row| row[place].to_owned()).collect()
}

#[test]
fn the_results_are_those_of_a_measured_run_with_the_columns_of_replay() {
    let server = Server::start(|body| answer(body, GAP));
    let scene = scene();
    let bench = ["bench", "--url", &server.url(), "--requests", "requests.csv", "--in-flight", "4", "--out", "out"];
    let objectives = ["--e2e-ms", "60000", "--batching", "depth", "--exit", "gate:0.9", "--max-batch", "8"];
    let printed = scene.succeed(&[&bench[..], &objectives].concat());
    for part in ["12 requests, 78 output tokens", "TTFT ms", "client lag", "model scripted", "100.0% of the requests"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    let summaries: Vec<Summary> =
        csv::Reader::from_path(scene.path("out/summary.csv")).unwrap().deserialize().collect::<Result<_, _>>().unwrap();
    assert_eq!(summaries.len(), 1);
    let Summary { requests, output_tokens, exit_policy, max_batch, mean_depth, objectives_met, .. } = &summaries[0];
    assert_eq!((*requests, *output_tokens, *max_batch, *objectives_met), (12, 78, 8, Some(1.0)));
    assert_eq!(exit_policy, "confidence:gate:0.9");
    assert!(mean_depth.is_nan(), "a client cannot see depths: {mean_depth}");
    let expected: Vec<String> = (1..=12).map(|tokens: u32| tokens.to_string()).collect();
    assert_eq!(column(&scene, "out/requests.csv", "output_tokens"), expected);
    assert_eq!(column(&scene, "out/client.csv", "answered"), ["12"]);
    assert!(!scene.path("out/failures.csv").exists());
}

/// Fails every request of an odd number of tokens, each in another way.
fn failing(body: &Value) -> Vec<Step> {
    match asked_tokens(body) {
        1 => vec![Step::Send(whole(400, "", "prompt too long"))],
        3 => vec![head(), token(false)],
        5 => vec![head(), event(r#"{"error": "engine died"}"#)],
        tokens if tokens % 2 == 1 => vec![Step::Send(whole(500, "", "busy"))],
        _ => answer(body, GAP),
    }
}

#[test]
fn failures_are_listed_by_request_and_fail_the_command_unless_they_are_allowed() {
    let server = Server::start(failing);
    let scene = scene();
    let bench = ["bench", "--url", &server.url(), "--requests", "requests.csv", "--out", "out"];
    let error = scene.fail(&bench);
    let kinds = "1 refused as a bad request (4xx), 3 server error, 1 answer cut off, 1 error within the answer";
    assert_eq!(error, format!("error: 6 of 12 requests failed: {kinds}"));
    let mut failed = column(&scene, "out/failures.csv", "id");
    failed.sort_by_key(|id| id.parse::<u32>().unwrap());
    assert_eq!(failed, ["0", "2", "4", "6", "8", "10"]);
    assert_eq!(column(&scene, "out/requests.csv", "id"), ["1", "3", "5", "7", "9", "11"]);
    scene.succeed(&[&bench[..], &["--allow-failures"]].concat());
}

#[test]
fn a_run_without_an_answer_is_an_error_that_names_the_first_failure_and_writes_nothing() {
    let server = Server::start(|_| vec![Step::Send(whole(404, "", "no such model"))]);
    let scene = scene();
    let error = scene.fail(&["bench", "--url", &server.url(), "--requests", "requests.csv", "--out", "out"]);
    assert!(error.contains("no request was answered: 12 refused as a bad request (4xx), the first: "), "{error}");
    assert!(error.contains("found status 404 Not Found, expected 200 OK: no such model"), "{error}");
    assert!(!scene.path("out").exists());
}

#[test]
fn options_that_contradict_each_other_or_the_server_are_named() {
    let scene = scene();
    scene.write("empty.txt", " \n");
    for (options, message) in [
        (&["--endpoint", "chat"][..], "--endpoint chat without --text"),
        (&["--text", "empty.txt"], "empty.txt: found no word, expected a text"),
        (&["--text", "none.txt"], "cannot read none.txt"),
        (&["--timeout-s", "0"], "--timeout-s 0: expected more than 0"),
        (&["--text", "requests.csv", "--tokens-per-word", "-1"], "--tokens-per-word -1: expected more than 0"),
        (&["--ttft-ms", "-1"], "--ttft-ms -1: expected 0 or more"),
        (&[], "found address `localhost:1`, expected http://HOST:PORT"),
    ] {
        let bench = ["bench", "--url", "localhost:1", "--requests", "requests.csv", "--out", "out"];
        let options: Vec<String> = options.iter().map(|&option| option.to_owned()).collect();
        // A negative number must stand in the word of its option.
        let joined: Vec<String> = options.chunks(2).map(|pair| pair.join("=")).collect();
        let joined: Vec<&str> = joined.iter().map(String::as_str).collect();
        let error = scene.fail(&[&bench[..], &joined].concat());
        assert!(error.contains(message), "{error}");
        assert!(!scene.path("out").exists());
    }
}

#[test]
fn prompts_of_words_have_the_tokens_that_the_server_counts() {
    let counting = |body: &Value| {
        let words = body["prompt"].as_str().unwrap().split(' ').count();
        match body["stream"].as_bool() {
            // Two tokens of each word, and one at the beginning.
            Some(false) => {
                let usage = format!(r#"{{"usage": {{"prompt_tokens": {}}}}}"#, 2 * words + 1);
                vec![Step::Send(whole(200, "", &usage))]
            }
            _ => vec![head(), token(true), server::usage(2 * words as u64 + 1, asked_tokens(body)), event("[DONE]")],
        }
    };
    let server = Server::start(counting);
    let scene = scene();
    scene.write("text.txt", "in the beginning was the word");
    let text = ["--text", "text.txt", "--out", "out", "--in-flight", "1"];
    scene.succeed(&[&["bench", "--url", &server.url(), "--requests", "requests.csv"], &text[..]].concat());
    // Of 3 to 14 tokens, the odd lengths are hit.
    assert_eq!(column(&scene, "out/client.csv", "other_prompt_lengths"), ["6"]);
}

#[test]
fn an_interrupted_run_keeps_what_was_answered() {
    let server = Server::start(|body| match asked_tokens(body) {
        1..=3 => answer(body, GAP),
        _ => vec![head(), Step::WaitForClient],
    });
    let scene = scene();
    let mut command = scene.command(&["bench", "--url", &server.url(), "--requests", "requests.csv", "--out", "out"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    while server.served().iter().filter(|served| served.is_over).count() < 3 || server.served().len() < 12 {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it was interrupted");
        thread::sleep(GAP);
    }
    // The answers are on their way to the client.
    thread::sleep(100 * GAP);
    assert!(Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap().success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", String::from_utf8_lossy(&output.stderr));
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(printed.contains("interrupted: 9 requests were in flight"), "{printed}");
    assert_eq!(column(&scene, "out/requests.csv", "id"), ["0", "1", "2"]);
    let marker = fs::read_to_string(scene.path("out/depthwise-results.json")).unwrap();
    assert!(marker.contains("client.csv"), "{marker}");
}
