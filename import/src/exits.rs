//! Exits that other engines recorded, and ours in a form that they read.
//!
//! | file | of | what it has | as an exit trace |
//! | --- | --- | --- | --- |
//! | JSON with `depths_by_request` | vllm-rlt, `exit_mode` trace | loops of each generated token | [`ExitTrace::from_depths`] |
//! | JSON with `exit_pdf_file`, and an `.npz` beside it | CDB's workloads (arXiv 2608.09444, package `looped_cdb`) | lengths of requests, and one of the next three | |
//! | `exit_depths` | | loops of each token | [`ExitTrace::from_depths`] |
//! | `exit_pdf` | | probability that a token exits after each loop | gates: `cumulative:gate:SHARE:LOOPS` exits where CDB does at the threshold `SHARE` |
//! | `exit_values` | | a measure of convergence after each loop, which falls | difference: `difference:T` exits where CDB does at the threshold `T` |
//!
//! None of them has predictions. Where depths are known, the predictions of a trace agree with the last depth from there on;
//! otherwise only the last depth agrees with itself. Agreement and quality of such traces mean nothing.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use half::f16;
use scheduler::ExitPolicy;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use traces::{ExitSignal, ExitTrace, ExitTraceMeta, LatencyProfile, Nanos, Request, RequestTrace, SignalSet, Signals};
use zip::ZipArchive;

use crate::error::{ImportError, read_text};

/// Exits of other engines' requests.
#[derive(Clone, Debug)]
pub struct ImportedExits {
    /// The exits; generation `i` is that of request `i`.
    pub exits: ExitTrace,
    /// The requests, all at once, if the file has their lengths.
    pub requests: Option<RequestTrace>,
}

impl ImportedExits {
    /// Reads a file of vllm-rlt or CDB. `num_loops` is the number of loops at full depth; by default the file's, or the
    /// most loops that a token of it ran.
    ///
    /// # Errors
    /// If a file cannot be read, or has depths, lengths or sizes that do not fit each other.
    pub fn read(path: impl AsRef<Path>, num_loops: Option<u32>) -> Result<Self, ImportError> {
        let path = path.as_ref();
        let found: Value =
            serde_json::from_str(&read_text(path)?).map_err(|error| ImportError::malformed(path, error))?;
        let at = |place: Option<&'_ Value>| place.and_then(|place| place.get("depths_by_request")).cloned();
        match at(found.get("trace")).or_else(|| at(Some(&found))) {
            Some(depths) => read_depths(path, &depths, num_loops),
            None if found.get("exit_pdf_file").is_some() => Bundle::read(path, found)?.import(path, num_loops),
            None => Err(ImportError::unusable(
                path,
                "neither depths_by_request nor exit_pdf_file",
                "exits of vllm-rlt or of CDB",
            )),
        }
    }
}

fn meta(num_loops: u32, path: &Path, of: &str) -> ExitTraceMeta {
    let file = path.file_name().unwrap_or_default().to_string_lossy();
    ExitTraceMeta {
        schema_version: ExitTrace::SCHEMA_VERSION,
        model: "not known".to_owned(),
        fingerprint: LatencyProfile::ANY_MODEL.to_owned(),
        num_loops,
        source: format!("{of} of {file}; without predictions, so agreement means nothing"),
        recording: None,
    }
}

/// Exit depths from numbers of loops, by request.
fn from_loops(path: &Path, loops: &[Vec<u32>], num_loops: Option<u32>, of: &str) -> Result<ExitTrace, ImportError> {
    let most = loops.iter().flatten().copied().max().unwrap_or(0);
    let num_loops = checked_loops(path, num_loops.unwrap_or(most))?;
    if let Some(request) = loops.iter().position(Vec::is_empty) {
        return Err(ImportError::unusable(path, format!("no token of request {request}"), "at least one"));
    }
    let wrong = loops.iter().flatten().find(|&&count| count == 0 || count > num_loops);
    if let Some(count) = wrong {
        return Err(ImportError::unusable(path, format!("a token of {count} loops"), format!("1 to {num_loops}")));
    }
    let depths: Vec<Vec<u8>> =
        loops.iter().map(|tokens| tokens.iter().map(|&count| (count - 1) as u8).collect()).collect();
    Ok(ExitTrace::from_depths(meta(num_loops, path, of), &depths))
}

