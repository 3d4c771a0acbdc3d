//! One server and its API: what to ask it for, and how.

use std::time::{Duration, Instant};

use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use reqwest::{RequestBuilder, Response, Url};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use traces::{Nanos, Request};

use crate::answer::{Answer, AnswerReader, Usage};
use crate::failure::{Failure, FailureKind};
use crate::measurement::ServerPolicy;
use crate::prompts::{Prompt, WordTokens};
use crate::sse::EventDecoder;

/// What requests are sent to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Endpoint {
    /// `/v1/completions`: a prompt as token ids or as a text.
    #[default]
    Completions,
    /// `/v1/chat/completions`: a text as the message of a user.
    Chat,
}

impl Endpoint {
    fn path(self) -> &'static str {
        match self {
            Self::Completions => "/v1/completions",
            Self::Chat => "/v1/chat/completions",
        }
    }
}

impl std::str::FromStr for Endpoint {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "completions" => Ok(Self::Completions),
            "chat" => Ok(Self::Chat),
            _ => Err(format!("`{name}`: expected completions or chat")),
        }
    }
}

/// How to speak to a server.
#[derive(Clone, Debug)]
pub struct ApiOptions {
    /// Address of the server: `http://HOST:PORT`, with or without `/v1`.
    pub url: String,
    /// What requests are sent to.
    pub endpoint: Endpoint,
    /// Name of the model; `None` for the first that the server lists.
    pub model: Option<String>,
    /// Sent as a bearer token.
    pub api_key: Option<String>,
    /// Longest time from sending a request to the end of its answer, of each try.
    pub timeout: Duration,
    /// How often a request is sent again to a server that asks to send it later.
    pub retries: u32,
    /// Fields of the body of every request; `null` removes one that is sent otherwise.
    pub extra_body: Map<String, Value>,
}

/// A server that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// The address is not one.
    #[error("found address `{found}`, expected http://HOST:PORT (TLS is not supported)")]
    Address {
        /// What was given.
        found: String,
    },
    /// The system refuses what the client needs.
    #[error("cannot start the client: {0}")]
    System(String),
    /// The server does not answer a question as expected.
    #[error("{url}: {failure}")]
    Question {
        /// The address that was asked.
        url: String,
        /// How it failed.
        failure: Failure,
    },
    /// The server does not say what is needed.
    #[error("{url}: found {found}, expected {expected}")]
    Missing {
        /// The address that was asked.
        url: String,
        /// What the server says.
        found: String,
        /// What is needed.
        expected: &'static str,
    },
}

/// A server, and how to speak to it.
#[derive(Clone, Debug)]
pub(crate) struct Api {
    http: reqwest::Client,
    base: String,
    model: String,
    vocabulary: Option<u32>,
    policy: Option<ServerPolicy>,
    options: ApiOptions,
}

/// The answer of `/v1/models`.
#[derive(Debug, Deserialize)]
struct Models {
    data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
struct Model {
    id: String,
    meta: Option<ModelMeta>,
    /// What depthwise's own server says of itself.
    depthwise: Option<Value>,
}

/// What llama.cpp says of a model.
#[derive(Debug, Deserialize)]
struct ModelMeta {
    n_vocab: Option<u32>,
}

/// An answer that is not streamed.
#[derive(Debug, Deserialize)]
struct Whole {
    usage: Option<Usage>,
}

impl Api {
    /// Asks the server for its models.
    pub async fn connect(options: ApiOptions) -> Result<Self, ApiError> {
        let address = || ApiError::Address { found: options.url.clone() };
        let url = Url::parse(&options.url).map_err(|_| address())?;
        if url.scheme() != "http" || url.host_str().is_none() || url.query().is_some() {
            return Err(address());
        }
        let base = url.as_str().trim_end_matches('/').trim_end_matches("/v1").to_owned();
        // A connection for each request: a server may close one that is idle just when the next request is sent on it.
        let http = reqwest::Client::builder().no_proxy().tcp_nodelay(true).pool_max_idle_per_host(0);
        let http = http.build().map_err(|error| ApiError::System(error.to_string()))?;
        let named = options.model.clone();
        let model = named.clone().unwrap_or_default();
        let mut api = Self { http, base, model, vocabulary: None, policy: None, options };
        let listed = match (api.models().await, named) {
            (Ok(models), Some(name)) => models.into_iter().find(|model| model.id == name),
            (Ok(models), None) => {
                let expected = "at least one model, or its name (--model)";
                let missing = || ApiError::Missing { url: api.url(MODELS), found: "none".into(), expected };
                Some(models.into_iter().next().ok_or_else(missing)?)
            }
            // Not every server lists its models.
            (Err(failure), Some(_)) if failure.kind != FailureKind::Connection => None,
            (Err(failure), _) => return Err(ApiError::Question { url: api.url(MODELS), failure }),
        };
        if let Some(Model { id, meta, depthwise }) = listed {
            api.model = id;
            api.vocabulary = meta.and_then(|meta| meta.n_vocab);
            // Not of a policy that this version does not know.
            api.policy = depthwise.and_then(|policy| serde_json::from_value(policy).ok());
        }
        Ok(api)
    }

    pub fn model(&self) -> &str {
        &self.model
    }

    pub fn policy(&self) -> Option<ServerPolicy> {
        self.policy
    }

