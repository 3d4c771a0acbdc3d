//! Compiles every CUDA kernel with NVRTC for every architecture, assembles it with ptxas, and prints the resources that
//! it uses. Fails if registers are spilled. No GPU is needed.
//!
//! `scripts/cuda-compile.sh` fetches the compiler and runs this example: `cuda_compile FOLDER`, with the folder of the
//! toolkit.

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::ptr::null_mut;

use engine::cuda::source::{KERNELS, Scalar, Specialization};
use libloading::Library;
use rayon::prelude::*;

/// A100, RTX 30, RTX 40, H100, B200.
const ARCHITECTURES: [u32; 5] = [80, 86, 89, 90, 100];
/// Head widths and query heads per key-value head, the largest ones included.
const HEADS: [(usize, usize); 4] = [(64, 3), (80, 1), (128, 4), (256, 8)];
const BLOCK_TOKENS: usize = 16;

type Error = Box<dyn std::error::Error + Send + Sync>;

/// NVRTC, as `nvrtc.h` declares it.
struct Nvrtc(Library);

impl Nvrtc {
    fn open(toolkit: &Path) -> Result<Self, Error> {
        let folder = toolkit.join("lib");
        let names = std::fs::read_dir(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
        let is_nvrtc =
            |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("libnvrtc.so"));
        let library = names.filter_map(|entry| Some(entry.ok()?.path())).find(is_nvrtc);
        let library = library.ok_or_else(|| format!("{}: there is no libnvrtc.so here", folder.display()))?;
        // SAFETY: loading NVIDIA's library runs no harmful code.
        Ok(Self(unsafe { Library::new(library) }?))
    }

    /// Compiles CUDA C++ to PTX for an architecture.
    fn compile(&self, source: &str, architecture: u32) -> Result<Vec<u8>, Error> {
        let source = CString::new(source)?;
        let option = CString::new(format!("--gpu-architecture=compute_{architecture}"))?;
        let mut program: *mut c_void = null_mut();
        // SAFETY: the functions are called as `nvrtc.h` declares them, with strings that outlive the calls.
        unsafe {
            type Create = unsafe extern "C" fn(
                *mut *mut c_void,
                *const c_char,
                *const c_char,
                c_int,
                *const *const c_char,
                *const *const c_char,
            ) -> c_int;
            let create = self.0.get::<Create>("nvrtcCreateProgram")?;
            let name = c"kernels.cu";
            create(&mut program, source.as_ptr(), name.as_ptr(), 0, null_mut(), null_mut());
            type Compile = unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> c_int;
            let status = self.0.get::<Compile>("nvrtcCompileProgram")?(program, 1, &option.as_ptr());
            let text = self.text(program, if status == 0 { "PTX" } else { "ProgramLog" });
            self.0.get::<unsafe extern "C" fn(*mut *mut c_void) -> c_int>("nvrtcDestroyProgram")?(&mut program);
            match status {
                0 => text,
                _ => Err(format!("for sm_{architecture}:\n{}", String::from_utf8_lossy(&text?)).into()),
            }
        }
    }

    /// Text of a program from NVRTC: its PTX or its log.
    ///
    /// # Safety
    /// The program must have been created and not destroyed.
    unsafe fn text(&self, program: *mut c_void, what: &str) -> Result<Vec<u8>, Error> {
        let mut size = 0_usize;
        // SAFETY: as declared in `nvrtc.h`; NVRTC writes the number of bytes that it returned.
        unsafe {
            type Size = unsafe extern "C" fn(*mut c_void, *mut usize) -> c_int;
            self.0.get::<Size>(&format!("nvrtcGet{what}Size"))?(program, &mut size);
            let mut text = vec![0_u8; size];
            type Get = unsafe extern "C" fn(*mut c_void, *mut u8) -> c_int;
            self.0.get::<Get>(&format!("nvrtcGet{what}"))?(program, text.as_mut_ptr());
            Ok(CStr::from_bytes_until_nul(&text)?.to_bytes().to_vec())
        }
    }
}

/// Resources of a kernel, from `ptxas -v`.
#[derive(Debug, Default)]
struct Usage {
    registers: u32,
    shared_bytes: u32,
    spilled_bytes: u32,
}

