//! Closed loops: requests that are sent when others have been answered.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::error::{Result, TraceError};
use crate::hash::{mix, uniform};
use crate::request::Request;
use crate::sessions::Sessions;
use crate::units::Nanos;

/// Time from an answer to the next request of a user, or of a tool that an answer calls.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Written", into = "String")]
pub enum ThinkTime {
    /// Always the same, in seconds.
    Fixed(f64),
    /// Exponentially distributed with this mean, in seconds.
    Exponential(f64),
}

/// A think time as it is written: a number of seconds or a text.
#[derive(Deserialize)]
#[serde(untagged)]
enum Written {
    Seconds(f64),
    Text(String),
}

impl TryFrom<Written> for ThinkTime {
    type Error = String;
    fn try_from(written: Written) -> Result<Self, String> {
        match written {
            Written::Seconds(seconds) => seconds.to_string().parse(),
            Written::Text(text) => text.parse(),
        }
    }
}

impl From<ThinkTime> for String {
    fn from(think: ThinkTime) -> Self {
        think.to_string()
    }
}

impl fmt::Display for ThinkTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(seconds) => write!(f, "{seconds}"),
            Self::Exponential(mean) => write!(f, "exponential:{mean}"),
        }
    }
}

impl FromStr for ThinkTime {
    type Err = String;

    /// Parses `SECONDS` or `exponential:MEAN_SECONDS`.
    fn from_str(text: &str) -> Result<Self, String> {
        let (number, is_exponential) = match text.strip_prefix("exponential:") {
            Some(mean) => (mean, true),
            None => (text, false),
        };
        let most = Request::MAX_ARRIVAL.as_secs_f64();
        let seconds = number.parse().ok().filter(|seconds| (0.0..=most).contains(seconds));
        let seconds = seconds.ok_or_else(|| {
            format!("think time `{text}`: expected SECONDS or exponential:MEAN_SECONDS, from 0 to a century")
        })?;
        Ok(if is_exponential { Self::Exponential(seconds) } else { Self::Fixed(seconds) })
    }
}

impl ThinkTime {
    /// No time at all.
    pub const NONE: Self = Self::Fixed(0.0);

    /// The think time before a request: equal for equal seeds and requests, whatever the order.
    pub fn before(self, request: u32, seed: u64) -> Nanos {
        let seconds = match self {
            Self::Fixed(seconds) => seconds,
            Self::Exponential(mean) => {
                -mean * (1.0 - uniform(mix(mix(seed ^ 0x0074_6869_6e6b) ^ u64::from(request)))).ln()
            }
        };
        Nanos::from_secs_f64(seconds).min(Request::MAX_ARRIVAL)
    }
}

/// Users who send one request after the other, and wait for the answer to each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Users {
    /// Number of users. Each of them either waits for an answer or thinks about the next request.
    pub number: NonZeroU32,
    /// Time before each request but the first of a user, where the trace does not say it.
    pub think: ThinkTime,
    /// Seed of think times.
    pub seed: u64,
}

/// Which requests are sent when others have been answered.
///
/// A session is a sequence of requests. Without users, its first request is sent at its arrival. With users, arrivals
/// play no part: all users begin at time 0, and each takes the next session of the trace when its last one has ended. A
/// request outside any session is a session of one.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClosedLoop {
    /// Users; `None` if sessions begin at their own times.
    pub users: Option<Users>,
    /// The sessions of the trace; `None` if each request is one.
    pub sessions: Option<Arc<Sessions>>,
}

impl ClosedLoop {
    /// A fixed number of requests in flight: the next one is sent when another one has been answered.
    ///
    /// A slow moment of the machine delays what is sent too. It stretches a run but does not make a queue grow, so two
    /// runs that share such moments can be compared by their ratio.
    pub fn in_flight(number: NonZeroU32) -> Self {
        Self { users: Some(Users { number, think: ThinkTime::NONE, seed: 0 }), sessions: None }
    }

    /// Sessions that begin at their own times.
    ///
    /// # Errors
    /// If the trace does not say when they begin.
    pub fn of_sessions(name: &str, sessions: Sessions) -> Result<Self> {
        match sessions.num_without_start() {
            0 => Ok(Self { users: None, sessions: Some(Arc::new(sessions)) }),
            count => Err(without_arrivals(name, count)),
        }
    }

    /// The time from the answer before a request in its session to the request; `None` if it waits for none. With users,
    /// every request of a session waits for the one before.
    pub fn think(&self, request: u32, is_first: bool) -> Option<Nanos> {
        let own = self.sessions.as_ref().and_then(|sessions| sessions.of(request).think);
        match (own, &self.users) {
            (Some(own), _) => Some(own),
            (None, Some(users)) if !is_first => Some(users.think.before(request, users.seed)),
            _ => None,
        }
    }
}

/// The error of a trace without the arrivals that are needed.
fn without_arrivals(name: &str, count: usize) -> TraceError {
    let found = format!("none, and {count} requests of {name} without an arrival time");
    TraceError::spec("users", found, "a number of users who send them one after the other: `users: N` (`--users N`)")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn think_times_are_read_and_written() {
        for (text, think) in [("2", ThinkTime::Fixed(2.0)), ("exponential:0.5", ThinkTime::Exponential(0.5))] {
            assert_eq!(text.parse(), Ok(think));
            assert_eq!(think.to_string(), text);
            assert_eq!(serde_yaml::from_str::<ThinkTime>(text).unwrap(), think);
            let written = serde_yaml::to_string(&think).unwrap();
            assert_eq!(serde_yaml::from_str::<ThinkTime>(&written).unwrap(), think, "{written}");
        }
        for text in ["", "-1", "NaN", "inf", "exponential:-2", "uniform:3", "1e99"] {
            let error = text.parse::<ThinkTime>().unwrap_err();
            assert!(error.contains("expected SECONDS or exponential:MEAN_SECONDS"), "{error}");
        }
    }

    #[test]
    fn exponential_think_times_have_their_mean_and_depend_on_seed_and_request_only() {
        let think = ThinkTime::Exponential(2.0);
        let times: Vec<f64> = (0..20_000).map(|request| think.before(request, 7).as_secs_f64()).collect();
        let mean = times.iter().sum::<f64>() / times.len() as f64;
        let below = times.iter().filter(|&&time| time < 2.0).count() as f64 / times.len() as f64;
        assert!((mean / 2.0 - 1.0).abs() < 0.03, "{mean}");
        assert!((below - (1.0 - (-1.0_f64).exp())).abs() < 0.02, "{below}");
        assert_eq!(think.before(5, 7), think.before(5, 7));
        assert_ne!(think.before(5, 7), think.before(5, 8));
        assert_eq!(ThinkTime::Fixed(0.25).before(9, 1), Nanos(250_000_000));
    }
}
