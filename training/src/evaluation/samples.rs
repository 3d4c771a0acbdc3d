//! Samples of multiple-choice tasks, as logged by the LM Evaluation Harness with `--log_samples`.
//!
//! A line contains the requests of a document (`arguments`: context and continuation of each), its `target`, and the
//! outcome (`filtered_resps`, `acc`). The `target` tells which choices are right. Its text is one of
//!
//! | target | right choices |
//! | --- | --- |
//! | `1`, `"1"`, `"[0, 2]"`, `[0, 2]` | the choices with these indices |
//! | `"True"` | the choice with this text |
//! | `"B"`, `"(B)"` | the choice with this label, in the document's `choices.label` or by its position |
//! | what follows in every choice | the context given by `acc` and `filtered_resps`, or by the document: its `answer` counts from 1 (WinoGrande), its `label` from 0 |
//!
//! Where a text is both an index and a choice, the reading that agrees with the log's own `acc` counts.

use std::collections::{HashMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::TrainingError;
use crate::evaluation::multiple_choice::{Choice, Line, Question};

/// Metrics of the harness that follow from the choices' likelihoods and a right choice.
const METRICS: [&str; 9] =
    ["acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match", "f1", "mcc", "brier_score", "likelihood"];

/// How a target identifies the right choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Reading {
    Index,
    Text,
    Bool,
    Label,
    Context,
}

/// A target with more than one reading, none of which its line rules out.
struct Open {
    question: usize,
    line: usize,
    readings: Vec<(Reading, Vec<usize>)>,
}

/// The samples of a log.
#[derive(Default)]
pub(crate) struct Samples {
    /// Hashes of the documents read so far, with their requests.
    seen: HashSet<u64>,
    repeated: usize,
    open: Vec<Open>,
    /// By reading: how many ambiguous targets were decided by their line.
    decided: HashMap<Reading, usize>,
}

impl Samples {
    /// Adds the question of a line, unless it was read before under another filter.
    ///
    /// # Errors
    /// If it belongs to another type of task, or does not contain which choice is right.
    pub fn push(
        &mut self,
        line: &Line<'_>,
        sample: Map<String, Value>,
        questions: &mut Vec<Question>,
    ) -> Result<(), TrainingError> {
        let choices = choices(line, &sample)?;
        check_task(line, &sample, &choices)?;
        if let Some(id) = sample.get("doc_id")
            && !self.seen.insert(hash(&(id.to_string(), &choices)))
        {
            self.repeated += 1;
            return Ok(());
        }
        let target = sample.get("target").ok_or_else(|| line.error("the object", "missing field `target`"))?;
        let doc = sample.get("doc").unwrap_or(&Value::Null);
        let mut all = readings(target, doc, &choices);
        all.dedup_by(|a, b| a.1 == b.1);
        let mut left = all.clone();
        if let Some((chosen, is_right)) = outcome(&sample, choices.len()) {
            left.retain(|(_, gold)| gold.contains(&chosen) == is_right);
            if left.is_empty()
                && let Some(gold) = gold_of_outcome(&choices, target, chosen, is_right)
            {
                left.push((Reading::Context, vec![gold]));
            }
        }
        let Some((reading, gold)) = left.first().cloned() else {
            return Err(line.error("target", unread(target, &choices, !all.is_empty())));
        };
        match left.len() {
            1 if all.len() > 1 => *self.decided.entry(reading).or_default() += 1,
            1 => {}
            _ => self.open.push(Open { question: questions.len(), line: line.number, readings: left }),
        }
        questions.push(Question { choices, gold });
        Ok(())
    }

