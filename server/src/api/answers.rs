//! Answers in OpenAI's form: whole, and in chunks.

use std::time::{SystemTime, UNIX_EPOCH};

use engine::{Chosen, Tokenizer};
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

impl Heading {
    pub fn new(kind: Kind, number: u64, model: &str) -> Self {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let prefix = if kind == Kind::Chat { "chatcmpl" } else { "cmpl" };
        let id = format!("{prefix}-{:x}-{number}", since_1970.as_micros());
        Self { kind, id, created: since_1970.as_secs(), model: model.to_owned() }
    }

    fn answer(&self, object: &str, choices: Vec<Value>, usage: Option<Usage>) -> Value {
        let Self { id, created, model, .. } = self;
        json!({
            "id": id, "object": object, "created": created, "model": model, "choices": choices,
            "usage": usage.map(Usage::json),
        })
    }

    /// The whole answer.
    pub fn whole(&self, choices: &[Part], usage: Usage, tokenizer: &Tokenizer) -> Value {
        let choice = |(index, part): (usize, &Part)| {
            let mut choice = self.choice(index, part, tokenizer);
            match self.kind {
                Kind::Completion => choice["text"] = json!(part.text),
                Kind::Chat => choice["message"] = json!({"role": "assistant", "content": part.text}),
            }
            choice
        };
        let object = if self.kind == Kind::Chat { "chat.completion" } else { "text_completion" };
        self.answer(object, choices.iter().enumerate().map(choice).collect(), Some(usage))
    }

    /// A chunk with a part of a choice.
    pub fn chunk(&self, index: usize, part: &Part, tokenizer: &Tokenizer) -> Value {
        let mut choice = self.choice(index, part, tokenizer);
        match self.kind {
            Kind::Completion => choice["text"] = json!(part.text),
            Kind::Chat => choice["delta"] = json!({"content": part.text}),
        }
        self.answer(self.chunk_object(), vec![choice], None)
    }

    /// The chunk that a choice of a chat begins with; `None` in completions.
    pub fn first_chunk(&self, index: usize) -> Option<Value> {
        let delta = json!({"role": "assistant", "content": ""});
        let choice = json!({"index": index, "delta": delta, "logprobs": null, "finish_reason": null});
        (self.kind == Kind::Chat).then(|| self.answer(self.chunk_object(), vec![choice], None))
    }

    /// The chunk that a stream ends with.
    pub fn usage_chunk(&self, usage: Usage) -> Value {
        self.answer(self.chunk_object(), Vec::new(), Some(usage))
    }

    fn chunk_object(&self) -> &'static str {
        if self.kind == Kind::Chat { "chat.completion.chunk" } else { "text_completion" }
    }

    fn choice(&self, index: usize, part: &Part, tokenizer: &Tokenizer) -> Value {
        let depths: Vec<u8> = part.tokens.iter().map(|token| token.depth).collect();
        let signals: Vec<Option<f32>> = part.tokens.iter().map(|token| token.signal).collect();
        let tokens: Vec<u32> = part.tokens.iter().map(|token| token.token).collect();
        json!({
            "index": index, "finish_reason": part.finish.map(Finish::name), "logprobs": self.logprobs(part, tokenizer),
            "depthwise": {"depths": depths, "signals": signals, "token_ids": tokens},
        })
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
