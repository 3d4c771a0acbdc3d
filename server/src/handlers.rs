//! The HTTP interface: what each path does.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{DefaultBodyLimit, FromRequest, Request as HttpRequest, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use engine::{ServedModel, Tokenizer};
use scheduler::{ScheduleError, Settings};
use serde::Serialize;
use serde_json::json;
use tokio::sync::mpsc::{UnboundedReceiver, channel, unbounded_channel};
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use traces::{Nanos, Request};

use crate::api::answers::{Heading, Kind, Part, Usage};
use crate::api::error::{ApiError, json_response};
use crate::api::wishes::{Chat, Completion, MOST_CHOICES, Prompt, Wishes};
use crate::chat::ChatTemplate;
use crate::metrics::Metrics;
use crate::text::{Gain, Text};
use crate::worker::{Command, Event, Finish, Generated, Job};
use crate::{Limits, Model};

/// Largest body of a request, in bytes.
const MOST_BODY: usize = 8 << 20;
/// Body from which on it is read on a thread of its own.
const LARGE_BODY: usize = 16 << 10;
/// Longest wait for a body.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);
/// Pieces of a stream that wait for a slow reader.
const CHUNKS: usize = 16;
/// Tokens to generate for a completion by default, as at OpenAI.
const DEFAULT_TOKENS: u32 = 16;

/// What all handlers share.
pub(crate) struct App {
    pub name: String,
    pub served: Arc<dyn ServedModel>,
    pub tokenizer: Arc<Tokenizer>,
    /// Tokens of the vocabulary that end a text, in order.
    pub special: Arc<[u32]>,
    pub template: Option<ChatTemplate>,
    pub settings: Settings,
    pub limits: Limits,
    pub temperature: f32,
    pub metrics: Arc<Metrics>,
    commands: Sender<Command>,
    next_id: AtomicU32,
    requests: AtomicU64,
    tokens: AtomicU64,
    /// Whether new requests are refused, since the server ends.
    pub is_ending: AtomicBool,
    /// Whether the engine has failed.
    pub has_failed: AtomicBool,
    created: u64,
}

/// A request that takes part of the server's limits until this is dropped, which also cancels it.
struct Place {
    app: Arc<App>,
    id: u32,
    tokens: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.app.requests.fetch_sub(1, Ordering::Relaxed);
        self.app.tokens.fetch_sub(self.tokens, Ordering::Relaxed);
        // The worker ignores requests that have ended, and may itself have.
        let _ = self.app.commands.send(Command::Cancel(self.id));
    }
}

/// A completion that runs.
struct Running {
    events: UnboundedReceiver<Event>,
    prompt: Arc<[u32]>,
    wishes: Arc<Wishes>,
    /// What the text begins with.
    echo: Option<String>,
    place: Place,
}

impl App {
    pub fn new(
        model: Model,
        settings: Settings,
        limits: Limits,
        metrics: Arc<Metrics>,
        commands: Sender<Command>,
    ) -> Self {
        let vocabulary = 0..model.engine.model.config().vocab_size as u32;
        Self {
            name: model.name,
            served: model.engine.model,
            special: vocabulary.filter(|&token| model.tokenizer.is_special(token)).collect(),
            tokenizer: Arc::new(model.tokenizer),
            template: model.chat_template,
            settings,
            limits,
            temperature: model.temperature,
            metrics,
            commands,
            next_id: AtomicU32::new(0),
            requests: AtomicU64::new(0),
            tokens: AtomicU64::new(0),
            is_ending: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            created: traces::unix_micros() / 1_000_000,
        }
    }

    /// Number of requests that run or wait.
    pub fn num_requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    fn check_open(&self) -> Result<(), ApiError> {
        match (self.has_failed.load(Ordering::Relaxed), self.is_ending.load(Ordering::Relaxed)) {
            (true, _) => Err(ApiError::failed("the engine has failed")),
            (false, true) => Err(ApiError::ending()),
            (false, false) => Ok(()),
        }
    }

