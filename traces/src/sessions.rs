//! Sessions: which requests of a trace belong together, and which wait for the answer to another one.

use std::collections::HashMap;

use crate::units::Nanos;

/// How a request of a session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Link {
    /// Number of its session; `None` if it belongs to none.
    pub session: Option<u32>,
    /// Time from the last token of the request before it in its session until it is sent: think time of a user, or time
    /// of a tool. `None` if it is sent at its own arrival.
    pub think: Option<Nanos>,
    /// Whether its arrival is known. If not, the arrival is the earliest possible: that of the request before it, plus
    /// the think time.
    pub is_timed: bool,
}

impl Link {
    /// A request that belongs to no session.
    pub const ALONE: Self = Self { session: None, think: None, is_timed: true };
}

/// The sessions of a trace. The requests of a session follow each other in the order of the trace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sessions {
    links: Vec<Link>,
    /// Whether each request is the first of its session, or belongs to none.
    firsts: Vec<bool>,
}

impl Sessions {
    /// Sessions of requests in the order of their trace. Sessions are numbered anew in order of appearance, and requests
    /// without another one before them in their session wait for none.
    pub fn new(links: impl IntoIterator<Item = Link>) -> Self {
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        let renumbered = links.into_iter().map(|link| {
            let Some(session) = link.session else { return (Link { think: None, ..link }, true) };
            let (next, is_known) = (numbers.len() as u32, numbers.contains_key(&session));
            let number = *numbers.entry(session).or_insert(next);
            (Link { session: Some(number), think: link.think.filter(|_| is_known), ..link }, !is_known)
        });
        let (links, firsts) = renumbered.unzip();
        Self { links, firsts }
    }

    /// Whether a request is the first of its session, or belongs to none.
    pub fn is_first(&self, request: u32) -> bool {
        self.firsts.get(request as usize).copied().unwrap_or(true)
    }

    /// How a request begins; alone if it is not in the trace.
    pub fn of(&self, request: u32) -> Link {
        self.links.get(request as usize).copied().unwrap_or(Link::ALONE)
    }

    /// How every request begins, in the order of the trace.
    pub fn links(&self) -> &[Link] {
        &self.links
    }

    /// Number of sessions.
    pub fn count(&self) -> usize {
        self.links.iter().filter_map(|link| link.session).max().map_or(0, |last| last as usize + 1)
    }

    /// Number of requests that wait for the answer to another one.
    pub fn num_following(&self) -> usize {
        self.links.iter().filter(|link| link.think.is_some()).count()
    }

    /// Number of requests that wait for no other one and whose arrival is not known.
    pub fn num_without_start(&self) -> usize {
        self.links.iter().filter(|link| !link.is_timed && link.think.is_none()).count()
    }

    /// Whether the arrival of each request is known.
    pub fn is_timed(&self) -> bool {
        self.links.iter().all(|link| link.is_timed)
    }

    /// For each request, the next one of its session.
    pub fn followers(&self) -> Vec<Option<u32>> {
        let mut next = vec![None; self.links.len()];
        let mut last: Vec<Option<u32>> = vec![None; self.count()];
        for (id, link) in (0_u32..).zip(&self.links) {
            let Some(session) = link.session else { continue };
            if let Some(before) = last[session as usize].replace(id) {
                next[before as usize] = Some(id);
            }
        }
        next
    }

    /// The sessions of the requests at these indices, in this order. A request whose predecessors are not among them is
    /// sent at its arrival.
    pub(crate) fn select(&self, places: impl IntoIterator<Item = usize>) -> Self {
        let links: Vec<Link> = places.into_iter().map(|place| self.links[place]).collect();
        let mut selected = Self::new(links.iter().copied());
        for (link, before) in selected.links.iter_mut().zip(&links) {
            link.is_timed |= before.think.is_some() && link.think.is_none();
        }
        selected
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(session: u32, think: Option<u64>) -> Link {
        Link { session: Some(session), think: think.map(Nanos), is_timed: think.is_none() }
    }

    #[test]
    fn sessions_are_numbered_by_appearance_and_the_first_request_waits_for_none() {
        let sessions =
            Sessions::new([link(7, Some(5)), Link::ALONE, link(3, None), link(7, Some(9)), link(3, Some(2))]);
        let of = |id| (sessions.of(id).session, sessions.of(id).think);
        let think = |nanos| Some(Nanos(nanos));
        let expected = [(Some(0), None), (None, None), (Some(1), None), (Some(0), think(9)), (Some(1), think(2))];
        assert_eq!([0, 1, 2, 3, 4].map(of), expected);
        assert_eq!((sessions.count(), sessions.num_following(), sessions.num_without_start()), (2, 2, 1));
        assert_eq!(sessions.followers(), [Some(3), None, Some(4), None, None]);
        assert_eq!([0, 1, 2, 3, 4].map(|id| sessions.is_first(id)), [true, true, true, false, false]);
        assert_eq!(sessions.of(99), Link::ALONE);
    }

    #[test]
    fn a_request_that_is_cut_off_from_the_one_before_it_is_sent_at_its_arrival() {
        let sessions = Sessions::new([link(0, None), link(1, None), link(0, Some(4)), link(1, Some(6))]);
        let cut = sessions.select([1, 2, 3]);
        assert_eq!(cut.links().iter().map(|link| link.think).collect::<Vec<_>>(), [None, None, Some(Nanos(6))]);
        assert_eq!(cut.num_without_start(), 0);
        assert_eq!(sessions.select(0..4), sessions);
    }
}
