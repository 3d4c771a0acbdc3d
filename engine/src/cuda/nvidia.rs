//! NVIDIA GPUs, through cudarc: memory, kernels that NVRTC compiles on first use, cuBLAS, graphs and events.

use std::collections::HashMap;
use std::ffi::c_void;
use std::fmt::{Debug, Display};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use candle_core::cuda_backend::cudarc::cublas::{CudaBlas, result::gemm_ex, sys as cublas};
use candle_core::cuda_backend::cudarc::driver::{
    CudaContext, CudaEvent, CudaFunction, CudaGraph, CudaSlice, CudaStream, DevicePtr, DriverError, result, sys,
};
use candle_core::cuda_backend::cudarc::nvrtc::sys::nvrtcVersion;
use candle_core::cuda_backend::cudarc::nvrtc::{CompileError, CompileOptions, Ptx, compile_ptx_with_opts};
use candle_core::{Error, Result, bail};
use nvml_wrapper::Nvml;
use nvml_wrapper::enum_wrappers::device::Clock;
use sha2::{Digest, Sha256};

use super::device::{Device, Out, Product, THREADS};
use super::source::{KERNELS, Scalar, Specialization};

/// Workspace of cuBLAS. Otherwise cuBLAS would allocate memory, which a graph cannot record. NVIDIA recommends 32 MiB
/// from Hopper on, and 4 MiB before.
const WORKSPACE_BYTES: usize = 32 << 20;
/// The oldest architecture that supports bf16.
const OLDEST_ARCHITECTURE: (i32, i32) = (8, 0);

/// A GPU. All its work is in one stream.
pub struct Nvidia {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    blas: CudaBlas,
    architecture: (i32, i32),
    name: String,
    _workspace: CudaSlice<u8>,
}

/// Recorded work of a GPU.
pub struct Graph(CudaGraph);

// SAFETY: a graph may be used by one thread at a time, any thread. Only `Nvidia::replay`, which does not change the
// graph, and dropping use it.
unsafe impl Send for Graph {}

/// Adds the failed operation to an error of NVIDIA's libraries.
trait OrSay<T> {
    fn or_say(self, what: impl Display) -> Result<T>;
}

impl<T, E: Debug> OrSay<T> for std::result::Result<T, E> {
    fn or_say(self, what: impl Display) -> Result<T> {
        self.map_err(|error| Error::Msg(format!("{what}: {error:?}")))
    }
}

impl Nvidia {
    /// Opens GPU number `ordinal`, among those visible under `CUDA_VISIBLE_DEVICES`.
    ///
    /// # Errors
    /// If there is no driver or no such GPU, or it is older than Ampere.
    pub fn new(ordinal: usize) -> Result<Self> {
        Self::check(ordinal)?;
        let context = CudaContext::new(ordinal).or_say(format!("opening GPU {ordinal}"))?;
        let architecture = context.compute_capability().or_say("asking for the GPU's architecture")?;
        let name = context.name().or_say("asking for the GPU's name")?;
        if architecture < OLDEST_ARCHITECTURE {
            let (major, minor) = architecture;
            bail!("GPU {ordinal}, {name}, is of architecture {major}.{minor}: expected 8.0 (A100) or later");
        }
        // SAFETY: there is one stream, which runs everything in order, so no event has to be waited for.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().or_say("making a CUDA stream")?;
        let blas = CudaBlas::new(stream.clone()).or_say("opening cuBLAS")?;
        // SAFETY: the initial contents do not matter.
        let workspace = unsafe { stream.alloc::<u8>(WORKSPACE_BYTES) }.or_say("allocating cuBLAS's workspace")?;
        let address = workspace.device_ptr(&stream).0;
        // SAFETY: the handle is open, and the workspace lives as long as it.
        unsafe { cublas::cublasSetWorkspace_v2(*blas.handle(), address as *mut c_void, WORKSPACE_BYTES) }
            .result()
            .or_say("giving cuBLAS its workspace")?;
        Ok(Self { context, stream, blas, architecture, name, _workspace: workspace })
    }

    /// Checks that there is a GPU number `ordinal`.
    ///
    /// # Errors
    /// If there is none.
    pub fn check(ordinal: usize) -> Result<()> {
        match Self::count()? {
            0 => bail!("there is no GPU here"),
            count if ordinal >= count => bail!("there is no GPU {ordinal}: found {count}, numbered from 0"),
            _ => Ok(()),
        }
    }

