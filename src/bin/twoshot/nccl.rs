//! NCCL's public functions, taken by name from a library that is opened by path: the way vLLM's pynccl does it.
//!
//! `unsafe` of the binary is here and in `cuda`. Signatures are those of `include/nccl_api.h`.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use twoshot::abi::Description;
use twoshot::driver::{Context, Scratch};
use twoshot::intercept::{Code, Comm, Stream, UniqueId};
use twoshot::route::NEVER;

use crate::protocol::Agreed;

type AllReduce = unsafe extern "C" fn(*const c_void, *mut c_void, usize, c_int, c_int, Comm, Stream) -> Code;

/// `ncclInt32`, `ncclSum` and `ncclMin`.
pub const INT32: i32 = 2;
pub const SUM: i32 = 0;
pub const MIN: i32 = 3;

/// An NCCL, stock or ours. Never closed: it has threads and exit handlers.
pub struct Nccl {
    get_version: unsafe extern "C" fn(*mut c_int) -> Code,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> Code,
    get_error_string: unsafe extern "C" fn(Code) -> *const c_char,
    get_last_error: Option<unsafe extern "C" fn(Comm) -> *const c_char>,
    comm_init_rank: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int) -> Code,
    comm_get_async_error: unsafe extern "C" fn(Comm, *mut Code) -> Code,
    comm_destroy: unsafe extern "C" fn(Comm) -> Code,
    all_reduce: AllReduce,
    counters: Option<unsafe extern "C" fn(*mut u64, *mut u64) -> c_int>,
    twoshot_version: Option<unsafe extern "C" fn() -> *const c_char>,
    describe: Option<unsafe extern "C" fn(Comm, *mut Description) -> c_int>,
    path: PathBuf,
}

impl Nccl {
    /// Opens the library at a path, or by a name that the dynamic linker searches.
    pub fn open(path: &Path) -> Result<&'static Self, String> {
        let shown = path.display();
        // SAFETY: an NCCL by the user's word; its constructors run, as in every program that uses it.
        let library =
            unsafe { libloading::Library::new(path) }.map_err(|error| format!("cannot open {shown}: {error}"))?;
        let library: &'static libloading::Library = Box::leak(Box::new(library));
        macro_rules! symbol {
            ($name:literal) => {
                // SAFETY: the type is the one that `include/nccl_api.h` and `include/twoshot.h` state for this name.
                *unsafe { library.get(concat!($name, "\0").as_bytes()) }
                    .map_err(|error| format!("{shown} lacks {}: {error}", $name))?
            };
        }
        macro_rules! optional {
            ($name:literal) => {
                // SAFETY: as above.
                unsafe { library.get(concat!($name, "\0").as_bytes()) }.ok().map(|symbol| *symbol)
            };
        }
        let get_version = symbol!("ncclGetVersion");
        let path = origin(get_version as *const c_void).unwrap_or_else(|| path.to_owned());
        Ok(Box::leak(Box::new(Self {
            get_version,
            get_unique_id: symbol!("ncclGetUniqueId"),
            get_error_string: symbol!("ncclGetErrorString"),
            get_last_error: optional!("ncclGetLastError"),
            comm_init_rank: symbol!("ncclCommInitRank"),
            comm_get_async_error: symbol!("ncclCommGetAsyncError"),
            comm_destroy: symbol!("ncclCommDestroy"),
            all_reduce: symbol!("ncclAllReduce"),
            counters: optional!("twoshot_counters"),
            twoshot_version: optional!("twoshot_version"),
            describe: optional!("twoshot_describe"),
            path,
        })))
    }

    /// The file it came from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// NCCL's version code, such as 22809.
    pub fn version(&self) -> Result<i32, String> {
        let mut version = 0;
        // SAFETY: valid out-pointer.
        self.check("ncclGetVersion", unsafe { (self.get_version)(&raw mut version) })?;
        Ok(version)
    }

    /// twoshot's own version, if this is libtwoshot.so.
    pub fn twoshot_version(&self) -> Option<String> {
        // SAFETY: returns text that lives as long as the program.
        let text = self.twoshot_version.map(|version| unsafe { version() }).filter(|text| !text.is_null())?;
        // SAFETY: just checked; terminated text.
        Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
    }

    /// Calls routed and calls left to stock NCCL so far; nothing if this is a stock NCCL.
    pub fn counters(&self) -> Option<(u64, u64)> {
        let (mut routed, mut stock) = (0, 0);
        // SAFETY: two valid out-pointers.
        (unsafe { self.counters?(&raw mut routed, &raw mut stock) } == 0).then_some((routed, stock))
    }

    /// A new identifier, in hexadecimal.
    pub fn unique_id(&self) -> Result<String, String> {
        let mut id = UniqueId { internal: [0; 128] };
        // SAFETY: valid out-pointer.
        self.check("ncclGetUniqueId", unsafe { (self.get_unique_id)(&raw mut id) })?;
        Ok(id.internal.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
    }

    fn check(&self, call: &str, code: Code) -> Result<(), String> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: takes any number, returns text that lives as long as the program.
        let name = text(unsafe { (self.get_error_string)(code) });
        // SAFETY: a null communicator asks for the thread's last error.
        let detail = self.get_last_error.map(|last| text(unsafe { last(std::ptr::null_mut()) })).unwrap_or_default();
        let detail = if detail.is_empty() { detail } else { format!(" ({})", detail.trim()) };
        Err(format!("{call} of {}: {code}, {name}{detail}", self.path.display()))
    }
}

fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: not null; NCCL returns terminated text.
    unsafe { CStr::from_ptr(pointer) }.to_string_lossy().into_owned()
}

/// The file that holds a function.
pub fn origin(function: *const c_void) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    // SAFETY: plain integers and pointers, for which zero is a value.
    let mut info: libc::Dl_info = unsafe { std::mem::zeroed() };
    // SAFETY: any address may be asked for; valid out-pointer.
    let found = unsafe { libc::dladdr(function, &raw mut info) } != 0 && !info.dli_fname.is_null();
    // SAFETY: terminated text that lives as long as the object, which is never closed.
    let name = found.then(|| unsafe { CStr::from_ptr(info.dli_fname) })?;
    let path = Path::new(std::ffi::OsStr::from_bytes(name.to_bytes()));
    Some(std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()))
}

/// Device memory of known size.
pub struct Buffer {
    scratch: Scratch,
    bytes: u64,
}

/// A part of a buffer.
#[derive(Clone, Copy)]
pub struct Span<'a> {
    address: u64,
    bytes: u64,
    _buffer: PhantomData<&'a Buffer>,
}

impl Buffer {
    /// Allocates it.
    pub fn new(context: &Arc<Context>, bytes: u64) -> Result<Self, String> {
        let scratch = Scratch::new(context, bytes).map_err(|error| error.to_string())?;
        Ok(Self { scratch, bytes })
    }

    /// The part from `offset` on.
    pub fn from(&self, offset: u64) -> Result<Span<'_>, String> {
        let bytes = self.bytes.checked_sub(offset).ok_or("an offset leaves its buffer")?;
        Ok(Span { address: self.scratch.address() + offset, bytes, _buffer: PhantomData })
    }

    /// Copies in and waits.
    pub fn write(&self, offset: u64, bytes: &[u8], stream: &twoshot::driver::Stream) -> Result<(), String> {
        self.scratch.write(offset, bytes, stream).map_err(|error| error.to_string())
    }

    /// Copies out and waits.
    pub fn read(&self, offset: u64, bytes: &mut [u8], stream: &twoshot::driver::Stream) -> Result<(), String> {
        self.scratch.read(offset, bytes, stream).map_err(|error| error.to_string())
    }
}

/// A communicator.
pub struct Communicator {
    nccl: &'static Nccl,
    raw: Comm,
}

