//! Tables that Python's data libraries read and give without copies, by the Arrow C stream interface.

use std::ffi::CString;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use arrow_array::cast::AsArray;
use arrow_array::ffi::FFI_ArrowSchema;
use arrow_array::ffi_stream::{FFI_ArrowArrayStream, RecordBatchStreamReader};
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
};
use arrow_array::{
    Array, ArrayRef, ArrowPrimitiveType, BooleanArray, Float64Array, Int64Array, RecordBatch, RecordBatchIterator,
    RecordBatchReader, StringArray,
};
use arrow_schema::DataType;
use pyo3::prelude::*;
use pyo3::types::{PyCapsule, PyCapsuleMethods};

use crate::errors::{Raised, raise};

const STREAM: &str = "arrow_array_stream";

/// A table of columns, which pyarrow, polars and pandas read without copies (`pyarrow.table(table)`, `polars.DataFrame(table)`,
/// `pandas.DataFrame.from_arrow(table)`).
#[pyclass(module = "depthwise", frozen)]
pub struct Table(pub RecordBatch);

#[pymethods]
impl Table {
    /// Names of the columns, in order.
    #[getter]
    fn column_names(&self) -> Vec<String> {
        self.0.schema().fields().iter().map(|field| field.name().clone()).collect()
    }

    /// Number of rows.
    #[getter]
    fn num_rows(&self) -> usize {
        self.0.num_rows()
    }

    fn __len__(&self) -> usize {
        self.0.num_rows()
    }

    fn __repr__(&self) -> String {
        format!("<depthwise.Table of {} rows: {}>", self.0.num_rows(), self.column_names().join(", "))
    }

    /// The table as a `pyarrow.Table`.
    fn to_pyarrow<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("pyarrow")?.call_method1("table", (slf,))
    }

    /// The table as a `polars.DataFrame`.
    fn to_polars<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        slf.py().import("polars")?.call_method1("DataFrame", (slf,))
    }

    /// The table as a `pandas.DataFrame`.
    fn to_pandas<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyAny>> {
        Self::to_pyarrow(slf)?.call_method0("to_pandas")
    }

    /// Schema of the table, for the Arrow PyCapsule interface.
    fn __arrow_c_schema__<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyCapsule>> {
        let schema = FFI_ArrowSchema::try_from(self.0.schema().as_ref()).map_err(|error| raise(error.into()))?;
        PyCapsule::new_with_value(py, schema, c"arrow_schema")
    }

    /// The table as a stream of one batch, for the Arrow PyCapsule interface.
    #[pyo3(signature = (requested_schema = None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // The interface lets a producer give its own schema where it does not convert.
        drop(requested_schema);
        let reader = RecordBatchIterator::new([Ok(self.0.clone())], self.0.schema());
        PyCapsule::new_with_value(py, FFI_ArrowArrayStream::new(Box::new(reader)), c"arrow_array_stream")
    }
}

/// A table of named columns of one length.
///
/// # Errors
/// If their lengths differ.
pub fn of_columns<'n>(columns: impl IntoIterator<Item = (&'n str, ArrayRef)>) -> Result<Table> {
    Ok(Table(RecordBatch::try_from_iter(columns)?))
}

/// A table of CSV with a header: columns of whole numbers, numbers or truth values where all cells are, else of text. Empty
/// cells are null.
///
/// # Errors
/// If lines have different lengths.
pub fn of_csv(text: &[u8]) -> Result<Table> {
    let mut reader = csv::Reader::from_reader(text);
    let header = reader.headers()?.clone();
    let lines: Vec<csv::StringRecord> = reader.records().collect::<Result<_, _>>()?;
    of_lines(&header, &lines)
}

/// As [`of_csv`], of cells.
///
/// # Errors
/// As there.
pub fn of_lines(header: &csv::StringRecord, lines: &[csv::StringRecord]) -> Result<Table> {
    let column = |(index, name)| {
        let cells: Vec<Option<&str>> =
            lines.iter().map(|line| line.get(index).filter(|cell| !cell.is_empty())).collect();
        (name, column_of_cells(&cells))
    };
    of_columns(header.iter().enumerate().map(column))
}

fn column_of_cells(cells: &[Option<&str>]) -> ArrayRef {
    fn parsed<T: std::str::FromStr>(cells: &[Option<&str>]) -> Option<Vec<Option<T>>> {
        cells.iter().map(|cell| cell.map(str::parse).transpose().ok()).collect()
    }
    let is_empty = cells.iter().all(Option::is_none);
    if let Some(integers) = parsed::<i64>(cells).filter(|_| !is_empty) {
        Arc::new(Int64Array::from(integers))
    } else if let Some(numbers) = parsed::<f64>(cells) {
        Arc::new(Float64Array::from(numbers))
    } else if let Some(truths) = parsed::<bool>(cells) {
        Arc::new(BooleanArray::from(truths))
    } else {
        Arc::new(StringArray::from(cells.to_vec()))
    }
}

