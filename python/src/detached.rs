//! Work without the interpreter's lock, which Ctrl-C ends, and whose progress and warnings Python hears of.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use experiments::Reporter;
use pyo3::prelude::*;

use crate::errors::{DepthwiseWarning, raise};

/// Time after which signals are looked for and progress is told.
const PERIOD: Duration = Duration::from_millis(50);

/// What work says while it runs.
enum Said {
    Started { steps: usize, done: usize },
    Advanced(usize),
    Message(String),
    Note(String),
    Warning(String),
}

/// How work that cannot return an error at every place is stopped.
struct Stopped;

/// Tells the thread that waits for the work.
struct Teller {
    says: Sender<Said>,
    stop: Arc<AtomicBool>,
    /// Whether the work ends at a step, since it does not look at the flag itself.
    ends_at_steps: bool,
}

impl Teller {
    fn say(&self, said: Said) {
        // The other end is there for as long as the work is.
        let _ = self.says.send(said);
    }
}

impl Reporter for Teller {
    fn start(&mut self, steps: usize, done: usize) {
        self.say(Said::Started { steps, done });
    }

    fn advance(&mut self, steps: usize) {
        if self.ends_at_steps && self.stop.load(Ordering::Relaxed) {
            resume_unwind(Box::new(Stopped));
        }
        self.say(Said::Advanced(steps));
    }

    fn message(&mut self, text: &str) {
        self.say(Said::Message(text.to_owned()));
    }

    fn stop(&self) -> Option<Arc<AtomicBool>> {
        Some(Arc::clone(&self.stop))
    }

    fn note(&mut self, text: &str) {
        self.say(Said::Note(text.to_owned()));
    }

    fn warning(&mut self, text: &str) {
        self.say(Said::Warning(text.to_owned()));
    }
}

/// Where work looks whether it is to end.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Ends {
    /// At the flag of its reporter.
    ByFlag,
    /// At every step.
    AtSteps,
}

/// Does work on another thread, without the interpreter's lock. `progress` is called with the steps done, their number and
/// what the current one does. Exceptions that callbacks raise within the work are raised here.
///
/// # Errors
/// The error of the work, an exception of a callback or of `progress`, or `KeyboardInterrupt`.
pub fn detached<T: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    ends: Ends,
    work: impl FnOnce(&mut dyn Reporter) -> Result<T> + Send,
) -> PyResult<T> {
    let progress: Option<Py<PyAny>> =
        progress.filter(|progress| !progress.is_none()).map(|progress| progress.clone().unbind());
    let stop = Arc::new(AtomicBool::new(false));
    let (says, hears) = channel();
    let mut teller = Teller { says, stop: Arc::clone(&stop), ends_at_steps: ends == Ends::AtSteps };
    let (result, listened) = py.detach(move || {
        thread::scope(|scope| {
            let worker = scope.spawn(move || catch_unwind(AssertUnwindSafe(|| work(&mut teller))));
            let mut listener = Listener { progress, done: 0, steps: 0, message: String::new() };
            let listened = listener.listen(&hears, &stop);
            (worker.join().expect("what panics in it is caught"), listened)
        })
    });
    // What stopped the work is what is raised.
    listened?;
    match result {
        Ok(result) => result.map_err(raise),
        Err(panic) => match panic.downcast::<PyErr>() {
            Ok(raised) => Err(*raised),
            Err(panic) => resume_unwind(panic),
        },
    }
}

/// Passes on what the work says.
struct Listener {
    progress: Option<Py<PyAny>>,
    done: usize,
    steps: usize,
    message: String,
}

impl Listener {
    /// Listens until the work ends. An exception is returned then; it stops the work.
    fn listen(&mut self, hears: &Receiver<Said>, stop: &AtomicBool) -> PyResult<()> {
        let (mut raised, mut says, mut told) = (Ok(()), Vec::new(), Instant::now());
        loop {
            let heard = hears.recv_timeout(PERIOD.saturating_sub(told.elapsed()));
            let ended = matches!(heard, Err(RecvTimeoutError::Disconnected));
            says.extend(heard);
            // Many small steps are told at once.
            if !ended && told.elapsed() < PERIOD {
                continue;
            }
            if raised.is_ok() {
                raised = Python::attach(|py| self.tell(py, says.drain(..), ended));
                stop.store(raised.is_err(), Ordering::Relaxed);
            }
            if ended {
                return raised;
            }
            told = Instant::now();
        }
    }

    fn tell(&mut self, py: Python<'_>, says: impl Iterator<Item = Said>, ended: bool) -> PyResult<()> {
        py.check_signals()?;
        let before = (self.done, self.steps);
        for said in says {
            match said {
                Said::Started { steps, done } => (self.steps, self.done) = (steps, done),
                Said::Advanced(steps) => self.done += steps,
                Said::Message(text) => self.message = text,
                Said::Note(text) => {
                    py.import("logging")?.call_method1("getLogger", ("depthwise",))?.call_method1("info", (text,))?;
                }
                Said::Warning(text) => {
                    let warnings = py.import("warnings")?;
                    warnings.call_method1("warn", (text, py.get_type::<DepthwiseWarning>()))?;
                }
            }
        }
        match &self.progress {
            Some(progress) if ended || before != (self.done, self.steps) => {
                progress.call1(py, (self.done, self.steps, &self.message))?;
            }
            _ => {}
        }
        Ok(())
    }
}