impl Communicator {
    /// Joins. The device's context is current.
    pub fn join(nccl: &'static Nccl, ranks: u32, id: &str, rank: u32) -> Result<Self, String> {
        let mut unique = UniqueId { internal: [0; 128] };
        let digits = id.as_bytes();
        if digits.len() != 256 {
            return Err("an identifier has the wrong length".to_owned());
        }
        for (byte, pair) in unique.internal.iter_mut().zip(digits.chunks_exact(2)) {
            let pair = std::str::from_utf8(pair).map_err(|error| error.to_string())?;
            *byte = u8::from_str_radix(pair, 16).map_err(|error| error.to_string())? as c_char;
        }
        let mut raw = std::ptr::null_mut();
        // SAFETY: valid out-pointer; the identifier came from NCCL.
        let code = unsafe { (nccl.comm_init_rank)(&raw mut raw, ranks as c_int, unique, rank as c_int) };
        nccl.check("ncclCommInitRank", code)?;
        Ok(Self { nccl, raw })
    }

    /// Queues an AllReduce of `count` elements of `width` bytes. Both buffers outlive the work: a rank frees nothing
    /// before it has waited for its stream.
    pub fn all_reduce(
        &self,
        (input, output): (Span<'_>, Span<'_>),
        (count, width): (u64, u64),
        (dtype, op): (i32, i32),
        stream: &twoshot::driver::Stream,
    ) -> Result<(), String> {
        let bytes = count.checked_mul(width).ok_or("a count overflows")?;
        if bytes > input.bytes || bytes > output.bytes {
            return Err(format!("a call of {count} elements leaves its buffer"));
        }
        let (input, output) = (input.address as *const c_void, output.address as *mut c_void);
        let stream = stream.as_raw().0 as Stream;
        // SAFETY: a live communicator and stream; the addresses are device memory of the length just checked.
        let code = unsafe { (self.nccl.all_reduce)(input, output, count as usize, dtype, op, self.raw, stream) };
        self.nccl.check("ncclAllReduce", code)
    }

    /// What its ranks agreed on; nothing if this is stock NCCL's or not routed.
    pub fn agreed(&self) -> Option<Agreed> {
        // An older library leaves what it does not know.
        let size = size_of::<Description>() as u32;
        let mut it = Description { size, switch_bytes: NEVER, ..Description::default() };
        // SAFETY: a live communicator, and an out-pointer valid for the size that it states.
        let code = unsafe { self.nccl.describe?(self.raw, &raw mut it) };
        let Description {
            ranks,
            hosts,
            arch,
            nccl,
            blocks,
            oneshot_bytes,
            twoshot_bytes,
            switch_bytes,
            bulk_bytes,
            ..
        } = it;
        let multicast = it.multicast != 0;
        let switch_bytes = (switch_bytes != NEVER).then_some(switch_bytes);
        let bulk_bytes = Some(bulk_bytes).filter(|bytes| *bytes > 0);
        let agreed = Agreed {
            ranks,
            hosts,
            arch,
            nccl,
            multicast,
            blocks,
            oneshot_bytes,
            twoshot_bytes,
            switch_bytes,
            bulk_bytes,
        };
        (code == 0 && it.state == 1).then_some(agreed)
    }

    /// What went wrong behind the calls.
    pub fn async_error(&self) -> Result<(), String> {
        let mut error = 0;
        // SAFETY: a live communicator and a valid out-pointer.
        let code = unsafe { (self.nccl.comm_get_async_error)(self.raw, &raw mut error) };
        self.nccl.check("ncclCommGetAsyncError", code)?;
        self.nccl.check("an earlier call", error)
    }

    /// Destroys it. Not done by dropping: a rank that gives up must not wait for its peers on the way out.
    pub fn destroy(self) -> Result<(), String> {
        // SAFETY: made once and consumed here.
        self.nccl.check("ncclCommDestroy", unsafe { (self.nccl.comm_destroy)(self.raw) })
    }
}
