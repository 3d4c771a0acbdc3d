//! Data about the rows of a pass for the kernels, built and uploaded once per pass.

use std::cmp::Reverse;

use super::device::{Plain, View, bytes_of};
use crate::kernels::attention;

/// Entries per split of a decode row's history, as in `attention.cu`.
pub const SPLIT: usize = 256;
/// Rows per tile of a prompt chunk, as in `attention.cu`.
pub const QUERIES: usize = 16;
/// Rows that share the loads of an adapter, as in `lora.cu`.
pub const GROUP_ROWS: usize = 16;

/// A row, as in `scalar.cuh`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Row {
    position: i32,
    depth: i32,
    slot: i32,
    first_fill: i32,
    end_fill: i32,
    entry: i32,
    end: i32,
    first_windowed: i32,
    first_block: i32,
    first_split: i32,
}

impl Row {
    const PADDING: Self = Self {
        position: -1,
        depth: 0,
        slot: 0,
        first_fill: 0,
        end_fill: 0,
        entry: 0,
        end: 0,
        first_windowed: 0,
        first_block: 0,
        first_split: 0,
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

// SAFETY: `repr(C)` with only `i32` numbers.
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
    /// Splits of rows that attend separately, the longest first.
    items: Vec<Item>,
    /// Rows that attend separately with several splits.
    joins: Vec<i32>,
    /// Tiles of prompt chunks' rows.
    tiles: Vec<Tile>,
    groups: Vec<Group>,
    /// The KV blocks of all sequences.
    block_table: Vec<i32>,
}

impl PassRows {
    /// Data of rows sorted by depth. Consecutive rows of one sequence at one depth form a prompt chunk. `window` is the
    /// window of layers that have one, `slots` the number of depths with their own pages.
    pub fn new(rows: &[attention::Row<'_>], window: Option<usize>, slots: usize) -> Self {
        let (mut pass, mut last_splits) = (Self::default(), Vec::new());
        for chunk in rows.chunk_by(follows) {
            pass.push_chunk(chunk, window, slots, &mut last_splits);
        }
        last_splits.sort_by_key(|&(entries, _)| Reverse(entries));
        pass.items.extend(last_splits.into_iter().map(|(_, item)| item));
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

    /// Appends rows; `last_splits` gets the last split of a row that attends separately, with its number of entries.
    fn push_chunk(
        &mut self,
        chunk: &[attention::Row<'_>],
        window: Option<usize>,
        slots: usize,
        last_splits: &mut Vec<(usize, Item)>,
    ) {
        let (first_row, first_block) = (self.rows.len(), self.block_table.len() as i32);
        let first_split = (self.items.len() + last_splits.len()) as i32;
        self.rows.extend(chunk.iter().map(|row| Row {
            position: row.position as i32,
            depth: row.depth as i32,
            slot: (row.depth % slots) as i32,
            first_fill: row.fills.start as i32,
            end_fill: row.fills.end as i32,
            entry: row.entries_before(row.position) as i32,
            end: row.entries_before(row.position + 1) as i32,
            first_windowed:
                window.map_or(0, |window| row.entries_before((row.position + 1).saturating_sub(window)) as i32),
            first_block,
            first_split,
        }));
        self.block_table.extend(chunk[0].blocks.iter().map(|&block| block as i32));
        if let [row] = chunk {
            let split = |split| Item { row: first_row as i32, split: split as i32 };
            let entries = row.entries_before(row.position + 1);
            let last = entries.div_ceil(SPLIT) - 1;
            self.items.extend((0..last).map(split));
            last_splits.push((entries - last * SPLIT, split(last)));
            if last > 0 {
                self.joins.push(first_row as i32);
            }
        } else {
            self.tiles.extend((0..chunk.len()).step_by(QUERIES).map(|first| Tile {
                first_row: (first_row + first) as i32,
                rows: (chunk.len() - first).min(QUERIES) as i32,
            }));
        }
    }

    /// Room that the data needs without padding.
    pub fn room(&self) -> Room {
        Room {
            rows: self.rows.len(),
            items: self.items.len(),
            joins: self.joins.len(),
            tiles: self.tiles.len(),
            groups: self.groups.len(),
            blocks: self.block_table.len(),
        }
    }

    /// Appends the data to an upload, padded to `room` with entries that kernels skip.
    pub fn append(&self, arrays: &mut Arrays, room: Room) -> OnDevice {
        OnDevice {
            rows: arrays.push(&self.rows, room.rows, Row::PADDING),
            items: arrays.push(&self.items, room.items, NO_ITEM),
            joins: arrays.push(&self.joins, room.joins, -1),
            tiles: arrays.push(&self.tiles, room.tiles, NO_TILE),
            groups: arrays.push(&self.groups, room.groups, NO_GROUP),
            block_table: arrays.push(&self.block_table, room.blocks, 0),
        }
    }
}

/// Number of entries of each array.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Room {
    /// Number of rows.
    pub rows: usize,
    /// Number of splits of histories, of rows that attend separately.
    pub items: usize,
    /// Number of rows with several such splits.
    pub joins: usize,
    /// Number of tiles of prompt chunks.
    pub tiles: usize,
    /// Number of groups of rows of one depth.
    pub groups: usize,
    /// Number of blocks of all sequences.
    pub blocks: usize,
}

impl Room {
    /// The smallest room that fits both.
    pub fn or(self, other: Self) -> Self {
        Self {
            rows: self.rows.max(other.rows),
            items: self.items.max(other.items),
            joins: self.joins.max(other.joins),
            tiles: self.tiles.max(other.tiles),
            groups: self.groups.max(other.groups),
            blocks: self.blocks.max(other.blocks),
        }
    }
}

/// Arrays that are uploaded together, each aligned to 16 bytes.
#[derive(Clone, Debug, Default)]
pub struct Arrays {
    bytes: Vec<u8>,
}

impl Arrays {
    /// Appends numbers, and padding up to `room` of them. Returns their view, relative to the start.
    pub fn push<T: Plain>(&mut self, numbers: &[T], room: usize, padding: T) -> View<T> {
        let start = self.bytes.len().next_multiple_of(16);
        self.bytes.resize(start, 0);
        self.bytes.extend_from_slice(bytes_of(numbers));
        for _ in numbers.len()..room {
            self.bytes.extend_from_slice(bytes_of(&[padding]));
        }
        View::new(start as u64, room)
    }

    /// Removes all arrays.
    pub fn clear(&mut self) {
        self.bytes.clear();
    }

    /// The bytes to upload.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Whether a row is at the next position of the same sequence and depth.
fn follows(before: &attention::Row<'_>, after: &attention::Row<'_>) -> bool {
    std::ptr::eq(before.blocks, after.blocks) && before.depth == after.depth && before.position + 1 == after.position
}

/// The rows of a pass on a device; before the upload, relative to its start.
#[derive(Clone, Copy, Debug)]
pub struct OnDevice {
    /// Rows.
    pub rows: View<Row>,
    /// Splits of histories, of rows that attend separately.
    pub items: View<Item>,
    /// Indices of rows with several such splits.
    pub joins: View<i32>,
    /// Tiles of prompt chunks.
    pub tiles: View<Tile>,
    /// Groups of rows of one depth.
    pub groups: View<Group>,
    /// The KV blocks of all sequences.
    pub block_table: View<i32>,
}

impl OnDevice {
    /// The views, moved by a number of bytes.
    pub fn moved(self, bytes: u64) -> Self {
        Self {
            rows: self.rows.moved(bytes),
            items: self.items.moved(bytes),
            joins: self.joins.moved(bytes),
            tiles: self.tiles.moved(bytes),
            groups: self.groups.moved(bytes),
            block_table: self.block_table.moved(bytes),
        }
    }

    /// The first entries of each array.
    pub fn first(self, room: Room) -> Self {
        Self {
            rows: self.rows.first(room.rows),
            items: self.items.first(room.items),
            joins: self.joins.first(room.joins),
            tiles: self.tiles.first(room.tiles),
            groups: self.groups.first(room.groups),
            block_table: self.block_table.first(room.blocks),
        }
    }
}