fn checked_loops(path: &Path, num_loops: u32) -> Result<u32, ImportError> {
    match (1..=64).contains(&num_loops) {
        true => Ok(num_loops),
        false => Err(ImportError::unusable(path, format!("{num_loops} loops"), "1 to 64")),
    }
}

/// Requests in the order of their numbers, or of their names if some have none.
fn read_depths(path: &Path, depths: &Value, num_loops: Option<u32>) -> Result<ImportedExits, ImportError> {
    let by_name = BTreeMap::<String, Vec<u32>>::deserialize(depths)
        .map_err(|error| ImportError::malformed(path, format!("depths_by_request: {error}")))?;
    if by_name.is_empty() {
        return Err(ImportError::unusable(path, "depths_by_request without a request", "at least one"));
    }
    let mut requests: Vec<(String, Vec<u32>)> = by_name.into_iter().collect();
    let number = |name: &str| name.parse::<u64>().ok();
    if requests.iter().all(|(name, _)| number(name).is_some()) {
        requests.sort_by_key(|(name, _)| number(name));
    }
    let loops: Vec<Vec<u32>> = requests.into_iter().map(|(_, loops)| loops).collect();
    Ok(ImportedExits { exits: from_loops(path, &loops, num_loops, "depths")?, requests: None })
}

/// A workload of CDB.
#[derive(Deserialize)]
struct Bundle {
    exit_pdf_file: String,
    requests: Vec<BundleRequest>,
    #[serde(default)]
    meta: BundleMeta,
}

#[derive(Deserialize)]
struct BundleRequest {
    input_len: u32,
    output_len: u32,
}

#[derive(Default, Deserialize)]
struct BundleMeta {
    total_steps: Option<u32>,
}

impl Bundle {
    fn read(path: &Path, found: Value) -> Result<Self, ImportError> {
        let bundle: Self = serde_json::from_value(found).map_err(|error| ImportError::malformed(path, error))?;
        let is_name = Path::new(&bundle.exit_pdf_file).file_name() == Some(bundle.exit_pdf_file.as_ref());
        if !is_name {
            let found = format!("exit_pdf_file {:?}", bundle.exit_pdf_file);
            return Err(ImportError::unusable(path, found, "the name of a file beside it"));
        }
        let lengths = |request: &BundleRequest| [request.input_len, request.output_len];
        let is_length = |tokens: u32| (1..=Request::MAX_TOKENS).contains(&tokens);
        if bundle.requests.is_empty() || !bundle.requests.iter().flat_map(lengths).all(is_length) {
            return Err(ImportError::unusable(path, "no request, or one of 0 tokens", "requests with lengths"));
        }
        Ok(bundle)
    }

    fn import(&self, path: &Path, num_loops: Option<u32>) -> Result<ImportedExits, ImportError> {
        let mut arrays = Arrays::open(&path.with_file_name(&self.exit_pdf_file))?;
        let offsets = arrays.read("offsets")?.ok_or_else(|| arrays.unusable("no array offsets", "it"))?;
        let ends: Vec<u64> = self
            .requests
            .iter()
            .scan(0, |end, request| {
                *end += u64::from(request.output_len);
                Some(*end)
            })
            .collect();
        let starts = std::iter::once(&0).chain(&ends).map(|&end| end as f64);
        if !offsets.values.iter().copied().eq(starts) {
            return Err(arrays.unusable("offsets that differ from the sums of output_len", "those sums"));
        }
        let tokens = ends.last().copied().unwrap_or(0) as usize;
        let exits = self.exits(path, &mut arrays, tokens, num_loops)?;
        let requests = self.requests.iter().zip(0..).map(|(request, id)| Request {
            id,
            arrival: Nanos::ZERO,
            prompt_tokens: request.input_len,
            output_tokens: request.output_len,
        });
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(ImportedExits { exits, requests: Some(RequestTrace::new(name, requests.collect())) })
    }

