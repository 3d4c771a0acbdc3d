//! Prompts of requests; a request trace contains only their lengths.

use std::collections::HashMap;
use std::sync::Arc;

use traces::hash::mix;
use traces::{PrefixHashes, Request};

use crate::prompt_lines::PromptLine;

/// Source of prompts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompts {
    /// Slices of one text, as token ids. The start of a slice depends only on the request's id.
    Text(Vec<u32>),
    /// Slices of one text, each after the tokens that every sequence begins with, such as Gemma's `<bos>`.
    TextAfter {
        /// Tokens that every prompt begins with.
        begin: Vec<u32>,
        /// The text.
        text: Vec<u32>,
        /// Which prompts begin alike: blocks of equal hash are equal. The start of their slices depends on the hash, and
        /// that of what follows them on the request's id.
        prefixes: Option<Arc<PrefixHashes>>,
    },
    /// Token ids by request.
    Given(HashMap<u32, Vec<u32>>),
    /// At least one prompt; the request with id `i` has prompt `i` modulo their number.
    Lines(Vec<PromptLine>),
}

/// A prompt that is not available.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// The text is shorter than the prompt.
    #[error("request {request} asks for a prompt of {asked} tokens, the text has {found}")]
    TextTooShort {
        /// Id of the request.
        request: u32,
        /// Length of its prompt.
        asked: u32,
        /// Length of the text.
        found: usize,
    },
    /// No prompt of that length was given.
    #[error("request {request} asks for a prompt of {asked} tokens, {found} were given")]
    NotGiven {
        /// Id of the request.
        request: u32,
        /// Length of its prompt.
        asked: u32,
        /// Number of tokens given for the request.
        found: usize,
    },
}

impl Prompts {
    /// The line of a request, if prompts are lines of a file.
    pub fn line(&self, request: u32) -> Option<&PromptLine> {
        match self {
            Self::Lines(lines) => lines.get(request as usize % lines.len().max(1)),
            Self::Text(_) | Self::TextAfter { .. } | Self::Given(_) => None,
        }
    }

    /// Gives requests the lengths of their prompts, where each prompt has a length of its own.
    pub fn set_lengths(&self, requests: &mut [Request]) {
        for request in requests {
            if let Some(line) = self.line(request.id) {
                request.prompt_tokens = line.tokens.len() as u32;
            }
        }
    }

    /// Lets prompts of a text begin alike where a trace says so. Prompts that are given stay as they are.
    pub fn with_prefixes(self, prefixes: Arc<PrefixHashes>) -> Self {
        let (begin, text) = match self {
            Self::Text(text) => (Vec::new(), text),
            Self::TextAfter { begin, text, .. } => (begin, text),
            given @ (Self::Given(_) | Self::Lines(_)) => return given,
        };
        Self::TextAfter { begin, text, prefixes: Some(prefixes) }
    }

    /// A source of prompts of any length up to `longest` tokens, for loads of other requests than those that prompts were given
    /// for: the same text, or that of all given prompts after each other, as often as needed.
    pub fn of_any_length(&self, longest: usize) -> Self {
        let given: Vec<u32> = match self {
            Self::Text(_) => return self.clone(),
            Self::TextAfter { begin, text, .. } => {
                return Self::TextAfter { begin: begin.clone(), text: text.clone(), prefixes: None };
            }
            Self::Given(prompts) => {
                let ids = prompts.keys().copied().collect::<std::collections::BTreeSet<u32>>();
                ids.iter().flat_map(|id| prompts[id].iter().copied()).collect()
            }
            Self::Lines(lines) => lines.iter().flat_map(|line| line.tokens.iter().copied()).collect(),
        };
        let length = longest.max(given.len());
        Self::Text(given.into_iter().cycle().take(length).collect())
    }

    /// The prompt of a request, with its length.
    ///
    /// # Errors
    /// If the text is too short, or no such prompt was given.
    pub fn get(&self, request: &Request) -> Result<Vec<u32>, PromptError> {
        let &Request { id, prompt_tokens, .. } = request;
        let given = |prompt: Option<&Vec<u32>>| match prompt {
            Some(prompt) if prompt.len() == prompt_tokens as usize => Ok(prompt.clone()),
            other => {
                let found = other.map_or(0, Vec::len);
                Err(PromptError::NotGiven { request: id, asked: prompt_tokens, found })
            }
        };
        match self {
            Self::Text(text) => slice(text, request, id.into(), prompt_tokens as usize).map(<[u32]>::to_vec),
            Self::TextAfter { begin, text, prefixes } => {
                let length = prompt_tokens as usize;
                let mut prompt = begin[..begin.len().min(length)].to_vec();
                if let Some(prefixes) = prefixes {
                    let block_tokens = prefixes.block_tokens as usize;
                    for (&hash, end) in prefixes.of(id).iter().zip((block_tokens..=length).step_by(block_tokens)) {
                        prompt.extend(slice(text, request, hash, end.saturating_sub(prompt.len()))?);
                    }
                }
                prompt.extend(slice(text, request, id.into(), length - prompt.len())?);
                Ok(prompt)
            }
            Self::Given(prompts) => given(prompts.get(&id)),
            Self::Lines(_) => given(self.line(id).map(|line| &line.tokens)),
        }
    }
}

