//! Properties of the measured machine, from the operating system.

/// Name of the CPU, and number of threads of the kernels.
pub fn device_name() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |line: &str| line.split_once(':').map(|(_, value)| value.trim().to_owned());
    let name = info.lines().find(|line| line.starts_with("model name")).and_then(field);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let name = name.unwrap_or_else(|| format!("CPU ({})", std::env::consts::ARCH));
    format!("{name}, {cores} cores, {} threads", rayon::current_num_threads())
}

/// Load and speed of the machine, as far as the system reports them.
pub(crate) fn machine_state() -> String {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load: Vec<&str> = load.split_whitespace().take(3).collect();
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let clock = info.lines().filter(|line| line.starts_with("cpu MHz")).filter_map(|line| line.split_once(':'));
    let clock = clock.filter_map(|(_, mhz)| mhz.trim().parse::<f64>().ok()).reduce(f64::max);
    let clock = clock.map_or(String::new(), |mhz| format!(", cores at up to {:.2} GHz", mhz / 1e3));
    match load.is_empty() {
        true => format!("load unknown{clock}"),
        false => format!("load {} over 1, 5 and 15 minutes{clock}", load.join(" ")),
    }
}
