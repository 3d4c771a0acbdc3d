//! A folder of results that grows while a sweep runs, and that only the same sweep may go on filling.

use std::collections::BTreeMap;
use std::iter;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use simulator::Shard;
use traces::table::{read_yaml, write_yaml};

use super::Earlier;
use super::spec::SweepSpec;
use crate::profiles::Found;
use crate::results::{CONFIG, MARKER, Marker, ResultsFolder};

/// What results are of: the same inputs give the same lines.
#[derive(Clone, Debug, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Inputs {
    /// What is done at each point: the command.
    #[serde(skip)]
    task: String,
    /// Which share of the points the results are of, where several processes divide them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    shard: Option<Shard>,
    /// Program and version.
    program: String,
    /// SHA-256 of what was asked for, as the program understood it.
    asked: String,
    /// SHA-256 of every file that was read, by its path as the configuration has it.
    files: BTreeMap<String, String>,
}

/// The file that holds [`Inputs`].
const INPUTS: &str = "inputs.yaml";

impl Inputs {
    /// Reads everything that the lines of a sweep depend on; `task` says what is done at each point.
    ///
    /// # Errors
    /// If a file does not read.
    pub fn new(spec: &SweepSpec, base: &Path, task: &str) -> Result<Self> {
        let untitled = SweepSpec { title: String::new(), ..spec.clone() };
        let asked = format!("{task}\n{}", serde_yaml::to_string(&untitled)?);
        let lengths = spec.requests.generate.as_ref().and_then(|generate| generate.lengths_from.clone());
        let mut paths: Vec<PathBuf> = spec.requests.file.iter().cloned().chain(lengths).collect();
        let mut files = BTreeMap::new();
        for system in &spec.systems {
            let of_machines = spec.machines_of(system).iter().filter_map(|machine| machine.profile.as_ref());
            for profile in iter::once(&system.profile).chain(of_machines) {
                match Found::find(base, profile)? {
                    Found::Folder(_) => paths.extend(files_in(base, profile)?),
                    Found::Shipped(shipped) => files.extend(
                        shipped
                            .files()
                            .map(|(file, text)| (profile.join(file).display().to_string(), sha256(text.as_bytes()))),
                    ),
                }
            }
            if let Some(exits) = &system.exits {
                paths.extend(files_in(base, exits)?);
            }
        }
        let hashed = |path: PathBuf| {
            let bytes = std::fs::read(base.join(&path))
                .with_context(|| format!("cannot read {}", base.join(&path).display()))?;
            Ok((path.display().to_string(), sha256(&bytes)))
        };
        files.extend(paths.into_iter().map(hashed).collect::<Result<Vec<_>>>()?);
        Ok(Self {
            task: task.to_owned(),
            shard: None,
            program: format!("depthwise {}", env!("CARGO_PKG_VERSION")),
            asked: sha256(asked.as_bytes()),
            files,
        })
    }

    /// The same of a shard's points only.
    pub fn of_shard(self, shard: Shard) -> Self {
        Self { shard: Some(shard), ..self }
    }

    /// What a folder of such results is of, after the name of the program.
    fn kind(&self) -> String {
        match self.shard {
            Some(_) => format!("{} --shard", self.task),
            None => self.task.clone(),
        }
    }

    /// What is not as it was.
    fn difference(&self, earlier: &Self) -> Option<String> {
        if self.program != earlier.program {
            return Some(format!("written by {}, this is {}", earlier.program, self.program));
        }
        if self.asked != earlier.asked {
            return Some("of another configuration".to_owned());
        }
        if let (Some(shard), Some(earlier)) = (self.shard, earlier.shard)
            && shard != earlier
        {
            return Some(format!("of shard {earlier}, this is {shard}"));
        }
        let paths = self.files.keys().chain(earlier.files.keys());
        let changed = paths.into_iter().find(|path| self.files.get(*path) != earlier.files.get(*path));
        changed.map(|path| format!("of another {path}"))
    }
}

/// The files of a folder, by name.
fn files_in(base: &Path, folder: &Path) -> Result<Vec<PathBuf>> {
    let cannot = || format!("cannot read {}", base.join(folder).display());
    let mut files = Vec::new();
    for entry in std::fs::read_dir(base.join(folder)).with_context(cannot)? {
        let entry = entry.with_context(cannot)?;
        if entry.path().is_file() {
            files.push(folder.join(entry.file_name()));
        }
    }
    Ok(files)
}

fn sha256(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Opens a folder for the results of these inputs: a new one, or the one in which they began.
///
/// # Errors
/// If it holds the results of others, another run writes it, or it cannot be written.
pub fn open(target: &Path, spec: &SweepSpec, inputs: &Inputs, earlier: Earlier) -> Result<ResultsFolder> {
    let mut folder = ResultsFolder::open(target, &inputs.kind())?;
    if earlier == Earlier::Remove {
        folder.remove_earlier()?;
    }
    let recorded = target.join(INPUTS);
    let earlier: Option<Inputs> = recorded.exists().then(|| read_yaml(&recorded)).transpose()?;
    if let Some(difference) = earlier.and_then(|earlier| inputs.difference(&earlier)) {
        let shown = target.display();
        bail!("the results in {shown} are {difference}: choose another --out, or --restart to remove them");
    }
    write_yaml(&folder.grow(INPUTS)?, inputs)?;
    write_yaml(&folder.grow(CONFIG)?, spec)?;
    Ok(folder)
}

/// The shard of a sweep of these inputs that a folder holds, whole.
///
/// # Errors
/// If it holds none, one of other inputs, or one that has not ended.
pub fn read_shard(folder: &Path, inputs: &Inputs) -> Result<Shard> {
    let shown = folder.display();
    let expected = "expected the folder of a shard, as `--shard` writes it";
    let marker = Marker::read(folder)?.with_context(|| format!("{shown}: found no {MARKER}, {expected}"))?;
    let recorded = folder.join(INPUTS);
    let there: Option<Inputs> = recorded.exists().then(|| read_yaml(&recorded)).transpose()?;
    let Some((there, shard)) = there.and_then(|there| there.shard.map(|shard| (there, shard))) else {
        bail!("{shown}: found results of `depthwise {}`, {expected}", marker.kind);
    };
    if let Some(difference) = inputs.difference(&there) {
        bail!("{shown}: shard {shard} is {difference}");
    }
    ensure!(marker.complete, "{shown}: shard {shard} has not ended: the command that began it goes on with it");
    Ok(shard)
}
