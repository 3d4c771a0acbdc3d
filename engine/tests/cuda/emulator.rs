//! The kernels on the CPU: their source after `emulation.h`, compiled by the system's C++ compiler.

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use candle_core::{Result, bail};
use engine::cuda::device::{Device, Out, Product, THREADS};
use engine::cuda::source::{KERNELS, Scalar, Specialization};
use libloading::{Library, Symbol};

const COMPILERS: [&str; 3] = ["c++", "g++", "clang++"];
/// Traps, which the emulation catches, for an index beyond an array or an unaligned 16-byte load.
const FLAGS: [&str; 8] = [
    "-std=c++17",
    "-O2",
    "-shared",
    "-fPIC",
    "-fno-strict-aliasing",
    "-fsanitize=bounds,alignment",
    "-fsanitize-undefined-trap-on-error",
    "-U_FORTIFY_SOURCE",
];

type Launch =
    unsafe extern "C" fn(*const c_char, *const c_uint, c_uint, *const *const c_void, c_int, u64) -> *const c_char;

/// A device that emulates a GPU. Kernels run on the CPU; memory belongs to the process, with guarded ends.
pub struct Emulator {
    /// The emulation without kernels: memory and products.
    library: Arc<Library>,
    /// Work recorded by the current capture; `None` outside a capture.
    recording: Mutex<Option<Vec<Work>>>,
    /// Number of graphs replayed so far.
    replays: AtomicUsize,
    /// Work so far: by kernel, products by the name `product`, uploads, and submissions of launches, products and graphs.
    work_done: Mutex<BTreeMap<&'static str, WorkDone>>,
}

/// Number of launches of a kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WorkDone {
    pub launches: usize,
    /// Blocks of all launches; bytes of uploads.
    pub blocks: usize,
}

/// Kernels, whose threads run in an order that depends on `seed`.
#[derive(Clone)]
pub struct Module {
    library: Arc<Library>,
    seed: u64,
}

/// A piece of work with its arguments at the time of its submission.
#[derive(Clone)]
enum Work {
    Launch { module: Module, kernel: &'static str, grid: [usize; 3], arguments: Vec<Vec<u64>> },
    Product(Product),
}

/// What a capture recorded.
pub struct Graph(Vec<Work>);

/// Memory that ends at the end of a page, behind which accesses fail. Initially NaN.
pub struct Memory {
    start: *mut c_void,
    bytes: usize,
    free: unsafe extern "C" fn(*mut c_void, usize),
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the memory was allocated with this size.
        unsafe { (self.free)(self.start, self.bytes) }
    }
}

/// Lock for launches: the emulation's fibres and signal handlers belong to the process.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LAUNCHES: Mutex<()> = Mutex::new(());
    LAUNCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

// SAFETY: the only owner of the memory may free it, on any thread.
unsafe impl Send for Memory {}
// SAFETY: only the memory's address is read.
unsafe impl Sync for Memory {}

/// The machine under test.
pub type Machine = Emulator;

/// A new machine; `None`, with a message on standard error, if there is no C++ compiler.
pub fn machine() -> Option<Arc<Machine>> {
    static LIBRARY: LazyLock<Option<Arc<Library>>> = LazyLock::new(|| Some(Arc::new(open(&compile("", &[])?))));
    let library = LIBRARY.clone()?;
    let (recording, work_done) = Default::default();
    Some(Arc::new(Emulator { library, recording, replays: AtomicUsize::new(0), work_done }))
}

/// Whether a row's product depends on the number of rows.
pub const PRODUCTS_DEPEND_ON_ROWS: bool = false;

/// Launches on a machine by kernel, products by the name `product`, uploads by the name `upload`,
/// and what the host submits, a graph as one, by the name `submission`.
pub fn work_done(machine: &Machine) -> Option<BTreeMap<&'static str, WorkDone>> {
    Some(machine.work_done.lock().unwrap().clone())
}

/// Number of graphs replayed on a machine.
pub fn replays(machine: &Machine) -> Option<usize> {
    Some(machine.replays())
}

impl Module {
    /// Kernels of any source; there is a C++ compiler.
    pub fn of_source(kernels: &str, seed: u64) -> Self {
        let library = compile(kernels, &KERNELS).expect("the machine under test needs a C++ compiler as well");
        Self { library: Arc::new(open(&library)), seed }
    }

    /// Copies the bytes of a kernel's arguments, each in whole words.
    ///
    /// # Safety
    /// The arguments must match the kernel.
    unsafe fn copied(&self, kernel: &CStr, arguments: &[*const c_void]) -> Vec<Vec<u64>> {
        let sizes = function::<unsafe extern "C" fn(*const c_char) -> *const usize>(&self.library, "emulated_sizes");
        // SAFETY: a valid name; there is one size for each argument of the kernel.
        let sizes = unsafe { std::slice::from_raw_parts(sizes(kernel.as_ptr()), arguments.len()) };
        let copied = |(&argument, &bytes): (&*const c_void, &usize)| {
            let mut words = vec![0_u64; bytes.div_ceil(8)];
            // SAFETY: the argument has this many bytes.
            unsafe { std::ptr::copy_nonoverlapping(argument.cast::<u8>(), words.as_mut_ptr().cast(), bytes) };
            words
        };
        arguments.iter().zip(sizes).map(copied).collect()
    }
}

