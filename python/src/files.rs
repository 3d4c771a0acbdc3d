//! Request traces, exit traces, latency profiles and pass logs.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use arrow_array::builder::{ListBuilder, UInt32Builder};
use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type, UInt32Type};
use arrow_array::{Array, ArrayRef, Float32Array, Float64Array, Int64Array, StringArray, UInt32Array};
use arrow_schema::DataType;
use experiments::Quiet;
use experiments::workload::load_requests;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use traces::pass_log::ColumnValues;
use traces::{ExitTable, LatencyProfile, PassLog, PassLogMeta, RequestSpec, RequestTrace};

use crate::convert::{from_keys, from_python, to_python};
use crate::errors::raise;
use crate::table::{Table, columns_of, csv_of, of_columns, of_csv};

/// Arrival and lengths of each request, with sessions and prefix hashes where the file has them.
#[pyclass(module = "depthwise", name = "RequestTrace", frozen)]
pub struct Requests(pub RequestTrace);

#[pymethods]
impl Requests {
    /// Reads a request trace of any known format (see docs/reference/files.md). Keyword arguments are the keys of
    /// `requests` in a configuration: `format`, `time_unit`, `first`, `window_s`, `rate_factor`, `rate_per_s`,
    /// `max_prompt_tokens`, ...
    #[staticmethod]
    #[pyo3(signature = (path, **keys))]
    fn read(path: PathBuf, keys: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let read = || {
            let spec: RequestSpec = keys.map_or_else(|| Ok(RequestSpec::default()), |keys| from_python(keys))?;
            let spec = RequestSpec { file: Some(path), ..spec };
            Ok(Self(load_requests(&spec, Path::new(""), &mut Quiet)?))
        };
        read().map_err(raise)
    }

    /// Makes requests at random. Keyword arguments are the keys of `requests.generate` in a configuration: `count`, `seed`,
    /// `arrivals` (such as `{"poisson": {"rate_per_s": 20}}` or `"all_at_once"`), `prompt_tokens` and `output_tokens` (such
    /// as `{"fixed": 48}` or `{"uniform": {"min": 8, "max": 64}}`).
    #[staticmethod]
    #[pyo3(signature = (**keys))]
    fn generate(py: Python<'_>, keys: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let generate = || {
            let keys = keys.map_or_else(|| PyDict::new(py), Clone::clone);
            let spec = RequestSpec { generate: Some(from_python(&keys)?), ..RequestSpec::default() };
            Ok(Self(load_requests(&spec, Path::new(""), &mut Quiet)?))
        };
        generate().map_err(raise)
    }

    /// A trace of the columns `request`, `arrival_us`, `prompt_tokens` and `output_tokens`, and optionally `session`,
    /// `think_time_us`, `hash_block_tokens` and `hash_ids`, as in our own CSV (see docs/reference/files.md). `table` is
    /// anything with the Arrow C stream interface. Errors name its line and column as those of a file `requests.csv`.
    #[staticmethod]
    fn from_table(table: &Bound<'_, PyAny>) -> PyResult<Self> {
        let read = || {
            let folder = folder_with("requests.csv", table)?;
            RequestTrace::read(folder.path().join("requests.csv"))
                .map(Self)
                .map_err(|error| relative(error.into(), &folder))
        };
        read().map_err(raise)
    }

    /// The columns of our own CSV, a row for each request.
    fn table(&self) -> PyResult<Table> {
        let table = || {
            let mut text = Vec::new();
            self.0.write_to(&mut text)?;
            of_csv(&text)
        };
        table().map_err(raise)
    }

    /// Writes our own CSV, whole or not at all.
    fn write(&self, path: PathBuf) -> PyResult<()> {
        self.0.write(path).map_err(|error| raise(error.into()))
    }

    /// Name of the trace.
    #[getter]
    fn name(&self) -> &str {
        &self.0.name
    }

    /// Omissions and assumptions of the reader.
    #[getter]
    fn warnings(&self) -> Vec<String> {
        self.0.warnings.clone()
    }

    /// Requests per second between the first and the last arrival; `None` if all arrive at once.
    #[getter]
    fn rate_per_s(&self) -> Option<f64> {
        self.0.rate_per_s()
    }

    fn __len__(&self) -> usize {
        self.0.requests.len()
    }

    fn __repr__(&self) -> String {
        format!("<depthwise.RequestTrace {:?} of {} requests>", self.0.name, self.0.requests.len())
    }
}

