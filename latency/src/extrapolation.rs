//! Counts of times that were asked for beyond the measured grid.

use std::fmt;

use traces::Component;

/// How often, and how far, a run asked for times beyond the measured grid, by component.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Extrapolations {
    by_component: [Extrapolation; Component::ALL.len()],
}

/// Uses of one component beyond its measured grid.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extrapolation {
    /// Number of uses.
    pub count: u64,
    /// Largest number of rows asked for.
    pub rows: u32,
    /// Longest history asked for, in tokens.
    pub kv_tokens: u32,
}

impl Extrapolations {
    #[cold]
    pub(crate) fn count(&mut self, component: Component, rows: u32, kv_tokens: u32) {
        let entry = &mut self.by_component[component as usize];
        entry.count += 1;
        entry.rows = entry.rows.max(rows);
        entry.kv_tokens = entry.kv_tokens.max(kv_tokens);
    }

    /// Adds the extrapolations of another run.
    pub fn merge(&mut self, other: &Self) {
        for (entry, other) in self.by_component.iter_mut().zip(&other.by_component) {
            entry.count += other.count;
            entry.rows = entry.rows.max(other.rows);
            entry.kv_tokens = entry.kv_tokens.max(other.kv_tokens);
        }
    }

    /// The components that were extrapolated, with their uses.
    pub fn iter(&self) -> impl Iterator<Item = (Component, Extrapolation)> {
        Component::ALL.into_iter().zip(self.by_component).filter(|(_, entry)| entry.count > 0)
    }

    /// Whether every time asked for was within the measured grid.
    pub fn is_empty(&self) -> bool {
        self.iter().next().is_none()
    }
}

/// One line for each extrapolated component; empty without one.
impl fmt::Display for Extrapolations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, (component, Extrapolation { count, rows, kv_tokens })) in self.iter().enumerate() {
            let separator = if i == 0 { "" } else { "\n" };
            write!(
                f,
                "{separator}{component}: extrapolated beyond the profile {count} times, up to {rows} rows and {kv_tokens} tokens of history"
            )?;
        }
        Ok(())
    }
}
