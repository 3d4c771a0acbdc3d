//! Embeds the latency profiles of `profiles/`, which so ship with every program that is built with the library. Pass logs
//! and other large files stay in the repository.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The files of a profile that are embedded.
const EMBEDDED: [&str; 3] = ["origin.yaml", "profile.yaml", "latency.csv"];

fn main() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../profiles");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", root.display());
    let mut profiles = Vec::new();
    for device in folders(&root) {
        profiles.extend(folders(&device).into_iter().filter(|folder| folder.join("profile.yaml").exists()));
    }
    let mut code = String::from("const SHIPPED: &[ShippedProfile] = &[\n");
    for folder in profiles {
        let name =
            folder.strip_prefix(&root).expect("it is in that folder").to_str().expect("a name in UTF-8").to_owned();
        let files = EMBEDDED.map(|file| {
            let path = folder.join(file);
            assert!(path.exists(), "{}: expected beside profile.yaml", path.display());
            format!("include_str!({path:?})")
        });
        writeln!(code, "    ShippedProfile {{ name: {name:?}, files: [{}] }},", files.join(", "))
            .expect("no file is written");
    }
    code.push_str("];\n");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets it")).join("profiles.rs");
    std::fs::write(&out, code).unwrap_or_else(|error| panic!("{}: {error}", out.display()));
}

/// The folders in a folder, by name.
fn folders(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut folders: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(|path| path.is_dir()).collect();
    folders.sort();
    folders
}