/// Assembles PTX; returns the resources of each kernel.
fn assemble(toolkit: &Path, ptx: &[u8], architecture: u32) -> Result<BTreeMap<String, Usage>, Error> {
    let folder = tempfile::tempdir()?;
    let (file, object) = (folder.path().join("kernels.ptx"), folder.path().join("kernels.cubin"));
    std::fs::write(&file, ptx)?;
    let ptxas = toolkit.join("bin/ptxas");
    let output = Command::new(&ptxas)
        .args(["-v", &format!("-arch=sm_{architecture}"), "-o"])
        .args([&object, &file])
        .output()
        .map_err(|error| format!("{}: {error}", ptxas.display()))?;
    let report = String::from_utf8_lossy(&output.stderr);
    match output.status.success() {
        true => Ok(read_report(&report)),
        false => Err(format!("ptxas, for sm_{architecture}:\n{report}").into()),
    }
}

fn read_report(report: &str) -> BTreeMap<String, Usage> {
    let (mut kernels, mut current) = (BTreeMap::<String, Usage>::new(), String::new());
    for line in report.lines() {
        if let Some((_, name)) = line.split_once("Compiling entry function '") {
            current = name.split('\'').next().unwrap_or_default().to_owned();
        }
        let usage = kernels.entry(current.clone()).or_default();
        let before = |unit: &str| number_before(line, unit);
        usage.registers = before(" registers").unwrap_or(usage.registers);
        usage.shared_bytes = before(" bytes smem").unwrap_or(usage.shared_bytes);
        let spilled = before(" bytes spill stores").into_iter().chain(before(" bytes spill loads")).sum::<u32>();
        usage.spilled_bytes += spilled;
    }
    kernels.remove("");
    kernels
}

/// The integer before a word.
fn number_before(line: &str, word: &str) -> Option<u32> {
    line[..line.find(word)?].rsplit(' ').next()?.parse().ok()
}

/// Resources of every kernel of a specialization on an architecture.
fn usages(
    nvrtc: &Nvrtc,
    toolkit: &Path,
    kernels: &Specialization,
    architecture: u32,
) -> Result<BTreeMap<String, Usage>, Error> {
    let ptx = nvrtc.compile(&kernels.source(), architecture)?;
    let usages = assemble(toolkit, &ptx, architecture)?;
    match KERNELS.into_iter().find(|kernel| !usages.contains_key(*kernel)) {
        None => Ok(usages),
        Some(missing) => Err(format!("sm_{architecture}: ptxas says nothing of {missing}").into()),
    }
}

fn run() -> Result<(), Error> {
    let toolkit: PathBuf = std::env::args_os().nth(1).ok_or("expected the folder of the CUDA toolkit")?.into();
    let nvrtc = Nvrtc::open(&toolkit)?;
    let mut jobs = Vec::new();
    for scalar in Scalar::ALL {
        for (head_dim, heads_per_kv_head) in HEADS {
            let kernels = Specialization::new(scalar, head_dim, heads_per_kv_head, BLOCK_TOKENS)?;
            jobs.extend(ARCHITECTURES.map(|architecture| (kernels, architecture)));
        }
    }
    let compile = |(kernels, architecture): &(Specialization, u32)| usages(&nvrtc, &toolkit, kernels, *architecture);
    let compiled = jobs.par_iter().map(compile).collect::<Result<Vec<_>, _>>()?;
    println!("type,head_dim,group,architecture,kernel,registers,shared_bytes,spilled_bytes");
    let mut spilling = 0;
    for ((Specialization { scalar, head_dim, group, .. }, architecture), usages) in jobs.iter().zip(compiled) {
        for (kernel, Usage { registers, shared_bytes, spilled_bytes }) in usages {
            let scalar = scalar.name();
            println!(
                "{scalar},{head_dim},{group},sm_{architecture},{kernel},{registers},{shared_bytes},{spilled_bytes}"
            );
            spilling += usize::from(spilled_bytes > 0);
        }
    }
    match spilling {
        0 => Ok(()),
        _ => Err(format!("{spilling} kernels spill registers").into()),
    }
}

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cuda_compile: {error}");
            ExitCode::FAILURE
        }
    }
}
