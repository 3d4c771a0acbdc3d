//! Checkpoints from the Hugging Face hub, by way of its cache on this machine.

use std::path::{Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder};

use super::{CheckpointError, INDEX_FILE, Result, indexed_files};
use crate::weights::{CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE};

/// Fetches `owner/model`, or one file of it by `owner/model/file.gguf`, and says where it is.
pub(super) fn fetch(name: &str) -> Result<PathBuf> {
    let api = ApiBuilder::from_env().build();
    fetch_with(&api.map_err(|error| refused(name, error))?, name)
}

fn refused(name: &str, error: impl ToString) -> CheckpointError {
    CheckpointError::Hub { name: name.to_owned(), message: error.to_string() }
}

fn fetch_with(api: &Api, name: &str) -> Result<PathBuf> {
    let get = |model: String, file: &str| api.model(model).get(file).map_err(|error| refused(name, error));
    match name.splitn(3, '/').collect::<Vec<_>>()[..] {
        [owner, model] => fetch_folder(|file| get(format!("{owner}/{model}"), file)),
        [owner, model, file] if file.ends_with(".gguf") => get(format!("{owner}/{model}"), file),
        _ => Err(refused(name, "it knows models as owner/model, and GGUF files as owner/model/file.gguf")),
    }
}

/// Fetches all that a checkpoint is made of, and says in which folder it lies.
fn fetch_folder(get: impl Fn(&str) -> Result<PathBuf>) -> Result<PathBuf> {
    let config = get(CONFIG_FILE)?;
    get(TOKENIZER_FILE)?;
    if let Err(no_single_file) = get(TENSORS_FILE) {
        let index = get(INDEX_FILE).map_err(|_| no_single_file)?;
        indexed_files(&index)?.iter().try_for_each(|file| get(file).map(drop))?;
    }
    Ok(config.parent().unwrap_or(Path::new("")).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use hf_hub::Cache;

    /// A cache that holds `files` of owner/model, and no way to the hub.
    fn offline(files: &[(&str, &str)]) -> (tempfile::TempDir, Api) {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("models--owner--model");
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::create_dir_all(model.join("snapshots/1234")).unwrap();
        std::fs::write(model.join("refs/main"), "1234").unwrap();
        for (name, text) in files {
            std::fs::write(model.join("snapshots/1234").join(name), text).unwrap();
        }
        let api = ApiBuilder::from_cache(Cache::new(folder.path().to_owned()));
        let api = api.with_endpoint("http://127.0.0.1:9".to_owned()).build().unwrap();
        (folder, api)
    }

    #[test]
    fn what_the_cache_holds_is_not_asked_of_the_hub() {
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let parts = [(INDEX_FILE, index), ("1.safetensors", ""), ("2.safetensors", ""), ("m.gguf", "")];
        let files = [&[(CONFIG_FILE, "{}"), (TOKENIZER_FILE, "{}")], &parts[..]].concat();
        let (folder, api) = offline(&files);
        let snapshot = folder.path().join("models--owner--model/snapshots/1234");
        assert_eq!(fetch_with(&api, "owner/model").unwrap(), snapshot);
        assert_eq!(fetch_with(&api, "owner/model/m.gguf").unwrap(), snapshot.join("m.gguf"));
    }

    #[test]
    fn what_nobody_has_is_refused_by_name() {
        let (_folder, api) = offline(&[(CONFIG_FILE, "{}"), (TOKENIZER_FILE, "{}")]);
        for name in ["owner/model", "nobody/nothing", "owner/model/m.gguf", "no-such-folder"] {
            let message = fetch_with(&api, name).unwrap_err().to_string();
            assert!(message.starts_with(&format!("{name}: no such file or folder")), "{message}");
        }
    }
}
