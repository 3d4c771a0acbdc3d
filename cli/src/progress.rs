//! How far long work is: a bar on a terminal, and elsewhere a line now and then.

use std::io::{self, IsTerminal};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use experiments::Reporter;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, TermLike};

use crate::output::note;

/// From one line to the next where there is no terminal.
const INTERVAL: Duration = Duration::from_secs(10);
/// From one drawing to the next where a step takes long.
const TICK: Duration = Duration::from_secs(1);

/// Tells of an experiment on standard error: a bar for each stage, and a line for each note and warning.
#[derive(Debug, Default)]
pub struct Terminal(Option<ProgressBar>);

impl Terminal {
    fn say(&self, line: &str) {
        match &self.0 {
            Some(bar) => bar.suspend(|| note!("{line}")),
            None => note!("{line}"),
        }
    }
}

impl Reporter for Terminal {
    fn start(&mut self, steps: usize, done: usize) {
        self.finish();
        let bar = progress(steps).with_position(done as u64);
        bar.reset_eta();
        bar.enable_steady_tick(TICK);
        self.0 = Some(bar);
    }

    fn advance(&mut self, steps: usize) {
        self.0.iter().for_each(|bar| bar.inc(steps as u64));
    }

    fn message(&mut self, text: &str) {
        self.0.iter().for_each(|bar| bar.set_message(text.to_owned()));
    }

    fn finish(&mut self) {
        self.0.take().iter().for_each(ProgressBar::finish_and_clear);
    }

    fn note(&mut self, text: &str) {
        self.say(text);
    }

    fn warning(&mut self, text: &str) {
        self.say(&format!("warning: {text}"));
    }
}

/// Progress over so many steps, on standard error.
pub fn progress(steps: usize) -> ProgressBar {
    let style = ProgressStyle::with_template("{elapsed_precise} [{bar:30}] {pos}/{len} {msg}");
    let style = style.expect("the template is well formed").progress_chars("=> ");
    let target = match io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::term_like_with_hz(Box::new(Lines::new(|line| note!("{line}"))), 1),
    };
    ProgressBar::with_draw_target(Some(steps as u64), target).with_style(style)
}

/// A terminal of which only a line now and then is seen: what moves its cursor is left out.
struct Lines<F> {
    write: F,
    last: Mutex<Instant>,
}

impl<F: Fn(&str)> Lines<F> {
    /// The first line is seen when the interval is over: short work shows none.
    fn new(write: F) -> Self {
        Self { write, last: Mutex::new(Instant::now()) }
    }

    fn see(&self, line: &str, now: Instant) {
        let mut last = self.last.lock().unwrap_or_else(|error| error.into_inner());
        if !line.trim().is_empty() && now.saturating_duration_since(*last) >= INTERVAL {
            *last = now;
            (self.write)(line.trim());
        }
    }
}

impl<F> std::fmt::Debug for Lines<F> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Lines")
    }
}

impl<F: Fn(&str) + Send + Sync> TermLike for Lines<F> {
    fn width(&self) -> u16 {
        120
    }
    fn move_cursor_up(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_down(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_right(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn move_cursor_left(&self, _: usize) -> io::Result<()> {
        Ok(())
    }
    fn write_line(&self, line: &str) -> io::Result<()> {
        self.write_str(line)
    }
    fn write_str(&self, line: &str) -> io::Result<()> {
        self.see(line, Instant::now());
        Ok(())
    }
    fn clear_line(&self) -> io::Result<()> {
        Ok(())
    }
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    #[test]
    fn a_line_is_seen_when_the_one_before_is_old_enough() {
        let seen = RefCell::new(Vec::new());
        let lines = Lines::new(|line: &str| seen.borrow_mut().push(line.to_owned()));
        let start = *lines.last.lock().unwrap();
        lines.see("at once", start);
        lines.see("  at last ", start + INTERVAL);
        lines.see("too early", start + INTERVAL + INTERVAL / 2);
        lines.see(" ", start + 2 * INTERVAL);
        lines.see("in time", start + 2 * INTERVAL);
        assert_eq!(*seen.borrow(), ["at last", "in time"]);
    }

    #[test]
    fn a_bar_writes_its_state_as_a_line() {
        let (sender, seen) = std::sync::mpsc::channel();
        let lines = Lines::new(move |line: &str| sender.send(line.to_owned()).unwrap());
        *lines.last.lock().unwrap() = Instant::now() - INTERVAL;
        let bar = progress(4);
        bar.set_draw_target(ProgressDrawTarget::term_like_with_hz(Box::new(lines), 1));
        bar.set_position(3);
        bar.tick();
        let line = seen.try_recv().unwrap();
        assert!(line.contains("3/4"), "{line}");
    }
}
