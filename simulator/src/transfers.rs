//! Keys and values on their way from prompt machines to decode machines.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use scheduler::{Reservation, Slot};
use traces::Nanos;

use crate::roles::Link;

/// Sums over the transfers of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TransferTotals {
    /// Number of transfers.
    pub count: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
    /// Time of all transfers, from their start to the arrival of the last byte.
    pub time: Nanos,
    /// Time from the end of the prompt to the start of the transfer, in all: waiting for the next pass, a slot and blocks of
    /// the decode machine, and for the links.
    pub wait: Nanos,
}

/// A slot of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Place {
    pub machine: usize,
    pub slot: Slot,
}

/// A transfer that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Arrival {
    pub from: Place,
    pub to: Place,
}

/// Transfers that wait or run, and when links are free.
#[derive(Clone, Debug)]
pub(crate) struct Transfers {
    link: Link,
    bytes_per_token: u64,
    /// By request whose prompt is complete: where its keys and values are, and since when.
    waiting: HashMap<u32, (Place, Nanos)>,
    /// By end, then in the order of their start.
    running: BinaryHeap<Reverse<(Nanos, u64, Arrival)>>,
    /// When the link of each machine has sent or received what it has to.
    free: Vec<Nanos>,
    totals: TransferTotals,
}

impl Transfers {
    pub fn new(link: Link, bytes_per_token: u64, machines: usize) -> Self {
        Self {
            link,
            bytes_per_token,
            waiting: HashMap::new(),
            running: BinaryHeap::new(),
            free: vec![Nanos::ZERO; machines],
            totals: TransferTotals::default(),
        }
    }

    /// The prompt of a request is complete.
    pub fn wait(&mut self, request: u32, from: Place, now: Nanos) {
        self.waiting.insert(request, (from, now));
    }

    /// A decode machine has reserved a slot and blocks for a request.
    pub fn start(&mut self, machine: usize, reservation: Reservation, now: Nanos) {
        let Some((from, since)) = self.waiting.remove(&reservation.request) else {
            debug_assert!(false, "a reservation is for a request that was handed over");
            return;
        };
        let bytes = u64::from(reservation.tokens) * self.bytes_per_token;
        let start = now.max(self.free[from.machine]).max(self.free[machine]);
        let sent = start + self.link.sending_time(bytes);
        self.free[from.machine] = sent;
        self.free[machine] = sent;
        let end = sent + self.link.latency();
        let arrival = Arrival { from, to: Place { machine, slot: reservation.slot } };
        self.running.push(Reverse((end, self.totals.count, arrival)));
        self.totals.count += 1;
        self.totals.bytes += bytes;
        self.totals.time += end.since(start);
        self.totals.wait += start.since(since);
    }

    pub fn next_end(&self) -> Option<Nanos> {
        self.running.peek().map(|Reverse((end, ..))| *end)
    }

    /// The next transfer that ends at `now` or before.
    pub fn take_until(&mut self, now: Nanos) -> Option<Arrival> {
        self.running.peek().filter(|Reverse((end, ..))| *end <= now)?;
        self.running.pop().map(|Reverse((.., arrival))| arrival)
    }

    pub fn totals(&self) -> TransferTotals {
        self.totals
    }
}
