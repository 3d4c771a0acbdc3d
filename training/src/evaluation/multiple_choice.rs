//! Multiple-choice questions, answered by log-likelihood as in the LM Evaluation Harness (arXiv 2405.14782).
//!
//! A question is a line of JSON in one of two layouts of the harness:
//!
//! ```text
//! {"query": "The sky is", "choices": ["blue", "green"], "gold": 0}             a processed document
//! {"arguments": {"gen_args_0": {"arg_0": "The sky is", "arg_1": " blue"},      a sample that --log_samples wrote,
//!                "gen_args_1": {"arg_0": "The sky is", "arg_1": " green"}},    its examples in `arg_0`
//!  "target": "0"}
//! ```
//!
//! A document's choice follows its query after a space, as with the harness's defaults. Of a sample, other keys tell
//! which choice is right where the `target` does not.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;

use engine::Tokenizer;
use engine::reference::Reference;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::corpus::inputs_and_targets;
use crate::error::TrainingError;
use crate::evaluation::samples::Samples;
use crate::objective::cross_entropy;

/// Separators between a query and its choice, and between examples: the harness's `target_delimiter` and
/// `fewshot_delimiter`.
pub(crate) const CHOICE_DELIMITER: &str = " ";
const EXAMPLE_DELIMITER: &str = "\n\n";

/// A question with at least two choices.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The choices.
    pub choices: Vec<Choice>,
    /// Indices of the right choices, at least one.
    pub gold: Vec<usize>,
}

/// One of a question's choices.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Choice {
    /// Text before the choice; may be empty.
    pub context: String,
    /// Text of the choice with its separator from the context; not empty.
    pub continuation: String,
}

impl Choice {
    /// Length of the choice's text in characters, by which `acc_norm` divides.
    fn characters(&self) -> usize {
        self.continuation.strip_prefix(CHOICE_DELIMITER).unwrap_or(&self.continuation).chars().count()
    }
}

impl Question {
    /// The question after the first `shots` of `examples`, each with its right choice.
    pub fn after_examples(mut self, examples: &[Question], shots: usize) -> Self {
        let example = |question: &Question| {
            let Choice { context, continuation } = &question.choices[question.gold[0]];
            format!("{context}{continuation}{EXAMPLE_DELIMITER}")
        };
        let before: String = examples.iter().take(shots).map(example).collect();
        self.choices.iter_mut().for_each(|choice| choice.context.insert_str(0, &before));
        self
    }
}

/// The questions of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QuestionFile {
    /// The questions, in the order of the file.
    pub questions: Vec<Question>,
    /// What was left out of the file: one sentence each.
    pub warnings: Vec<String>,
}

/// Reads at least `at_least` questions, one per line. Blank lines are skipped, and a question that a log contains under
/// several filters is read once.
///
/// # Errors
/// If the file cannot be read or has too few questions, or a line is not a question in one of the layouts.
pub fn read_questions(path: &Path, at_least: usize) -> Result<QuestionFile, TrainingError> {
    let in_file = |source| TrainingError::File { path: path.to_owned(), source };
    let mut samples = Samples::default();
    let mut questions = Vec::new();
    for (index, line) in BufReader::new(traces::input::open_text(path)?).lines().enumerate() {
        let text = line.map_err(in_file)?;
        let text = text.trim_start_matches('\u{feff}').trim();
        let line = Line { path, number: index + 1 };
        if text.starts_with('[') {
            return Err(line.error("the object", "found a list, expected an object in each line: run `jq -c '.[]'`"));
        }
        if text.is_empty() {
            continue;
        }
        let keys: HashMap<String, serde::de::IgnoredAny> = line.parse(text)?;
        if keys.contains_key("arguments") {
            samples.push(&line, line.parse(text)?, &mut questions)?;
        } else if !["query", "choices", "gold"].iter().any(|key| keys.contains_key(*key)) {
            let expected = "expected `query`, `choices` and `gold`, or a sample that the LM Evaluation Harness logged \
                            (`samples_*.jsonl` of --log_samples)";
            return Err(line.error("the object", format!("found neither a question nor a sample, {expected}")));
        } else {
            questions.push(line.document(line.parse(text)?)?);
        }
    }
    let warnings = samples.finish(path, &mut questions)?;
    if questions.len() < at_least {
        return Err(TrainingError::TooFewQuestions {
            path: path.to_owned(),
            found: questions.len(),
            expected: at_least,
        });
    }
    Ok(QuestionFile { questions, warnings })
}

