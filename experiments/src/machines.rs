//! Machines with roles, as users write them: groups of machines that run prompts, that generate, or both, each with its own
//! batching, limits and latency profile, and the link between them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use latency::LatencyModel;
use scheduler::{Batching, ExitPolicy, KvFill, Settings};
use serde::{Deserialize, Serialize};
use simulator::{Link, MachineGroup, Role};
use traces::Request;

use crate::experiment::read_yaml;
use crate::profiles::{based, read_profile};
use crate::serving::{Serving, bytes, check_machines};

/// A group of identical machines. What is not given is that of `serving`, or of its system.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// `prompt`, `decode` or `both`.
    pub role: Role,
    /// Number of machines.
    #[serde(default = "one")]
    pub replicas: usize,
    /// Batching policy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batching: Option<Batching>,
    /// Most sequences that run at once on each.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_batch: Option<u32>,
    /// Most rows of a pass or of an iteration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_budget: Option<u32>,
    /// Most prompt tokens that start in a pass or an iteration.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<u32>,
    /// KV blocks of each, whatever the memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_blocks: Option<u32>,
    /// Memory of each in bytes.
    #[serde(default, deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<u64>,
    /// Folder of a latency profile, or the name of one that ships, of the same model on another device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<PathBuf>,
}

/// Machines with roles and their link: a file for `--machines`.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct MachinesFile {
    /// Groups of machines.
    pub machines: Vec<MachineSpec>,
    /// Link between them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Link>,
}

fn one() -> usize {
    1
}

impl MachinesFile {
    /// Reads the file. Profiles are relative to its folder.
    ///
    /// # Errors
    /// If it does not read, a key is missing or unknown, or it has no machines.
    pub fn load(path: &Path) -> Result<Self> {
        let mut file: Self = read_yaml(path)?;
        ensure!(!file.machines.is_empty(), "{}: machines is empty: expected at least one group", path.display());
        let base = path.parent().unwrap_or(Path::new(""));
        for spec in &mut file.machines {
            spec.profile = spec.profile.take().map(|profile| based(base, profile));
        }
        Ok(file)
    }
}

impl MachineSpec {
    /// How the group is scheduled, where `common` applies to all.
    fn serving(&self, common: &Serving) -> Serving {
        let given_memory = self.num_blocks.is_some() || self.device_memory.is_some();
        Serving {
            max_batch: self.max_batch.unwrap_or(common.max_batch),
            token_budget: self.token_budget.unwrap_or(common.token_budget),
            // A chunk that follows from the budget follows from that of the group.
            prefill_chunk: self.prefill_chunk.or(common.prefill_chunk.filter(|_| self.token_budget.is_none())),
            num_blocks: if given_memory { self.num_blocks } else { common.num_blocks },
            device_memory: if given_memory { self.device_memory } else { common.device_memory },
            memory_utilization: common.memory_utilization.filter(|_| self.num_blocks.is_none()),
            ..common.clone()
        }
    }

    fn check(&self) -> Result<()> {
        ensure!(self.replicas > 0, "replicas is 0: expected at least 1");
        ensure!(
            self.num_blocks.is_none() || self.device_memory.is_none(),
            "num_blocks beside device_memory: expected one of the two"
        );
        Ok(())
    }
}

/// Checks groups of machines as they are written.
///
/// # Errors
/// If a group has no machines, or keys contradict each other.
pub fn check_specs(machines: &[MachineSpec], transfer: Option<Link>) -> Result<()> {
    for (index, spec) in machines.iter().enumerate() {
        spec.check().with_context(|| format!("machines[{index}] ({})", spec.role))?;
    }
    transfer.map_or(Ok(()), |link| Ok(link.check()?))
}

/// Groups of machines, with the latency models of those that have a profile of their own. No group stands for machines that
/// are all the same.
#[derive(Clone, Debug, Default)]
pub struct Groups {
    specs: Vec<MachineSpec>,
    own: Vec<Option<LatencyModel>>,
    link: Option<Link>,
}

