//! A run as a timeline in Chrome's trace format, which Perfetto and `chrome://tracing` open.
//!
//! Each machine is a process. Its first track shows the passes, and counters show the rows at each depth. Every other
//! track is a place in the batch, with the stays of the requests that had it. A stay contains one slice for each token,
//! named by the exit depth:
//!
//! ```text
//! machine 0   passes   |16 rows|18 rows |17 rows|...
//!             depth 0  ▁▃▅▇▅                        (counters)
//!             place 0  |request 3            |request 7 ...
//!                      |exit 2 |exit 0|exit 1|
//! ```

use std::collections::HashMap;
use std::io::{self, Write};
use std::ops::Range;

use scheduler::{Observer, PassRecord, RowKind, Token};
use serde::Serialize;
use serde_json::{Map, Value, json};
use traces::{Nanos, Request};

/// Observes one machine. Events outside the window are dropped: a slice takes about half a kilobyte.
#[derive(Clone, Debug)]
pub struct Timeline {
    machine: u32,
    window: Range<Nanos>,
    events: Vec<Event>,
    /// Requests in a place: the place, since when, and the tokens so far.
    stays: HashMap<u32, Stay>,
    free_places: Vec<u32>,
    places: u32,
    /// Rows at each depth in the last pass, and when the pass ended.
    rows: Vec<u32>,
    last_end: Nanos,
}

#[derive(Clone, Copy, Debug)]
struct Stay {
    place: u32,
    since: Nanos,
    tokens: u32,
}

/// One event of the format; times in microseconds.
#[derive(Clone, Debug, Serialize)]
struct Event {
    name: String,
    ph: char,
    ts: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    dur: Option<f64>,
    pid: u32,
    tid: u32,
    /// Scope of instant events: their thread.
    #[serde(skip_serializing_if = "Option::is_none")]
    s: Option<char>,
    args: Value,
}

const PASSES: u32 = 0;

impl Timeline {
    /// Observes machine number `machine` from the start of `window` to its end.
    pub fn new(machine: u32, window: Range<Nanos>) -> Self {
        Self {
            machine,
            window,
            events: Vec::new(),
            stays: HashMap::new(),
            free_places: Vec::new(),
            places: 0,
            rows: Vec::new(),
            last_end: Nanos::ZERO,
        }
    }

    fn slice(&mut self, track: u32, name: String, from: Nanos, to: Nanos, args: Value) {
        if from < self.window.end && to > self.window.start {
            self.push('X', track, name, from, Some((to - from).as_micros_f64()), args);
        }
    }

    fn push(&mut self, ph: char, tid: u32, name: String, at: Nanos, dur: Option<f64>, args: Value) {
        let s = (ph == 'i').then_some('t');
        self.events.push(Event { name, ph, ts: at.as_micros_f64(), dur, pid: self.machine, tid, s, args });
    }

    fn count_rows(&mut self, at: Nanos) {
        if self.window.contains(&at) {
            let rows: Map<String, Value> =
                self.rows.iter().enumerate().map(|(depth, &rows)| (format!("depth {depth}"), rows.into())).collect();
            self.push('C', PASSES, "rows by depth".into(), at, None, rows.into());
        }
    }

    fn end_stay(&mut self, now: Nanos, request: &Request, end: &str) {
        let Some(stay) = self.stays.remove(&request.id) else { return };
        self.free_places.push(stay.place);
        let args = json!({
            "request": request.id,
            "prompt_tokens": request.prompt_tokens,
            "tokens": stay.tokens,
            "arrival_us": request.arrival.as_micros_f64(),
            "end": end,
        });
        self.slice(1 + stay.place, format!("request {}", request.id), stay.since, now, args);
        if end == "preempted" && self.window.contains(&now) {
            self.push('i', 1 + stay.place, "preempted".into(), now, None, json!({"request": request.id}));
        }
    }

