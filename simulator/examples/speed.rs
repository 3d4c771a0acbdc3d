//! Speed and memory use of a simulation: `cargo run --release -p simulator --example speed -- [REQUESTS]...`
//!
//! Depth-wise batching with a confidence exit, 3 loops, batch limit 64, Poisson arrivals at 80% of the machine's
//! capacity, prompts of 16 tokens, outputs of 1 to 199. A row visit is one pass of one decode row; prompt rows are not
//! counted. The example prints one line for each number of requests (1,000 to 1,000,000 by default).

use latency::LatencyModel;
use scheduler::{Batching, Observer, Settings};
use simulator::{Draw, ExitModel, Metrics, Simulation, Source};
use traces::{Component, ExitTrace, ExitTraceMeta, LatencyProfile, Nanos, Point, ProfileMeta, Request, Signals};

const LOOPS: u32 = 3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut counts: Vec<u32> = std::env::args().skip(1).map(|count| count.parse()).collect::<Result<_, _>>()?;
    if counts.is_empty() {
        counts = vec![1_000, 10_000, 100_000, 1_000_000];
    }
    let latency = LatencyModel::new(&profile())?;
    let exits = ExitModel::new(&exit_trace(), Draw::Seeded(1))?;
    let settings = Settings {
        max_batch: 64,
        token_budget: 512,
        prefill_chunk: 128,
        num_blocks: 4096,
        ..Settings::new(Batching::Depth, "confidence:0.5".parse()?, LOOPS as u8)
    };
    let simulation = Simulation::new(settings, &latency, &exits)?;
    println!("requests   observer  row visits  ns/visit  Mvisits/s  occupancy    cpu s  peak MB");
    for count in counts {
        let visits = report(&simulation, count, "metrics", Metrics::new(&settings))?;
        report(&simulation, count, "none", Unwatched { visits })?;
    }
    Ok(())
}

fn report(
    simulation: &Simulation<'_>,
    count: u32,
    name: &str,
    observer: impl Watched,
) -> Result<f64, Box<dyn std::error::Error>> {
    let mut observer = [observer];
    let start = cpu_seconds();
    simulation.run(poisson(count), &mut observer)?;
    let seconds = cpu_seconds() - start;
    let [observer] = observer;
    let (visits, occupancy) = observer.visits_and_occupancy();
    println!(
        "{count:>8} {name:>10} {visits:>11} {:>9.2} {:>10.1} {occupancy:>10.2} {seconds:>8.3} {:>8.0}",
        seconds * 1e9 / visits,
        visits / seconds * 1e-6,
        peak_megabytes(),
    );
    Ok(visits)
}

/// Observers that report how many rows ran.
trait Watched: Observer {
    fn visits_and_occupancy(&self) -> (f64, f64);
}

impl Watched for Metrics {
    fn visits_and_occupancy(&self) -> (f64, f64) {
        let summary = self.summary(Source::Simulated, None);
        ((summary.mean_depth * summary.output_tokens as f64).round(), summary.occupancy)
    }
}

/// Observes nothing; its row visits are those of the observed run.
struct Unwatched {
    visits: f64,
}

impl Observer for Unwatched {}

impl Watched for Unwatched {
    fn visits_and_occupancy(&self) -> (f64, f64) {
        (self.visits, f64::NAN)
    }
}

/// A block whose time grows with its rows, attention whose time grows with history, a head and an embedding.
fn profile() -> LatencyProfile {
    use Component::{Block, DecodeAttention, DepthMix, Embed, Head, PrefillAttention};
    let mut points = Vec::new();
    let mut add = |component, rows: u32, kv_tokens, depths, time_us| {
        points.push(Point { component, rows, kv_tokens, depths, time_us, spread_us: 0.0, repeats: 1 });
    };
    for rows in (0..10).map(|power| 1 << power) {
        let size = f64::from(rows);
        add(Block, rows, 0, 1, 200.0 + 2.0 * size);
        add(Embed, rows, 0, 1, 1.0 + 0.01 * size);
        add(Head, rows, 0, 1, 20.0 + 0.1 * size);
        add(DepthMix, rows, 0, 2, 0.1 * size);
        add(DepthMix, rows, 0, 3, 0.2 * size);
        for kv_tokens in [0, 64, 128, 256, 512, 1024] {
            add(DecodeAttention, rows, kv_tokens, 1, 1e-3 * size * f64::from(kv_tokens));
            add(PrefillAttention, rows, kv_tokens, 1, 1e-3 * size * (f64::from(kv_tokens) + size / 2.0));
        }
    }
    LatencyProfile {
        meta: ProfileMeta {
            schema_version: LatencyProfile::SCHEMA_VERSION,
            model: "synthetic".into(),
            fingerprint: LatencyProfile::ANY_MODEL.into(),
            num_loops: LOOPS,
            device: "none".into(),
            software: "none".into(),
            source: "made up".into(),
            overhead_us: 5.0,
            weight_bytes: 0,
            kv_bytes_per_token: 0,
            memory: None,
            kv_fill: None,
            decode_q_len: None,
            heads_ahead_from: None,
        },
        points,
        mixed_attention: None,
    }
}

/// 2,000 generations of 100 tokens: half exit after one loop, a third after two, the rest after three.
fn exit_trace() -> ExitTrace {
    let mut trace = ExitTrace::new(ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "synthetic".into(),
        fingerprint: "synthetic".into(),
        num_loops: LOOPS,
        source: "made up".into(),
        recording: None,
    });
    let mut random = Random(7);
    for _ in 0..2_000 {
        let mut rows = Vec::new();
        for _ in 0..100 {
            let unit = random.unit();
            let exit = if unit < 0.5 { 0 } else { 1 + u32::from(unit > 5.0 / 6.0) };
            for depth in 0..LOOPS {
                let sure = depth >= exit;
                rows.push((Signals { top1: if sure { 0.9 } else { 0.1 }, ..Signals::default() }, u32::from(!sure)));
            }
        }
        trace.push_generation(&rows);
    }
    trace
}

/// Requests made one at a time, never all in memory.
fn poisson(count: u32) -> impl Iterator<Item = Request> {
    let mut random = Random(11);
    let mut seconds = 0.0;
    // 100 tokens of 5/3 passes in 64 places; a pass takes about 0.4 ms.
    let rate = 0.8 * 64.0 / (100.0 * 5.0 / 3.0 * 0.4e-3);
    (0..count).map(move |id| {
        seconds -= (1.0 - random.unit()).ln() / rate;
        let output_tokens = 1 + (random.unit() * 199.0) as u32;
        Request { id, arrival: Nanos::from_secs_f64(seconds), prompt_tokens: 16, output_tokens }
    })
}

/// xorshift64*.
struct Random(u64);

impl Random {
    fn unit(&mut self) -> f64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// CPU time of this process, which other processes do not lengthen; NaN where the system does not report it.
fn cpu_seconds() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/schedstat").unwrap_or_default();
    stat.split_whitespace().next().and_then(|ns| ns.parse::<f64>().ok()).map_or(f64::NAN, |ns| ns * 1e-9)
}

/// Peak memory of this process, in megabytes; NaN where the system does not report it.
fn peak_megabytes() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse::<f64>().ok()).map_or(f64::NAN, |kb| kb / 1024.0)
}
