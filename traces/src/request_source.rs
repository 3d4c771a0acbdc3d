//! Requests that are read or made while they are used, so that memory does not grow with their number.

use std::fmt;
use std::path::{Path, PathBuf};

use crate::error::{Result, TraceError};
use crate::formats::{Layout, Rows};
use crate::generate::Generated;
use crate::request::{Request, Scale, Span};
use crate::request_file::{ReadOptions, TimeUnit, ZeroTokens};
use crate::units::Nanos;

/// Requests in order of arrival that can be gone through any number of times.
pub trait Requests: Sync {
    /// Number of requests.
    fn count(&self) -> usize;

    /// Final length of the longest request, in tokens; 1 without requests.
    fn longest(&self) -> u32;

    /// Hands the requests, one by one and from the first on, to `read`.
    ///
    /// # Errors
    /// If they are in a file that can no longer be read as it was.
    fn read<T>(&self, read: impl FnOnce(&mut dyn Iterator<Item = Request>) -> T) -> Result<T>;
}

impl Requests for Vec<Request> {
    fn count(&self) -> usize {
        self.len()
    }

    fn longest(&self) -> u32 {
        self.iter().map(Request::context_tokens).max().unwrap_or(1)
    }

    fn read<T>(&self, read: impl FnOnce(&mut dyn Iterator<Item = Request>) -> T) -> Result<T> {
        Ok(read(&mut self.iter().copied()))
    }
}

/// Requests that are held if they are few; else they are made anew, or read from their file, each time.
///
/// Made by [`RequestSpec::open`](crate::RequestSpec::open).
#[derive(Clone, Debug)]
pub struct RequestSource {
    origin: Origin,
    count: usize,
    first_arrival: Nanos,
}

#[derive(Clone, Debug)]
enum Origin {
    Held(Vec<Request>),
    Generated { generated: Generated, limits: TokenLimits },
    File { part: FilePart, longest: u32 },
}

/// Most prompt and output tokens of a request; longer ones are cut.
pub(crate) type TokenLimits = (u32, u32);

impl RequestSource {
    /// Number of generated requests up to which they are held, in 6 MB.
    pub(crate) const HELD_REQUESTS: u32 = 1 << 18;
    /// Size of a file up to which its requests are held, in bytes.
    pub(crate) const HELD_BYTES: u64 = 4 << 20;

    pub(crate) fn held(requests: Vec<Request>) -> Self {
        let first_arrival = requests.first().map_or(Nanos::ZERO, |request| request.arrival);
        Self { count: requests.len(), first_arrival, origin: Origin::Held(requests) }
    }

    pub(crate) fn generated(generated: Generated, limits: TokenLimits) -> Self {
        // The first generated request arrives at time 0.
        let (count, first_arrival) = (generated.len(), Nanos::ZERO);
        Self { origin: Origin::Generated { generated, limits }, count, first_arrival }
    }

    /// Arrival of the first request.
    pub fn first_arrival(&self) -> Nanos {
        self.first_arrival
    }

    #[cfg(test)]
    pub(crate) fn is_held(&self) -> bool {
        matches!(self.origin, Origin::Held(_))
    }
}

impl Requests for RequestSource {
    fn count(&self) -> usize {
        self.count
    }

    fn longest(&self) -> u32 {
        match &self.origin {
            Origin::Held(requests) => requests.longest(),
            Origin::Generated { generated, limits: (prompt, output) } => {
                let lengths = generated.clone().map(|request| request.clipped(*prompt, *output).context_tokens());
                lengths.max().unwrap_or(1)
            }
            Origin::File { longest, .. } => *longest,
        }
    }

    fn read<T>(&self, read: impl FnOnce(&mut dyn Iterator<Item = Request>) -> T) -> Result<T> {
        match &self.origin {
            Origin::Held(requests) => requests.read(read),
            Origin::Generated { generated, limits: (prompt, output) } => {
                Ok(read(&mut generated.clone().map(|request| request.clipped(*prompt, *output))))
            }
            Origin::File { part, .. } => {
                let mut requests = part.open()?;
                let result = read(&mut requests);
                requests.error.map_or(Ok(result), Err)
            }
        }
    }
}

/// What is taken of a file, as it is described, and what it is made into.
pub(crate) struct Selection<S> {
    /// From and to when requests arrive, counted from the first arrival.
    pub window: Option<(Nanos, Nanos)>,
    /// Most requests.
    pub first: usize,
    /// The rate at which they arrive, given how they do.
    pub scale: S,
    pub limits: TokenLimits,
}

/// Requests of a file whose rows are in order of arrival.
#[derive(Clone)]
struct FilePart {
    path: PathBuf,
    layout: &'static Layout,
    time_unit: Option<TimeUnit>,
    zero_tokens: ZeroTokens,
    /// Time 0, in times of the file.
    origin: i128,
    /// Requests before the first one.
    skipped: usize,
    count: usize,
    scale: Option<Scale>,
    limits: TokenLimits,
}

