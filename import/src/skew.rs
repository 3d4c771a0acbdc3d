//! Correction for uneven histories by LLMServingSim's profiler: `skew_fit.csv`, in each of its forms.
//!
//! A row has the share `alpha` of one cell. The columns that identify a cell differ between versions:
//!
//! | column | axis | bound |
//! | --- | --- | --- |
//! | `pc`, `pc_label` | prompt tokens | a number; a label |
//! | `lev_label` | time at the longest history over that at the mean, less 1 | a label |
//! | `n_label`, `n_anchor` | decode rows | a label; the number measured, for those nearest in proportion |
//! | `skew_rate_label` | share of the rows that have the longer history | a label |
//! | `kv_big_label` | longest history | a label |
//! | `kp_label` | history before the prompts | a label |
//!
//! Any of them may be missing: the share then applies to all values. The bounds of labels are those in `meta.yaml`
//! (`skew_fit.bucket_axes`: `n_bins`, `n_labels` and so on), or else those in the label: `n<=32`, `sr<=15%`, `kvB<=4k`,
//! `kp=0`; `kp>8k` has no bound.
//!
//! If `meta.yaml` disables the fit (`skew_fit.enabled: false`), an existing file belongs to another measurement and is
//! not read, as in LLMServingSim.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;
use traces::SkewCell;
use traces::table::{Owner, Row, Table, read_header};

use crate::error::{ImportError, read_text};
use crate::layer_tables::meta_file;

/// Quantity that bounds a cell.
#[derive(Clone, Copy, PartialEq)]
enum Axis {
    PrefillTokens,
    Lever,
    DecodeRows,
    LongShare,
    LongestHistory,
    PrefillHistory,
}

