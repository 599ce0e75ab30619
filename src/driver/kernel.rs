//! The kernels: the embedded fat binary, its functions, one launch, and the page the host and the kernels share.

use std::ffi::{CString, c_void};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use parking_lot::Mutex;

use super::api::{call, sys};
use super::context::Context;
use super::host::HostMemory;
use super::later::let_go;
use super::stream::RawStream;
use crate::call::{Class, DataType, Factor};
use crate::error::{Error, Result};
use crate::layout::{self, Algorithm};
use crate::route::{Pass, Plan};
use crate::warning;

#[allow(
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    dead_code,
    clippy::all,
    unsafe_op_in_unsafe_fn,
    clippy::undocumented_unsafe_blocks
)]
mod abi {
    include!(concat!(env!("OUT_DIR"), "/args.rs"));
}
/// The only parameter of every kernel but one kind, as `kernels/args.h` states it.
pub use abi::TwoshotArgs as Args;
/// The parameter of that kind, the pass before a pre-multiplied sum.
pub use abi::TwoshotScaleArgs as ScaleArgs;
use abi::{TwoshotControl, TwoshotState};

/// The word that means "nothing has arrived here yet"; no publisher stores it.
pub const SENTINEL: u32 = abi::TWOSHOT_SENTINEL;

// The host's layout and the kernels' are one.
const _: () = {
    assert!(size_of::<TwoshotState>() as u64 <= layout::HEADER - layout::SPARE);
    assert!(abi::TWOSHOT_LINE_BYTES as u64 == layout::LINE);
    assert!(abi::TWOSHOT_HALF_BYTES as u64 == layout::HALF);
    assert!(abi::TWOSHOT_STAGES as u64 == layout::STAGES);
    assert!(abi::TWOSHOT_HEADER_BYTES as u64 == layout::HEADER);
    assert!(abi::TWOSHOT_MAX_BLOCKS == layout::MAX_BLOCKS);
    assert!(abi::TWOSHOT_MAX_THREADS == layout::MAX_THREADS);
    assert!(abi::TWOSHOT_SLOT_LINES as u64 == layout::LINES_ALIGN);
    assert!(abi::TWOSHOT_CHUNK_LINES as u64 == layout::CHUNK_LINES);
    assert!(abi::TWOSHOT_LINE_FLAGS as u64 == layout::LINE_FLAGS);
    assert!(abi::TWOSHOT_FLAG_BYTES as u64 == layout::FLAG);
    assert!(abi::TWOSHOT_BULK_MAX_RANKS as u64 == layout::RING_RANKS);
    assert!(abi::TWOSHOT_BULK_THREADS == layout::MAX_THREADS);
};

