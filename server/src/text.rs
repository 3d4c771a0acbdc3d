//! From tokens to text: whole characters only, up to a stop string.

use engine::{TextStream, Tokenizer, TokenizerError};

/// Text of tokens that come one after the other, of which no part is given out that may belong to a stop string.
pub(crate) struct Text<'a> {
    stream: TextStream<'a>,
    stops: &'a [String],
    /// What is not given out yet: it may be the beginning of a stop string.
    withheld: String,
}

/// What a text gains.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Gain {
    /// Text that can be given out.
    pub text: String,
    /// Whether a stop string has ended the text, which ends before it.
    pub stopped: bool,
}

/// Tokens of a prompt that decide what its next token adds to the text: no character has so many.
const CONTEXT: usize = 32;

impl<'a> Text<'a> {
    /// A text that goes on after a prompt: what a token adds to a text depends on those before it.
    ///
    /// # Errors
    /// If the tokenizer refuses a token.
    pub fn after(prompt: &[u32], tokenizer: &'a Tokenizer, stops: &'a [String]) -> Result<Self, TokenizerError> {
        let mut stream = tokenizer.stream();
        let end = &prompt[prompt.len().saturating_sub(CONTEXT)..];
        end.iter().try_for_each(|&token| stream.push(token).map(drop))?;
        Ok(Self { stream, stops, withheld: String::new() })
    }

    /// Adds a token. Stop strings count if `may_stop`.
    ///
    /// # Errors
    /// If the tokenizer refuses the token.
    pub fn push(&mut self, token: u32, may_stop: bool) -> Result<Gain, TokenizerError> {
        self.withheld += &self.stream.push(token)?.unwrap_or_default();
        if !may_stop {
            return Ok(self.finish());
        }
        let stop = self.stops.iter().filter_map(|stop| self.withheld.find(stop.as_str())).min();
        let end = stop.unwrap_or_else(|| self.withheld.len() - self.open_end());
        let rest = self.withheld.split_off(end);
        let text = std::mem::replace(&mut self.withheld, rest);
        Ok(Gain { text, stopped: stop.is_some() })
    }

    /// What is left when no token follows. A character that lacks bytes is left out.
    pub fn finish(&mut self) -> Gain {
        Gain { text: std::mem::take(&mut self.withheld), stopped: false }
    }

    /// Length of the longest end of the withheld text that a stop string begins with.
    fn open_end(&self) -> usize {
        let ends = self.withheld.char_indices().map(|(start, _)| &self.withheld[start..]);
        let is_open = |end: &&str| self.stops.iter().any(|stop| stop.starts_with(*end));
        ends.filter(is_open).map(str::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::train("abc", 256).unwrap()
    }

    /// The parts of a text that are given out, and whether it was stopped.
    fn parts(text: &str, stops: &[&str]) -> (Vec<String>, bool) {
        let tokenizer = tokenizer();
        let stops: Vec<String> = stops.iter().map(|&stop| stop.to_owned()).collect();
        let mut grown = Text::after(&tokenizer.encode("be☃").unwrap()[..3], &tokenizer, &stops).unwrap();
        let mut parts = Vec::new();
        for token in tokenizer.encode(text).unwrap() {
            let Gain { text, stopped } = grown.push(token, true).unwrap();
            parts.push(text);
            if stopped {
                return (parts, true);
            }
        }
        parts.push(grown.finish().text);
        (parts, false)
    }

    #[test]
    fn characters_are_given_out_whole() {
        let tokenizer = tokenizer();
        let mut text = Text::after(&[], &tokenizer, &[]).unwrap();
        let tokens = tokenizer.encode("a☃").unwrap();
        let gains: Vec<String> = tokens.iter().map(|&token| text.push(token, true).unwrap().text).collect();
        assert_eq!(gains, ["a", "", "", "☃"]);
        text.push(tokens[1], true).unwrap();
        assert_eq!(text.finish().text, "", "a character that lacks bytes never comes");
    }

    #[test]
    fn no_part_of_a_stop_string_is_given_out() {
        assert_eq!(parts("\u{3}ab", &["abc"]).0.concat(), "\u{fffd}\u{3}ab");
        let (given, stopped) = parts("xabaabcd", &["abc", "zz"]);
        assert_eq!((given.concat().trim_start_matches('\u{fffd}'), stopped), ("xaba", true));
        assert!(!given[..given.len() - 1].concat().contains("abaab"), "{given:?}");
        assert_eq!(
            parts("aab", &["b", "aab"]).0.concat().trim_start_matches('\u{fffd}'),
            "",
            "the earliest stop counts"
        );
        assert_eq!(parts("ab", &["abc"]).0.last().unwrap(), "ab", "what is no stop string after all comes at the end");
    }

    #[test]
    fn stop_strings_do_not_count_before_they_may() {
        let (tokenizer, stops) = (tokenizer(), vec!["b".to_owned()]);
        let mut text = Text::after(&[], &tokenizer, &stops).unwrap();
        let tokens = tokenizer.encode("abb").unwrap();
        assert_eq!(text.push(tokens[0], false).unwrap().text, "a");
        assert_eq!(text.push(tokens[1], false).unwrap(), Gain { text: "b".to_owned(), stopped: false });
        assert!(text.push(tokens[2], true).unwrap().stopped);
    }
}