impl fmt::Debug for FilePart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FilePart").field("path", &self.path).field("count", &self.count).finish_non_exhaustive()
    }
}

/// What a file was found to hold.
pub(crate) struct OpenFile {
    pub requests: RequestSource,
    pub warnings: Vec<String>,
}

impl RequestSource {
    /// Goes through a file once, to read it again whenever its requests are used. `None` if it must be held: its rows
    /// depend on each other, or are not in order of arrival.
    ///
    /// # Errors
    /// If the file does not read, or `selection` cannot be made of it.
    pub(crate) fn of_file(
        path: &Path,
        layout: &'static Layout,
        options: &ReadOptions<'_>,
        selection: Selection<impl FnOnce(Span) -> Result<Option<Scale>>>,
    ) -> Result<Option<OpenFile>> {
        let Some(mut rows) = layout.rows(path, options)? else { return Ok(None) };
        let Selection { window, first: most, scale, limits } = selection;
        let mut times: Option<(i128, i128)> = None;
        let mut chosen: Option<(i128, i128)> = None;
        let (mut skipped, mut count, mut longest) = (0, 0, 1);
        while let Some(row) = rows.next_request()? {
            let (first, last) = times.unwrap_or((row.time, row.time));
            if row.time < last {
                return Ok(None);
            }
            times = Some((first, row.time));
            let since = row.time - first;
            match window {
                Some((from, _)) if since < i128::from(from.0) => skipped += 1,
                Some((_, to)) if since >= i128::from(to.0) => {}
                _ if count < most => {
                    count += 1;
                    chosen = Some((chosen.map_or(row.time, |(first, _)| first), row.time));
                    longest = longest.max(row.counted_from(first).clipped(limits.0, limits.1).context_tokens());
                }
                _ => {}
            }
        }
        let (Some((first, last)), Some((first_chosen, last_chosen))) = (times, chosen) else { return Ok(None) };
        let origin = rows.origin(first, last)?;
        let origin = window.map_or(origin, |(from, _)| first + i128::from(from.0));
        let arrival = |time: i128| Nanos((time - origin) as u64);
        let scale = scale(Span { count, first: arrival(first_chosen), last: arrival(last_chosen) })?;
        let &ReadOptions { time_unit, zero_tokens, .. } = options;
        let path = path.to_owned();
        let part = FilePart { path, layout, time_unit, zero_tokens, origin, skipped, count, scale, limits };
        let first_arrival = arrival(first_chosen);
        let requests = Self { origin: Origin::File { part, longest }, count, first_arrival };
        Ok(Some(OpenFile { requests, warnings: rows.warnings() }))
    }
}

impl FilePart {
    fn open(&self) -> Result<PartRequests<'_>> {
        let &Self { time_unit, zero_tokens, .. } = self;
        let options = ReadOptions { time_unit, zero_tokens, ..ReadOptions::default() };
        let rows = self.layout.rows(&self.path, &options)?.ok_or_else(|| self.changed())?;
        let mut requests = PartRequests { part: self, rows, next: 0, last: i128::MIN, error: None };
        for _ in 0..self.skipped {
            requests.next_row()?;
        }
        Ok(requests)
    }

    fn changed(&self) -> TraceError {
        TraceError::file(&self.path, "other requests than before", "a file that does not change while it is used")
    }
}

/// The requests of a part of a file. They end at the first error.
struct PartRequests<'a> {
    part: &'a FilePart,
    rows: Rows<'static>,
    next: u32,
    last: i128,
    error: Option<TraceError>,
}

impl PartRequests<'_> {
    fn next_row(&mut self) -> Result<Request> {
        let row = self.rows.next_request()?.filter(|row| row.time >= self.last).ok_or_else(|| self.part.changed())?;
        self.last = row.time;
        // Of requests before the window, nothing is used.
        Ok(row.counted_from(self.part.origin.min(row.time)))
    }

    fn next_request(&mut self) -> Result<Request> {
        let request = self.next_row()?;
        let &FilePart { scale, limits, .. } = self.part;
        let arrival = scale.map_or(request.arrival, |scale| scale.of(request.arrival));
        let request = Request { id: self.next, arrival, ..request };
        self.next += 1;
        Ok(request.clipped(limits.0, limits.1))
    }
}

impl Iterator for PartRequests<'_> {
    type Item = Request;

    fn next(&mut self) -> Option<Request> {
        if self.next as usize == self.part.count || self.error.is_some() {
            return None;
        }
        match self.next_request() {
            Ok(request) => Some(request),
            Err(error) => {
                self.error = Some(error);
                None
            }
        }
    }
}
