//! Rows of requests that are passed on in order of id, so that memory holds only those of requests in flight.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use foldhash::fast::FixedState;
use traces::Request;

use super::RequestRow;

/// The rows of one run, from all its machines. Each is passed on when its request and all with lower ids have ended.
///
/// Memory holds the rows from that of the oldest request that has not ended to that of the newest which has, of 80 bytes
/// each. Ids must count from 0.
#[derive(Clone)]
pub struct RequestLog(Arc<Mutex<InOrder>>);

type WriteRow = Box<dyn FnMut(Option<&RequestRow>) -> io::Result<()> + Send>;

struct InOrder {
    /// Id of the first of `rows`.
    next: u32,
    rows: VecDeque<RequestRow>,
    write: WriteRow,
    failure: Option<io::Error>,
}

impl fmt::Debug for RequestLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RequestLog").finish_non_exhaustive()
    }
}

impl RequestLog {
    /// A log that passes rows to `write`, and `None` after the last of them, until that fails.
    pub fn new(write: impl FnMut(Option<&RequestRow>) -> io::Result<()> + Send + 'static) -> Self {
        let rows = InOrder { next: 0, rows: VecDeque::new(), write: Box::new(write), failure: None };
        Self(Arc::new(Mutex::new(rows)))
    }

    /// Whether a row could not be passed on: the run is in vain.
    pub fn has_failed(&self) -> bool {
        self.lock().failure.is_some()
    }

    /// Passes on what is left when the run is over: rows of requests that have ended, after ids that never came.
    ///
    /// # Errors
    /// The first one of `write`.
    pub fn finish(self) -> io::Result<()> {
        let mut log = self.lock();
        let left = std::mem::take(&mut log.rows);
        left.iter().filter(|row| row.is_finished()).for_each(|row| log.write(Some(row)));
        log.write(None);
        log.failure.take().map_or(Ok(()), Err)
    }

    /// Adds what a machine did of a request.
    fn add(&self, row: &RequestRow) {
        let mut log = self.lock();
        let Some(place) = row.id.checked_sub(log.next) else { return };
        while log.rows.len() <= place as usize {
            let id = log.next + log.rows.len() as u32;
            log.rows.push_back(RequestRow::unseen(id));
        }
        log.rows[place as usize].merge(row);
        while let Some(row) = log.rows.front().copied().filter(RequestRow::is_finished) {
            log.rows.pop_front();
            log.next += 1;
            log.write(Some(&row));
        }
    }

    fn lock(&self) -> MutexGuard<'_, InOrder> {
        self.0.lock().expect("no thread panics with it")
    }
}

impl InOrder {
    fn write(&mut self, row: Option<&RequestRow>) {
        if self.failure.is_none() {
            self.failure = (self.write)(row).err();
        }
    }
}

/// The rows of the requests on a machine, on their way to a log.
#[derive(Clone, Debug)]
pub(super) struct OpenRows {
    rows: HashMap<u32, RequestRow, FixedState>,
    log: RequestLog,
}

impl OpenRows {
    pub fn new(log: RequestLog) -> Self {
        Self { rows: HashMap::default(), log }
    }

    #[inline(never)]
    pub fn row_of(&mut self, request: &Request) -> &mut RequestRow {
        self.rows.entry(request.id).or_insert_with(|| RequestRow::of(request))
    }

    /// The machine has done its part of a request.
    pub fn end(&mut self, request: &Request) {
        if let Some(row) = self.rows.remove(&request.id) {
            self.log.add(&row);
        }
    }
}
