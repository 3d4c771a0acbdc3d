//! What a request asks for, read from its keys.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;

use engine::Decoding;
use scheduler::{ExitPolicy, Terms};
use serde::Deserialize;
use serde_json::{Value, json};

use super::error::ApiError;
use super::fields::Fields;

/// Most completions of one HTTP request.
pub(crate) const MOST_CHOICES: usize = 128;
/// Most stop strings, and most bytes of each.
const MOST_STOPS: (usize, usize) = (16, 1024);
/// Most alternatives to each token.
const MOST_ALTERNATIVES: u8 = 20;

/// A prompt, or several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<u32>),
    TokenLists(Vec<Vec<u32>>),
}

/// What both kinds of completions ask for.
#[derive(Debug)]
pub(crate) struct Wishes {
    /// Completions of each prompt.
    pub n: u32,
    /// Most tokens to generate; `None` for the default.
    pub max_tokens: Option<u32>,
    /// How tokens are chosen; without the tokens that end the text.
    pub decoding: Decoding,
    /// Texts at which a completion ends, without them.
    pub stops: Vec<String>,
    /// Tokens at which it ends.
    pub stop_tokens: Vec<u32>,
    /// Whether it goes on after the tokenizer's special tokens.
    pub ignores_special: bool,
    /// Whether the answer comes token by token.
    pub streams: bool,
    /// Whether a stream ends with the usage.
    pub includes_usage: bool,
    /// Exit policy and priority.
    pub terms: Terms,
    /// Name of the session that the request belongs to.
    pub session: Option<String>,
}

/// A request for completions.
#[derive(Debug)]
pub(crate) struct Completion {
    pub prompt: Prompt,
    /// Whether the text begins with the prompt.
    pub echoes: bool,
    pub wishes: Wishes,
}

/// A request for an answer in a chat.
#[derive(Debug)]
pub(crate) struct Chat {
    pub messages: Vec<Value>,
    pub wishes: Wishes,
}

impl Completion {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// If a key is wrong, or asks for what the server does not do.
    pub fn parse(body: &[u8], model: &str, temperature: f32) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let prompt = fields.take("prompt", "a text, a list of texts, a list of token ids, or a list of such lists")?;
        let prompt = prompt.ok_or_else(|| ApiError::key("prompt", "nothing", "a prompt"))?;
        let echoes = fields.take("echo", "true or false")?.unwrap_or(false);
        let expected = format!("a whole number from 0 to {MOST_ALTERNATIVES}");
        let alternatives = fields.take_if("logprobs", &expected, |number: &u8| *number <= MOST_ALTERNATIVES)?;
        fields.take_neutral("best_of", &[json!(1)])?;
        fields.take_neutral("suffix", &[json!("")])?;
        let wishes = Wishes::take(fields, model, temperature, alternatives)?;
        if echoes && alternatives.is_some() {
            return Err(ApiError::key(
                "logprobs",
                "a number beside echo",
                "one of the two: the engine keeps no logits of prompts",
            ));
        }
        Ok(Self { prompt, echoes, wishes })
    }
}

impl Chat {
    /// Reads the body of a request.
    ///
    /// # Errors
    /// As [`Completion::parse`].
    pub fn parse(body: &[u8], model: &str, temperature: f32) -> Result<Self, ApiError> {
        let mut fields = Fields::parse(body)?;
        let messages: Option<Vec<Value>> = fields.take("messages", "a list of messages")?;
        let messages = messages.filter(|messages| !messages.is_empty());
        let messages = messages.ok_or_else(|| ApiError::key("messages", "none", "at least one"))?;
        let keeps = fields.take("logprobs", "true or false")?.unwrap_or(false);
        let expected = format!("a whole number from 0 to {MOST_ALTERNATIVES}");
        let alternatives: Option<u8> =
            fields.take_if("top_logprobs", &expected, |number: &u8| *number <= MOST_ALTERNATIVES)?;
        if alternatives.is_some() && !keeps {
            return Err(ApiError::key("top_logprobs", "a number without logprobs", "\"logprobs\": true"));
        }
        for name in ["tools", "tool_choice", "functions", "function_call", "modalities", "audio", "reasoning_effort"] {
            fields.take_neutral(name, &[json!([]), json!("none"), json!(["text"])])?;
        }
        fields.take_neutral("response_format", &[json!({"type": "text"})])?;
        let wishes = Wishes::take(fields, model, temperature, keeps.then(|| alternatives.unwrap_or(0)))?;
        Ok(Self { messages, wishes })
    }
}

