//! Prompts with answers: a file of JSON lines, and the grading of served texts.
//!
//! ```text
//! {"prompt": "06360=", "answer": "5", "class": "5"}
//! {"prompt": "In the beginning"}
//! ```

use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::Deserialize;
use traces::TraceError;

use crate::tokenizer::{Tokenizer, TokenizerError};

/// A prompt of a file.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PromptLine {
    /// Token ids of the prompt, after those that every sequence begins with.
    pub tokens: Vec<u32>,
    /// The text that must follow; `None` of prompts that are not graded.
    pub answer: Option<Answer>,
    /// Group in which accuracy is given, such as a number of steps.
    pub class: Option<String>,
}

/// The text that must follow a prompt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The text; not empty.
    pub text: String,
    /// Tokens that it takes after its prompt, at least 1.
    pub tokens: u32,
}

/// A line as it is in the file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prompt: String,
    answer: Option<String>,
    class: Option<String>,
}

impl PromptLine {
    /// Whether a file has prompts in JSON lines, by its name: `.jsonl`, or that compressed with gzip or Zstandard.
    pub fn is_file(path: &Path) -> bool {
        let name = path.to_string_lossy();
        let name = [".gz", ".zst"].iter().find_map(|end| name.strip_suffix(end)).unwrap_or(&name);
        name.ends_with(".jsonl")
    }

    /// Reads a file of JSON lines with the keys `prompt`, `answer` and `class`, of which the last two may be missing.
    /// Blank lines are skipped.
    ///
    /// # Errors
    /// If the file cannot be read or has no prompt, a line has other keys or an empty text, or the tokenizer refuses a
    /// text; with file, line and key.
    pub fn read(path: &Path, tokenizer: &Tokenizer) -> Result<Vec<Self>, TraceError> {
        let mut prompts = Vec::new();
        for (number, line) in (1..).zip(BufReader::new(traces::input::open_text(path)?).lines()) {
            let failed = |source| TraceError::Io { action: "read", path: path.to_owned(), source };
            let text = line.map_err(failed)?;
            let text = text.trim_start_matches('\u{feff}').trim();
            if text.is_empty() {
                continue;
            }
            let wrong = |key: &str, message: String| {
                let (path, key) = (path.to_owned(), key.to_owned());
                TraceError::Json { path, line: number, key, message }
            };
            let line: Line = serde_json::from_str(text).map_err(|error| {
                wrong(
                    "the object",
                    format!("{error}; expected {{\"prompt\": TEXT, \"answer\": TEXT, \"class\": TEXT}}"),
                )
            })?;
            prompts.push(Self::new(line, tokenizer).map_err(|(key, message)| wrong(key, message))?);
        }
        match prompts.is_empty() {
            false => Ok(prompts),
            true => {
                let (path, expected) = (path.to_owned(), "a JSON object with `prompt` in each line".to_owned());
                Err(TraceError::File { path, found: "no prompt".to_owned(), expected })
            }
        }
    }

    /// The prompt of a line; an error has its key.
    fn new(Line { prompt, answer, class }: Line, tokenizer: &Tokenizer) -> Result<Self, (&'static str, String)> {
        let encode = |key, text: &str| tokenizer.encode_prompt(text).map_err(|error| (key, error.to_string()));
        let tokens = encode("prompt", &prompt)?;
        if tokens.is_empty() {
            return Err(("prompt", "found no token, expected some text".to_owned()));
        }
        let graded = |text: String| {
            if text.is_empty() {
                return Err(("answer", "found no text, expected some, or no such key".to_owned()));
            }
            let whole = encode("answer", &format!("{prompt}{text}"))?.len();
            let tokens = whole.saturating_sub(tokens.len()).max(1) as u32;
            Ok(Answer { text, tokens })
        };
        let answer = answer.map(graded).transpose()?;
        Ok(Self { tokens, answer, class })
    }

