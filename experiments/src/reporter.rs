//! What a long experiment says while it runs.

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Hears how far an experiment is, and what it warns of. The library itself prints nothing.
///
/// Work is done in stages of steps. Every method does nothing unless it is implemented.
///
/// ```
/// use experiments::Reporter;
///
/// #[derive(Default)]
/// struct Warnings(Vec<String>);
///
/// impl Reporter for Warnings {
///     fn warning(&mut self, text: &str) {
///         self.0.push(text.to_owned());
///     }
/// }
/// ```
pub trait Reporter: Send {
    /// A stage of `steps` steps starts, of which `done` were done by an earlier run.
    fn start(&mut self, steps: usize, done: usize) {
        let _ = (steps, done);
    }

    /// So many steps of the stage are done.
    fn advance(&mut self, steps: usize) {
        let _ = steps;
    }

    /// What the current step does.
    fn message(&mut self, text: &str) {
        let _ = text;
    }

    /// The stage is over.
    fn finish(&mut self) {}

    /// A flag that ends simulations with an error when it is set; none where nothing ends them.
    fn stop(&self) -> Option<Arc<AtomicBool>> {
        None
    }

    /// Something found out on the way that users want to know.
    fn note(&mut self, text: &str) {
        let _ = text;
    }

    /// Something that makes results less trustworthy than they look.
    fn warning(&mut self, text: &str) {
        let _ = text;
    }
}

/// A reporter that says nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Reporter for Quiet {}

/// A reporter that several threads tell of their work.
pub(crate) struct Shared<'r>(Mutex<&'r mut dyn Reporter>);

impl<'r> Shared<'r> {
    pub(crate) fn new(reporter: &'r mut dyn Reporter) -> Self {
        Self(Mutex::new(reporter))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, &'r mut dyn Reporter> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
