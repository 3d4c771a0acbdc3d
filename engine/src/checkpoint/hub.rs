//! Checkpoints from the Hugging Face hub, by way of its cache on this machine.

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use hf_hub::api::sync::{Api, ApiBuilder};
use hf_hub::{Cache, CacheRepo};

use super::{CheckpointError, INDEX_FILE, Result, gguf, indexed_files};
use crate::weights::{CONFIG_FILE, TENSORS_FILE, TOKENIZER_FILE};

/// Reads a variable of the environment.
type Environment<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// Fetches `owner/model`, or one file of it by `owner/model/file.gguf`, and says where it is.
pub(super) fn fetch(name: &Path) -> Result<PathBuf> {
    fetch_in(&|variable| std::env::var_os(variable).filter(|value| !value.is_empty()), std::env::home_dir(), name)
}

/// Fetches a model as `environment` says, for a user whose home directory is `home`.
fn fetch_in(environment: Environment<'_>, home: Option<PathBuf>, name: &Path) -> Result<PathBuf> {
    let not_found = |note: String| CheckpointError::NotFound { name: name.display().to_string(), note };
    let model = HubName::of(name).ok_or_else(|| not_found(String::new()))?;
    let Some(folders) = Folders::of(environment, home) else {
        let why = "and no home directory for the cache of the Hugging Face hub; set HF_HOME to have one";
        return Err(not_found(format!(", {why}")));
    };
    let cache = Cache::new(folders.hub.clone());
    if is_on(environment, "HF_HUB_OFFLINE") || is_on(environment, "TRANSFORMERS_OFFLINE") {
        let cached: CacheRepo = cache.model(model.repository.clone());
        let why = format!("not in the cache {}, and HF_HUB_OFFLINE forbids to ask the hub", folders.hub.display());
        return model.fetch(|file| cached.get(file).ok_or_else(|| not_found(format!(", {file} is {why}"))));
    }
    let token = environment("HF_TOKEN").map(|token| token.to_string_lossy().into_owned());
    let token = token.or_else(|| std::fs::read_to_string(&folders.token).ok()).map(|token| token.trim().to_owned());
    let mut builder = ApiBuilder::from_cache(cache).with_token(token);
    if let Some(endpoint) = environment("HF_ENDPOINT") {
        builder = builder.with_endpoint(endpoint.to_string_lossy().into_owned());
    }
    model.fetch_with(&builder.build().map_err(|error| refused(&model.repository, error))?)
}

/// Whether a variable is set to one of the words for yes that the hub's own client knows.
fn is_on(environment: Environment<'_>, variable: &str) -> bool {
    let value = environment(variable).map(|value| value.to_string_lossy().to_uppercase());
    value.is_some_and(|value| ["1", "ON", "YES", "TRUE"].contains(&value.as_str()))
}

/// Where the hub's client keeps things, by the variables that its own documentation names.
struct Folders {
    hub: PathBuf,
    token: PathBuf,
}

impl Folders {
    fn of(environment: Environment<'_>, home: Option<PathBuf>) -> Option<Self> {
        let path = |variable| environment(variable).map(PathBuf::from);
        let cache = || path("XDG_CACHE_HOME").or(home.map(|home| home.join(".cache")));
        let own = path("HF_HOME").or_else(|| Some(cache()?.join("huggingface")));
        let within = |name| own.as_ref().map(|own| own.join(name));
        let hub = path("HF_HUB_CACHE").or_else(|| path("HUGGINGFACE_HUB_CACHE")).or_else(|| within("hub"))?;
        let token = path("HF_TOKEN_PATH").or_else(|| within("token")).unwrap_or_default();
        Some(Self { hub, token })
    }
}

/// A name that the hub could know.
struct HubName {
    /// `owner/model`.
    repository: String,
    /// A GGUF file of it.
    file: Option<String>,
}

impl HubName {
    /// The name, unless it can only be a path: from the root or the folders above, or to a file that is no GGUF.
    fn of(name: &Path) -> Option<Self> {
        let text = name.to_str().filter(|text| !text.ends_with('/'))?;
        let part = |part: Component| match part {
            Component::Normal(part) => part.to_str().map(str::to_owned),
            _ => None,
        };
        let parts: Vec<String> = name.components().map(part).collect::<Option<_>>()?;
        let is_word = |text: &str| {
            let plain = |character: char| character.is_ascii_alphanumeric() || "-_.".contains(character);
            text.chars().all(plain) && !text.starts_with(['-', '.']) && !text.ends_with(['-', '.'])
        };
        let is_file = [".gguf", ".safetensors", ".json", ".bin", ".pt", ".pth"].iter().any(|end| text.ends_with(end));
        let (owner, model) = (parts.first()?, parts.get(1)?);
        let file = match &parts[2..] {
            [] if !is_file => None,
            file @ [_, ..] if text.ends_with(".gguf") => Some(file.join("/")),
            _ => return None,
        };
        (is_word(owner) && is_word(model)).then(|| Self { repository: format!("{owner}/{model}"), file })
    }