impl Groups {
    /// Reads the profiles of groups, relative to `base`.
    ///
    /// # Errors
    /// If keys contradict each other, there is a link and nothing that needs it, or a profile does not read.
    pub fn read(machines: &[MachineSpec], transfer: Option<Link>, base: &Path) -> Result<Self> {
        check_specs(machines, transfer)?;
        ensure!(transfer.is_none() || !machines.is_empty(), "transfer without machines: expected their roles");
        let read = |spec: &MachineSpec| {
            let profile = spec.profile.as_ref().map(|profile| read_profile(base, profile)).transpose()?;
            Ok(profile.map(|profile| LatencyModel::new(&profile)).transpose()?)
        };
        let own = machines.iter().map(read).collect::<Result<_>>()?;
        Ok(Self { specs: machines.to_vec(), own, link: transfer })
    }

    /// The link between the machines.
    pub fn link(&self) -> Option<Link> {
        self.link
    }

    /// The scheduler's settings of each group for one combination of policies; of all machines, if they are the same.
    ///
    /// # Errors
    /// As [`Serving::settings`].
    pub fn settings(
        &self,
        serving: &Serving,
        (batching, exit, kv_fill): (Batching, ExitPolicy, KvFill),
        latency: &LatencyModel,
        longest: u32,
    ) -> Result<Vec<Settings>> {
        if self.specs.is_empty() {
            return Ok(vec![serving.settings(batching, exit, kv_fill, &latency.meta().into(), longest)?]);
        }
        let of_group = |(spec, own): (&MachineSpec, &Option<LatencyModel>)| {
            let model = own.as_ref().unwrap_or(latency).meta().into();
            let batching = spec.batching.unwrap_or(batching);
            let settings = spec.serving(serving).settings(batching, exit, kv_fill, &model, longest);
            settings.with_context(|| format!("{} machines", spec.role))
        };
        self.specs.iter().zip(&self.own).map(of_group).collect()
    }

    /// The scheduler's settings of each group, for every combination of policies.
    ///
    /// # Errors
    /// As [`settings`](Self::settings).
    pub fn all_settings(&self, serving: &Serving, latency: &LatencyModel, longest: u32) -> Result<Vec<Vec<Settings>>> {
        let batching = own_or_common(&self.specs, &serving.batching).to_vec();
        let serving = Serving { batching, ..serving.clone() };
        let model = latency.meta().into();
        serving.combinations(&model).map(|combination| self.settings(&serving, combination, latency, longest)).collect()
    }

    /// The groups of machines under these [settings](Self::settings), or one group of `replicas` machines that are all the
    /// same; `latency` is that of groups without a profile of their own.
    pub fn machines<'m>(
        &'m self,
        settings: &[Settings],
        replicas: usize,
        latency: &'m LatencyModel,
    ) -> Vec<MachineGroup<'m>> {
        if self.specs.is_empty() {
            let of_all = |&settings: &Settings| MachineGroup { role: Role::Both, replicas, settings, latency };
            return settings.iter().map(of_all).collect();
        }
        let of_group = |((spec, own), &settings): ((&MachineSpec, &'m Option<LatencyModel>), &Settings)| MachineGroup {
            role: spec.role,
            replicas: spec.replicas,
            settings,
            latency: own.as_ref().unwrap_or(latency),
        };
        self.specs.iter().zip(&self.own).zip(settings).map(of_group).collect()
    }
}

/// Refuses machines that would take the memory of this one, and requests that do not fit on them.
///
/// # Errors
/// If there are too many, they have too many sequences or KV blocks, or a group cannot serve its share of the longest
/// request.
pub fn check_groups(groups: &[MachineGroup<'_>], longest: &Request) -> Result<()> {
    for MachineGroup { role, settings, .. } in groups {
        let check = settings.check().and_then(|()| role.check_request(settings, longest));
        match groups.len() {
            1 => check?,
            _ => check.with_context(|| format!("{role} machines"))?,
        }
    }
    check_machines(groups.iter().map(|group| (group.replicas, &group.settings)))
}

/// The link of a system: its own, or, if its machines have roles, the common one.
pub(crate) fn link_of(machines: &[MachineSpec], own: Option<Link>, common: Option<Link>) -> Option<Link> {
    own.or(common.filter(|_| !machines.is_empty()))
}

/// The batching policies that make a difference where these machines may have their own.
pub(crate) fn own_or_common<'s>(machines: &[MachineSpec], batching: &'s [Batching]) -> &'s [Batching] {
    let all_own = !machines.is_empty() && machines.iter().all(|spec| spec.batching.is_some());
    if all_own { &batching[..batching.len().min(1)] } else { batching }
}

