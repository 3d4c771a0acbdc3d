//! ShareGPT: a list of conversations, whose texts are counted by a tokenizer.

use std::cell::RefCell;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{self, DeserializeSeed, Deserializer, SeqAccess, Visitor};

use super::drafts::{Draft, Drafts};
use super::{LeftOut, Reading, document};
use crate::error::{Result, TraceError};
use crate::request::{Request, RequestTrace};
use crate::request_file::{CountTokens, ZeroTokens};
use crate::units::Nanos;

#[derive(Deserialize)]
struct Conversation {
    #[serde(alias = "conversation")]
    conversations: Vec<Message>,
}

#[derive(Deserialize)]
struct Message {
    #[serde(alias = "role")]
    from: String,
    #[serde(alias = "content")]
    value: String,
}

/// Who a message is from, where it is a model.
const MODELS: [&str; 6] = ["gpt", "chatgpt", "bard", "bing", "assistant", "model"];

/// Each answer is a request: its prompt is all of the conversation before it. Conversations have no times: a turn
/// follows the answer before it at once.
pub(super) fn read(path: &Path, Reading { options, .. }: Reading<'_>) -> Result<RequestTrace> {
    let Some(tokenizer) = options.tokenizer else {
        let expected = "the tokenizer that counts their tokens: `tokenizer: FILE` (`--tokenizer FILE`)";
        return Err(TraceError::file(path, "conversations as texts", expected));
    };
    let drafts = RefCell::new(Drafts::new(path, "conversations"));
    let left_out = RefCell::new(LeftOut::default());
    let seed = Conversations { tokenizer, zero_tokens: options.zero_tokens, drafts: &drafts, left_out: &left_out };
    document::read(path, &seed)?;
    drafts.into_inner().into_trace(None, left_out.into_inner().warnings().collect())
}

/// Counts one conversation after the other, without keeping their texts.
struct Conversations<'a> {
    tokenizer: &'a dyn CountTokens,
    zero_tokens: ZeroTokens,
    drafts: &'a RefCell<Drafts>,
    left_out: &'a RefCell<LeftOut>,
}

impl<'de> DeserializeSeed<'de> for &Conversations<'_> {
    type Value = ();
    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for &Conversations<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of conversations")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let mut number = 0;
        while let Some(conversation) = list.next_element::<Conversation>()? {
            self.push(number, &conversation).map_err(de::Error::custom)?;
            number += 1;
        }
        Ok(())
    }
}

impl Conversations<'_> {
    fn push(&self, number: u64, conversation: &Conversation) -> Result<(), String> {
        let (mut drafts, mut left_out) = (self.drafts.borrow_mut(), self.left_out.borrow_mut());
        let session = Some(drafts.session(&number.to_string()));
        let mut history = 0_u64;
        for message in &conversation.conversations {
            let tokens = self.tokenizer.count(&message.value)? as u64;
            if MODELS.contains(&message.from.as_str()) {
                let in_range = |tokens: u64| {
                    let whole = u32::try_from(tokens).ok().filter(|&tokens| tokens <= Request::MAX_TOKENS);
                    whole.ok_or_else(|| format!("found {tokens} tokens, expected at most {}", Request::MAX_TOKENS))
                };
                let (prompt_tokens, output_tokens) = (in_range(history)?, in_range(tokens)?);
                match left_out.without_tokens(prompt_tokens, output_tokens, self.zero_tokens) {
                    None => {
                        let think = Some(Nanos::ZERO);
                        drafts.push(Draft { line: 0, time: None, prompt_tokens, output_tokens, session, think });
                    }
                    Some(None) => {}
                    Some(Some(place)) => {
                        let kind = ["before the answer", "of an answer"][place];
                        return Err(format!("found no token {kind}, expected at least one"));
                    }
                }
            }
            history += tokens;
        }
        Ok(())
    }
}