    /// Size of the vocabulary.
    pub fn vocabulary(&self) -> Result<u32, ApiError> {
        let expected = "meta.n_vocab of the model, the size of the vocabulary (--vocab), or prompts as a text (--text)";
        let missing = || ApiError::Missing { url: self.url(MODELS), found: "no meta.n_vocab".into(), expected };
        self.vocabulary.filter(|&size| size > 0).ok_or_else(missing)
    }

    async fn models(&self) -> Result<Vec<Model>, Failure> {
        let answer = self.ask(self.http.get(self.url(MODELS))).await?;
        serde_json::from_slice::<Models>(&answer)
            .map(|models| models.data)
            .map_err(|error| Failure::new(FailureKind::Protocol, format!("expected a list of models: {error}")))
    }

    /// Asks how many tokens the server makes of words, by a prompt of these words and one that has them twice.
    pub async fn count_tokens(&self, words: &[String]) -> Result<WordTokens, ApiError> {
        let once = words.join(" ");
        let url = self.url(self.options.endpoint.path());
        let expected = "usage.prompt_tokens, more for a longer prompt (or --tokens-per-word)";
        let missing = |found: String| ApiError::Missing { url: url.clone(), found, expected };
        let mut counted = [0.0; 2];
        for (count, text) in counted.iter_mut().zip([once.clone(), format!("{once} {once}")]) {
            let body = self.body(&Prompt::Text(text), 1, false);
            let answer = self.ask(self.post(body)).await;
            let answer = answer.map_err(|failure| ApiError::Question { url: url.clone(), failure })?;
            let whole: Whole = serde_json::from_slice(&answer).map_err(|error| missing(error.to_string()))?;
            let usage = whole.usage.ok_or_else(|| missing("no usage".into()))?;
            *count = f64::from(usage.prompt_tokens);
        }
        let [once, twice] = counted;
        if twice <= once {
            return Err(missing(format!("{once} tokens, and {twice} for twice the words")));
        }
        let tokens_per_word = (twice - once) / words.len() as f64;
        Ok(WordTokens { tokens_per_word, fixed: once - (twice - once) })
    }

    /// Sends a request that is not streamed; the body of the answer.
    async fn ask(&self, request: RequestBuilder) -> Result<Vec<u8>, Failure> {
        let asked = async {
            let response = self.begin(request).await?;
            Ok(response.bytes().await.map_err(|error| Failure::of_reading(&error))?.to_vec())
        };
        tokio::time::timeout(self.options.timeout, asked).await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    /// The body of a request, ready to be sent.
    pub fn request_body(&self, request: &Request, prompt: &Prompt) -> Vec<u8> {
        self.body(prompt, request.output_tokens, true)
    }

    /// Streams the answer to a request. Times count from `start`.
    pub async fn stream(&self, body: Vec<u8>, start: Instant) -> Result<Answer, Failure> {
        let streamed = async {
            let mut response = self.begin(self.post(body)).await?;
            let (mut decoder, mut reader) = (EventDecoder::default(), AnswerReader::default());
            while let Some(bytes) = response.chunk().await.map_err(|error| Failure::of_reading(&error))? {
                let now = Nanos::from(start.elapsed());
                let events = decoder.push(&bytes).map_err(|error| Failure::new(FailureKind::Protocol, error))?;
                events.iter().try_for_each(|event| reader.read(now, event))?;
            }
            reader.finish()
        };
        tokio::time::timeout(self.options.timeout, streamed).await.unwrap_or_else(|_| Err(self.timed_out()))
    }

    pub fn retries(&self) -> u32 {
        self.options.retries
    }

    /// Sends a request; the answer, once its status is known to be a success.
    async fn begin(&self, request: RequestBuilder) -> Result<Response, Failure> {
        let request = match &self.options.api_key {
            Some(key) => request.bearer_auth(key),
            None => request,
        };
        let response = request.send().await.map_err(|error| Failure::of_sending(&error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let status = response.status();
        let retry_after = response.headers().get(RETRY_AFTER).and_then(|after| after.to_str().ok()).map(str::to_owned);
        let body = response.text().await.unwrap_or_default();
        Err(Failure::of_status(status, retry_after.as_deref(), &body))
    }

    fn post(&self, body: Vec<u8>) -> RequestBuilder {
        self.http.post(self.url(self.options.endpoint.path())).header(CONTENT_TYPE, "application/json").body(body)
    }

    fn body(&self, prompt: &Prompt, output_tokens: u32, streams: bool) -> Vec<u8> {
        let mut body = json!({
            "model": self.model,
            "max_tokens": output_tokens,
            "min_tokens": output_tokens,
            "ignore_eos": true,
            "temperature": 0,
            "stream": streams,
        });
        match self.options.endpoint {
            Endpoint::Completions => body["prompt"] = json!(prompt),
            Endpoint::Chat => body["messages"] = json!([{"role": "user", "content": prompt}]),
        }
        if streams {
            body["stream_options"] = json!({"include_usage": true});
        }
        for (key, value) in &self.options.extra_body {
            match (value, body.as_object_mut()) {
                (Value::Null, Some(fields)) => drop(fields.remove(key)),
                (value, _) => body[key] = value.clone(),
            }
        }
        body.to_string().into_bytes()
    }

    fn timed_out(&self) -> Failure {
        let seconds = self.options.timeout.as_secs_f64();
        Failure::new(FailureKind::Timeout, format!("found no end of the answer after {seconds} s"))
    }

    fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }
}

const MODELS: &str = "/v1/models";
