//! Latency profiles that ship with the program, and where any profile is found.
//!
//! A profile is named by the path of its folder, or, where there is none, by the name of one that ships:
//! `DEVICE/MODEL`, as in the folder `profiles/` of the repository.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use traces::{LatencyProfile, TraceError};

use crate::results::ResultsFolder;

/// Where a latency profile comes from: `origin.yaml` beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Origin {
    /// Day of the measurement, as `2026-11-27`.
    pub date: String,
    /// The device, as well as it is known.
    pub device: String,
    /// The model, and where it comes from.
    pub model: String,
    /// The command that measured.
    pub command: String,
}

/// The file that holds an [`Origin`].
pub const ORIGIN: &str = "origin.yaml";

/// A latency profile that ships with the program.
#[derive(Debug, PartialEq, Eq)]
pub struct ShippedProfile {
    name: &'static str,
    /// The texts of [`FILES`](Self::FILES).
    files: [&'static str; 3],
}

include!(concat!(env!("OUT_DIR"), "/profiles.rs"));

impl ShippedProfile {
    /// The files of a profile that ship with the program.
    const FILES: [&str; 3] = [ORIGIN, "profile.yaml", "latency.csv"];

    /// Every profile that ships, in order of name.
    pub fn all() -> &'static [Self] {
        SHIPPED
    }

    /// The profile of this name.
    pub fn of_name(name: &Path) -> Option<&'static Self> {
        Self::all().iter().find(|profile| Path::new(profile.name) == name)
    }

    /// `DEVICE/MODEL`.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The names of its files, and their texts.
    pub fn files(&self) -> impl Iterator<Item = (&'static str, &'static str)> {
        Self::FILES.into_iter().zip(self.files)
    }

    /// Where it comes from.
    ///
    /// # Errors
    /// If it does not read.
    pub fn origin(&self) -> Result<Origin> {
        serde_yaml::from_str(self.files[0]).with_context(|| format!("{}/{ORIGIN}", self.name))
    }

    /// The profile.
    ///
    /// # Errors
    /// If it does not read.
    pub fn read(&self) -> Result<LatencyProfile> {
        let [_, meta, points] = self.files;
        let read = || {
            let points = csv::Reader::from_reader(points.as_bytes()).into_deserialize().collect::<Result<_, _>>()?;
            Ok::<_, anyhow::Error>(LatencyProfile { meta: serde_yaml::from_str(meta)?, points, mixed_attention: None })
        };
        read().with_context(|| self.name.to_owned())
    }

    /// Writes its files into a new folder of results.
    ///
    /// # Errors
    /// If `target` holds anything else, or cannot be written.
    pub fn write(&self, target: &Path) -> Result<()> {
        let mut folder = ResultsFolder::create(target, "profiles")?;
        let written = folder.path()?;
        self.files().try_for_each(|(file, text)| std::fs::write(written.join(file), text))?;
        folder.finish()
    }
}

/// Where a latency profile is found.
#[derive(Debug, PartialEq, Eq)]
pub enum Found {
    /// In a folder.
    Folder(PathBuf),
    /// Among those that ship.
    Shipped(&'static ShippedProfile),
}

/// Most names that an error lists.
const NEAREST: usize = 3;

impl Found {
    /// Finds a profile by its path, relative to `base`, or else by the name of one that ships.
    ///
    /// # Errors
    /// If there is neither; the message has the names that are nearest.
    pub fn find(base: &Path, profile: &Path) -> Result<Self> {
        let folder = base.join(profile);
        if folder.exists() {
            return Ok(Self::Folder(folder));
        }
        if let Some(shipped) = ShippedProfile::of_name(profile) {
            return Ok(Self::Shipped(shipped));
        }
        let asked = profile.to_string_lossy();
        let mut names: Vec<&str> = ShippedProfile::all().iter().map(ShippedProfile::name).collect();
        names.sort_by(|a, b| strsim::jaro_winkler(&asked, b).total_cmp(&strsim::jaro_winkler(&asked, a)));
        let nearest = names[..names.len().min(NEAREST)].join(", ");
        let source = std::io::ErrorKind::NotFound.into();
        let missing = TraceError::Io { action: "read", path: folder.join("profile.yaml"), source };
        Err(missing).with_context(|| {
            format!(
                "{}: no such folder, and no latency profile of this name ships; the nearest are {nearest} (`depthwise \
                 profiles` lists all)",
                folder.display()
            )
        })
    }

