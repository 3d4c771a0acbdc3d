//! How requests are scheduled, as users write it, and the scheduler's settings that follow from it, the model's memory
//! and the requests.

use std::str::FromStr;

use anyhow::{Result, bail, ensure};
use bytesize::ByteSize;
use scheduler::{Batching, ExitPolicy, KvFill, Settings};
use serde::{Deserialize, Deserializer, Serialize};
use simulator::{Link, MemoryBudget, ModelMemory};
use traces::Request;

use crate::exit_choice::ExitChoice;
use crate::machines::{MachineSpec, check_specs};

/// How requests are scheduled: every batching policy with every exit policy, and adaptive exits with every KV fill.
///
/// The number of KV blocks is given, or follows from the device's memory, or is what a full batch needs.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Serving {
    /// `vanilla`, `sequence`, `depth`.
    pub batching: Vec<Batching>,
    /// `none`, `static:DEPTH`, `mix:DEPTH:DEPTH:SHARE`, `oracle`, `oracle:charged`, `oracle:recorded`,
    /// `confidence:MEASURE:THRESHOLD`,
    /// `delayed:MEASURE:THRESHOLD`, `cumulative:gate:SHARE:LOOPS`, `load-adaptive:MEASURE:CALM..BUSY:LOW..HIGH:BAND`, or
    /// `baselines` for all those that read no signal.
    pub exit: Vec<ExitChoice>,
    /// What later tokens find at depths that an exited token did not run: `reuse`, `first`, `skip`, `backfill`. One, or a
    /// list. If none is given, that which the model is made for, else `reuse`.
    #[serde(default, skip_serializing_if = "Vec::is_empty", with = "one_or_more")]
    pub kv_fill: Vec<KvFill>,
    /// Most sequences that run at once.
    pub max_batch: u32,
    /// Most rows of a pass (depth-wise) or of an iteration (lockstep).
    pub token_budget: u32,
    /// Most prompt tokens that start in a pass or an iteration; `token_budget` if not set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_chunk: Option<u32>,
    /// Last depth that tokens of prompts run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prefill_depth: Option<u8>,
    /// Positions per KV block.
    #[serde(default = "default_block_tokens")]
    pub block_tokens: u32,
    /// KV blocks, whatever the memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_blocks: Option<u32>,
    /// The device's memory in bytes, instead of what the latency profile says.
    #[serde(default, deserialize_with = "bytes", skip_serializing_if = "Option::is_none")]
    pub device_memory: Option<u64>,
    /// Share of the memory that the server uses.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_utilization: Option<f64>,
    /// Whether freed blocks keep their contents for prompts that begin alike.
    #[serde(default)]
    pub prefix_caching: bool,
    /// Whether the next pass is composed when this one starts.
    #[serde(default)]
    pub async_scheduling: bool,
    /// Most passes that a token which exits waits for the exit head.
    #[serde(default)]
    pub exit_wait: u32,
    /// Waiting tokens at which the exit head runs before the wait is over; 0 for no such number.
    #[serde(default)]
    pub exit_batch: u32,
    /// Groups of machines with roles, in simulations; empty for machines that are all the same.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub machines: Vec<MachineSpec>,
    /// Link between prompt and decode machines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transfer: Option<Link>,
}

/// The most of what sizes a batch: sequences, and prompt tokens and rows of a pass. More are a slip of the hand.
pub const MOST_ROWS: u32 = 1 << 20;
/// The most KV blocks of a machine.
pub const MOST_BLOCKS: u32 = 1 << 24;
/// The most machines.
pub const MOST_REPLICAS: usize = 1 << 16;
/// The most repeats and rounds of a measurement.
pub const MOST_REPEATS: u32 = 10_000;
/// The most sequences, and the most KV blocks, of all machines together.
const MOST_OF_ALL: u64 = 1 << 26;

/// Refuses a number that sizes something before it does.
///
/// # Errors
/// If it is too large; the message begins with `name`.
pub fn check_at_most(name: &str, found: u64, most: u64) -> Result<()> {
    ensure!(found <= most, "{name} is {found}: expected at most {most}");
    Ok(())
}

