//! Reading a damaged file of questions or prompts gives them or an error, never a panic.

#[path = "../../traces/tests/allocations/mod.rs"]
mod allocations;
#[path = "../../traces/tests/damage/mod.rs"]
mod damage;

use allocations::Allocations;
use damage::{cases, damage, damaged};
use engine::{PromptLine, Tokenizer};
use proptest::prelude::*;
use training::evaluation::multiple_choice::read_questions;

#[global_allocator]
static ALLOCATIONS: Allocations = Allocations;

/// Limit of a single allocation for files of a few hundred bytes.
const MEMORY: usize = 1 << 20;

const FILES: [&str; 5] = [
    "{\"query\": \"The sky is\", \"choices\": [\"blue\", \"green\"], \"gold\": 0}\n",
    "{\"doc_id\": 0, \"filter\": \"none\", \"target\": \"1\", \"arguments\": {\"gen_args_0\": {\"arg_0\": \"Q\", \"arg_1\": \" 1\"}, \
     \"gen_args_1\": {\"arg_0\": \"Q\", \"arg_1\": \" 2\"}}, \"filtered_resps\": [[\"-1.5\", \"False\"], [\"-0.5\", \"True\"]], \
     \"acc\": 1.0}\n{\"doc_id\": 0, \"filter\": \"strict\", \"target\": \"[0, 1]\", \"arguments\": [[\"\", \" a\"], [\"\", \" b\"]]}\n",
    "{\"doc_id\": 3, \"doc\": {\"answer\": \"2\"}, \"target\": \"was too big.\", \"arguments\": {\"gen_args_0\": {\"arg_0\": \"the oven\", \
     \"arg_1\": \" was too big.\"}, \"gen_args_1\": {\"arg_0\": \"the pot\", \"arg_1\": \" was too big.\"}}, \"acc\": 0.0}\n",
    "{\"doc_id\": 1, \"target\": \"B\", \"doc\": {\"choices\": {\"label\": [\"A\", \"B\"]}}, \"acc_mutual_info\": 1, \"arguments\": \
     {\"gen_args_0\": {\"arg_0\": \"Q\", \"arg_1\": \" x\"}, \"gen_args_1\": {\"arg_0\": \"Q\", \"arg_1\": \" y\"}, \
     \"gen_args_2\": {\"arg_0\": \"\", \"arg_1\": \" x\"}, \"gen_args_3\": {\"arg_0\": \"\", \"arg_1\": \" y\"}}}\n",
    "{\"doc_id\": 2, \"target\": \"True\", \"metrics\": [\"acc\"], \"arguments\": {\"gen_args_0\": {\"arg_0\": \"é?\", \"arg_1\": \" no\"}, \
     \"gen_args_1\": {\"arg_0\": \"é?\", \"arg_1\": \" yes\"}}}\n",
];

const PROMPTS: [&str; 2] = [
    "{\"prompt\": \"06360=\", \"answer\": \"5\", \"class\": \"5\"}\n\n{\"prompt\": \"In the beginning\"}\n",
    "\u{feff}{\"prompt\": \"12=\", \"answer\": \"é ☃\", \"class\": null}\r\n{\"prompt\": \"3\", \"answer\": \"4\"}",
];

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn damaged_prompts(contents in prop::sample::select(&PROMPTS[..]), damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("prompts.jsonl");
        std::fs::write(&path, damaged(contents, &damages)).unwrap();
        let tokenizer = Tokenizer::train("12=3 12=3 12=3 12=3", 258).unwrap();
        let (found, allocated) = ALLOCATIONS.largest(|| PromptLine::read(&path, &tokenizer).ok());
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        for prompt in found.into_iter().flatten() {
            prop_assert!(!prompt.tokens.is_empty());
            prop_assert!(prompt.answer.is_none_or(|answer| !answer.text.is_empty() && answer.tokens > 0));
        }
    }

    #[test]
    fn damaged_questions(contents in prop::sample::select(&FILES[..]), damages in prop::collection::vec(damage(), 1..4)) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("questions.jsonl");
        std::fs::write(&path, damaged(contents, &damages)).unwrap();
        let (found, allocated) = ALLOCATIONS.largest(|| read_questions(&path, 1).ok());
        prop_assert!(allocated <= MEMORY, "{allocated} bytes at once");
        for question in found.into_iter().flat_map(|found| found.questions) {
            prop_assert!(question.choices.len() >= 2 && !question.gold.is_empty());
            prop_assert!(question.gold.iter().all(|&gold| gold < question.choices.len()));
            prop_assert!(question.choices.iter().all(|choice| !choice.continuation.is_empty()));
        }
    }
}