    /// The profile.
    ///
    /// # Errors
    /// If it does not read.
    pub fn read(&self) -> Result<LatencyProfile> {
        match self {
            Self::Folder(folder) => Ok(LatencyProfile::read(folder)?),
            Self::Shipped(shipped) => shipped.read(),
        }
    }
}

/// Reads a profile by its path, relative to `base`, or by the name of one that ships.
///
/// # Errors
/// If there is none, or it does not read.
pub fn read_profile(base: &Path, profile: &Path) -> Result<LatencyProfile> {
    Found::find(base, profile)?.read()
}

/// A path relative to `base` as one that is relative to nothing else; the name of a profile that ships stays as it is.
pub fn based(base: &Path, profile: PathBuf) -> PathBuf {
    match Found::find(base, &profile) {
        Ok(Found::Shipped(_)) => profile,
        _ => base.join(profile),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../profiles")
    }

    #[test]
    fn what_ships_is_what_the_repository_holds() {
        assert!(!ShippedProfile::all().is_empty());
        for shipped in ShippedProfile::all() {
            let folder = root().join(shipped.name());
            assert_eq!(shipped.read().unwrap(), LatencyProfile::read(&folder).unwrap(), "{}", shipped.name());
            for (file, text) in shipped.files() {
                assert_eq!(std::fs::read_to_string(folder.join(file)).unwrap(), text, "{}/{file}", shipped.name());
            }
            let Origin { date, device, model, command } = shipped.origin().unwrap();
            assert!(jiff::civil::Date::strptime("%Y-%m-%d", &date).is_ok(), "{}: {date}", shipped.name());
            assert!(command.starts_with("depthwise "), "{}: {command}", shipped.name());
            assert!(!device.is_empty() && !model.is_empty(), "{}", shipped.name());
        }
    }

    #[test]
    fn a_device_takes_three_megabytes_at_most_pass_logs_included() {
        for device in std::fs::read_dir(root()).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
            let (mut bytes, mut folders) = (0, vec![device.path()]);
            while let Some(folder) = folders.pop() {
                for entry in std::fs::read_dir(folder).unwrap().flatten() {
                    match entry.metadata().unwrap() {
                        data if data.is_dir() => folders.push(entry.path()),
                        data => bytes += data.len(),
                    }
                }
            }
            assert!(bytes <= 3_000_000, "{}: {bytes} bytes", device.path().display());
        }
    }

    #[test]
    fn a_folder_wins_over_a_name_and_another_name_is_told_the_nearest() {
        let folder = tempfile::tempdir().unwrap();
        let shipped = &ShippedProfile::all()[0];
        let name = Path::new(shipped.name());
        assert_eq!(Found::find(folder.path(), name).unwrap(), Found::Shipped(shipped));
        assert_eq!(based(folder.path(), name.to_owned()), name);
        std::fs::create_dir_all(folder.path().join(name)).unwrap();
        assert_eq!(Found::find(folder.path(), name).unwrap(), Found::Folder(folder.path().join(name)));
        assert_eq!(based(folder.path(), name.to_owned()), folder.path().join(name));
        let wrong = shipped.name().replacen('-', "", 1) + "x";
        let error = Found::find(folder.path(), Path::new(&wrong)).unwrap_err().to_string();
        assert!(error.contains("no latency profile of this name ships; the nearest are"), "{error}");
        assert!(error.contains(&format!("nearest are {}", shipped.name())), "{error}");
    }

    #[test]
    fn what_is_written_is_a_profile_with_its_origin() {
        let folder = tempfile::tempdir().unwrap();
        for shipped in ShippedProfile::all() {
            let target = folder.path().join(shipped.name());
            shipped.write(&target).unwrap();
            assert_eq!(LatencyProfile::read(&target).unwrap(), shipped.read().unwrap());
            let origin: Origin = traces::table::read_yaml(&target.join(ORIGIN)).unwrap();
            assert_eq!(origin, shipped.origin().unwrap());
        }
    }
}