    fn names(&self) -> impl Iterator<Item = Event> {
        let named = |name: &str, tid, value: String| Event {
            name: name.into(),
            ph: 'M',
            ts: 0.0,
            dur: None,
            pid: self.machine,
            tid,
            s: None,
            args: json!({ "name": value }),
        };
        let machine = named("process_name", PASSES, format!("machine {}", self.machine));
        let passes = named("thread_name", PASSES, "passes".into());
        let places: Vec<Event> =
            (0..self.places).map(|place| named("thread_name", 1 + place, format!("place {place}"))).collect();
        [machine, passes].into_iter().chain(places)
    }
}

/// What every file of a timeline begins with.
pub const TIMELINE_BEGINNING: &[u8] = b"{\"displayTimeUnit\":\"ms\",\"traceEvents\":[";

/// Writes the timelines of all machines of a run as one JSON file.
///
/// # Errors
/// If the file cannot be written.
pub fn write_timeline(to: impl Write, timelines: &[Timeline]) -> io::Result<()> {
    let mut to = io::BufWriter::new(to);
    to.write_all(TIMELINE_BEGINNING)?;
    let mut separator: &[u8] = b"\n";
    for timeline in timelines {
        for event in timeline.names() {
            write_event(&mut to, &mut separator, &event)?;
        }
        for event in &timeline.events {
            write_event(&mut to, &mut separator, event)?;
        }
    }
    to.write_all(b"\n]}\n")?;
    to.flush()
}

fn write_event(to: &mut impl Write, separator: &mut &[u8], event: &Event) -> io::Result<()> {
    to.write_all(separator)?;
    *separator = b",\n";
    Ok(serde_json::to_writer(to, event)?)
}

impl Observer for Timeline {
    fn admitted(&mut self, now: Nanos, request: &Request) {
        let place = self.free_places.pop().unwrap_or_else(|| {
            self.places += 1;
            self.places - 1
        });
        self.stays.insert(request.id, Stay { place, since: now, tokens: 0 });
    }

    fn preempted(&mut self, now: Nanos, request: &Request) {
        self.end_stay(now, request, "preempted");
    }

    fn pass(&mut self, record: &PassRecord<'_>) {
        let end = record.start + record.elapsed;
        if record.start >= self.window.end || end <= self.window.start {
            return;
        }
        if record.start > self.last_end {
            self.rows.fill(0);
            self.count_rows(self.last_end);
        }
        self.rows.fill(0);
        for segment in record.pass.segments {
            let depth = usize::from(segment.depth);
            if self.rows.len() <= depth {
                self.rows.resize(depth + 1, 0);
            }
            self.rows[depth] += segment.tokens;
        }
        self.last_end = end;
        self.count_rows(record.start);
        let rows = record.pass.num_rows();
        let rows_of =
            |kind| -> u32 { record.pass.segments.iter().filter(|row| row.kind == kind).map(|row| row.tokens).sum() };
        let args = json!({
            "rows": rows,
            "prefill_rows": rows_of(RowKind::Prompt),
            "backfill_rows": rows_of(RowKind::Backfill),
            "running": record.running,
            "waiting": record.waiting,
        });
        self.slice(PASSES, format!("{rows} rows"), record.start, end, args);
    }

    fn token(&mut self, now: Nanos, request: &Request, token: Token) {
        let Some(stay) = self.stays.get_mut(&request.id) else { return };
        stay.tokens += 1;
        let (place, since) = (stay.place, stay.since);
        let from = token.previous.unwrap_or_default().max(since);
        let name = format!("exit {}", token.depth);
        self.slice(1 + place, name, from, now, json!({"request": request.id, "token": token.index}));
    }

