//! Tables of the page: the cells of CSV files, by column.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Serialize, Serializer};

/// Significant digits that numbers keep.
const DIGITS: usize = 6;
/// Columns that a table keeps if it has too many cells: what is mostly asked of a run.
const MAIN: [&str; 17] = [
    "capacity_req_s",
    "throughput_tok_s",
    "mean_depth",
    "token_agreement",
    "exact_match",
    "ttft_mean_ms",
    "ttft_p50_ms",
    "ttft_p99_ms",
    "tpot_mean_ms",
    "tpot_p50_ms",
    "tpot_p99_ms",
    "e2e_mean_ms",
    "e2e_p99_ms",
    "busy",
    "objectives_met",
    "goodput_req_s",
    "price_per_million_tokens",
];
const GOLDEN_RATIO: f64 = 1.618_033_988_749_895;
/// The first columns that are no settings of a run.
const FIRST_METRICS: [&str; 2] = ["seeds", "requests"];

/// A table.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Table {
    /// The file that it is of, without its ending.
    pub name: String,
    pub lines: usize,
    pub columns: Vec<Column>,
}

/// A column: one cell for all lines, or one for each.
#[derive(Clone, Debug)]
pub(super) struct Column {
    pub name: String,
    pub cells: Vec<Cell>,
}

/// A cell. Numbers that are not finite are empty.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Cell {
    Empty,
    Number(f64),
    Text(String),
}

impl From<String> for Cell {
    fn from(text: String) -> Self {
        Self::Text(text)
    }
}

impl From<Option<f64>> for Cell {
    fn from(number: Option<f64>) -> Self {
        number.filter(|number| number.is_finite()).map_or(Self::Empty, Self::Number)
    }
}

impl Serialize for Cell {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Empty => serializer.serialize_none(),
            Self::Number(number) => Rounded(*number).serialize(serializer),
            Self::Text(text) => serializer.serialize_str(text),
        }
    }
}

impl Serialize for Column {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        #[serde(rename_all = "lowercase")]
        enum Cells<'a> {
            Same(&'a Cell),
            Each(&'a [Cell]),
        }
        #[derive(Serialize)]
        struct Shown<'a> {
            name: &'a str,
            #[serde(flatten)]
            cells: Cells<'a>,
        }
        let cells = match self.cells.first() {
            Some(first) if self.is_constant() => Cells::Same(first),
            _ => Cells::Each(&self.cells),
        };
        Shown { name: &self.name, cells }.serialize(serializer)
    }
}

impl Column {
    pub fn new(name: &str, cells: impl IntoIterator<Item = impl Into<Cell>>) -> Self {
        Self { name: name.to_owned(), cells: cells.into_iter().map(Into::into).collect() }
    }

    /// A column of numbers if all cells are, else of texts.
    fn parse(name: String, texts: Vec<String>) -> Self {
        let number = |text: &String| match text.as_str() {
            "" => Some(Cell::Empty),
            _ => text.parse().ok().map(|number: f64| Some(number).into()),
        };
        let numbers: Option<Vec<Cell>> = texts.iter().map(number).collect();
        Self { name, cells: numbers.unwrap_or_else(|| texts.into_iter().map(Cell::Text).collect()) }
    }

    fn is_constant(&self) -> bool {
        self.cells.iter().all(|cell| *cell == self.cells[0])
    }

    /// The mean of the numbers of some lines; empty without any.
    fn mean(cells: &[Cell]) -> Cell {
        let numbers = cells.iter().filter_map(|cell| if let Cell::Number(number) = cell { Some(number) } else { None });
        let (sum, count) = numbers.fold((0.0, 0), |(sum, count), number| (sum + number, count + 1));
        if count == 0 { Cell::Empty } else { Cell::Number(sum / f64::from(count)) }
    }
}

