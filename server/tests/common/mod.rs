//! A tiny model behind a server in this process, and a client that speaks HTTP by hand.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use candle_core::{Device, Tensor};
use engine::weights::Weights;
use engine::{DeviceName, Engine, ModelConfig, Tokenizer, WeightType};
use scheduler::{Batching, Settings};
use serde_json::Value;
use server::{ChatTemplate, Limits, Model, Recording, ServerError};
use traces::PassLogMeta;
use traces::hash::mix;

/// Tokens of the tiny model: all bytes, and merges of common pairs.
pub const VOCABULARY: usize = 300;

const TEXT: &str = "In the beginning God created the heaven and the earth. And the earth was without form, and void; and \
                    darkness was upon the face of the deep. And the Spirit of God moved upon the face of the waters.";

/// A model of four loops whose logits differ from token to token.
pub fn model() -> (Engine, Tokenizer) {
    let shipped = Path::new(env!("CARGO_MANIFEST_DIR")).join("../models/kjv/config.json");
    let config = ModelConfig {
        vocab_size: VOCABULARY,
        hidden_size: 32,
        intermediate_size: 48,
        num_heads: 2,
        num_kv_heads: 1,
        head_dim: 16,
        block_layers: 1,
        max_positions: 256,
        lora: None,
        ..ModelConfig::load(&shipped).unwrap()
    };
    let fresh = Weights::random(config.clone(), 3).unwrap();
    let mut tensors = HashMap::new();
    for (name, tensor) in fresh.tensors() {
        let spread = if name.ends_with("norm.weight") { 0.3 } else { 0.0 };
        let noise = |index| (mix(index) as f32 / u64::MAX as f32 - 0.5) * spread;
        let noise = Tensor::from_iter((0..tensor.elem_count() as u64).map(noise), &Device::Cpu).unwrap();
        let scale = if name.contains("embed_tokens") { 12.0 } else { 1.0 };
        tensors.insert(name.clone(), ((tensor * scale).unwrap() + noise.reshape(tensor.shape()).unwrap()).unwrap());
    }
    let weights = Weights::from_tensors(config, tensors, "test").unwrap();
    let engine = Engine::new(DeviceName::Cpu.serve(&weights, WeightType::F32).unwrap());
    (engine, Tokenizer::train(TEXT, VOCABULARY).unwrap())
}

/// Settings under which some tokens of the tiny model exit early.
pub fn settings() -> Settings {
    Settings {
        max_batch: 16,
        token_budget: 64,
        prefill_chunk: 16,
        num_blocks: 256,
        ..Settings::new(Batching::Depth, "margin:0.5".parse().unwrap(), 4)
    }
}

/// A server that ends when this is dropped.
pub struct Serving {
    pub address: SocketAddr,
    stop: &'static AtomicBool,
    thread: Option<JoinHandle<Result<(), ServerError>>>,
}

impl Serving {
    pub fn start(settings: Settings, limits: Limits, record: Option<PathBuf>) -> Self {
        Self::of(settings, limits, record, false, None)
    }

    /// A server that records all depths or those that tokens ran, with a template for chats.
    pub fn of(
        settings: Settings,
        limits: Limits,
        record: Option<PathBuf>,
        all_depths: bool,
        chat_template: Option<ChatTemplate>,
    ) -> Self {
        let (engine, tokenizer) = model();
        let recording = record.map(|folder| Recording {
            folder,
            exits: engine.exit_trace_meta("tiny", "served"),
            signals: engine.recorded_signals(),
            passes: PassLogMeta::new("tiny", engine.model.fingerprint(), 4, "a CPU"),
            all_depths,
        });
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let (address, stop) = (listener.local_addr().unwrap(), &*Box::leak(Box::new(AtomicBool::new(false))));
        let model = Model { name: "tiny".to_owned(), engine, tokenizer, chat_template, temperature: 1.0 };
        let thread = std::thread::spawn(move || server::serve(listener, model, settings, limits, recording, stop));
        Self { address, stop, thread: Some(thread) }
    }

