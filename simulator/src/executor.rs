//! The simulator's executor, which takes times from a latency model and exit signals from an exit model.

use std::collections::HashMap;

use latency::{LatencyModel, PassAccount, nanos};
use scheduler::{Executor, Pass, Settings, Slot};
use traces::{Nanos, Request};

use crate::drafts::Drafts;
use crate::exits::{Cursor, ExitError, ExitModel};
use crate::spread::Spread;

/// Executes passes by their profiled times.
#[derive(Clone, Debug)]
pub struct ProfileExecutor<'m> {
    latency: &'m LatencyModel,
    exits: &'m ExitModel,
    /// By slot.
    cursors: Vec<Cursor>,
    /// Positions of requests that lost their slots, where they depend on earlier exits, or that come from other machines.
    known: HashMap<u32, Cursor>,
    /// By slot: output tokens of its request.
    outputs: Vec<u32>,
    /// `None` unless the policy speculates.
    drafts: Option<Drafts>,
    /// `None` where every time is the median of the profile.
    spread: Option<Spread>,
    tokens: u64,
    agreeing: u64,
    account: PassAccount,
}

impl<'m> ProfileExecutor<'m> {
    /// An executor of passes under `settings`. The caller ensures that all three belong to one model.
    pub fn new(latency: &'m LatencyModel, exits: &'m ExitModel, settings: &Settings) -> Self {
        Self {
            latency,
            exits,
            cursors: vec![Cursor::default(); settings.max_batch as usize],
            known: HashMap::new(),
            outputs: vec![0; settings.max_batch as usize],
            drafts: Drafts::new(settings),
            spread: None,
            tokens: 0,
            agreeing: 0,
            account: PassAccount::default(),
        }
    }

    /// Draws times from their measured spread around those of the profile.
    pub fn with_spread(self, seed: u64) -> Self {
        Self { spread: Some(Spread::new(seed)), ..self }
    }

    /// Number of tokens emitted so far, without drafts of which full depth has not decided.
    pub fn tokens(&self) -> u64 {
        self.tokens
    }

    /// Number of tokens emitted so far that equal those of full depth.
    pub fn agreeing_tokens(&self) -> u64 {
        self.agreeing
    }

    /// Time of passes so far by component, and uses beyond the measured grid.
    pub fn account(&self) -> &PassAccount {
        &self.account
    }

    /// The position of a request that another machine goes on with.
    pub(crate) fn hand_over(&mut self, slot: Slot) -> Cursor {
        // The slot is released before the last token, but not to be taken again.
        self.outputs[slot as usize] = 0;
        self.cursors[slot as usize]
    }

    /// Goes on from a position when its request is admitted.
    pub(crate) fn resume(&mut self, cursor: Cursor) {
        self.known.insert(cursor.progress().0, cursor);
    }

    /// A time, drawn from its spread if the executor has one.
    fn drawn(&mut self, ns: f64, squared_spread: impl FnOnce(&LatencyModel) -> f64) -> Nanos {
        match &mut self.spread {
            Some(spread) => nanos(spread.draw(ns, squared_spread(self.latency))),
            None => nanos(ns),
        }
    }
}

impl Executor for ProfileExecutor<'_> {
    type Error = ExitError;

    fn admit(&mut self, slot: Slot, request: &Request, generated: u32) -> Result<(), ExitError> {
        self.outputs[slot as usize] = request.output_tokens;
        if let Some(drafts) = &mut self.drafts {
            drafts.clear(slot);
        }
        let known = self.known.remove(&request.id).filter(|cursor| cursor.progress() == (request.id, generated));
        self.cursors[slot as usize] = match known {
            Some(cursor) => cursor,
            None => self.exits.cursor(request, generated)?,
        };
        Ok(())
    }

    fn release(&mut self, slot: Slot) {
        if self.exits.kv_fill().is_some() {
            let cursor = self.cursors[slot as usize];
            let (request, generated) = cursor.progress();
            if generated < self.outputs[slot as usize] {
                self.known.insert(request, cursor);
            }
        }
    }

    fn run(&mut self, pass: &Pass<'_>, signals: &mut [f32]) -> Result<Nanos, ExitError> {
        self.exits.read_signals(pass, &self.cursors, signals);
        if let Some(drafts) = &mut self.drafts {
            let certain = drafts.verify(self.exits, pass, &mut self.cursors, signals);
            self.tokens += certain;
            self.agreeing += certain;
        }
        let ns = self.latency.run_ns(pass.work, &mut self.account);
        Ok(self.drawn(ns, |latency| latency.squared_run_spread(pass.work)))
    }

    fn emit(&mut self, pass: &Pass<'_>, exiting: &[u32]) -> Result<Nanos, ExitError> {
        let (tokens, agreeing) = match &mut self.drafts {
            Some(drafts) => {
                let certain = drafts.exit(self.exits, pass, exiting, &mut self.cursors);
                (certain, certain)
            }
            None => (exiting.len() as u64, self.exits.exit(pass, exiting, &mut self.cursors)),
        };
        self.tokens += tokens;
        self.agreeing += agreeing;
        let ns = self.latency.exit_ns(pass.work, &mut self.account);
        Ok(self.drawn(ns, |latency| latency.squared_exit_spread(pass.work)))
    }
}