    /// Whether a text that was generated after the prompt begins with the answer. `None` without an answer, or if the
    /// text has fewer tokens than the answer takes.
    ///
    /// # Errors
    /// If the tokenizer refuses a token.
    pub fn grade(&self, tokenizer: &Tokenizer, generated: &[u32]) -> Result<Option<bool>, TokenizerError> {
        let Some(answer) = self.answer.as_ref().filter(|answer| answer.tokens as usize <= generated.len()) else {
            return Ok(None);
        };
        let mut stream = tokenizer.stream();
        // What a token adds to a text depends on those before it.
        self.tokens.iter().try_for_each(|&token| stream.push(token).map(drop))?;
        let mut text = String::new();
        for &token in generated {
            if text.len() >= answer.text.len() {
                break;
            }
            text += &stream.push(token)?.unwrap_or_default();
        }
        Ok(Some(text.starts_with(&answer.text)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tokenizer() -> Tokenizer {
        Tokenizer::train("12=3 12=3 12=3 12=3", 258).unwrap()
    }

    fn read(text: &str) -> Result<Vec<PromptLine>, TraceError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, text).unwrap();
        PromptLine::read(&path, &tokenizer())
    }

    #[test]
    fn a_file_has_prompts_with_answers_and_without() {
        let prompts =
            read("{\"prompt\": \"7+1=\", \"answer\": \"8\", \"class\": \"1\"}\n\n{\"prompt\": \"word\"}\n").unwrap();
        let answer = Answer { text: "8".to_owned(), tokens: 1 };
        let encoded = |text| tokenizer().encode(text).unwrap();
        let graded = PromptLine { tokens: encoded("7+1="), answer: Some(answer), class: Some("1".to_owned()) };
        assert_eq!(prompts, [graded, PromptLine { tokens: encoded("word"), ..PromptLine::default() }]);
    }

    #[test]
    fn a_text_is_right_if_it_begins_with_the_answer_however_it_is_cut_into_tokens() {
        let tokenizer = tokenizer();
        let prompt = &read(r#"{"prompt": "x:", "answer": "12"}"#).unwrap()[0];
        assert_eq!(prompt.answer.as_ref().unwrap().tokens, 1, "`12` is one token");
        let grade = |generated: &[u32]| prompt.grade(&tokenizer, generated).unwrap();
        let bytes = [tokenizer.encode("1").unwrap(), tokenizer.encode("2").unwrap(), tokenizer.encode("9").unwrap()];
        assert_eq!(grade(&tokenizer.encode("12").unwrap()), Some(true));
        assert_eq!(grade(&bytes.concat()), Some(true));
        assert_eq!(grade(&bytes[..1].concat()), Some(false), "half of the answer");
        assert_eq!(grade(&tokenizer.encode("21").unwrap()), Some(false));
        assert_eq!(grade(&[]), None, "fewer tokens than the answer has");
        let ungraded = &read(r#"{"prompt": "x"}"#).unwrap()[0];
        assert_eq!(ungraded.grade(&tokenizer, &bytes.concat()).unwrap(), None);
    }

    #[test]
    fn what_is_wrong_with_a_line_is_told_with_its_place() {
        let error = |text: &str| read(text).unwrap_err().to_string();
        for (text, expected) in [
            ("{\"prompt\": \"a\"}\n{\"prompt\": \"\"}", "prompts.jsonl:2: prompt: found no token, expected some text"),
            (r#"{"prompt": "a", "answer": ""}"#, ":1: answer: found no text"),
            (r#"{"prompt": "a", "target": "b"}"#, ":1: the object: unknown field `target`"),
            (r#"{"answer": "b"}"#, "missing field `prompt`"),
            ("plain text", ":1: the object: expected value"),
            ("\n\n", "found no prompt"),
        ] {
            assert!(error(text).contains(expected), "{}", error(text));
        }
    }

    #[test]
    fn files_of_prompts_are_known_by_their_name() {
        let is_file = |name: &str| PromptLine::is_file(Path::new(name));
        assert!(is_file("a.jsonl") && is_file("b/a.jsonl.gz") && is_file("a.jsonl.zst"));
        assert!(!is_file("a.txt") && !is_file("jsonl") && !is_file("a.jsonl.txt"));
    }
}