/// Refuses machines, given as numbers and settings of each, that would take the memory of this one.
///
/// # Errors
/// If there are too many, or they have too many sequences or KV blocks.
pub fn check_machines<'s>(machines: impl IntoIterator<Item = (usize, &'s Settings)>) -> Result<()> {
    let (mut replicas, mut max_batch, mut num_blocks) = (0, 0, 0);
    for (number, settings) in machines {
        replicas += number as u64;
        check_at_most("replicas", replicas, MOST_REPLICAS as u64)?;
        max_batch += number as u64 * u64::from(settings.max_batch);
        num_blocks += number as u64 * u64::from(settings.num_blocks);
        check_at_most("replicas x max_batch", max_batch, MOST_OF_ALL)?;
        check_at_most("replicas x num_blocks", num_blocks, MOST_OF_ALL)?;
    }
    Ok(())
}

fn default_block_tokens() -> u32 {
    Settings::BLOCK_TOKENS
}

/// A list that may be written as its only item.
mod one_or_more {
    use serde::de::{Error, SeqAccess, Visitor, value};
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    pub fn serialize<T: Serialize, S: Serializer>(items: &[T], serializer: S) -> Result<S::Ok, S::Error> {
        match items {
            [only] => only.serialize(serializer),
            items => items.serialize(serializer),
        }
    }

    pub fn deserialize<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<T>, D::Error> {
        deserializer.deserialize_any(Items(std::marker::PhantomData))
    }

    struct Items<T>(std::marker::PhantomData<T>);

    impl<'de, T: Deserialize<'de>> Visitor<'de> for Items<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a name or a list of names")
        }

        fn visit_str<E: Error>(self, name: &str) -> Result<Vec<T>, E> {
            Ok(vec![T::deserialize(value::StrDeserializer::new(name))?])
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut items = Vec::new();
            while let Some(item) = list.next_element()? {
                items.push(item);
            }
            match items.is_empty() {
                true => Err(A::Error::invalid_length(0, &"at least one name")),
                false => Ok(items),
            }
        }
    }
}

/// The KV fills under which a policy is worth a run of its own. Under a fixed depth, no row reads what `reuse`, `skip` and
/// `backfill` leave at deeper depths: the text is the same, so the one with the least work stands for all. Under a policy that
/// speculates, they are [one](ExitPolicy::served_fill).
fn fills_of(exit: ExitPolicy, fills: &[KvFill]) -> impl Iterator<Item = KvFill> + use<'_> {
    let by_work = [KvFill::Skip, KvFill::Reuse, KvFill::Backfill];
    let cheapest = by_work.into_iter().find(|fill| fills.contains(fill));
    let are_alike = exit.is_fixed_depth() || exit.speculates();
    let matters = move |fill: &KvFill| !are_alike || !by_work.contains(fill) || Some(*fill) == cheapest;
    fills.iter().copied().filter(matters)
}

/// Reads a number of bytes, such as `16000000000`, `16 GB` or `16GiB`.
///
/// # Errors
/// What was expected.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    match ByteSize::from_str(text) {
        Ok(size) => Ok(size.as_u64()),
        Err(_) => Err(format!("`{text}` is no number of bytes: expected one such as 16000000000, 16GB or 16GiB")),
    }
}

pub(crate) fn bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    Ok(Option::<ByteSize>::deserialize(deserializer)?.map(|size| size.as_u64()))
}

impl Serving {
    /// Every batching policy with every exit policy under these limits; for other keys, what a file gets that lacks them.
    pub fn new(batching: Vec<Batching>, exit: Vec<ExitPolicy>, max_batch: u32, token_budget: u32) -> Self {
        Self {
            batching,
            exit: exit.into_iter().map(ExitChoice::Policy).collect(),
            kv_fill: Vec::new(),
            max_batch,
            token_budget,
            prefill_chunk: None,
            prefill_depth: None,
            block_tokens: Settings::BLOCK_TOKENS,
            num_blocks: None,
            device_memory: None,
            memory_utilization: None,
            prefix_caching: false,
            async_scheduling: false,
            exit_wait: 0,
            exit_batch: 0,
            machines: Vec::new(),
            transfer: None,
        }
    }