/// A slice of a text for a request, whose start depends on `key`.
fn slice<'a>(text: &'a [u32], request: &Request, key: u64, length: usize) -> Result<&'a [u32], PromptError> {
    let &Request { id, prompt_tokens: asked, .. } = request;
    let room = text.len().checked_sub(length);
    let room = room.ok_or(PromptError::TextTooShort { request: id, asked, found: text.len() })?;
    let start = (mix(key) % (room as u64 + 1)) as usize;
    Ok(&text[start..start + length])
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
    fn prompts_of_a_text_begin_with_the_tokens_that_a_sequence_begins_with() {
        let prompts = Prompts::TextAfter { begin: vec![500, 501], text: (0..100).collect(), prefixes: None };
        let prompt = prompts.get(&request(3, 42)).unwrap();
        assert_eq!((prompt.len(), &prompt[..2]), (42, &[500, 501][..]));
        assert_eq!(prompt[2..], Prompts::Text((0..100).collect()).get(&request(3, 40)).unwrap());
        assert_eq!(prompts.get(&request(3, 1)).unwrap(), [500]);
    }

    #[test]
    fn prompts_of_a_text_begin_alike_as_far_as_a_trace_says() {
        let mut hashes = PrefixHashes::new(4);
        hashes.push([7, 8]);
        hashes.push([7, 9]);
        hashes.push([]);
        for begin in [vec![], vec![500]] {
            let text = Prompts::TextAfter { begin, text: (0..100).collect(), prefixes: None };
            let prompts = text.clone().with_prefixes(Arc::new(hashes.clone()));
            let [first, second, third] = [0, 1, 2].map(|id| prompts.get(&request(id, 10)).unwrap());
            assert_eq!((first.len(), &first[..4]), (10, &second[..4]));
            assert!((4..10).all(|place| first[place] != second[place]), "{first:?} {second:?}");
            assert_eq!(third, text.get(&request(2, 10)).unwrap());
            assert_eq!(prompts.of_any_length(50), text);
            assert_eq!(prompts.get(&request(0, 6)).unwrap()[..4], first[..4]);
        }
        let given = Prompts::Given(HashMap::from([(0, vec![3])]));
        assert_eq!(given.clone().with_prefixes(Arc::new(hashes)), given);
    }

    #[test]
    fn requests_take_the_lines_of_a_file_in_turn_with_their_lengths() {
        let line = |tokens: &[u32]| PromptLine { tokens: tokens.to_vec(), ..PromptLine::default() };
        let prompts = Prompts::Lines(vec![line(&[1, 2, 3]), line(&[4])]);
        let mut requests = [request(2, 40), request(3, 40)];
        prompts.set_lengths(&mut requests);
        assert_eq!(requests.map(|request| prompts.get(&request).unwrap()), [vec![1, 2, 3], vec![4]]);
        let message = prompts.get(&request(3, 40)).unwrap_err().to_string();
        assert!(message.contains("request 3 asks for a prompt of 40 tokens, 1 were given"), "{message}");
        let mut unchanged = [request(2, 40)];
        Prompts::Text(vec![0]).set_lengths(&mut unchanged);
        assert_eq!(unchanged, [request(2, 40)]);
    }

    #[test]
    fn given_prompts_serve_requests_of_any_length_as_one_text() {
        let line = |tokens: &[u32]| PromptLine { tokens: tokens.to_vec(), ..PromptLine::default() };
        let given = Prompts::Given(HashMap::from([(7, vec![3]), (2, vec![1, 2])]));
        for prompts in [given, Prompts::Lines(vec![line(&[1, 2]), line(&[3])])] {
            assert_eq!(prompts.of_any_length(7), Prompts::Text(vec![1, 2, 3, 1, 2, 3, 1]));
            assert_eq!(prompts.of_any_length(2), Prompts::Text(vec![1, 2, 3]));
        }
        let text = Prompts::Text(vec![5]);
        assert_eq!(text.of_any_length(9), text, "a text that is too short stays an error");
    }

    #[test]
    fn prompts_that_are_not_there_are_errors() {
        let message = Prompts::Text(vec![1, 2]).get(&request(7, 3)).unwrap_err().to_string();
        assert!(message.contains("request 7 asks for a prompt of 3 tokens, the text has 2"), "{message}");
        let given = Prompts::Given(HashMap::from([(1, vec![1, 2])]));
        assert_eq!(given.get(&request(1, 2)).unwrap(), [1, 2]);
        assert!(given.get(&request(1, 3)).is_err() && given.get(&request(2, 2)).is_err());
    }
}