    /// Decides ambiguous targets as the other lines of the log were decided. Returns what was left out, as warnings.
    ///
    /// # Errors
    /// If no other line was decided.
    pub fn finish(self, path: &Path, questions: &mut [Question]) -> Result<Vec<String>, TrainingError> {
        for Open { question, line, readings } in self.open {
            let decided = readings.iter().filter(|(reading, _)| self.decided.contains_key(reading));
            match decided.collect::<Vec<_>>()[..] {
                [(_, gold)] => questions[question].gold = gold.clone(),
                _ => {
                    let message = "found a number that is both an index and a choice, and no line whose `acc` tells \
                                   which, expected `acc` and `filtered_resps` as the harness writes them";
                    return Err(Line { path, number: line }.error("target", message));
                }
            }
        }
        let repeated = self.repeated;
        let warning =
            format!("{repeated} lines hold a question that stands before, as under another filter: it is read once");
        Ok((repeated > 0).then_some(warning).into_iter().collect())
    }
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// Context and continuation of each request, without the requests that only serve `acc_mutual_info`.
fn choices(line: &Line<'_>, sample: &Map<String, Value>) -> Result<Vec<Choice>, TrainingError> {
    let arguments = &sample["arguments"];
    let count = arguments.as_object().map(Map::len).or(arguments.as_array().map(Vec::len));
    let count = count.ok_or_else(|| line.error("arguments", "found neither an object nor a list of requests"))?;
    let mut choices = Vec::new();
    for index in 0..count {
        let key = match arguments {
            Value::Array(_) => format!("arguments[{index}]"),
            _ => format!("arguments.gen_args_{index}"),
        };
        let request = arguments.get(format!("gen_args_{index}")).or_else(|| arguments.get(index));
        let request = request.ok_or_else(|| line.error(&key, "found none, expected one for each choice"))?;
        let argument = |place: usize| request.get(format!("arg_{place}")).or_else(|| request.get(place));
        let other_task = |task: &str| line.error(&key, format!("found a request of the type {task}, {EXPECTED}"));
        match (argument(0), argument(1), argument(2)) {
            (_, _, Some(_)) => {
                return Err(line.error(&key, format!("found a request with an image or sound, {EXPECTED}")));
            }
            (Some(Value::String(context)), Some(Value::String(continuation)), None) => {
                if continuation.trim().is_empty() {
                    return Err(line.error(format!("{key}.arg_1"), "found no text, expected some"));
                }
                choices.push(Choice { context: context.clone(), continuation: continuation.clone() });
            }
            (Some(_), Some(Value::Object(_)), None) => return Err(other_task("generate_until")),
            (Some(_), None, None) => return Err(other_task("loglikelihood_rolling")),
            _ => return Err(line.error(&key, "found no pair of texts, expected a context and a continuation")),
        }
    }
    let (conditional, without) = choices.split_at(choices.len() / 2);
    let is_mutual = !conditional.is_empty()
        && conditional.len() == without.len()
        && conditional.iter().zip(without).all(|(a, b)| a.continuation == b.continuation && b.context.is_empty())
        && (sample.contains_key("acc_mutual_info") || conditional.iter().any(|choice| !choice.context.is_empty()));
    if is_mutual {
        choices.truncate(choices.len() / 2);
    }
    Ok(choices)
}

const EXPECTED: &str = "expected those of a multiple_choice task";

/// Checks that a sample belongs to a task that is scored by the likeliest choice.
fn check_task(line: &Line<'_>, sample: &Map<String, Value>, choices: &[Choice]) -> Result<(), TrainingError> {
    if choices.len() < 2 {
        let found = format!("found {} request, as of the type loglikelihood, {EXPECTED}", choices.len());
        return Err(line.error("arguments", found));
    }
    let scored_otherwise = |key: &str, found: String| {
        Err(line.error(key, format!("found {found}, expected a multiple_choice task with one likeliest choice")))
    };
    if let Some(acc) = sample.get("acc")
        && !acc.as_f64().is_some_and(|acc| acc == 0.0 || acc == 1.0)
        && !acc.is_boolean()
    {
        return scored_otherwise("acc", format!("{acc}, as of a task that shares out probability (TruthfulQA MC2)"));
    }
    let labels = sample.get("doc").and_then(|doc| doc.pointer("/mc2_targets/labels")).and_then(Value::as_array);
    let mc1 = sample.get("doc").and_then(|doc| doc.pointer("/mc1_targets/labels")).and_then(Value::as_array);
    if labels.is_some_and(|labels| labels.len() == choices.len()) && mc1.is_none_or(|mc1| mc1.len() != choices.len()) {
        return scored_otherwise("doc", "the choices of TruthfulQA MC2, which shares out probability".to_owned());
    }
    let metrics = sample.get("metrics").and_then(Value::as_array);
    let names: Vec<&str> = metrics.into_iter().flatten().filter_map(Value::as_str).collect();
    if !names.is_empty() && !names.iter().any(|name| METRICS.contains(name)) {
        return scored_otherwise("metrics", names.join(", "));
    }
    Ok(())
}

/// All readings of a target, the likeliest first.
fn readings(target: &Value, doc: &Value, choices: &[Choice]) -> Vec<(Reading, Vec<usize>)> {
    let valid = |index: &usize| *index < choices.len();
    let indices: Vec<usize> = indices(target).into_iter().filter(valid).collect();
    let text = target.as_str().unwrap_or_default().trim();
    let continuation = |choice: &Choice| choice.continuation.trim() == text;
    let of_document = |gold: Option<usize>| gold.filter(valid).map(|gold| (Reading::Context, vec![gold]));
    if is_common_continuation(target, choices) {
        return of_document(context_in(doc)).into_iter().collect();
    }
    let mut readings = Vec::new();
    if !indices.is_empty() {
        readings.push((Reading::Index, indices));
    }
    if let Some(place) = choices.iter().position(continuation).filter(|_| !text.is_empty()) {
        readings.push((Reading::Text, vec![place]));
    }
    let truth = target.as_bool().or(match text {
        "True" => Some(true),
        "False" => Some(false),
        _ => None,
    });
    // In Python, the two are the numbers 1 and 0.
    if let Some(truth) = truth.filter(|_| readings.is_empty()) {
        readings.push((Reading::Bool, vec![usize::from(truth)]));
    }
    if let Some(place) = labelled(text, doc).filter(|place| valid(place) && readings.is_empty()) {
        readings.push((Reading::Label, vec![place]));
    }
    readings
}

/// Whether all choices continue with the target, so that they differ in their contexts.
fn is_common_continuation(target: &Value, choices: &[Choice]) -> bool {
    let text = target.as_str().unwrap_or_default().trim();
    let all_alike = choices.iter().all(|choice| choice.continuation.trim() == text);
    all_alike && choices.iter().any(|choice| choice.context != choices[0].context)
}

/// The numbers of a number or a list, in JSON or as printed by Python.
fn indices(target: &Value) -> Vec<usize> {
    let index = |value: &Value| value.as_u64().and_then(|index| usize::try_from(index).ok());
    match target {
        Value::Array(values) => values.iter().filter_map(index).collect(),
        Value::String(text) => match text.trim().strip_prefix('[').and_then(|list| list.strip_suffix(']')) {
            Some(list) => list.split(',').filter_map(|index| index.trim().parse().ok()).collect(),
            None => text.trim().parse().ok().into_iter().collect(),
        },
        _ => index(target).into_iter().collect(),
    }
}

/// Index of the label `B` or `(B)` in a document's list of labels or, without one, in the alphabet.
fn labelled(text: &str, doc: &Value) -> Option<usize> {
    let label = text.trim_matches(['(', ')', '.']);
    match doc.pointer("/choices/label").and_then(Value::as_array) {
        Some(labels) => labels.iter().position(|known| known.as_str() == Some(label)),
        None => match label.as_bytes() {
            &[letter @ b'A'..=b'Z'] => Some(usize::from(letter - b'A')),
            _ => None,
        },
    }
}

/// The right context in a document whose choices have one continuation: `answer` counts from 1, `label` from 0.
fn context_in(doc: &Value) -> Option<usize> {
    let number = |value: &Value| value.as_u64().or_else(|| value.as_str()?.trim().parse().ok());
    let answer = doc.get("answer").and_then(number).and_then(|answer| answer.checked_sub(1));
    answer.or_else(|| doc.get("label").and_then(number)).and_then(|place| usize::try_from(place).ok())
}

/// The likeliest choice by the log's likelihoods, and whether the log counts it as right.
fn outcome(sample: &Map<String, Value>, choices: usize) -> Option<(usize, bool)> {
    let acc = sample.get("acc")?;
    let is_right = acc.as_bool().or(acc.as_f64().map(|acc| acc == 1.0))?;
    let answers = sample.get("filtered_resps")?.as_array()?;
    let nats = |answer: &Value| {
        let nats = answer.get(0).unwrap_or(answer);
        nats.as_f64().or_else(|| nats.as_str()?.trim().parse().ok())
    };
    let nats: Vec<f64> = answers.get(..choices)?.iter().map(nats).collect::<Option<_>>()?;
    let greatest = (1..nats.len()).fold(0, |best, index| if nats[index] > nats[best] { index } else { best });
    Some((greatest, is_right))
}

/// The right one of several contexts, where the outcome determines it.
fn gold_of_outcome(choices: &[Choice], target: &Value, chosen: usize, is_right: bool) -> Option<usize> {
    match (is_common_continuation(target, choices), is_right) {
        (true, true) => Some(chosen),
        (true, false) if choices.len() == 2 => Some(1 - chosen),
        _ => None,
    }
}

/// The problem with a target that cannot be read.
fn unread(target: &Value, choices: &[Choice], contradicted: bool) -> String {
    let choices = if is_common_continuation(target, choices) {
        "the right context in `acc` with `filtered_resps`, in `doc.answer` (from 1) or in `doc.label` (from 0)"
            .to_owned()
    } else {
        format!("the index, the text or the label of one of {} choices", choices.len())
    };
    match contradicted {
        true => format!("found {target}, with which the log's own `acc` does not agree, expected {choices}"),
        false => format!("found {target}, expected {choices}"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::evaluation::multiple_choice::{QuestionFile, read_questions};

    /// A log with these samples.
    fn log(samples: &[Value]) -> Result<QuestionFile, TrainingError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("samples.jsonl");
        let lines: String = samples.iter().map(|sample| format!("{sample}\n")).collect();
        std::fs::write(&path, lines).unwrap();
        read_questions(&path, 1)
    }

    fn requests(pairs: &[(&str, &str)]) -> Value {
        let request = |(index, (context, text)): (usize, &(&str, &str))| {
            (format!("gen_args_{index}"), json!({"arg_0": context, "arg_1": text}))
        };
        pairs.iter().enumerate().map(request).collect::<Map<String, Value>>().into()
    }

    fn after(context: &str, texts: &[&str]) -> Value {
        requests(&texts.iter().map(|text| (context, *text)).collect::<Vec<_>>())
    }

    fn gold(samples: &[Value]) -> Vec<Vec<usize>> {
        log(samples).unwrap().questions.into_iter().map(|question| question.gold).collect()
    }

    fn error(sample: Value) -> String {
        log(&[sample]).unwrap_err().to_string()
    }

    #[test]
    fn a_target_is_an_index_a_list_a_text_or_a_label() {
        let verdicts = after(
            "A man sings.\nQuestion: Somebody sings. True, False, or Neither?\nAnswer:",
            &[" True", " Neither", " False"],
        );
        let letters = after("Pick:", &[" A", " B", " C"]);
        let labels = json!({"choices": {"text": ["x", "y", "z"], "label": ["P", "Q", "R"]}});
        for (arguments, doc, target, expected) in [
            (&verdicts, json!(null), json!("True"), vec![0]),
            (&verdicts, json!(null), json!("False"), vec![2]),
            (&verdicts, json!(null), json!("1"), vec![1]),
            (&verdicts, json!(null), json!(2), vec![2]),
            (&verdicts, json!(null), json!("[0, 2]"), vec![0, 2]),
            (&verdicts, json!(null), json!([1]), vec![1]),
            (&verdicts, json!(null), json!("[1, 7]"), vec![1]),
            (&letters, json!(null), json!("B"), vec![1]),
            (&after("Pick:", &[" red", " blue"]), json!(null), json!("(B)"), vec![1]),
            (&after("Pick:", &[" x", " y", " z"]), labels, json!("R"), vec![2]),
            (&after("Is it?", &[" no", " yes"]), json!(null), json!("True"), vec![1]),
            (&after("Is it?", &[" no", " yes"]), json!(null), json!(false), vec![0]),
        ] {
            let sample = json!({"doc_id": 0, "doc": doc, "target": target, "arguments": arguments});
            assert_eq!(gold(&[sample]), [expected], "{target} of {arguments}");
        }
    }

    #[test]
    fn contexts_may_be_empty_and_requests_may_be_lists() {
        let sample =
            json!({"doc_id": 0, "target": "0", "arguments": after("", &["The cat sleeps.", "The cat sleep."])});
        let question = log(&[sample]).unwrap().questions.remove(0);
        assert_eq!((question.choices[1].context.as_str(), &question.gold[..]), ("", &[0][..]));
        let older = json!({"doc_id": 0, "target": 1, "arguments": [["Q", " a"], ["Q", " b"]]});
        assert_eq!(gold(&[older]), [[1]]);
    }

    #[test]
    fn the_right_one_of_several_contexts_is_in_the_document_or_in_the_outcome() {
        let oven = "The pot would not fit the oven because the oven";
        let pot = "The pot would not fit the oven because the pot";
        let arguments = requests(&[(oven, " was too big."), (pot, " was too big.")]);
        let sample = |doc: Value, rest: Value| {
            let mut sample = json!({"doc_id": 0, "doc": doc, "target": "was too big.", "arguments": arguments});
            sample.as_object_mut().unwrap().extend(rest.as_object().unwrap().clone());
            sample
        };
        let resps = |first: &str, second: &str, acc: f64| json!({"filtered_resps": [[first, "False"], [second, "False"]], "acc": acc});
        assert_eq!(gold(&[sample(json!({"answer": "2"}), json!({"acc": 1.0}))]), [[1]]);
        assert_eq!(gold(&[sample(json!({"label": 0}), json!({}))]), [[0]]);
        assert_eq!(gold(&[sample(json!({}), resps("-9.5", "-3.25", 1.0))]), [[1]]);
        assert_eq!(gold(&[sample(json!({}), resps("-9.5", "-3.25", 0.0))]), [[0]]);
        assert_eq!(gold(&[sample(json!({"answer": "1"}), resps("-9.5", "-3.25", 1.0))]), [[1]], "the outcome counts");
        let message = error(sample(json!({}), json!({"acc": 1.0})));
        assert!(message.contains("expected the right context in `acc` with `filtered_resps`"), "{message}");
    }

    #[test]
    fn a_number_that_is_a_choice_too_is_read_as_the_log_scored_it() {
        let sample = |id: u32, target: &str, nats: [f64; 3], acc: f64| {
            let resps: Vec<Value> = nats.iter().map(|nats| json!([nats.to_string(), "False"])).collect();
            let arguments = after("How many?", &[" 1", " 2", " 3"]);
            json!({"doc_id": id, "target": target, "arguments": arguments, "filtered_resps": resps, "acc": acc})
        };
        let best = |place: usize| [0, 1, 2].map(|index| if index == place { -1.0 } else { -5.0 });
        let open = sample(0, "2", best(0), 0.0);
        assert_eq!(gold(&[open.clone(), sample(1, "2", best(1), 1.0)]), [[1], [1]], "texts");
        assert_eq!(gold(&[open.clone(), sample(1, "2", best(2), 1.0)]), [[2], [2]], "indices");
        let alike = |id: u32| {
            let arguments = after("How many?", &[" 0", " 1"]);
            json!({"doc_id": id, "target": "1", "arguments": arguments})
        };
        assert_eq!(gold(&[alike(0)]), [[1]], "both readings say so");
        let message = log(&[alike(1), open.clone()]).unwrap_err().to_string();
        assert!(message.contains(":2: target: found a number"), "which decides nothing of others: {message}");
        let message = error(open);
        assert!(message.contains(":1: target: found a number that is both an index and a choice"), "{message}");
        let message = error(sample(0, "0", best(1), 1.0));
        assert!(message.contains("with which the log's own `acc` does not agree"), "{message}");
    }

    #[test]
    fn a_question_under_several_filters_is_read_once() {
        let sample = |id: u32, filter: &str| json!({"doc_id": id, "filter": filter, "target": "0", "arguments": after("Q", &[" a", " b"])});
        let found = log(&[sample(0, "none"), sample(1, "none"), sample(0, "strict"), sample(1, "strict")]).unwrap();
        assert_eq!(found.questions.len(), 2);
        assert_eq!(found.warnings.len(), 1);
        assert!(found.warnings[0].starts_with("2 lines hold a question that stands before"), "{:?}", found.warnings);
        let other_task = json!({"doc_id": 0, "target": "0", "arguments": after("R", &[" a", " b"])});
        assert_eq!(log(&[sample(0, "none"), other_task]).unwrap().questions.len(), 2);
    }

    #[test]
    fn requests_for_mutual_information_are_no_choices() {
        let mut pairs = vec![("Q", " a"), ("Q", " b")];
        pairs.extend([("", " a"), ("", " b")]);
        let sample = json!({"doc_id": 0, "target": "1", "arguments": requests(&pairs), "acc_mutual_info": 1.0});
        let question = log(&[sample]).unwrap().questions.remove(0);
        assert_eq!(question.choices.len(), 2);
        assert_eq!(question.choices[0].context, "Q");
    }

    #[test]
    fn other_tasks_are_refused_by_their_type() {
        let choices = after("Q", &[" a", " b", " c"]);
        let cases = [
            (
                json!({"target": "4", "arguments": {"gen_args_0": {"arg_0": "2+2", "arg_1": {"until": ["\n"]}}}}),
                "generate_until",
            ),
            (json!({"target": "x", "arguments": {"gen_args_0": {"arg_0": "a text"}}}), "loglikelihood_rolling"),
            (
                json!({"target": "x", "arguments": after("The cat", &[" sat"])}),
                "found 1 request, as of the type loglikelihood",
            ),
            (
                json!({"target": "0", "arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": " a", "arg_2": {"visual": []}}}}),
                "an image or sound",
            ),
            (
                json!({"target": "0", "arguments": choices, "acc": 0.43}),
                "acc: found 0.43, as of a task that shares out",
            ),
            (
                json!({"target": "0", "arguments": choices, "acc": 1.0, "doc": {"mc1_targets": {"labels": [1, 0]}, "mc2_targets": {"labels": [1, 1, 0]}}}),
                "TruthfulQA MC2",
            ),
            (
                json!({"target": "0", "arguments": choices, "metrics": ["pct_stereotype"]}),
                "metrics: found pct_stereotype",
            ),
            (
                json!({"target": "7", "arguments": choices}),
                "target: found \"7\", expected the index, the text or the label",
            ),
            (json!({"target": "blue", "arguments": choices}), "target: found \"blue\", expected the index"),
            (json!({"arguments": choices}), "missing field `target`"),
            (
                json!({"target": "0", "arguments": after("Q", &[" a", " "])}),
                "arguments.gen_args_1.arg_1: found no text",
            ),
            (json!({"target": "0", "arguments": 3}), "arguments: found neither an object nor a list"),
        ];
        for (sample, expected) in cases {
            let message = error(sample);
            assert!(message.contains("samples.jsonl:1: ") && message.contains(expected), "{expected} in {message}");
        }
    }
}
