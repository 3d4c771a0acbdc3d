//! Prompts of requests, of which a trace has only the lengths and perhaps the hashes of their blocks.

use std::ops::Range;
use std::sync::Arc;

use serde::Serialize;
use traces::hash::mix;
use traces::{PrefixHashes, Request};

/// A prompt, as the API takes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(untagged)]
pub enum Prompt {
    /// Token ids.
    Tokens(Vec<u32>),
    /// A text.
    Text(String),
}

/// How many tokens a server makes of words: `tokens_per_word` of each, and `fixed` of the prompt as a whole (a first token,
/// the template of a chat).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct WordTokens {
    /// Tokens of a word, on average.
    pub tokens_per_word: f64,
    /// Tokens that a prompt has beside those of its words.
    pub fixed: f64,
}

/// What prompts are made of.
#[derive(Clone, Debug)]
pub enum PromptSource {
    /// Random token ids.
    Vocabulary(Range<u32>),
    /// Words of a text, in its order.
    Words {
        /// At least one word.
        words: Vec<String>,
        /// What the server makes of them.
        tokens: WordTokens,
    },
}

impl PromptSource {
    /// Token ids of a vocabulary of `size` tokens: of its middle half, since special tokens are at its ends.
    pub fn vocabulary(size: u32) -> Self {
        Self::Vocabulary(size / 4..(size / 4 * 3).max(size / 4 + 1))
    }
}

/// The prompt of each request. It depends on the seed, the request's id and the hashes of its blocks only.
///
/// Blocks of equal hash get equal content, so that the server's prefix cache finds what the trace says that prompts have in
/// common.
#[derive(Clone, Debug)]
pub struct Prompts {
    source: PromptSource,
    prefixes: Option<Arc<PrefixHashes>>,
    seed: u64,
}

impl Prompts {
    /// Prompts that are drawn with `seed` from `source`.
    pub fn new(source: PromptSource, prefixes: Option<Arc<PrefixHashes>>, seed: u64) -> Self {
        Self { source, prefixes, seed }
    }

    /// The prompt of a request.
    pub fn of(&self, request: &Request) -> Prompt {
        let sections = self.sections(request);
        match &self.source {
            PromptSource::Vocabulary(ids) => {
                let token = |hash: u64| ids.start + (hash % u64::from(ids.end - ids.start)) as u32;
                let tokens = sections
                    .into_iter()
                    .flat_map(|(key, length)| (0..u64::from(length)).map(move |place| token(mix(key ^ mix(place)))));
                Prompt::Tokens(tokens.collect())
            }
            PromptSource::Words { words, tokens } => {
                let count = |length: f64| (length / tokens.tokens_per_word).round().max(1.0) as usize;
                let last = sections.len() - 1;
                let chosen = sections.into_iter().enumerate().flat_map(|(place, (key, length))| {
                    let fixed = if place == last { tokens.fixed } else { 0.0 };
                    let first = (key % words.len() as u64) as usize;
                    words.iter().cycle().skip(first).take(count(f64::from(length) - fixed)).map(String::as_str)
                });
                Prompt::Text(chosen.collect::<Vec<_>>().join(" "))
            }
        }
    }

    /// The parts of a prompt that are drawn together, in order: for each, a key that its content depends on and its length in
    /// tokens. There is at least one.
    fn sections(&self, request: &Request) -> Vec<(u64, u32)> {
        let seed = mix(self.seed);
        let mut sections = Vec::new();
        let mut rest = request.prompt_tokens;
        if let Some(prefixes) = &self.prefixes {
            let length = prefixes.block_tokens;
            let blocks = prefixes.of(request.id).iter().take((rest / length) as usize);
            sections.extend(blocks.map(|hash| (mix(seed ^ mix(*hash)), length)));
            rest -= sections.len() as u32 * length;
        }
        if rest > 0 {
            sections.push((mix(!seed ^ mix(u64::from(request.id))), rest));
        }
        sections
    }
}

#[cfg(test)]
mod tests {
    use traces::Nanos;

    use super::*;

    fn request(id: u32, prompt_tokens: u32) -> Request {
        Request { id, arrival: Nanos::ZERO, prompt_tokens, output_tokens: 1 }
    }

    fn hashes() -> Arc<PrefixHashes> {
        let mut hashes = PrefixHashes::new(4);
        hashes.push([7, 8]);
        hashes.push([7, 9]);
        Arc::new(hashes)
    }

    fn ids(prompts: &Prompts, request: &Request) -> Vec<u32> {
        match prompts.of(request) {
            Prompt::Tokens(ids) => ids,
            Prompt::Text(text) => panic!("found the text `{text}`"),
        }
    }

    #[test]
    fn prompts_have_their_lengths_and_share_the_blocks_of_equal_hash_only() {
        let prompts = Prompts::new(PromptSource::vocabulary(1 << 20), Some(hashes()), 3);
        let (first, second) = (ids(&prompts, &request(0, 10)), ids(&prompts, &request(1, 11)));
        assert_eq!((first.len(), second.len()), (10, 11));
        assert_eq!(first[..4], second[..4]);
        assert!((4..10).all(|place| first[place] != second[place]), "{first:?} {second:?}");
    }

    #[test]
    fn prompts_depend_on_seed_and_request() {
        let of = |seed, id| ids(&Prompts::new(PromptSource::vocabulary(1 << 20), None, seed), &request(id, 16));
        assert_eq!(of(1, 5), of(1, 5));
        assert_ne!(of(1, 5), of(2, 5));
        assert_ne!(of(1, 5), of(1, 6));
    }

    #[test]
    fn token_ids_are_of_the_middle_of_the_vocabulary() {
        let prompts = Prompts::new(PromptSource::vocabulary(100), None, 1);
        let drawn = ids(&prompts, &request(0, 1000));
        assert_eq!((drawn.iter().min(), drawn.iter().max()), (Some(&25), Some(&74)));
        assert_eq!(ids(&Prompts::new(PromptSource::vocabulary(1), None, 1), &request(0, 3)), [0, 0, 0]);
    }

    #[test]
    fn words_are_as_many_as_make_the_tokens_and_share_blocks_too() {
        let words: Vec<String> = (0..1000).map(|word| format!("w{word}")).collect();
        let tokens = WordTokens { tokens_per_word: 2.0, fixed: 1.0 };
        let prompts = Prompts::new(PromptSource::Words { words, tokens }, Some(hashes()), 3);
        let split = |request: Request| match prompts.of(&request) {
            Prompt::Text(text) => text.split(' ').map(str::to_owned).collect::<Vec<_>>(),
            Prompt::Tokens(ids) => panic!("found the ids {ids:?}"),
        };
        // Two blocks of two words; three more tokens are one word and the fixed one.
        let (first, second) = (split(request(0, 11)), split(request(1, 11)));
        assert_eq!((first.len(), &first[..2]), (5, &second[..2]));
        assert_ne!(first[2..4], second[2..4]);
        let unhashed = split(request(9, 41));
        assert_eq!(unhashed.len(), 20);
    }
}
