//! The server over TCP: what it answers, and what it survives.

mod common;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use common::{Answer, Serving, VOCABULARY, choice, generated, model, settings};
use scheduler::{Batching, Settings};
use serde_json::{Value, json};
use server::Limits;
use traces::hash::mix;
use traces::{ExitTrace, PassLog, RequestTrace};

fn serving() -> Serving {
    Serving::start(settings(), Limits::default(), None)
}

/// A random number below a bound, by request and purpose.
fn random(request: u64, purpose: u64, below: u64) -> u64 {
    mix(request << 8 | purpose) % below
}

#[test]
fn texts_at_once_are_those_of_the_engine_whole_streamed_and_beside_cancelled_ones() {
    let prompt = |request: u64| {
        let places = 0..1 + random(request, 0, 60);
        places.map(|place| random(request, 9 + place, VOCABULARY as u64) as u32).collect()
    };
    let serving = serving();
    assert_texts_at_once(&serving, 200, prompt);
    serving.end().unwrap();
}

/// A prompt of 50 tokens, of which the first 40 are those of every third request.
fn alike(request: u64) -> Vec<u32> {
    let owner = |place| if place < 40 { request % 3 } else { 3 + request };
    (0..50).map(|place| random(owner(place), 9 + place, VOCABULARY as u64) as u32).collect()
}

#[test]
fn texts_behind_cached_prefixes_are_those_of_the_engine_too() {
    for batching in Batching::ALL {
        // Few blocks, so that sequences lose theirs to others.
        let settings = Settings { prefix_caching: true, num_blocks: 40, batching, ..settings() };
        let serving = Serving::start(settings, Limits::default(), None);
        assert_texts_at_once(&serving, 60, alike);
        assert!(serving.metric("vllm:prefix_cache_hits_total") > 0.0, "{batching}");
        serving.end().unwrap();
    }
}

