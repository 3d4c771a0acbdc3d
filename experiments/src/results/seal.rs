//! Seals: the time at which a file of results was written, and the hash of what it held.

use std::fmt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use jiff::{Timestamp, Unit};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// When a file was written, and what it held.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize)]
pub struct Seal {
    /// The time, in UTC (RFC 3339), to the second.
    pub written_at: String,
    /// SHA-256 of the file, in hexadecimal digits.
    pub sha256: String,
}

impl Seal {
    /// Seals a file that was just written.
    ///
    /// # Errors
    /// If the clock shows no time that can be written.
    pub(super) fn now(contents: &[u8]) -> Result<Self> {
        let written_at = Timestamp::now().round(Unit::Second)?.to_string();
        Ok(Self { written_at, sha256: hash(contents) })
    }

    /// Checks that a file holds what it held when it was sealed.
    ///
    /// # Errors
    /// If it does not, or does not read.
    pub(super) fn check(&self, path: &Path) -> Result<()> {
        let contents = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
        let found = hash(&contents);
        ensure!(
            found == self.sha256,
            "{}: SHA-256 is {found}, expected {}: the file was changed after it was written at {}",
            path.display(),
            self.sha256,
            self.written_at
        );
        Ok(())
    }
}

impl fmt::Display for Seal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "written at {}, SHA-256 {}", self.written_at, self.sha256)
    }
}

fn hash(contents: &[u8]) -> String {
    Sha256::digest(contents).iter().map(|byte| format!("{byte:02x}")).collect()
}
