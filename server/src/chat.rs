//! The prompt of a chat: a model's own Jinja template over the messages.

use std::path::{Path, PathBuf};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, ErrorKind};
use serde_json::{Value, json};

use crate::api::error::ApiError;
use crate::api::fields::shown;

/// Why a template cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The file does not read.
    #[error("{}: cannot read it: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is no JSON.
    #[error("{}: found no JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: serde_json::Error,
    },
    /// The template is not Jinja.
    #[error("{}: found no chat template: {source:#}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// What the parser said.
        source: minijinja::Error,
    },
}

/// A chat template, with the texts that it calls `bos_token` and `eos_token`.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    bos: String,
    eos: String,
}

const CONFIG: &str = "tokenizer_config.json";
const NAME: &str = "chat";

impl ChatTemplate {
    /// The template of a model's folder, from `chat_template.jinja` or `tokenizer_config.json`; `None` if it has none.
    ///
    /// # Errors
    /// If a file does not read, or is no template.
    pub fn of_model(folder: &Path) -> Result<Option<Self>, TemplateError> {
        let config = read_config(folder)?;
        let path = folder.join("chat_template.jinja");
        if path.is_file() {
            return Self::read_with(&path, &config).map(Some);
        }
        let template = match &config["chat_template"] {
            Value::Array(named) => named.iter().find(|one| one["name"] == "default").map(|one| &one["template"]),
            other => Some(other),
        };
        let Some(source) = template.and_then(Value::as_str) else { return Ok(None) };
        Self::new(&folder.join(CONFIG), source.to_owned(), &config).map(Some)
    }

    /// A template from a file of its own, for the model in a folder.
    ///
    /// # Errors
    /// As [`of_model`](Self::of_model).
    pub fn read(path: &Path, folder: &Path) -> Result<Self, TemplateError> {
        Self::read_with(path, &read_config(folder)?)
    }

    fn read_with(path: &Path, config: &Value) -> Result<Self, TemplateError> {
        let source = std::fs::read_to_string(path);
        Self::new(path, source.map_err(|source| TemplateError::Read { path: path.to_owned(), source })?, config)
    }

    fn new(path: &Path, source: String, config: &Value) -> Result<Self, TemplateError> {
        let mut environment = Environment::new();
        // As transformers does it.
        environment
            .set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().expect("it is Jinja"));
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        let added = environment.add_template_owned(NAME, source);
        added.map_err(|source| TemplateError::Syntax { path: path.to_owned(), source })?;
        let token = |key: &str| {
            let value = &config[key];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
        };
        Ok(Self { environment, bos: token("bos_token"), eos: token("eos_token") })
    }

    /// The prompt that asks for the answer to some messages.
    ///
    /// # Errors
    /// If a message is not one of texts, or the template refuses the messages.
    pub(crate) fn render(&self, messages: &[Value]) -> Result<String, ApiError> {
        let messages = messages.iter().enumerate().map(|(place, message)| of_texts(place, message));
        let messages: Vec<Value> = messages.collect::<Result<_, _>>()?;
        let template = self.environment.get_template(NAME).expect("it was added");
        let context = json!({
            "messages": messages, "bos_token": self.bos, "eos_token": self.eos, "add_generation_prompt": true,
        });
        template
            .render(Serde(&context))
            .map_err(|error| ApiError::invalid(format!("messages: the model's chat template refuses them: {error}")))
    }
}

fn read_config(folder: &Path) -> Result<Value, TemplateError> {
    let path = folder.join(CONFIG);
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let bytes = std::fs::read(&path).map_err(|source| TemplateError::Read { path: path.clone(), source })?;
    serde_json::from_slice(&bytes).map_err(|source| TemplateError::Json { path, source })
}

/// A message whose content is one text.
fn of_texts(place: usize, message: &Value) -> Result<Value, ApiError> {
    let name = |key: &str| format!("messages[{place}]{key}");
    if !message["role"].is_string() {
        return Err(ApiError::key(&name(".role"), shown(&message["role"]), "a text, such as user"));
    }
    let content = &message["content"];
    let text = match content {
        Value::String(text) => Some(text.clone()),
        Value::Array(parts) => {
            parts.iter().map(|part| part["text"].as_str().filter(|_| part["type"] == "text")).collect()
        }
        _ => None,
    };
    let text = text.ok_or_else(|| ApiError::key(&name(".content"), shown(content), "a text, or parts of type text"))?;
    let mut message = message.clone();
    message["content"] = Value::String(text);
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(source: &str) -> ChatTemplate {
        let config = json!({"bos_token": {"content": "<s>"}, "eos_token": "</s>", "chat_template": source});
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join(CONFIG), config.to_string()).unwrap();
        ChatTemplate::of_model(folder.path()).unwrap().unwrap()
    }

    const CHATML: &str = "{{ bos_token }}{% for message in messages %}\n{{ '<' + message['role'] + '>' + message.content.strip() }}{% if loop.last %}!{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

    #[test]
    fn messages_become_the_prompt_that_the_models_template_says() {
        let messages = [
            json!({"role": "system", "content": " be brief "}),
            json!({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}),
        ];
        assert_eq!(template(CHATML).render(&messages).unwrap(), "<s><system>be brief<user>ab!<assistant>");
    }

    #[test]
    fn messages_that_a_template_or_the_server_refuses_are_named() {
        let refused = |source: &str, message: Value| {
            let body = template(source).render(&[message]).unwrap_err().body();
            body["error"]["message"].as_str().unwrap().to_owned()
        };
        let user = json!({"role": "user", "content": "a"});
        assert!(refused("{{ raise_exception('no system') }}", user).contains("no system"));
        assert!(refused(CHATML, json!({"content": "a"})).starts_with("messages[0].role: found null"));
        let image = json!({"role": "user", "content": [{"type": "image_url"}]});
        assert!(refused(CHATML, image).starts_with("messages[0].content: found [{\"type\""));
    }

    #[test]
    fn a_template_file_comes_before_the_configuration_and_faults_name_the_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(ChatTemplate::of_model(folder.path()).unwrap().is_none());
        let path = folder.path().join("chat_template.jinja");
        std::fs::write(&path, "{% for %}").unwrap();
        let message = ChatTemplate::of_model(folder.path()).unwrap_err().to_string();
        assert!(message.contains("chat_template.jinja: found no chat template"), "{message}");
        std::fs::write(folder.path().join(CONFIG), "{").unwrap();
        assert!(ChatTemplate::of_model(folder.path()).unwrap_err().to_string().contains("found no JSON"));
    }
}
