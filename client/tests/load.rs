//! The client against a server whose answers are scripted.

mod common;

use std::io::{Read, Write};
use std::net::TcpListener;
use std::num::NonZeroU32;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use client::{
    ApiOptions, Client, ClientAccount, Endpoint, Exchange, FailureKind, Measurement, PromptSource, Prompts,
    ServerPolicy,
};
use common::{Server, Step, answer, asked_tokens, event, head, token, usage, whole};
use scheduler::{Batching, ClosedLoad, ExitPolicy, KvFill, Load, OpenLoad};
use serde_json::Value;
use traces::{ClosedLoop, Link, Nanos, Request, Sessions};

const GAP: Duration = Duration::from_millis(2);

fn options(url: String) -> ApiOptions {
    ApiOptions {
        url,
        endpoint: Endpoint::Completions,
        model: None,
        api_key: None,
        timeout: Duration::from_secs(60),
        retries: 0,
        extra_body: serde_json::Map::new(),
    }
}

fn connect(server: &Server) -> Client {
    Client::connect(options(server.url())).unwrap()
}

/// Request `id` has `id + 3` prompt tokens and `id + 1` output tokens, and arrives at once.
fn requests(count: u32) -> Vec<Request> {
    (0..count).map(|id| Request { id, arrival: Nanos::ZERO, prompt_tokens: id + 3, output_tokens: id + 1 }).collect()
}

fn send(client: &Client, mut load: impl Load) -> Vec<Exchange> {
    let prompts = Prompts::new(PromptSource::vocabulary(client.vocabulary().unwrap()), None, 1);
    let mut exchanges = Vec::new();
    let left = client.send(&mut load, &prompts, &AtomicBool::new(false), |exchange| exchanges.push(exchange)).unwrap();
    assert_eq!(left, 0);
    exchanges.sort_by_key(|exchange| exchange.request.id);
    exchanges
}

fn measure(exchanges: &[Exchange]) -> Measurement {
    let server =
        ServerPolicy { batching: Batching::Vanilla, exit: ExitPolicy::None, kv_fill: KvFill::Reuse, max_batch: 0 };
    let mut measurement = Measurement::new(server, None);
    exchanges.iter().for_each(|exchange| measurement.add(exchange));
    measurement
}

/// What a step sends.
fn bytes(step: Step) -> Vec<u8> {
    match step {
        Step::Send(bytes) => bytes,
        other => panic!("found {other:?}"),
    }
}

#[test]
fn every_token_is_seen_after_the_server_sent_it_and_the_body_asks_for_the_lengths_of_the_trace() {
    let server = Server::start(|body| answer(body, GAP));
    let client = connect(&server);
    assert_eq!(client.model(), "scripted");
    let exchanges = send(&client, OpenLoad::new(requests(5)));
    let mut served = server.served();
    served.sort_by_key(|served| asked_tokens(&served.body));
    assert_eq!((exchanges.len(), served.len()), (5, 5));
    for (exchange, served) in exchanges.iter().zip(&served) {
        let Exchange { request, sent, ended, retries, outcome } = exchange;
        let answer = outcome.as_ref().unwrap();
        assert_eq!(answer.num_tokens(), request.output_tokens);
        assert_eq!((answer.pieces.len(), *retries), (request.output_tokens as usize, 0));
        // The head comes first. What was sent before the server had the request ends after the server sends a token.
        for (seen, token) in answer.pieces.iter().zip(&served.sent[1..]) {
            let at_least = Nanos::from(*token - served.received);
            assert!(seen.since(*sent) >= at_least, "{exchange:?} {served:?}");
        }
        assert!(answer.pieces.is_sorted() && answer.pieces.last() <= Some(ended), "{exchange:?}");
        let body = &served.body;
        let ids: Vec<u64> = body["prompt"].as_array().unwrap().iter().map(|id| id.as_u64().unwrap()).collect();
        assert_eq!(ids.len(), request.prompt_tokens as usize);
        assert!(ids.iter().all(|id| (250..750).contains(id)), "{ids:?}");
        assert_eq!(
            (&body["min_tokens"], &body["ignore_eos"]),
            (&Value::from(request.output_tokens), &Value::from(true))
        );
        assert_eq!((&body["model"], &body["stream"]), (&Value::from("scripted"), &Value::from(true)));
    }
}

