//! The `requests` part of an experiment's configuration: a file or a random process, and what is done to it.

use std::fmt;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::closed_loop::{ClosedLoop, ThinkTime, Users};
use crate::error::{Result, TraceError};
use crate::formats::{Layout, name_of};
use crate::generate::{Arrivals, Generate};
use crate::request::{Request, RequestTrace, Scale, Span};
use crate::request_file::{CountTokens, ReadOptions, RequestFormat, TimeUnit, ZeroTokens};
use crate::request_source::{OpenFile, RequestSource, Selection};
use crate::units::Nanos;

/// What to do with the sessions of a trace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SessionUse {
    /// A request that follows another one is sent when the other has been answered.
    #[default]
    Follow,
    /// Every request is sent at its own arrival.
    Ignore,
}

impl fmt::Display for SessionUse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Follow => "follow",
            Self::Ignore => "ignore",
        })
    }
}

impl FromStr for SessionUse {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "follow" => Ok(Self::Follow),
            "ignore" => Ok(Self::Ignore),
            _ => Err(format!("`{name}`: expected follow or ignore")),
        }
    }
}

/// Opens the tokenizer of a file.
pub type OpenTokenizer<'a> = &'a dyn Fn(&Path) -> Result<Box<dyn CountTokens>, String>;

/// Where requests come from: exactly one of `file` and `generate`.
///
/// Applied in this order: `window_s`, `first`, `rate_factor` or `rate_per_s`, `max_prompt_tokens` and
/// `max_output_tokens`. The first three are for files only, since a random process says its own count and rate.
///
/// ```
/// let azure: traces::RequestSpec = serde_yaml::from_str(
///     "{file: azure-2023-conv.csv, window_s: [0, 600], first: 1000, rate_per_s: 4, max_prompt_tokens: 128}",
/// )?;
/// assert_eq!(azure.first, Some(1000));
///
/// let made: traces::RequestSpec = serde_yaml::from_str("
/// generate:
///   count: 64
///   seed: 1
///   arrivals: {poisson: {rate_per_s: 20}}      # or all_at_once, constant: {rate_per_s}, gamma: {rate_per_s, cv}
///   prompt_tokens: {uniform: {min: 8, max: 64}} # or normal: {mean, std}, log_normal: {median, sigma}
///   output_tokens: {fixed: 48}                  # or, instead of both: lengths_from: trace.csv
/// ")?;
/// assert_eq!(made.load(".".as_ref())?.requests.len(), 64);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestSpec {
    /// A request trace, relative to the folder that [`Self::load`] is given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A random process.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generate: Option<Generate>,
    /// The file's format, if its first line does not tell.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<RequestFormat>,
    /// Block size in tokens for prefix hashes of files that hold token ids; 16 if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix_block_tokens: Option<u32>,
    /// Tokens of a block of the hashes in the file, if it does not determine them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash_block_tokens: Option<u32>,
    /// Unit of the file's times (`s`, `ms`, `us` or `ns`), if it does not determine it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_unit: Option<TimeUnit>,
    /// What to do with rows of the file without prompt or output tokens: `skip`, the default, or `refuse`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_tokens: Option<ZeroTokens>,
    /// Tokenizer that counts the tokens of a file with texts, a `tokenizer.json`; relative to the same folder as `file`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tokenizer: Option<PathBuf>,
    /// What to do with the sessions of the file: `follow`, the default, or `ignore`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sessions: Option<SessionUse>,
    /// Number of users of a closed loop. Each sends the next request, or begins the next session, when the previous one
    /// has been answered.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub users: Option<NonZeroU32>,
    /// Time of a user from an answer to the next request, where the file does not say it: seconds, or
    /// `exponential:MEAN_SECONDS`. 0 if not set.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub think_time_s: Option<ThinkTime>,
    /// Only requests that arrive from the first of these seconds after the first arrival, which is then time 0, until
    /// just before the second.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub window_s: Option<(f64, f64)>,
    /// Only the first so many requests.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub first: Option<usize>,
    /// Arrivals so many times as fast.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_factor: Option<f64>,
    /// Arrivals scaled to so many requests per second on average.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_per_s: Option<f64>,
    /// Longer prompts are cut to so many tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_prompt_tokens: Option<u32>,
    /// Longer outputs are cut to so many tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_output_tokens: Option<u32>,
}