    fn finished(&mut self, now: Nanos, request: &Request, _first_token: Nanos) {
        self.end_stay(now, request, "finished");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use scheduler::blocks::BlockTables;
    use scheduler::{ExitPolicy, Pass, Segment};
    use traces::PassWork;

    const MICRO: u64 = 1000;

    fn request(id: u32) -> Request {
        Request { id, arrival: Nanos::ZERO, prompt_tokens: 3, output_tokens: 2 }
    }

    fn pass(timeline: &mut Timeline, from: u64, to: u64, depths: &[u8]) {
        let segments: Vec<Segment> = depths
            .iter()
            .map(|&depth| Segment {
                slot: 0,
                start: 0,
                tokens: 1,
                depth,
                kind: RowKind::Decode,
                predicts: true,
                generated: true,
            })
            .collect();
        let (tables, work) = (BlockTables::new(1, 1, 1), PassWork::default());
        let pass = Pass::new(&segments, ExitPolicy::None.signal_reads(2), &tables, &work);
        let (start, elapsed) = (Nanos(from * MICRO), Nanos((to - from) * MICRO));
        timeline.pass(&PassRecord { start, elapsed, pass, exiting: &[], running: 1, waiting: 0, device: None });
    }

    fn written(timelines: &[Timeline]) -> Vec<Value> {
        let mut json = Vec::new();
        write_timeline(&mut json, timelines).unwrap();
        let file: Value = serde_json::from_slice(&json).unwrap();
        file["traceEvents"].as_array().unwrap().clone()
    }

    /// Two requests in one place, one after the other; the first is preempted.
    fn watched(window: Range<Nanos>) -> Timeline {
        let mut timeline = Timeline::new(2, window);
        let token = |index, depth, previous| Token { index, depth, previous };
        timeline.admitted(Nanos::ZERO, &request(0));
        pass(&mut timeline, 0, 10, &[0, 0, 1]);
        timeline.token(Nanos(10 * MICRO), &request(0), token(0, 1, None));
        timeline.preempted(Nanos(10 * MICRO), &request(0));
        timeline.admitted(Nanos(15 * MICRO), &request(1));
        pass(&mut timeline, 15, 30, &[0]);
        timeline.token(Nanos(30 * MICRO), &request(1), token(0, 0, None));
        timeline.finished(Nanos(30 * MICRO), &request(1), Nanos(30 * MICRO));
        timeline
    }

    #[test]
    fn passes_stays_and_tokens_are_slices() {
        let events = written(&[watched(Nanos::ZERO..Nanos::MAX)]);
        let slices: Vec<_> = events
            .iter()
            .filter(|event| event["ph"] == "X")
            .map(|event| (event["tid"].as_u64(), event["name"].as_str(), event["ts"].as_f64(), event["dur"].as_f64()))
            .collect();
        let slice = |tid, name, ts, dur| (Some(tid), Some(name), Some(ts), Some(dur));
        assert_eq!(
            slices,
            [
                slice(0, "3 rows", 0.0, 10.0),
                slice(1, "exit 1", 0.0, 10.0),
                slice(1, "request 0", 0.0, 10.0),
                slice(0, "1 rows", 15.0, 15.0),
                slice(1, "exit 0", 15.0, 15.0),
                slice(1, "request 1", 15.0, 15.0),
            ]
        );
        assert!(events.iter().all(|event| event["pid"] == 2));
        assert!(events.iter().any(|event| event["ph"] == "i" && event["name"] == "preempted"));
        assert!(events.iter().any(|event| event["ph"] == "M" && event["args"]["name"] == "machine 2"));
    }

    #[test]
    fn rows_by_depth_fall_to_zero_between_passes() {
        let events = written(&[watched(Nanos::ZERO..Nanos::MAX)]);
        let counts: Vec<_> = events
            .iter()
            .filter(|event| event["ph"] == "C")
            .map(|event| {
                [&event["ts"], &event["args"]["depth 0"], &event["args"]["depth 1"]].map(|v| v.as_f64().unwrap())
            })
            .collect();
        assert_eq!(counts, [[0.0, 2.0, 1.0], [10.0, 0.0, 0.0], [15.0, 1.0, 0.0]]);
    }

    #[test]
    fn nothing_outside_the_window_is_kept() {
        let names = |window: Range<u64>| -> Vec<String> {
            let timeline = watched(Nanos(window.start * MICRO)..Nanos(window.end * MICRO));
            timeline.events.iter().filter(|event| event.ph == 'X').map(|event| event.name.clone()).collect()
        };
        assert_eq!(names(0..12), ["3 rows", "exit 1", "request 0"]);
        assert_eq!(names(12..40), ["1 rows", "exit 0", "request 1"]);
        assert!(names(40..50).is_empty());
    }
}