#[cfg(test)]
mod tests {
    use super::*;
    use traces::{Component, LatencyProfile, MemoryFigures, Point, ProfileMeta};

    /// A model of two loops on a device of this memory in bytes, 10 of which a token takes.
    fn latency(device_bytes: u64) -> LatencyModel {
        let point =
            |component| Point { component, rows: 1, kv_tokens: 0, depths: 1, time_us: 1.0, spread_us: 0.0, repeats: 1 };
        let meta = ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "made up".to_owned(),
            fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
            num_loops: 2,
            device: "none".to_owned(),
            software: "none".to_owned(),
            source: "made up".to_owned(),
            overhead_us: 0.0,
            weight_bytes: 1_000,
            kv_bytes_per_token: 10,
            memory: Some(MemoryFigures { device_bytes: Some(device_bytes), ..MemoryFigures::default() }),
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        };
        let points = [Component::Block, Component::Embed, Component::Head].map(point).to_vec();
        LatencyModel::new(&LatencyProfile { meta, points, mixed_attention: None }).unwrap()
    }

    fn specs(text: &str) -> Vec<MachineSpec> {
        serde_yaml::from_str(text).unwrap()
    }

    /// The settings of a decode machine of this description, where `common` are keys of `serving`.
    fn settings(common: &str, decode: &str) -> Settings {
        let serving: Serving = serde_yaml::from_str(&format!(
            "{{batching: [depth], exit: [none], max_batch: 4, token_budget: 40{common}}}"
        ))
        .unwrap();
        let machines = specs(&format!("[{{role: prompt}}, {{role: decode{decode}}}]"));
        let groups = Groups::read(&machines, None, Path::new("")).unwrap();
        let combination = (Batching::Depth, ExitPolicy::None, KvFill::Reuse);
        groups.settings(&serving, combination, &latency(10_000), 33).unwrap()[1]
    }

    #[test]
    fn what_a_group_does_not_give_is_that_of_serving() {
        let plain = settings("", "");
        assert_eq!((plain.batching, plain.max_batch, plain.token_budget), (Batching::Depth, 4, 40));
        let own = settings("", ", batching: sequence, max_batch: 6, token_budget: 50");
        assert_eq!((own.batching, own.max_batch, own.token_budget), (Batching::Sequence, 6, 50));
        assert_eq!(settings(", prefill_chunk: 7", "").prefill_chunk, 7);
        assert_eq!(settings(", prefill_chunk: 7", ", token_budget: 50").prefill_chunk, own.prefill_chunk);
        assert_eq!(settings(", prefill_chunk: 7", ", token_budget: 50, prefill_chunk: 9").prefill_chunk, 9);
    }

    #[test]
    fn blocks_of_a_group_are_given_or_follow_from_its_memory() {
        let of_memory = |bytes: u64| ((bytes * 9 / 10 - 1_000) / 160) as u32;
        for (common, decode, expected) in [
            ("", "", of_memory(10_000)),
            (", num_blocks: 7", "", 7),
            (", num_blocks: 7", ", num_blocks: 9", 9),
            (", num_blocks: 7", ", device_memory: 20kB", of_memory(20_000)),
            (", device_memory: 30kB", "", of_memory(30_000)),
            (", device_memory: 30kB", ", num_blocks: 9", 9),
            (", memory_utilization: 0.5", ", num_blocks: 9", 9),
            (", memory_utilization: 0.9", ", device_memory: 20kB", of_memory(20_000)),
        ] {
            assert_eq!(settings(common, decode).num_blocks, expected, "{common} {decode}");
        }
    }

    #[test]
    fn a_list_of_batching_policies_runs_once_where_every_group_has_its_own() {
        let both = [Batching::Sequence, Batching::Depth];
        let count = |text: &str| own_or_common(&specs(text), &both).len();
        assert_eq!(count("[{role: prompt, batching: sequence}, {role: decode, batching: depth}]"), 1);
        assert_eq!(count("[{role: prompt, batching: sequence}, {role: decode}]"), 2);
        assert_eq!(count("[]"), 2);
    }
}