/// A document as returned by the harness's `process_docs`.
#[derive(Deserialize)]
struct Document {
    query: String,
    choices: Vec<String>,
    gold: usize,
}

/// Position of a question.
pub(crate) struct Line<'a> {
    pub path: &'a Path,
    pub number: usize,
}

impl Line<'_> {
    pub fn error(&self, key: impl Into<String>, message: impl Into<String>) -> TrainingError {
        let (path, key, message) = (self.path.to_owned(), key.into(), message.into());
        TrainingError::Json { path, line: self.number, key, message }
    }

    fn parse<T: DeserializeOwned>(&self, text: &str) -> Result<T, TrainingError> {
        let mut json = serde_json::Deserializer::from_str(text);
        serde_path_to_error::deserialize(&mut json).map_err(|error| {
            let key = match error.path().to_string() {
                path if path == "." || path == "?" => "the object".to_owned(),
                path => path,
            };
            self.error(key, traces::input::json_message(error.inner()))
        })
    }

    fn document(&self, Document { query, choices, gold }: Document) -> Result<Question, TrainingError> {
        if let Some(empty) = choices.iter().position(String::is_empty) {
            return Err(self.error(format!("choices[{empty}]"), "found no text, expected some"));
        }
        if choices.len() < 2 {
            return Err(self.error("choices", format!("found {}, expected at least 2", choices.len())));
        }
        if gold >= choices.len() {
            return Err(self.error("gold", format!("found {gold}, expected an index of the {} choices", choices.len())));
        }
        let choice =
            |text: String| Choice { context: query.clone(), continuation: CHOICE_DELIMITER.to_owned() + &text };
        Ok(Question { choices: choices.into_iter().map(choice).collect(), gold: vec![gold] })
    }
}

/// Log-likelihoods of a question's choices.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Indices of the right choices.
    pub gold: Vec<usize>,
    /// Length of each choice in characters.
    pub characters: Vec<usize>,
    /// Log-likelihoods in nats, by loop and choice.
    pub log_likelihoods: Vec<Vec<f64>>,
    /// Number of choices whose context was cut at its beginning to fit the model's positions.
    pub truncated: usize,
}

/// Answers questions at every loop; calls `done` after each.
///
/// # Errors
/// If a choice by itself does not fit the model's positions, the tokenizer rejects a text, or a tensor operation fails.
pub fn answer(
    model: &Reference,
    tokenizer: &Tokenizer,
    questions: &[Question],
    mut done: impl FnMut(),
) -> Result<Vec<Answer>, TrainingError> {
    let max_positions = model.config().max_positions;
    let before = before_nothing(tokenizer)?;
    let mut answers = Vec::with_capacity(questions.len());
    for (index, question) in questions.iter().enumerate() {
        let characters = question.choices.iter().map(Choice::characters).collect();
        let log_likelihoods = vec![Vec::new(); model.config().num_loops];
        let mut answer = Answer { gold: question.gold.clone(), characters, log_likelihoods, truncated: 0 };
        for choice in &question.choices {
            let (tokens, continuation) = encode(tokenizer, choice, &before)?;
            if continuation > max_positions {
                return Err(TrainingError::ChoiceTooLong { question: index, tokens: continuation, max_positions });
            }
            let kept = &tokens[tokens.len().saturating_sub(max_positions + 1)..];
            answer.truncated += usize::from(kept.len() < tokens.len());
            for (loops, nats) in answer.log_likelihoods.iter_mut().zip(log_likelihoods_of(model, kept, continuation)?) {
                loops.push(nats);
            }
        }
        answers.push(answer);
        done();
    }
    Ok(answers)
}

