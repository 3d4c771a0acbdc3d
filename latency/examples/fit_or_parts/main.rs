//! Two latency models on the same logged passes: the sum of components, and a fit.
//!
//!     cargo run --release -p latency --example fit_or_parts -- FOLDER ...
//!     cargo run --release -p latency --example fit_or_parts -- --thin FOLDER OUT
//!
//! The second form writes what the comparison needs of a folder, small enough to keep: the profile, all passes of the grid, and
//! evenly spread ones of the steady load and of the first repeat's replays.
//!
//! A folder of results has a latency profile in `profile/` and the pass log `passes.parquet` of the run that it was measured for.
//! Both models know the grid and the steady load of the profiler. They are judged on the replays, which neither has seen.
//! The host may have been faster or slower during the replays than before: each model gets one factor for that, from the
//! replays of all other combinations. An error of a combination is that of the time of all its passes; an error by class
//! is the mean over classes of passes (with prompts or without, by decode rows), weighted by their time.

mod fitted;
mod nnls;

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use latency::LatencyModel;
use traces::{Component, LatencyProfile, LoggedPass, PassLog, PassOrigin, PassRun, PassWork};

use fitted::{Features, Fitted};

/// Time of a pass from its work, in nanoseconds.
type PassTime = Box<dyn Fn(&PassWork) -> f64>;

fn main() -> Result<(), Box<dyn Error>> {
    let folders: Vec<String> = std::env::args().skip(1).collect();
    if let [option, folder, out] = &folders[..]
        && option == "--thin"
    {
        return thin(Path::new(folder), Path::new(out));
    }
    if folders.is_empty() {
        return Err("no folder: expected results of `depthwise validate`".into());
    }
    for folder in &folders {
        compare(Path::new(folder))?;
    }
    Ok(())
}

/// Passes of the steady load that are kept of each way to serve it, and passes that are kept of a combination's replay.
const KEPT: [usize; 2] = [3200, 1600];

/// Writes the profile of a folder of results, and a part of its pass log.
fn thin(folder: &Path, out: &Path) -> Result<(), Box<dyn Error>> {
    let mut log = PassLog::read(folder.join("passes.parquet"))?;
    log.runs.retain(|run| run.origin != PassOrigin::Replay || run.repeat == 0);
    let way = |run: &PassRun| format!("{:?}, {}, {}, {}", run.origin, run.batching, run.exit, run.kv_fill);
    let mut totals: BTreeMap<_, usize> = BTreeMap::new();
    log.runs.iter().for_each(|run| *totals.entry(way(run)).or_default() += run.passes.len());
    for run in log.runs.iter_mut().filter(|run| run.origin != PassOrigin::Grid) {
        let kept = KEPT[usize::from(run.origin == PassOrigin::Replay)];
        let each = totals[&way(run)].div_ceil(kept);
        run.passes = run.passes.drain(..).step_by(each).collect();
    }
    std::fs::create_dir_all(out)?;
    log.write(out.join("passes.parquet"))?;
    LatencyProfile::read(folder.join("profile"))?.write(out.join("profile"))?;
    println!("{}: {} passes", out.display(), log.runs.iter().map(|run| run.passes.len()).sum::<usize>());
    Ok(())
}