impl RequestSpec {
    /// Maximum number of generated requests that [`Self::load`] holds, which takes 240 MB. [`Self::open`] makes up to
    /// [`Generate::MOST`].
    pub const MOST_HELD: u32 = 10_000_000;

    /// Reads or makes all requests; paths are relative to `base_dir`.
    ///
    /// # Errors
    /// If keys contradict each other or are out of range, the file does not read, or no request is left.
    pub fn load(&self, base_dir: &Path) -> Result<RequestTrace> {
        self.load_with(base_dir, &|_| Err("this program has no tokenizers".to_owned()))
    }

    /// As [`Self::load`], with tokenizers for files with texts.
    ///
    /// # Errors
    /// As [`Self::load`], and if the tokenizer cannot be opened.
    pub fn load_with(&self, base_dir: &Path, open: OpenTokenizer<'_>) -> Result<RequestTrace> {
        let tokenizer = self.open_tokenizer(base_dir, open)?;
        match self.source()? {
            Source::File(file) => self.load_file(&base_dir.join(file), tokenizer.as_deref()),
            Source::Generate(generate) => {
                if generate.count > Self::MOST_HELD {
                    return Err(TraceError::spec("count", generate.count, format!("at most {}", Self::MOST_HELD)));
                }
                let (max_prompt_tokens, max_output_tokens) = self.max_tokens()?;
                let requests = generate.requests_with(base_dir, &self.read_options(tokenizer.as_deref()))?;
                let warnings = requests.warnings().to_vec();
                let trace = RequestTrace { warnings, ..RequestTrace::new(GENERATED, requests.collect()) };
                Ok(trace.clip_lengths(max_prompt_tokens, max_output_tokens))
            }
        }
    }

    /// The same requests without holding many of them: those of a random process are made as they are used, and those of
    /// a large file are read as they are used if its rows are requests by themselves and in order of arrival.
    ///
    /// # Errors
    /// As [`Self::load`].
    pub fn open(&self, base_dir: &Path) -> Result<RequestTrace<RequestSource>> {
        self.open_with(base_dir, &|_| Err("this program has no tokenizers".to_owned()))
    }

    /// As [`Self::open`], with tokenizers for files with texts.
    ///
    /// # Errors
    /// As [`Self::load_with`].
    pub fn open_with(&self, base_dir: &Path, open: OpenTokenizer<'_>) -> Result<RequestTrace<RequestSource>> {
        self.open_beyond(base_dir, open, (RequestSource::HELD_REQUESTS, RequestSource::HELD_BYTES))
    }

    /// As [`Self::open_with`], where so many generated requests, or a file of so many bytes, are held.
    fn open_beyond(
        &self,
        base_dir: &Path,
        open: OpenTokenizer<'_>,
        (held_requests, held_bytes): (u32, u64),
    ) -> Result<RequestTrace<RequestSource>> {
        let source = self.source()?;
        let opened = |name: String, requests, warnings| RequestTrace {
            name,
            requests,
            prefix_hashes: None,
            sessions: None,
            warnings,
        };
        match source {
            Source::Generate(generate) if generate.count > held_requests => {
                let limits = self.max_tokens()?;
                let tokenizer = self.open_tokenizer(base_dir, open)?;
                let generated = generate.requests_with(base_dir, &self.read_options(tokenizer.as_deref()))?;
                let warnings = generated.warnings().to_vec();
                return Ok(opened(GENERATED.to_owned(), RequestSource::generated(generated, limits), warnings));
            }
            Source::File(file) => {
                let path = base_dir.join(file);
                if std::fs::metadata(&path).is_ok_and(|there| there.len() > held_bytes)
                    && let Some(file) = self.open_file(&path)?
                {
                    return Ok(opened(name_of(&path), file.requests, file.warnings));
                }
            }
            Source::Generate(_) => {}
        }
        let RequestTrace { name, requests, prefix_hashes, sessions, warnings } = self.load_with(base_dir, open)?;
        Ok(RequestTrace { name, requests: RequestSource::held(requests), prefix_hashes, sessions, warnings })
    }

