//! Routing: which of several machines serves a request.

use std::cmp::Reverse;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use traces::Request;

use crate::exits::{hash, scaled};

/// A rule that distributes requests over machines. Load is the number of requests that wait or run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Routing {
    /// To each machine in turn.
    RoundRobin,
    /// To a random machine, by a hash of this seed and the request's id.
    Random(u64),
    /// To the machine with the least load; the first one of equals.
    LeastLoaded,
    /// To the less loaded of two random machines; the first drawn of equals.
    TwoChoices(u64),
    /// To the machine whose prefix cache has most of the prompt, of those with at most so many requests more than the least
    /// loaded; the least loaded of equals.
    Prefix(u64),
}

impl Routing {
    /// How many more requests than the least loaded machine one may have that gets a request for its prefix, by default.
    pub const MORE_REQUESTS: u64 = 8;
}

impl fmt::Display for Routing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::RoundRobin => f.write_str("round-robin"),
            Self::Random(seed) => write!(f, "random:{seed}"),
            Self::LeastLoaded => f.write_str("least-loaded"),
            Self::TwoChoices(seed) => write!(f, "two-choices:{seed}"),
            Self::Prefix(more) => write!(f, "prefix:{more}"),
        }
    }
}

impl From<Routing> for String {
    fn from(routing: Routing) -> Self {
        routing.to_string()
    }
}

impl TryFrom<String> for Routing {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl FromStr for Routing {
    type Err = String;

    /// Parses `round-robin`, `random[:SEED]`, `least-loaded`, `two-choices[:SEED]` or `prefix[:MORE]`; the default seed is 0.
    fn from_str(text: &str) -> Result<Self, String> {
        let (name, number) = match text.split_once(':') {
            Some((name, number)) => (name, number.parse().ok()),
            None if text == "prefix" => (text, Some(Self::MORE_REQUESTS)),
            None => (text, Some(0)),
        };
        match (name, number) {
            ("round-robin", _) if text == name => Ok(Self::RoundRobin),
            ("least-loaded", _) if text == name => Ok(Self::LeastLoaded),
            ("random", Some(seed)) => Ok(Self::Random(seed)),
            ("two-choices", Some(seed)) => Ok(Self::TwoChoices(seed)),
            ("prefix", Some(more)) => Ok(Self::Prefix(more)),
            _ => Err(format!(
                "unknown routing `{text}`: expected round-robin, random[:SEED], least-loaded, two-choices[:SEED] or \
                 prefix[:MORE]"
            )),
        }
    }
}

/// State of a routing rule.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    routing: Routing,
    turn: usize,
}

impl Router {
    pub(crate) fn new(routing: Routing) -> Self {
        Self { routing, turn: 0 }
    }

    /// The index of the machine for a request, given the load of each machine and how many tokens of the prompt its
    /// prefix cache has.
    pub(crate) fn route(
        &mut self,
        request: &Request,
        load: impl Fn(usize) -> u64,
        cached: impl Fn(usize) -> u32,
        machines: usize,
    ) -> usize {
        let drawn =
            |seed, draw, among: usize| scaled(hash(seed, u64::from(request.id) << 1 | draw), among as u64) as usize;
        match self.routing {
            _ if machines == 1 => 0,
            Routing::RoundRobin => {
                let index = self.turn;
                self.turn = (index + 1) % machines;
                index
            }
            Routing::Random(seed) => drawn(seed, 0, machines),
            Routing::LeastLoaded => (0..machines).min_by_key(|&index| load(index)).unwrap_or(0),
            Routing::TwoChoices(seed) => {
                let first = drawn(seed, 0, machines);
                let other = drawn(seed, 1, machines - 1);
                let second = if other >= first { other + 1 } else { other };
                if load(second) < load(first) { second } else { first }
            }
            Routing::Prefix(more) => {
                let least = (0..machines).map(&load).min().unwrap_or(0);
                let near = (0..machines).filter(|&index| load(index) <= least.saturating_add(more));
                near.min_by_key(|&index| (Reverse(cached(index)), load(index))).unwrap_or(0)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use traces::Nanos;

    fn routed(routing: Routing, loads: &[u64], count: u32) -> Vec<usize> {
        let mut router = Router::new(routing);
        let request = |id| Request { id, arrival: Nanos::ZERO, prompt_tokens: 1, output_tokens: 1 };
        let cached = |index| [0, 48, 32, 48][index];
        (0..count).map(|id| router.route(&request(id), |index| loads[index], cached, loads.len())).collect()
    }

    #[test]
    fn names_read_back_what_they_print() {
        for text in ["round-robin", "random:7", "least-loaded", "two-choices:9", "prefix:3"] {
            assert_eq!(text.parse::<Routing>().unwrap().to_string(), text);
        }
        assert_eq!("random".parse(), Ok(Routing::Random(0)));
        assert_eq!("prefix".parse(), Ok(Routing::Prefix(Routing::MORE_REQUESTS)));
        for text in ["", "robin", "round-robin:1", "random:x", "random:-1", "prefix:x"] {
            assert!(text.parse::<Routing>().unwrap_err().contains("expected"), "{text}");
        }
    }

    #[test]
    fn requests_go_where_the_rule_says() {
        assert_eq!(routed(Routing::RoundRobin, &[0, 0, 0], 5), [0, 1, 2, 0, 1]);
        assert_eq!(routed(Routing::LeastLoaded, &[3, 1, 2, 1], 2), [1, 1]);
        // Of those near the least load, the one with most of the prompt; of equals, the least loaded.
        for (more, loads, expected) in
            [(1, [1, 2, 0, 9], 2), (2, [1, 2, 0, 9], 1), (8, [1, 2, 0, 9], 1), (9, [1, 2, 0, 1], 3)]
        {
            assert_eq!(routed(Routing::Prefix(more), &loads, 1), [expected], "{more}");
        }
        let loads = [9, 0, 5];
        let shares = |routing| {
            let routed = routed(routing, &loads, 3000);
            [0, 1, 2].map(|index| routed.iter().filter(|&&machine| machine == index).count())
        };
        assert!(shares(Routing::Random(1)).iter().all(|count| (900..1100).contains(count)));
        // The most loaded machine never wins a pair; the least loaded one wins two pairs in three.
        let [most, least, middle] = shares(Routing::TwoChoices(1));
        assert!(most == 0 && (1900..2100).contains(&least) && (900..1100).contains(&middle));
    }
}