/// Format of a bound in a column.
#[derive(Clone, Copy, PartialEq)]
enum Form {
    Number,
    /// The nearest of the measured numbers.
    Anchor,
    /// The key of its bounds in `meta.yaml` less `_labels` and `_bins`.
    Label(&'static str),
}

const COLUMNS: [(&str, Axis, Form); 8] = [
    ("pc", Axis::PrefillTokens, Form::Number),
    ("pc_label", Axis::PrefillTokens, Form::Label("pc")),
    ("lev_label", Axis::Lever, Form::Label("lev")),
    ("n_label", Axis::DecodeRows, Form::Label("n")),
    ("n_anchor", Axis::DecodeRows, Form::Anchor),
    ("skew_rate_label", Axis::LongShare, Form::Label("skew_rate")),
    ("kv_big_label", Axis::LongestHistory, Form::Label("kv_big")),
    ("kp_label", Axis::PrefillHistory, Form::Label("kp")),
];
const ALPHA: &str = "alpha";
const LAYER: &str = "layer";
const QUERY_LENGTH: &str = "decode_q_len";
/// Columns with the number of measurements of a cell.
const COUNTS: [&str; 3] = ["n_samples", "direct_rows", "pooled_rows"];

/// The upper bounds of a cell, by [`Axis`].
type Bounds = [f64; 6];

/// Reads the cells of a folder's `skew_fit.csv`; empty without the file.
///
/// # Errors
/// If a column belongs to no known axis, or a value cannot be read.
pub fn read_skew(folder: &Path) -> Result<Vec<SkewCell>, ImportError> {
    let path = folder.join("skew_fit.csv");
    let fit = SkewFit::read(folder)?;
    if fit.enabled == Some(false) || !path.exists() {
        return Ok(Vec::new());
    }
    let labels = fit.labels();
    let header = read_header(&path)?;
    let known = |name: &str| {
        let others = [ALPHA, LAYER, QUERY_LENGTH].into_iter().chain(COUNTS);
        COLUMNS.iter().map(|column| column.0).chain(others).any(|column| column == name)
    };
    if let Some(unknown) = header.iter().find(|name| !known(name)) {
        let axes = COLUMNS.map(|column| column.0).join(", ");
        return Err(ImportError::unusable(&path, format!("a column `{unknown}`"), format!("axes among {axes}")));
    }
    let has = |name: &str| header.iter().any(|found| found == name);
    let axes: Vec<(&str, Axis, Form)> = COLUMNS.into_iter().filter(|column| has(column.0)).collect();
    let kinds = [LAYER, QUERY_LENGTH].into_iter().filter(|name| has(name));
    let columns: Vec<&str> = axes.iter().map(|axis| axis.0).chain([ALPHA]).chain(kinds).collect();

    let mut table = Table::open(&path, &columns, Owner::Others)?;
    let mut cells: Vec<(Bounds, f64)> = Vec::new();
    while let Some(row) = table.next_row()? {
        let one_query = columns
            .iter()
            .position(|&name| name == QUERY_LENGTH)
            .map(|place| row.get(place, "", |text| Some(text == "1")));
        if let Some(place) = columns.iter().position(|&name| name == LAYER) {
            row.get(place, "`attention`, the only kernel of a dense model", |name| {
                (name == "attention").then_some(())
            })?;
        }
        if !one_query.transpose()?.unwrap_or(true) {
            continue;
        }
        let mut bounds = [f64::INFINITY; 6];
        for (place, (_, axis, form)) in axes.iter().enumerate() {
            bounds[*axis as usize] = bound(&row, place, *form, &labels)?;
        }
        cells.push((bounds, row.number(axes.len(), "a finite number", |alpha: &f64| alpha.is_finite())?));
    }
    if axes.iter().any(|axis| axis.2 == Form::Anchor) {
        reach_halfway(&mut cells);
    }
    Ok(cells.into_iter().map(|(bounds, alpha)| cell(bounds, alpha)).collect())
}

fn bound(row: &Row<'_>, place: usize, form: Form, labels: &Labels) -> Result<f64, ImportError> {
    match form {
        Form::Number | Form::Anchor => Ok(f64::from(row.number(place, "a whole number", |_: &u32| true)?)),
        Form::Label(key) => {
            let expected = "a label like `n<=32`, or one that meta.yaml gives bounds for";
            Ok(row.get(place, expected, |label| labels.bound(key, label).or_else(|| upper_bound(label)))?)
        }
    }
}

fn cell(bounds: Bounds, alpha: f64) -> SkewCell {
    let [prefill_tokens, lever, decode_rows, long_share, longest_history, prefill_history] = bounds;
    // The cast saturates at the largest number.
    SkewCell {
        prefill_tokens: prefill_tokens as u32,
        lever,
        decode_rows: decode_rows as u32,
        long_share: long_share.min(1.0),
        longest_history: longest_history as u32,
        prefill_history: prefill_history as u32,
        alpha,
    }
}

/// Converts measured numbers of decode rows to bounds: halfway to the next larger number of the cell, in proportion;
/// none for the largest.
fn reach_halfway(cells: &mut [(Bounds, f64)]) {
    let rows = Axis::DecodeRows as usize;
    let mut anchors: BTreeMap<[u64; 6], Vec<f64>> = BTreeMap::new();
    let others = |bounds: &Bounds| -> [u64; 6] {
        std::array::from_fn(|axis| if axis == rows { 0 } else { bounds[axis].to_bits() })
    };
    for (bounds, _) in cells.iter() {
        anchors.entry(others(bounds)).or_default().push(bounds[rows]);
    }
    for (bounds, _) in cells {
        let larger = anchors[&others(bounds)]
            .iter()
            .copied()
            .filter(|&anchor| anchor > bounds[rows])
            .fold(f64::INFINITY, f64::min);
        bounds[rows] = (bounds[rows] * larger).sqrt();
    }
}

/// The number at the end of a label, with `k` for 1,024 and `%` for hundredths; infinite after `>`.
fn upper_bound(label: &str) -> Option<f64> {
    if label.contains('>') {
        return Some(f64::INFINITY);
    }
    let (_, number) = label.rsplit_once('=')?;
    let (number, unit) = match (number.strip_suffix('k'), number.strip_suffix('%')) {
        (Some(thousands), _) => (thousands, 1024.0),
        (_, Some(hundredths)) => (hundredths, 0.01),
        _ => (number, 1.0),
    };
    Some(number.parse::<f64>().ok()? * unit)
}

/// Bounds of labels, by axis.
struct Labels(BTreeMap<String, BTreeMap<String, f64>>);

#[derive(Default, Deserialize)]
struct Meta {
    skew_fit: Option<SkewFit>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct SkewFit {
    enabled: Option<bool>,
    /// For all degrees of tensor parallelism, or by degree.
    bucket_axes: BTreeMap<String, serde_yaml::Value>,
    per_tp: BTreeMap<u32, SkewFit>,
}

impl SkewFit {
    /// Reads `meta.yaml`, next to the tables or in a folder above.
    fn read(folder: &Path) -> Result<Self, ImportError> {
        let Some(path) = meta_file(folder) else { return Ok(Self::default()) };
        let meta: Meta =
            serde_yaml::from_str(&read_text(&path)?).map_err(|error| ImportError::malformed(&path, error))?;
        Ok(meta.skew_fit.unwrap_or_default())
    }

