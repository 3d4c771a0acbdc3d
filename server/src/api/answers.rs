//! Answers in OpenAI's form: whole, and in chunks.

use std::time::{SystemTime, UNIX_EPOCH};

use engine::{Chosen, Tokenizer};
use serde::Serialize;
use serde_json::{Value, json};

use crate::worker::{Finish, Generated};

/// Which of the two interfaces answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Completion,
    Chat,
}

/// What all answers to one request begin with.
#[derive(Clone, Debug)]
pub(crate) struct Heading {
    kind: Kind,
    id: String,
    created: u64,
    model: String,
}

/// A part of a choice: text, with the tokens that it came from. A whole choice is one part.
#[derive(Clone, Debug, Default)]
pub(crate) struct Part {
    pub text: String,
    pub tokens: Vec<Generated>,
    /// Tokens of the prompt that were found in the prefix cache, as far as this part says it.
    pub cached_tokens: usize,
    /// Length in characters of the text before.
    pub offset: usize,
    pub finish: Option<Finish>,
}

impl Part {
    /// Appends the part that follows.
    pub fn append(&mut self, mut next: Self) {
        self.text += &next.text;
        self.tokens.append(&mut next.tokens);
        self.cached_tokens += next.cached_tokens;
        self.finish = next.finish;
    }
}

/// Tokens of prompts and outputs.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    pub prompt_tokens: usize,
    /// Those that the first choice of each prompt found in the prefix cache.
    pub cached_tokens: usize,
    pub completion_tokens: usize,
}

impl Usage {
    fn json(self) -> Value {
        let Self { prompt_tokens, cached_tokens, completion_tokens } = self;
        json!({
            "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
            "prompt_tokens_details": {"cached_tokens": cached_tokens},
        })
    }
}

/// An answer or a chunk of one. It is written without a tree of values between, since there is one for each token.
#[derive(Debug, Serialize)]
pub(crate) struct Answer<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: Vec<Choice<'a>>,
    usage: Option<Value>,
}

#[derive(Debug, Serialize)]
struct Choice<'a> {
    index: usize,
    #[serde(flatten)]
    content: Content<'a>,
    finish_reason: Option<&'static str>,
    logprobs: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    depthwise: Option<Own>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "snake_case")]
enum Content<'a> {
    Text(&'a str),
    Message(Message<'a>),
    Delta(Message<'a>),
}

#[derive(Debug, Serialize)]
struct Message<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    role: Option<&'static str>,
    content: &'a str,
}

/// What only this server says, by token.
#[derive(Debug, Serialize)]
struct Own {
    depths: Vec<u8>,
    signals: Vec<Option<f32>>,
    token_ids: Vec<u32>,
}

impl Own {
    fn of(tokens: &[Generated]) -> Self {
        Self {
            depths: tokens.iter().map(|token| token.depth).collect(),
            signals: tokens.iter().map(|token| token.signal).collect(),
            token_ids: tokens.iter().map(|token| token.token).collect(),
        }
    }
}

/// The role of who answers in a chat.
const ASSISTANT: Option<&str> = Some("assistant");

impl Heading {
    pub fn new(kind: Kind, number: u64, model: &str) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:x}-{number}", since_1970.as_micros());
        Self { kind, id, created: since_1970.as_secs(), model: model.to_owned() }
    }

    fn answer<'a>(&'a self, object: &'static str, choices: Vec<Choice<'a>>, usage: Option<Usage>) -> Answer<'a> {
        let Self { id, created, model, .. } = self;
        Answer { id, object, created: *created, model, choices, usage: usage.map(Usage::json) }
    }

    /// The whole answer.
    pub fn whole<'a>(&'a self, choices: &'a [Part], usage: Usage, tokenizer: &Tokenizer) -> Answer<'a> {
        let choice = |(index, part): (usize, &'a Part)| {
            let content = match self.kind {
                Kind::Completion => Content::Text(&part.text),
                Kind::Chat => Content::Message(Message { role: ASSISTANT, content: &part.text }),
            };
            self.choice(index, content, part, tokenizer)
        };
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        self.answer(object, choices.iter().enumerate().map(choice).collect(), Some(usage))
    }

    /// A chunk with a part of a choice.
    pub fn chunk<'a>(&'a self, index: usize, part: &'a Part, tokenizer: &Tokenizer) -> Answer<'a> {
        let content = match self.kind {
            Kind::Completion => Content::Text(&part.text),
            Kind::Chat => Content::Delta(Message { role: None, content: &part.text }),
        };
        self.answer(self.chunk_object(), vec![self.choice(index, content, part, tokenizer)], None)
    }

    /// The chunk that a choice of a chat begins with; `None` in completions.
    pub fn first_chunk(&self, index: usize) -> Option<Answer<'_>> {
        let content = Content::Delta(Message { role: ASSISTANT, content: "" });
        let choice = Choice { index, content, finish_reason: None, logprobs: None, depthwise: None };
        (self.kind == Kind::Chat).then(|| self.answer(self.chunk_object(), vec![choice], None))
    }

    /// The chunk that a stream ends with.
    pub fn usage_chunk(&self, usage: Usage) -> Answer<'_> {
        self.answer(self.chunk_object(), Vec::new(), Some(usage))
    }

    fn chunk_object(&self) -> &'static str {
        if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn choice<'a>(&self, index: usize, content: Content<'a>, part: &Part, tokenizer: &Tokenizer) -> Choice<'a> {
        Choice {
            index,
            content,
            finish_reason: part.finish.map(Finish::name),
            logprobs: self.logprobs(part, tokenizer),
            depthwise: Some(Own::of(&part.tokens)),
        }
    }

    /// Log-probabilities of the tokens of the text, if they are kept.
    fn logprobs(&self, part: &Part, tokenizer: &Tokenizer) -> Option<Value> {
        let of_text = part.tokens.iter().filter(|token| token.is_text);
        let chosen: Vec<&Chosen> = of_text.filter_map(|token| token.chosen.as_ref()).collect();
        if part.tokens.iter().all(|token| token.chosen.is_none()) {
            return None;
        }
        let text = |token: u32| tokenizer.decode(&[token]).unwrap_or_default();
        if self.kind == Kind::Chat {
            let one = |token: u32, logprob: f32| {
                let text = text(token);
                json!({"token": text, "logprob": logprob, "bytes": text.as_bytes()})
            };
            let content = chosen.into_iter().map(|chosen| {
                let mut token = one(chosen.token, chosen.log_probability);
                token["top_logprobs"] = chosen.alternatives.iter().map(|&(token, log)| one(token, log)).collect();
                token
            });
            return Some(json!({"content": content.collect::<Vec<_>>()}));
        }
        let top = |chosen: &&Chosen| {
            let alternatives = chosen.alternatives.iter().map(|&(token, log)| (text(token), json!(log)));
            Value::Object(alternatives.collect())
        };
        let tokens: Vec<String> = chosen.iter().map(|chosen| text(chosen.token)).collect();
        let mut end = part.offset;
        let offsets = tokens.iter().map(|token| {
            let start = end;
            end += token.chars().count();
            start
        });
        Some(json!({
            "text_offset": offsets.collect::<Vec<_>>(),
            "token_logprobs": chosen.iter().map(|chosen| chosen.log_probability).collect::<Vec<_>>(),
            "top_logprobs": chosen.iter().map(top).collect::<Vec<_>>(),
            "tokens": tokens,
        }))
    }
}