#[test]
fn what_the_prefix_cache_has_is_in_usage_and_metrics() {
    let settings = Settings { prefix_caching: true, ..settings() };
    let serving = Serving::start(settings, Limits::default(), None);
    let ask = |prompts: &[u64], more: Value| {
        let prompts: Vec<Vec<u32>> = prompts.iter().map(|&request| alike(request)).collect();
        // Tokens enough for the prompt to run every depth before the request ends.
        let mut body = json!({"prompt": prompts, "max_tokens": 9, "ignore_eos": true});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serving.complete(&body)
    };
    let cached = |answer: &Value| answer["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap();
    assert_eq!(cached(&ask(&[0], json!({})).json()), 0);
    assert_eq!(cached(&ask(&[3], json!({})).json()), 32, "two blocks of 16 are those of the first prompt");
    assert_eq!(cached(&ask(&[3], json!({})).json()), 48, "all whole blocks");
    let streamed = ask(&[6], json!({"stream": true, "stream_options": {"include_usage": true}})).chunks();
    assert_eq!(cached(streamed.last().unwrap()), 32);
    let metrics = ["queries", "hits"].map(|of| serving.metric(&format!("vllm:prefix_cache_{of}_total")));
    assert_eq!(metrics, [4.0 * 50.0, 32.0 + 48.0 + 32.0]);
    assert_eq!(cached(&ask(&[9, 1], json!({"n": 2})).json()), 32, "of the first choice of each prompt");
    assert_eq!(serving.get("/v1/models").json()["data"][0]["depthwise"]["prefix_caching"], true);
    serving.end().unwrap();
}

/// Checks that requests at once get the texts that the engine generates for each by itself, without prefix caching. Some
/// clients leave before the end.
fn assert_texts_at_once(serving: &Serving, requests: u64, prompt: impl Fn(u64) -> Vec<u32> + Sync) {
    let (engine, tokenizer) = model();
    let policies = [None, Some("none"), Some("static:1"), Some("margin:0.2"), Some("margin:0.9")];
    let ask = &|request: u64| {
        let prompt = prompt(request);
        let (tokens, exit) = (1 + random(request, 1, 40) as u32, policies[random(request, 2, 5) as usize]);
        let kind = random(request, 3, 3);
        let body = json!({
            "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": kind > 0, "ignore_eos": true,
            "depthwise": {"exit": exit, "priority": random(request, 4, 3)},
        });
        if kind == 2 {
            // Leaves after the head of the answer, or the first bytes of its text.
            let mut stream = serving.begin_post("/v1/completions", body.to_string().as_bytes());
            let _ = stream.read(&mut [0; 300]).unwrap();
            return;
        }
        let answer = serving.complete(&body);
        assert_eq!(answer.status, 200, "{}", answer.text());
        let found = if kind == 1 { choice(&answer.chunks()) } else { choice(&[answer.json()]) };
        let settings = exit.map_or(settings(), |exit| Settings { exit: exit.parse().unwrap(), ..settings() });
        let settings = Settings { num_blocks: 16, max_batch: 1, ..settings };
        assert_eq!(found, generated(&engine, &tokenizer, settings, &prompt, tokens), "request {request}, {exit:?}");
    };
    std::thread::scope(|scope| {
        let asking: Vec<_> = (0..requests).map(|request| scope.spawn(move || ask(request))).collect();
        asking.into_iter().for_each(|asked| asked.join().unwrap());
    });
    serving.wait_until_idle();
    assert!(serving.metric("depthwise:passes_total") > 0.0);
}

#[test]
fn faulty_requests_get_clear_errors_and_leave_the_server_healthy() {
    let serving = serving();
    let completions = |body: &[u8]| Answer::read(serving.begin_post("/v1/completions", body));
    for (body, expected) in [
        (&b"{\"prompt\": "[..], "the body is no JSON"),
        (b"", "the body is no JSON"),
        (b"[]", "the body: found [], expected an object"),
        (b"{\"prompt\": \"\xff\xfe\"}", "the body: found a byte that is no UTF-8"),
        (b"{\"prompt\": \"\\ud800\"}", "the body is no JSON"),
        (b"{\"prompt\": 5}", "prompt: found 5, expected a text"),
        (b"{\"prompt\": [[1], \"a\"]}", "prompt: found"),
        (b"{\"prompt\": [-1]}", "prompt: found [-1]"),
        (b"{\"prompt\": [300]}", "prompt: found token 300, expected tokens below 300"),
        (b"{\"prompt\": []}", "prompt: found []"),
        (b"{\"prompt\": \"\"}", "prompt: found no token, expected at least one"),
        (b"{\"max_tokens\": 1}", "prompt: found nothing"),
        (b"{\"prompt\": \"a\", \"max_tokens\": 300}", "max_tokens: found 1 tokens of prompt and 300 to generate"),
        (b"{\"prompt\": \"a\", \"max_tokens\": 1.5}", "max_tokens: found 1.5"),
        (
            b"{\"prompt\": \"a\", \"depthwise\": {\"exit\": \"gate:0.5\"}}",
            "depthwise.exit: found confidence:gate:0.5, expected none",
        ),
        (b"{\"prompt\": \"a\", \"stop_token_ids\": [999]}", "prompt: found token 999"),
    ] {
        let answer = completions(body);
        assert_eq!(answer.status, 400, "{body:?}: {}", answer.text());
        assert!(answer.message().starts_with(expected), "{body:?}: {}", answer.message());
        assert_eq!(answer.json()["error"]["type"], "invalid_request_error");
    }
    let long = json!({"prompt": vec![1; 400]});
    assert!(serving.complete(&long).message().starts_with("prompt: found 400 tokens of prompt"));
    let huge = Answer::read(serving.begin_post("/v1/completions", &vec![b'a'; 9 << 20]));
    assert_eq!(huge.status, 413);
    for (answer, status) in [
        (serving.get("/v1/nothing"), 404),
        (serving.get("/v1/completions"), 405),
        (serving.complete(&json!({"prompt": "a", "model": "other"})), 404),
        (serving.post("/v1/chat/completions", &json!({"messages": [{"role": "user", "content": "a"}]})), 400),
    ] {
        assert_eq!(answer.status, status, "{}", answer.text());
        assert!(!answer.message().is_empty());
    }
    for bytes in [&b"nonsense\r\n\r\n"[..], b"GET / HTTP/9.9\r\n\r\n", &[0xff; 500]] {
        let mut stream = serving.connect();
        stream.write_all(bytes).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 400"), "{}", String::from_utf8_lossy(&answer));
    }
    // Connections that never say all that they mean to.
    let half_open: Vec<_> = (0..50)
        .map(|number| {
            let mut stream = serving.connect();
            let begun: &[u8] = match number % 3 {
                0 => b"",
                1 => b"POST /v1/completions HTTP/1.1\r\nHost:",
                _ => b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{\"prompt\"",
            };
            stream.write_all(begun).unwrap();
            stream
        })
        .collect();
    assert_eq!(serving.get("/health").status, 200);
    let answer = serving.complete(&json!({"prompt": "In the", "max_tokens": 3}));
    assert_eq!(answer.json()["usage"]["completion_tokens"], 3, "{}", answer.text());
    drop(half_open);
    serving.end().unwrap();
}

#[test]
fn options_of_a_completion_do_what_they_say() {
    let serving = serving();
    let greedy = |more: Value| {
        let mut body = json!({"prompt": "In the beginning", "max_tokens": 24, "temperature": 0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        serving.complete(&body).json()
    };
    let plain = greedy(json!({}));
    let (text, tokens, _) = choice(std::slice::from_ref(&plain));
    assert_eq!(plain["choices"][0]["finish_reason"], "length");
    assert_eq!(plain["usage"]["completion_tokens"], 24);
    assert_eq!(greedy(json!({"seed": 5}))["choices"][0]["text"], plain["choices"][0]["text"]);

    let echoed = greedy(json!({"echo": true}));
    assert_eq!(echoed["choices"][0]["text"], format!("In the beginning{text}"));

    // A text in the middle of the answer ends it, and a token does.
    let stop: String = text.chars().skip(8).take(2).collect();
    let expected = &text[..text.find(&stop).unwrap()];
    let stopped = greedy(json!({"stop": stop}));
    assert_eq!(
        (stopped["choices"][0]["text"].as_str(), stopped["choices"][0]["finish_reason"].as_str()),
        (Some(expected), Some("stop"))
    );
    let end = tokens.iter().position(|token| *token == tokens[9]).unwrap();
    let stopped = greedy(json!({"stop_token_ids": [tokens[9]]}));
    assert_eq!(choice(std::slice::from_ref(&stopped)).1, tokens[..=end]);
    assert!(text.starts_with(stopped["choices"][0]["text"].as_str().unwrap()));
    let longer = greedy(json!({"stop_token_ids": [tokens[9]], "min_tokens": 24}));
    assert!(!choice(std::slice::from_ref(&longer)).1.contains(&tokens[9]));

    let likely = greedy(json!({"logprobs": 2}))["choices"][0].clone();
    assert_eq!(likely["text"].as_str(), Some(&text[..]), "log-probabilities change no token");
    let first = likely["logprobs"]["token_logprobs"][0].as_f64().unwrap();
    let top = likely["logprobs"]["top_logprobs"][0].as_object().unwrap();
    assert!(first < 0.0 && top.len() == 2 && top.values().all(|log| log.as_f64().unwrap() <= first), "{likely}");

    let sampled = |seed: u64, more: Value| {
        let mut body = json!({"prompt": ["In", "And"], "n": 2, "seed": seed, "max_tokens": 9, "temperature": 2.0});
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        let answer = serving.complete(&body).json();
        answer["choices"]
            .as_array()
            .unwrap()
            .iter()
            .map(|choice| choice["text"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    let texts = sampled(1, json!({}));
    assert_eq!(texts.len(), 4);
    assert!(texts[0] != texts[1] && texts == sampled(1, json!({})) && texts != sampled(2, json!({})));
    assert_eq!(
        sampled(3, json!({"top_p": 1e-6}))[0],
        sampled(4, json!({"top_p": 1e-6}))[1],
        "one token holds the share"
    );

    let streamed = serving.complete(&json!({"prompt": "a", "stream": true, "stream_options": {"include_usage": true}}));
    let chunks = streamed.chunks();
    assert_eq!(chunks.last().unwrap()["usage"]["completion_tokens"], 16);
    assert_eq!(chunks.last().unwrap()["choices"], json!([]));
    let lasts: Vec<&Value> = chunks.iter().filter(|chunk| chunk["choices"][0]["finish_reason"].is_string()).collect();
    assert_eq!(lasts.len(), 1);
    let models = serving.get("/v1/models").json();
    assert_eq!(models["data"][0]["id"], "tiny");
    assert!(models["data"][0]["meta"]["n_vocab"].as_u64() > Some(0), "clients that draw token ids need it: {models}");
    serving.end().unwrap();
}

#[test]
fn more_than_the_limits_is_answered_with_429_and_served_later() {
    let limits = Limits { most_requests: 2, most_tokens: 500, ..Limits::default() };
    let serving = Serving::start(settings(), limits, None);
    let ask = |prompts: usize, tokens: u32| {
        serving.complete(&json!({"prompt": vec!["a"; prompts], "max_tokens": tokens, "ignore_eos": true}))
    };
    for (answer, expected) in
        [(ask(3, 1), "2 requests run or wait"), (ask(2, 255), "requests of 500 tokens run or wait")]
    {
        assert_eq!(answer.status, 429);
        assert!(answer.message().contains(expected), "{}", answer.message());
        assert!(answer.head.to_ascii_lowercase().contains("retry-after: "), "{}", answer.head);
        assert_eq!(answer.json()["error"]["type"], "rate_limit_error");
    }
    for _ in 0..5 {
        assert_eq!(ask(2, 100).json()["usage"]["completion_tokens"], 200, "places are given back");
    }
    serving.end().unwrap();
}

#[test]
fn a_reader_that_reads_nothing_holds_up_nothing() {
    let serving = serving();
    // More than all buffers between the two hold.
    let body = json!({"prompt": "a", "max_tokens": 255, "n": 128, "stream": true, "ignore_eos": true}).to_string();
    let unread = serving.begin_post("/v1/completions", body.as_bytes());
    assert_eq!(serving.complete(&json!({"prompt": "b", "max_tokens": 9})).status, 200);
    serving.wait_until_idle();
    let chunks = Answer::read(unread).chunks();
    let tokens = |chunk: &Value| chunk["choices"][0]["depthwise"]["depths"].as_array().unwrap().len();
    assert_eq!(chunks.iter().map(tokens).sum::<usize>(), 128 * 255);
    serving.end().unwrap();
}

#[test]
fn what_runs_is_finished_when_the_server_ends() {
    let serving = serving();
    let body = json!({"prompt": "a", "max_tokens": 200, "stream": true, "ignore_eos": true}).to_string();
    let mut running = serving.begin_post("/v1/completions", body.as_bytes());
    let mut begun = [0; 12];
    running.read_exact(&mut begun).unwrap();
    serving.begin_to_end();
    let mut rest = begun.to_vec();
    running.read_to_end(&mut rest).unwrap();
    assert!(String::from_utf8(rest).unwrap().contains("data: [DONE]"));
    serving.end().unwrap();
}

#[test]
fn what_does_not_end_in_time_is_aborted_when_the_server_ends() {
    let limits = Limits { grace: Duration::ZERO, ..Limits::default() };
    let serving = Serving::start(Settings { max_batch: 1, ..settings() }, limits, None);
    let body = json!({"prompt": "a", "max_tokens": 255, "ignore_eos": true}).to_string();
    let running: Vec<_> = (0..40).map(|_| serving.begin_post("/v1/completions", body.as_bytes())).collect();
    // Some may end before the last is sent.
    let began = Instant::now();
    while serving.metric("vllm:num_requests_waiting") < 20.0 && began.elapsed() < Duration::from_secs(1) {}
    serving.begin_to_end();
    let statuses: Vec<u16> = running.into_iter().map(|stream| Answer::read(stream).status).collect();
    assert!(statuses.contains(&503) && statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
    serving.end().unwrap();
}

#[test]
fn a_recording_has_what_was_served() {
    let folder = tempfile::tempdir().unwrap();
    let record = folder.path().join("record");
    let serving = Serving::start(settings(), Limits::default(), Some(record.clone()));
    let mut served = Vec::new();
    for turn in 0..70 {
        let prompt: Vec<u32> = (0..20 + turn % 3).collect();
        let body = json!({
            "prompt": prompt, "max_tokens": 1 + turn % 5, "temperature": 0, "ignore_eos": true,
            "depthwise": {"session": format!("user {}", turn % 2)},
        });
        served.push((prompt.len() as u32, choice(&[serving.complete(&body).json()])));
    }
    serving.end().unwrap();
    let trace = RequestTrace::read(record.join("requests.csv")).unwrap();
    let exits = ExitTrace::read(&record).unwrap();
    assert_eq!((trace.requests.len(), exits.num_generations()), (70, 70));
    for ((request, (prompt_tokens, (_, tokens, depths))), index) in trace.requests.iter().zip(&served).zip(0..) {
        assert_eq!((request.prompt_tokens, request.output_tokens), (*prompt_tokens, tokens.len() as u32));
        let exit = |token| exits.confident_depth(token, traces::ExitSignal::Margin, 0.5) as u8;
        assert_eq!(exits.generation(index).map(exit).collect::<Vec<_>>(), *depths, "request {index}");
        let predicted = |(token, depth): (usize, &u8)| exits.predictions[token * 4 + usize::from(*depth)];
        assert_eq!(exits.generation(index).zip(depths).map(predicted).collect::<Vec<_>>(), *tokens);
    }
    let sessions = trace.sessions.unwrap();
    assert_eq!((sessions.count(), sessions.num_following()), (2, 68));
    let hashes = trace.prefix_hashes.unwrap();
    assert_eq!((hashes.of(0).len(), hashes.of(0)), (1, hashes.of(1)), "prompts that begin alike");
    let log = PassLog::read(record.join("passes-000000.parquet")).unwrap();
    let rows: u32 = log.runs[0].passes.iter().map(|pass| pass.work.rows).sum();
    let tokens: usize = served.iter().flat_map(|(_, (_, _, depths))| depths).map(|depth| usize::from(*depth) + 1).sum();
    assert!(rows as usize >= tokens);
    let again = Serving::start(settings(), Limits::default(), Some(record));
    assert!(again.end().unwrap_err().to_string().contains("a folder that is not empty"));
}

#[test]
fn a_recording_of_all_depths_has_what_skipped_depths_would_have_said() {
    let folder = tempfile::tempdir().unwrap();
    let ask = |serving: &Serving, request: u32| {
        let prompt: Vec<u32> = (request..request + 20).collect();
        choice(&[serving
            .complete(&json!({"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": true}))
            .json()])
    };
    let record = |name: &str, all_depths| {
        let path = folder.path().join(name);
        let serving = Serving::of(settings(), Limits::default(), Some(path.clone()), all_depths, None);
        let served: Vec<_> = (0..10).map(|request| ask(&serving, request)).collect();
        serving.end().unwrap();
        (served, ExitTrace::read(path).unwrap())
    };
    let ((served, run), (alike, all)) = (record("run", false), record("all", true));
    assert_eq!(served, alike, "what is recorded changes nothing that is served");
    let depths: Vec<usize> = served.iter().flat_map(|(_, _, depths)| depths).map(|depth| usize::from(*depth)).collect();
    let mut unsure = 0;
    for (token, &exit) in depths.iter().enumerate() {
        for depth in 0..4 {
            let (found, known) = (all.signals_at(token, depth), run.signals_at(token, depth));
            match depth <= exit {
                true => assert_eq!(found, known, "token {token}, depth {depth}"),
                false => {
                    assert_eq!(*known, traces::Signals::certain(true));
                    unsure += usize::from(found.top1 < 1.0);
                }
            }
        }
    }
    let skipped: usize = depths.iter().map(|exit| 3 - exit).sum();
    assert!(skipped > 20 && unsure == skipped, "{unsure} of {skipped} skipped depths are not sure");
}

#[test]
fn tokens_that_come_within_the_interval_of_streams_share_a_chunk() {
    let limits = Limits { stream_interval: Duration::from_secs(3600), ..Limits::default() };
    let serving = Serving::start(settings(), limits, None);
    let body =
        |stream| json!({"prompt": "a", "max_tokens": 40, "temperature": 0, "ignore_eos": true, "stream": stream});
    let whole = choice(&[serving.complete(&body(false)).json()]);
    let chunks = serving.complete(&body(true)).chunks();
    // The first token, and at the end all others; or all at once, if the connection was slow.
    assert!(chunks.len() <= 2, "{chunks:?}");
    assert_eq!(choice(&chunks), whole);
    serving.end().unwrap();
}
