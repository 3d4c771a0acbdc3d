//! Exit policies and pass times that are functions of Python.
//!
//! An exception ends the run: it unwinds through the libraries to where the work began.

use std::collections::HashMap;
use std::panic::resume_unwind;
use std::sync::{Arc, LazyLock, Mutex, PoisonError};

use latency::CustomLatency;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyByteArray, PyBytes};
use scheduler::{CustomExit, CustomPolicy, ExitRow, Memory, SignalRead};
use traces::PassWork;

use crate::errors::DepthwiseError;

/// Values of a row beside its signals and its memory: depth, token, position, running, waiting.
const COUNTS: usize = 5;
/// Bytes of a number.
const WORD: usize = 4;

/// Calls Python, and lets its exception unwind.
fn answer<T>(call: impl FnOnce(Python<'_>) -> PyResult<T>) -> T {
    match Python::attach(call) {
        Ok(answer) => answer,
        Err(raised) => resume_unwind(Box::new(raised)),
    }
}

/// An exit policy that is a function of the rows of a pass.
struct PythonExit {
    name: String,
    reads: SignalRead,
    function: Mutex<Py<PyAny>>,
    /// `numpy.dtype` of a row, by the number of loops.
    dtypes: Mutex<HashMap<u8, Py<PyAny>>>,
}

/// Policies by name. They are there until the process ends, as the scheduler needs them.
static POLICIES: LazyLock<Mutex<HashMap<String, &'static PythonExit>>> = LazyLock::new(Mutex::default);

/// Lets the name of a policy be read in every setting `exit`. The same name with another function replaces the function.
///
/// Raises `DepthwiseError` if the name is another policy's, has other characters than ASCII letters, digits and `-_.:`, or
/// was given to a policy that reads another signal.
#[pyfunction]
pub fn register_exit_policy(name: &str, reads: &str, function: Py<PyAny>) -> PyResult<()> {
    let reads = match reads {
        "none" => SignalRead::None,
        "oracle" => SignalRead::Oracle,
        signal => SignalRead::Signal(signal.parse().map_err(DepthwiseError::new_err)?),
    };
    let mut policies = POLICIES.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(policy) = policies.get(name) {
        if policy.reads != reads {
            let message = format!("exit policy {name} reads another signal already: expected another name");
            return Err(DepthwiseError::new_err(message));
        }
        *policy.function.lock().unwrap_or_else(PoisonError::into_inner) = function;
        return Ok(());
    }
    let (function, dtypes) = (Mutex::new(function), Mutex::default());
    let policy: &'static PythonExit =
        Box::leak(Box::new(PythonExit { name: name.to_owned(), reads, function, dtypes }));
    CustomPolicy::new(policy).register().map_err(|error| DepthwiseError::new_err(error.to_string()))?;
    policies.insert(name.to_owned(), policy);
    Ok(())
}

impl CustomExit for PythonExit {
    fn name(&self) -> &str {
        &self.name
    }

    fn reads(&self) -> SignalRead {
        self.reads
    }

    fn exits(&self, row: &ExitRow<'_>, memory: &mut Memory) -> bool {
        self.exits_of_pass(&[*row], std::slice::from_mut(memory))[0]
    }

    fn exits_of_pass(&self, rows: &[ExitRow<'_>], memories: &mut [Memory]) -> Vec<bool> {
        let Some(first) = rows.first() else { return Vec::new() };
        let num_loops = usize::from(first.num_loops);
        answer(|py| {
            let size = WORD * (num_loops + COUNTS + Memory::default().len());
            let mut bytes = Vec::with_capacity(size * rows.len());
            for (row, memory) in rows.iter().zip(&*memories) {
                let unread = num_loops - row.signals.len();
                let signals = row.signals.iter().copied().chain(std::iter::repeat_n(f32::NAN, unread));
                signals.for_each(|signal| bytes.extend(signal.to_le_bytes()));
                let counts = [u32::from(row.depth), row.token, row.position, row.running, row.waiting];
                counts.iter().for_each(|count| bytes.extend(count.to_le_bytes()));
                memory.iter().for_each(|value| bytes.extend(value.to_le_bytes()));
            }
            let shared = PyByteArray::new(py, &bytes);
            let numpy = py.import("numpy")?;
            let array = numpy.call_method1("frombuffer", (&shared, self.dtype(py, first.num_loops)?))?;
            let function = self.function.lock().unwrap_or_else(PoisonError::into_inner).clone_ref(py);
            let answers = numpy.call_method1("asarray", (function.call1(py, (array,))?, "bool"))?;
            let answers = answers.call_method0("tobytes")?;
            let answers = answers.cast::<PyBytes>()?.as_bytes();
            if answers.len() != rows.len() {
                return Err(PyValueError::new_err(format!(
                    "exit policy {}: found {} answers, expected one for each of {} rows",
                    self.name,
                    answers.len(),
                    rows.len()
                )));
            }
            let after = shared.to_vec();
            for (memory, row) in memories.iter_mut().zip(after.chunks_exact(size)) {
                let values = row[size - WORD * memory.len()..].chunks_exact(WORD);
                let values = values.map(|value| f32::from_le_bytes(value.try_into().expect("a word")));
                memory.iter_mut().zip(values).for_each(|(memory, value)| *memory = value);
            }
            Ok(answers.iter().map(|&answer| answer != 0).collect())
        })
    }
}

impl PythonExit {
    fn dtype(&self, py: Python<'_>, num_loops: u8) -> PyResult<Py<PyAny>> {
        if let Some(dtype) = self.dtypes.lock().unwrap_or_else(PoisonError::into_inner).get(&num_loops) {
            return Ok(dtype.clone_ref(py));
        }
        let counts = ["depth", "token", "position", "running", "waiting"].map(|name| (name, "<u4"));
        let fields = pyo3::types::PyList::empty(py);
        fields.append(("signals", "<f4", (num_loops,)))?;
        counts.iter().try_for_each(|field| fields.append(*field))?;
        fields.append(("memory", "<f4", (Memory::default().len(),)))?;
        let dtype = py.import("numpy")?.call_method1("dtype", (fields,))?.unbind();
        let kept = dtype.clone_ref(py);
        self.dtypes.lock().unwrap_or_else(PoisonError::into_inner).insert(num_loops, kept);
        Ok(dtype)
    }
}

/// Everything that the time of a pass depends on.
#[pyclass(module = "depthwise", name = "PassWork", frozen)]
pub struct Work(PassWork);

#[pymethods]
impl Work {
    /// Rows of the pass.
    #[getter]
    fn rows(&self) -> u32 {
        self.0.rows
    }

    /// Rows whose attention runs row by row: decode rows, and single rows of backfill.
    #[getter]
    fn decode_rows(&self) -> u32 {
        self.0.decode_rows
    }

    /// Sum of the histories of the decode rows, in tokens.
    #[getter]
    fn decode_history(&self) -> u64 {
        self.0.decode_history
    }

    /// Sum of the squared histories of the decode rows, in tokens squared.
    #[getter]
    fn squared_decode_history(&self) -> f64 {
        self.0.squared_decode_history
    }

    /// Longest history of the decode rows, in tokens.
    #[getter]
    fn longest_decode_history(&self) -> u32 {
        self.0.longest_decode_history
    }

    /// Tokens and history in tokens of each chunk of a prompt or of backfill.
    #[getter]
    fn chunks(&self) -> Vec<(u32, u32)> {
        self.0.chunks.iter().map(|chunk| (chunk.tokens, chunk.history)).collect()
    }

    /// Distinct depths among the rows.
    #[getter]
    fn depths(&self) -> u32 {
        self.0.depths
    }

    /// Rows at depth 0, which are embedded.
    #[getter]
    fn embed_rows(&self) -> u32 {
        self.0.embed_rows
    }

    /// Rows for which the exit head runs within the pass.
    #[getter]
    fn head_rows(&self) -> u32 {
        self.0.head_rows
    }

    /// Rows for which the exit head runs after the exits are decided.
    #[getter]
    fn exit_head_rows(&self) -> u32 {
        self.0.exit_head_rows
    }

    /// Rows whose exit signal is read within the pass, where that takes more than the head.
    #[getter]
    fn signal_rows(&self) -> u32 {
        self.0.signal_rows
    }

    /// Of `exit_head_rows`, those whose exits are not known before the pass has run.
    #[getter]
    fn decided_rows(&self) -> u32 {
        self.0.decided_rows
    }

    /// Copies of keys and values to skipped depths, over all exiting rows.
    #[getter]
    fn filled_depths(&self) -> u32 {
        self.0.filled_depths
    }

    /// Rows of the pass before on the same machine.
    #[getter]
    fn before_rows(&self) -> u32 {
        self.0.before.rows
    }

    /// Whether the pass before ran the exit head.
    #[getter]
    fn before_head(&self) -> bool {
        self.0.before.head
    }

    fn __repr__(&self) -> String {
        format!("{:?}", self.0)
    }
}

/// Times of passes that are a function of their work.
#[derive(Debug)]
pub struct PythonLatency(Py<PyAny>);

impl PythonLatency {
    /// The times of a function that gives microseconds.
    pub fn new(function: &Bound<'_, PyAny>) -> Arc<Self> {
        Arc::new(Self(function.clone().unbind()))
    }
}

impl CustomLatency for PythonLatency {
    fn pass_ns(&self, work: &PassWork) -> f64 {
        answer(|py| {
            let time_us: f64 = self.0.call1(py, (Work(work.clone()),))?.extract(py)?;
            match time_us.is_finite() && time_us >= 0.0 {
                true => Ok(1e3 * time_us),
                false => Err(PyValueError::new_err(format!("latency: found {time_us} us, expected 0 or more"))),
            }
        })
    }
}