    fn exits(
        &self,
        path: &Path,
        arrays: &mut Arrays,
        tokens: usize,
        num_loops: Option<u32>,
    ) -> Result<ExitTrace, ImportError> {
        if let Some(depths) = arrays.read("exit_depths")? {
            if depths.shape != [tokens] {
                return Err(arrays.unusable(format!("exit_depths of {:?}", depths.shape), format!("[{tokens}]")));
            }
            let mut left = depths.values.iter().map(|&loops| loops as u32);
            let of = |request: &BundleRequest| left.by_ref().take(request.output_len as usize).collect();
            let loops: Vec<Vec<u32>> = self.requests.iter().map(of).collect();
            return from_loops(path, &loops, num_loops.or(self.meta.total_steps), "exit_depths");
        }
        let by_loop = [("exit_pdf", ExitSignal::Gate), ("exit_values", ExitSignal::Difference)];
        for (name, signal) in by_loop {
            let Some(found) = arrays.read(name)? else { continue };
            let &[rows, steps] = &found.shape[..] else {
                return Err(arrays.unusable(format!("{name} of {:?}", found.shape), "tokens and loops"));
            };
            let num_loops = checked_loops(path, steps as u32)?;
            if rows != tokens || found.values.iter().any(|value| value.is_nan()) {
                let found = format!("{name} of {rows} tokens, or without a value");
                return Err(arrays.unusable(found, format!("{tokens} tokens")));
            }
            let mut trace =
                ExitTrace { recorded: SignalSet::ALWAYS.with(signal), ..ExitTrace::new(meta(num_loops, path, name)) };
            let mut tokens = found.values.chunks_exact(steps);
            let of_token = if signal == ExitSignal::Gate { gates } else { differences };
            for request in &self.requests {
                let rows = tokens.by_ref().take(request.output_len as usize).flat_map(of_token);
                trace.push_generation(&rows.collect::<Vec<_>>());
            }
            return Ok(trace);
        }
        Err(arrays.unusable("none of exit_pdf, exit_values and exit_depths", "one of them"))
    }
}

/// Signals that no policy exits at, and a prediction that agrees with the last depth's only there.
fn unsure(depth: usize, loops: usize) -> (Signals, u32) {
    (Signals { entropy: 1.0, difference: 1.0, kl: 1.0, ..Signals::default() }, u32::from(depth + 1 == loops))
}

/// Rows of a token with these probabilities of exits. The gate is the probability of an exit at a depth if there was none
/// before; it is 1 at the last depth.
fn gates(pdf: &[f64]) -> Vec<(Signals, u32)> {
    let mut exited = 0.0_f64;
    let gate = |(depth, &share): (usize, &f64)| {
        let (signals, prediction) = unsure(depth, pdf.len());
        let left = 1.0 - exited;
        exited += share;
        let gate = if depth + 1 == pdf.len() || left <= 0.0 { 1.0 } else { (share / left).clamp(0.0, 1.0) };
        (Signals { gate: gate as f32, ..signals }, prediction)
    };
    pdf.iter().enumerate().map(gate).collect()
}

/// Rows of a token with these measures of convergence. A difference is not read at depth 0.
fn differences(values: &[f64]) -> Vec<(Signals, u32)> {
    let row = |(depth, &value): (usize, &f64)| {
        let (signals, prediction) = unsure(depth, values.len());
        let difference = if depth == 0 { 1.0 } else { value.max(0.0) as f32 };
        (Signals { difference, ..signals }, prediction)
    };
    values.iter().enumerate().map(row).collect()
}

/// The arrays of an `.npz` file that was written without compression, as `numpy.savez` does.
struct Arrays {
    path: std::path::PathBuf,
    archive: ZipArchive<File>,
}

/// Most bytes of an array.
const MOST_BYTES: u64 = 1 << 34;

/// Values in the order of rows.
struct Array {
    shape: Vec<usize>,
    values: Vec<f64>,
}

