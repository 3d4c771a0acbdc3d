//! What the kernels must know of the rows of a pass: built once a pass, uploaded as one.

use super::device::{Device, Plain, View, bytes_of};
use crate::kernels::attention;
use candle_core::Result;

/// Entries of a split of a decode row's history, as in `attention.cu`.
pub const SPLIT: usize = 256;
/// Rows of a tile of a prompt's chunk, as in `attention.cu`.
pub const QUERIES: usize = 16;
/// Rows that share what is loaded of an adapter, as in `lora.cu`.
pub const GROUP_ROWS: usize = 8;

/// A row, as `scalar.cuh` has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    position: i32,
    depth: i32,
    first_fill: i32,
    end_fill: i32,
    entry: i32,
    end: i32,
    first_windowed: i32,
    first_block: i32,
    first_item: i32,
}

/// One split of a decode row's history.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Item {
    row: i32,
    split: i32,
}

/// Rows of one sequence and depth at consecutive positions.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    first_row: i32,
    rows: i32,
}

/// Rows of one depth.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Group {
    first_row: i32,
    rows: i32,
    depth: i32,
}

// SAFETY: `repr(C)` of `i32` alone.
unsafe impl Plain for Row {}
// SAFETY: as above.
unsafe impl Plain for Item {}
// SAFETY: as above.
unsafe impl Plain for Tile {}
// SAFETY: as above.
unsafe impl Plain for Group {}

/// The rows of a pass, on the host.
#[derive(Clone, Debug, Default)]
pub struct PassRows {
    rows: Vec<Row>,
    /// Of rows that attend by themselves: their splits.
    items: Vec<Item>,
    /// Of rows of prompts' chunks.
    tiles: Vec<Tile>,
    groups: Vec<Group>,
    /// The blocks of all sequences.
    block_table: Vec<i32>,
}

impl PassRows {
    /// Of rows that come by depth. Rows that follow each other in one sequence, at one depth, are a prompt's chunk.
    /// `window` is what layers with a window see.
    pub fn new(rows: &[attention::Row<'_>], window: Option<usize>) -> Self {
        let mut pass = Self::default();
        for chunk in rows.chunk_by(follows) {
            pass.push_chunk(chunk, window);
        }
        for of_depth in pass.rows.chunk_by(|a, b| a.depth == b.depth) {
            let start = pass.groups.last().map_or(0, |last| last.first_row + last.rows);
            pass.groups.extend((0..of_depth.len()).step_by(GROUP_ROWS).map(|first| Group {
                first_row: start + first as i32,
                rows: (of_depth.len() - first).min(GROUP_ROWS) as i32,
                depth: of_depth[0].depth,
            }));
        }
        pass
    }

    fn push_chunk(&mut self, chunk: &[attention::Row<'_>], window: Option<usize>) {
        let (first_row, first_block) = (self.rows.len(), self.block_table.len() as i32);
        let first_item = self.items.len() as i32;
        self.rows.extend(chunk.iter().map(|row| Row {
            position: row.position as i32,
            depth: row.depth as i32,
            first_fill: row.fills.start as i32,
            end_fill: row.fills.end as i32,
            entry: row.entries_before(row.position) as i32,
            end: row.entries_before(row.position + 1) as i32,
            first_windowed:
                window.map_or(0, |window| row.entries_before((row.position + 1).saturating_sub(window)) as i32),
            first_block,
            first_item,
        }));
        self.block_table.extend(chunk[0].blocks.iter().map(|&block| block as i32));
        if let [row] = chunk {
            let split = |split| Item { row: first_row as i32, split: split as i32 };
            self.items.extend((0..row.entries_before(row.position + 1).div_ceil(SPLIT)).map(split));
        } else {
            self.tiles.extend((0..chunk.len()).step_by(QUERIES).map(|first| Tile {
                first_row: (first_row + first) as i32,
                rows: (chunk.len() - first).min(QUERIES) as i32,
            }));
        }
    }

    /// Copies everything to a device, in one piece.
    ///
    /// # Errors
    /// If the device fails.
    pub fn upload<D: Device>(&self, device: &D) -> Result<OnDevice<D>> {
        let mut bytes = Vec::new();
        let rows = append(&mut bytes, &self.rows);
        let items = append(&mut bytes, &self.items);
        let tiles = append(&mut bytes, &self.tiles);
        let groups = append(&mut bytes, &self.groups);
        let block_table = append(&mut bytes, &self.block_table);
        let memory = device.allocate(bytes.len())?;
        device.upload(&memory, &bytes)?;
        let start = device.address(&memory);
        Ok(OnDevice {
            rows: View::new(start + rows, self.rows.len()),
            items: View::new(start + items, self.items.len()),
            tiles: View::new(start + tiles, self.tiles.len()),
            groups: View::new(start + groups, self.groups.len()),
            block_table: View::new(start + block_table, self.block_table.len()),
            _memory: memory,
        })
    }
}

/// Whether a row comes right after another in the same sequence and at the same depth.
fn follows(before: &attention::Row<'_>, after: &attention::Row<'_>) -> bool {
    std::ptr::eq(before.blocks, after.blocks) && before.depth == after.depth && before.position + 1 == after.position
}

/// Appends numbers at the next multiple of 16; gives where.
fn append<T: Plain>(bytes: &mut Vec<u8>, numbers: &[T]) -> u64 {
    let start = bytes.len().next_multiple_of(16);
    bytes.resize(start, 0);
    bytes.extend_from_slice(bytes_of(numbers));
    start as u64
}

/// The rows of a pass, on a device.
#[derive(Debug)]
pub struct OnDevice<D: Device> {
    /// Rows.
    pub rows: View<Row>,
    /// Splits of the histories of rows that attend by themselves.
    pub items: View<Item>,
    /// Tiles of prompts' chunks.
    pub tiles: View<Tile>,
    /// Groups of rows of one depth.
    pub groups: View<Group>,
    /// The blocks of all sequences.
    pub block_table: View<i32>,
    _memory: D::Memory,
}