impl Table {
    /// Reads a CSV file.
    ///
    /// # Errors
    /// If it does not read, or has no header.
    pub fn read(path: &Path) -> Result<Self> {
        let shown = || path.display().to_string();
        let mut reader = csv::Reader::from_path(path).with_context(shown)?;
        let names: Vec<String> = reader.headers().with_context(shown)?.iter().map(str::to_owned).collect();
        ensure!(!names.is_empty(), "{}: found an empty file, expected a line of column names", path.display());
        let mut texts: Vec<Vec<String>> = vec![Vec::new(); names.len()];
        let mut lines = 0;
        for record in reader.into_records() {
            let record = record.with_context(shown)?;
            record.iter().zip(&mut texts).for_each(|(cell, column)| column.push(cell.to_owned()));
            lines += 1;
        }
        let columns = names.into_iter().zip(texts).map(|(name, texts)| Column::parse(name, texts)).collect();
        let name = path.file_stem().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self { name, lines, columns })
    }

    /// Cells of a column as texts; empty texts where it has none, none if there is no such column.
    pub fn texts(&self, name: &str) -> Option<Vec<String>> {
        let text = |cell: &Cell| match cell {
            Cell::Empty => String::new(),
            Cell::Number(number) => number.to_string(),
            Cell::Text(text) => text.clone(),
        };
        let column = self.columns.iter().find(|column| column.name == name)?;
        Some(column.cells.iter().map(text).collect())
    }

    /// Cells that differ from line to line.
    pub fn varying_cells(&self) -> usize {
        self.lines * self.columns.iter().filter(|column| !column.is_constant()).count()
    }

    /// Keeps about `most` cells: the main columns of runs, then lines spread over the table. Says what was left out.
    pub fn sample(&mut self, most: usize) -> Option<String> {
        let (lines, columns) = (self.lines, self.columns.len());
        if self.varying_cells() <= most {
            return None;
        }
        let metrics = self.columns.iter().position(|column| FIRST_METRICS.contains(&column.name.as_str()));
        if let Some(metrics) = metrics {
            let is_main = |name: &str| MAIN.contains(&name.trim_end_matches("_ci95"));
            let mut place = 0;
            self.columns.retain(|column| {
                place += 1;
                place <= metrics + 1 || is_main(&column.name)
            });
        }
        if self.varying_cells() > most {
            // Multiples of the golden ratio spread the lines without a period, which settings would have too.
            let share = most as f64 / self.varying_cells() as f64;
            let is_kept = |line: usize| (line as f64 * GOLDEN_RATIO).fract() < share;
            for column in &mut self.columns {
                let mut line = 0;
                column.cells.retain(|_| {
                    line += 1;
                    is_kept(line - 1)
                });
            }
            self.lines = (0..lines).filter(|&line| is_kept(line)).count();
        }
        Some(format!(
            "{}.csv: {} of {lines} lines, spread over the file, and {} of {columns} columns are in the page",
            self.name,
            self.lines,
            self.columns.len()
        ))
    }

    /// Means over neighbouring lines of a table of numbers, at most `most` of them, and whether there were more lines.
    pub fn averaged(&mut self, most: usize) -> Option<String> {
        let group = self.lines.div_ceil(most.max(1)).max(1);
        if group == 1 {
            return None;
        }
        let average = |column: &mut Column| column.cells = column.cells.chunks(group).map(Column::mean).collect();
        self.columns.iter_mut().for_each(average);
        self.lines = self.lines.div_ceil(group);
        Some(format!("{}.csv: means over {group} lines are in the page", self.name))
    }
}

/// A number as JSON, with [`DIGITS`] significant digits, and without a fraction if it is whole.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Rounded(pub f64);

impl Serialize for Rounded {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        const EXACT: f64 = 9e15;
        if self.0.fract() == 0.0 && self.0.abs() < EXACT {
            return serializer.serialize_i64(self.0 as i64);
        }
        let rounded: f64 = format!("{:.*e}", DIGITS - 1, self.0).parse().expect("a number as it was written");
        if rounded.fract() == 0.0 && rounded.abs() < EXACT {
            return serializer.serialize_i64(rounded as i64);
        }
        serializer.serialize_f64(rounded)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("some.csv");
        std::fs::write(&path, text).unwrap();
        Table::read(&path).unwrap()
    }

    fn json(table: &Table) -> String {
        serde_json::to_string(&table.columns).unwrap()
    }

    #[test]
    fn columns_are_numbers_or_texts_and_equal_cells_are_written_once() {
        let table = table("a,b,c,d\n1,x,NaN,7\n1234567.8,2,3.5,7\n,,inf,7\n");
        let expected = concat!(
            r#"[{"name":"a","each":[1,1234570,null]},{"name":"b","each":["x","2",""]},"#,
            r#"{"name":"c","each":[null,3.5,null]},{"name":"d","same":7}]"#
        );
        assert_eq!(json(&table), expected);
        assert_eq!(table.varying_cells(), 9);
    }

    #[test]
    fn a_long_table_keeps_its_main_columns_and_lines_of_every_policy() {
        let line = |i: u32| format!("{},{i},1,{i},{i},{i}\n", ["depth", "vanilla"][i as usize % 2]);
        let text: String = (0..100).map(line).collect();
        let mut long = table(&format!("batching,rate,requests,throughput_tok_s,itl_p90_ms,busy_ci95\n{text}"));
        assert_eq!(long.sample(500), None);
        let note = long.sample(200).unwrap();
        assert_eq!(note, "some.csv: 51 of 100 lines, spread over the file, and 5 of 6 columns are in the page");
        assert_eq!(long.texts("itl_p90_ms"), None);
        let of_depth = long.texts("batching").unwrap().iter().filter(|batching| *batching == "depth").count();
        assert!((20..=30).contains(&of_depth), "{of_depth} of 51");
    }

    #[test]
    fn a_long_curve_is_averaged_over_neighbours() {
        let mut curve = table("step,loss,held_out\n0,4,\n1,2,8\n2,1,\n");
        assert_eq!(curve.averaged(3), None);
        assert_eq!(curve.averaged(2).unwrap(), "some.csv: means over 2 lines are in the page");
        let expected =
            r#"[{"name":"step","each":[0.5,2]},{"name":"loss","each":[3,1]},{"name":"held_out","each":[8,null]}]"#;
        assert_eq!(json(&curve), expected);
    }
}
