//! Generation of texts token by token: requests are served together, and each token is delivered at the end of its
//! pass.

use std::collections::HashMap;
use std::ops::ControlFlow;
use std::sync::Arc;

use scheduler::{Clock, Observer, Settings, Token};
use traces::{Nanos, Request};

use crate::clock::{Idle, WallClock};
use crate::executor::{EngineError, in_pool};
use crate::prompts::Prompts;
use crate::replay::{Engine, ReplayError};
use crate::tokenizer::Tokenizer;

/// A token of a request's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Id of the request.
    pub request: u32,
    /// Index of the token in the output, from 0.
    pub index: usize,
    /// Id of the token.
    pub token: u32,
    /// The depth at which it exited, from 0.
    pub depth: u8,
}

/// A token of a completed text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompletedToken {
    /// Its id.
    pub id: u32,
    /// What the text gains by it: nothing while its last character lacks bytes, which come with later tokens.
    pub text: String,
    /// The depth at which it exited, from 0.
    pub depth: u8,
}

/// Tokens that a pass delivers, with their requests.
#[derive(Default)]
struct Delivered(Vec<(u32, Token)>);

impl Observer for Delivered {
    fn token(&mut self, _: Nanos, request: &Request, token: Token) {
        self.0.push((request.id, token));
    }
}

impl Engine {
    /// Completes prompts, all in one run: the text of each, token by token. A text ends after `output_tokens`, or before
    /// a special token such as `<|endoftext|>`. The prompts of the engine itself are not used.
    ///
    /// # Errors
    /// As [`generate`](Self::generate); or if a prompt is empty or the tokenizer refuses it.
    pub fn complete(
        &self,
        tokenizer: &Tokenizer,
        prompts: &[impl AsRef<str>],
        settings: Settings,
        output_tokens: u32,
    ) -> Result<Vec<Vec<CompletedToken>>, ReplayError> {
        self.complete_while(tokenizer, prompts, settings, output_tokens, || true)
    }

    /// As [`complete`](Self::complete), for as long as `goes_on` says so, which is asked at every token. All texts end
    /// then.
    ///
    /// # Errors
    /// As there.
    pub fn complete_while(
        &self,
        tokenizer: &Tokenizer,
        prompts: &[impl AsRef<str>],
        settings: Settings,
        output_tokens: u32,
        mut goes_on: impl FnMut() -> bool + Send,
    ) -> Result<Vec<Vec<CompletedToken>>, ReplayError> {
        let encode = |(id, prompt)| Ok::<_, ReplayError>((id, tokenizer.encode_prompt(prompt)?));
        let encoded: HashMap<u32, Vec<u32>> =
            (0..).zip(prompts.iter().map(AsRef::as_ref)).map(encode).collect::<Result<_, _>>()?;
        let request = |id| {
            let prompt_tokens = encoded[&id].len() as u32;
            Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens }
        };
        let requests: Vec<Request> = (0..prompts.len() as u32).map(request).collect();
        let mut generated = vec![Vec::new(); prompts.len()];
        let engine = Self { prompts: Arc::new(Prompts::Given(encoded.clone())), ..self.clone() };
        engine.generate(settings, &requests, |token| {
            generated[token.request as usize].push(token);
            if goes_on() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
        let text = |(id, generated): (u32, Vec<Generated>)| {
            let mut stream = tokenizer.stream();
            // What a token adds to a text depends on those before it.
            encoded[&id].iter().try_for_each(|&token| stream.push(token).map(drop))?;
            let tokens = generated.into_iter().take_while(|token| !tokenizer.is_special(token.token));
            let complete = |Generated { token: id, depth, .. }| {
                Ok::<_, ReplayError>(CompletedToken { id, text: stream.push(id)?.unwrap_or_default(), depth })
            };
            tokens.map(complete).collect::<Result<Vec<_>, _>>()
        };
        (0..).zip(generated).map(text).collect()
    }

    /// Serves `requests`, all of which are there from the start, under any exit policy but the oracle. `on_token` gets
    /// every token at the end of the pass that yields it, a request's tokens in their order, and may end the run.
    ///
    /// # Errors
    /// Before the run if a request does not fit the model or the cache, or has no prompt; during the run if the engine
    /// fails.
    pub fn generate(
        &self,
        settings: Settings,
        requests: &[Request],
        mut on_token: impl FnMut(Generated) -> ControlFlow<()> + Send,
    ) -> Result<(), ReplayError> {
        let mut server = self.server(settings, self.executor(&settings)?, requests)?;
        requests.iter().try_for_each(|request| server.submit(*request))?;
        in_pool(|| {
            let (mut clock, mut delivered) = (WallClock::start(Idle::Skip), Delivered::default());
            while let Some(elapsed) = server.start_pass(clock.now(), &mut delivered)? {
                server.finish_pass(clock.advance(elapsed), &mut delivered);
                for (request, Token { index, depth, .. }) in delivered.0.drain(..) {
                    let index = index as usize;
                    let generation = server.executor().generation(request).expect("it has generated a token");
                    let token = generation.tokens[index];
                    if on_token(Generated { request, index, token, depth }).is_break() {
                        return Ok(());
                    }
                }
            }
            Ok::<(), EngineError>(())
        })?;
        Ok(())
    }
}