/// Exit signals and predictions of each generated token at each depth.
#[pyclass(module = "depthwise", name = "ExitTrace", frozen)]
pub struct Exits(pub traces::ExitTrace);

#[pymethods]
impl Exits {
    /// Reads the folder of an exit trace.
    #[staticmethod]
    fn read(folder: PathBuf) -> PyResult<Self> {
        traces::ExitTrace::read(folder).map(Self).map_err(|error| raise(error.into()))
    }

    /// A trace of the columns `generation`, `token`, `depth`, `prediction`, `top1`, `margin`, `entropy`, `similarity`, and
    /// optionally `difference`, `kl` and `gate`, in this order of rows. `table` is anything with the Arrow C stream
    /// interface. Keyword arguments are keys of `exits.yaml`: `num_loops` is needed. Errors name its line and column as
    /// those of a file `exits.csv`.
    #[staticmethod]
    #[pyo3(signature = (table, **meta))]
    fn from_table(table: &Bound<'_, PyAny>, meta: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let read = || {
            let defaults = defaults(table.py(), traces::ExitTrace::SCHEMA_VERSION)?;
            let meta: traces::ExitTraceMeta = from_keys(meta, &defaults)?;
            let folder = folder_with("exits.csv", table)?;
            traces::table::write_yaml(&folder.path().join("exits.yaml"), &meta)?;
            traces::ExitTrace::read(folder.path()).map(Self).map_err(|error| relative(error.into(), &folder))
        };
        read().map_err(raise)
    }

    /// The columns of `exits.csv`, a row for each token and depth.
    fn table(&self) -> PyResult<Table> {
        exit_columns(&self.0).map_err(raise)
    }

    /// Writes `exits.yaml` and `exits.parquet`, or `exits.csv`, into a folder.
    #[pyo3(signature = (folder, csv = false))]
    fn write(&self, folder: PathBuf, csv: bool) -> PyResult<()> {
        let table = if csv { ExitTable::Csv } else { ExitTable::Parquet };
        self.0.write(folder, table).map_err(|error| raise(error.into()))
    }

    /// The keys of `exits.yaml`.
    #[getter]
    fn meta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.meta)
    }

    /// Loops of the model.
    #[getter]
    fn num_loops(&self) -> usize {
        self.0.num_loops()
    }

    /// Generated tokens.
    #[getter]
    fn num_tokens(&self) -> usize {
        self.0.num_tokens()
    }

    /// Generations, each the output of one prompt.
    #[getter]
    fn num_generations(&self) -> usize {
        self.0.num_generations()
    }

    fn __repr__(&self) -> String {
        let (tokens, loops) = (self.0.num_tokens(), self.0.num_loops());
        format!("<depthwise.ExitTrace of {tokens} tokens at {loops} depths>")
    }
}

fn exit_columns(trace: &traces::ExitTrace) -> Result<Table> {
    let num_loops = trace.num_loops();
    let tokens_of = |generation: usize| trace.generation(generation).len();
    let by_row = |of_token: &dyn Fn(usize, usize, usize) -> u32| -> ArrayRef {
        let generations = 0..trace.num_generations();
        let tokens =
            generations.flat_map(|generation| (0..tokens_of(generation)).map(move |token| (generation, token)));
        let rows = tokens.flat_map(|(generation, token)| (0..num_loops).map(move |depth| (generation, token, depth)));
        Arc::new(UInt32Array::from_iter_values(
            rows.map(|(generation, token, depth)| of_token(generation, token, depth)),
        ))
    };
    let mut columns: Vec<(&str, ArrayRef)> = vec![
        ("generation", by_row(&|generation, _, _| generation as u32)),
        ("token", by_row(&|_, token, _| token as u32)),
        ("depth", by_row(&|_, _, depth| depth as u32)),
        ("prediction", Arc::new(UInt32Array::from(trace.predictions.clone()))),
    ];
    if let Some(served) = &trace.served {
        let of = |generation: usize, token: usize| served.tokens[trace.generation(generation).start + token];
        columns.push(("exit_depth", by_row(&|generation, token, _| of(generation, token).exit_depth)));
        columns.push(("full_depth", by_row(&|generation, token, _| of(generation, token).full_depth)));
        columns.push(("policy", by_row(&|generation, _, _| served.policies[generation])));
    }
    for signal in trace.recorded.iter() {
        let values = trace.signals.iter().map(|signals| signals.get(signal));
        columns.push((signal.name(), Arc::new(Float32Array::from_iter_values(values))));
    }
    of_columns(columns)
}

