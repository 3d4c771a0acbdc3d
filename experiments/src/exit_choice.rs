//! Entries of a list of exit policies: a policy, or all baselines at once.

use std::fmt;
use std::str::FromStr;

use scheduler::{DepthMix, ExitPolicy};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The name of [`ExitChoice::Baselines`].
const BASELINES: &str = "baselines";

/// An entry of a list of exit policies.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExitChoice {
    /// A policy.
    Policy(ExitPolicy),
    /// What a user can do without an exit signal, in a model with `L` loops: `none`, `static:0` to `static:L-2`, and
    /// between neighbouring depths an even mix of requests, `mix:0:1:0.5` to `mix:L-2:L-1:0.5`.
    Baselines,
}

impl ExitChoice {
    /// The policies of a list for a model with `num_loops` loops, in order, each of them once.
    pub fn expand(list: &[Self], num_loops: u8) -> Vec<ExitPolicy> {
        let mut policies = Vec::new();
        for choice in list {
            let of_choice = match choice {
                Self::Policy(policy) => vec![*policy],
                Self::Baselines => baselines(num_loops),
            };
            for policy in of_choice {
                if !policies.contains(&policy) {
                    policies.push(policy);
                }
            }
        }
        policies
    }
}

fn baselines(num_loops: u8) -> Vec<ExitPolicy> {
    let shallow = 0..num_loops.saturating_sub(1);
    let mix = |depth| ExitPolicy::Mix(DepthMix { depths: [depth, depth + 1], share: 0.5, seed: 0 });
    let fixed = shallow.clone().map(ExitPolicy::Static);
    std::iter::once(ExitPolicy::None).chain(fixed).chain(shallow.map(mix)).collect()
}

impl From<ExitPolicy> for ExitChoice {
    fn from(policy: ExitPolicy) -> Self {
        Self::Policy(policy)
    }
}

impl fmt::Display for ExitChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Policy(policy) => policy.fmt(f),
            Self::Baselines => f.write_str(BASELINES),
        }
    }
}

impl FromStr for ExitChoice {
    type Err = String;

    /// Reads a policy's name, or `baselines`.
    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            BASELINES => Ok(Self::Baselines),
            _ => text.parse().map(Self::Policy).map_err(|error: scheduler::policy::PolicyError| match error {
                scheduler::policy::PolicyError::Exit(_) => format!("{error}, or {BASELINES}"),
                other => other.to_string(),
            }),
        }
    }
}

impl Serialize for ExitChoice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ExitChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn expanded(list: &[&str], num_loops: u8) -> Vec<String> {
        let list: Vec<ExitChoice> = list.iter().map(|text| text.parse().unwrap()).collect();
        ExitChoice::expand(&list, num_loops).iter().map(ExitPolicy::to_string).collect()
    }

    #[test]
    fn baselines_are_every_static_depth_and_the_mixes_between_them() {
        let three = ["none", "static:0", "static:1", "mix:0:1:0.5", "mix:1:2:0.5"];
        assert_eq!(expanded(&["baselines"], 3), three);
        assert_eq!(expanded(&["baselines"], 1), ["none"]);
        let with_others = ["static:1", "none", "static:0", "mix:0:1:0.5", "mix:1:2:0.5", "oracle"];
        assert_eq!(expanded(&["static:1", "baselines", "oracle", "none"], 3), with_others);
    }

    #[test]
    fn a_choice_reads_back_what_it_prints_and_other_names_are_told_what_is_expected() {
        for text in ["baselines", "static:2", "mix:0:1:0.5"] {
            assert_eq!(text.parse::<ExitChoice>().unwrap().to_string(), text);
        }
        let error = "baseline".parse::<ExitChoice>().unwrap_err();
        assert!(error.contains("unknown exit policy `baseline`") && error.ends_with("or baselines"), "{error}");
    }
}