impl Arrays {
    fn open(path: &Path) -> Result<Self, ImportError> {
        traces::input::check_no_pointer(path)?;
        let file = File::open(path).map_err(|source| ImportError::Io { path: path.to_owned(), source })?;
        let archive = ZipArchive::new(file).map_err(|error| ImportError::malformed(path, error))?;
        Ok(Self { path: path.to_owned(), archive })
    }

    fn unusable(&self, found: impl Into<String>, expected: impl Into<String>) -> ImportError {
        ImportError::unusable(&self.path, found, expected)
    }

    /// An array of 16-bit floats, or of 32-bit or 64-bit integers.
    fn read(&mut self, name: &str) -> Result<Option<Array>, ImportError> {
        let file = format!("{name}.npy");
        if self.archive.index_for_name(&file).is_none() {
            return Ok(None);
        }
        let malformed = |error: String| ImportError::malformed(&self.path, format!("{file}: {error}"));
        let mut bytes = Vec::new();
        let entry = self.archive.by_name(&file).map_err(|error| malformed(error.to_string()))?;
        entry.take(MOST_BYTES).read_to_end(&mut bytes).map_err(|error| malformed(error.to_string()))?;
        match parse_npy(&bytes) {
            Some(array) => Ok(Some(array)),
            None => Err(self.unusable(
                format!("{file} in another form"),
                "an array of <f2, <i4 or <i8 in the order of rows, as numpy.savez writes it",
            )),
        }
    }
}

/// Reads the `.npy` format: a magic number, a version, the length of a header in Python's notation, the header, the values.
fn parse_npy(bytes: &[u8]) -> Option<Array> {
    let after = bytes.strip_prefix(b"\x93NUMPY")?;
    let (&[version, _], after) = after.split_first_chunk::<2>()?;
    let (length, after) = match version {
        1 => after.split_first_chunk().map(|(length, after)| (usize::from(u16::from_le_bytes(*length)), after))?,
        _ => after.split_first_chunk().map(|(length, after)| (u32::from_le_bytes(*length) as usize, after))?,
    };
    let (header, data) = after.split_at_checked(length)?;
    let header = std::str::from_utf8(header).ok()?;
    let value = |key: &str| Some(header.split_once(key)?.1.trim_start_matches([':', ' ']));
    if !value("'fortran_order'")?.starts_with("False") {
        return None;
    }
    let shape = value("'shape'")?.strip_prefix('(')?.split_once(')')?.0;
    let sizes = shape.split(',').map(str::trim).filter(|size| !size.is_empty());
    let shape: Vec<usize> = sizes.map(|size| size.parse().ok()).collect::<Option<_>>()?;
    let count = shape.iter().try_fold(1_usize, |count, &size| count.checked_mul(size))?;
    let kind = value("'descr'")?;
    let values: Vec<f64> = if kind.starts_with("'<f2'") {
        data.chunks_exact(2).map(|at| f16::from_le_bytes([at[0], at[1]]).to_f64()).collect()
    } else if kind.starts_with("'<i4'") {
        data.as_chunks().0.iter().map(|&at| f64::from(i32::from_le_bytes(at))).collect()
    } else if kind.starts_with("'<i8'") {
        data.as_chunks().0.iter().map(|&at| i64::from_le_bytes(at) as f64).collect()
    } else {
        return None;
    };
    (values.len() == count).then_some(Array { shape, values })
}

/// Loops of each generated token, by request: the form that vllm-rlt replays. Its first token of a request is that of the
/// prompt, which it runs at full depth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DepthsByRequest {
    /// By the number of the request.
    pub depths_by_request: BTreeMap<u32, Vec<u32>>,
}

impl DepthsByRequest {
    /// Depths of a trace under an exit policy, or `None` if they depend on more than the trace.
    pub fn new(exits: &ExitTrace, policy: ExitPolicy) -> Option<Self> {
        let of_request = |(request, depths): (u32, Vec<u8>)| {
            let after_first = depths.iter().skip(1).map(|&depth| u32::from(depth) + 1);
            let first = depths.first().map(|_| exits.meta.num_loops);
            (request, first.into_iter().chain(after_first).collect())
        };
        Some(Self { depths_by_request: (0..).zip(exit_depths(exits, policy)?).map(of_request).collect() })
    }

