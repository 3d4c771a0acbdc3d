//! The stream of an answer: when its tokens came, and how many the server says there are.

use serde::Deserialize;
use serde_json::Value;
use traces::Nanos;

use crate::failure::{Failure, FailureKind};

/// Numbers of tokens, as the server counts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Generated tokens.
    #[serde(default)]
    pub completion_tokens: u32,
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// When each piece of the text came, in ascending order; at least one. Most servers send one piece for each token.
    pub pieces: Vec<Nanos>,
    /// What the server says of the number of tokens; `None` if it does not.
    pub usage: Option<Usage>,
    /// Exit depth of each token, from 0, as depthwise's own server says it; empty from other servers.
    pub depths: Vec<u8>,
}

impl Answer {
    /// Number of generated tokens: the server's number, or else that of the pieces.
    pub fn num_tokens(&self) -> u32 {
        let counted = self.usage.map(|usage| usage.completion_tokens).filter(|&tokens| tokens > 0);
        counted.unwrap_or(self.pieces.len() as u32)
    }
}

/// One event of the stream. Fields that are not read here may have any form.
#[derive(Debug, Deserialize)]
struct Chunk {
    #[serde(default)]
    choices: Vec<Choice>,
    usage: Option<Usage>,
    error: Option<Value>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    /// Of the endpoint for completions.
    text: Option<String>,
    /// Of the endpoint for chats.
    delta: Option<Delta>,
    finish_reason: Option<String>,
    /// Of depthwise's own server.
    depthwise: Option<TokenDepths>,
}

#[derive(Debug, Deserialize)]
struct TokenDepths {
    /// Of the tokens of the event.
    depths: Vec<u8>,
}

#[derive(Debug, Deserialize)]
struct Delta {
    content: Option<String>,
    /// Two spellings of the text that comes before the content.
    #[serde(alias = "reasoning")]
    reasoning_content: Option<String>,
}

impl Choice {
    /// Whether the event stands for a token. A completion's token without text (a special token, or one that ends within a
    /// letter) is one unless it ends the answer; a chat begins and ends with events without text that are none.
    fn is_piece(&self) -> bool {
        if let Some(TokenDepths { depths }) = &self.depthwise {
            return !depths.is_empty();
        }
        let has_text = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
        match (&self.text, &self.delta) {
            (Some(text), _) => !text.is_empty() || self.finish_reason.is_none(),
            (None, Some(delta)) => has_text(&delta.content) || has_text(&delta.reasoning_content),
            (None, None) => false,
        }
    }
}

/// Reads an answer event by event.
#[derive(Debug, Default)]
pub(crate) struct AnswerReader {
    answer: Answer,
    /// Whether the server has announced the end.
    is_whole: bool,
}

impl AnswerReader {
    /// Reads the data of an event that came at `now`.
    pub fn read(&mut self, now: Nanos, data: &[u8]) -> Result<(), Failure> {
        if data == b"[DONE]" {
            self.is_whole = true;
            return Ok(());
        }
        let chunk: Chunk = serde_json::from_slice(data).map_err(|error| {
            let found = String::from_utf8_lossy(data);
            Failure::new(FailureKind::Protocol, format!("found `{found}`, expected a JSON object of the API: {error}"))
        })?;
        if let Some(error) = chunk.error {
            return Err(Failure::new(FailureKind::Reported, error));
        }
        self.answer.pieces.extend(chunk.choices.iter().filter(|choice| choice.is_piece()).map(|_| now));
        let depths = chunk.choices.iter().filter_map(|choice| choice.depthwise.as_ref());
        self.answer.depths.extend(depths.flat_map(|tokens| &tokens.depths));
        self.is_whole |= chunk.choices.iter().any(|choice| choice.finish_reason.is_some());
        self.answer.usage = chunk.usage.or(self.answer.usage);
        Ok(())
    }