fn compare(folder: &Path) -> Result<(), Box<dyn Error>> {
    let profile = LatencyProfile::read(folder.join("profile"))?;
    let log = PassLog::read(folder.join("passes.parquet"))?;
    let of = |origin: PassOrigin| log.runs.iter().filter(move |run| run.origin == origin);
    let passes = |origin: PassOrigin| of(origin).flat_map(|run| &run.passes);
    let replays = combinations(of(PassOrigin::Replay));
    println!("\n# {}: {}, {}", folder.display(), log.meta.model, log.meta.device);
    println!(
        "passes: {} of the grid, {} of the steady load, {} of replays of {} combinations",
        passes(PassOrigin::Grid).count(),
        passes(PassOrigin::Steady).count(),
        passes(PassOrigin::Replay).count(),
        replays.len()
    );
    let features = Features::new(passes(PassOrigin::Grid), log.meta.num_loops);
    let fitted = Fitted::new(features, passes(PassOrigin::Grid).chain(passes(PassOrigin::Steady)));
    let (all, used) = fitted.sizes();
    println!("fit: {used} of {all} coefficients are above 0");

    use Component::{AfterMore, ExitDecision, ExitSignal, HeadAgain, PrefillAgain};
    let mut models: Vec<(&str, PassTime)> = Vec::new();
    for (name, without) in [
        ("parts", &[][..]),
        ("parts without after_more", &[AfterMore]),
        ("parts without head_again", &[HeadAgain]),
        ("parts without prefill_again", &[PrefillAgain]),
        ("parts without exit_decision", &[ExitDecision]),
        ("parts without exit_signal", &[ExitSignal]),
        ("parts without all five", &[AfterMore, HeadAgain, PrefillAgain, ExitDecision, ExitSignal]),
    ] {
        models.push((name, parts(&profile, without)?));
    }
    models.push(("fit", Box::new(move |work| fitted.pass_ns(work))));

    let scores: Vec<Vec<Score>> = models.iter().map(|(_, time)| judge(&replays, time)).collect();
    println!("\nerror of a combination's passes in percent, signed, with the factor of the other combinations");
    println!(
        "{:<44} {:>8} {}",
        "combination",
        "passes",
        models.iter().map(|model| format!(" {:>12}", short(model.0))).collect::<String>()
    );
    for (place, (name, passes)) in replays.iter().enumerate() {
        let errors: String = scores.iter().map(|scores| format!(" {:>+12.2}", scores[place].error_pct)).collect();
        println!("{name:<44} {:>8} {errors}", passes.len());
    }
    println!(
        "\n{:<28} {:>9} {:>9} {:>9} {:>9} {:>24}",
        "model", "raw", "mean abs", "largest", "by class", "paired: less than parts"
    );
    for ((name, _), of_model) in models.iter().zip(&scores) {
        let mean = |value: &dyn Fn(&Score) -> f64| of_model.iter().map(value).sum::<f64>() / of_model.len() as f64;
        let largest = of_model.iter().map(|score| score.error_pct.abs()).fold(0.0, f64::max);
        let paired: Vec<f64> =
            of_model.iter().zip(&scores[0]).map(|(score, parts)| score.by_class_pct - parts.by_class_pct).collect();
        let (difference, error) = mean_and_error(&paired);
        println!(
            "{name:<28} {:>9.2} {:>9.2} {largest:>9.2} {:>9.2} {difference:>+14.2} +- {error:.2}",
            mean(&|score| score.raw_pct.abs()),
            mean(&|score| score.error_pct.abs()),
            mean(&|score| score.by_class_pct),
        );
    }
    println!("\nerror by class of pass in percent, over all combinations");
    let classes: Vec<BTreeMap<Class, Sums>> = models.iter().map(|(_, time)| by_class(&replays, time)).collect();
    println!(
        "{:<44} {:>8} {}",
        "class",
        "passes",
        models.iter().map(|model| format!(" {:>12}", short(model.0))).collect::<String>()
    );
    for (class, sums) in &classes[0] {
        let errors: String = classes.iter().map(|classes| format!(" {:>+12.2}", classes[class].error_pct())).collect();
        println!("{:<44} {:>8} {errors}", class.name(), sums.passes);
    }
    Ok(())
}

/// The name of a model as the header of a column.
fn short(name: &str) -> &str {
    name.rsplit(' ').next().unwrap_or(name)
}

/// The sum of components of a profile, without some of them.
fn parts(profile: &LatencyProfile, without: &[Component]) -> Result<PassTime, Box<dyn Error>> {
    let mut profile = profile.clone();
    profile.points.retain(|point| !without.contains(&point.component));
    let model = LatencyModel::new(&profile)?;
    Ok(Box::new(move |work| model.pass_ns(work)))
}

