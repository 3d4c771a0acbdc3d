//! Servers that others measured at a number of requests in flight: `systems/silicon_sample.csv` of PyPI's
//! `aiconfigurator-core`.

use std::path::Path;

use traces::table::{Owner, Table};

use crate::error::ImportError;

/// Mean times of a server: a row of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    /// Identifier of the row.
    pub id: String,
    /// Where the row is from, and when it was measured.
    pub source: String,
    /// Serving framework, such as `vllm`.
    pub framework: String,
    /// Model, as on the Hugging Face hub.
    pub model: String,
    /// GPU, by the names of the package's files.
    pub gpu: String,
    /// Number type of the linear layers, by the names of the package's tables.
    pub gemm: String,
    /// Whether the same machines run prompts and generate.
    pub is_aggregated: bool,
    /// Tokens of a prompt, as they were asked for.
    pub prompt_tokens: u32,
    /// Tokens of an output, as they were asked for.
    pub output_tokens: u32,
    /// Requests in flight.
    pub in_flight: u32,
    /// Devices that share each layer.
    pub devices: u64,
    /// Stages of a pipeline.
    pub stages: u64,
    /// Mean time to first token, in milliseconds.
    pub ttft_ms: f64,
    /// Mean time per output token after the first, in milliseconds.
    pub tpot_ms: f64,
}

const COLUMNS: [&str; 14] = [
    "id",
    "silicon_data_source",
    "backend",
    "model_path",
    "system",
    "gemm_quant_mode",
    "mode",
    "isl",
    "osl",
    "batch_size",
    "tp_size",
    "pp_size",
    "silicon_ttft_ms",
    "silicon_tpot_ms",
];

/// Reads the rows of one framework. Rows without a number of requests in flight, of devices, or without both times are
/// left out: those of disaggregated systems, mostly.
///
/// # Errors
/// If the file cannot be read, a column is missing, or a value is no number.
pub fn read_samples(path: &Path, framework: &str) -> Result<Vec<Sample>, ImportError> {
    let mut table = Table::open(path, &COLUMNS, Owner::Others)?;
    let mut samples = Vec::new();
    while let Some(row) = table.next_row()? {
        let text = |column| row.text(column).map(str::to_owned);
        if text(2)? != framework || [9, 10, 12, 13].into_iter().any(|column| row.text(column).is_ok_and(str::is_empty))
        {
            continue;
        }
        let count = |column| row.number(column, "a whole number, at least 1", |&count: &u32| count >= 1);
        let time = |column| row.number(column, "milliseconds", |time: &f64| time.is_finite() && *time > 0.0);
        samples.push(Sample {
            id: text(0)?,
            source: text(1)?,
            framework: text(2)?,
            model: text(3)?,
            gpu: text(4)?,
            gemm: text(5)?,
            is_aggregated: row.text(6)? == "agg",
            prompt_tokens: count(7)?,
            output_tokens: count(8)?,
            in_flight: count(9)?,
            devices: count(10)?.into(),
            stages: if row.text(11)?.is_empty() { 1 } else { count(11)?.into() },
            ttft_ms: time(12)?,
            tpot_ms: time(13)?,
        });
    }
    Ok(samples)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_the_framework_with_all_numbers_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("silicon_sample.csv");
        let row = |framework: &str, size: &str| {
            format!("a,\"b; c\",{framework},meta/L,h200_sxm,fp8,agg,1024,512,{size},2,1,80.5,9.25,x\n")
        };
        let text = format!("{},more\n{}{}{}", COLUMNS.join(","), row("vllm", "8"), row("vllm", ""), row("sglang", "4"));
        std::fs::write(&path, &text).unwrap();
        let samples = read_samples(&path, "vllm").unwrap();
        assert_eq!(samples.len(), 1);
        assert_eq!((samples[0].in_flight, samples[0].devices, samples[0].tpot_ms), (8, 2, 9.25));
        assert!(samples[0].is_aggregated && samples[0].source == "b; c");
        std::fs::write(&path, text.replace("1024", "1k")).unwrap();
        let error = read_samples(&path, "vllm").unwrap_err().to_string();
        assert!(
            error.ends_with("silicon_sample.csv:2: isl: found `1k`, expected a whole number, at least 1"),
            "{error}"
        );
    }
}