#[repr(align(16))]
struct Image<T: ?Sized>(T);
static IMAGE: &Image<[u8]> = &Image(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The kernels loaded on one device. Shared by the communicators of a device, and kept when they have ended: unloading
/// code may wait for what runs on the device, and the next communicator would load it again.
pub struct Module {
    context: Arc<Context>,
    raw: sys::CUmodule,
    complete: OnceLock<()>,
}

// SAFETY: module and function handles may be used from any thread.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

/// What is loaded on a device.
struct Loaded {
    module: Weak<Module>,
    /// Keeps it, where a context that is gone can be told from its successor, and that context's number.
    kept: Option<(Arc<Module>, u64)>,
}

static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

impl Module {
    /// Loads the kernels, or shares those already loaded on this device.
    pub fn load(context: &Arc<Context>) -> Result<Arc<Self>> {
        let mut loaded = LOADED.lock();
        let id = context.id();
        let ordinal = context.device().ordinal();
        for old in loaded.extract_if(.., |old| match &old.kept {
            Some((module, kept)) => module.context.device().ordinal() == ordinal && id.is_some_and(|id| id != *kept),
            None => old.module.strong_count() == 0,
        }) {
            // The device was reset: the driver has unloaded it, and counts no reference to that context any more.
            std::mem::forget(old.kept);
        }
        let shared = loaded.iter().filter_map(|one| one.module.upgrade());
        if let Some(module) = shared.into_iter().find(|module| module.context.device().ordinal() == ordinal) {
            return Ok(module);
        }
        let _entered = context.enter()?;
        let mut raw = std::ptr::null_mut();
        // SAFETY: the image is a complete fat binary, aligned, and lives as long as the program.
        unsafe { call!(context.api(), cuModuleLoadData(&mut raw, IMAGE.0.as_ptr().cast())) }?;
        let module = Arc::new(Self { context: Arc::clone(context), raw, complete: OnceLock::new() });
        loaded.push(Loaded { module: Arc::downgrade(&module), kept: id.map(|id| (Arc::clone(&module), id)) });
        Ok(module)
    }

    /// Whether code of this architecture is embedded; for others the driver compiles it.
    pub fn compiled_for(arch: u32) -> bool {
        include!(concat!(env!("OUT_DIR"), "/architectures.rs")).contains(&arch)
    }

    /// Makes the driver load every kernel, whatever the number of ranks. Cheap where that was done already.
    pub fn complete(self: &Arc<Self>, multicast: bool, switch: bool) -> Result<()> {
        if self.complete.get().is_none() {
            // Kernels of their own for 2, 4 and 8 ranks, and those for any number.
            for ranks in [2, 4, 8, u32::MAX] {
                self.kernels(ranks, false, false)?;
                if multicast {
                    // Optional: what fails here is said, and costs multicast only, where it is set up.
                    let _ = self.kernels(ranks, true, switch);
                }
            }
            let _ = self.complete.set(());
        }
        Ok(())
    }

    /// Finds the kernels one communicator can ever pick and makes the driver load their code now: a first launch
    /// that loads code may wait for the whole device while a peer's kernel spins on ours. `switch`: those whose sums the
    /// switch makes too, which need multicast.
    pub fn kernels(self: &Arc<Self>, ranks: u32, multicast: bool, switch: bool) -> Result<Kernels> {
        let api = self.context.api();
        let _entered = self.context.enter()?;
        let world = |algorithm: Algorithm, class: Class| {
            let own = match algorithm {
                Algorithm::OneShot | Algorithm::TwoShot => [2, 4, 8].contains(&ranks) && class.specialised(),
                Algorithm::Switch => false,
                Algorithm::Bulk => ranks == 2,
            };
            if own { ranks.to_string() } else { "n".to_owned() }
        };
        let made = |algorithm: Algorithm, class: Class| match algorithm {
            Algorithm::OneShot | Algorithm::TwoShot => true,
            Algorithm::Switch => switch && class.specialised(),
            Algorithm::Bulk => !multicast,
        };
        let wire = if multicast { "mc" } else { "uc" };
        let mut functions = [[std::ptr::null_mut(); CLASSES]; ALGORITHMS];
        let mut passes = [std::ptr::null_mut(); CLASSES];
        let mut resident = u32::MAX;
        let mut load = |function: &mut sys::CUfunction, name: String| -> Result<()> {
            let name = CString::new(name).map_err(|_| Error::Bug("a kernel name holds a zero byte"))?;
            // SAFETY: valid out-pointer, live module, terminated name.
            unsafe { call!(api, cuModuleGetFunction(function, self.raw, name.as_ptr())) }?;
            if let Some(load) = api.cuFuncLoad {
                // SAFETY: the function was just found in a live module.
                super::api::check("cuFuncLoad", unsafe { load(*function) })?;
            }
            let mut blocks = 0;
            let threads = layout::MAX_THREADS as i32;
            // SAFETY: as above.
            unsafe { call!(api, cuOccupancyMaxActiveBlocksPerMultiprocessor(&mut blocks, *function, threads, 0)) }?;
            resident = resident.min(u32::try_from(blocks).unwrap_or(0));
            Ok(())
        };
        for (row, algorithm) in functions.iter_mut().zip(Algorithm::ALL) {
            for (function, class) in row.iter_mut().zip(Class::ALL).filter(|(_, class)| made(algorithm, *class)) {
                let world = world(algorithm, class);
                load(function, format!("twoshot_{}_{}_{world}_{wire}", algorithm.name(), class.name()))?;
            }
        }
        for (function, class) in passes.iter_mut().zip(Class::ALL).filter(|(_, class)| class.scales()) {
            load(function, format!("twoshot_scale_{}", class.name()))?;
        }
        Ok(Kernels { module: Arc::clone(self), functions, passes, resident_per_sm: resident })
    }
}

impl Drop for Module {
    fn drop(&mut self) {
        let (context, raw) = (Arc::clone(&self.context), self.raw as usize);
        let_go(move || {
            let _entered = context.enter_to_free();
            // SAFETY: loaded once; every `Kernels` held an `Arc` to its owner, so nothing launches from it any more.
            if let Err(error) = unsafe { call!(context.api(), cuModuleUnload(raw as sys::CUmodule)) } {
                warning!(context.device().ordinal(), "{error}");
            }
        });
    }
}

const CLASSES: usize = Class::ALL.len();
const ALGORITHMS: usize = Algorithm::ALL.len();

/// The kernels of one communicator: algorithm by class, null where there is none.
pub struct Kernels {
    module: Arc<Module>,
    functions: [[sys::CUfunction; CLASSES]; ALGORITHMS],
    /// Before a pre-multiplied sum, by class; none for a class that has none.
    passes: [sys::CUfunction; CLASSES],
    resident_per_sm: u32,
}

// SAFETY: function handles may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: as above.
unsafe impl Sync for Kernels {}

impl Kernels {
    /// Largest blocks that fit one multiprocessor at once, the smallest number over the kernels.
    pub fn resident_per_sm(&self) -> u32 {
        self.resident_per_sm
    }
}

/// Whether this driver captures programmatic dependent launches into graphs (12.3 and newer).
pub fn dependent_launch() -> bool {
    let mut version = 0;
    // SAFETY: valid out-pointer.
    let asked = super::api::api().and_then(|api| unsafe { call!(api, cuDriverGetVersion(&mut version)) });
    asked.is_ok() && version >= 12030
}

/// One launch.
pub struct Launch<'a> {
    /// Where the function comes from.
    pub kernels: &'a Kernels,
    /// Kernel, grid and block.
    pub plan: Plan,
    /// Programmatic dependent launch: the kernel may become resident before its predecessor has ended, and waits there.
    pub dependent: bool,
    /// Its successor may, from now on.
    pub trigger: bool,
}

