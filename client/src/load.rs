//! Sending a load: requests at their times, or when others have been answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use scheduler::{Load, Unordered};
use tokio::runtime::{Builder, Runtime};
use traces::{Nanos, Request};

use crate::answer::Answer;
use crate::api::{Api, ApiError, ApiOptions};
use crate::failure::Failure;
use crate::measurement::ServerPolicy;
use crate::prompts::{Prompts, WordTokens};

/// One request and what came of it. Times count from the beginning of the load.
#[derive(Clone, Debug, PartialEq)]
pub struct Exchange {
    /// The request, with the time at which it was due.
    pub request: Request,
    /// When it was sent first.
    pub sent: Nanos,
    /// When its answer ended, or it failed.
    pub ended: Nanos,
    /// How often it was sent again.
    pub retries: u32,
    /// The answer.
    pub outcome: Result<Answer, Failure>,
}

/// Longest time until it is noticed that the load is to stop.
const POLL: Duration = Duration::from_millis(50);

/// A client of one server.
#[derive(Debug)]
pub struct Client {
    runtime: Runtime,
    api: Arc<Api>,
}

impl Client {
    /// Finds the server and its model.
    ///
    /// # Errors
    /// If the address is not valid, no server answers there, or no model is named and the server lists none.
    pub fn connect(options: ApiOptions) -> Result<Self, ApiError> {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(|error| ApiError::System(error.to_string()))?;
        let api = Arc::new(runtime.block_on(Api::connect(options))?);
        Ok(Self { runtime, api })
    }

    /// Name of the model.
    pub fn model(&self) -> &str {
        self.api.model()
    }

    /// What depthwise's own server says of itself; `None` for other servers.
    pub fn policy(&self) -> Option<ServerPolicy> {
        self.api.policy()
    }

    /// Size of the model's vocabulary, as llama.cpp says it (`meta.n_vocab` in `/v1/models`).
    ///
    /// # Errors
    /// If the server does not say it.
    pub fn vocabulary(&self) -> Result<u32, ApiError> {
        self.api.vocabulary()
    }

    /// Asks the server how many tokens it makes of words, by two requests of one token.
    ///
    /// # Errors
    /// If a request fails, or its answer has no usage.
    pub fn count_tokens(&self, words: &[String]) -> Result<WordTokens, ApiError> {
        self.runtime.block_on(self.api.count_tokens(words))
    }

    /// Sends a load to its end, or until `stop` is set; `observe` gets each exchange when it has ended. Returns the number of
    /// requests that had been sent and had not ended when the load was stopped.
    ///
    /// A request that fails counts as answered: who waits for it goes on.
    ///
    /// The thread that calls this one waits for times and sends; the answers are read on two others.
    ///
    /// # Errors
    /// If arrivals are out of order.
    pub fn send(
        &self,
        load: &mut impl Load,
        prompts: &Prompts,
        stop: &AtomicBool,
        mut observe: impl FnMut(Exchange),
    ) -> Result<usize, Unordered> {
        let (sender, ended) = mpsc::channel();
        let start = Instant::now();
        let mut in_flight = 0;
        loop {
            while let Some(request) = load.take_until(Nanos::from(start.elapsed()))? {
                let (api, sender, body) =
                    (self.api.clone(), sender.clone(), self.api.request_body(&request, &prompts.of(&request)));
                in_flight += 1;
                self.runtime.spawn(async move {
                    // The receiver is gone when the load was stopped.
                    let _ = sender.send(exchange(&api, request, body, start).await);
                });
            }
            let next = load.next_time();
            if stop.load(Ordering::Relaxed) || (in_flight == 0 && next.is_none()) {
                return Ok(in_flight);
            }
            let until_next = next.map_or(POLL, |time| time.since(Nanos::from(start.elapsed())).into());
            match ended.recv_timeout(until_next.min(POLL)) {
                Ok(exchange) => {
                    in_flight -= 1;
                    load.answered(exchange.ended, exchange.request.id);
                    observe(exchange);
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => unreachable!("a sender is held here"),
            }
        }
    }
}

/// Sends a request, again where the server asks for it and it is allowed.
async fn exchange(api: &Api, request: Request, body: Vec<u8>, start: Instant) -> Exchange {
    let sent = Nanos::from(start.elapsed());
    let mut retries = 0;
    loop {
        let outcome = api.stream(body.clone(), start).await;
        match &outcome {
            Err(Failure { retry_after: Some(after), .. }) if retries < api.retries() => {
                tokio::time::sleep(*after).await;
                retries += 1;
            }
            _ => return Exchange { request, sent, ended: Nanos::from(start.elapsed()), retries, outcome },
        }
    }
}
