//! Exit traces as Parquet, written and read in groups of rows.
//!
//! Pages are not compressed: exit signals hardly shrink, and without compression a damaged file cannot demand more
//! memory than it has bytes.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parquet::basic::{Compression, Encoding, Type};
use parquet::column::reader::{ColumnReaderImpl, get_typed_column_reader};
use parquet::data_type::{DataType, FloatType, Int32Type};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::file::reader::{FileReader, RowGroupReader, SerializedFileReader};
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use parquet::schema::types::ColumnPath;

use crate::error::{Result, TraceError};
use crate::exit_file::{Columns, ExitRow, Fault};
use crate::exit_trace::{ExitSignal, ExitTraceMeta, SignalSet};
use crate::input::check_no_pointer;
use crate::panics::catch_panic;
use crate::table::PartialFile;

/// Rows of a group: the number that is buffered before writing.
const GROUP: usize = 1 << 16;
/// Rows that are read together.
const CHUNK: usize = 1 << 12;

/// Writes rows in groups of [`GROUP`].
pub(crate) struct ParquetWriter {
    path: PathBuf,
    writer: SerializedFileWriter<PartialFile>,
    rows: Vec<ExitRow>,
    columns: Columns,
}

impl ParquetWriter {
    pub fn new(path: PathBuf, file: PartialFile, columns: Columns) -> Result<Self> {
        let schema = parse_message_type(&schema(columns)).expect("the schema is well formed");
        let properties = columns.names()[..columns.integers].iter().fold(
            WriterProperties::builder()
                .set_compression(Compression::UNCOMPRESSED)
                .set_statistics_enabled(EnabledStatistics::None)
                .set_dictionary_enabled(false),
            |properties, &column| {
                properties.set_column_encoding(ColumnPath::from(column), Encoding::DELTA_BINARY_PACKED)
            },
        );
        let writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties.build()));
        Ok(Self { writer: writer.map_err(unwritten(&path))?, path, rows: Vec::new(), columns })
    }

    pub fn push(&mut self, row: &ExitRow) -> Result<()> {
        self.rows.push(*row);
        if self.rows.len() == GROUP { self.write_group() } else { Ok(()) }
    }

    pub fn finish(mut self) -> Result<()> {
        if !self.rows.is_empty() {
            self.write_group()?;
        }
        self.writer.into_inner().map_err(unwritten(&self.path))?.finish()
    }

    fn write_group(&mut self) -> Result<()> {
        write_group(&mut self.writer, &self.rows, self.columns).map_err(unwritten(&self.path))?;
        self.rows.clear();
        Ok(())
    }
}

fn schema(columns: Columns) -> String {
    let column = |(place, name): (usize, &str)| match place < columns.integers {
        true => format!("REQUIRED INT32 {name} (INTEGER(32,false));"),
        false => format!("REQUIRED FLOAT {name};"),
    };
    format!("message exits {{ {} }}", columns.names().into_iter().enumerate().map(column).collect::<String>())
}

fn write_group(
    writer: &mut SerializedFileWriter<PartialFile>,
    rows: &[ExitRow],
    columns: Columns,
) -> Result<(), ParquetError> {
    let mut group = writer.next_row_group()?;
    for column in 0..columns.integers {
        let values = rows.iter().map(|row| row.integers()[column] as i32).collect();
        write_column::<Int32Type>(&mut group, values, None, None)?;
    }
    for signal in columns.signals.iter() {
        write_column::<FloatType>(&mut group, rows.iter().map(|row| row.signals.get(signal)).collect(), None, None)?;
    }
    group.close()?;
    Ok(())
}

/// Writes the next column of a group: its values, and the levels of Parquet for nulls and lists where it may have any.
pub(crate) fn write_column<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, PartialFile>,
    values: Vec<T::T>,
    defined: Option<&[i16]>,
    repeated: Option<&[i16]>,
) -> Result<(), ParquetError> {
    let mut column = group.next_column()?.expect("the schema has a column for each");
    column.typed::<T>().write_batch(&values, defined, repeated)?;
    column.close()
}

/// The rows of a file.
pub(crate) struct ParquetRows {
    path: PathBuf,
    reader: SerializedFileReader<File>,
    columns: Columns,
    /// Position in the file of each of the columns.
    places: Vec<usize>,
}

impl ParquetRows {
    /// # Errors
    /// If the file cannot be read, or has other columns.
    pub fn open(path: &Path, meta: &ExitTraceMeta) -> Result<Self> {
        check_no_pointer(path)?;
        let file = File::open(path).map_err(TraceError::io("read", path))?;
        let reader = SerializedFileReader::new(file).map_err(unread(path))?;
        let schema = reader.metadata().file_metadata().schema_descr();
        let name = |column: usize| schema.column(column).path().string();
        let place_of = |wanted: &str| (0..schema.num_columns()).find(|&place| name(place) == wanted);
        let has = |signal: &ExitSignal| place_of(signal.name()).is_some();
        let signals = ExitSignal::ALL.into_iter().filter(has).fold(SignalSet::ALWAYS, SignalSet::with);
        let columns = Columns::new(meta, signals);
        let mut places = Vec::new();
        for (column, wanted) in columns.names().into_iter().enumerate() {
            let Some(place) = place_of(wanted) else {
                let found = format!("columns `{}`", (0..schema.num_columns()).map(name).collect::<Vec<_>>().join(","));
                let all = Columns::new(meta, SignalSet::ALL).names().join(",");
                return Err(TraceError::file(path, found, format!("columns `{all}`")));
            };
            let of = schema.column(place);
            let expected = if column < columns.integers { Type::INT32 } else { Type::FLOAT };
            if (of.physical_type(), of.max_rep_level()) != (expected, 0) {
                let found = format!("column `{wanted}` of {} values", of.physical_type());
                return Err(TraceError::file(path, found, format!("one {expected} in each row")));
            }
            places.push(place);
        }
        Ok(Self { path: path.to_owned(), reader, columns, places })
    }