    /// Which of the requests are sent when others have been answered; `None` if each is sent at its arrival. Think times
    /// are drawn with `seed`.
    ///
    /// # Errors
    /// If keys contradict each other, or the trace does not say when its sessions begin.
    pub fn closed_loop<R>(&self, trace: &RequestTrace<R>, seed: u64) -> Result<Option<ClosedLoop>> {
        let sessions = trace.sessions.as_ref();
        let is_ignored = self.sessions == Some(SessionUse::Ignore);
        if is_ignored && sessions.is_none() {
            return Err(TraceError::spec(
                "sessions",
                "ignore",
                format!("it for a trace with sessions; {} has none", trace.name),
            ));
        }
        match self.users {
            None if self.think_time_s.is_some() => {
                Err(TraceError::spec("think_time_s", "it without `users`", "both, or neither"))
            }
            None if is_ignored => match sessions.filter(|sessions| !sessions.is_timed()) {
                None => Ok(None),
                Some(sessions) => {
                    let count = sessions.links().iter().filter(|link| !link.is_timed).count();
                    let found = format!("ignore, and {count} requests of {} without an arrival time", trace.name);
                    Err(TraceError::spec("sessions", found, "follow, or a trace with the arrival of each request"))
                }
            },
            None => match sessions.filter(|sessions| sessions.num_following() > 0 || !sessions.is_timed()) {
                None => Ok(None),
                Some(sessions) => ClosedLoop::of_sessions(&trace.name, sessions.clone()).map(Some),
            },
            Some(number) => {
                self.check_users()?;
                let users = Users { number, think: self.think_time_s.unwrap_or(ThinkTime::NONE), seed };
                let sessions = sessions.filter(|_| !is_ignored).cloned().map(Arc::new);
                Ok(Some(ClosedLoop { users: Some(users), sessions }))
            }
        }
    }

    /// Whether nothing beside `users` says when requests arrive.
    fn check_users(&self) -> Result<()> {
        let is_at_once = |generate: &Generate| generate.arrivals == Arrivals::AllAtOnce;
        let other = [
            ("rate_factor", self.rate_factor.is_some()),
            ("rate_per_s", self.rate_per_s.is_some()),
            ("generate.arrivals", !self.generate.as_ref().is_none_or(is_at_once)),
        ];
        match other.into_iter().find(|(_, is_given)| *is_given) {
            None => Ok(()),
            Some((key, _)) => Err(TraceError::spec(
                "users",
                format!("it beside `{key}`"),
                "one of the two: users send requests when they have answers (`arrivals: all_at_once`)",
            )),
        }
    }

    fn open_tokenizer(&self, base_dir: &Path, open: OpenTokenizer<'_>) -> Result<Option<Box<dyn CountTokens>>> {
        let Some(file) = &self.tokenizer else { return Ok(None) };
        let opened = open(&base_dir.join(file));
        opened.map(Some).map_err(|error| TraceError::spec("tokenizer", error, "a tokenizer.json"))
    }

