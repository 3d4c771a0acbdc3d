//! A server with OpenAI's API that does what a test says, and records when. Tests of several crates use it.

#![allow(dead_code, reason = "each of them uses a part")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// One step of an answer.
#[derive(Clone, Debug)]
pub enum Step {
    /// Sends bytes as they are.
    Send(Vec<u8>),
    /// Waits.
    Wait(Duration),
    /// Waits until the client has closed the connection.
    WaitForClient,
}

/// One request as the server saw it.
#[derive(Clone, Debug)]
pub struct Served {
    /// The body of the request.
    pub body: Value,
    /// When it had been read.
    pub received: Instant,
    /// When each piece was about to be sent, in order.
    pub sent: Vec<Instant>,
    /// Number of requests in service when this one arrived, itself included.
    pub in_service: usize,
    /// Whether every step was done.
    pub is_over: bool,
}

/// What happened so far.
#[derive(Debug, Default)]
struct Record {
    served: Vec<Served>,
    in_service: usize,
}

/// A running server; it ends with the test's process.
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    record: Arc<Mutex<Record>>,
}

impl Server {
    /// Starts a server that answers requests for tokens by the steps that `script` gives for their bodies.
    pub fn start(script: impl Fn(&Value) -> Vec<Step> + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (record, script) = (Arc::new(Mutex::new(Record::default())), Arc::new(script));
        let shared = record.clone();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (record, script) = (shared.clone(), script.clone());
                thread::spawn(move || serve(stream.unwrap(), &record, &*script));
            }
        });
        Self { address, record }
    }

    /// The address as an option of the client.
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Requests for tokens in the order in which they came.
    pub fn served(&self) -> Vec<Served> {
        self.record.lock().unwrap().served.clone()
    }
}

/// Serves one request of a connection and closes it, without a word about that.
fn serve(stream: TcpStream, record: &Mutex<Record>, script: &dyn Fn(&Value) -> Vec<Step>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut line = String::new();
    let (mut path, mut length) = (String::new(), 0);
    while reader.read_line(&mut line).unwrap_or(0) > 2 {
        if let Some(rest) = line.to_lowercase().strip_prefix("content-length:") {
            length = rest.trim().parse().unwrap();
        } else if path.is_empty() {
            path = line.split(' ').nth(1).unwrap_or_default().to_owned();
        }
        line.clear();
    }
    let mut body = vec![0; length];
    if path.is_empty() || reader.read_exact(&mut body).is_err() {
        return;
    }
    let mut stream = stream;
    if path == "/v1/models" {
        let models = json!({"object": "list", "data": [{"id": "scripted", "meta": {"n_vocab": 1000}}]});
        let _ = stream.write_all(&whole(200, "", &models.to_string()));
        return;
    }
    let body: Value = serde_json::from_slice(&body).unwrap();
    let steps = script(&body);
    let place = {
        let mut record = record.lock().unwrap();
        record.in_service += 1;
        let in_service = record.in_service;
        record.served.push(Served { body, received: Instant::now(), sent: Vec::new(), in_service, is_over: false });
        record.served.len() - 1
    };
    let last = steps.len().saturating_sub(1);
    for (number, step) in steps.into_iter().enumerate() {
        if number == last {
            // Before the client can see the end.
            record.lock().unwrap().in_service -= 1;
        }
        match step {
            Step::Send(bytes) => {
                record.lock().unwrap().served[place].sent.push(Instant::now());
                // The client may have gone.
                let _ = stream.write_all(&bytes).and_then(|()| stream.flush());
            }
            Step::Wait(time) => thread::sleep(time),
            Step::WaitForClient => while reader.read(&mut [0]).is_ok_and(|length| length > 0) {},
        }
    }
    record.lock().unwrap().served[place].is_over = true;
}

/// An answer that is not streamed. `header` is a line of its own, or empty.
pub fn whole(status: u16, header: &str, body: &str) -> Vec<u8> {
    let length = body.len();
    let answer = format!("HTTP/1.1 {status} Status\r\n{header}content-length: {length}\r\n\r\n{body}");
    answer.into_bytes()
}

/// The beginning of a streamed answer, which ends with the connection.
pub fn head() -> Step {
    Step::Send(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n".to_vec())
}

/// An event of the stream.
pub fn event(data: &str) -> Step {
    Step::Send(format!("data: {data}\n\n").into_bytes())
}

/// The event of a token; the last one of an answer ends it.
pub fn token(is_last: bool) -> Step {
    let reason = if is_last { json!("length") } else { Value::Null };
    event(&json!({"choices": [{"index": 0, "text": "a", "finish_reason": reason}]}).to_string())
}

/// What the server says of the numbers of tokens.
pub fn usage(prompt_tokens: u64, completion_tokens: u64) -> Step {
    let usage = json!({"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens});
    event(&json!({"choices": [], "usage": usage}).to_string())
}

/// The tokens that a body asks for.
pub fn asked_tokens(body: &Value) -> u64 {
    body["max_tokens"].as_u64().unwrap()
}

/// A whole answer with the lengths that were asked for, `gap` between its tokens.
pub fn answer(body: &Value, gap: Duration) -> Vec<Step> {
    let tokens = asked_tokens(body);
    let prompt = body["prompt"].as_array().map_or(0, |ids| ids.len() as u64);
    let mut steps = vec![head()];
    for place in 0..tokens {
        steps.extend([Step::Wait(gap), token(place + 1 == tokens)]);
    }
    steps.extend([usage(prompt, tokens), event("[DONE]")]);
    steps
}