    /// Starts the completions that a request asks for, all or none: `n` of each prompt.
    fn start(
        self: &Arc<Self>,
        prompts: Vec<Vec<u32>>,
        wishes: Wishes,
        default_tokens: Option<u32>,
        echoes: bool,
    ) -> Result<Vec<Running>, ApiError> {
        self.check_open()?;
        let choices = prompts.len() * wishes.n as usize;
        if choices > MOST_CHOICES {
            return Err(ApiError::key("prompt", format!("{choices} completions"), format!("at most {MOST_CHOICES}")));
        }
        let wishes = Arc::new(wishes);
        let mut asked = Vec::new();
        for prompt in prompts {
            let request = self.check(&prompt, &wishes, default_tokens)?;
            let echo = echoes.then(|| self.tokenizer.decode(&prompt)).transpose();
            let echo = echo.map_err(|error| ApiError::invalid(error.to_string()))?;
            asked.push((Arc::<[u32]>::from(prompt), request, echo));
        }
        let places = asked.iter().flat_map(|(_, request, _)| std::iter::repeat_n(request, wishes.n as usize));
        let places = places.map(|request| self.take_place(request)).collect::<Result<Vec<_>, _>>()?;
        let mut places = places.into_iter();
        let mut running = Vec::new();
        for (prompt, request, echo) in asked {
            for choice in 0..wishes.n {
                let place = places.next().expect("a place for each");
                let (events, received) = unbounded_channel();
                self.send(place.id, request.output_tokens, &prompt, &wishes, choice, events)?;
                let (prompt, wishes, echo) = (prompt.clone(), wishes.clone(), echo.clone());
                running.push(Running { events: received, prompt, wishes, echo, place });
            }
        }
        Ok(running)
    }

    /// Checks that a prompt can ever be served, and returns it as a request.
    fn check(&self, prompt: &[u32], wishes: &Wishes, default_tokens: Option<u32>) -> Result<Request, ApiError> {
        let config = self.served.config();
        if prompt.is_empty() {
            return Err(ApiError::key("prompt", "no token", "at least one"));
        }
        if let Some(token) =
            prompt.iter().chain(&wishes.stop_tokens).find(|token| **token as usize >= config.vocab_size)
        {
            return Err(ApiError::key(
                "prompt",
                format!("token {token}"),
                format!("tokens below {}", config.vocab_size),
            ));
        }
        let capacity = u64::from(self.settings.num_blocks) * u64::from(self.settings.block_tokens);
        let positions = capacity.min(config.max_positions as u64);
        // The last token is never an input.
        let room = (positions + 1).saturating_sub(prompt.len() as u64);
        let default_tokens = default_tokens.unwrap_or(u32::MAX).min(u32::try_from(room).unwrap_or(u32::MAX)).max(1);
        let output_tokens = wishes.max_tokens.unwrap_or(default_tokens);
        if u64::from(output_tokens) > room {
            let found = format!("{} tokens of prompt and {output_tokens} to generate", prompt.len());
            let name = if room == 0 { "prompt" } else { "max_tokens" };
            return Err(ApiError::key(
                name,
                found,
                format!("at most {positions} positions, the last token not counted"),
            ));
        }
        let request = Request { id: 0, arrival: Nanos::ZERO, prompt_tokens: prompt.len() as u32, output_tokens };
        self.settings.check_request(&request).map_err(|error| ApiError::invalid(error.to_string()))?;
        self.settings.check_terms(request.id, &wishes.terms).map_err(|error| {
            let exit = wishes.terms.exit.unwrap_or(self.settings.exit);
            let expected = match error {
                ScheduleError::OwnExit { served, .. } => {
                    format!("none, static:DEPTH or a threshold on the signal of the server's policy, {served}")
                }
                other => other.to_string(),
            };
            ApiError::key("depthwise.exit", exit, expected)
        })?;
        Ok(request)
    }

    /// Takes a place among the requests that the server takes on.
    fn take_place(self: &Arc<Self>, request: &Request) -> Result<Place, ApiError> {
        let tokens = u64::from(request.prompt_tokens) + u64::from(request.output_tokens);
        let requests = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let all_tokens = self.tokens.fetch_add(tokens, Ordering::Relaxed) + tokens;
        let place = Place { app: self.clone(), id: self.next_id.fetch_add(1, Ordering::Relaxed), tokens };
        let Limits { most_requests, most_tokens, .. } = self.limits;
        let full = match (requests > u64::from(most_requests), all_tokens > most_tokens) {
            (true, _) => format!("{most_requests} requests run or wait already"),
            (false, true) => format!("requests of {most_tokens} tokens run or wait already"),
            (false, false) => return Ok(place),
        };
        let seconds = all_tokens as f64 / self.metrics.tokens_per_s().max(1.0);
        Err(ApiError::busy(format!("{full}: try again later"), (seconds as u64).clamp(1, 60)))
    }

