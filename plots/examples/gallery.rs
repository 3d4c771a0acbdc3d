//! Draws every figure from synthetic data, to check the drawing: `gallery [FOLDER]`.

use std::path::{Path, PathBuf};

use plots::*;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use rand_distr::{Distribution, LogNormal, Normal};

const BATCHINGS: [&str; 3] = ["vanilla", "sequence-wise", "depth-wise"];
const EXITS: [&str; 3] = ["no exit", "oracle", "confidence 0.9"];

fn main() -> Result<(), Error> {
    let folder = std::env::args().nth(1).unwrap_or("gallery".into());
    let folder = PathBuf::from(folder);
    let mut random = StdRng::seed_from_u64(1);
    draw_throughputs(&folder, &mut random)?;
    draw_trade_offs(&folder, &mut random)?;
    draw_capacities(&folder, &mut random)?;
    draw_latencies(&folder, &mut random)?;
    draw_depths(&folder, &mut random)?;
    draw_token_times(&folder)?;
    draw_signals(&folder)?;
    draw_validation(&folder, &mut random)?;
    draw_training(&folder, &mut random)
}

fn figure(folder: &Path, name: &str, title: &str) -> Figure {
    Figure {
        folder: folder.to_path_buf(),
        name: name.into(),
        title: title.into(),
        setting: "3 loops, batch of 32, all requests queued".into(),
        device: "no device".into(),
        origin: Origin::Synthetic,
    }
}

/// Every combination of policies with a synthetic throughput in tokens/s.
fn policies() -> Vec<(Policy, f64)> {
    let speeds = [[610.0, 655.0, 632.0], [1000.0, 1090.0, 1040.0], [1010.0, 1872.0, 1548.0]];
    let of = |(batching, speeds): (&str, [f64; 3])| {
        let pair = move |(exit, speed)| (Policy::new(batching, exit), speed);
        EXITS.into_iter().zip(speeds).map(pair).collect::<Vec<_>>()
    };
    BATCHINGS.into_iter().zip(speeds).flat_map(of).collect()
}

fn draw_throughputs(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let noise = Normal::new(1.0, 0.03).expect("a finite deviation");
    let mut runs = Vec::new();
    for (policy, speed) in policies() {
        let measured = (policy.batching != "vanilla").then(|| speed * noise.sample(random));
        runs.push(PolicyThroughput { policy, measured, simulated: Some(speed) });
    }
    let title = "Throughput and speed-up over sequence-wise batching without exit";
    let baseline = Policy::new("sequence-wise", "no exit");
    speedup(&figure(folder, "speedup", title), &runs, &baseline)?;

    let batches = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0];
    let line = |(policy, speed): (Policy, f64)| {
        let points = batches.map(|batch| (batch, 5.0 * speed * batch / (batch + 24.0)));
        PolicyLine { policy, points: points.to_vec() }
    };
    let lines: Vec<_> = policies().into_iter().map(line).collect();
    let title = "Throughput against batch size, by batching and exit policy";
    throughput_by_batch(&figure(folder, "throughput_by_batch", title), &lines)
}

fn draw_trade_offs(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let mut lines = Vec::new();
    for (batching, gain) in [("sequence-wise", 60.0), ("depth-wise", 900.0)] {
        for (measure, penalty) in [("top-1 probability", 0.16), ("margin", 0.11)] {
            let point = |i: u32| {
                let threshold = 0.1 * f64::from(i);
                let throughput = 1000.0 + gain * (1.0 - threshold.powi(2)) + random.random_range(-9.0..9.0);
                ThresholdPoint { threshold, throughput, agreement: 1.0 - penalty * (1.0 - threshold).powf(1.5) }
            };
            let points = (0..=10).map(point).collect();
            lines.push(ThresholdLine { policy: Policy::new(batching, measure), points });
        }
    }
    let title = "Throughput and token agreement against the exit threshold";
    thresholds(&figure(folder, "thresholds", title), &lines)?;

    let trade_off = |y, value: fn(&ThresholdPoint) -> Estimate| {
        let point = |p: &ThresholdPoint| TradePoint {
            x: Estimate { value: p.throughput, half_width: 12.0 },
            y: value(p),
            label: format!("{:.1}", p.threshold),
        };
        let line = |line: &ThresholdLine| TradeLine {
            policy: line.policy.clone(),
            attainable: true,
            points: line.points.iter().map(point).collect(),
        };
        TradeOff { x: Quantity::Throughput, y, lines: lines.iter().map(line).collect() }
    };
    let agreement = trade_off(Quantity::Agreement, |p| Estimate { value: p.agreement, half_width: 0.003 });
    let title = "Throughput against token agreement over exit thresholds";
    pareto(&figure(folder, "pareto", title), &[agreement])?;
    let swapped = |mut panel: TradeOff| {
        std::mem::swap(&mut panel.x, &mut panel.y);
        panel
            .lines
            .iter_mut()
            .flat_map(|line| &mut line.points)
            .for_each(|point| std::mem::swap(&mut point.x, &mut point.y));
        panel
    };
    let accuracy = trade_off(Quantity::Accuracy, |p| Estimate { value: p.agreement.powi(2), half_width: 0.01 });
    let agreement = trade_off(Quantity::Agreement, |p| Estimate { value: p.agreement, half_width: 0.003 });
    let title = "Throughput against realised quality";
    frontier(&figure(folder, "frontier", title), &[agreement, accuracy].map(swapped))?;
    let ttft = |p: &ThresholdPoint| Estimate { value: 3e5 / p.throughput, half_width: 20.0 };
    let tpot = |p: &ThresholdPoint| Estimate { value: 32e3 / p.throughput, half_width: 0.4 };
    let panels = [
        trade_off(Quantity::Latency("p99 time to first token"), ttft),
        trade_off(Quantity::Latency("p99 time per output token"), tpot),
    ];
    pareto(&figure(folder, "pareto_latency", "Throughput against latency over exit thresholds"), &panels)
}

