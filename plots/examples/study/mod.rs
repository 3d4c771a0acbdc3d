//! What the examples that fill pages from sweeps have in common.

use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path;

use plots::{Figure, Origin, Scale, SweepLine};

/// Result of an example.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Column of the throughput.
pub const THROUGHPUT: &str = "throughput_tok_s";

/// A line of `sweep-summary.csv`.
pub type Point = BTreeMap<String, String>;

/// Points of a sweep.
pub struct Sweep(pub Vec<Point>);

impl Sweep {
    /// Reads the means of a sweep from its folder.
    pub fn read(folder: &Path) -> Result<Self> {
        let mut reader = csv::Reader::from_path(folder.join("sweep-summary.csv"))?;
        Ok(Self(reader.deserialize().collect::<std::result::Result<_, _>>()?))
    }

    /// The point of highest throughput among those with these values in these columns, and with an exit policy of a kind.
    pub fn best_of(&self, wanted: &[(&str, &str)], exits: impl Fn(&str) -> bool) -> Result<&Point> {
        let is_wanted = |point: &&Point| {
            wanted.iter().all(|(key, value)| point.get(*key).is_some_and(|found| found == value))
                && exits(&point["exit_policy"])
        };
        let points = self.0.iter().filter(is_wanted);
        let best = points.max_by(|a, b| f64::total_cmp(&number(a, THROUGHPUT), &number(b, THROUGHPUT)));
        best.ok_or_else(|| format!("no point of {wanted:?}").into())
    }
}

/// A number in a column; NaN if there is none.
pub fn number(point: &Point, column: &str) -> f64 {
    point.get(column).and_then(|value| value.parse().ok()).unwrap_or(f64::NAN)
}

/// Replaces what stands between the marker of a table and the next end.
pub fn fill(page: &str, name: &str, table: &str) -> Result<String> {
    let missing = || format!("no <!-- {name} --> before an <!-- end --> in the page");
    let (before, rest) = page.split_once(&format!("<!-- {name} -->\n")).ok_or_else(missing)?;
    let (_, after) = rest.split_once("<!-- end -->").ok_or_else(missing)?;
    Ok(format!("{before}<!-- {name} -->\n{table}<!-- end -->{after}"))
}

/// Draws lines against the batch limit into a picture.
pub fn draw(picture: &Path, [title, setting, device]: [&str; 3], y_label: &str, lines: &[SweepLine]) -> Result<()> {
    let (folder, name) = (picture.parent().unwrap_or(Path::new("")), picture.file_stem().unwrap_or_default());
    let scratch = folder.join(format!(".{}", name.to_string_lossy()));
    let figure = Figure {
        folder: scratch.clone(),
        name: name.to_string_lossy().into_owned(),
        title: title.to_owned(),
        setting: setting.to_owned(),
        device: device.to_owned(),
        origin: Origin::Simulated,
    };
    plots::sweep(&figure, "batch limit", Scale::Log, y_label, lines)?;
    std::fs::rename(scratch.join(name).with_extension("png"), picture)?;
    std::fs::remove_dir_all(scratch)?;
    Ok(())
}
