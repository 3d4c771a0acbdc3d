//! Roles: machines that run prompts, machines that generate, and the link between them.
//!
//! ```text
//! requests ──routing──► prompt machines ──keys and values over the link──► decode machines ──► tokens
//!              └──────► machines of both roles ─────────────────────────────────────────────► tokens
//! ```
//!
//! A prompt machine runs the prompt of a request, up to its first token. A decode machine generates the rest. Routing
//! chooses the prompt machine at the arrival; the decode machine is the one with the least load when the prompt is complete.

use std::fmt;

use latency::LatencyModel;
use scheduler::{Batching, ScheduleError, Settings};
use serde::{Deserialize, Serialize};
use traces::{Nanos, Request};

use crate::memory::ModelMemory;

/// What a machine does of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// All of it.
    Both,
    /// The prompt, up to the first token.
    Prompt,
    /// Everything after the first token.
    Decode,
}

impl Role {
    /// Checks that a machine of this role can do its share of a request, with the whole cache to itself.
    ///
    /// # Errors
    /// If it cannot: a prompt machine holds the prompt, the others the whole request.
    pub fn check_request(self, settings: &Settings, request: &Request) -> Result<(), ScheduleError> {
        match self {
            Self::Both => settings.check_request(request),
            Self::Prompt => {
                settings.check_request(&Request { output_tokens: request.output_tokens.min(1), ..*request })
            }
            Self::Decode => settings.check_positions(request),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Both => "both",
            Self::Prompt => "prompt",
            Self::Decode => "decode",
        })
    }
}

/// Identical machines of a system whose machines differ.
#[derive(Clone, Copy, Debug)]
pub struct MachineGroup<'m> {
    /// What they do.
    pub role: Role,
    /// Number of machines.
    pub replicas: usize,
    /// Settings of each.
    pub settings: Settings,
    /// Time of their passes.
    pub latency: &'m LatencyModel,
}

/// The network between machines. Each machine has one link: a prompt machine sends one transfer at a time, a decode machine
/// receives one at a time, in the order in which decode machines have reserved blocks for them.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Link {
    /// Bandwidth in 10^9 bytes per second, above 0; may be infinite.
    pub gigabytes_per_s: f64,
    /// Time in microseconds from the last byte that is sent to its arrival, 0 or more. The link is free meanwhile.
    #[serde(default)]
    pub latency_us: f64,
}

/// Machines that make no system.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoleError {
    /// A group of no machines.
    #[error("a group of {0} machines has 0 replicas: expected at least 1")]
    NoReplicas(Role),
    /// Prompt machines without decode machines, or the reverse.
    #[error("{found} machines, but no {missing} machines: expected at least one")]
    Missing {
        /// Role of machines that there are.
        found: Role,
        /// Role that no machine has.
        missing: Role,
    },
    /// Prompt and decode machines without a link.
    #[error(
        "prompt and decode machines without a link for keys and values: expected its bandwidth and latency (transfer)"
    )]
    NoLink,
    /// A link that transfers nothing.
    #[error("transfer: {name} is {found}, expected {expected}")]
    Link {
        /// The key.
        name: &'static str,
        /// Its value.
        found: String,
        /// What was expected.
        expected: &'static str,
    },
    /// Groups that are of different models, or serve it differently.
    #[error("{name} is {other} on {other_role} machines and {first} on {first_role} machines: expected the same")]
    Differ {
        /// What differs.
        name: &'static str,
        /// Its value in the first group.
        first: String,
        /// Role of the first group.
        first_role: Role,
        /// Its value in the other group.
        other: String,
        /// Role of the other group.
        other_role: Role,
    },
    /// Keys and values of unknown size.
    #[error(
        "the latency profile has 0 bytes for the keys and values of a token: expected more than 0 to transfer them"
    )]
    NoKvBytes,
    /// Vanilla batching of requests that come and go one by one.
    #[error("vanilla batching on {0} machines: a batch would wait for transfers; expected sequence or depth")]
    Vanilla(Role),
    /// Observers that are not one for each machine.
    #[error("{observers} observers of {machines} machines: expected one for each")]
    Observers {
        /// Number of observers.
        observers: usize,
        /// Number of machines.
        machines: usize,
    },
}