    /// # Errors
    /// If keys contradict each other or make no sense.
    pub fn check(&self) -> Result<()> {
        ensure!(!self.batching.is_empty(), "batching is empty: expected at least one policy");
        ensure!(!self.exit.is_empty(), "exit is empty: expected at least one policy");
        if self.num_blocks.is_some() {
            ensure!(self.device_memory.is_none(), "num_blocks beside device_memory: expected one of the two");
            ensure!(self.memory_utilization.is_none(), "num_blocks beside memory_utilization: expected one of the two");
        }
        check_specs(&self.machines, self.transfer)
    }

    /// # Errors
    /// If it asks for what only a simulation does.
    pub fn check_for_engine(&self) -> Result<()> {
        ensure!(
            self.machines.is_empty(),
            "machines are for simulations alone: the engine is one machine of both roles"
        );
        ensure!(self.transfer.is_none(), "transfer is for simulations alone: the engine is one machine of both roles");
        Ok(())
    }

    /// The same with another batch limit, and a token budget that holds it.
    pub fn with_batch(&self, max_batch: u32) -> Self {
        Self { max_batch, token_budget: self.token_budget.max(max_batch), ..self.clone() }
    }

    /// Every batching policy with every exit policy, and with the KV fills that matter to it, for a model.
    pub fn combinations(&self, model: &ModelMemory) -> impl Iterator<Item = (Batching, ExitPolicy, KvFill)> {
        let of_model = [model.kv_fill];
        let fills = if self.kv_fill.is_empty() { &of_model } else { &self.kv_fill[..] };
        let exits = ExitChoice::expand(&self.exit, model.num_loops as u8).into_iter();
        let exits: Vec<_> = exits.flat_map(|exit| fills_of(exit, fills).map(move |fill| (exit, fill))).collect();
        self.batching
            .iter()
            .flat_map(move |&batching| exits.clone().into_iter().map(move |(exit, fill)| (batching, exit, fill)))
    }

    /// The scheduler's settings for every combination; see [`Self::settings`].
    ///
    /// # Errors
    /// As there.
    pub fn all_settings(&self, model: &ModelMemory, requests: &[Request]) -> Result<Vec<Settings>> {
        let longest = longest(requests);
        let settings = |(batching, exit, kv_fill)| self.settings(batching, exit, kv_fill, model, longest);
        self.combinations(model).map(settings).collect()
    }

    /// Whether the number of KV blocks follows from the longest request: neither is it given nor a memory that holds them.
    pub fn depends_on_longest(&self, model: &ModelMemory) -> bool {
        self.num_blocks.is_none() && self.device_memory.or(model.figures.device_bytes).is_none()
    }

    /// The scheduler's settings for one combination, for requests of up to `longest` tokens.
    ///
    /// # Errors
    /// If a number is too large, the memory has no room for keys and values, or its size is not known and its share is
    /// given.
    pub fn settings(
        &self,
        batching: Batching,
        exit: ExitPolicy,
        kv_fill: KvFill,
        model: &ModelMemory,
        longest: u32,
    ) -> Result<Settings> {
        for (key, found) in [
            ("max_batch", self.max_batch),
            ("token_budget", self.token_budget),
            ("prefill_chunk", self.prefill_chunk.unwrap_or_default()),
            ("block_tokens", self.block_tokens),
        ] {
            check_at_most(key, found.into(), MOST_ROWS.into())?;
        }
        let mut settings = Settings {
            kv_fill: exit.served_fill(kv_fill),
            max_batch: self.max_batch,
            token_budget: self.token_budget,
            prefill_chunk: self.prefill_chunk.unwrap_or(self.token_budget),
            prefill_depth: self.prefill_depth,
            block_tokens: self.block_tokens,
            num_blocks: 0,
            prefix_caching: self.prefix_caching,
            async_scheduling: self.async_scheduling,
            exit_wait: self.exit_wait,
            exit_batch: self.exit_batch,
            ..Settings::new(batching, exit, model.num_loops as u8)
        };
        settings.num_blocks = match (self.num_blocks, self.device_memory.or(model.figures.device_bytes)) {
            (Some(blocks), _) => blocks,
            (None, Some(device_bytes)) => {
                let utilization = self.memory_utilization.unwrap_or(MemoryBudget::DEFAULT_UTILIZATION);
                let budget = MemoryBudget { device_bytes, utilization };
                model.plan(budget, &settings)?.num_blocks
            }
            (None, None) if self.memory_utilization.is_some() => {
                bail!("memory_utilization of a memory whose size the latency profile does not say: give device_memory")
            }
            (None, None) => longest.div_ceil(self.block_tokens.max(1)).saturating_mul(self.max_batch),
        };
        check_at_most("num_blocks", settings.num_blocks.into(), MOST_BLOCKS.into())?;
        Ok(settings)
    }
}