#[test]
fn the_first_token_is_seen_when_it_comes_not_when_the_answer_ends() {
    let server = Server::start(|_| vec![head(), token(false), Step::Wait(100 * GAP), token(true)]);
    let exchange = &send(&connect(&server), OpenLoad::new(requests(1)))[0];
    let pieces = &exchange.outcome.as_ref().unwrap().pieces;
    assert!(pieces[0] < pieces[1], "{pieces:?}");
}

#[test]
fn an_answer_that_is_split_at_any_byte_has_the_same_tokens() {
    let steps = [token(false), token(true), usage(3, 2), event("[DONE]")];
    let stream: Vec<u8> = steps.into_iter().flat_map(bytes).collect();
    let length = stream.len();
    let server = Server::start(move |body| {
        let split = asked_tokens(body) as usize;
        let (first, second) = (stream[..split].to_vec(), stream[split..].to_vec());
        vec![head(), Step::Send(first), Step::Wait(GAP), Step::Send(second)]
    });
    let split = |id: u32| Request { id, arrival: Nanos::ZERO, prompt_tokens: 3, output_tokens: id + 1 };
    let closed_loop = ClosedLoop::in_flight(NonZeroU32::new(16).unwrap());
    let exchanges = send(&connect(&server), ClosedLoad::new(closed_loop, (0..length as u32 - 1).map(split)));
    assert_eq!(exchanges.len(), length - 1);
    for exchange in exchanges {
        let answer = exchange.outcome.as_ref().unwrap_or_else(|failure| panic!("{failure}: {exchange:?}"));
        assert_eq!((answer.pieces.len(), answer.num_tokens()), (2, 2), "{exchange:?}");
    }
}

#[test]
fn a_connection_that_a_server_keeps_open_is_not_used_again() {
    let server = Server::start(|_| {
        let stream: Vec<u8> = [token(true), event("[DONE]")].into_iter().flat_map(bytes).collect();
        let answer = whole(200, "", &String::from_utf8(stream).unwrap());
        // The server would drop what comes next on the connection.
        vec![Step::Send(answer), Step::WaitForClient]
    });
    let closed_loop = ClosedLoop::in_flight(NonZeroU32::MIN);
    let exchanges = send(&connect(&server), ClosedLoad::new(closed_loop, requests(3)));
    assert!(exchanges.iter().all(|exchange| exchange.outcome.is_ok()), "{exchanges:?}");
}

#[test]
fn a_closed_loop_keeps_its_number_of_requests_in_flight_and_never_more() {
    let server = Server::start(|body| answer(body, GAP));
    let number = NonZeroU32::new(3).unwrap();
    let exchanges = send(&connect(&server), ClosedLoad::new(ClosedLoop::in_flight(number), requests(20)));
    assert_eq!(exchanges.len(), 20);
    let in_service: Vec<usize> = server.served().iter().map(|served| served.in_service).collect();
    assert_eq!(in_service.iter().max(), Some(&3), "{in_service:?}");
}

#[test]
fn requests_of_a_session_wait_for_the_answer_before_and_the_think_time() {
    let server = Server::start(|body| answer(body, GAP));
    let think = Nanos(5_000_000);
    // Sessions of the even and the odd requests.
    let link = |id: u32| Link { session: Some(id % 2), think: (id > 1).then_some(think), is_timed: id < 2 };
    let sessions = Sessions::new((0..8).map(link));
    let closed_loop = ClosedLoop::of_sessions("test", sessions).unwrap();
    let exchanges = send(&connect(&server), ClosedLoad::new(closed_loop, requests(8)));
    for pair in exchanges.windows(3) {
        assert!(pair[2].sent >= pair[0].ended + think, "{pair:?}");
    }
    let order: Vec<u64> = server.served().iter().map(|served| asked_tokens(&served.body)).collect();
    for parity in 0..2 {
        let session: Vec<u64> = order.iter().copied().filter(|tokens| tokens % 2 == parity).collect();
        assert!(session.is_sorted() && session.len() == 4, "{order:?}");
    }
}

