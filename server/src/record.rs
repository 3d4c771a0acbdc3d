//! What the server writes down of what it serves, for the simulator: a request trace, an exit trace and a pass log.
//!
//! A thread of its own writes, [`INTERVAL`] after [`INTERVAL`]. What it has written then reads without repair, also when the
//! process is killed in the middle:
//!
//! - `requests.csv` grows by lines, in order of arrival. A line lies within a page of memory and is written at once, so it is
//!   there or not. Output lengths have leading zeros and are updated in their place.
//! - `exits-000000.parquet` and so on are parts of an exit trace of [`PART`] requests each. A part that has changed is
//!   written anew and renamed.
//! - `passes-000000.parquet` and so on are pass logs, likewise.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use scheduler::{PassRecord, Settings};
use traces::table::write_yaml;
use traces::{
    ExitTraceMeta, ExitTraceWriter, LoggedPass, Nanos, PassLog, PassLogMeta, PassOrigin, Request, SignalSet, Signals,
    TraceError, unix_micros,
};

/// From one writing to the next.
const INTERVAL: Duration = Duration::from_millis(500);
/// Requests of a part of the exit trace.
const PART: usize = 64;
/// Passes of a part of the pass log.
const PART_PASSES: usize = 1 << 14;
/// The columns of the request trace.
const HEADER: &str =
    "request,arrival_us,prompt_tokens,output_tokens,session,think_time_us,hash_block_tokens,hash_ids\n";
/// Bytes that are written at once or not at all.
const PAGE: usize = 4096;
/// Digits of an output length, so that a longer one takes the place of a shorter one.
const DIGITS: usize = 10;

/// Why nothing can be recorded.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    /// The folder belongs to something else.
    #[error("{}: found a folder that is not empty, expected a new or an empty one", .0.display())]
    NotEmpty(PathBuf),
    /// A file cannot be made or written.
    #[error("{}: cannot write: {source}", path.display())]
    Write {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A trace cannot be written.
    #[error(transparent)]
    Trace(#[from] TraceError),
}

fn unwritten(path: &Path) -> impl Fn(std::io::Error) -> RecordError {
    move |source| RecordError::Write { path: path.to_owned(), source }
}

/// Where and as what a server is recorded.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The folder: a new or an empty one.
    pub folder: PathBuf,
    /// What the exit trace says of its origin.
    pub exits: ExitTraceMeta,
    /// The signals of the exit trace.
    pub signals: SignalSet,
    /// What the pass log says of its origin.
    pub passes: PassLogMeta,
    /// Whether tokens run every depth when they start, so that the signals of depths that they skip are recorded too. Passes
    /// take several times as long.
    pub all_depths: bool,
}

/// What the worker tells the thread that writes.
#[derive(Debug)]
enum Message {
    Arrived { request: Request, hashes: Vec<u64>, session: Option<String> },
    Token { request: u32, token: u32, depth: u8, rows: Vec<(Signals, u32)> },
    Ended { request: u32, now: Nanos },
    Pass(LoggedPass),
}

/// Sends what happens to the thread that writes. Dropping it waits for the last writing.
#[derive(Debug)]
pub(crate) struct Recorder {
    messages: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
    all_depths: bool,
    num_loops: u8,
}

impl Recorder {
    /// Creates the folder and begins to write.
    ///
    /// # Errors
    /// If the folder is there and not empty, or cannot be written.
    pub fn start(recording: Recording, settings: &Settings) -> Result<Self, RecordError> {
        let all_depths = recording.all_depths;
        let mut files = Files::create(recording, *settings)?;
        let (messages, received) = channel();
        let thread = std::thread::spawn(move || {
            if let Err(error) = files.follow(&received) {
                log::warn!("nothing more is recorded: {error}");
            }
        });
        Ok(Self { messages: Some(messages), thread: Some(thread), all_depths, num_loops: settings.num_loops })
    }

    /// Whether tokens run every depth when they start.
    pub fn looks_ahead(&self) -> bool {
        self.all_depths
    }

    /// A request has arrived, with a [hash](traces::PrefixHashes::of_tokens) for each whole block of its prompt.
    pub fn arrived(&self, request: &Request, hashes: Vec<u64>, session: Option<String>) {
        self.send(Message::Arrived { request: *request, hashes, session });
    }

    /// A token was generated; `rows` are signals and predictions at the depths that it ran, from 0.
    pub fn token(&self, request: u32, token: u32, depth: u8, rows: Vec<(Signals, u32)>) {
        self.send(Message::Token { request, token, depth, rows });
    }

