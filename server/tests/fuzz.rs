//! Bodies of requests that are damaged at random: each gets an answer that says what is wrong, or is served, and the server
//! stays healthy.
//!
//! `DEPTHWISE_FUZZ_MINUTES=10 cargo test --release --workspace --test fuzz -- --nocapture` goes on for that many minutes and
//! prints the memory of the process; `PROPTEST_CASES` sets the number of bodies otherwise.

#[expect(dead_code, reason = "other tests have a use for all of it")]
mod common;

use std::time::{Duration, Instant};

use common::{Answer, Serving, settings};
use proptest::prelude::*;
use proptest::sample::{Index, select};
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::{Value, json};
use server::{ChatTemplate, Limits};

/// Bodies by default.
const CASES: u32 = 300;
/// From one print of the memory to the next.
const PRINT: Duration = Duration::from_secs(60);

/// One damage to a body: to its values, which are numbered from the root on, or to its bytes.
#[derive(Clone, Debug)]
enum Damage {
    Replace(Index, Value),
    Remove(Index),
    Add(Index, String, Value),
    Swap(Index, Index),
    Cut(Index),
    Flip(Index, u8),
    Insert(Index, Vec<u8>),
}

/// A path and a body that is served there.
fn requests() -> Vec<(&'static str, Value)> {
    let text = json!({
        "model": "tiny", "prompt": "In the beginning", "max_tokens": 8, "temperature": 0.7, "top_p": 0.9, "seed": 5, "n": 2,
        "stop": ["xx", "yz"], "stop_token_ids": [3], "min_tokens": 2, "ignore_eos": true, "stream": true, "logprobs": 3,
        "stream_options": {"include_usage": true}, "user": "me",
        "depthwise": {"exit": "margin:0.2", "priority": 1, "session": "s"},
    });
    let tokens = json!({
        "prompt": [[1, 2, 3], [4]], "max_completion_tokens": 9, "echo": true, "temperature": 0, "stop": "q",
        "frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1, "top_k": -1, "best_of": 1, "suffix": "",
        "logit_bias": {}, "depthwise": {"exit": "static:1"},
    });
    let chat = json!({
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "And God said"}]},
        ],
        "max_tokens": 7, "logprobs": true, "top_logprobs": 2, "tools": [], "tool_choice": "none", "stream": false,
        "response_format": {"type": "text"}, "seed": -1,
    });
    vec![("/v1/completions", text), ("/v1/completions", tokens), ("/v1/chat/completions", chat)]
}

/// Values that a key may not expect.
fn value() -> impl Strategy<Value = Value> {
    let nested = (0..100).fold(json!(1), |inner, _| json!([inner]));
    let known = [
        json!(null),
        json!(true),
        json!(0),
        json!(-1),
        json!(1.5),
        json!(i64::MIN),
        json!(u64::MAX),
        json!(f64::MAX),
        json!(1e-320),
        json!(""),
        json!("\u{0}\u{7}\u{fffd}"),
        json!("a".repeat(70_000)),
        json!("☃".repeat(2_000)),
        json!("none"),
        json!("static:9"),
        json!("margin:nan"),
        json!("margin:1e999"),
        json!("mix:0:1:2"),
        json!([]),
        json!({}),
        json!([null]),
        json!([[]]),
        json!(vec![1; 300]),
        json!(vec!["a"; 200]),
        json!({"type": "text"}),
        nested,
    ];
    prop_oneof![
        4 => select(known.to_vec()),
        1 => any::<i64>().prop_map(|number| json!(number)),
        1 => any::<f64>().prop_map(|number| json!(number)),
        1 => any::<String>().prop_map(|text| json!(text)),
        1 => prop::collection::vec(any::<u32>(), 0..9).prop_map(|numbers| json!(numbers)),
    ]
}

/// Bytes that JSON has no place for, or only some.
fn bytes() -> impl Strategy<Value = Vec<u8>> {
    let known =
        [&b"1e999"[..], b"\"\\ud800\"", b"\xff\xfe", b"\0", b",", b"\"", b"}", b"{\"prompt\": 1,", b"NaN", b"-"];
    let known: Vec<Vec<u8>> = known.iter().map(|bytes| bytes.to_vec()).chain([b"[".repeat(100_000)]).collect();
    prop_oneof![select(known), prop::collection::vec(any::<u8>(), 1..9)]
}

fn damage() -> impl Strategy<Value = Damage> {
    let key = prop_oneof![select(vec!["max_tokens", "n", "promt", "", "depthwise", "stream"]), Just("\u{0}")];
    let place = any::<Index>;
    prop_oneof![
        6 => (place(), value()).prop_map(|(place, value)| Damage::Replace(place, value)),
        1 => place().prop_map(Damage::Remove),
        2 => (place(), key, value()).prop_map(|(place, key, value)| Damage::Add(place, key.to_owned(), value)),
        1 => (place(), place()).prop_map(|(one, other)| Damage::Swap(one, other)),
        1 => place().prop_map(Damage::Cut),
        1 => (place(), any::<u8>()).prop_map(|(place, bits)| Damage::Flip(place, bits)),
        2 => (place(), bytes()).prop_map(|(place, bytes)| Damage::Insert(place, bytes)),
    ]
}

/// Number of values of a body; `visit` gets each with its number.
fn visit(value: &mut Value, first: usize, with: &mut dyn FnMut(usize, &mut Value)) -> usize {
    with(first, value);
    let inner: Vec<&mut Value> = match value {
        Value::Array(values) => values.iter_mut().collect(),
        Value::Object(fields) => fields.values_mut().collect(),
        _ => Vec::new(),
    };
    inner.into_iter().fold(first + 1, |next, value| visit(value, next, with))
}

