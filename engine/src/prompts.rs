//! The prompts of requests, which a request trace knows only by their length.

use std::collections::HashMap;

use traces::Request;

use crate::kernels::signals::mix;

/// Where prompts come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// Slices of one text, as token ids; where a request's slice starts depends on its id alone.
    Text(Vec<u32>),
    /// Token ids by request.
    Given(HashMap<u32, Vec<u32>>),
}

/// A prompt that is not to be had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// The text is shorter than the prompt.
    #[error("request {request} asks for a prompt of {asked} tokens, the text has {found}")]
    TextTooShort {
        /// The request.
        request: u32,
        /// Length of its prompt.
        asked: u32,
        /// Length of the text.
        found: usize,
    },
    /// No prompt of that length was given.
    #[error("request {request} asks for a prompt of {asked} tokens, {found} were given")]
    NotGiven {
        /// The request.
        request: u32,
        /// Length of its prompt.
        asked: u32,
        /// Tokens given for the request.
        found: usize,
    },
}

impl Prompts {
    /// The prompt of a request, as long as it asks for.
    ///
    /// # Errors
    /// If the text is too short, or no such prompt was given.
    pub fn get(&self, request: &Request) -> Result<&[u32], PromptError> {
        let &Request { id, prompt_tokens, .. } = request;
        let length = prompt_tokens as usize;
        match self {
            Self::Text(text) => match text.len().checked_sub(length) {
                Some(room) => {
                    let start = (mix(u64::from(id)) % (room as u64 + 1)) as usize;
                    Ok(&text[start..start + length])
                }
                None => Err(PromptError::TextTooShort { request: id, asked: prompt_tokens, found: text.len() }),
            },
            Self::Given(prompts) => match prompts.get(&id) {
                Some(prompt) if prompt.len() == length => Ok(prompt),
                other => {
                    let found = other.map_or(0, Vec::len);
                    Err(PromptError::NotGiven { request: id, asked: prompt_tokens, found })
                }
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use traces::Nanos;

    fn request(id: u32, prompt_tokens: u32) -> Request {
        Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens: 1 }
    }

    #[test]
    fn a_longer_prompt_of_the_same_text_is_its_own_slice_and_stays_the_same() {
        let prompts = Prompts::Text((0..100).collect());
        for id in 0..50 {
            let prompt = prompts.get(&request(id, 40)).unwrap();
            assert_eq!(prompt.len(), 40);
            assert_eq!(prompt, prompts.get(&request(id, 40)).unwrap());
            assert!(prompt.windows(2).all(|pair| pair[1] == pair[0] + 1));
        }
        assert_eq!(prompts.get(&request(3, 100)).unwrap().len(), 100);
    }

    #[test]
    fn prompts_that_are_not_there_are_errors() {
        let message = Prompts::Text(vec![1, 2]).get(&request(7, 3)).unwrap_err().to_string();
        assert!(message.contains("request 7 asks for a prompt of 3 tokens, the text has 2"), "{message}");
        let given = Prompts::Given(HashMap::from([(1, vec![1, 2])]));
        assert_eq!(given.get(&request(1, 2)).unwrap(), &[1, 2]);
        assert!(given.get(&request(1, 3)).is_err() && given.get(&request(2, 2)).is_err());
    }
}