/// The server of the failures: what comes of a request is decided by its output tokens.
fn failing(body: &Value) -> Vec<Step> {
    let whole = |status, header, body: &str| vec![Step::Send(whole(status, header, body))];
    match asked_tokens(body) {
        1 => whole(400, "", "prompt too long"),
        2 => whole(500, "", "out of memory"),
        3 => whole(429, "retry-after: 0\r\n", "later"),
        4 => vec![head(), token(false)],
        5 => vec![head(), token(false), Step::WaitForClient],
        6 => vec![head(), event("<html>")],
        7 => vec![head(), token(false), event(r#"{"error": {"message": "engine died"}}"#)],
        8 => vec![head(), event("[DONE]")],
        // Closed before the answer begins.
        9 => Vec::new(),
        _ => answer(body, GAP),
    }
}

#[test]
fn each_kind_of_failure_is_counted_and_the_run_goes_on() {
    let server = Server::start(failing);
    let options = ApiOptions { timeout: Duration::from_millis(400), ..options(server.url()) };
    let client = Client::connect(options).unwrap();
    let measurement = measure(&send(&client, OpenLoad::new(requests(12))));
    let kinds: Vec<(FailureKind, usize)> = measurement.failures_by_kind().collect();
    let expected = [
        (FailureKind::RateLimited, 1),
        (FailureKind::BadRequest, 1),
        (FailureKind::ServerError, 1),
        (FailureKind::Timeout, 1),
        (FailureKind::Cut, 2),
        (FailureKind::Reported, 1),
        (FailureKind::Protocol, 1),
        (FailureKind::Empty, 1),
    ];
    assert_eq!(kinds, expected, "{:?}", measurement.failures());
    let messages: Vec<&str> = measurement.failures().iter().map(|row| &row.message[..]).collect();
    for part in ["prompt too long", "out of memory", "engine died", "after 0.4 s", "`<html>`", "after 1 pieces"] {
        assert!(messages.iter().any(|message| message.contains(part)), "{part}: {messages:?}");
    }
    let account = measurement.account(0);
    assert_eq!((account.requests, account.answered, account.failed), (12, 3, 9));
    assert_eq!(measurement.summary().requests, 3);
    assert_eq!(measurement.summary().output_tokens, 10 + 11 + 12);
}

#[test]
fn a_server_that_goes_away_is_a_failure_of_each_request_and_one_that_never_was_an_error() {
    let closed = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", closed.local_addr().unwrap());
    drop(closed);
    let error = Client::connect(options(url)).unwrap_err().to_string();
    assert!(error.contains("/v1/models: no connection: "), "{error}");

    let server = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", server.local_addr().unwrap());
    let models = r#"{"data": [{"id": "m", "meta": {"n_vocab": 9}}]}"#;
    let once = std::thread::spawn(move || answer_once(&server, models));
    let client = Client::connect(options(url)).unwrap();
    once.join().unwrap();
    let measurement = measure(&send(&client, OpenLoad::new(requests(3))));
    assert_eq!(measurement.failures_by_kind().collect::<Vec<_>>(), [(FailureKind::Connection, 3)]);
}

#[test]
fn a_request_is_sent_again_when_the_server_asks_and_as_often_as_allowed() {
    let left = std::sync::atomic::AtomicI32::new(3);
    let server = Server::start(move |body| match left.fetch_sub(1, Ordering::Relaxed) {
        1.. => vec![Step::Send(whole(429, "retry-after: 0\r\n", "later"))],
        _ => answer(body, GAP),
    });
    let client = Client::connect(ApiOptions { retries: 2, ..options(server.url()) }).unwrap();
    let exchanges = send(&client, OpenLoad::new(requests(1)));
    assert_eq!((exchanges[0].retries, server.served().len()), (2, 3));
    assert_eq!(exchanges[0].outcome.as_ref().unwrap_err().kind, FailureKind::RateLimited);
    let exchanges = send(&client, OpenLoad::new(requests(1)));
    assert_eq!((exchanges[0].retries, exchanges[0].outcome.is_ok()), (0, true));
}

#[test]
fn answers_of_other_lengths_than_asked_for_are_counted() {
    let server = Server::start(|body| match asked_tokens(body) {
        // One prompt token more, as a server that adds one at the beginning.
        1 => vec![head(), token(true), usage(4, 1), event("[DONE]")],
        // Two of three tokens.
        3 => vec![head(), token(false), token(true), usage(5, 2)],
        // No usage.
        4 => vec![head(), token(false), token(false), token(false), token(true)],
        // Two tokens in one piece.
        5 => vec![head(), token(false), Step::Wait(GAP), token(true), usage(7, 5)],
        _ => answer(body, GAP),
    });
    let measurement = measure(&send(&connect(&server), OpenLoad::new(requests(5))));
    let found =
        ClientAccount { lag_mean_ms: 0.0, lag_p50_ms: 0.0, lag_p99_ms: 0.0, lag_max_ms: 0.0, ..measurement.account(0) };
    let expected = ClientAccount {
        requests: 5,
        answered: 5,
        without_usage: 1,
        other_prompt_lengths: 1,
        other_output_lengths: 1,
        prompt_tokens_asked: 3 + 4 + 5 + 6 + 7,
        prompt_tokens: 4 + 4 + 5 + 6 + 7,
        output_tokens_asked: 1 + 2 + 3 + 4 + 5,
        output_tokens: 1 + 2 + 2 + 4 + 5,
        ..ClientAccount::default()
    };
    assert_eq!(found, expected);
    // Gaps between pieces: one of 2 tokens, of the 2 of 3, three of 4, one of the 5 in two pieces.
    assert_eq!(measurement.metrics().itl().count(), 1 + 1 + 3 + 1);
    assert_eq!(measurement.summary().output_tokens, expected.output_tokens);
}

#[test]
fn a_load_that_is_stopped_keeps_what_was_answered() {
    let server = Server::start(|body| match asked_tokens(body) {
        1 => answer(body, GAP),
        _ => vec![head(), Step::WaitForClient],
    });
    let client = connect(&server);
    let prompts = Prompts::new(PromptSource::vocabulary(100), None, 1);
    let (stop, mut answered) = (AtomicBool::new(false), 0);
    let left = client.send(&mut OpenLoad::new(requests(4)), &prompts, &stop, |exchange| {
        answered += u32::from(exchange.outcome.is_ok());
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!((left, answered), (Ok(3), 1));
}

#[test]
fn a_server_says_how_many_tokens_it_makes_of_words() {
    // Two tokens of each word, and three beside them.
    let server = Server::start(|body| {
        let words = body["messages"][0]["content"].as_str().unwrap().split(' ').count();
        assert_eq!((asked_tokens(body), &body["stream"]), (1, &Value::from(false)));
        let usage = format!(r#"{{"choices": [], "usage": {{"prompt_tokens": {}}}}}"#, 2 * words + 3);
        vec![Step::Send(whole(200, "", &usage))]
    });
    let client = Client::connect(ApiOptions { endpoint: Endpoint::Chat, ..options(server.url()) }).unwrap();
    let words: Vec<String> = ["in", "the", "beginning"].map(str::to_owned).into();
    let counted = client.count_tokens(&words).unwrap();
    assert_eq!((counted.tokens_per_word, counted.fixed), (2.0, 3.0));
}

#[test]
fn a_server_of_ours_says_what_it_runs() {
    let models = |own: &str| format!(r#"{{"data": [{{"id": "m", "depthwise": {own}}}]}}"#);
    let of = |own: &str| {
        let models = models(own);
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/v1/", listener.local_addr().unwrap());
        let once = std::thread::spawn(move || answer_once(&listener, &models));
        let client = Client::connect(options(url)).unwrap();
        once.join().unwrap();
        assert!(client.vocabulary().unwrap_err().to_string().contains("found no meta.n_vocab, expected"));
        client.policy()
    };
    let own = r#"{"num_loops": 4, "batching": "depth", "exit": "gate:0.5", "kv_fill": "skip", "max_batch": 8}"#;
    let (batching, exit) = (Batching::Depth, "gate:0.5".parse().unwrap());
    assert_eq!(of(own), Some(ServerPolicy { batching, exit, kv_fill: KvFill::Skip, max_batch: 8 }));
    assert_eq!(of(r#"{"batching": "sideways"}"#), None);
}

/// Answers one request with this list of models.
fn answer_once(listener: &TcpListener, models: &str) {
    let (mut stream, _) = listener.accept().unwrap();
    assert!(stream.read(&mut [0; 1 << 10]).unwrap() > 0);
    stream.write_all(&whole(200, "", models)).unwrap();
}

#[test]
fn fields_of_the_body_are_added_replaced_and_removed() {
    let server = Server::start(|body| answer(body, GAP));
    let extra = serde_json::json!({"temperature": 0.5, "ignore_eos": null, "priority": 3});
    let extra_body = extra.as_object().unwrap().clone();
    let client = Client::connect(ApiOptions { extra_body, ..options(server.url()) }).unwrap();
    send(&client, OpenLoad::new(requests(1)));
    let body = &server.served()[0].body;
    assert_eq!((&body["temperature"], &body["priority"]), (&Value::from(0.5), &Value::from(3)));
    assert!(body.get("ignore_eos").is_none(), "{body}");
}

#[test]
fn addresses_that_are_none_are_refused() {
    for url in ["", "localhost:8000", "https://localhost:8000", "http://localhost/?x=1", "unix:/tmp/x"] {
        let error = Client::connect(options(url.to_owned())).unwrap_err().to_string();
        assert!(error.starts_with(&format!("found address `{url}`, expected http://HOST:PORT")), "{error}");
    }
}