/// Changes the value with a number.
fn change(body: &mut Value, place: &Index, with: &mut dyn FnMut(&mut Value)) {
    let values = visit(body, 0, &mut |_, _| ());
    let place = place.index(values);
    visit(body, 0, &mut |number, value| {
        if number == place {
            with(value)
        }
    });
}

impl Damage {
    fn to_values(&self, body: &mut Value) {
        match self {
            Self::Replace(place, new) => change(body, place, &mut |value| *value = new.clone()),
            Self::Remove(place) => change(body, place, &mut |value| match value {
                Value::Object(fields) => drop(fields.keys().next().cloned().and_then(|key| fields.remove(&key))),
                Value::Array(values) => drop(values.pop()),
                _ => {}
            }),
            Self::Add(place, key, new) => change(body, place, &mut |value| match value {
                Value::Object(fields) => drop(fields.insert(key.clone(), new.clone())),
                Value::Array(values) => values.push(new.clone()),
                _ => {}
            }),
            Self::Swap(one, other) => {
                let (mut first, mut second) = (Value::Null, Value::Null);
                change(body, one, &mut |value| first = value.clone());
                change(body, other, &mut |value| second = std::mem::replace(value, first.clone()));
                change(body, one, &mut |value| *value = second.clone());
            }
            Self::Cut(_) | Self::Flip(..) | Self::Insert(..) => {}
        }
    }

    fn to_bytes(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Cut(place) => bytes.truncate(place.index(bytes.len() + 1)),
            Self::Flip(place, bits) if !bytes.is_empty() => {
                let place = place.index(bytes.len());
                bytes[place] ^= bits;
            }
            Self::Insert(place, inserted) => {
                let place = place.index(bytes.len() + 1);
                bytes.splice(place..place, inserted.iter().copied());
            }
            _ => {}
        }
    }
}

/// A body, which a failure shows as a text.
#[derive(Clone)]
struct Body(Vec<u8>);

impl std::fmt::Debug for Body {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:.4000}, {} bytes", self.0.escape_ascii().to_string(), self.0.len())
    }
}

/// A path and a damaged body.
fn damaged() -> impl Strategy<Value = (&'static str, Body)> {
    (select(requests()), prop::collection::vec(damage(), 1..5)).prop_map(|((path, mut body), damages)| {
        damages.iter().for_each(|damage| damage.to_values(&mut body));
        let mut bytes = body.to_string().into_bytes();
        damages.iter().for_each(|damage| damage.to_bytes(&mut bytes));
        (path, Body(bytes))
    })
}

/// Checks that an answer is one that a client can read. Its status.
fn check(answer: &Answer) -> u16 {
    match answer.status {
        200 if answer.head.contains("text/event-stream") => {
            let chunks = answer.chunks();
            assert!(chunks.iter().all(|chunk| chunk["error"].is_null()), "{}", answer.text());
        }
        200 => assert!(answer.json()["usage"]["completion_tokens"].is_u64()),
        400 | 404 | 429 => assert!(!answer.message().is_empty()),
        status => panic!("status {status}: {}", answer.text()),
    }
    answer.status
}

/// Memory of this process, in MiB.
fn memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().split(' ').next()?.parse::<u64>().ok()? / 1024)
}

#[test]
fn damaged_bodies_get_answers_and_leave_the_server_healthy() {
    let minutes: f64 = std::env::var("DEPTHWISE_FUZZ_MINUTES").map_or(0.0, |text| text.parse().expect("minutes"));
    let folder = tempfile::tempdir().unwrap();
    let template = folder.path().join("chat.jinja");
    std::fs::write(&template, "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}")
        .unwrap();
    let template = ChatTemplate::read(&template, folder.path()).unwrap();
    let serving = Serving::of(settings(), Limits::default(), None, false, Some(template));
    for (path, body) in requests() {
        let answer = serving.post(path, &body);
        assert_eq!(check(&answer), 200, "{}", answer.text());
    }
    let control =
        || serving.complete(&json!({"prompt": "In the", "max_tokens": 9, "temperature": 0})).json()["choices"].clone();
    let expected = control();

    let cases = std::env::var("PROPTEST_CASES").map_or(CASES, |text| text.parse().expect("a number of cases"));
    let config = Config { failure_persistence: None, ..Config::with_cases(cases) };
    let runner = || match minutes > 0.0 {
        true => TestRunner::new(config.clone()),
        false => TestRunner::new_with_rng(config.clone(), TestRng::deterministic_rng(RngAlgorithm::ChaCha)),
    };
    let (begun, counts) = (Instant::now(), std::cell::RefCell::new(std::collections::BTreeMap::new()));
    let mut printed = begun;
    loop {
        let run = runner().run(&damaged(), |(path, Body(body))| {
            let status = check(&Answer::read(serving.begin_post(path, &body)));
            *counts.borrow_mut().entry(status).or_insert(0_u64) += 1;
            Ok(())
        });
        run.unwrap_or_else(|failure| panic!("{failure}"));
        assert_eq!(serving.get("/health").status, 200);
        assert_eq!(control(), expected, "the server serves as before");
        let now = Instant::now();
        let is_over = now.duration_since(begun) >= Duration::from_secs_f64(60.0 * minutes);
        if minutes > 0.0 && (is_over || now.duration_since(printed) >= PRINT) {
            let (seconds, counts) = (begun.elapsed().as_secs(), counts.borrow());
            println!("after {seconds} s: answers by status {counts:?}, memory {} MiB", memory().unwrap_or(0));
            printed = now;
        }
        if is_over {
            break;
        }
    }
    let counts = counts.into_inner();
    assert!(counts[&200] > 0 && counts[&400] > counts[&200], "{counts:?}");
    serving.wait_until_idle();
    serving.end().unwrap();
}
