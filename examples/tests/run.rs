//! Every example runs, and prints what its first lines promise.

use std::process::Command;

/// The lines that an example prints.
fn lines(program: &str) -> Vec<String> {
    let output = Command::new(program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().lines().map(str::to_owned).collect()
}

/// The numbers of the line that begins with a word.
fn numbers(lines: &[String], word: &str) -> Vec<f64> {
    let line = lines.iter().find(|line| line.split_whitespace().next() == Some(word));
    let line = line.unwrap_or_else(|| panic!("no line of {word}: {lines:?}"));
    line.split_whitespace().skip(1).map(|number| number.parse().unwrap()).collect()
}

#[test]
fn a_custom_executor_is_faster_when_batched_by_depth() {
    let lines = lines(env!("CARGO_BIN_EXE_custom_executor"));
    let [sequence, depth] = ["sequence", "depth"].map(|batching| numbers(&lines, batching)[0]);
    assert!(sequence < depth, "{lines:?}");
}

#[test]
fn a_simulated_trace_has_the_same_exits_and_more_throughput_when_batched_by_depth() {
    let lines = lines(env!("CARGO_BIN_EXE_simulate_a_trace"));
    assert!(lines[0].starts_with("200 requests"));
    let [sequence, depth] = ["sequence", "depth"].map(|batching| numbers(&lines, batching));
    assert_eq!(sequence[1], depth[1], "the mean depth");
    assert!(sequence[0] < depth[0] && sequence[2] > depth[2], "{lines:?}");
}

#[test]
fn a_custom_exit_policy_exits_earlier_in_easy_passages_on_simulator_and_engine() {
    let lines = lines(env!("CARGO_BIN_EXE_custom_exit_policy"));
    let [none, margin, average] =
        ["none", "confidence:margin:0.3", "average-margin:0.25"].map(|exit| numbers(&lines, exit));
    assert_eq!((none[1], none[2]), (4.0, 1.0));
    assert!(average[1] < margin[1] && average[0] > margin[0], "{lines:?}");
    assert!(average[2] > 0.9, "{lines:?}");
    let depths: Vec<&str> = lines.last().unwrap().split('[').skip(1).map(|rest| &rest[..1]).collect();
    assert!(depths.len() == 12 && depths.iter().any(|depth| *depth != "3"), "{lines:?}");
}

#[test]
fn a_model_is_served_with_the_depth_of_every_token() {
    let lines = lines(env!("CARGO_BIN_EXE_serve_a_model"));
    assert!(lines[0].starts_with("In the beginning|") && lines[0].len() > 40, "{lines:?}");
    let depths: Vec<&str> = lines.iter().filter_map(|line| line.strip_prefix("depths ")).collect();
    assert_eq!(depths.len(), 2);
    assert!(depths.iter().all(|depths| depths.split(' ').count() == 40));
    let passes: f64 = lines.last().unwrap().split(' ').nth(2).unwrap().parse().unwrap();
    assert!(passes > 1.0 && passes < 4.0, "{lines:?}");
}