impl Wishes {
    /// Takes the keys that both kinds of completions have, and refuses all others.
    fn take(mut fields: Fields, model: &str, temperature: f32, alternatives: Option<u8>) -> Result<Self, ApiError> {
        let asked: Option<String> = fields.take("model", "the name of a model")?;
        if let Some(asked) = asked.filter(|asked| asked != model) {
            let message = format!("model: found \"{asked}\", expected \"{model}\", the one that is served");
            return Err(ApiError::new(axum::http::StatusCode::NOT_FOUND, message));
        }
        let positive = |number: &u32| *number > 0;
        let n = fields.take_if("n", "a whole number from 1 to 128", |n: &u32| (1..=MOST_CHOICES as u32).contains(n))?;
        let most = fields.take_if("max_tokens", "a whole number of at least 1", positive)?;
        let most_of_chat = fields.take_if("max_completion_tokens", "a whole number of at least 1", positive)?;
        let temperature = fields
            .take_if("temperature", "a number from 0 to 100", |t: &f32| (0.0..=100.0).contains(t))?
            .unwrap_or(temperature);
        let top_p =
            fields.take_if("top_p", "a share above 0 and at most 1", |share: &f32| *share > 0.0 && *share <= 1.0)?;
        let seed: Option<i64> = fields.take("seed", "a whole number of 64 bits")?;
        let seed = seed.map_or_else(|| RandomState::new().build_hasher().finish(), |seed| seed as u64);
        let (min_tokens, stop_tokens) =
            (fields.take("min_tokens", "a whole number")?, fields.take("stop_token_ids", "a list of token ids")?);
        let decoding = Decoding {
            temperature,
            top_p: top_p.unwrap_or(1.0),
            seed,
            min_tokens: min_tokens.unwrap_or(0),
            alternatives,
            withheld: Arc::from([]),
        };
        let mut stream_options = fields.take_object("stream_options")?;
        let includes_usage = stream_options.take("include_usage", "true or false")?.unwrap_or(false);
        stream_options.take_neutral("include_obfuscation", &[json!(false)])?;
        stream_options.finish()?;
        let mut own = fields.take_object("depthwise")?;
        let terms = Terms {
            exit: own.take::<String>("exit", "an exit policy")?.map(|exit| parse_exit(&exit)).transpose()?,
            priority: own.take("priority", "a whole number of 32 bits")?.unwrap_or(0),
        };
        let session =
            own.take_if("session", "a name of 1 to 256 bytes", |name: &String| (1..=256).contains(&name.len()))?;
        own.finish()?;
        let wishes = Self {
            n: n.unwrap_or(1),
            max_tokens: most_of_chat.or(most),
            decoding,
            stops: take_stops(&mut fields)?,
            stop_tokens: stop_tokens.unwrap_or_default(),
            ignores_special: fields.take("ignore_eos", "true or false")?.unwrap_or(false),
            streams: fields.take("stream", "true or false")?.unwrap_or(false),
            includes_usage,
            terms,
            session,
        };
        for name in ["frequency_penalty", "presence_penalty", "min_p"] {
            fields.take_neutral(name, &[json!(0)])?;
        }
        fields.take_neutral("repetition_penalty", &[json!(1)])?;
        fields.take_neutral("top_k", &[json!(-1), json!(0)])?;
        fields.take_neutral("logit_bias", &[json!({})])?;
        fields.take_neutral("skip_special_tokens", &[json!(true)])?;
        fields.take_neutral("include_stop_str_in_output", &[json!(false)])?;
        fields.finish()?;
        Ok(wishes)
    }
}

fn parse_exit(text: &str) -> Result<ExitPolicy, ApiError> {
    text.parse().map_err(|error| ApiError::of_key("depthwise.exit", format!("depthwise.exit: {error}")))
}