    /// Ends the server as Ctrl-C does, and returns how it went.
    pub fn end(mut self) -> Result<(), ServerError> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap()
    }

    /// Asks it to end, and goes on.
    pub fn begin_to_end(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// Sends bytes as they are and reads the answer to its end.
    pub fn raw(&self, bytes: &[u8]) -> Answer {
        let mut stream = self.connect();
        stream.write_all(bytes).unwrap();
        Answer::read(stream)
    }

    pub fn get(&self, path: &str) -> Answer {
        self.raw(format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n").as_bytes())
    }

    /// Posts a body and leaves the answer to be read.
    pub fn begin_post(&self, path: &str, body: &[u8]) -> TcpStream {
        let mut stream = self.connect();
        let length = body.len();
        let head =
            format!("POST {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n");
        stream.write_all(&[head.as_bytes(), body].concat()).unwrap();
        stream
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        Answer::read(self.begin_post(path, body.to_string().as_bytes()))
    }

    pub fn complete(&self, body: &Value) -> Answer {
        self.post("/v1/completions", body)
    }

    /// The value of a metric without labels beside the model's.
    pub fn metric(&self, name: &str) -> f64 {
        let text = self.get("/metrics").text();
        let line =
            text.lines().find(|line| line.starts_with(&format!("{name}{{")) || line.starts_with(&format!("{name} ")));
        line.unwrap_or_else(|| panic!("no {name} in {text}")).rsplit(' ').next().unwrap().parse().unwrap()
    }

    /// Waits until nothing runs, waits or holds blocks.
    pub fn wait_until_idle(&self) {
        let busy = || {
            let gauges = ["vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"];
            gauges.iter().any(|name| self.metric(name) > 0.0)
        };
        let tries = (0..600).take_while(|_| busy()).inspect(|_| std::thread::sleep(Duration::from_millis(50)));
        assert!(tries.count() < 600, "something is left:\n{}", self.get("/metrics").text());
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An answer that was read to its end.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn read(stream: TcpStream) -> Self {
        let mut reader = BufReader::new(stream);
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            assert!(reader.read_line(&mut head).unwrap() > 0, "the head ends early: {head}");
        }
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let mut body = Vec::new();
        if head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
            loop {
                let mut size = String::new();
                reader.read_line(&mut size).unwrap();
                let size = usize::from_str_radix(size.trim(), 16).unwrap();
                let start = body.len();
                body.resize(start + size, 0);
                reader.read_exact(&mut body[start..]).unwrap();
                reader.read_exact(&mut [0; 2]).unwrap();
                if size == 0 {
                    break;
                }
            }
        } else {
            reader.read_to_end(&mut body).unwrap();
        }
        Self { status, head, body }
    }

    pub fn text(&self) -> String {
        String::from_utf8(self.body.clone()).unwrap()
    }

    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.text()))
    }

    /// The message of an error.
    pub fn message(&self) -> String {
        self.json()["error"]["message"].as_str().unwrap_or_else(|| panic!("{}", self.text())).to_owned()
    }

    /// The chunks of a stream, which must be whole.
    pub fn chunks(&self) -> Vec<Value> {
        let text = self.text();
        let mut events: Vec<&str> =
            text.split_terminator("\n\n").map(|event| event.strip_prefix("data: ").unwrap()).collect();
        assert_eq!(events.pop(), Some("[DONE]"), "{text}");
        events.into_iter().map(|event| serde_json::from_str(event).unwrap()).collect()
    }
}

/// Text, tokens and depths of the first choice of a whole answer, or of the chunks of one.
pub fn choice(chunks: &[Value]) -> (String, Vec<u32>, Vec<u8>) {
    let mut found = (String::new(), Vec::new(), Vec::new());
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        found.0 += choice["text"].as_str().unwrap();
        let own = &choice["depthwise"];
        found.1.extend(own["token_ids"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32));
        found.2.extend(own["depths"].as_array().unwrap().iter().map(|depth| depth.as_u64().unwrap() as u8));
    }
    found
}

/// The engine's own answer: text, tokens and depths.
pub fn generated(
    engine: &Engine,
    tokenizer: &Tokenizer,
    settings: Settings,
    prompt: &[u32],
    output_tokens: u32,
) -> (String, Vec<u32>, Vec<u8>) {
    use engine::Prompts;
    use traces::{Nanos, Request};
    let prompts = Arc::new(Prompts::Given(HashMap::from([(0, prompt.to_vec())])));
    let engine = Engine { prompts, ..engine.clone() };
    let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: prompt.len() as u32, output_tokens };
    let mut stream = tokenizer.stream();
    prompt.iter().for_each(|&token| drop(stream.push(token).unwrap()));
    let mut found = (String::new(), Vec::new(), Vec::new());
    engine
        .generate(settings, &[request], |generated| {
            found.0 += &stream.push(generated.token).unwrap().unwrap_or_default();
            found.1.push(generated.token);
            found.2.push(generated.depth);
            std::ops::ControlFlow::Continue(())
        })
        .unwrap();
    found
}