/// Anything with the Arrow C stream interface, such as a table of pyarrow, polars or pandas, as CSV with a header.
///
/// # Errors
/// If it has no such interface, or a column is neither of numbers nor of text nor of lists of whole numbers.
pub fn csv_of(data: &Bound<'_, PyAny>) -> Result<Vec<u8>> {
    let reader = stream_of(data)?;
    let schema = reader.schema();
    let mut out = csv::Writer::from_writer(Vec::new());
    out.write_record(schema.fields().iter().map(|field| field.name()))?;
    for batch in reader {
        let batch = batch?;
        let columns = batch.columns().iter().zip(schema.fields());
        let columns: Vec<Vec<String>> = columns
            .map(|(column, field)| cells_of(column).with_context(|| format!("column `{}`", field.name())))
            .collect::<Result<_>>()?;
        for row in 0..batch.num_rows() {
            out.write_record(columns.iter().map(|column| &column[row]))?;
        }
    }
    Ok(out.into_inner()?)
}

fn stream_of(data: &Bound<'_, PyAny>) -> Result<RecordBatchStreamReader> {
    let kind = || data.get_type().name().map_or_else(|_| "an object".to_owned(), |name| name.to_string());
    let Ok(method) = data.getattr("__arrow_c_stream__") else {
        bail!("found {}, expected a table with the Arrow C stream interface (pyarrow, polars, pandas)", kind());
    };
    let capsule = method.call0().map_err(Raised)?;
    let capsule = capsule.cast::<PyCapsule>().map_err(|error| Raised(error.into()))?;
    let name = CString::new(STREAM)?;
    let stream = capsule.pointer_checked(Some(&name)).map_err(Raised)?;
    // SAFETY: a capsule of this name holds a stream, which is moved out and marked as released, as the interface says.
    Ok(unsafe { RecordBatchStreamReader::from_raw(stream.cast().as_ptr()) }?)
}

/// The cells of a column as text, empty where they are null.
fn cells_of(column: &ArrayRef) -> Result<Vec<String>> {
    fn numbers<T: ArrowPrimitiveType<Native: ToString>>(column: &ArrayRef) -> Vec<String> {
        let values = column.as_primitive::<T>().iter();
        values.map(|value| value.map_or_else(String::new, |value| value.to_string())).collect()
    }
    fn texts<'a>(values: impl Iterator<Item = Option<&'a str>>) -> Vec<String> {
        values.map(|value| value.unwrap_or_default().to_owned()).collect()
    }
    fn lists(values: impl Iterator<Item = Option<ArrayRef>>) -> Result<Vec<String>> {
        values.map(|list| Ok(list.map(|list| cells_of(&list)).transpose()?.unwrap_or_default().join(" "))).collect()
    }
    Ok(match column.data_type() {
        DataType::Int8 => numbers::<Int8Type>(column),
        DataType::Int16 => numbers::<Int16Type>(column),
        DataType::Int32 => numbers::<Int32Type>(column),
        DataType::Int64 => numbers::<Int64Type>(column),
        DataType::UInt8 => numbers::<UInt8Type>(column),
        DataType::UInt16 => numbers::<UInt16Type>(column),
        DataType::UInt32 => numbers::<UInt32Type>(column),
        DataType::UInt64 => numbers::<UInt64Type>(column),
        DataType::Float32 => numbers::<Float32Type>(column),
        DataType::Float64 => numbers::<Float64Type>(column),
        DataType::Utf8 => texts(column.as_string::<i32>().iter()),
        DataType::LargeUtf8 => texts(column.as_string::<i64>().iter()),
        DataType::Utf8View => texts(column.as_string_view().iter()),
        DataType::List(_) => lists(column.as_list::<i32>().iter())?,
        DataType::LargeList(_) => lists(column.as_list::<i64>().iter())?,
        DataType::Null => vec![String::new(); column.len()],
        other => bail!("found {other}, expected numbers or text"),
    })
}

/// The columns of anything with the Arrow C stream interface, in batches of one.
///
/// # Errors
/// If it has no such interface, or comes in several batches.
pub fn columns_of(data: &Bound<'_, PyAny>) -> Result<Vec<(String, ArrayRef)>> {
    let reader = stream_of(data)?;
    let names: Vec<String> = reader.schema().fields().iter().map(|field| field.name().clone()).collect();
    let batches: Vec<RecordBatch> = reader.collect::<Result<_, _>>()?;
    let [batch] = &batches[..] else {
        bail!("found {} batches, expected one (`combine_chunks` of pyarrow, `rechunk` of polars)", batches.len());
    };
    Ok(names.into_iter().zip(batch.columns().iter().cloned()).collect())
}
