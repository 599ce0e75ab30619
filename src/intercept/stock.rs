//! Finding the stock NCCL: the library that the program would call if twoshot were not there.
//!
//! There is one per process. The first rule that applies decides:
//! 1. the path that the user gave (`TWOSHOT_NCCL_LIBRARY`);
//! 2. the NCCL that loaded us as its plugin;
//! 3. the library that comes after us in the program's search order (we were preloaded);
//! 4. the first loaded library that defines `ncclAllReduce` and is not us;
//! 5. `libnccl.so.2` opened by name; when that name leads back to us, the next such file on the search path.
//!
//! No lock is held meanwhile: the dynamic linker's own lock is taken inside, and a library's constructor may call NCCL.
//! Threads that search at the same time find the same library; one result is published.

use super::functions::Functions;
use super::objects::{self, Next, Object};
use super::relocate;
use std::ffi::{CStr, CString, OsStr, c_int, c_void};
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicPtr, Ordering};

/// The function by which an NCCL is recognised.
const MARK: &CStr = c"ncclAllReduce";
/// The name NCCL is linked and opened by.
const NAME: &str = "libnccl.so.2";

/// Why there is no stock library.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StockError {
    /// The dynamic linker could not open a library.
    #[error("cannot open {}: {message}", path.display())]
    Open {
        /// The library.
        path: PathBuf,
        /// The dynamic linker's words.
        message: String,
    },
    /// A library lacks a function that NCCL has had since 2.20.
    #[error("{} is not a usable NCCL: it has no {function}", path.display())]
    Lacks {
        /// The library.
        path: PathBuf,
        /// The function.
        function: String,
    },
    /// The path leads to twoshot itself.
    #[error("{} is twoshot itself; set TWOSHOT_NCCL_LIBRARY to the path of NVIDIA's libnccl.so.2", path.display())]
    Ourselves {
        /// The path.
        path: PathBuf,
    },
    /// NCCL is linked into the program, so there is nothing to bind to.
    #[error("NCCL is linked statically into {}; its calls cannot be rerouted", path.display())]
    Static {
        /// The object that contains NCCL.
        path: PathBuf,
    },
    /// No rule found one.
    #[error("no NCCL found ({message}); set TWOSHOT_NCCL_LIBRARY to the path of NVIDIA's libnccl.so.2")]
    NotFound {
        /// The dynamic linker's words about the last attempt.
        message: String,
    },
}

/// The stock NCCL of this process. It is never closed.
pub struct Stock {
    /// The file it was loaded from.
    pub path: PathBuf,
    /// What its `ncclGetVersion` says, e.g. 22809.
    pub version: c_int,
    /// Its functions.
    pub nccl: Functions,
    library: Library,
}

impl Stock {
    /// The address of one of its functions.
    pub fn symbol(&self, name: &CStr) -> Option<*const c_void> {
        self.library.symbol(name)
    }

    /// Whether an address lies in it.
    pub fn contains(&self, address: *const c_void) -> bool {
        self.library.contains(address as u64)
    }

    pub(super) fn library(&self) -> &Library {
        &self.library
    }
}

static STOCK: AtomicPtr<Stock> = AtomicPtr::new(std::ptr::null_mut());
static EXPLICIT: OnceLock<Option<PathBuf>> = OnceLock::new();
static CALLER: OnceLock<Object> = OnceLock::new();

/// Names the stock library. Has an effect before it is found for the first time, and once.
pub fn set_explicit_path(path: PathBuf) {
    let _ = EXPLICIT.set(Some(path));
}

/// The path that was set, else the environment's: the program's first call may be one that is only passed on, before
/// anybody has read the configuration.
fn explicit_path() -> Option<&'static Path> {
    EXPLICIT.get_or_init(crate::config::nccl_library).as_deref()
}

/// Remembers which NCCL loaded us, from the address of a function that it handed over. The first one counts.
pub fn learn_caller(address_in_libnccl: *const c_void) {
    let Some(object) = objects::owner(address_in_libnccl) else {
        return;
    };
    if objects::ourselves().as_ref() != Some(&object) {
        let _ = CALLER.set(object);
    }
}

/// The stock NCCL. A failed search is repeated at the next call, since the library may be loaded later.
pub fn stock() -> Result<&'static Stock, StockError> {
    // SAFETY: the pointer is null or comes from `Box::leak` below.
    if let Some(stock) = unsafe { STOCK.load(Ordering::Acquire).as_ref() } {
        return Ok(stock);
    }
    let library = find()?;
    relocate::isolate(&library);
    let path = library.path();
    let functions = Functions::load(|name| library.symbol(name)).map_err(|function| StockError::Lacks {
        path: path.clone(),
        function: function.to_string_lossy().into_owned(),
    })?;
    let mut version = 0;
    // SAFETY: the stock library writes one int.
    unsafe { (functions.get_version)(&raw mut version) };
    let fresh = Box::leak(Box::new(Stock { path, version, nccl: functions, library }));
    let none = std::ptr::null_mut();
    match STOCK.compare_exchange(none, fresh, Ordering::AcqRel, Ordering::Acquire) {
        Ok(_) => Ok(fresh),
        // SAFETY: not null, and made by another thread in the same way.
        Err(first) => Ok(unsafe { &*first }),
    }
}