    fn read_options<'a>(&self, tokenizer: Option<&'a dyn CountTokens>) -> ReadOptions<'a> {
        ReadOptions {
            format: self.format,
            prefix_block_tokens: self.prefix_block_tokens.unwrap_or(ReadOptions::DEFAULT_PREFIX_BLOCK_TOKENS),
            hash_block_tokens: self.hash_block_tokens,
            time_unit: self.time_unit,
            zero_tokens: self.zero_tokens.unwrap_or_default(),
            tokenizer,
        }
    }

    fn source(&self) -> Result<Source<'_>> {
        match (&self.file, &self.generate) {
            (Some(file), None) => Ok(Source::File(file)),
            (None, Some(generate)) => match self.key_for_files() {
                None => Ok(Source::Generate(generate)),
                Some((key, remedy)) => {
                    Err(TraceError::spec(key, "it beside `generate`", format!("it beside `file` only; {remedy}")))
                }
            },
            (Some(_), Some(_)) => Err(TraceError::spec("file", "`file` and `generate`", "one of the two")),
            (None, None) => Err(TraceError::spec("file", "neither `file` nor `generate`", "one of the two")),
        }
    }

    /// A key that is for files only, with what to do for generated requests instead.
    fn key_for_files(&self) -> Option<(&'static str, &'static str)> {
        let count = "`generate.count` is the number of generated requests";
        let rate = "`generate.arrivals` has the rate of generated requests";
        let none = "generated requests do not need it";
        let keys = [
            ("format", self.format.is_some(), none),
            ("prefix_block_tokens", self.prefix_block_tokens.is_some(), none),
            ("hash_block_tokens", self.hash_block_tokens.is_some(), none),
            ("time_unit", self.time_unit.is_some(), none),
            ("zero_tokens", self.zero_tokens.is_some(), none),
            ("sessions", self.sessions.is_some(), none),
            ("window_s", self.window_s.is_some(), count),
            ("first", self.first.is_some(), count),
            ("rate_factor", self.rate_factor.is_some(), rate),
            ("rate_per_s", self.rate_per_s.is_some(), rate),
        ];
        keys.into_iter().find(|key| key.1).map(|(key, _, remedy)| (key, remedy))
    }

    fn max_tokens(&self) -> Result<(u32, u32)> {
        let limit = |key, limit: Option<u32>| match limit {
            Some(0) => Err(TraceError::spec(key, 0, "at least 1")),
            limit => Ok(limit.unwrap_or(Request::MAX_TOKENS)),
        };
        let prompt = limit("max_prompt_tokens", self.max_prompt_tokens)?;
        Ok((prompt, limit("max_output_tokens", self.max_output_tokens)?))
    }

    fn load_file(&self, path: &Path, tokenizer: Option<&dyn CountTokens>) -> Result<RequestTrace> {
        let options = self.read_options(tokenizer);
        let Selection { window, first, scale, limits } = self.selection()?;
        let mut trace = RequestTrace::read_with(path, &options)?;
        if let Some((from, to)) = window {
            trace = trace.window(from, to);
        }
        trace = trace.first(first);
        if trace.requests.is_empty() {
            return Err(TraceError::spec(
                "window_s",
                "no request in the window",
                "at least one, and `first` of at least 1",
            ));
        }
        if let Some(scale) = scale(trace.span())? {
            trace = trace.scaled(scale);
        }
        Ok(trace.clip_lengths(limits.0, limits.1))
    }

    /// A file that need not be held; `None` if it must be.
    fn open_file(&self, path: &Path) -> Result<Option<OpenFile>> {
        let options = self.read_options(None);
        let layout = Layout::of_file(path, &options)?;
        RequestSource::of_file(path, layout, &options, self.selection()?)
    }

    /// What is taken of a file.
    fn selection(&self) -> Result<Selection<impl FnOnce(Span) -> Result<Option<Scale>>>> {
        if self.prefix_block_tokens == Some(0) {
            return Err(TraceError::spec("prefix_block_tokens", 0, "at least 1"));
        }
        let window = match self.window_s {
            Some((from, to)) if !(from >= 0.0 && to > from) => {
                return Err(TraceError::spec("window_s", format!("[{from}, {to}]"), "[from, to] with 0 <= from < to"));
            }
            window => window.map(|(from, to)| (Nanos::from_secs_f64(from), Nanos::from_secs_f64(to))),
        };
        let rates = (self.rate_factor, self.rate_per_s);
        let scale = move |span| match rates {
            (None, None) => Ok(None),
            (Some(factor), None) => Scale::by(factor, span).map(Some),
            (None, Some(rate_per_s)) => Scale::to(rate_per_s, span).map(Some),
            (Some(_), Some(_)) => {
                Err(TraceError::spec("rate_per_s", "`rate_factor` and `rate_per_s`", "one of the two"))
            }
        };
        Ok(Selection { window, first: self.first.unwrap_or(usize::MAX), scale, limits: self.max_tokens()? })
    }
}