/// Passes by combination.
fn combinations<'r>(runs: impl Iterator<Item = &'r PassRun>) -> Vec<(String, Vec<&'r LoggedPass>)> {
    let mut found: BTreeMap<String, Vec<&LoggedPass>> = BTreeMap::new();
    for run in runs {
        found.entry(format!("{}, {}, {}", run.batching, run.exit, run.kv_fill)).or_default().extend(&run.passes);
    }
    found.into_iter().collect()
}

/// How a model does on one combination.
struct Score {
    /// Modelled less measured time of all passes, in percent of measured.
    raw_pct: f64,
    /// With the factor of the other combinations.
    error_pct: f64,
    /// Absolute errors by class of pass, with that factor.
    by_class_pct: f64,
}

fn judge(replays: &[(String, Vec<&LoggedPass>)], time: &PassTime) -> Vec<Score> {
    let totals: Vec<Sums> = replays.iter().map(|(_, passes)| Sums::of(passes, time)).collect();
    let score = |(place, (_, passes)): (usize, &(String, Vec<&LoggedPass>))| {
        let others = totals.iter().enumerate().filter(|(other, _)| *other != place);
        // Each combination counts alike, however many passes it has.
        let logs: Vec<f64> = others.map(|(_, sums)| (sums.measured / sums.modelled).ln()).collect();
        let factor = if logs.is_empty() { 1.0 } else { (logs.iter().sum::<f64>() / logs.len() as f64).exp() };
        let mut classes: BTreeMap<Class, Sums> = BTreeMap::new();
        passes.iter().for_each(|pass| classes.entry(Class::of(pass)).or_default().add(pass, time));
        let missed: f64 = classes.values().map(|sums| (factor * sums.modelled - sums.measured).abs()).sum();
        let Sums { measured, modelled, .. } = totals[place];
        Score {
            raw_pct: 100.0 * (modelled / measured - 1.0),
            error_pct: 100.0 * (factor * modelled / measured - 1.0),
            by_class_pct: 100.0 * missed / measured,
        }
    };
    replays.iter().enumerate().map(score).collect()
}

fn by_class(replays: &[(String, Vec<&LoggedPass>)], time: &PassTime) -> BTreeMap<Class, Sums> {
    let mut classes: BTreeMap<Class, Sums> = BTreeMap::new();
    for pass in replays.iter().flat_map(|(_, passes)| passes) {
        classes.entry(Class::of(pass)).or_default().add(pass, time);
    }
    classes
}

/// Passes that are alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Class {
    has_prompts: bool,
    is_mixed: bool,
    /// A power of two; 0 without decode rows.
    decode_rows_up_to: u32,
}

impl Class {
    fn of(pass: &LoggedPass) -> Self {
        let rows = pass.work.decode_rows;
        Self {
            has_prompts: !pass.work.chunks.is_empty(),
            is_mixed: pass.work.depths > 1,
            decode_rows_up_to: if rows == 0 { 0 } else { rows.next_power_of_two() },
        }
    }

    fn name(self) -> String {
        let prompts = if self.has_prompts { "prompts and " } else { "" };
        let depths = if self.is_mixed { "several depths" } else { "one depth" };
        format!("{prompts}up to {} decode rows, {depths}", self.decode_rows_up_to)
    }
}

/// Times of some passes, in nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    passes: usize,
    measured: f64,
    modelled: f64,
}

impl Sums {
    fn of(passes: &[&LoggedPass], time: &PassTime) -> Self {
        let mut sums = Self::default();
        passes.iter().for_each(|pass| sums.add(pass, time));
        sums
    }

    fn add(&mut self, pass: &LoggedPass, time: &PassTime) {
        self.passes += 1;
        self.measured += pass.elapsed.0 as f64;
        self.modelled += time(&pass.work);
    }

    fn error_pct(&self) -> f64 {
        100.0 * (self.modelled / self.measured - 1.0)
    }
}

/// The mean, and its standard error.
fn mean_and_error(values: &[f64]) -> (f64, f64) {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    (mean, (variance / count).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_logs_of_this_repository_can_be_compared() {
        let logs = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/fit_or_parts/logs");
        let folders: Vec<_> = std::fs::read_dir(logs).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(folders.len(), 5, "models on two processors");
        folders.iter().for_each(|folder| compare(folder).unwrap());
    }
}
