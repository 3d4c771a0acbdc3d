//! NVIDIA GPUs, by cudarc: memory, and kernels that NVRTC compiles when they are first needed.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt::Display;
use std::path::PathBuf;
use std::sync::Arc;

use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaFunction, CudaSlice, CudaStream, DevicePtr, result};
use candle_core::cuda_backend::cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};
use candle_core::{Error, Result};
use sha2::{Digest, Sha256};

use super::device::{Device, THREADS};
use super::source::{KERNELS, Specialization};

/// A GPU with the kernels of a model.
#[derive(Debug)]
pub struct Nvidia {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    kernels: HashMap<&'static str, CudaFunction>,
}

/// Says what was being done when cudarc failed.
trait OrSay<T> {
    fn or_say(self, what: impl Display) -> Result<T>;
}

impl<T, E: std::fmt::Debug> OrSay<T> for std::result::Result<T, E> {
    fn or_say(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Error::Msg(format!("{what}: {error:?}")))
    }
}

impl Nvidia {
    /// GPU number `ordinal`, with the kernels compiled for it, or taken from the cache of those compiled before.
    ///
    /// # Errors
    /// If there is no such GPU, or the kernels cannot be compiled for it.
    pub fn new(ordinal: usize, specialization: &Specialization) -> Result<Self> {
        let context = CudaContext::new(ordinal).or_say(format!("GPU {ordinal}"))?;
        let (major, minor) = context.compute_capability().or_say("the GPU's architecture")?;
        let module = context.load_module(compiled(&specialization.source(), major, minor)?);
        let module = module.or_say("the driver does not take the kernels")?;
        let function = |name: &'static str| Ok((name, module.load_function(name).or_say(name)?));
        Ok(Self {
            kernels: KERNELS.into_iter().map(function).collect::<Result<_>>()?,
            stream: context.new_stream().or_say("a CUDA stream")?,
            context,
        })
    }

    /// How many GPUs there are; 0 without a driver.
    pub fn count() -> usize {
        CudaContext::device_count().map_or(0, |count| count.max(0) as usize)
    }

    /// The GPU's name.
    ///
    /// # Errors
    /// If the driver does not say.
    pub fn name(&self) -> Result<String> {
        self.context.name().or_say("the GPU's name")
    }
}

/// The kernels' PTX for an architecture, cached by the hash of the source.
fn compiled(source: &str, major: i32, minor: i32) -> Result<Ptx> {
    let architecture = format!("compute_{major}{minor}");
    let hash = Sha256::digest(source).iter().take(8).map(|byte| format!("{byte:02x}")).collect::<String>();
    let file = cache_folder().map(|folder| folder.join(format!("{hash}-{architecture}.ptx")));
    if let Some(text) = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()) {
        return Ok(Ptx::from_src(text));
    }
    let options =
        CompileOptions { options: vec![format!("--gpu-architecture={architecture}")], ..CompileOptions::default() };
    let ptx = compile_ptx_with_opts(source, options).or_say(format!("NVRTC, for {architecture}"))?;
    if let Some(file) = file {
        // Without a cache the kernels are compiled again next time: no reason to stop.
        let _ = keep(&file, &ptx.to_src());
    }
    Ok(ptx)
}

/// Where compiled kernels are kept.
fn cache_folder() -> Option<PathBuf> {
    let of_user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let in_home = || std::env::home_dir().map(|home| home.join(".cache"));
    of_user.or_else(in_home).map(|folder| folder.join("depthwise"))
}

/// Writes a file so that others never see half of it.
fn keep(file: &std::path::Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let partial = file.with_extension(format!("partial-{}", std::process::id()));
    std::fs::write(&partial, text)?;
    std::fs::rename(partial, file)
}

impl Device for Nvidia {
    type Memory = CudaSlice<u8>;

    fn allocate(&self, bytes: usize) -> Result<Self::Memory> {
        // SAFETY: bytes may be anything.
        unsafe { self.stream.alloc::<u8>(bytes.max(16)) }.or_say(format!("{bytes} bytes of GPU memory"))
    }

    fn address(&self, memory: &Self::Memory) -> u64 {
        memory.device_ptr(&self.stream).0
    }

    fn upload(&self, to: &Self::Memory, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() <= to.len());
        self.context.bind_to_thread().or_say("the GPU")?;
        // SAFETY: there is room; memory that is not pinned has been read when the call returns.
        unsafe { result::memcpy_htod_async(self.address(to), bytes, self.stream.cu_stream()) }.or_say("an upload")
    }

    fn download(&self, from: &Self::Memory, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= from.len());
        self.context.bind_to_thread().or_say("the GPU")?;
        // SAFETY: there are as many; and the copy is over when this returns.
        unsafe { result::memcpy_dtoh_async(bytes, self.address(from), self.stream.cu_stream()) }
            .or_say("a download")?;
        self.stream.synchronize().or_say("the GPU's work")
    }

    unsafe fn launch(&self, kernel: &'static str, grid: [usize; 3], arguments: &[*const c_void]) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let function = self.kernels.get(kernel).ok_or_else(|| Error::Msg(format!("there is no kernel {kernel}")))?;
        let [x, y, z] = grid.map(|blocks| blocks as u32);
        let mut arguments: Vec<*mut c_void> = arguments.iter().map(|argument| argument.cast_mut()).collect();
        self.context.bind_to_thread().or_say("the GPU")?;
        // SAFETY: the caller's promise; the driver copies the arguments and does not change them.
        let launched = unsafe {
            result::launch_kernel(
                function.cu_function(),
                (x, y, z),
                (THREADS as u32, 1, 1),
                0,
                self.stream.cu_stream(),
                &mut arguments,
            )
        };
        launched.or_say(kernel)
    }
}