    pub fn columns(&self) -> Columns {
        self.columns
    }

    /// Calls `each` with every row.
    ///
    /// # Errors
    /// If the file cannot be read, or at the first row that `each` rejects.
    pub fn for_each(&self, mut each: impl FnMut(&ExitRow) -> Result<(), Fault>) -> Result<()> {
        let mut line = 0;
        for group in 0..self.reader.num_row_groups() {
            let group = self.reader.get_row_group(group).map_err(unread(&self.path))?;
            let mut columns =
                catching(|| ReadColumns::open(&*group, self.columns, &self.places)).map_err(unread(&self.path))?;
            while columns.read_chunk().map_err(unread(&self.path))? {
                for index in 0..columns.integers[0].len() {
                    line += 1;
                    let row = columns.row(index);
                    each(&row).map_err(|Fault { column, expected }| TraceError::Value {
                        path: self.path.clone(),
                        line,
                        column: self.columns.names()[column].into(),
                        found: columns.quote(column, index),
                        expected,
                    })?;
                }
            }
        }
        Ok(())
    }
}

/// The columns of a group of rows, with the chunk that was read last.
struct ReadColumns {
    columns: Columns,
    integer_readers: Vec<ColumnReaderImpl<Int32Type>>,
    signal_readers: Vec<ColumnReaderImpl<FloatType>>,
    integers: Vec<Vec<i32>>,
    signals: Vec<Vec<f32>>,
}

impl ReadColumns {
    fn open(group: &dyn RowGroupReader, columns: Columns, places: &[usize]) -> Result<Self, ParquetError> {
        let (integers, signals) = places.split_at(columns.integers);
        let integer_readers: Vec<_> = typed_readers(group, integers)?;
        let signal_readers: Vec<_> = typed_readers(group, signals)?;
        Ok(Self {
            columns,
            integers: vec![Vec::new(); integer_readers.len()],
            signals: vec![Vec::new(); signal_readers.len()],
            integer_readers,
            signal_readers,
        })
    }

    /// Reads the next chunk of rows; returns `false` after the last row.
    fn read_chunk(&mut self) -> Result<bool, ParquetError> {
        catching(|| self.read_columns())?;
        let rows = self.integers[0].len();
        let whole = self.integers.iter().all(|column| column.len() == rows)
            && self.signals.iter().all(|column| column.len() == rows);
        match whole {
            true => Ok(rows > 0),
            false => Err(ParquetError::General("columns of different lengths".to_owned())),
        }
    }

    fn read_columns(&mut self) -> Result<(), ParquetError> {
        for (reader, values) in self.integer_readers.iter_mut().zip(&mut self.integers) {
            read_column(reader, values)?;
        }
        for (reader, values) in self.signal_readers.iter_mut().zip(&mut self.signals) {
            read_column(reader, values)?;
        }
        Ok(())
    }

    fn row(&self, index: usize) -> ExitRow {
        let integer = |column: usize| self.integers.get(column).map_or(0, |column: &Vec<i32>| column[index] as u32);
        let mut signals = [0.0; ExitSignal::ALL.len()];
        for (signal, column) in self.columns.signals.iter().zip(&self.signals) {
            signals[signal as usize] = column[index];
        }
        ExitRow::new(std::array::from_fn(integer), signals.into())
    }

    fn quote(&self, column: usize, index: usize) -> String {
        match column.checked_sub(self.integers.len()) {
            None => format!("`{}`", self.integers[column][index] as u32),
            Some(signal) => format!("`{}`", self.signals[signal][index]),
        }
    }
}

fn typed_readers<T: DataType>(
    group: &dyn RowGroupReader,
    places: &[usize],
) -> Result<Vec<ColumnReaderImpl<T>>, ParquetError> {
    places.iter().map(|&place| Ok(get_typed_column_reader::<T>(group.get_column_reader(place)?))).collect()
}

/// Runs a read of the parquet crate and turns its panics into errors: some damage passes the crate's checks.
///
/// # Errors
/// The error of `read`, or an error for a damaged file.
pub fn catching_damage<R, E>(read: impl FnOnce() -> Result<R, E>, damaged: impl FnOnce(&str) -> E) -> Result<R, E> {
    catch_panic(read).unwrap_or_else(|_| Err(damaged("its encoding is damaged")))
}

pub(crate) fn catching<R>(read: impl FnOnce() -> Result<R, ParquetError>) -> Result<R, ParquetError> {
    catching_damage(read, |message| ParquetError::General(message.to_owned()))
}

/// Reads up to [`CHUNK`] values; a row without one is an error.
fn read_column<T: DataType>(reader: &mut ColumnReaderImpl<T>, values: &mut Vec<T::T>) -> Result<(), ParquetError> {
    values.clear();
    let mut levels = Vec::new();
    let mut left = CHUNK;
    while left > 0 {
        let (rows, found, _) = reader.read_records(left, Some(&mut levels), None, values)?;
        if found != rows {
            return Err(ParquetError::General("a row without a value".to_owned()));
        }
        if rows == 0 {
            break;
        }
        left -= rows;
    }
    Ok(())
}

pub(crate) fn unread(path: &Path) -> impl FnOnce(ParquetError) -> TraceError {
    move |error| TraceError::file(path, error.to_string(), "a Parquet file, uncompressed or zstd")
}

pub(crate) fn unwritten(path: &Path) -> impl FnOnce(ParquetError) -> TraceError {
    move |error| TraceError::io("write", path)(std::io::Error::other(error))
}
