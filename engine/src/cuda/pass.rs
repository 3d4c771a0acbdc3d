//! Data about the rows of a pass for the kernels, built and uploaded once per pass.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::ops::Range;

use scheduler::blocks::BlockId;

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

/// The KV blocks of the sequences of a pass, each sequence once.
#[derive(Clone, Debug, Default)]
pub struct BlockTable {
    blocks: Vec<i32>,
    /// Index of the first block of each sequence, by the address and number of its blocks.
    firsts: HashMap<(*const BlockId, usize), i32>,
}

impl BlockTable {
    /// Index of the first block of a sequence, which is appended if it is not there.
    fn first_of(&mut self, blocks: &[BlockId]) -> i32 {
        *self.firsts.entry((blocks.as_ptr(), blocks.len())).or_insert_with(|| {
            let first = self.blocks.len() as i32;
            self.blocks.extend(blocks.iter().map(|&block| block as i32));
            first
        })
    }

    /// Appends the table to an upload.
    pub fn append(&self, arrays: &mut Arrays) -> View<i32> {
        arrays.push(&self.blocks, self.blocks.len(), 0)
    }
}

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
}

impl PassRows {
    /// Data of rows sorted by depth. Consecutive rows of one sequence at one depth form a prompt chunk. `window` is the
    /// window of layers that have one, `slots` the number of depths with their own pages. The sequences' blocks are added
    /// to a table.
    pub fn new(rows: &[attention::Row<'_>], window: Option<usize>, slots: usize, table: &mut BlockTable) -> Self {
        let (mut pass, mut last_splits) = (Self::default(), Vec::new());
        for chunk in rows.chunk_by(follows) {
            pass.push_rows(chunk, window, slots, table.first_of(chunk[0].blocks));
            pass.attend_with(chunk, &mut last_splits);
        }
        last_splits.sort_by_key(|&(entries, _)| Reverse(entries));
        pass.items.extend(last_splits.into_iter().map(|(_, item)| item));
        pass.with_groups()
    }

    /// Data of rows sorted by depth which run no layer, so that they attend to nothing.
    pub fn without_attention(rows: &[attention::Row<'_>]) -> Self {
        let mut pass = Self::default();
        pass.push_rows(rows, None, 1, 0);
        pass.with_groups()
    }

    fn with_groups(mut self) -> Self {
        let pass = &mut self;
        for of_depth in pass.rows.chunk_by(|a, b| a.depth == b.depth) {
            let start = pass.groups.last().map_or(0, |last| last.first_row + last.rows);
            pass.groups.extend((0..of_depth.len()).step_by(GROUP_ROWS).map(|first| Group {
                first_row: start + first as i32,
                rows: (of_depth.len() - first).min(GROUP_ROWS) as i32,
                depth: of_depth[0].depth,
            }));
        }
        self
    }

    fn push_rows(&mut self, rows: &[attention::Row<'_>], window: Option<usize>, slots: usize, first_block: i32) {
        self.rows.extend(rows.iter().map(|row| Row {
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
            first_split: 0,
        }));
    }

    /// Makes the last rows attend: together, or separately if it is one. Then `last_splits` gets its last split with the
    /// number of entries.
    fn attend_with(&mut self, chunk: &[attention::Row<'_>], last_splits: &mut Vec<(usize, Item)>) {
        let first_row = self.rows.len() - chunk.len();
        if let [row] = chunk {
            self.rows[first_row].first_split = (self.items.len() + last_splits.len()) as i32;
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
        }
    }

    /// Adds a number of blocks before the table of the rows' blocks.
    pub fn move_blocks(&mut self, by: usize) {
        self.rows.iter_mut().for_each(|row| row.first_block += by as i32);
    }

    /// Appends the data to an upload, padded to `room` with entries that kernels skip. `block_table` is where the table of
    /// the rows' blocks lies in the upload.
    pub fn append(&self, arrays: &mut Arrays, room: Room, block_table: View<i32>) -> OnDevice {
        OnDevice {
            rows: arrays.push(&self.rows, room.rows, Row::PADDING),
            items: arrays.push(&self.items, room.items, NO_ITEM),
            joins: arrays.push(&self.joins, room.joins, -1),
            tiles: arrays.push(&self.tiles, room.tiles, NO_TILE),
            groups: arrays.push(&self.groups, room.groups, NO_GROUP),
            block_table,
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
}

impl Room {
    /// Bytes of an upload with this room.
    pub fn bytes(&self) -> usize {
        let &Self { rows, items, joins, tiles, groups } = self;
        Arrays::bytes_of_array::<Row>(rows)
            + Arrays::bytes_of_array::<Item>(items)
            + Arrays::bytes_of_array::<i32>(joins)
            + Arrays::bytes_of_array::<Tile>(tiles)
            + Arrays::bytes_of_array::<Group>(groups)
    }
}

/// Arrays that are uploaded together, each aligned to 16 bytes.
#[derive(Clone, Debug, Default)]
pub struct Arrays {
    bytes: Vec<u8>,
    /// The parts of `bytes` that have been written, in order; the next array follows the last.
    written: Vec<Range<usize>>,
}

impl Arrays {
    const ALIGNMENT: usize = 16;
    /// Maximum number of bytes that are uploaded although nothing was written there: this takes less time than a second
    /// upload.
    const GAP: usize = 8192;

    /// Bytes that an array takes.
    pub fn bytes_of_array<T>(len: usize) -> usize {
        (len * size_of::<T>()).next_multiple_of(Self::ALIGNMENT)
    }

    /// Places the next array at a number of bytes, beyond all others.
    pub fn begin_at(&mut self, start: usize) {
        self.written.push(start..start);
    }

    /// Appends numbers, and padding up to `room` of them. Returns their view, relative to the start.
    pub fn push<T: Plain>(&mut self, numbers: &[T], room: usize, padding: T) -> View<T> {
        if self.written.is_empty() {
            self.begin_at(0);
        }
        let part = self.written.last_mut().expect("a part was begun");
        let (start, own) = (part.end, size_of_val(numbers));
        part.end += Self::bytes_of_array::<T>(room);
        if self.bytes.len() < part.end {
            self.bytes.resize(part.end, 0);
        }
        let bytes = &mut self.bytes[start..start + room * size_of::<T>()];
        let (values, rest) = bytes.split_at_mut(own);
        values.copy_from_slice(bytes_of(numbers));
        // Padding is copied in pieces that double.
        let mut padded = size_of::<T>().min(rest.len());
        rest[..padded].copy_from_slice(&bytes_of(&[padding])[..padded]);
        while padded < rest.len() {
            let more = padded.min(rest.len() - padded);
            rest.copy_within(..more, padded);
            padded += more;
        }
        View::new(start as u64, room)
    }

    /// Removes all arrays.
    pub fn clear(&mut self) {
        self.written.clear();
    }

    /// Bytes from the start to the end of the last array.
    pub fn len(&self) -> usize {
        self.written.last().map_or(0, |part| part.end)
    }

    /// Whether there is no array.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The bytes to upload, each with its distance from the start.
    pub fn parts(&self) -> Vec<(usize, &[u8])> {
        let mut parts: Vec<Range<usize>> = Vec::new();
        for part in &self.written {
            match parts.last_mut() {
                Some(last) if part.start <= last.end + Self::GAP => last.end = part.end,
                _ => parts.push(part.clone()),
            }
        }
        parts.into_iter().map(|part| (part.start, &self.bytes[part])).collect()
    }

    /// All bytes up to the end of the last array.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len()]
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
}
