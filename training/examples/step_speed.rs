//! Speed of training steps for the models that this repository trains: tokens per second of processor time, for the
//! fastest and the median step. Processor time is little affected by other processes.
//!
//! ```sh
//! cargo run --release -p training --example step_speed
//! ```

use std::path::Path;
use std::sync::atomic::AtomicBool;

use training::corpus::DataOptions;
use training::objective::ExitCoefficients;
use training::trainer::options::{ModelOptions, TrainingOptions};
use training::trainer::{Event, Trainer};

const STEPS: usize = 25;

type Setting = (&'static str, &'static str, ExitCoefficients, f64);

const SETTINGS: [Setting; 4] = [
    ("4 loops of 2 layers, last loop's loss", "{}", ExitCoefficients::Last, 0.0),
    ("4 loops of 2 layers, every loop's loss", "{}", ExitCoefficients::Aggressive(0.1), 2.0),
    ("8 layers that share nothing", "{sharing: nothing}", ExitCoefficients::Last, 0.0),
    ("8 narrower layers", STUDIED, ExitCoefficients::Last, 0.0),
];

const STUDIED: &str = "{sharing: nothing, block_layers: 4, num_loops: 2, hidden_size: 128, intermediate_size: 320, \
                       num_heads: 4}";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let folder = tempfile::tempdir()?;
    let text = folder.path().join("text.txt");
    let words = ["the", "block", "is", "run", "again", "and", "its", "loops", "share", "every", "weight", "of", "it"];
    let sentence = |i: usize| (0..12).map(|j| words[(i * 7 + j * j * (i % 11 + 1)) % 13]).collect::<Vec<_>>().join(" ");
    std::fs::write(&text, (0..4000).map(sentence).collect::<Vec<_>>().join(".\n"))?;
    for (name, changes, exits, self_distillation) in SETTINGS {
        let mut options = TrainingOptions {
            model: ModelOptions { config: serde_yaml::from_str(changes)?, ..ModelOptions::default() },
            data: DataOptions {
                text: vec![text.clone()],
                held_out: vec![text.clone()],
                held_out_tokens: Some(1000),
                cache: folder.path().join("tokens"),
                ..DataOptions::default()
            },
            steps: STEPS,
            workers: 1,
            ..TrainingOptions::default()
        };
        options.model.config.insert("vocab_size".into(), 300.into());
        options.optimizer.warmup_steps = 1;
        (options.objective.exits, options.objective.self_distillation) = (exits, self_distillation);
        let tokens = (options.batch * options.seq) as f64;
        let times = step_times(options, &folder.path().join(name))?;
        let (fastest, median) = (tokens / times[0], tokens / times[times.len() / 2]);
        println!("{name}: {fastest:.0} tokens/s at best, {median:.0} in the median");
    }
    Ok(())
}

/// Seconds of processor time of each step, sorted.
fn step_times(options: TrainingOptions, folder: &Path) -> Result<Vec<f64>, Box<dyn std::error::Error>> {
    let mut trainer = Trainer::start(options, folder, &mut |_| {})?;
    let (mut times, mut before) = (Vec::new(), processor_seconds());
    trainer.run(&AtomicBool::new(false), &mut |event| {
        if let Event::Step { .. } = event {
            let now = processor_seconds();
            times.push(now - before);
            before = now;
        }
    })?;
    times.sort_by(f64::total_cmp);
    Ok(times)
}

/// Processor time of this process so far, of all its threads.
fn processor_seconds() -> f64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the clock exists on every Linux, and `time` is owned here.
    unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    time.tv_sec as f64 + time.tv_nsec as f64 * 1e-9
}