impl Launch<'_> {
    /// Queues the kernel; operation and type are the plan's. No allocation, no lock, no formatting.
    pub fn on(&self, stream: RawStream, args: &Args) -> Result<()> {
        let function = self.kernels.functions[self.plan.algorithm as usize][self.plan.class as usize];
        let args =
            Args { op: self.plan.op.0 as u32, type_: self.plan.dtype.0 as u16, trigger: self.trigger.into(), ..*args };
        let shape = (self.plan.blocks, self.plan.threads);
        // SAFETY: the kernel takes exactly one `TwoshotArgs`.
        unsafe { queue(self.kernels, function, shape, self.dependent, stream, &args) }
    }
}

/// The launch before a pre-multiplied sum: every element times the factor. The sum behind it may be a dependent launch:
/// every kernel waits for the end of its predecessor before it touches memory.
pub struct Multiply<'a> {
    /// Where the function comes from.
    pub kernels: &'a Kernels,
    /// The sum's.
    pub class: Class,
    /// Element type.
    pub dtype: DataType,
    /// By what.
    pub factor: Factor,
    /// Grid, block and the split.
    pub pass: Pass,
    /// As of a [`Launch`].
    pub dependent: bool,
    /// The same.
    pub trigger: bool,
}

impl Multiply<'_> {
    /// Queues it.
    pub fn on(&self, stream: RawStream, input: u64, output: u64, count: u64) -> Result<()> {
        let function = self.kernels.passes[self.class as usize];
        if function.is_null() {
            return Err(Error::Bug("a class that does not sum has no pass"));
        }
        let (factor, factor_address) = match self.factor {
            Factor::Value(bits) => (bits, 0),
            Factor::Device(address) => (0, address),
        };
        let head = self.pass.head;
        let type_ = self.dtype.0 as u32;
        let args = ScaleArgs {
            in_: input,
            out: output,
            count,
            head,
            factor,
            factor_address,
            type_,
            trigger: self.trigger.into(),
        };
        let shape = (self.pass.blocks, self.pass.threads);
        // SAFETY: the kernel takes exactly one `TwoshotScaleArgs`.
        unsafe { queue(self.kernels, function, shape, self.dependent, stream, &args) }
    }
}

/// Queues a kernel with its only parameter.
///
/// # Safety
/// The function is of this module and takes exactly one `T`. What the addresses in it point to is kept alive by the
/// communicator and, for the buffers and a factor, by NCCL's contract with our caller.
unsafe fn queue<T>(
    kernels: &Kernels,
    function: sys::CUfunction,
    (blocks, threads): (u32, u32),
    dependent: bool,
    stream: RawStream,
    args: &T,
) -> Result<()> {
    // SAFETY: a plain structure for which zero is a value.
    let mut attribute: sys::CUlaunchAttribute = unsafe { std::mem::zeroed() };
    attribute.id = sys::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION as i32;
    attribute.value.programmaticStreamSerializationAllowed = 1;
    let config = sys::CUlaunchConfig {
        gridDimX: blocks,
        gridDimY: 1,
        gridDimZ: 1,
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: 0,
        hStream: stream.raw(),
        attrs: &raw mut attribute,
        numAttrs: u32::from(dependent),
    };
    let mut parameters = [std::ptr::from_ref(args).cast_mut().cast::<c_void>()];
    let api = kernels.module.context.api();
    let no_extra = std::ptr::null_mut();
    // SAFETY: config, attribute and parameters outlive the call, which copies them; the rest is the caller's promise.
    unsafe { call!(api, cuLaunchKernelEx(&config, function, parameters.as_mut_ptr(), no_extra)) }
}