    /// The answer, when the stream has ended.
    pub fn finish(self) -> Result<Answer, Failure> {
        let found = self.answer.pieces.len();
        if !self.is_whole {
            let message =
                format!("found the end of the stream after {found} pieces, expected a finish_reason or [DONE]");
            return Err(Failure::new(FailureKind::Cut, message));
        }
        match found {
            0 => Err(Failure::new(FailureKind::Empty, "found no piece of text, expected at least one")),
            _ => Ok(self.answer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(events: &[&str]) -> Result<Answer, Failure> {
        let mut reader = AnswerReader::default();
        for (time, event) in (0..).zip(events) {
            reader.read(Nanos(time), event.as_bytes())?;
        }
        reader.finish()
    }

    fn times(answer: &Answer) -> Vec<u64> {
        answer.pieces.iter().map(|time| time.0).collect()
    }

    #[test]
    fn completions_of_vllm_and_llama_cpp_are_read() {
        let vllm = read(&[
            r#"{"id":"a","choices":[{"index":0,"text":" a","logprobs":null,"finish_reason":null}],"usage":null}"#,
            r#"{"id":"a","choices":[{"index":0,"text":"","finish_reason":null}]}"#,
            r#"{"id":"a","choices":[{"index":0,"text":"b","finish_reason":"length","stop_reason":null}]}"#,
            r#"{"id":"a","choices":[],"usage":{"prompt_tokens":5,"total_tokens":8,"completion_tokens":3}}"#,
            "[DONE]",
        ])
        .unwrap();
        assert_eq!((times(&vllm), vllm.num_tokens()), (vec![0, 1, 2], 3));
        let llama_cpp = read(&[
            r#"{"choices":[{"text":"a","index":0,"finish_reason":null}],"timings":{"prompt_n":1}}"#,
            r#"{"choices":[{"text":"","index":0,"finish_reason":"length"}],"usage":{"completion_tokens":4,"prompt_tokens":9}}"#,
        ])
        .unwrap();
        assert_eq!((times(&llama_cpp), llama_cpp.num_tokens()), (vec![0], 4));
        assert_eq!(llama_cpp.usage.map(|usage| usage.prompt_tokens), Some(9));
    }

    #[test]
    fn a_chat_begins_with_a_role_and_may_think() {
        let chat = read(&[
            r#"{"choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]}"#,
            r#"{"choices":[{"index":0,"delta":{"reasoning_content":"Hm"},"finish_reason":null}]}"#,
            r#"{"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}]}"#,
            r#"{"choices":[{"index":0,"delta":{},"finish_reason":"length"}]}"#,
            "[DONE]",
        ])
        .unwrap();
        assert_eq!((times(&chat), chat.num_tokens(), chat.usage), (vec![1, 2], 2, None));
    }

    #[test]
    fn depthwise_says_the_depths_of_tokens_also_of_those_whose_text_comes_later() {
        let own = read(&[
            r#"{"choices":[{"text":"a","finish_reason":null,"depthwise":{"depths":[2]}}]}"#,
            r#"{"choices":[{"text":"","finish_reason":null,"depthwise":{"depths":[]}}]}"#,
            r#"{"choices":[{"text":"","finish_reason":"length","depthwise":{"depths":[0, 3]}}]}"#,
        ])
        .unwrap();
        assert_eq!((times(&own), own.depths), (vec![0, 2], vec![2, 0, 3]));
    }

    #[test]
    fn answers_that_are_not_whole_are_failures_of_their_kinds() {
        let piece = r#"{"choices":[{"text":"a","finish_reason":null}]}"#;
        let kind = |events: &[&str]| read(events).unwrap_err().kind;
        assert_eq!(kind(&[piece]), FailureKind::Cut);
        assert_eq!(kind(&[]), FailureKind::Cut);
        assert_eq!(kind(&["[DONE]"]), FailureKind::Empty);
        assert_eq!(kind(&[piece, r#"{"error":{"message":"out of memory"}}"#]), FailureKind::Reported);
        assert_eq!(kind(&[piece, "<html>"]), FailureKind::Protocol);
    }
}