fn open(library: &Path) -> Library {
    // SAFETY: the library runs no code when it is loaded.
    unsafe { Library::new(library) }.expect("what the compiler made can be loaded")
}

fn function<'l, F>(library: &'l Library, name: &str) -> Symbol<'l, F> {
    // SAFETY: callers name functions of `emulation.h` with their types.
    unsafe { library.get(name) }.expect("the emulation has this function")
}

/// Converts the emulation's error message, if there is one.
///
/// # Safety
/// `error` must be null or a string.
unsafe fn check(what: &str, error: *const c_char) -> Result<()> {
    if error.is_null() {
        return Ok(());
    }
    // SAFETY: the emulation's message is a string that is valid until the next launch.
    bail!("{what}: {}", unsafe { CStr::from_ptr(error) }.to_string_lossy())
}

/// Compiles kernels after the emulation, unless these kernels were compiled before; `None` if there is no compiler.
fn compile(kernels: &str, names: &[&str]) -> Option<PathBuf> {
    let entry = |name: &&str| format!("emulation::Entry<&{name}>::kernel(\"{name}\"),\n");
    let source = format!(
        "{}\n{kernels}\nextern \"C\" const emulation::Kernel emulated_kernels[] = {{\n{}{{}}}};\n",
        include_str!("emulation.h"),
        names.iter().map(entry).collect::<String>()
    );
    let chosen = std::env::var("CXX").ok();
    let runs = |name: &&str| Command::new(name).arg("--version").output().is_ok_and(|output| output.status.success());
    let Some(compiler) = chosen.as_deref().into_iter().chain(COMPILERS).find(runs) else {
        eprintln!("SKIPPED: the CUDA kernels were not run, there is no C++ compiler ($CXX, {})", COMPILERS.join(", "));
        return None;
    };
    let mut hash = DefaultHasher::new();
    (&source, compiler, FLAGS).hash(&mut hash);
    let stem = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("kernels-{:016x}", hash.finish()));
    let (code, partial, library) =
        (stem.with_extension("cpp"), stem.with_extension("partial"), stem.with_extension("so"));
    // Threads may compile different kernels at the same time; a thread that needs the same kernels waits.
    static COMPILED: LazyLock<Mutex<HashMap<PathBuf, Arc<OnceLock<()>>>>> = LazyLock::new(Mutex::default);
    let compiled = COMPILED.lock().unwrap().entry(library.clone()).or_default().clone();
    compiled.get_or_init(|| {
        if !library.exists() {
            std::fs::write(&code, source).unwrap();
            let output = Command::new(compiler).args(FLAGS).arg("-o").arg(&partial).arg(&code).output().unwrap();
            let errors = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{compiler} does not compile {}:\n{errors}", code.display());
            std::fs::rename(&partial, &library).unwrap();
        }
    });
    Some(library)
}

impl Emulator {
    /// Number of graphs replayed so far.
    fn replays(&self) -> usize {
        self.replays.load(Ordering::Relaxed)
    }

    fn count(&self, name: &'static str, blocks: usize) {
        let mut work_done = self.work_done.lock().unwrap();
        let of_kernel = work_done.entry(name).or_default();
        of_kernel.launches += 1;
        of_kernel.blocks += blocks;
    }

    fn run(&self, work: &Work) -> Result<()> {
        let (name, blocks) = match work {
            Work::Launch { kernel, grid, .. } => (*kernel, grid.iter().product()),
            Work::Product(product) => ("product", product.rows.min(1)),
        };
        // An empty grid is not launched.
        if blocks > 0 {
            self.count(name, blocks);
        }
        match work {
            Work::Launch { module, kernel, grid, arguments } => {
                let arguments: Vec<*const c_void> = arguments.iter().map(|words| words.as_ptr().cast()).collect();
                // SAFETY: these are the kernel's launch arguments, whose validity the submitter ensured.
                unsafe { launch(module, kernel, *grid, &arguments) }
            }
            Work::Product(product) => {
                let multiply = function::<unsafe extern "C" fn(*const Operands) -> *const c_char>(
                    &self.library,
                    "emulated_product",
                );
                let operands = Operands {
                    storage: match product.scalar {
                        Scalar::F32 => 0,
                        Scalar::F16 => 1,
                        Scalar::Bf16 => 2,
                    },
                    out: match product.out {
                        Out::Stored => 0,
                        Out::F32 => 1,
                        Out::AddedToF32 => 2,
                    },
                    sizes: [product.rows, product.inputs, product.outputs],
                    addresses: [product.x, product.weight, product.y],
                };
                let _alone = one_at_a_time();
                // SAFETY: as above.
                unsafe { check("a product", multiply(&raw const operands)) }
            }
        }
    }

