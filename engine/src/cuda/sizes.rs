//! Sizes to which sections of a pass are padded, so that few graphs serve all passes.
//!
//! Rows cost time even as padding: there are four sizes per doubling. A padded split, join or tile is a block of threads
//! that ends at once, so that a size may be four times what is needed.

use super::pass::{GROUP_ROWS, QUERIES, Room, SPLIT};

/// Maximum number of rows of a section that runs as a graph. Layers of more rows take longer than the host needs to launch
/// them one by one.
pub const MOST_ROWS: usize = 512;

/// Rounds a number of rows up to a size that is at most a quarter larger.
fn rows_size(rows: usize) -> usize {
    rows.next_multiple_of((rows.next_power_of_two() / 8).max(1))
}

/// Rounds a number of blocks of threads up to a power of four, at least four; zero stays zero.
fn blocks_size(blocks: usize) -> usize {
    match blocks {
        0 => 0,
        blocks => 1 << blocks.next_power_of_two().ilog2().next_multiple_of(2).max(2),
    }
}

/// The room to which a section is padded.
pub fn padded(room: Room, loops: usize) -> Room {
    let (rows, items) = (rows_size(room.rows), blocks_size(room.items));
    Room {
        rows,
        items,
        // A row with several splits has at least two. Without such rows nothing is joined, not even padding.
        joins: if room.joins == 0 { 0 } else { rows.min(items / 2) },
        tiles: blocks_size(room.tiles),
        groups: rows.min(rows.div_ceil(GROUP_ROWS) + loops - 1),
    }
}

/// Limits of the sections that get graphs.
#[derive(Clone, Copy, Debug)]
pub struct SectionLimits {
    /// Maximum number of rows.
    pub rows: usize,
    /// Maximum number of sequences with a row that attends separately.
    pub sequences: usize,
    /// Positions of a sequence, if the rows attend.
    pub positions: Option<usize>,
    /// Loops of the model.
    pub loops: usize,
}

impl SectionLimits {
    /// The padded rooms of all sections within these limits.
    pub fn rooms(&self) -> Vec<Room> {
        let (mut rooms, mut before, most_rows) = (Vec::new(), 0, self.rows.min(MOST_ROWS));
        while before < most_rows {
            let rows = rows_size(before + 1);
            self.push_rooms(before, rows, &mut rooms);
            before = rows;
        }
        rooms
    }

    /// Appends the rooms of sections of more than `before` rows, up to `rows`.
    fn push_rooms(&self, before: usize, rows: usize, rooms: &mut Vec<Room>) {
        let &Self { sequences, loops, .. } = self;
        let mut push = |items, joins, tiles| rooms.push(padded(Room { rows, items, joins, tiles, groups: 0 }, loops));
        let Some(positions) = self.positions else { return push(0, 0, 0) };
        let splits = positions.div_ceil(SPLIT);
        let separate = rows.min(sequences);
        for (fewer_items, items) in blocks_sizes(separate * splits) {
            for (fewer_tiles, tiles) in blocks_sizes((rows / 2).min(rows.div_ceil(QUERIES) + sequences)) {
                // A tile has two rows or more on average, a row that attends separately one split or more.
                let in_tiles = if tiles > 0 { 2 * (fewer_tiles + 1) } else { 0 };
                let fewest_splits = if items > 0 { fewer_items + 1 } else { 0 };
                let with_splits = fewest_splits.div_ceil(splits);
                let most = items.min(separate) + QUERIES * tiles;
                if with_splits + in_tiles > rows || most <= before {
                    continue;
                }
                // Without joins, each of these rows has one split.
                if fewest_splits + in_tiles <= rows {
                    push(items, 0, tiles);
                }
                if splits > 1 && items > 0 {
                    push(items, 1, tiles);
                }
            }
        }
    }
}

/// Zero and the sizes of blocks up to that of `most`, each after the size before it.
fn blocks_sizes(most: usize) -> Vec<(usize, usize)> {
    let mut sizes = vec![(0, 0)];
    while sizes[sizes.len() - 1].1 < most {
        let before = sizes[sizes.len() - 1].1;
        sizes.push((before, blocks_size(before + 1)));
    }
    sizes
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn sizes_hold_what_is_padded_to_them() {
        assert_eq!([1, 8, 9, 16, 17, 500].map(rows_size), [1, 8, 10, 16, 20, 512]);
        assert_eq!([0, 1, 4, 5, 16, 17, 65].map(blocks_size), [0, 4, 4, 16, 16, 64, 256]);
    }

    #[test]
    fn every_section_within_the_limits_has_a_graph_of_its_size() {
        const LOOPS: usize = 3;
        let limits = SectionLimits { rows: 40, sequences: 12, positions: Some(600), loops: LOOPS };
        let known: HashSet<Room> = limits.rooms().into_iter().collect();
        assert_eq!(known.len(), limits.rooms().len(), "no room twice");
        // All sections of `single` rows with `long` of them in two or three splits, and chunks of equal lengths.
        for single in 0..=12_usize {
            for long in 0..=single {
                for splits in 2..=3 {
                    for chunks in 0..=4_usize {
                        for of_chunk in 2..=20_usize {
                            let rows = single + chunks * of_chunk;
                            if rows == 0 || rows > 40 {
                                continue;
                            }
                            let room = Room {
                                rows,
                                items: single - long + long * splits,
                                joins: long,
                                tiles: chunks * of_chunk.div_ceil(QUERIES),
                                groups: 0,
                            };
                            assert!(known.contains(&padded(room, LOOPS)), "{room:?}");
                        }
                    }
                }
            }
        }
        let heads = SectionLimits { positions: None, ..limits };
        assert!(heads.rooms().iter().all(|room| room.items + room.tiles + room.joins == 0));
    }
}
