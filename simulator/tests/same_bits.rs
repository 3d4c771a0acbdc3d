//! Equal inputs give equal results, bit for bit, in debug and in release builds.

mod common;

use common::{Log, Random, drawn_exits, settings, varied_latency};
use scheduler::{Batching, KvFill, Settings};
use simulator::{Metrics, Routing, Simulation, Summary};
use traces::{Nanos, Request};

/// Duration of each run in nanoseconds, and a hash of all its events and of its summary.
const EXPECTED: [(u64, u64); 12] = [
    (270_174_196, 13_202_285_782_489_316_619),
    (245_512_925, 16_612_308_971_437_643_875),
    (245_190_657, 4_655_539_952_661_494_651),
    (249_228_897, 4_060_098_953_864_213_059),
    (243_858_342, 17_821_361_068_150_370_750),
    (241_484_740, 15_681_355_818_158_903_222),
    (241_726_518, 15_685_586_085_588_167_791),
    (243_935_050, 10_957_225_817_520_551_724),
    (243_369_429, 14_292_220_912_845_874_481),
    (239_335_717, 17_140_036_620_424_916_179),
    (239_634_024, 12_479_090_544_044_409_794),
    (243_150_299, 7_047_013_557_008_155_587),
];

/// Arrivals and lengths computed without functions whose last bit depends on the machine's math library.
fn requests() -> Vec<Request> {
    let mut random = Random(5);
    let mut below = |bound: f64| (random.unit() * bound) as u64;
    let mut now = 0;
    let mut request = |id| {
        now += below(3e6);
        let (prompt_tokens, output_tokens) = (1 + below(60.0) as u32, 1 + below(40.0) as u32);
        Request { id, arrival: Nanos(now), prompt_tokens, output_tokens }
    };
    (0..150).map(&mut request).collect()
}

/// FNV-1a, which is identical on every machine and in every version of the standard library.
fn hash(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Two machines with fewer blocks than their requests need.
fn run(batching: Batching, exit: &str, kv_fill: KvFill) -> (u64, u64) {
    let settings = Settings {
        kv_fill,
        token_budget: 48,
        prefill_chunk: 16,
        block_tokens: 8,
        // Shared keys and values make prompts short, and preemptions rare.
        num_blocks: if kv_fill == KvFill::First { 16 } else { 24 },
        ..settings(batching, exit, 3, 12)
    };
    let (latency, exits) = (varied_latency(3), drawn_exits(&[0.5, 0.3, 0.2], 50, 40, 3));
    let simulation = Simulation::new(settings, &latency, &exits).unwrap().with_routing(Routing::TwoChoices(1));
    let mut observers = [0; 2].map(|_| (Metrics::new(&settings), Log::default()));
    let outcome = simulation.run(requests(), &mut observers).unwrap();
    let (metrics, logs): (Vec<Metrics>, Vec<Log>) = observers.into_iter().unzip();
    let metrics = Metrics::merged(metrics).unwrap();
    let summary = simulation.summary(&metrics, &outcome);
    assert!(summary.preemptions > 0, "{batching}, {exit}, {kv_fill}");
    let Summary { throughput_tok_s, token_agreement, ttft_mean_ms, tpot_p99_ms, itl_mean_ms, .. } = summary;
    let Summary { e2e_p90_ms, occupancy, kv_usage, busy, .. } = summary;
    let numbers = (throughput_tok_s, token_agreement, ttft_mean_ms, tpot_p99_ms, itl_mean_ms);
    // Numbers are printed with all their digits.
    let told = format!("{logs:?} {numbers:?} {:?}", (e2e_p90_ms, occupancy, kv_usage, busy));
    (metrics.makespan().0, hash(&told))
}

#[test]
fn the_same_input_gives_the_same_bits_in_every_build() {
    let policies = [
        ("none", KvFill::Reuse),
        ("oracle:charged", KvFill::Skip),
        ("confidence:margin:0.5", KvFill::Backfill),
        ("confidence:similarity:0.5", KvFill::First),
    ];
    let runs = Batching::ALL.into_iter().flat_map(|batching| policies.map(|(exit, fill)| run(batching, exit, fill)));
    assert_eq!(runs.collect::<Vec<_>>(), EXPECTED);
}
