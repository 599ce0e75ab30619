//! The part of the CUDA driver API that measuring needs and the library does not: timing events and graphs.
//!
//! Memory, streams and contexts are `twoshot::driver`'s. `unsafe` of the binary is here and in `nccl`.

use std::ffi::{c_char, c_int, c_uint, c_ulonglong, c_void};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

type Handle = *mut c_void;

struct Api {
    init: unsafe extern "C" fn(c_uint) -> c_int,
    version: unsafe extern "C" fn(*mut c_int) -> c_int,
    count: unsafe extern "C" fn(*mut c_int) -> c_int,
    device: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int,
    event_create: unsafe extern "C" fn(*mut Handle, c_uint) -> c_int,
    event_record: unsafe extern "C" fn(Handle, Handle) -> c_int,
    event_query: unsafe extern "C" fn(Handle) -> c_int,
    event_elapsed: unsafe extern "C" fn(*mut f32, Handle, Handle) -> c_int,
    event_destroy: unsafe extern "C" fn(Handle) -> c_int,
    capture_begin: unsafe extern "C" fn(Handle, c_int) -> c_int,
    capture_end: unsafe extern "C" fn(Handle, *mut Handle) -> c_int,
    graph_instantiate: unsafe extern "C" fn(*mut Handle, Handle, c_ulonglong) -> c_int,
    graph_launch: unsafe extern "C" fn(Handle, Handle) -> c_int,
    graph_exec_destroy: unsafe extern "C" fn(Handle) -> c_int,
    graph_destroy: unsafe extern "C" fn(Handle) -> c_int,
    error_name: unsafe extern "C" fn(c_int, *mut *const c_char) -> c_int,
    path: String,
}

const NOT_READY: c_int = 600;
const CAPTURE_THREAD_LOCAL: c_int = 1;

/// `CUDA_ERROR_NO_DEVICE`.
const NO_DEVICE: c_int = 100;

fn load() -> Result<Api, String> {
    // SAFETY: libcuda's initialisers have no preconditions; every CUDA program runs them.
    let library =
        unsafe { libloading::Library::new("libcuda.so.1") }.map_err(|error| format!("no CUDA driver: {error}"))?;
    let library: &'static libloading::Library = Box::leak(Box::new(library));
    macro_rules! symbol {
        ($($name:literal)|+) => {{
            let found = None;
            $(
                // SAFETY: the type is the one that `include/cuda_abi.h` states for this name.
                let found = found.or_else(|| unsafe { library.get(concat!($name, "\0").as_bytes()) }.ok());
            )+
            *found.ok_or(concat!("the CUDA driver lacks ", $($name, " "),+))?
        }};
    }
    let init: unsafe extern "C" fn(c_uint) -> c_int = symbol!("cuInit");
    let api = Api {
        init,
        version: symbol!("cuDriverGetVersion"),
        count: symbol!("cuDeviceGetCount"),
        device: symbol!("cuDeviceGet"),
        name: symbol!("cuDeviceGetName"),
        event_create: symbol!("cuEventCreate"),
        event_record: symbol!("cuEventRecord"),
        event_query: symbol!("cuEventQuery"),
        event_elapsed: symbol!("cuEventElapsedTime" | "cuEventElapsedTime_v2"),
        event_destroy: symbol!("cuEventDestroy_v2"),
        capture_begin: symbol!("cuStreamBeginCapture_v2"),
        capture_end: symbol!("cuStreamEndCapture"),
        graph_instantiate: symbol!("cuGraphInstantiateWithFlags"),
        graph_launch: symbol!("cuGraphLaunch"),
        graph_exec_destroy: symbol!("cuGraphExecDestroy"),
        graph_destroy: symbol!("cuGraphDestroy"),
        error_name: symbol!("cuGetErrorName"),
        path: crate::nccl::origin(init as *const c_void).map(|path| path.display().to_string()).unwrap_or_default(),
    };
    // SAFETY: takes a flags word that must be zero.
    let code = unsafe { (api.init)(0) };
    if code == NO_DEVICE {
        return Err(format!("{}: no GPU is visible: check CUDA_VISIBLE_DEVICES and the container's devices", api.path));
    }
    if code == 0 { Ok(api) } else { Err(format!("{}: cuInit failed with {}", api.path, describe(&api, code))) }
}

fn api() -> Result<&'static Api, String> {
    static API: OnceLock<Result<Api, String>> = OnceLock::new();
    API.get_or_init(load).as_ref().map_err(String::clone)
}

fn describe(api: &Api, code: c_int) -> String {
    let mut text = std::ptr::null();
    // SAFETY: valid out-pointer; any code may be asked for.
    let known = unsafe { (api.error_name)(code, &raw mut text) } == 0 && !text.is_null();
    if !known {
        return format!("CUDA driver error {code}");
    }
    // SAFETY: terminated text that lives as long as the driver.
    let name = unsafe { std::ffi::CStr::from_ptr(text) };
    format!("{} ({code})", name.to_string_lossy())
}

fn check(api: &Api, call: &str, code: c_int) -> Result<(), String> {
    if code == 0 { Ok(()) } else { Err(format!("{call} failed with {}", describe(api, code))) }
}