fn draw_capacities(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let systems = ["H100", "A100"].map(String::from);
    let mut capacity = |(policy, speed): (Policy, f64)| {
        let rates = [1.0, 0.6].map(|share| {
            let value = share * speed / 100.0 * random.random_range(0.9..1.1);
            Some(Estimate { value, half_width: 0.4 })
        });
        PolicyCapacity { policy, rates: rates.to_vec() }
    };
    let policies: Vec<_> = policies().into_iter().map(&mut capacity).collect();
    let title = "Highest request rate at which 90% of requests meet the objectives";
    capacities(&figure(folder, "capacity", title), &systems, &policies)
}

fn draw_latencies(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let mut runs = Vec::new();
    for (policy, speed) in policies() {
        let ttft = LogNormal::new((4e5 / speed).ln(), 1.1).expect("a finite deviation");
        let tpot = LogNormal::new((3.2e4 / speed).ln(), 0.25).expect("a finite deviation");
        let ttft_ms = (0..2000).map(|_| ttft.sample(random)).collect();
        let tpot_ms = (0..1900).map(|_| tpot.sample(random)).collect();
        runs.push(PolicyLatencies { policy, ttft_ms, tpot_ms });
    }
    let title = "Latency of requests, by batching and exit policy";
    latency_cdfs(&figure(folder, "latency", title), &runs)
}

fn draw_depths(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let mut passes = Vec::new();
    let mut now = 0.0;
    while now < 12.0 {
        let load = 32.0 * (1.0 - (now - 5.0_f64).powi(2) / 60.0);
        let shares = [0.5, 0.3, 0.2].map(|share| share * random.random_range(0.8..1.2));
        let rows = shares.map(|share| (share * load).floor()).to_vec();
        let end_s = now + random.random_range(0.008..0.014);
        passes.push(PassRows { start_s: now, end_s, rows });
        now = end_s;
    }
    let title = "Rows in the passes by depth, depth-wise batching with oracle exit";
    rows_by_depth(&figure(folder, "rows_by_depth", title), &passes)?;

    let trace = |name: &str, exiting: [f64; 3], agreement: [f64; 3]| ExitDepths {
        name: name.into(),
        exiting: exiting.to_vec(),
        agreement: agreement.to_vec(),
    };
    let traces = [
        trace("before early-exit training", [0.31, 0.24, 0.45], [0.31, 0.52, 1.0]),
        trace("after early-exit training", [0.62, 0.21, 0.17], [0.62, 0.81, 1.0]),
    ];
    let title = "Where tokens can leave, and how often a depth already agrees with the last";
    exit_depths(&figure(folder, "exit_depths", title), &traces)
}

fn draw_token_times(folder: &Path) -> Result<(), Error> {
    let run = |(label, block, head, speedup): (&str, f64, f64, f64)| TokenTime {
        label: label.into(),
        parts_us: vec![block, 0.3 * block, head],
        speedup,
    };
    let runs =
        [("vanilla", 30.0, 6.0, 1.0), ("2 loops, rank 64", 19.0, 9.0, 1.29), ("3 loops, rank 64", 14.0, 11.0, 1.54)];
    let title = "Where the time of a generated token goes";
    token_times(&figure(folder, "token_times", title), &["linear layers", "attention", "exit head"], &runs.map(run))
}