    /// Number of GPUs.
    ///
    /// # Errors
    /// If no driver responds.
    pub fn count() -> Result<usize> {
        result::init().map_err(|DriverError(code)| {
            Error::Msg(format!("there is no GPU here: NVIDIA's driver is missing or does not answer ({code:?})"))
        })?;
        let count = result::device::get_count().or_say("counting the GPUs")?;
        Ok(count.max(0) as usize)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// If the device fails, now or in earlier work.
    fn wait(&self) -> Result<()> {
        self.stream.synchronize().or_say("waiting for the GPU")
    }

    /// Driver, clocks and power from NVIDIA's management library.
    fn managed_state(&self) -> Result<String> {
        let nvml = Nvml::init().or_say("opening NVML")?;
        let uuid = self.context.uuid().or_say("asking for the GPU's UUID")?.bytes.map(|byte| byte as u8);
        let device = nvml.device_by_uuid(written(&uuid)).or_say("finding the GPU in NVML")?;
        let cuda = nvml.sys_cuda_driver_version().or_say("asking for the driver's CUDA")?;
        let mut parts = vec![
            format!("driver {}", nvml.sys_driver_version().or_say("asking for the driver's version")?),
            format!("CUDA {}.{}", cuda / 1000, cuda % 1000 / 10),
        ];
        // Some GPUs, mostly virtual ones, do not report all of it.
        for (name, clock) in [("SM", Clock::SM), ("memory", Clock::Memory)] {
            if let (Ok(now), Ok(most)) = (device.clock_info(clock), device.max_clock_info(clock)) {
                parts.push(format!("{name} clock {now} of {most} MHz"));
            }
        }
        if let Ok(state) = device.performance_state() {
            parts.push(format!("performance state {state:?}"));
        }
        if let (Ok(used), Ok(limit)) = (device.power_usage(), device.enforced_power_limit()) {
            parts.push(format!("{} of {} W", used / 1000, limit / 1000));
        }
        Ok(parts.join(", "))
    }
}

/// A UUID in NVML's format.
fn written(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("GPU-{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// The kernels' PTX for an architecture, cached by the hash of the source.
fn compiled(source: &str, (major, minor): (i32, i32)) -> Result<Ptx> {
    let architecture = format!("compute_{major}{minor}");
    let hash: String = Sha256::digest(source).iter().take(8).map(|byte| format!("{byte:02x}")).collect();
    let file = cache_folder()?.map(|folder| folder.join(format!("{hash}-{architecture}.ptx")));
    if let Some(text) = file.as_ref().and_then(|file| std::fs::read_to_string(file).ok()) {
        return Ok(Ptx::from_src(text));
    }
    let options =
        CompileOptions { options: vec![format!("--gpu-architecture={architecture}")], ..CompileOptions::default() };
    let ptx = compile_ptx_with_opts(source, options).map_err(|error| match error {
        CompileError::CompileError { log, .. } => {
            Error::Msg(format!("compiling the kernels for {architecture}:\n{}", log.to_string_lossy()))
        }
        error => Error::Msg(format!("compiling the kernels for {architecture}: {error:?}")),
    })?;
    if let Some(file) = file {
        // Without a cache, the kernels are compiled again next time.
        let _ = keep(&file, &ptx.to_src());
    }
    Ok(ptx)
}

/// Cache folder for kernels of this version of NVRTC, if the user has a cache folder.
fn cache_folder() -> Result<Option<PathBuf>> {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: NVRTC writes the two numbers.
    unsafe { nvrtcVersion(&mut major, &mut minor) }.result().or_say("asking NVRTC for its version")?;
    let of_user = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let in_home = || std::env::home_dir().map(|home| home.join(".cache"));
    let folder = of_user.or_else(in_home);
    Ok(folder.map(|folder| folder.join("depthwise").join(format!("nvrtc-{major}.{minor}"))))
}

/// Writes a file so that other processes never see a partial one.
fn keep(file: &Path, text: &str) -> std::io::Result<()> {
    if let Some(folder) = file.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // Another process may be writing the same file.
    let part = file.with_extension(format!("part-{}", std::process::id()));
    std::fs::write(&part, text).and_then(|()| std::fs::rename(&part, file)).inspect_err(|_| {
        // The error of the writing is the one to report.
        let _ = std::fs::remove_file(&part);
    })
}

/// cuBLAS's name of a storage type.
fn data_type(scalar: Scalar) -> cublas::cudaDataType {
    match scalar {
        Scalar::F32 => cublas::cudaDataType::CUDA_R_32F,
        Scalar::F16 => cublas::cudaDataType::CUDA_R_16F,
        Scalar::Bf16 => cublas::cudaDataType::CUDA_R_16BF,
    }
}

impl Device for Nvidia {
    type Memory = CudaSlice<u8>;
    type Module = HashMap<&'static str, CudaFunction>;
    type Graph = Graph;
    type Event = CudaEvent;

    fn name(&self) -> String {
        self.name.clone()
    }

    fn state(&self) -> String {
        self.managed_state().unwrap_or_else(|error| format!("its state is not known: {error}"))
    }

    fn load(&self, specialization: &Specialization) -> Result<Self::Module> {
        let ptx = compiled(&specialization.source(), self.architecture)?;
        let module = self.context.load_module(ptx).or_say(
            "the driver does not take the compiled kernels: it must be at least as new as the CUDA that compiled them",
        )?;
        let function = |name: &'static str| Ok((name, module.load_function(name).or_say(format!("kernel {name}"))?));
        KERNELS.into_iter().map(function).collect()
    }

    fn allocate(&self, bytes: usize) -> Result<Self::Memory> {
        // SAFETY: any bit pattern is a valid byte.
        unsafe { self.stream.alloc::<u8>(bytes.max(16)) }.or_say(format!("allocating {bytes} bytes of GPU memory"))
    }

    fn address(&self, memory: &Self::Memory) -> u64 {
        memory.device_ptr(&self.stream).0
    }

    fn upload_at(&self, to: &Self::Memory, start: usize, bytes: &[u8]) -> Result<()> {
        assert!(start + bytes.len() <= to.len());
        self.context.bind_to_thread().or_say("turning to the GPU")?;
        // SAFETY: there is room; pageable memory has been read when the call returns.
        unsafe { result::memcpy_htod_async(self.address(to) + start as u64, bytes, self.stream.cu_stream()) }
            .or_say(format!("uploading {} bytes", bytes.len()))
    }

    fn download(&self, from: &Self::Memory, bytes: &mut [u8]) -> Result<()> {
        assert!(bytes.len() <= from.len());
        self.context.bind_to_thread().or_say("turning to the GPU")?;
        let what = format!("downloading {} bytes", bytes.len());
        // SAFETY: the lengths are equal, and the copy is complete when this returns.
        unsafe { result::memcpy_dtoh_async(bytes, self.address(from), self.stream.cu_stream()) }.or_say(what)?;
        self.wait()
    }

    unsafe fn launch(
        &self,
        module: &Self::Module,
        kernel: &'static str,
        grid: [usize; 3],
        arguments: &[*const c_void],
    ) -> Result<()> {
        if grid.contains(&0) {
            return Ok(());
        }
        let function = module.get(kernel).ok_or_else(|| Error::Msg(format!("there is no kernel {kernel}")))?;
        let [x, y, z] = grid.map(|blocks| blocks as u32);
        let mut arguments: Vec<*mut c_void> = arguments.iter().map(|argument| argument.cast_mut()).collect();
        self.context.bind_to_thread().or_say("turning to the GPU")?;
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
        launched.or_say(format!("launching {kernel} over {grid:?} blocks"))
    }

    unsafe fn product(&self, product: &Product) -> Result<()> {
        let &Product { scalar, rows, inputs, outputs, x, weight, y, out } = product;
        if rows == 0 {
            return Ok(());
        }
        let (y_type, kept) = match out {
            Out::Stored => (data_type(scalar), 0.0_f32),
            Out::F32 => (data_type(Scalar::F32), 0.0),
            Out::AddedToF32 => (data_type(Scalar::F32), 1.0),
        };
        // Tensor cores would round `f32` numbers to 19 bits.
        let compute = match scalar {
            Scalar::F32 => cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F_PEDANTIC,
            Scalar::F16 | Scalar::Bf16 => cublas::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let one = 1.0_f32;
        let [rows, inputs, outputs] = [rows, inputs, outputs].map(|size| size as i32);
        self.context.bind_to_thread().or_say("turning to the GPU")?;
        // SAFETY: the caller ensures the sizes. cuBLAS is column-major: the weight is `[inputs, outputs]`, to be
        // transposed, and `x` and `y` are `[inputs, rows]` and `[outputs, rows]`.
        let multiplied = unsafe {
            gemm_ex(
                *self.blas.handle(),
                cublas::cublasOperation_t::CUBLAS_OP_T,
                cublas::cublasOperation_t::CUBLAS_OP_N,
                outputs,
                rows,
                inputs,
                std::ptr::from_ref(&one).cast(),
                weight as *const c_void,
                data_type(scalar),
                inputs,
                x as *const c_void,
                data_type(scalar),
                inputs,
                std::ptr::from_ref(&kept).cast(),
                y as *mut c_void,
                y_type,
                outputs,
                compute,
                cublas::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
            )
        };
        multiplied.or_say(format!("cuBLAS, {rows} rows of {inputs} times a weight of {outputs} outputs"))
    }

    fn capture(&self, work: impl FnOnce() -> Result<()>) -> Result<Self::Graph> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).or_say("beginning a CUDA graph")?;
        let worked = work();
        // The capture is ended in any case: a capturing stream does no work.
        let graph = self.stream.end_capture(sys::CUgraphInstantiate_flags(0)).or_say("ending a CUDA graph");
        worked?;
        let graph = graph?.ok_or_else(|| Error::Msg("ending a CUDA graph: nothing was recorded".to_owned()))?;
        graph.upload().or_say("uploading a CUDA graph")?;
        Ok(Graph(graph))
    }

    unsafe fn replay(&self, graph: &Self::Graph) -> Result<()> {
        graph.0.launch().or_say("launching a CUDA graph")
    }

    fn event(&self) -> Result<Self::Event> {
        self.context.new_event(Some(sys::CUevent_flags::CU_EVENT_DEFAULT)).or_say("making a CUDA event")
    }

    fn record(&self, event: &Self::Event) -> Result<()> {
        event.record(&self.stream).or_say("recording a CUDA event")
    }

    fn elapsed(&self, from: &Self::Event, to: &Self::Event) -> Result<Duration> {
        // `elapsed_ms` waits for both.
        let milliseconds = from.elapsed_ms(to).or_say("timing the GPU's work")?;
        Ok(Duration::from_secs_f64(f64::from(milliseconds) / 1000.0))
    }
}