/// Final length of the longest request, in tokens.
pub fn longest(requests: &[Request]) -> u32 {
    requests.iter().map(Request::context_tokens).max().unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use traces::MemoryFigures;

    const MODEL: ModelMemory = ModelMemory {
        num_loops: 2,
        weight_bytes: 1_000,
        kv_bytes_per_token: 10,
        figures: MemoryFigures { device_bytes: Some(10_000), other_bytes: 0, row_bytes: 1, logits_bytes: 0 },
        kv_fill: KvFill::Reuse,
    };

    fn serving(more: &str) -> Serving {
        serde_yaml::from_str(&format!("{{batching: [depth], exit: [none], max_batch: 4, token_budget: 40{more}}}"))
            .unwrap()
    }

    fn blocks(more: &str, model: ModelMemory) -> Result<u32> {
        let serving = serving(more);
        serving.check()?;
        Ok(serving
            .settings(
                Batching::Depth,
                ExitPolicy::None,
                serving.kv_fill.first().copied().unwrap_or_default(),
                &model,
                33,
            )?
            .num_blocks)
    }

    #[test]
    fn blocks_are_given_or_follow_from_memory_or_hold_a_full_batch() {
        let unknown = ModelMemory { figures: MemoryFigures::default(), ..MODEL };
        assert_eq!(blocks(", num_blocks: 7", MODEL).unwrap(), 7);
        assert_eq!(blocks("", MODEL).unwrap(), (9_000 - 1_000 - 40) / 160);
        assert_eq!(blocks(", kv_fill: first", MODEL).unwrap(), (9_000 - 1_000 - 40) / 80);
        assert_eq!(blocks(", memory_utilization: 0.5", MODEL).unwrap(), (5_000 - 1_000 - 40) / 160);
        assert_eq!(blocks(", device_memory: 100kB", MODEL).unwrap(), (90_000 - 1_000 - 40) / 160);
        assert_eq!(blocks(", device_memory: 100000", unknown).unwrap(), (90_000 - 1_000) / 160);
        assert_eq!(blocks("", unknown).unwrap(), 4 * 3);
    }

    #[test]
    fn without_a_kv_fill_that_of_the_model_is_used() {
        let fills = |more: &str, kv_fill| -> Vec<KvFill> {
            serving(more).combinations(&ModelMemory { kv_fill, ..MODEL }).map(|(.., fill)| fill).collect()
        };
        assert_eq!(fills("", KvFill::First), [KvFill::First]);
        assert_eq!(fills("", KvFill::Reuse), [KvFill::Reuse]);
        assert_eq!(fills(", kv_fill: skip", KvFill::First), [KvFill::Skip]);
        let empty = serde_yaml::from_str::<Serving>(
            "{batching: [depth], exit: [none], kv_fill: [], max_batch: 4, token_budget: 40}",
        );
        assert!(empty.unwrap_err().to_string().contains("expected at least one name"));
    }

    #[test]
    fn adaptive_exits_run_under_every_fill_and_fixed_depths_under_the_cheapest() {
        let combinations = |fills: &str| {
            let text = format!(
                "{{batching: [depth], exit: [none, static:1, margin:0.5], kv_fill: {fills}, max_batch: 4, token_budget: 40}}"
            );
            let serving: Serving = serde_yaml::from_str(&text).unwrap();
            assert_eq!(
                serde_yaml::from_str::<Serving>(&serde_yaml::to_string(&serving).unwrap()).unwrap().kv_fill,
                serving.kv_fill
            );
            serving.combinations(&MODEL).map(|(_, exit, fill)| format!("{} {fill}", exit.kind())).collect::<Vec<_>>()
        };
        assert_eq!(combinations("reuse"), ["none reuse", "static reuse", "confidence reuse"]);
        assert_eq!(
            combinations("[reuse, skip, backfill]"),
            ["none skip", "static skip", "confidence reuse", "confidence skip", "confidence backfill"]
        );
        // Under `first`, full depth has other keys and values than under the others.
        assert_eq!(
            combinations("[first, backfill]"),
            [
                "none first",
                "none backfill",
                "static first",
                "static backfill",
                "confidence first",
                "confidence backfill"
            ]
        );
        for (fills, expected) in [("[reuse, copy]", "unknown KV fill `copy`"), ("{}", "a name or a list of names")] {
            let error = serde_yaml::from_str::<Serving>(&format!(
                "{{batching: [depth], exit: [none], kv_fill: {fills}, max_batch: 4, token_budget: 40}}"
            ));
            assert!(error.unwrap_err().to_string().contains(expected), "{fills}");
        }
    }

    #[test]
    fn contradictions_and_missing_memory_are_named() {
        let error = |more, model| blocks(more, model).unwrap_err().to_string();
        let unknown = ModelMemory { figures: MemoryFigures::default(), ..MODEL };
        assert!(error(", num_blocks: 7, device_memory: 1GB", MODEL).contains("num_blocks beside device_memory"));
        assert!(error(", memory_utilization: 0.5", unknown).contains("give device_memory"));
        assert!(error(", memory_utilization: 1.5", MODEL).contains("memory utilization is 1.5"));
        assert!(error(", device_memory: 1kB", MODEL).contains("not one KV block fits"));
        for (more, expected) in [
            (", max_batch: 4294967295", "max_batch is 4294967295: expected at most 1048576"),
            (", token_budget: 1048577", "token_budget is 1048577: expected at most 1048576"),
            (", prefill_chunk: 4294967295", "prefill_chunk is 4294967295: expected at most 1048576"),
            (", block_tokens: 4294967295", "block_tokens is 4294967295: expected at most 1048576"),
            (", num_blocks: 4294967295", "num_blocks is 4294967295: expected at most 16777216"),
            (", device_memory: 1PB", "expected at most 16777216"),
        ] {
            let (key, _) = more[2..].split_once(':').unwrap();
            let common = ["max_batch: 4", "token_budget: 40"].into_iter().filter(|given| !given.starts_with(key));
            let text = format!("{{batching: [depth], exit: [none], {}{more}}}", common.collect::<Vec<_>>().join(", "));
            let serving: Serving = serde_yaml::from_str(&text).unwrap();
            let refused =
                serving.settings(Batching::Depth, ExitPolicy::None, KvFill::Reuse, &MODEL, 33).unwrap_err().to_string();
            assert!(refused.contains(expected), "{refused}");
        }
        let settings = serving("").settings(Batching::Depth, ExitPolicy::None, KvFill::Reuse, &unknown, 33).unwrap();
        assert!(check_machines([(65_536, &settings)]).is_ok());
        assert!(check_machines([(65_537, &settings)]).unwrap_err().to_string().contains("replicas is 65537"));
        let large = Settings { num_blocks: 1 << 24, ..settings };
        assert!(
            check_machines([(2, &large), (3, &large)])
                .unwrap_err()
                .to_string()
                .contains("replicas x num_blocks is 83886080")
        );
        assert!(parse_bytes("plenty").unwrap_err().contains("16GiB"));
    }
}