    fn send(
        &self,
        id: u32,
        output_tokens: u32,
        prompt: &[u32],
        wishes: &Wishes,
        choice: u32,
        events: tokio::sync::mpsc::UnboundedSender<Event>,
    ) -> Result<(), ApiError> {
        let mut decoding = wishes.decoding.clone();
        decoding.seed = decoding.seed.wrapping_add(choice.into());
        if decoding.min_tokens > 0 {
            let special = self.special.iter().filter(|_| !wishes.ignores_special);
            decoding.withheld = special.chain(&wishes.stop_tokens).copied().collect();
        }
        let job = Job {
            id,
            prompt: prompt.to_vec(),
            output_tokens,
            terms: wishes.terms,
            decoding,
            ends_at_special: !wishes.ignores_special,
            stop_tokens: wishes.stop_tokens.clone(),
            session: wishes.session.clone(),
            // A whole answer is not looked at before its end, but for stop strings.
            interval: (wishes.streams || !wishes.stops.is_empty()).then_some(self.limits.stream_interval.into()),
            events,
        };
        self.commands.send(Command::Start(Box::new(job))).map_err(|_| ApiError::failed("the engine has ended"))
    }

    fn encode(&self, text: &str) -> Result<Vec<u32>, ApiError> {
        self.tokenizer.encode_prompt(text).map_err(|error| ApiError::invalid(error.to_string()))
    }
}

impl Running {
    /// Hands the choice on, part by part: tokens that came together at once. Ends early if `each` returns `false`.
    ///
    /// # Errors
    /// If the tokenizer or the engine fails.
    async fn follow<F: Future<Output = bool>>(
        mut self,
        tokenizer: &Tokenizer,
        mut each: impl FnMut(Part) -> F,
    ) -> Result<(), ApiError> {
        let refused = |error: engine::TokenizerError| ApiError::failed(error.to_string());
        let mut text = Text::after(&self.prompt, tokenizer, &self.wishes.stops).map_err(refused)?;
        let min_tokens = self.wishes.decoding.min_tokens as usize;
        let (mut tokens, mut offset) = (0, 0);
        let mut begin = self.echo.take().unwrap_or_default();
        while let Some(first) = self.events.recv().await {
            let mut part = Part { text: std::mem::take(&mut begin), offset, ..Part::default() };
            let mut next = Some(first);
            while let Some(event) = next.take() {
                part.cached_tokens += event.cached_tokens as usize;
                for token in event.tokens {
                    tokens += 1;
                    let gain = add(&mut text, &token, tokens >= min_tokens).map_err(refused)?;
                    part.text += &gain.text;
                    part.tokens.push(token);
                    if gain.stopped {
                        part.finish = Some(Finish::Stop);
                        break;
                    }
                }
                match event.finish.filter(|_| part.finish.is_none()) {
                    Some(Finish::Error) => return Err(ApiError::failed("the engine has failed")),
                    Some(finish) => {
                        part.text += &text.finish().text;
                        part.finish = Some(finish);
                    }
                    None => {}
                }
                if part.finish.is_none() {
                    next = self.events.try_recv().ok();
                }
            }
            offset += part.text.chars().count();
            let is_last = part.finish.is_some();
            if !each(part).await || is_last {
                return Ok(());
            }
        }
        Err(ApiError::failed("the engine has ended"))
    }

    /// The whole choice.
    async fn finish(self, tokenizer: &Tokenizer) -> Result<Part, ApiError> {
        let mut whole = Part::default();
        self.follow(tokenizer, |part| {
            whole.append(part);
            std::future::ready(true)
        })
        .await?;
        Ok(whole)
    }
}

/// Adds a token to a text, if it is part of the text.
fn add(text: &mut Text<'_>, token: &Generated, may_stop: bool) -> Result<Gain, engine::TokenizerError> {
    if token.is_text { text.push(token.token, may_stop) } else { Ok(Gain::default()) }
}