/// Measured times of the components of a pass, on one device and for one model.
#[pyclass(module = "depthwise", name = "LatencyProfile", frozen)]
pub struct Profile(pub LatencyProfile);

#[pymethods]
impl Profile {
    /// Reads the folder of a latency profile, or one that ships, by its name.
    #[staticmethod]
    fn read(folder: PathBuf) -> PyResult<Self> {
        experiments::read_profile(Path::new(""), &folder).map(Self).map_err(raise)
    }

    /// A profile of the columns `component`, `rows`, `kv_tokens`, `depths`, `time_us`, `spread_us` and `repeats`. `table` is
    /// anything with the Arrow C stream interface. Keyword arguments are keys of `profile.yaml`: `num_loops` is needed.
    /// Errors name its line and column as those of a file `latency.csv`.
    #[staticmethod]
    #[pyo3(signature = (table, **meta))]
    fn from_table(table: &Bound<'_, PyAny>, meta: Option<&Bound<'_, PyDict>>) -> PyResult<Self> {
        let read = || {
            let defaults = defaults(table.py(), LatencyProfile::SCHEMA_VERSION)?;
            for (key, value) in [("device", "Python"), ("software", "Python")] {
                defaults.set_item(key, value)?;
            }
            for (key, value) in [("overhead_us", 0), ("weight_bytes", 0), ("kv_bytes_per_token", 0)] {
                defaults.set_item(key, value)?;
            }
            let meta: traces::ProfileMeta = from_keys(meta, &defaults)?;
            let folder = folder_with("latency.csv", table)?;
            traces::table::write_yaml(&folder.path().join("profile.yaml"), &meta)?;
            LatencyProfile::read(folder.path()).map(Self).map_err(|error| relative(error.into(), &folder))
        };
        read().map_err(raise)
    }

    /// The columns of `latency.csv`, a row for each measured point.
    fn table(&self) -> PyResult<Table> {
        let table = || {
            let mut out = csv::Writer::from_writer(Vec::new());
            self.0.points.iter().try_for_each(|point| out.serialize(point))?;
            of_csv(&out.into_inner()?)
        };
        table().map_err(raise)
    }

    /// Writes `profile.yaml` and `latency.csv` into a folder.
    fn write(&self, folder: PathBuf) -> PyResult<()> {
        self.0.write(folder).map_err(|error| raise(error.into()))
    }

    /// The keys of `profile.yaml`.
    #[getter]
    fn meta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.meta)
    }

    fn __repr__(&self) -> String {
        let meta = &self.0.meta;
        format!("<depthwise.LatencyProfile of {:?} on {:?}: {} points>", meta.model, meta.device, self.0.points.len())
    }
}

/// Measured passes, with their work and their time.
#[pyclass(module = "depthwise", name = "PassLog", frozen)]
pub struct Passes(pub PassLog);

#[pymethods]
impl Passes {
    /// Reads a pass log, such as `passes.parquet`.
    #[staticmethod]
    fn read(path: PathBuf) -> PyResult<Self> {
        PassLog::read(path).map(Self).map_err(|error| raise(error.into()))
    }

    /// A log of the columns that `table()` gives. `table` is anything with the Arrow C stream interface.
    #[staticmethod]
    #[pyo3(signature = (table, *, model, num_loops, device, fingerprint = "any"))]
    fn from_table(
        table: &Bound<'_, PyAny>,
        model: &str,
        num_loops: u32,
        device: &str,
        fingerprint: &str,
    ) -> PyResult<Self> {
        let read = || {
            let values = |(name, column): (String, ArrayRef)| {
                Ok((name.clone(), values_of(&column).with_context(|| format!("column `{name}`"))?))
            };
            let columns: HashMap<String, ColumnValues> =
                columns_of(table)?.into_iter().map(values).collect::<Result<_>>()?;
            let meta = PassLogMeta::new(model, fingerprint, num_loops, device);
            Ok(Self(PassLog::from_columns(meta, columns).map_err(anyhow::Error::msg)?))
        };
        read().map_err(raise)
    }