    pub fn ended(&self, request: u32, now: Nanos) {
        self.send(Message::Ended { request, now });
    }

    pub fn pass(&self, record: &PassRecord<'_>) {
        self.send(Message::Pass(record.logged(self.num_loops, unix_micros())));
    }

    fn send(&self, message: Message) {
        // A thread that could not write has said so.
        if let Some(messages) = &self.messages {
            let _ = messages.send(message);
        }
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.messages = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A request that has arrived.
#[derive(Debug)]
struct Recorded {
    rows: Vec<(Signals, u32)>,
    /// Place of the output length in `requests.csv`.
    place: u64,
}

/// A part of the exit trace that may change.
#[derive(Debug, Default)]
struct Part {
    /// The requests, in order of arrival.
    requests: Vec<Recorded>,
    /// How many of them have not ended.
    open: usize,
    has_changed: bool,
}

/// A session: its number, and when its last request ended, unless another has arrived since.
#[derive(Debug)]
struct Session {
    number: usize,
    last_end: Option<Nanos>,
}

/// The files.
struct Files {
    recording: Recording,
    settings: Settings,
    requests: File,
    /// Lines that are not written yet, and the length of the file with them.
    lines: Vec<String>,
    length: u64,
    /// Number and session of each request that has not ended, by id.
    open: HashMap<u32, (usize, Option<String>)>,
    num_requests: usize,
    sessions: HashMap<String, Session>,
    /// Parts of the exit trace that may change.
    parts: BTreeMap<usize, Part>,
    passes: PassLog,
    /// Whether there are passes that are not written.
    has_passes: bool,
    num_pass_parts: usize,
}

impl Files {
    fn create(recording: Recording, settings: Settings) -> Result<Self, RecordError> {
        let folder = &recording.folder;
        std::fs::create_dir_all(folder).map_err(unwritten(folder))?;
        if std::fs::read_dir(folder).map_err(unwritten(folder))?.next().is_some() {
            return Err(RecordError::NotEmpty(folder.clone()));
        }
        write_yaml(&folder.join("exits.yaml"), &recording.exits)?;
        let path = folder.join("requests.csv");
        let mut requests = File::create_new(&path).map_err(unwritten(&path))?;
        requests.write_all(HEADER.as_bytes()).map_err(unwritten(&path))?;
        let passes = PassLog { meta: recording.passes.clone(), runs: vec![settings.pass_run(PassOrigin::Replay)] };
        Ok(Self {
            recording,
            settings,
            requests,
            lines: Vec::new(),
            length: HEADER.len() as u64,
            open: HashMap::new(),
            num_requests: 0,
            sessions: HashMap::new(),
            parts: BTreeMap::new(),
            passes,
            has_passes: false,
            num_pass_parts: 0,
        })
    }

    /// Writes what happens until nothing more can.
    fn follow(&mut self, messages: &Receiver<Message>) -> Result<(), RecordError> {
        let mut next = Instant::now() + INTERVAL;
        loop {
            match messages.recv_timeout(next.saturating_duration_since(Instant::now())) {
                Ok(message) => self.take(message)?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return self.write(),
            }
            if Instant::now() >= next {
                self.write()?;
                next = Instant::now() + INTERVAL;
            }
        }
    }

    fn take(&mut self, message: Message) -> Result<(), RecordError> {
        match message {
            Message::Arrived { request, hashes, session } => self.arrived(&request, &hashes, session),
            Message::Token { request, token, depth, rows } => self.token(request, token, depth, rows),
            Message::Ended { request, now } => self.ended(request, now),
            Message::Pass(pass) => {
                let passes = &mut self.passes.runs[0].passes;
                passes.push(pass);
                self.has_passes = true;
                if passes.len() == PART_PASSES {
                    self.write_passes()?;
                    self.passes.runs[0].passes.clear();
                    self.num_pass_parts += 1;
                }
            }
        }
        Ok(())
    }

    fn arrived(&mut self, request: &Request, hashes: &[u64], session: Option<String>) {
        let number = self.num_requests;
        self.num_requests += 1;
        let Request { id, arrival, prompt_tokens, .. } = *request;
        let (of_session, think) = self.link(session.as_deref(), arrival);
        let begin = format!("{number},{},{prompt_tokens},", micros(arrival));
        let ids: Vec<String> = hashes.iter().map(u64::to_string).collect();
        let line =
            format!("{begin}{:0DIGITS$},{of_session},{think},{},{}\n", 1, self.settings.block_tokens, ids.join(" "));
        let room = PAGE - self.length as usize % PAGE;
        if line.len() > room && line.len() <= PAGE {
            // Readers skip empty lines.
            self.lines.push("\n".repeat(room));
            self.length += room as u64;
        }
        let place = self.length + begin.len() as u64;
        self.length += line.len() as u64;
        self.lines.push(line);
        let part = self.parts.entry(number / PART).or_default();
        part.requests.push(Recorded { rows: Vec::new(), place });
        part.open += 1;
        part.has_changed = true;
        self.open.insert(id, (number, session));
    }

    /// Session and think time of a request, as the request trace has them.
    fn link(&mut self, session: Option<&str>, arrival: Nanos) -> (String, String) {
        let Some(name) = session else { return Default::default() };
        let next = self.sessions.len();
        let is_known = self.sessions.contains_key(name);
        let session = self.sessions.entry(name.to_owned()).or_insert(Session { number: next, last_end: None });
        let think = session.last_end.take().filter(|_| is_known).map(|end| micros(arrival.since(end)));
        (session.number.to_string(), think.unwrap_or_default())
    }

    fn token(&mut self, request: u32, token: u32, depth: u8, mut rows: Vec<(Signals, u32)>) {
        let Some(&(number, _)) = self.open.get(&request) else { return };
        if !self.recording.all_depths {
            // Of depths that were not run, nothing is known but that the token would have exited before.
            rows.truncate(usize::from(depth) + 1);
        }
        rows.resize(self.settings.num_loops.into(), (Signals::certain(true), token));
        let part = self.parts.entry(number / PART).or_default();
        part.requests[number % PART].rows.extend(rows);
        part.has_changed = true;
    }

    fn ended(&mut self, request: u32, now: Nanos) {
        let Some((number, session)) = self.open.remove(&request) else { return };
        if let Some(session) = session.and_then(|name| self.sessions.get_mut(&name)) {
            session.last_end = Some(now);
        }
        if let Some(part) = self.parts.get_mut(&(number / PART)) {
            part.open -= 1;
        }
    }

    fn write(&mut self) -> Result<(), RecordError> {
        let folder = self.recording.folder.clone();
        // The exit trace has the generation of every request that the request trace has.
        let parts = std::mem::take(&mut self.parts);
        for (&number, part) in parts.iter().filter(|(_, part)| part.has_changed) {
            self.write_part(&folder, number, part)?;
        }
        self.write_requests(&parts).map_err(unwritten(&folder.join("requests.csv")))?;
        let is_done = |part: &Part| part.open == 0 && part.requests.len() == PART;
        self.parts = parts.into_iter().filter(|(_, part)| !is_done(part)).collect();
        self.parts.values_mut().for_each(|part| part.has_changed = false);
        if self.has_passes { self.write_passes() } else { Ok(()) }
    }

    fn write_part(&self, folder: &Path, number: usize, part: &Part) -> Result<(), RecordError> {
        let Recording { exits, signals, .. } = &self.recording;
        let first = (number * PART) as u32;
        let mut writer = ExitTraceWriter::create_part(folder, exits.clone(), *signals, number as u32, first)?;
        let num_loops = usize::from(self.settings.num_loops);
        // A request without a token counts as one of full depth.
        let none: Vec<_> = (1..=num_loops).map(|loops| (Signals::certain(loops == num_loops), 0)).collect();
        for Recorded { rows, .. } in &part.requests {
            writer.push_generation(if rows.is_empty() { &none } else { rows })?;
        }
        Ok(writer.finish()?)
    }

    fn write_requests(&mut self, parts: &BTreeMap<usize, Part>) -> std::io::Result<()> {
        self.requests.seek(SeekFrom::End(0))?;
        for line in self.lines.drain(..) {
            self.requests.write_all(line.as_bytes())?;
        }
        let changed = parts.values().filter(|part| part.has_changed).flat_map(|part| &part.requests);
        for Recorded { rows, place } in changed.filter(|recorded| !recorded.rows.is_empty()) {
            let tokens = rows.len() / usize::from(self.settings.num_loops);
            self.requests.seek(SeekFrom::Start(*place))?;
            self.requests.write_all(format!("{tokens:0DIGITS$}").as_bytes())?;
        }
        Ok(())
    }

    fn write_passes(&mut self) -> Result<(), RecordError> {
        self.has_passes = false;
        let name = format!("passes-{:06}.parquet", self.num_pass_parts);
        Ok(self.passes.write(self.recording.folder.join(name))?)
    }
}

/// Microseconds with three decimals.
fn micros(Nanos(nanos): Nanos) -> String {
    format!("{}.{:03}", nanos / 1000, nanos % 1000)
}