/// Tokens in place of an empty context, as in the harness: those that every sequence begins with, or else the
/// tokenizer's end-of-text token, or else a line end.
fn before_nothing(tokenizer: &Tokenizer) -> Result<Vec<u32>, TrainingError> {
    const ENDS: [&str; 6] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>"];
    let begin = tokenizer.begin()?;
    if !begin.is_empty() {
        return Ok(begin);
    }
    match ENDS.iter().find_map(|end| tokenizer.id_of(end)) {
        Some(end) => Ok(vec![end]),
        None => Ok(tokenizer.encode("\n")?),
    }
}

/// Tokens of context and continuation, after those that every sequence begins with, and how many of them belong to the
/// continuation. White space at the end of the context counts to the continuation, whose first token usually includes
/// it. An empty context has the tokens in `before`.
fn encode(tokenizer: &Tokenizer, choice: &Choice, before: &[u32]) -> Result<(Vec<u32>, usize), TrainingError> {
    let text = format!("{}{}", choice.context, choice.continuation);
    let context = choice.context.trim_end();
    if context.is_empty() {
        let continuation = tokenizer.encode(&text)?;
        // As in the harness, a continuation that begins with that token needs nothing before it.
        let begins = continuation.len() > 1 && continuation.first() == before.last();
        return Ok(match begins {
            true => (continuation.clone(), continuation.len() - 1),
            false => ([before, &continuation[..]].concat(), continuation.len()),
        });
    }
    let whole = tokenizer.encode_prompt(&text)?;
    let context = tokenizer.encode_prompt(context)?.len();
    let continuation = whole.len().saturating_sub(context).max(1);
    Ok((whole, continuation))
}

/// Log-likelihood of the last `continuation` of `tokens` given the tokens before them, in nats by loop.
fn log_likelihoods_of(model: &Reference, tokens: &[u32], continuation: usize) -> Result<Vec<f64>, TrainingError> {
    let (inputs, targets) = inputs_and_targets(&[tokens], model.device())?;
    let skip = targets.elem_count() - continuation;
    let targets = targets.narrow(0, skip, continuation)?;
    let mut nats = Vec::new();
    for (depth, hidden) in model.hidden_states(&inputs)?.iter().enumerate() {
        let logits = model.logits(&model.exit(hidden, 1)?.narrow(0, skip, continuation)?, depth)?;
        let mean: f32 = cross_entropy(&logits, &targets)?.to_scalar()?;
        nats.push(-f64::from(mean) * continuation as f64);
    }
    Ok(nats)
}

/// Accuracy of one loop, named as in the harness.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Accuracy {
    /// Number of passes: 1 is the first loop.
    pub passes: usize,
    /// Number of answered questions.
    pub questions: usize,
    /// Share of questions whose right choice has the greatest log-likelihood.
    pub acc: f64,
    /// Standard error of `acc`.
    pub acc_stderr: f64,
    /// Share of questions whose right choice has the greatest log-likelihood per character.
    pub acc_norm: f64,
    /// Standard error of `acc_norm`.
    pub acc_norm_stderr: f64,
}

