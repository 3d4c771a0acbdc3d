//! What the kernels must know of the rows of a pass: built once a pass, uploaded as one.

use super::device::{Plain, View, bytes_of};
use crate::kernels::attention;

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

impl Row {
    const PADDING: Self = Self {
        position: -1,
        depth: 0,
        first_fill: 0,
        end_fill: 0,
        entry: 0,
        end: 0,
        first_windowed: 0,
        first_block: 0,
        first_item: 0,
    };
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

const NO_ITEM: Item = Item { row: -1, split: 0 };
const NO_TILE: Tile = Tile { first_row: 0, rows: 0 };
const NO_GROUP: Group = Group { first_row: 0, rows: 0, depth: 0 };

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

    /// What it takes as it is.
    pub fn room(&self) -> Room {
        Room {
            rows: self.rows.len(),
            items: self.items.len(),
            tiles: self.tiles.len(),
            groups: self.groups.len(),
            blocks: self.block_table.len(),
        }
    }

    /// Appends everything to what is uploaded, padded to `room` by what no kernel works on.
    pub fn append(&self, arrays: &mut Arrays, room: Room) -> OnDevice {
        OnDevice {
            rows: arrays.push(&self.rows, room.rows, Row::PADDING),
            items: arrays.push(&self.items, room.items, NO_ITEM),
            tiles: arrays.push(&self.tiles, room.tiles, NO_TILE),
            groups: arrays.push(&self.groups, room.groups, NO_GROUP),
            block_table: arrays.push(&self.block_table, room.blocks, 0),
        }
    }
}

/// How much of each there is, or is room for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Room {
    /// Rows.
    pub rows: usize,
    /// Splits of the histories of rows that attend by themselves.
    pub items: usize,
    /// Tiles of prompts' chunks.
    pub tiles: usize,
    /// Groups of rows of one depth.
    pub groups: usize,
    /// Blocks of all sequences.
    pub blocks: usize,
}

impl Room {
    /// The least that holds both.
    pub fn or(self, other: Self) -> Self {
        Self {
            rows: self.rows.max(other.rows),
            items: self.items.max(other.items),
            tiles: self.tiles.max(other.tiles),
            groups: self.groups.max(other.groups),
            blocks: self.blocks.max(other.blocks),
        }
    }
}

/// Arrays that are uploaded as one, each at a multiple of 16 bytes.
#[derive(Clone, Debug, Default)]
pub struct Arrays {
    bytes: Vec<u8>,
}

impl Arrays {
    /// Appends numbers, then padding up to `room` of them; gives where they lie, counted from the start.
    pub fn push<T: Plain>(&mut self, numbers: &[T], room: usize, padding: T) -> View<T> {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(bytes_of(numbers));
        for _ in numbers.len()..room {
            self.bytes.extend_from_slice(bytes_of(&[padding]));
        }
        View::new(start as u64, room)
    }

    /// Empties them.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// What is to be uploaded.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Whether a row comes right after another in the same sequence and at the same depth.
fn follows(before: &attention::Row<'_>, after: &attention::Row<'_>) -> bool {
    std::ptr::eq(before.blocks, after.blocks) && before.depth == after.depth && before.position + 1 == after.position
}

/// The rows of a pass, on a device, or before the upload counted from the start of what is uploaded.
#[derive(Clone, Copy, Debug)]
pub struct OnDevice {
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
}

impl OnDevice {
    /// The same so many bytes further on.
    pub fn moved(self, bytes: u64) -> Self {
        Self {
            rows: self.rows.moved(bytes),
            items: self.items.moved(bytes),
            tiles: self.tiles.moved(bytes),
            groups: self.groups.moved(bytes),
            block_table: self.block_table.moved(bytes),
        }
    }

    /// The first of each.
    pub fn first(self, room: Room) -> Self {
        Self {
            rows: self.rows.first(room.rows),
            items: self.items.first(room.items),
            tiles: self.tiles.first(room.tiles),
            groups: self.groups.first(room.groups),
            block_table: self.block_table.first(room.blocks),
        }
    }
}