fn draw_signals(folder: &Path) -> Result<(), Error> {
    let agreement =
        |confidence: f64, power: f64, depth: usize| 1.0 - (1.0 - confidence.powf(power)) / (depth + 2) as f64;
    let shares = || (0..15).map(|bin| (f64::from(bin) + 0.5) / 15.0);
    let signal = |(name, power): (&str, f64)| {
        let curve = |depth| (depth, shares().map(|share| (share, agreement(share, power, depth))).collect());
        Reliability { signal: name.into(), note: "calibration error 0.21".into(), curves: (0..2).map(curve).collect() }
    };
    let signals = [("top-1 probability", 0.5), ("margin", 0.3)];
    let title = "How often tokens agree with the last loop where a signal is so sure";
    reliability(&figure(folder, "reliability", title), &signals.map(signal))?;

    let curve = |(name, power): (&str, f64)| ExitCurve {
        signal: name.into(),
        points: (0..=100).map(|i| f64::from(i) / 100.0).map(|t| (1.0 + 2.0 * t, 0.6 + 0.4 * t.powf(power))).collect(),
    };
    let title = "Agreement of exits against mean depth";
    exit_curves(&figure(folder, "exit_curves", title), &signals.map(curve), &[0.6, 0.8, 1.0], 1.5)?;

    let line = |(name, factor): (&str, f64)| {
        let point = |threshold: f64| CalibrationPoint {
            threshold,
            risk: factor * (1.0 - threshold).powi(2),
            mean_depth: 1.0 + 2.0 * threshold,
        };
        let points = (0..=100).map(|i| f64::from(i) / 100.0).map(point);
        CalibrationLine { name: name.into(), points: points.collect() }
    };
    let lines = [("calibration", 0.4), ("held-out", 0.37)].map(line).to_vec();
    let found = CalibratedThreshold { signal: "margin".into(), tolerance: 0.05, chosen: Some(0.7), lines };
    let title = "Tokens that differ and mean depth by threshold of margin";
    calibration(&figure(folder, "calibration", title), &found)
}

fn draw_validation(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let metrics = [("throughput (tokens/s)", 0.04, 1.0), ("mean TTFT (ms)", 0.07, 0.4), ("mean TPOT (ms)", 0.05, 0.04)];
    let mut points = Vec::new();
    for (metric, error, scale) in metrics {
        let noise = Normal::new(1.0, error).expect("a finite deviation");
        for (policy, speed) in policies() {
            let measured = scale * speed * random.random_range(0.5..2.0);
            let predicted = measured * noise.sample(random);
            points.push(Prediction { metric: metric.into(), series: policy.batching, measured, predicted });
        }
    }
    let title = "Predicted against measured, every combination of policies";
    predictions(&figure(folder, "predictions", title), &points)
}

fn draw_training(folder: &Path, random: &mut StdRng) -> Result<(), Error> {
    let mut curves = Vec::new();
    for (index, floor) in [2.9, 2.55, 2.4].into_iter().enumerate() {
        let loss = |step: f64| floor + 2.5 * (-step / 400.0).exp() + 0.4 * (-step / 2500.0).exp();
        let train = (0..500).map(|i| f64::from(i) * 8.0);
        let train = train.map(|s| (s, loss(s) + random.random_range(-0.06..0.06))).collect();
        let validation = (0..=10).map(|i| f64::from(i) * 400.0).map(|s| (s, loss(s) + 0.08)).collect();
        curves.push(LossCurve { name: format!("loop {}", index + 1), train, validation });
    }
    let title = "Loss during uptraining, by loop";
    losses(&figure(folder, "losses", title), &curves)?;

    let line = |(name, slope): (&str, f64)| {
        let point = |i: u32| {
            let x = f64::from(i);
            let y = 1.0 + slope * (1.0 - (-x / 3.0).exp());
            SweepPoint { x, y, low: y - 0.03 * x.sqrt(), high: y + 0.04 * x.sqrt() }
        };
        SweepLine { name: name.into(), points: (1..=8).map(point).collect() }
    };
    let lines: Vec<_> = [("oracle", 0.9), ("confidence 0.9", 0.6), ("gate", 0.45)].into_iter().map(line).collect();
    let title = "Speed-up against the number of loops, mean and range of five seeds";
    sweep(&figure(folder, "sweep", title), "loops", Scale::Linear, "speed-up (×)", &lines)?;

    let batches = [1, 4, 16, 64, 256];
    let histories = [256, 1024, 4096, 16_384];
    let gain = |history: u32, batch: u32| {
        let rows = f64::from(batch) * (1.0 + f64::from(history) / 1024.0);
        (batch * history < 1_000_000).then_some(1.0 + 0.6 / (1.0 + rows / 60.0) - 0.05)
    };
    let map = HeatMap {
        columns: ("batch limit".into(), batches.iter().map(u32::to_string).collect()),
        rows: ("history (tokens)".into(), histories.iter().map(u32::to_string).collect()),
        cells: histories.iter().map(|&history| batches.iter().map(|&batch| gain(history, batch)).collect()).collect(),
        pays: 1.05,
    };
    heat_map(&figure(folder, "heat_map", "Throughput of depth-wise over sequence-wise batching"), &map)
}