/// The driver's own version of the CUDA API, such as 13000, and the file it came from.
pub fn driver() -> Result<(i32, String), String> {
    let api = api()?;
    let mut version = 0;
    // SAFETY: valid out-pointer.
    check(api, "cuDriverGetVersion", unsafe { (api.version)(&raw mut version) })?;
    Ok((version, api.path.clone()))
}

/// Number of GPUs that this process sees.
pub fn device_count() -> Result<u32, String> {
    let api = api()?;
    let mut count = 0;
    // SAFETY: valid out-pointer.
    check(api, "cuDeviceGetCount", unsafe { (api.count)(&raw mut count) })?;
    Ok(u32::try_from(count).unwrap_or(0))
}

/// A GPU's product name.
pub fn device_name(ordinal: i32) -> Result<String, String> {
    let api = api()?;
    let (mut device, mut name) = (0, [0u8; 128]);
    // SAFETY: valid out-pointer; the driver checks the ordinal.
    check(api, "cuDeviceGet", unsafe { (api.device)(&raw mut device, ordinal) })?;
    // SAFETY: the driver writes at most the 127 bytes it is told of, so the last one stays zero.
    check(api, "cuDeviceGetName", unsafe { (api.name)(name.as_mut_ptr().cast(), 127, device) })?;
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(0);
    Ok(String::from_utf8_lossy(&name[..end]).into_owned())
}

/// A stream's handle. It is alive as long as the rank that uses it.
pub type Stream = *mut c_void;

/// An event that takes the time.
pub struct Event(Handle);

impl Event {
    /// Creates it; the device's context is current.
    pub fn new() -> Result<Self, String> {
        let (api, mut raw) = (api()?, std::ptr::null_mut());
        // SAFETY: valid out-pointer.
        check(api, "cuEventCreate", unsafe { (api.event_create)(&raw mut raw, 0) })?;
        Ok(Self(raw))
    }

    /// Records it behind what is queued.
    pub fn record(&self, stream: Stream) -> Result<(), String> {
        let api = api()?;
        // SAFETY: the event is alive, and so is the stream: the rank's own.
        check(api, "cuEventRecord", unsafe { (api.event_record)(self.0, stream) })
    }

    /// Waits for it, polling; `meanwhile` is asked now and then whether to go on.
    pub fn wait(&self, mut meanwhile: impl FnMut() -> Result<(), String>) -> Result<(), String> {
        let api = api()?;
        let start = Instant::now();
        loop {
            // SAFETY: the event is alive.
            match unsafe { (api.event_query)(self.0) } {
                NOT_READY => {}
                code => return check(api, "cuEventQuery", code),
            }
            if start.elapsed() > Duration::from_millis(1) {
                meanwhile()?;
                std::thread::sleep(Duration::from_micros(200));
            }
        }
    }

    /// Microseconds from an earlier event; both were waited for.
    pub fn since(&self, earlier: &Self) -> Result<f64, String> {
        let (api, mut milliseconds) = (api()?, 0f32);
        // SAFETY: valid out-pointer, two live events.
        let code = unsafe { (api.event_elapsed)(&raw mut milliseconds, earlier.0, self.0) };
        check(api, "cuEventElapsedTime", code)?;
        Ok(f64::from(milliseconds) * 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(api) = api() {
            // SAFETY: created once, destroyed once; the driver defers what is still pending.
            unsafe { (api.event_destroy)(self.0) };
        }
    }
}

/// A captured graph, ready to launch.
pub struct Graph {
    graph: Handle,
    exec: Handle,
}

impl Graph {
    /// Captures what `work` queues on `stream`.
    pub fn capture(stream: Stream, work: impl FnOnce() -> Result<(), String>) -> Result<Self, String> {
        let api = api()?;
        // SAFETY: a live stream that does not capture.
        check(api, "cuStreamBeginCapture", unsafe { (api.capture_begin)(stream, CAPTURE_THREAD_LOCAL) })?;
        let worked = work();
        let mut captured = Self { graph: std::ptr::null_mut(), exec: std::ptr::null_mut() };
        // SAFETY: valid out-pointer; ends the capture begun above, also after an error.
        let ended = unsafe { (api.capture_end)(stream, &raw mut captured.graph) };
        worked?;
        check(api, "cuStreamEndCapture", ended)?;
        // SAFETY: valid out-pointer, a live graph.
        let code = unsafe { (api.graph_instantiate)(&raw mut captured.exec, captured.graph, 0) };
        check(api, "cuGraphInstantiateWithFlags", code)?;
        Ok(captured)
    }

    /// Queues one replay.
    pub fn launch(&self, stream: Stream) -> Result<(), String> {
        let api = api()?;
        // SAFETY: a live executable graph and stream.
        check(api, "cuGraphLaunch", unsafe { (api.graph_launch)(self.exec, stream) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let Ok(api) = api() else { return };
        if !self.exec.is_null() {
            // SAFETY: instantiated once, destroyed once; its replays were waited for.
            unsafe { (api.graph_exec_destroy)(self.exec) };
        }
        if !self.graph.is_null() {
            // SAFETY: captured once, destroyed once.
            unsafe { (api.graph_destroy)(self.graph) };
        }
    }
}