    /// Runs work, or records it during a capture.
    fn ask(&self, work: Work) -> Result<()> {
        match &mut *self.recording.lock().unwrap() {
            Some(recorded) => {
                recorded.push(work);
                Ok(())
            }
            None => {
                self.count("submission", 1);
                self.run(&work)
            }
        }
    }

    fn assert_not_recording(&self) {
        assert!(self.recording.lock().unwrap().is_none(), "only launches and products can be captured");
    }
}

/// As in `emulation.h`.
#[repr(C)]
struct Operands {
    storage: c_int,
    out: c_int,
    sizes: [usize; 3],
    addresses: [u64; 3],
}

/// # Safety
/// As for [`Device::launch`].
unsafe fn launch(module: &Module, kernel: &'static str, grid: [usize; 3], arguments: &[*const c_void]) -> Result<()> {
    let launch = function::<Launch>(&module.library, "emulated_launch");
    let name = CString::new(kernel).unwrap();
    let (grid, count) = (grid.map(|blocks| blocks as c_uint), arguments.len() as c_int);
    let _alone = one_at_a_time();
    // SAFETY: as the caller ensures.
    unsafe {
        let arguments = arguments.as_ptr();
        check(kernel, launch(name.as_ptr(), grid.as_ptr(), THREADS as c_uint, arguments, count, module.seed))
    }
}

impl Device for Emulator {
    type Memory = Memory;
    type Module = Module;
    type Graph = Graph;
    type Event = Mutex<Option<Instant>>;

    fn name(&self) -> String {
        "emulated".into()
    }

    fn state(&self) -> String {
        "on the CPU".into()
    }

    fn load(&self, specialization: &Specialization) -> Result<Module> {
        static KNOWN: LazyLock<Mutex<HashMap<Specialization, Arc<OnceLock<Module>>>>> = LazyLock::new(Mutex::default);
        let known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner).entry(*specialization).or_default().clone();
        Ok(known.get_or_init(|| Module::of_source(&specialization.source(), 1)).clone())
    }

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        self.assert_not_recording();
        let allocate = function::<unsafe extern "C" fn(usize) -> *mut c_void>(&self.library, "emulated_allocate");
        let free = *function(&self.library, "emulated_free");
        // SAFETY: any size is valid.
        let start = unsafe { allocate(bytes) };
        if start.is_null() {
            bail!("there are no {bytes} bytes");
        }
        Ok(Memory { start, bytes, free })
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.start as u64
    }

    fn upload_at(&self, to: &Memory, start: usize, bytes: &[u8]) -> Result<()> {
        self.assert_not_recording();
        assert!(start + bytes.len() <= to.bytes);
        self.count("upload", bytes.len());
        // SAFETY: there is room.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.start.cast::<u8>().add(start), bytes.len()) };
        Ok(())
    }

    fn download(&self, from: &Memory, bytes: &mut [u8]) -> Result<()> {
        self.assert_not_recording();
        assert!(bytes.len() <= from.bytes);
        // SAFETY: the lengths are equal.
        unsafe { std::ptr::copy_nonoverlapping(from.start.cast(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn launch(
        &self,
        module: &Module,
        kernel: &'static str,
        grid: [usize; 3],
        arguments: &[*const c_void],
    ) -> Result<()> {
        let name = CString::new(kernel).unwrap();
        // SAFETY: as the caller ensures.
        let arguments = unsafe { module.copied(&name, arguments) };
        self.ask(Work::Launch { module: module.clone(), kernel, grid, arguments })
    }

    unsafe fn product(&self, product: &Product) -> Result<()> {
        self.ask(Work::Product(*product))
    }

    fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Graph> {
        *self.recording.lock().unwrap() = Some(Vec::new());
        let result = work();
        let recorded = self.recording.lock().unwrap().take().expect("the capture has begun");
        result.map(|()| Graph(recorded))
    }

    unsafe fn replay(&self, graph: &Graph) -> Result<()> {
        self.replays.fetch_add(1, Ordering::Relaxed);
        self.count("submission", 1);
        graph.0.iter().try_for_each(|work| self.run(work))
    }

    fn event(&self) -> Result<Self::Event> {
        Ok(Mutex::default())
    }

    fn record(&self, event: &Self::Event) -> Result<()> {
        *event.lock().unwrap() = Some(Instant::now());
        Ok(())
    }

    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration> {
        let moment = |event: &Self::Event| event.lock().unwrap().expect("the event was recorded");
        Ok(moment(to) - moment(from))
    }
}