    /// The columns of `passes.parquet`, a row for each pass.
    fn table(&self) -> PyResult<Table> {
        of_columns(self.0.columns().map(|(name, values)| (name, array_of(values)))).map_err(raise)
    }

    /// Writes the log, whole or not at all.
    fn write(&self, path: PathBuf) -> PyResult<()> {
        self.0.write(path).map_err(|error| raise(error.into()))
    }

    /// Model, number of loops and device.
    #[getter]
    fn meta<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        to_python(py, &self.0.meta)
    }

    fn __len__(&self) -> usize {
        self.0.runs.iter().map(|run| run.passes.len()).sum()
    }

    fn __repr__(&self) -> String {
        format!("<depthwise.PassLog of {} passes in {} runs>", self.__len__(), self.0.runs.len())
    }
}

fn array_of(values: ColumnValues) -> ArrayRef {
    match values {
        ColumnValues::Text(texts) => Arc::new(StringArray::from(texts)),
        ColumnValues::Number(numbers) => {
            Arc::new(Int64Array::from_iter_values(numbers.into_iter().map(|number| number as i64)))
        }
        ColumnValues::Real(reals) => Arc::new(Float64Array::from(reals)),
        ColumnValues::List(lists) => {
            let mut builder = ListBuilder::new(UInt32Builder::new());
            lists.into_iter().for_each(|list| builder.append_value(list.into_iter().map(Some)));
            Arc::new(builder.finish())
        }
    }
}

fn values_of(column: &ArrayRef) -> Result<ColumnValues> {
    let is_real = matches!(column.data_type(), DataType::Float64 | DataType::Null);
    ensure!(is_real || column.null_count() == 0, "found null, expected a value in every row");
    let list = |items: ArrayRef| match items.data_type() {
        DataType::UInt32 => Ok(items.as_primitive::<UInt32Type>().values().to_vec()),
        DataType::Int64 => {
            let items = items.as_primitive::<Int64Type>().values();
            items.iter().map(|&item| u32::try_from(item).with_context(|| format!("found {item}"))).collect()
        }
        other => bail!("found a list of {other}, expected one of whole numbers"),
    };
    Ok(match column.data_type() {
        DataType::Utf8 => ColumnValues::Text(column.as_string::<i32>().iter().flatten().map(str::to_owned).collect()),
        DataType::LargeUtf8 => {
            ColumnValues::Text(column.as_string::<i64>().iter().flatten().map(str::to_owned).collect())
        }
        DataType::Utf8View => ColumnValues::Text(column.as_string_view().iter().flatten().map(str::to_owned).collect()),
        DataType::Int64 => {
            let number =
                |&number: &i64| u64::try_from(number).with_context(|| format!("found {number}, expected 0 or more"));
            ColumnValues::Number(column.as_primitive::<Int64Type>().values().iter().map(number).collect::<Result<_>>()?)
        }
        DataType::Float64 => ColumnValues::Real(column.as_primitive::<Float64Type>().iter().collect()),
        DataType::Null => ColumnValues::Real(vec![None; column.len()]),
        DataType::List(_) => {
            ColumnValues::List(column.as_list::<i32>().iter().flatten().map(list).collect::<Result<_>>()?)
        }
        DataType::LargeList(_) => {
            ColumnValues::List(column.as_list::<i64>().iter().flatten().map(list).collect::<Result<_>>()?)
        }
        other => bail!("found {other}, expected text, 64-bit numbers or lists of whole numbers"),
    })
}

/// A temporary folder with a table as a file, so that it is read and checked as any other.
fn folder_with(name: &str, table: &Bound<'_, PyAny>) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    std::fs::write(folder.path().join(name), csv_of(table)?)?;
    Ok(folder)
}

/// The error about a file of a temporary folder, by the name of the file.
fn relative(error: anyhow::Error, folder: &tempfile::TempDir) -> anyhow::Error {
    let prefix = format!("{}/", folder.path().display());
    anyhow::Error::msg(format!("{error:#}").replace(&prefix, ""))
}

/// What a description says that Python does not.
fn defaults(py: Python<'_>, schema_version: u32) -> PyResult<Bound<'_, PyDict>> {
    let defaults = PyDict::new(py);
    defaults.set_item("schema_version", schema_version)?;
    for (key, value) in [("model", "Python"), ("fingerprint", LatencyProfile::ANY_MODEL), ("source", "Python")] {
        defaults.set_item(key, value)?;
    }
    Ok(defaults)
}