    /// What [`write_to`](Self::write_to) writes first.
    pub const BEGINNING: &'static [u8] = b"{\"depths_by_request\":";

    /// Writes JSON.
    ///
    /// # Errors
    /// Those of the writer.
    pub fn write_to(&self, out: &mut dyn Write) -> std::io::Result<()> {
        Ok(serde_json::to_writer(out, self)?)
    }
}

/// The depths at which the tokens of a trace exit under a policy, by generation; `None` if they depend on more than the
/// trace. A generation stands for the request of its number.
pub fn exit_depths(exits: &ExitTrace, policy: ExitPolicy) -> Option<Vec<Vec<u8>>> {
    let of_generation = |generation: usize| {
        let depth = |token| exit_depth(exits, policy, generation as u32, token).map(|depth| depth as u8);
        exits.generation(generation).map(depth).collect()
    };
    (0..exits.num_generations()).map(of_generation).collect()
}

fn exit_depth(exits: &ExitTrace, policy: ExitPolicy, request: u32, token: usize) -> Option<usize> {
    let last = exits.num_loops() - 1;
    let first = |signal: ExitSignal, threshold: f32, from: usize| {
        let is_sure = |&depth: &usize| signal.is_confident(exits.signals_at(token, depth).get(signal), threshold);
        (from.max(signal.first_depth())..last).find(is_sure)
    };
    match policy {
        ExitPolicy::None | ExitPolicy::Static(_) | ExitPolicy::Mix(_) => {
            policy.known_depth(request, last as u8 + 1).map(|depth| usize::from(depth).min(last))
        }
        ExitPolicy::Oracle { .. } => Some(exits.oracle_depth(token)),
        ExitPolicy::Confidence { signal, threshold } => Some(first(signal, threshold, 0).unwrap_or(last)),
        ExitPolicy::Delayed { signal, threshold } => {
            Some(first(signal, threshold, 0).map_or(last, |depth| (depth + 1).min(last)))
        }
        ExitPolicy::Cumulative { share, min_loops } => {
            let mut stays = 1.0_f32;
            let exits_at = |&depth: &usize| {
                stays *= 1.0 - exits.signals_at(token, depth).gate;
                depth + 1 >= usize::from(min_loops) && 1.0 - stays >= share
            };
            Some((0..last).find(exits_at).unwrap_or(last))
        }
        ExitPolicy::EntropyChange { threshold } => {
            let entropy = |depth| exits.signals_at(token, depth).entropy;
            let settles = |&depth: &usize| (entropy(depth) - entropy(depth - 1)).abs() <= threshold;
            Some((1..last).find(settles).unwrap_or(last))
        }
        ExitPolicy::Stable { depths } => {
            let mut same = 0;
            let is_stable = |&depth: &usize| {
                same = if exits.repeats(token, depth) { same + 1 } else { 1 };
                same >= depths
            };
            Some((0..last).find(is_stable).unwrap_or(last))
        }
        // Drafts depend on each other.
        ExitPolicy::LoadAdaptive(_) | ExitPolicy::Speculate(_) | ExitPolicy::Custom(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Seek;

    use zip::ZipWriter;
    use zip::write::SimpleFileOptions;

    use super::*;

    fn read(folder: &Path, json: &str, num_loops: Option<u32>) -> Result<ImportedExits, ImportError> {
        let path = folder.join("w.json");
        std::fs::write(&path, json).unwrap();
        ImportedExits::read(&path, num_loops)
    }

    fn depths(json: &str, num_loops: Option<u32>) -> Result<ImportedExits, ImportError> {
        read(tempfile::tempdir().unwrap().path(), json, num_loops)
    }

    fn by_request(exits: &ExitTrace, policy: &str) -> Vec<Vec<u32>> {
        let depths = DepthsByRequest::new(exits, policy.parse().unwrap()).unwrap();
        depths.depths_by_request.into_values().collect()
    }

    #[test]
    fn depths_of_vllm_rlt_are_read_by_number_and_written_again() {
        let json = r#"{"trace": {"depths_by_request": {"10": [4, 2, 4], "9": [4, 1]}, "seed": 3}}"#;
        let imported = depths(json, None).unwrap();
        assert!(imported.requests.is_none());
        assert_eq!((imported.exits.meta.num_loops, imported.exits.num_generations()), (4, 2));
        for policy in ["gate:0.5", "oracle", "entropy:0.5", "cumulative:gate:0.5:1"] {
            assert_eq!(by_request(&imported.exits, policy), [vec![4, 1], vec![4, 2, 4]], "{policy}");
        }
        assert_eq!(by_request(&imported.exits, "static:1"), [vec![4, 2], vec![4, 2, 2]]);
        assert_eq!(by_request(&imported.exits, "delayed:gate:0.5"), [vec![4, 2], vec![4, 3, 4]]);
        let written = DepthsByRequest::new(&imported.exits, "gate:0.5".parse().unwrap()).unwrap();
        let mut json = Vec::new();
        written.write_to(&mut json).unwrap();
        assert!(json.starts_with(DepthsByRequest::BEGINNING));
        let again = depths(std::str::from_utf8(&json).unwrap(), None).unwrap();
        assert_eq!(again.exits, imported.exits);
        let adaptive = "load-adaptive:gate:0.9..0.5:8..32:2".parse().unwrap();
        assert_eq!(DepthsByRequest::new(&imported.exits, adaptive), None);
    }

    #[test]
    fn depths_out_of_range_are_refused() {
        let error = |json: &str, loops| depths(json, loops).unwrap_err().to_string();
        assert!(error(r#"{"depths_by_request": {"a": [4, 0]}}"#, None).contains("a token of 0 loops, expected 1 to 4"));
        assert!(error(r#"{"depths_by_request": {"a": [4]}}"#, Some(3)).contains("a token of 4 loops, expected 1 to 3"));
        assert!(error(r#"{"depths_by_request": {"a": [65]}}"#, None).contains("found 65 loops"));
        assert!(error(r#"{"depths_by_request": {"a": []}}"#, Some(4)).contains("no token of request 0"));
        assert!(error(r#"{"depths_by_request": {}}"#, None).contains("without a request"));
        assert!(error(r#"{"depths_by_request": {"a": [-1]}}"#, None).contains("depths_by_request: invalid value"));
        assert!(error("{}", None).contains("expected exits of vllm-rlt or of CDB"));
    }

    fn npy(kind: &str, shape: &str, values: &[u8]) -> Vec<u8> {
        let header = format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), values].concat()
    }

    fn halves(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|&value| f16::from_f32(value).to_le_bytes()).collect()
    }

    /// A bundle of two requests of two tokens and one, with one array of exits.
    fn bundle(name: &str, array: Vec<u8>) -> Result<ImportedExits, ImportError> {
        let folder = tempfile::tempdir().unwrap();
        let offsets: Vec<u8> = [0_i64, 2, 3].iter().flat_map(|offset| offset.to_le_bytes()).collect();
        let mut archive = ZipWriter::new(File::create(folder.path().join("w.exit_pdf.npz")).unwrap());
        fn add<W: Write + Seek>(archive: &mut ZipWriter<W>, name: &str, bytes: &[u8]) {
            let stored = SimpleFileOptions::default().compression_method(zip::CompressionMethod::Stored);
            archive.start_file(format!("{name}.npy"), stored).unwrap();
            archive.write_all(bytes).unwrap();
        }
        add(&mut archive, "offsets", &npy("<i8", "(3,)", &offsets));
        add(&mut archive, name, &array);
        archive.finish().unwrap();
        let json = r#"{"meta": {"total_steps": 4}, "exit_pdf_file": "w.exit_pdf.npz", "requests": [
            {"id": "a", "input_len": 7, "output_len": 2}, {"id": "b", "input_len": 9, "output_len": 1}]}"#;
        read(folder.path(), json, None)
    }

    #[test]
    fn probabilities_of_cdb_exit_at_every_threshold_where_their_sum_reaches_it() {
        let pdf = [[0.5, 0.25, 0.125, 0.125], [0.0, 0.5, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]];
        let imported = bundle("exit_pdf", npy("<f2", "(3, 4)", &halves(pdf.as_flattened()))).unwrap();
        let requests = imported.requests.unwrap().requests;
        let lengths: Vec<_> = requests.iter().map(|request| (request.prompt_tokens, request.output_tokens)).collect();
        assert_eq!(lengths, [(7, 2), (9, 1)]);
        let depths = |share: &str| -> Vec<usize> {
            let policy = format!("cumulative:gate:{share}:1").parse().unwrap();
            (0..3).map(|token| exit_depth(&imported.exits, policy, 0, token).unwrap()).collect()
        };
        assert_eq!(depths("0.2"), [0, 1, 0]);
        assert_eq!(depths("0.5"), [0, 1, 1]);
        assert_eq!(depths("0.7"), [1, 2, 2]);
        assert_eq!(depths("0.9"), [3, 3, 3]);
        let minimum = "cumulative:gate:0.2:2".parse().unwrap();
        assert_eq!(exit_depth(&imported.exits, minimum, 0, 0), Some(1));
        assert_eq!(exit_depth(&imported.exits, "gate:0.2".parse().unwrap(), 0, 1), Some(1));
        assert_eq!(imported.exits.oracle_depth(0), 3, "what the model would have said is not known");
    }

    #[test]
    fn values_of_cdb_exit_where_they_fall_below_the_threshold() {
        let values = [[9.0, 0.75, 0.5, 0.125], [9.0, 0.25, 0.125, 0.125], [9.0, 3.0, 3.0, 3.0]];
        let imported = bundle("exit_values", npy("<f2", "(3, 4)", &halves(values.as_flattened()))).unwrap();
        assert_eq!(imported.exits.recorded, SignalSet::ALWAYS.with(ExitSignal::Difference));
        // The threshold 0.6 of CDB.
        let policy = "difference:0.6".parse().unwrap();
        let depths: Vec<_> = (0..3).map(|token| exit_depth(&imported.exits, policy, 0, token).unwrap()).collect();
        assert_eq!(depths, [2, 1, 3]);
    }

    #[test]
    fn depths_of_cdb_are_those_of_its_tokens() {
        let loops: Vec<u8> = [3_i32, 1, 4].iter().flat_map(|loops| loops.to_le_bytes()).collect();
        let imported = bundle("exit_depths", npy("<i4", "(3,)", &loops)).unwrap();
        assert_eq!((0..3).map(|token| imported.exits.oracle_depth(token)).collect::<Vec<_>>(), [2, 0, 3]);
        assert_eq!(imported.exits.meta.num_loops, 4);
    }

    #[test]
    fn arrays_that_do_not_fit_are_refused() {
        let error = |name: &str, array| bundle(name, array).unwrap_err().to_string();
        let pdf = halves(&[0.5; 8]);
        assert!(error("exit_pdf", npy("<f2", "(2, 4)", &pdf)).contains("exit_pdf of 2 tokens"));
        assert!(error("exit_pdf", npy("<f2", "(8,)", &pdf)).contains("exit_pdf of [8]"));
        assert!(error("exit_pdf", npy("<f4", "(2, 2)", &pdf)).contains("exit_pdf.npy in another form"));
        assert!(error("exit_pdf", npy("<f2", "(3, 4)", &pdf)).contains("exit_pdf.npy in another form"));
        assert!(error("exit_pdf", vec![0; 9]).contains("exit_pdf.npy in another form"));
        assert!(error("other", npy("<f2", "(2, 4)", &pdf)).contains("none of exit_pdf, exit_values and exit_depths"));
        let nan = halves(&[f32::NAN; 12]);
        assert!(error("exit_values", npy("<f2", "(3, 4)", &nan)).contains("or without a value"));
        let outside = r#"{"exit_pdf_file": "../w.npz", "requests": []}"#;
        assert!(depths(outside, None).unwrap_err().to_string().contains("the name of a file beside it"));
    }
}