/// The paths of the server.
pub(crate) fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/health", get(health))
        .route("/metrics", get(metrics))
        .route("/version", get(version))
        .route("/v1/models", get(models))
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chat))
        .fallback(|request: HttpRequest| async move {
            ApiError::new(StatusCode::NOT_FOUND, format!("no {} {}", request.method(), request.uri().path()))
        })
        .method_not_allowed_fallback(|request: HttpRequest| async move {
            let message = format!(
                "{}: found method {}, expected the other of GET and POST",
                request.uri().path(),
                request.method()
            );
            ApiError::new(StatusCode::METHOD_NOT_ALLOWED, message)
        })
        .layer(DefaultBodyLimit::max(MOST_BODY))
        .with_state(app)
}

async fn page() -> Response {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], include_str!("page.html")).into_response()
}

async fn health(State(app): State<Arc<App>>) -> Result<(), ApiError> {
    app.check_open()
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.text()).into_response()
}

async fn version() -> Response {
    json_response(StatusCode::OK, &json!({"version": env!("CARGO_PKG_VERSION")}))
}

async fn models(State(app): State<Arc<App>>) -> Response {
    let config = app.served.config();
    let settings = &app.settings;
    let list = json!({"object": "list", "data": [{
        "id": app.name, "object": "model", "created": app.created, "owned_by": "depthwise",
        "max_model_len": config.max_positions, "meta": {"n_vocab": config.vocab_size},
        "depthwise": {
            "num_loops": config.num_loops, "batching": settings.batching.name(), "exit": settings.exit.to_string(),
            "kv_fill": settings.kv_fill.to_string(), "max_batch": settings.max_batch,
            "prefix_caching": settings.prefix_caching,
            "fingerprint": app.served.fingerprint(), "device": app.served.device_name(),
        },
    }]});
    json_response(StatusCode::OK, &list)
}

/// The body of a request.
async fn body_of(request: HttpRequest) -> Result<Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, Bytes::from_request(request, &())).await {
        Ok(Ok(body)) => Ok(body),
        Ok(Err(rejection)) => Err(ApiError::new(rejection.status(), format!("the body: {}", rejection.body_text()))),
        Err(_) => {
            let message = format!("the body: found no end of it within {} s", BODY_TIMEOUT.as_secs());
            Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, message))
        }
    }
}

/// Reads a body, on a thread of its own if it is large.
async fn read<T: Send + 'static>(
    body: Bytes,
    read: impl FnOnce(&[u8]) -> Result<T, ApiError> + Send + 'static,
) -> Result<T, ApiError> {
    match body.len() < LARGE_BODY {
        true => read(&body),
        false => {
            let read = tokio::task::spawn_blocking(move || read(&body)).await;
            read.unwrap_or_else(|_| Err(ApiError::failed("the request could not be read")))
        }
    }
}

async fn completions(State(app): State<Arc<App>>, request: HttpRequest) -> Result<Response, ApiError> {
    app.check_open()?;
    let reader = app.clone();
    let (completion, prompts) = read(body_of(request).await?, move |body| {
        let completion = Completion::parse(body, &reader.name, reader.temperature)?;
        let prompts = match &completion.prompt {
            Prompt::Text(text) => vec![reader.encode(text)?],
            Prompt::Texts(texts) => texts.iter().map(|text| reader.encode(text)).collect::<Result<_, _>>()?,
            Prompt::Tokens(tokens) => vec![tokens.clone()],
            Prompt::TokenLists(lists) => lists.clone(),
        };
        Ok((completion, prompts))
    })
    .await?;
    if prompts.is_empty() {
        return Err(ApiError::key("prompt", "[]", "at least one prompt"));
    }
    let Completion { echoes, wishes, .. } = completion;
    answer(app, Kind::Completion, prompts, wishes, Some(DEFAULT_TOKENS), echoes).await
}

async fn chat(State(app): State<Arc<App>>, request: HttpRequest) -> Result<Response, ApiError> {
    app.check_open()?;
    let reader = app.clone();
    let (chat, prompt) = read(body_of(request).await?, move |body| {
        let chat = Chat::parse(body, &reader.name, reader.temperature)?;
        let template = reader.template.as_ref();
        let template = template.ok_or_else(|| {
            ApiError::invalid("the model has no chat template: use /v1/completions, or start the server with one")
        })?;
        // The template writes the tokens that begin a sequence itself.
        let prompt = reader.tokenizer.encode(&template.render(&chat.messages)?);
        Ok((chat, prompt.map_err(|error| ApiError::invalid(error.to_string()))?))
    })
    .await?;
    answer(app, Kind::Chat, vec![prompt], chat.wishes, None, false).await
}