fn find() -> Result<Library, StockError> {
    let us = objects::ourselves();
    let is_us = |library: &Library| us.as_ref() == Some(&library.object);
    if let Some(path) = explicit_path() {
        let library = Library::open(path)?;
        return match is_us(&library) {
            true => Err(StockError::Ourselves { path: path.to_owned() }),
            false => Ok(library),
        };
    }
    if let Some(caller) = CALLER.get() {
        // Any other NCCL would be a second one beside the program's own.
        return Library::loaded(caller).ok_or_else(|| StockError::Static { path: caller.path() });
    }
    // SAFETY: a lookup by a C string. The call is made from this object's code, which is what "next" refers to.
    let next = unsafe { libc::dlsym(libc::RTLD_NEXT, MARK.as_ptr()) };
    if !next.is_null()
        && let Some(library) = objects::owner(next).and_then(|object| Library::loaded(&object))
        && !is_us(&library)
    {
        return Ok(library);
    }
    if let Some(library) = Library::all_loaded().into_iter().find(|found| !is_us(found)) {
        return Ok(library);
    }
    let mut message = match Library::open(Path::new(NAME)) {
        Ok(library) if !is_us(&library) => return Ok(library),
        Ok(_) => format!("{NAME} leads to twoshot itself"),
        Err(error) => error.to_string(),
    };
    for path in search_path() {
        match Library::open(&path) {
            Ok(library) if !is_us(&library) => return Ok(library),
            Ok(_) => {}
            Err(error) => message = error.to_string(),
        }
    }
    Err(StockError::NotFound { message })
}

/// Files with NCCL's name where the dynamic linker looks.
fn search_path() -> Vec<PathBuf> {
    let variable = crate::config::library_path();
    let separators = |byte: &u8| matches!(byte, b':' | b';');
    let named = variable.as_bytes().split(separators);
    let multiarch = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let standard =
        [multiarch.as_str(), "/lib64", "/usr/lib64", "/usr/local/lib", "/usr/local/cuda/lib64", "/lib", "/usr/lib"];
    named
        .filter(|folder| !folder.is_empty())
        .chain(standard.map(str::as_bytes))
        .map(|folder| Path::new(OsStr::from_bytes(folder)).join(NAME))
        .filter(|path| path.exists())
        .collect()
}

/// One use of a loaded library, which keeps it loaded.
struct Handle(*mut c_void);

// SAFETY: the handle is a number to the dynamic linker, whose functions may be called from any thread.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: opened once, closed once.
        unsafe { libc::dlclose(self.0) };
    }
}

impl Handle {
    /// Null stands for the program and its libraries.
    fn open(name: Option<&CStr>, flags: c_int) -> Option<Self> {
        let name = name.map_or(std::ptr::null(), CStr::as_ptr);
        // SAFETY: opening a library that is not loaded yet runs its constructors; this is done only for files that are
        // NCCL by the user's word or by name.
        let handle = unsafe { libc::dlopen(name, flags) };
        (!handle.is_null()).then(|| Self(handle))
    }

    /// One more use of an object that is loaded already.
    fn loaded(object: &Object) -> Option<Self> {
        let name = (!object.name.is_empty()).then_some(object.name.as_c_str());
        Self::open(name, libc::RTLD_LAZY | libc::RTLD_NOLOAD)
    }

    /// A function of the library or of those that it was linked with.
    fn symbol(&self, name: &CStr) -> Option<*const c_void> {
        // SAFETY: the handle is open.
        let address = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        (!address.is_null()).then_some(address.cast_const())
    }
}

/// What the dynamic linker finds from a loaded object downwards.
pub(super) fn symbol_from(object: &Object, name: &CStr) -> Option<*const c_void> {
    Handle::loaded(object)?.symbol(name)
}

/// A loaded library that has NCCL in it.
pub(super) struct Library {
    handle: Handle,
    /// Which entry of the dynamic linker's list it is.
    pub(super) object: Object,
    extent: Vec<Range<u64>>,
}

impl Library {
    /// Opens a file. Its constructors run.
    fn open(path: &Path) -> Result<Self, StockError> {
        let failed = |message| StockError::Open { path: path.to_owned(), message };
        let name = CString::new(path.as_os_str().as_bytes()).map_err(|error| failed(error.to_string()))?;
        let handle =
            Handle::open(Some(&name), libc::RTLD_NOW | libc::RTLD_LOCAL).ok_or_else(|| failed(last_error()))?;
        Self::with_handle(handle)
            .ok_or_else(|| StockError::Lacks { path: path.to_owned(), function: MARK.to_string_lossy().into_owned() })
    }

    /// A library that is loaded already, if it has NCCL in it.
    fn loaded(object: &Object) -> Option<Self> {
        Self::with_handle(Handle::loaded(object)?).filter(|library| library.object == *object)
    }

    /// All loaded libraries that have NCCL in them, in the order in which they were loaded.
    pub(super) fn all_loaded() -> Vec<Self> {
        objects::all().iter().filter(|object| !object.name.is_empty()).filter_map(Self::loaded).collect()
    }

    /// The library in which a handle's NCCL is: the opened one, or one that it was linked with.
    fn with_handle(handle: Handle) -> Option<Self> {
        let mark = handle.symbol(MARK)?;
        let mut found = None;
        objects::each(|object| {
            if !object.contains(mark as u64) {
                return Next::Go;
            }
            found = Some((Object::of(object), object.extent()));
            Next::Stop
        });
        let (object, extent) = found?;
        Some(Self { handle, object, extent })
    }

    /// The address of a function.
    pub(super) fn symbol(&self, name: &CStr) -> Option<*const c_void> {
        self.handle.symbol(name)
    }

    pub(super) fn contains(&self, address: u64) -> bool {
        self.extent.iter().any(|range| range.contains(&address))
    }

    /// The file, without links.
    fn path(&self) -> PathBuf {
        let path = self.object.path();
        std::fs::canonicalize(&path).unwrap_or(path)
    }
}

fn last_error() -> String {
    // SAFETY: null or a C string of this thread, valid until its next call into the dynamic linker.
    let text = unsafe { libc::dlerror() };
    if text.is_null() {
        return "no reason given".to_owned();
    }
    // SAFETY: not null, see above.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}