/// Name of requests from a random process.
const GENERATED: &str = "generated";

enum Source<'a> {
    File(&'a Path),
    Generate(&'a Generate),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request_source::Requests;

    const TRACE: &str = "request,arrival_us,prompt_tokens,output_tokens\n\
                         0,0,100,10\n1,1000000,200,20\n2,2000000,300,30\n3,4000000,400,40\n";

    fn load(yaml: &str) -> Result<RequestTrace> {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("trace.csv"), TRACE).unwrap();
        serde_yaml::from_str::<RequestSpec>(yaml).expect("a valid configuration").load(folder.path())
    }

    #[test]
    fn every_transform_of_a_file_is_applied_in_order() {
        let trace = load(
            "{file: trace.csv, window_s: [1, 9], first: 2, rate_per_s: 4, max_prompt_tokens: 250, max_output_tokens: 25}",
        );
        let request = |id, ms: u64, prompt_tokens, output_tokens| Request {
            id,
            arrival: Nanos(ms * 1_000_000),
            prompt_tokens,
            output_tokens,
        };
        assert_eq!(trace.unwrap().requests, [request(0, 0, 200, 20), request(1, 250, 250, 25)]);
    }

    #[test]
    fn lengths_drawn_from_a_trace_stay_in_pairs() {
        let trace = load("{generate: {count: 200, arrivals: all_at_once, lengths_from: trace.csv}}").unwrap();
        assert!(trace.requests.iter().all(|request| request.prompt_tokens == 10 * request.output_tokens));
        let drawn = |prompt| trace.requests.iter().filter(|request| request.prompt_tokens == prompt).count();
        assert!([100, 200, 300, 400].into_iter().all(|prompt| drawn(prompt) > 20));
    }

    #[test]
    fn ten_million_requests_are_made_without_holding_them() {
        let yaml = "{generate: {count: 10000000, arrivals: {poisson: {rate_per_s: 100}}, prompt_tokens: {log_normal: {median: 50, sigma: 1}}, output_tokens: {fixed: 9}}, max_prompt_tokens: 64}";
        let spec: RequestSpec = serde_yaml::from_str(yaml).unwrap();
        let opened = spec.open(Path::new("")).unwrap().requests;
        assert_eq!(opened.count(), 10_000_000);
        let [first, again] = [(); 2].map(|()| opened.read(|requests| requests.take(1001).collect::<Vec<_>>()).unwrap());
        assert!(first.iter().all(|request| request.prompt_tokens <= 64) && first[1000].id == 1000);
        assert_eq!(first, again);
    }

    /// The requests of a specification that holds nothing it need not, and whether it held them all.
    fn opened(folder: &Path, yaml: &str) -> Result<(RequestTrace, bool)> {
        let spec: RequestSpec = serde_yaml::from_str(yaml).expect("a valid configuration");
        let RequestTrace { name, requests: source, prefix_hashes, sessions, warnings } =
            spec.open_beyond(folder, &|_| Err(String::new()), (0, 0))?;
        let requests: Vec<Request> = source.read(|requests| requests.collect())?;
        assert_eq!(source.count(), requests.len());
        assert_eq!(source.first_arrival(), requests[0].arrival);
        assert_eq!(Some(source.longest()), requests.iter().map(Request::context_tokens).max());
        Ok((RequestTrace { name, requests, prefix_hashes, sessions, warnings }, source.is_held()))
    }

    #[test]
    fn requests_that_are_not_held_are_those_that_are() {
        let folder = tempfile::tempdir().unwrap();
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens,Extra\n\
            2024-05-10 00:00:01,10,1,a\n2024-05-10 00:00:01,20,0,b\n2024-05-10 00:00:03,30,3,c\n2024-05-10 00:00:09,40,4,d\n";
        let burst = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n\
            5,a,10,1,11,x\n45.5,a,20,2,22,x\n45.5,a,30,3,33,x\n118,a,40,4,44,x\n";
        let vidur =
            "arrived_at,num_prefill_tokens,num_decode_tokens\n1700000000,10,1\n1700000002.5,20,2\n1700000004,30,3\n";
        for (name, text) in [("ours", TRACE), ("azure", azure), ("burst", burst), ("vidur", vidur)] {
            std::fs::write(folder.path().join(name), text).unwrap();
            for rest in [
                "",
                ", first: 2",
                ", window_s: [1, 9]",
                ", window_s: [1, 99], first: 2, rate_per_s: 4, max_prompt_tokens: 25, max_output_tokens: 2",
                ", rate_factor: 0.3",
                ", zero_tokens: skip, max_prompt_tokens: 15",
            ] {
                let yaml = format!("{{file: {name}{rest}}}");
                let held = serde_yaml::from_str::<RequestSpec>(&yaml).unwrap().load(folder.path());
                match (opened(folder.path(), &yaml), held) {
                    (Ok((opened, is_held)), Ok(held)) => assert_eq!((opened, is_held), (held, false), "{yaml}"),
                    (Err(opened), Err(held)) => assert_eq!(opened.to_string(), held.to_string(), "{yaml}"),
                    (opened, held) => panic!("{yaml}: {opened:?}, held {held:?}"),
                }
            }
        }
        let yaml = "{generate: {count: 50, arrivals: {gamma: {rate_per_s: 3, cv: 2}}, lengths_from: ours}, max_output_tokens: 25}";
        let held = serde_yaml::from_str::<RequestSpec>(yaml).unwrap().load(folder.path()).unwrap();
        assert_eq!(opened(folder.path(), yaml).unwrap(), (held, false));
    }

    #[test]
    fn files_whose_rows_are_out_of_order_or_depend_on_each_other_are_held() {
        let folder = tempfile::tempdir().unwrap();
        let azure = "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-10 00:00:02,10,1\n2024-05-10 00:00:01,20,2\n";
        let sessions =
            "request,arrival_us,prompt_tokens,output_tokens,session,think_time_us\n0,0,1,1,0,\n1,5,1,1,0,5\n";
        let burst = "Timestamp,Session ID,Request tokens,Response tokens\n0,a,1,1\n5,a,2,2\n";
        for (name, text) in [("azure", azure), ("sessions", sessions), ("burst", burst)] {
            std::fs::write(folder.path().join(name), text).unwrap();
            let yaml = format!("{{file: {name}}}");
            let held = serde_yaml::from_str::<RequestSpec>(&yaml).unwrap().load(folder.path()).unwrap();
            assert_eq!(opened(folder.path(), &yaml).unwrap(), (held, true), "{name}");
        }
    }

    #[test]
    fn a_file_that_changes_while_it_is_used_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("trace.csv");
        std::fs::write(&path, TRACE).unwrap();
        let spec: RequestSpec = serde_yaml::from_str("{file: trace.csv}").unwrap();
        let source = spec.open_beyond(folder.path(), &|_| Err(String::new()), (0, 0)).unwrap().requests;
        for (text, message) in [
            (TRACE.replace("3,4000000,400,40\n", ""), "found other requests than before, expected a file that"),
            (TRACE.replace("300,30", "300,x"), "trace.csv:4: output_tokens: found `x`"),
        ] {
            std::fs::write(&path, text).unwrap();
            let read = source.read(|requests| requests.count());
            let error = read.unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }

    #[test]
    fn configurations_that_make_no_sense_say_why() {
        let generate =
            "generate: {count: 1, arrivals: all_at_once, prompt_tokens: {fixed: 1}, output_tokens: {fixed: 1}}";
        for (yaml, message) in [
            ("{}", "neither `file` nor `generate`"),
            (&format!("{{file: trace.csv, {generate}}}"), "one of the two"),
            (&format!("{{time_unit: s, {generate}}}"), "time_unit: found it beside `generate`"),
            (
                &format!("{{rate_per_s: 3, {generate}}}"),
                "rate_per_s: found it beside `generate`, expected it beside `file` only; `generate.arrivals` has the rate",
            ),
            (&format!("{{first: 3, {generate}}}"), "it beside `file` only; `generate.count` is the number"),
            (
                &format!("{{{}}}", generate.replace("count: 1", "count: 10000001")),
                "count: found 10000001, expected at most 10000000",
            ),
            ("{file: trace.csv, rate_per_s: 3, rate_factor: 2}", "rate_per_s: found `rate_factor` and `rate_per_s`"),
            ("{file: trace.csv, rate_per_s: -3}", "rate_per_s: found -3"),
            ("{file: trace.csv, window_s: [5, 9]}", "window_s: found no request"),
            ("{file: trace.csv, window_s: [.nan, 9]}", "window_s: found [NaN, 9]"),
            ("{file: trace.csv, first: 0}", "`first` of at least 1"),
            ("{file: trace.csv, max_output_tokens: 0}", "max_output_tokens: found 0"),
            ("{file: trace.csv, format: azure}", "expected columns `TIMESTAMP,ContextTokens,GeneratedTokens`"),
            ("{file: trace.csv, time_unit: s}", "time_unit: found s, expected it for a trace whose times"),
            ("{file: trace.csv, hash_block_tokens: 16}", "hash_block_tokens: found 16, expected it for a trace with"),
            ("{file: nothing.csv}", "cannot read "),
        ] {
            let error = load(yaml).unwrap_err().to_string();
            assert!(error.contains(message), "{yaml}: {error}");
        }
    }

    #[test]
    fn unknown_keys_and_wrong_types_are_refused() {
        let lengths = "prompt_tokens: {fixed: 1}, output_tokens: {fixed: 1}";
        for (yaml, message) in [
            ("{fil: trace.csv}".to_owned(), "unknown field `fil`"),
            ("{file: trace.csv, first: many}".to_owned(), "first: invalid type"),
            (
                format!("{{generate: {{count: 1, arrivals: {{poison: {{rate_per_s: 1}}}}, {lengths}}}}}"),
                "unknown variant `poison`",
            ),
            (
                format!("{{generate: {{count: 1, arrivals: {{poisson: {{rate: 1}}}}, {lengths}}}}}"),
                "unknown field `rate`",
            ),
            (format!("{{generate: {{count: 1, sed: 1, arrivals: all_at_once, {lengths}}}}}"), "unknown field `sed`"),
            (format!("{{generate: {{count: -1, arrivals: all_at_once, {lengths}}}}}"), "generate.count"),
        ] {
            let error = serde_yaml::from_str::<RequestSpec>(&yaml).unwrap_err().to_string();
            assert!(error.contains(message), "{yaml}: {error}");
        }
    }

    #[test]
    fn a_configuration_survives_being_written_and_read() {
        for yaml in [
            "{file: a.csv, format: burst_gpt, window_s: [0, 1.5], rate_factor: 2}",
            "{file: a.jsonl, hash_block_tokens: 64, time_unit: ms, zero_tokens: refuse}",
            "{generate: {count: 3, arrivals: all_at_once, lengths_from: a.csv}, max_output_tokens: 3}",
            "{generate: {count: 3, seed: 9, arrivals: {gamma: {rate_per_s: 1, cv: 2}}, prompt_tokens: {normal: {mean: 9, std: 1}}, output_tokens: {fixed: 1}}}",
        ] {
            let spec: RequestSpec = serde_yaml::from_str(yaml).unwrap();
            let written = serde_yaml::to_string(&spec).unwrap();
            assert_eq!(serde_yaml::from_str::<RequestSpec>(&written).unwrap(), spec, "{written}");
        }
    }
}