    fn fetch_with(&self, api: &Api) -> Result<PathBuf> {
        let model = api.model(self.repository.clone());
        self.fetch(|file| model.get(file).map_err(|error| refused(&self.repository, error)))
    }

    /// Gets the files, and says which file or folder they are.
    fn fetch(&self, get: impl Fn(&str) -> Result<PathBuf>) -> Result<PathBuf> {
        let Some(file) = &self.file else { return fetch_folder(get) };
        for part in gguf::parts_by_name(file).into_iter().flatten() {
            get(&part)?;
        }
        get(file)
    }
}

fn refused(name: &str, error: impl ToString) -> CheckpointError {
    CheckpointError::Hub { name: name.to_owned(), message: error.to_string() }
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

    /// A cache that holds `files` of owner/model, and no way to the hub.
    fn cached(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let model = folder.path().join("hub/models--owner--model");
        std::fs::create_dir_all(model.join("refs")).unwrap();
        std::fs::create_dir_all(model.join("snapshots/1234")).unwrap();
        std::fs::write(model.join("refs/main"), "1234").unwrap();
        for (name, text) in files {
            std::fs::write(model.join("snapshots/1234").join(name), text).unwrap();
        }
        folder
    }

    /// Fetches a model where `variables` are all that is set.
    fn fetch_with(variables: &[(&str, &Path)], name: &str) -> Result<PathBuf> {
        let variable =
            |name: &str| variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).into());
        fetch_in(&variable, None, Path::new(name))
    }

    const NOWHERE: (&str, &str) = ("HF_ENDPOINT", "http://127.0.0.1:9");

    #[test]
    fn what_the_cache_holds_is_not_asked_of_the_hub() {
        let index = r#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#;
        let parts = [(INDEX_FILE, index), ("1.safetensors", ""), ("2.safetensors", ""), ("m.gguf", "")];
        let files = [&[(CONFIG_FILE, "{}"), (TOKENIZER_FILE, "{}")], &parts[..]].concat();
        let folder = cached(&files);
        let snapshot = folder.path().join("hub/models--owner--model/snapshots/1234");
        let hub = folder.path().join("hub");
        let (nowhere, one) = ((NOWHERE.0, Path::new(NOWHERE.1)), Path::new("1"));
        let variables: [&[(&str, &Path)]; 4] = [
            &[("HF_HOME", folder.path()), nowhere],
            &[("HF_HUB_CACHE", &hub), nowhere],
            &[("HF_HOME", Path::new("/nowhere")), ("HF_HUB_CACHE", &hub), nowhere],
            &[("HF_HOME", folder.path()), ("HF_HUB_OFFLINE", one)],
        ];
        for variables in variables {
            assert_eq!(fetch_with(variables, "owner/model").unwrap(), snapshot);
            assert_eq!(fetch_with(variables, "owner/model/m.gguf").unwrap(), snapshot.join("m.gguf"));
        }
    }

    #[test]
    fn parts_of_a_split_file_are_fetched_with_it() {
        let folder = cached(&[("m-00001-of-00002.gguf", "")]);
        let variables = [("HF_HOME", folder.path()), ("HF_HUB_OFFLINE", Path::new("1"))];
        let message = fetch_with(&variables, "owner/model/m-00001-of-00002.gguf").unwrap_err().to_string();
        assert!(message.contains("m-00002-of-00002.gguf is not in the cache"), "{message}");
    }

    #[test]
    fn what_nobody_has_is_refused_by_name() {
        let folder = cached(&[(CONFIG_FILE, "{}"), (TOKENIZER_FILE, "{}")]);
        let variables = [("HF_HOME", folder.path()), (NOWHERE.0, Path::new(NOWHERE.1))];
        for name in ["owner/model", "nobody/nothing", "owner/model/m.gguf"] {
            let message = fetch_with(&variables, name).unwrap_err().to_string();
            assert!(message.contains(": no such file or folder, and the Hugging Face hub"), "{message}");
        }
    }

    #[test]
    fn names_that_can_only_be_paths_are_not_asked_of_the_hub() {
        for name in ["no-such-folder", "./a/b", "/a/b", "../a/b", "a/b/", "models/m.gguf", "a/b/c", "a/m.safetensors"] {
            let message = fetch_with(&[], name).unwrap_err().to_string();
            assert_eq!(message, format!("{name}: no such file or folder"));
        }
    }

    #[test]
    fn without_a_home_the_remedy_is_named() {
        let message = fetch_with(&[], "owner/model").unwrap_err().to_string();
        assert!(
            message.contains("owner/model: no such file or folder") && message.contains("set HF_HOME"),
            "{message}"
        );
        let offline = [("HF_HOME", Path::new("/nowhere")), ("HF_HUB_OFFLINE", Path::new("on"))];
        let message = fetch_with(&offline, "owner/model").unwrap_err().to_string();
        assert!(message.contains("config.json is not in the cache /nowhere/hub"), "{message}");
        assert!(message.contains("HF_HUB_OFFLINE"), "{message}");
    }
}