/// Takes the texts at which a completion ends.
fn take_stops(fields: &mut Fields) -> Result<Vec<String>, ApiError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Stops {
        One(String),
        Many(Vec<String>),
    }
    let (most, longest) = MOST_STOPS;
    let expected = format!("a text of 1 to {longest} bytes, or a list of at most {most} such texts");
    let is_valid = |stops: &Stops| {
        let fits = |stop: &String| (1..=longest).contains(&stop.len());
        match stops {
            Stops::One(stop) => fits(stop),
            Stops::Many(stops) => stops.len() <= most && stops.iter().all(fits),
        }
    };
    Ok(match fields.take_if("stop", &expected, is_valid)? {
        None => Vec::new(),
        Some(Stops::One(stop)) => vec![stop],
        Some(Stops::Many(stops)) => stops,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn completion(more: &str) -> Result<Completion, String> {
        let body = format!("{{\"prompt\": \"a\"{more}}}");
        let parsed = Completion::parse(body.as_bytes(), "kjv", 1.0);
        parsed.map_err(|error| error.body()["error"]["message"].as_str().unwrap().to_owned())
    }

    #[test]
    fn keys_of_a_completion_are_read_with_their_defaults() {
        let Completion { echoes, wishes, .. } = completion("").unwrap();
        assert!(!echoes && !wishes.streams && wishes.n == 1 && wishes.max_tokens.is_none());
        assert_eq!((wishes.decoding.temperature, wishes.decoding.top_p), (1.0, 1.0));
        let more = r#", "temperature": 0, "stop": ["x"], "max_tokens": 3, "max_completion_tokens": 4, "seed": -1,
            "stream_options": {"include_usage": true}, "depthwise": {"exit": "margin:0.5", "priority": -2, "session": "s"}"#;
        let wishes = completion(more).unwrap().wishes;
        assert_eq!((wishes.max_tokens, wishes.stops, wishes.includes_usage), (Some(4), vec!["x".to_owned()], true));
        assert_eq!((wishes.decoding.temperature, wishes.decoding.seed), (0.0, u64::MAX));
        assert_eq!(wishes.terms, Terms { exit: Some("margin:0.5".parse().unwrap()), priority: -2 });
    }

    #[test]
    fn what_is_not_done_is_refused_by_key() {
        for (more, expected) in [
            (r#", "max_tokens": 0"#, "max_tokens: found 0, expected a whole number of at least 1"),
            (r#", "max_tokens": "9""#, "max_tokens: found \"9\""),
            (r#", "temperature": -1"#, "temperature: found -1"),
            (r#", "temperature": 1e999"#, "the body is no JSON"),
            (r#", "top_p": 0"#, "top_p: found 0"),
            (r#", "n": 129"#, "n: found 129"),
            (r#", "stop": [""]"#, "stop: found [\"\"]"),
            (r#", "logprobs": 21"#, "logprobs: found 21"),
            (r#", "logprobs": 1, "echo": true"#, "logprobs: found a number beside echo"),
            (r#", "frequency_penalty": 0.5"#, "frequency_penalty: found 0.5, expected 0"),
            (r#", "logit_bias": {"5": 1}"#, "logit_bias: found {\"5\":1}, expected {}"),
            (r#", "best_of": 2"#, "best_of: found 2, expected 1"),
            (r#", "model": "gpt""#, "model: found \"gpt\", expected \"kjv\""),
            (r#", "depthwise": {"exit": "sometimes"}"#, "depthwise.exit: "),
            (r#", "depthwise": {"depth": 1}"#, "depthwise.depth: found a key"),
            (r#", "promt": 1"#, "promt: found a key"),
        ] {
            let message = completion(more).unwrap_err();
            assert!(message.starts_with(expected), "{more}: {message}");
        }
        assert!(Completion::parse(b"{}", "kjv", 1.0).unwrap_err().body()["error"]["param"] == "prompt");
        assert!(Completion::parse(br#"{"prompt": {}}"#, "kjv", 1.0).is_err());
        let chat = Chat::parse(br#"{"messages": [{}], "tools": [1]}"#, "kjv", 1.0).unwrap_err().body();
        assert_eq!(chat["error"]["param"], "tools");
    }
}
