//! Generation of texts, token by token: requests served together, each token handed over when it is there.

use std::ops::ControlFlow;

use scheduler::{Clock, Observer, Settings, Token};
use traces::{Nanos, Request};

use crate::clock::{Idle, WallClock};
use crate::executor::{EngineError, in_pool};
use crate::replay::{Engine, ReplayError};

/// A token of a request's output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generated {
    /// Id of the request.
    pub request: u32,
    /// Which of its tokens, from 0.
    pub index: usize,
    /// Id of the token.
    pub token: u32,
    /// The depth it left at, from 0.
    pub depth: u8,
}

/// Tokens delivered by a pass, with their requests.
#[derive(Default)]
struct Delivered(Vec<(u32, Token)>);

impl Observer for Delivered {
    fn token(&mut self, _: Nanos, request: &Request, token: Token) {
        self.0.push((request.id, token));
    }
}

impl Engine {
    /// Serves `requests`, all of which are there from the start, under any exit policy but the oracle. `on_token` gets
    /// every token at the end of the pass that yields it, a request's tokens in their order, and may end the run.
    ///
    /// # Errors
    /// Before the run if a request does not fit the model or the cache or has no prompt; or if the engine fails.
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