/// Serves completions, whole or as a stream.
async fn answer(
    app: Arc<App>,
    kind: Kind,
    prompts: Vec<Vec<u32>>,
    wishes: Wishes,
    default_tokens: Option<u32>,
    echoes: bool,
) -> Result<Response, ApiError> {
    let prompt_tokens = prompts.iter().map(Vec::len).sum();
    let (streams, includes_usage, choices_of_prompt) = (wishes.streams, wishes.includes_usage, wishes.n as usize);
    let running = app.start(prompts, wishes, default_tokens, echoes)?;
    let number = running.first().map_or(0, |first| first.place.id.into());
    let heading = Heading::new(kind, number, &app.name);
    if streams {
        let usage = Usage { prompt_tokens, ..Usage::default() };
        return Ok(stream(app, heading, running, choices_of_prompt, includes_usage.then_some(usage)));
    }
    let mut choices = Vec::new();
    for choice in running {
        choices.push(choice.finish(&app.tokenizer).await?);
    }
    if choices.iter().any(|choice| choice.finish == Some(Finish::Abort)) {
        return Err(ApiError::ending());
    }
    let usage = Usage {
        prompt_tokens,
        cached_tokens: choices.iter().step_by(choices_of_prompt).map(|choice| choice.cached_tokens).sum(),
        completion_tokens: choices.iter().map(|choice| choice.tokens.len()).sum(),
    };
    Ok(json_response(StatusCode::OK, &heading.whole(&choices, usage, &app.tokenizer)))
}

/// A stream of server-sent events. It ends with the usage, if that is given as far as it is known before.
fn stream(
    app: Arc<App>,
    heading: Heading,
    running: Vec<Running>,
    choices_of_prompt: usize,
    usage: Option<Usage>,
) -> Response {
    let (sender, receiver) = channel::<Bytes>(CHUNKS);
    tokio::spawn(async move {
        let choices = running.into_iter().enumerate().map(|(index, choice)| {
            let (app, heading, sender) = (app.clone(), heading.clone(), sender.clone());
            tokio::spawn(async move { stream_choice(&app, &heading, index, choice, &sender).await })
        });
        let (mut completion_tokens, mut cached_tokens) = (0, 0);
        for (index, choice) in choices.collect::<Vec<_>>().into_iter().enumerate() {
            let (tokens, cached) = choice.await.unwrap_or_default();
            completion_tokens += tokens;
            cached_tokens += if index.is_multiple_of(choices_of_prompt) { cached } else { 0 };
        }
        if let Some(usage) = usage {
            let usage = Usage { completion_tokens, cached_tokens, ..usage };
            let _ = sender.send(event(&heading.usage_chunk(usage))).await;
        }
        let _ = sender.send(Bytes::from_static(b"data: [DONE]\n\n")).await;
    });
    let body = Body::from_stream(ReceiverStream::new(receiver).map(Ok::<_, Infallible>));
    let headers = [(header::CONTENT_TYPE, "text/event-stream"), (header::CACHE_CONTROL, "no-cache")];
    (headers, body).into_response()
}

/// Sends a choice as chunks; returns the number of its tokens, and of those of its prompt that were cached. A reader that
/// has gone ends it.
async fn stream_choice(
    app: &App,
    heading: &Heading,
    index: usize,
    running: Running,
    sender: &tokio::sync::mpsc::Sender<Bytes>,
) -> (usize, usize) {
    let (mut tokens, mut cached) = (0, 0);
    if let Some(first) = heading.first_chunk(index)
        && sender.send(event(&first)).await.is_err()
    {
        return (0, 0);
    }
    let followed = running.follow(&app.tokenizer, |part| {
        tokens += part.tokens.len();
        cached += part.cached_tokens;
        let chunk = event(&heading.chunk(index, &part, &app.tokenizer));
        async move { sender.send(chunk).await.is_ok() }
    });
    let error = tokio::select! {
        followed = followed => followed.err(),
        () = sender.closed() => None,
    };
    if let Some(error) = error {
        let _ = sender.send(event(&error.body())).await;
    }
    (tokens, cached)
}

/// A server-sent event.
fn event(data: &impl Serialize) -> Bytes {
    let mut event = b"data: ".to_vec();
    serde_json::to_writer(&mut event, data).expect("answers have no keys but texts");
    event.extend_from_slice(b"\n\n");
    Bytes::from(event)
}