/// Accuracy by loop, from at least one answer.
pub fn accuracies(answers: &[Answer]) -> Vec<Accuracy> {
    let loops = answers.first().map_or(0, |answer| answer.log_likelihoods.len());
    let accuracy = |depth: usize| {
        let share = |is_right: &dyn Fn(&Answer) -> bool| {
            answers.iter().filter(|answer| is_right(answer)).count() as f64 / answers.len() as f64
        };
        let stderr = |share: f64| (share * (1.0 - share) / (answers.len() as f64 - 1.0).max(1.0)).sqrt();
        let acc = share(&|answer| answer.gold.contains(&greatest(&answer.log_likelihoods[depth])));
        let acc_norm = share(&|answer| {
            let per_character = answer.log_likelihoods[depth].iter().zip(&answer.characters);
            let per_character: Vec<f64> = per_character.map(|(nats, &characters)| nats / characters as f64).collect();
            answer.gold.contains(&greatest(&per_character))
        });
        let (acc_stderr, acc_norm_stderr) = (stderr(acc), stderr(acc_norm));
        Accuracy { passes: depth + 1, questions: answers.len(), acc, acc_stderr, acc_norm, acc_norm_stderr }
    };
    (0..loops).map(accuracy).collect()
}

/// Index of the greatest number; the first of equals.
fn greatest(numbers: &[f64]) -> usize {
    (1..numbers.len()).fold(0, |best, index| if numbers[index] > numbers[best] { index } else { best })
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Tensor};
    use engine::{ModelConfig, Weights};

    const VOCAB: usize = 256;

    fn question(query: &str, choices: &[&str], gold: usize) -> Question {
        let choice = |text: &&str| Choice { context: query.to_owned(), continuation: format!(" {text}") };
        Question { choices: choices.iter().map(choice).collect(), gold: vec![gold] }
    }

    fn read(text: &str) -> Result<QuestionFile, TrainingError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("questions.jsonl");
        std::fs::write(&path, text).unwrap();
        read_questions(&path, 1)
    }

    fn tokenizer() -> Tokenizer {
        Tokenizer::train("bytes alone", VOCAB).unwrap()
    }

    /// A model of bytes that ignores positions and context. The byte after `previous` is `next` with the given odds in
    /// nats; after other bytes, every byte is equally likely.
    fn bigrams(pairs: &[(u8, u8, f32)]) -> Reference {
        let config = ModelConfig {
            vocab_size: VOCAB,
            hidden_size: VOCAB,
            intermediate_size: 2,
            num_heads: 1,
            num_kv_heads: 1,
            head_dim: 2,
            block_layers: 1,
            num_loops: 2,
            tie_embeddings: false,
            max_positions: 32,
            ..ModelConfig::default()
        };
        let id = |byte: u8| tokenizer().encode(std::str::from_utf8(&[byte]).unwrap()).unwrap()[0] as usize;
        let mut head = vec![0.0; VOCAB * VOCAB];
        for &(previous, next, nats) in pairs {
            // An embedded byte is a vector with one non-zero component, sqrt(VOCAB), which the norm does not change.
            head[id(next) * VOCAB + id(previous)] = nats / (VOCAB as f32).sqrt();
        }
        let random = Weights::random(config.clone(), 1).unwrap();
        let tensor = |(name, tensor): (&String, &Tensor)| {
            let tensor = match name.as_str() {
                "embed_tokens.weight" => {
                    (Tensor::eye(VOCAB, tensor.dtype(), &Device::Cpu).unwrap() * (VOCAB as f64).sqrt()).unwrap()
                }
                "lm_head.weight" => Tensor::from_slice(&head, (VOCAB, VOCAB), &Device::Cpu).unwrap(),
                "norm.weight" => tensor.ones_like().unwrap(),
                _ => tensor.zeros_like().unwrap(),
            };
            (name.clone(), tensor)
        };
        let tensors = random.tensors().iter().map(tensor).collect();
        Reference::new(&Weights::from_tensors(config, tensors, "test").unwrap()).unwrap()
    }

    #[test]
    fn log_likelihoods_are_those_of_the_choice_given_its_context() {
        let model = bigrams(&[(b'=', b' ', 3.0), (b' ', b'x', 2.0), (b' ', b'y', 1.0)]);
        let questions = [question("a=", &["x", "yz"], 0), question("a= ", &["x", "q"], 1)];
        let answers = answer(&model, &tokenizer(), &questions, || ()).unwrap();
        let nats = |odds: f64, all: &[f64]| odds - (all.iter().map(|o| o.exp() - 1.0).sum::<f64>() + VOCAB as f64).ln();
        let after_equals = nats(3.0, &[3.0]);
        let after_space = |odds| nats(odds, &[2.0, 1.0]);
        let expected = [
            [after_equals + after_space(2.0), after_equals + after_space(1.0) + nats(0.0, &[])],
            [after_equals + after_space(0.0) + after_space(2.0), after_equals + 2.0 * after_space(0.0)],
        ];
        for (answer, expected) in answers.iter().zip(expected) {
            for loops in &answer.log_likelihoods {
                for (found, expected) in loops.iter().zip(expected) {
                    assert!((found - expected).abs() < 1e-3, "{found} is not {expected}");
                }
            }
        }
        assert_eq!(answers[0].characters, [1, 2]);
    }

    #[test]
    fn accuracies_of_a_model_that_knows_its_answers_are_known() {
        // After a space x is likelier than y; after x only another x is likely.
        let model = bigrams(&[(b' ', b'x', 9.0), (b' ', b'y', 8.0), (b'x', b'x', 12.0)]);
        let questions = [
            question("one:", &["x", "y"], 0),
            question("two:", &["y", "x"], 0),
            // `x` has the greater log-likelihood, `xxxx` the greater one per character.
            question("three:", &["xxxx", "x"], 0),
            question("four:", &["q", "x", "z"], 1),
        ];
        let answers = answer(&model, &tokenizer(), &questions, || ()).unwrap();
        let found = accuracies(&answers);
        assert_eq!(found.len(), 2);
        for accuracy in found {
            assert_eq!((accuracy.questions, accuracy.acc, accuracy.acc_norm), (4, 0.5, 0.75));
            // The standard deviation of 1, 0, 0, 1 over the root of 4, as in the harness.
            assert!((accuracy.acc_stderr - (1.0_f64 / 3.0).sqrt() / 2.0).abs() < 1e-12);
        }
    }

    #[test]
    fn examples_come_before_the_question_with_their_right_choice() {
        let examples =
            [question("1+1=", &["2", "3"], 0), question("1+2=", &["2", "3"], 1), question("2+2=", &["4"], 0)];
        let found = question("2+1=", &["3", "4"], 0).after_examples(&examples, 2);
        for choice in &found.choices {
            assert_eq!(choice.context, "1+1= 2\n\n1+2= 3\n\n2+1=");
        }
        assert_eq!(found.choices[1].continuation, " 4");
    }

    #[test]
    fn a_choice_after_no_text_follows_what_a_sequence_begins_with() {
        let model = bigrams(&[(b'\n', b'x', 3.0), (b'x', b'y', 2.0)]);
        let choice = |context: &str, text: &str| Choice { context: context.to_owned(), continuation: text.to_owned() };
        let question = Question { choices: vec![choice("", "xy"), choice("", "y"), choice("\n", "x")], gold: vec![0] };
        let answers = answer(&model, &tokenizer(), &[question], || ()).unwrap();
        let nats = |odds: f64| odds - (odds.exp() + VOCAB as f64 - 1.0).ln();
        let after_line_end = |odds: f64| odds - (3.0_f64.exp() + VOCAB as f64 - 1.0).ln();
        // The line end of the last context is left to its choice, which begins with what stands for no text.
        let expected = [after_line_end(3.0) + nats(2.0), after_line_end(0.0), after_line_end(3.0)];
        for loops in &answers[0].log_likelihoods {
            for (found, expected) in loops.iter().zip(expected) {
                assert!((found - expected).abs() < 1e-3, "{found} is not {expected}");
            }
        }
    }

    #[test]
    fn any_of_several_right_choices_is_right() {
        let model = bigrams(&[(b' ', b'x', 9.0), (b' ', b'y', 8.0)]);
        let several = |gold: &[usize]| Question { gold: gold.to_vec(), ..question("one:", &["y", "x", "q"], 0) };
        let answers = answer(&model, &tokenizer(), &[several(&[0, 1]), several(&[0, 2])], || ()).unwrap();
        assert!(accuracies(&answers).iter().all(|accuracy| (accuracy.acc, accuracy.acc_norm) == (0.5, 0.5)));
    }

    #[test]
    fn a_context_beyond_the_positions_loses_its_beginning_and_a_choice_that_long_is_refused() {
        let model = bigrams(&[(b' ', b'x', 2.0)]);
        let answers = |context: usize, choice: usize| {
            let questions = [question(&"a".repeat(context), &["x", &"x".repeat(choice)], 0)];
            answer(&model, &tokenizer(), &questions, || ())
        };
        let (fits, cut) = (answers(30, 2).unwrap(), answers(100, 2).unwrap());
        assert_eq!((fits[0].truncated, cut[0].truncated), (0, 2));
        assert_eq!(fits[0].log_likelihoods, cut[0].log_likelihoods);
        let message = answers(3, 32).unwrap_err().to_string();
        assert!(message.contains("question 0: a choice has 33 tokens, expected at most the model's 32"), "{message}");
    }

    #[test]
    fn a_logged_sample_is_the_question_of_its_document() {
        let document = r#"{"query": "The sky is", "choices": ["blue", "green"], "gold": 1, "ind": 7}"#;
        let sample = |target: &str| {
            format!(
                r#"{{"doc_id": 0, "target": {target}, "arguments": {{
                "gen_args_1": {{"arg_0": "The sky is", "arg_1": " green"}},
                "gen_args_0": {{"arg_0": "The sky is", "arg_1": " blue"}}}}, "acc": 0.0}}"#
            )
            .replace('\n', " ")
        };
        let found = read(&format!("{document}\n\n{}\n{}\n", sample("1"), sample("\"1\"").replace("0,", "1,"))).unwrap();
        assert_eq!(found.questions, vec![question("The sky is", &["blue", "green"], 1); 3]);
        assert!(found.warnings.is_empty());
    }

    #[test]
    fn bad_questions_are_named_by_line_and_key() {
        let good = r#"{"query": "q", "choices": ["a", "b"], "gold": 0}"#;
        let cases = [
            ("", "found 0 questions, expected at least 1"),
            (r#"{"query": "q", "choices": ["a", "b"]}"#, ":1: the object: missing field `gold`"),
            (
                r#"{"query": "q", "choices": ["a", "b"], "gold": "1"}"#,
                ":1: gold: invalid type: string \"1\", expected a whole",
            ),
            (
                r#"{"results": {"arc_easy": {}}}"#,
                ":1: the object: found neither a question nor a sample, expected `query`",
            ),
            (
                "{\n  \"results\": {}\n}",
                ":1: the object: EOF while parsing an object, expected a whole object in each line",
            ),
            (r#"{"query": "q", "choices": ["a", 3], "gold": 0}"#, ":1: choices[1]: invalid type: integer `3`"),
            (r#"{"query": "q", "choices": ["a", ""], "gold": 0}"#, ":1: choices[1]: found no text"),
            (r#"{"query": "q", "choices": ["a"], "gold": 0}"#, ":1: choices: found 1, expected at least 2"),
            (r#"{"query": "q", "choices": ["a", "b"], "gold": 2}"#, ":1: gold: found 2, expected an index of the 2"),
            (&format!("{good}\n\n{{\"query\""), ":3: the object: EOF"),
            (r#"{"arguments": {"gen_args_1": {"arg_0": "q", "arg_1": "a"}}, "target": 0}"#, ":1: arguments.gen_args_0"),
            ("[{}]", ":1: the object: found a list, expected an object in each line"),
        ];
        for (text, expected) in cases {
            let message = read(text).unwrap_err().to_string();
            assert!(message.contains("questions.jsonl") && message.contains(expected), "{expected} in {message}");
        }
    }
}