impl Link {
    /// Checks that the link transfers something.
    ///
    /// # Errors
    /// If the bandwidth is not above 0, or the latency is not finite or below 0.
    pub fn check(&self) -> Result<(), RoleError> {
        let Self { gigabytes_per_s, latency_us } = *self;
        let wrong = |name, found: f64, expected| Err(RoleError::Link { name, found: found.to_string(), expected });
        match () {
            () if gigabytes_per_s.is_nan() || gigabytes_per_s <= 0.0 => {
                wrong("gigabytes_per_s", gigabytes_per_s, "more than 0")
            }
            () if !latency_us.is_finite() || latency_us < 0.0 => wrong("latency_us", latency_us, "0 or more"),
            () => Ok(()),
        }
    }

    /// Time for which a transfer of these bytes takes the link.
    pub fn sending_time(&self, bytes: u64) -> Nanos {
        Nanos((bytes as f64 / self.gigabytes_per_s).round() as u64)
    }

    /// Time from the end of sending to the arrival.
    pub fn latency(&self) -> Nanos {
        Nanos((self.latency_us * 1e3).round() as u64)
    }
}

impl MachineGroup<'_> {
    /// Bytes of keys and values of a token.
    pub(crate) fn kv_bytes(&self) -> u64 {
        ModelMemory::from(self.latency.meta()).kv_bytes(self.settings.kv_fill)
    }
}

/// Name of the machines for tables: number, role and batching of each group.
pub(crate) fn label(groups: &[MachineGroup<'_>]) -> String {
    let name = |group: &MachineGroup<'_>| format!("{} {} {}", group.replicas, group.role, group.settings.batching);
    groups.iter().map(name).collect::<Vec<_>>().join(" + ")
}

/// Checks that groups of machines make a system, with this link.
pub(crate) fn check(groups: &[MachineGroup<'_>], link: Option<Link>) -> Result<(), RoleError> {
    if let Some(empty) = groups.iter().find(|group| group.replicas == 0) {
        return Err(RoleError::NoReplicas(empty.role));
    }
    let has = |role| groups.iter().any(|group| group.role == role);
    let missing = match (has(Role::Prompt), has(Role::Decode)) {
        (true, false) => Some((Role::Prompt, Role::Decode)),
        (false, true) => Some((Role::Decode, Role::Prompt)),
        _ => None,
    };
    if let Some((found, missing)) = missing {
        return Err(RoleError::Missing { found, missing });
    }
    check_same(groups)?;
    link.map_or(Ok(()), |link| link.check())?;
    if !has(Role::Prompt) {
        return Ok(());
    }
    if link.is_none() {
        return Err(RoleError::NoLink);
    }
    let specialised = |group: &&MachineGroup<'_>| group.role != Role::Both;
    if let Some(group) = groups.iter().filter(specialised).find(|group| group.settings.batching == Batching::Vanilla) {
        return Err(RoleError::Vanilla(group.role));
    }
    match groups.iter().filter(specialised).any(|group| group.kv_bytes() == 0) {
        true => Err(RoleError::NoKvBytes),
        false => Ok(()),
    }
}

/// Checks that all groups serve one model, in one way.
fn check_same(groups: &[MachineGroup<'_>]) -> Result<(), RoleError> {
    type Property = (&'static str, fn(&MachineGroup<'_>) -> String);
    let properties: [Property; 5] = [
        ("the exit policy", |group| group.settings.exit.to_string()),
        ("the KV fill", |group| group.settings.kv_fill.to_string()),
        ("prefill_depth", |group| format!("{:?}", group.settings.prefill_depth)),
        ("num_loops", |group| group.settings.num_loops.to_string()),
        ("kv_bytes_per_token", |group| group.kv_bytes().to_string()),
    ];
    let Some((first, others)) = groups.split_first() else { return Ok(()) };
    for (name, property) in properties {
        if let Some(other) = others.iter().find(|other| property(other) != property(first)) {
            return Err(RoleError::Differ {
                name,
                first: property(first),
                first_role: first.role,
                other: property(other),
                other_role: other.role,
            });
        }
    }
    Ok(())
}
