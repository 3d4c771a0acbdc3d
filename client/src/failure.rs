//! Requests that got no whole answer, and why.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use reqwest::StatusCode;
use serde::Serialize;

/// Kinds of failures, which are counted one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// There was no connection: it was refused, or the host was not found.
    Connection,
    /// Status 429: the server asks to send later.
    RateLimited,
    /// Another status from 400 to 499: the request is wrong.
    BadRequest,
    /// Another status that is not a success, mostly from 500 to 599.
    ServerError,
    /// The answer was not whole within the time limit.
    Timeout,
    /// The answer ended before its end was announced.
    Cut,
    /// The server reported an error within the answer.
    Reported,
    /// The answer is not what the API defines.
    Protocol,
    /// The answer was whole and had no token.
    Empty,
}

impl FailureKind {
    /// All kinds.
    pub const ALL: [Self; 9] = [
        Self::Connection,
        Self::RateLimited,
        Self::BadRequest,
        Self::ServerError,
        Self::Timeout,
        Self::Cut,
        Self::Reported,
        Self::Protocol,
        Self::Empty,
    ];
}

impl fmt::Display for FailureKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Connection => "no connection",
            Self::RateLimited => "rate limited (429)",
            Self::BadRequest => "refused as a bad request (4xx)",
            Self::ServerError => "server error",
            Self::Timeout => "timed out",
            Self::Cut => "answer cut off",
            Self::Reported => "error within the answer",
            Self::Protocol => "not the protocol",
            Self::Empty => "answer without tokens",
        })
    }
}

/// Why a request got no whole answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind}: {message}")]
pub struct Failure {
    /// The kind.
    pub kind: FailureKind,
    /// What was found.
    pub message: String,
    /// After what time the server asks to send the request again, if it does.
    pub retry_after: Option<Duration>,
}

/// Letters of a server's message that are kept.
const MESSAGE: usize = 300;
/// Time until a retry where a server that asks for one does not say when, or says a date.
const RETRY_AFTER: Duration = Duration::from_secs(1);

impl Failure {
    pub(crate) fn new(kind: FailureKind, message: impl fmt::Display) -> Self {
        let message = message.to_string().trim().chars().take(MESSAGE).collect();
        Self { kind, message, retry_after: None }
    }

    /// Of a request that found no server, or whose connection was lost before the answer began.
    pub(crate) fn of_sending(error: &reqwest::Error) -> Self {
        let kind = if error.is_connect() { FailureKind::Connection } else { FailureKind::Cut };
        Self::new(kind, causes(error))
    }

    /// Of a connection that was lost within the answer.
    pub(crate) fn of_reading(error: &reqwest::Error) -> Self {
        Self::new(FailureKind::Cut, causes(error))
    }

    /// Of an answer that is no success.
    pub(crate) fn of_status(status: StatusCode, retry_after: Option<&str>, body: &str) -> Self {
        let kind = match status {
            StatusCode::TOO_MANY_REQUESTS => FailureKind::RateLimited,
            status if status.is_client_error() => FailureKind::BadRequest,
            _ => FailureKind::ServerError,
        };
        let asks =
            kind == FailureKind::RateLimited || (status == StatusCode::SERVICE_UNAVAILABLE && retry_after.is_some());
        let seconds = retry_after.and_then(|after| after.trim().parse().ok()).map(Duration::from_secs);
        Self {
            retry_after: asks.then(|| seconds.unwrap_or(RETRY_AFTER)),
            ..Self::new(kind, format!("found status {status}, expected 200 OK: {body}"))
        }
    }
}

/// An error with its causes, each said once.
fn causes(error: &reqwest::Error) -> String {
    let mut message = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !message.contains(&text) {
            message = format!("{message}: {text}");
        }
        cause = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_servers_that_ask_for_it_are_tried_again_and_when_they_say() {
        let of = |status: u16, after| {
            let failure = Failure::of_status(StatusCode::from_u16(status).unwrap(), after, "");
            (failure.kind, failure.retry_after.map(|after| after.as_secs()))
        };
        assert_eq!(of(429, Some("7")), (FailureKind::RateLimited, Some(7)));
        assert_eq!(of(429, Some("Wed, 21 Oct 2026 07:28:00 GMT")), (FailureKind::RateLimited, Some(1)));
        assert_eq!(of(429, None), (FailureKind::RateLimited, Some(1)));
        assert_eq!(of(503, Some("2")), (FailureKind::ServerError, Some(2)));
        assert_eq!(of(503, None), (FailureKind::ServerError, None));
        assert_eq!(of(404, Some("2")), (FailureKind::BadRequest, None));
        assert_eq!(of(302, None), (FailureKind::ServerError, None));
    }

    #[test]
    fn long_messages_are_cut() {
        assert_eq!(Failure::new(FailureKind::Reported, "é".repeat(1000)).message.chars().count(), MESSAGE);
    }
}