    fn labels(&self) -> Labels {
        let of_one_device = self.per_tp.get(&1).map(|fit| &fit.bucket_axes).filter(|axes| !axes.is_empty());
        let axes = of_one_device.unwrap_or(&self.bucket_axes);
        let list = |key: String| axes.get(&key).and_then(serde_yaml::Value::as_sequence);
        let of_axis = |key: &str| {
            let labels = list(format!("{key}_labels"))?.iter().filter_map(|label| label.as_str());
            let bounds = list(format!("{key}_bins"))?.iter().skip(1).filter_map(serde_yaml::Value::as_f64);
            Some((key.to_owned(), labels.map(str::to_owned).zip(bounds).collect()))
        };
        let keys = COLUMNS.iter().filter_map(|column| match column.2 {
            Form::Label(key) => Some(key),
            _ => None,
        });
        Labels(keys.filter_map(of_axis).collect())
    }
}

impl Labels {
    fn bound(&self, axis: &str, label: &str) -> Option<f64> {
        self.0.get(axis)?.get(label).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(meta: &str, csv: &str) -> Result<Vec<SkewCell>, ImportError> {
        let folder = tempfile::tempdir().unwrap();
        let tables = folder.path().join("tp1");
        std::fs::create_dir(&tables).unwrap();
        if !meta.is_empty() {
            std::fs::write(folder.path().join("meta.yaml"), meta).unwrap();
        }
        std::fs::write(tables.join("skew_fit.csv"), csv).unwrap();
        read_skew(&tables)
    }

    #[test]
    fn labels_are_upper_bounds() {
        let header = "pc,n_label,skew_rate_label,kv_big_label,kp_label,alpha,n_samples\n";
        let cells =
            read("", &format!("{header}16,n<=64,sr<=15%,kvB<=4k,kp=0,0.1,2\n0,n<=8,sr>70%,kvB<=512,kp>8k,-0.02,2\n"));
        let any = SkewCell {
            prefill_tokens: 16,
            lever: f64::INFINITY,
            decode_rows: 64,
            long_share: 0.15,
            longest_history: 4096,
            prefill_history: 0,
            alpha: 0.1,
        };
        let other = SkewCell {
            prefill_tokens: 0,
            decode_rows: 8,
            long_share: 1.0,
            longest_history: 512,
            prefill_history: u32::MAX,
            alpha: -0.02,
            ..any
        };
        assert_eq!(cells.unwrap(), [any, other]);
    }

    const META: &str = "skew_fit:\n  enabled: true\n  bucket_axes:\n    axes: [n, pc, lev]\n    \
        n_bins: [0, 3, 1000000000]\n    n_labels: [n=2, n=4]\n    pc_bins: [-1, 1, 256]\n    pc_labels: [pc0, pcS]\n    \
        lev_bins: [0.0, 0.25, 1000000000.0]\n    lev_labels: [lev0, lev1]\n";

    #[test]
    fn labels_without_a_number_have_their_bounds_in_the_metadata() {
        let csv = "layer,n_label,pc_label,lev_label,alpha,n_samples\nattention,n=2,pcS,lev0,0.3,20\n";
        let bounds = |meta: &str| {
            let cell = read(meta, csv).unwrap()[0];
            (cell.decode_rows, cell.prefill_tokens, cell.lever, cell.longest_history)
        };
        let expected = (3, 256, 0.25, u32::MAX);
        assert_eq!(bounds(META), expected);
        let (head, axes) = META.split_once("  bucket_axes:\n").unwrap();
        let axes: String = axes.lines().map(|line| format!("    {line}\n")).collect();
        assert_eq!(bounds(&format!("{head}  per_tp:\n    1:\n      bucket_axes:\n{axes}")), expected);
        let error = read("", csv).unwrap_err().to_string();
        assert!(error.contains("skew_fit.csv:2: pc_label: found `pcS`, expected a label like `n<=32`"), "{error}");
    }

    #[test]
    fn anchors_hold_for_the_rows_nearest_in_proportion() {
        let csv = "layer,decode_q_len,pc_label,lev_label,n_anchor,alpha,direct_rows,pooled_rows\n\
            attention,1,pc0,lev0,2,0.1,20,20\nattention,1,pc0,lev0,8,0.2,20,20\nattention,4,pc0,lev0,3,0.9,20,20\n\
            attention,1,pc0,lev1,2,0.3,20,20\n";
        let cells = read(META, csv).unwrap();
        let rows: Vec<(u32, f64)> = cells.iter().map(|cell| (cell.decode_rows, cell.alpha)).collect();
        assert_eq!(rows, [(4, 0.1), (u32::MAX, 0.2), (u32::MAX, 0.3)]);
    }

    #[test]
    fn axes_and_kernels_that_are_not_known_are_named() {
        let error = read("", "n_label,disp_label,alpha\nn<=2,d<=1,0.1\n").unwrap_err().to_string();
        assert!(error.contains("found a column `disp_label`, expected axes among pc, pc_label"), "{error}");
        let error = read("", "layer,n_label,alpha\nindexer,n<=2,0.1\n").unwrap_err().to_string();
        assert!(error.contains("skew_fit.csv:2: layer: found `indexer`, expected `attention`"), "{error}");
        assert!(read("", "n_label,alpha\nn<=2,NaN\n").unwrap_err().to_string().contains("alpha: found `NaN`"));
    }

    #[test]
    fn without_a_fit_of_this_measurement_there_is_no_correction() {
        let csv = "n_label,alpha\nn<=2,0.1\n";
        assert_eq!(read("gpu: g\n", csv).unwrap().len(), 1);
        assert!(read("skew_fit:\n  enabled: false\n", csv).unwrap().is_empty());
        assert!(read_skew(tempfile::tempdir().unwrap().path()).unwrap().is_empty());
    }
}