/// What the host tells running kernels and what they report, in host memory that the device maps.
pub struct ControlPage(HostMemory);

/// The page's fields as atomics, in the layout of `TwoshotControl`.
#[repr(C)]
pub struct Control {
    /// The host writes 1; kernels leave their loops.
    pub abort: AtomicU32,
    fault: AtomicU32,
    epoch: AtomicU32,
    kernel: AtomicU32,
    peer: AtomicU32,
    phase: AtomicU32,
    line: AtomicU64,
    count: AtomicU64,
}

const _: () = {
    assert!(size_of::<Control>() == size_of::<TwoshotControl>());
    assert!(std::mem::offset_of!(Control, fault) == std::mem::offset_of!(TwoshotControl, fault));
    assert!(std::mem::offset_of!(Control, phase) == std::mem::offset_of!(TwoshotControl, phase));
    assert!(std::mem::offset_of!(Control, line) == std::mem::offset_of!(TwoshotControl, line));
    assert!(std::mem::offset_of!(Control, count) == std::mem::offset_of!(TwoshotControl, count));
};

/// What a kernel reported before it left its loops.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Fault {
    /// 1 aborted, 2 deadline, 3 two launches of one communicator overlapped, 4 a launch failed.
    pub kind: u32,
    /// Launches of the communicator before this one.
    pub epoch: u32,
    /// 1 one-shot, 2 two-shot, 3 two-shot with the switch's sums.
    pub kernel: u32,
    /// The first peer whose data was missing.
    pub peer: u32,
    /// 1 scatter (or one-shot's only phase, or the switch's arrivals), 2 broadcast.
    pub phase: u32,
    /// The missing line inside that peer's slot.
    pub line: u64,
    /// Elements of the call.
    pub count: u64,
}

impl Fault {
    /// The kernel left because the program aborted or revoked its communicator.
    pub fn is_abort(&self) -> bool {
        self.kind == 1
    }
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let what = match self.kind {
            1 => "an abort",
            2 => "a missed deadline",
            3 => "two overlapping launches of one communicator (one communicator on two streams at once?)",
            4 => return write!(f, "a launch of {} elements that failed: the peers may have made it", self.count),
            _ => "an unknown fault",
        };
        let kernel = match self.kernel {
            1 => "one-shot",
            3 => "two-shot in the switch",
            4 => "bulk",
            _ => "two-shot",
        };
        let stage = if self.phase == 2 { "broadcast" } else { "scatter" };
        write!(
            f,
            "{what}: epoch {}, {kernel}, {} elements; first missing: rank {}, {stage} stage, line {}",
            self.epoch, self.count, self.peer, self.line
        )
    }
}

impl ControlPage {
    /// Allocates a zeroed page.
    pub fn new(context: &Arc<Context>) -> Result<Self> {
        HostMemory::new(context, 4096).map(Self)
    }

    /// The page as the device sees it.
    pub fn device_address(&self) -> u64 {
        self.0.device_address()
    }

    /// The page as the host sees it.
    pub fn control(&self) -> &Control {
        // SAFETY: page-aligned, large enough, lives as long as `self`, and all fields are atomics.
        unsafe { &*self.0.pointer().cast::<Control>() }
    }

    /// Reports a launch of `count` elements that failed, unless a fault is there already.
    pub fn refused(&self, count: u64) {
        let control = self.control();
        if control.fault.load(Ordering::Acquire) == 0 {
            control.count.store(count, Ordering::Relaxed);
            let _ = control.fault.compare_exchange(0, 4, Ordering::Release, Ordering::Relaxed);
        }
    }

    /// The fault a kernel reported, if one did. One relaxed load in the good case.
    pub fn fault(&self) -> Option<Fault> {
        let control = self.control();
        let kind = control.fault.load(Ordering::Acquire);
        (kind != 0).then(|| Fault {
            kind,
            epoch: control.epoch.load(Ordering::Relaxed),
            kernel: control.kernel.load(Ordering::Relaxed),
            peer: control.peer.load(Ordering::Relaxed),
            phase: control.phase.load(Ordering::Relaxed),
            line: control.line.load(Ordering::Relaxed),
            count: control.count.load(Ordering::Relaxed),
        })
    }
}
