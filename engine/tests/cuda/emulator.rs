//! The kernels on the CPU: their source behind `emulation.h`, compiled by the C++ compiler that is there.

use std::collections::HashMap;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};

use candle_core::{Result, bail};
use engine::cuda::device::{Device, THREADS};
use engine::cuda::source::{KERNELS, Specialization};
use libloading::{Library, Symbol};

const COMPILERS: [&str; 3] = ["c++", "g++", "clang++"];
/// Traps, caught by the emulation, where an index is beyond an array or a 16-byte load is not aligned.
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

/// A device that stands for a GPU: kernels run on the CPU, memory is the process's, its ends guarded.
pub struct Emulator {
    library: Library,
    seed: u64,
}

/// Memory whose end is that of a page; what lies behind must not be touched. Full of NaN at first.
pub struct Memory {
    start: *mut c_void,
    bytes: usize,
    free: unsafe extern "C" fn(*mut c_void, usize),
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: it was allocated with these.
        unsafe { (self.free)(self.start, self.bytes) }
    }
}

/// The emulation's fibres and signal handlers are the process's: one launch at a time.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static LAUNCHES: Mutex<()> = Mutex::new(());
    LAUNCHES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The machine under test.
pub type Machine = Emulator;

/// It with the kernels of a specialization, or none, said on standard error, if there is no C++ compiler.
pub fn machine(specialization: Specialization) -> Option<Arc<Machine>> {
    static KNOWN: LazyLock<Mutex<HashMap<Specialization, Arc<Machine>>>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(emulator) = known.get(&specialization) {
        return Some(emulator.clone());
    }
    let emulator = Arc::new(Emulator::of_source(&specialization.source(), 1)?);
    known.insert(specialization, emulator.clone());
    Some(emulator)
}

impl Emulator {
    /// Kernels of any source, their threads run in an order that `seed` sets.
    pub fn of_source(kernels: &str, seed: u64) -> Option<Self> {
        let library = compile(kernels)?;
        // SAFETY: the library runs no code when it is loaded.
        let library = unsafe { Library::new(library) }.expect("what the compiler made can be loaded");
        Some(Self { library, seed })
    }

    fn function<F>(&self, name: &str) -> Symbol<'_, F> {
        // SAFETY: callers name functions of `emulation.h` with their types.
        unsafe { self.library.get(name) }.expect("the emulation has this function")
    }
}

/// Compiles kernels behind the emulation, unless the same were compiled before; none if there is no compiler.
fn compile(kernels: &str) -> Option<PathBuf> {
    let entries = KERNELS.map(|kernel| {
        format!("{{\"{kernel}\", emulation::Entry<&{kernel}>::ARGUMENTS, emulation::Entry<&{kernel}>::run}},\n")
    });
    let source = format!(
        "{}\n{kernels}\nextern \"C\" const emulation::Kernel emulated_kernels[] = {{\n{}{{nullptr, 0, nullptr}}}};\n",
        include_str!("emulation.h"),
        entries.concat()
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
    if !library.exists() {
        std::fs::write(&code, source).unwrap();
        let output = Command::new(compiler).args(FLAGS).arg("-o").arg(&partial).arg(&code).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{compiler} does not compile {}:\n{errors}", code.display());
        std::fs::rename(&partial, &library).unwrap();
    }
    Some(library)
}

impl Device for Emulator {
    type Memory = Memory;

    fn allocate(&self, bytes: usize) -> Result<Memory> {
        let allocate = self.function::<unsafe extern "C" fn(usize) -> *mut c_void>("emulated_allocate");
        let free = *self.function("emulated_free");
        // SAFETY: any size will do.
        let start = unsafe { allocate(bytes) };
        if start.is_null() {
            bail!("there are no {bytes} bytes");
        }
        Ok(Memory { start, bytes, free })
    }

    fn address(&self, memory: &Memory) -> u64 {
        memory.start as u64
    }

    fn upload(&self, to: &Memory, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= to.bytes);
        // SAFETY: there is room.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.start.cast(), bytes.len()) };
        Ok(())
    }

    fn download(&self, from: &Memory, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= from.bytes);
        // SAFETY: there are as many.
        unsafe { std::ptr::copy_nonoverlapping(from.start.cast(), bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], arguments: &[*const c_void]) -> Result<()> {
        let launch = self.function::<Launch>("emulated_launch");
        let name = std::ffi::CString::new(kernel).unwrap();
        let (grid, count) = (grid.map(|blocks| blocks as c_uint), arguments.len() as c_int);
        let _alone = one_at_a_time();
        // SAFETY: the caller's promise.
        let error =
            unsafe { launch(name.as_ptr(), grid.as_ptr(), THREADS as c_uint, arguments.as_ptr(), count, self.seed) };
        if error.is_null() {
            return Ok(());
        }
        // SAFETY: the emulation's message is a string that stays until the next launch.
        bail!("{kernel}: {}", unsafe { CStr::from_ptr(error) }.to_string_lossy())
    }
}
