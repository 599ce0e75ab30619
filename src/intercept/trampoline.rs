//! Exported functions that jump to the stock library's function of the same name.
//!
//! A jump leaves every register and the stack as the caller set them, so one piece of code fits any signature: arguments
//! in registers, by value on the stack, variadic, results in memory. Each function has a slot that holds the address to
//! jump to. The first call finds it empty and takes the way through `resolve`, which keeps all argument registers.
//!
//! A function that the stock library lacks answers ncclInvalidUsage, and one that returns text answers text. (Other
//! functions whose result is not an `ncclResult_t` belong to the device API, whose callers check the version first.)

use super::pass::{COUNT, NAMES};
use super::stock::stock;
use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::atomic::{AtomicPtr, Ordering};

/// Addresses to jump to; null until the first call.
pub(super) static SLOTS: [AtomicPtr<c_void>; COUNT] = [const { AtomicPtr::new(std::ptr::null_mut()) }; COUNT];

/// `ncclInvalidUsage`.
const INVALID_USAGE: c_int = 5;

static LOG: AtomicPtr<c_void> = AtomicPtr::new(std::ptr::null_mut());

/// Takes the lines about functions that cannot be passed on; without it they go to standard error.
pub fn set_log(line: fn(&str)) {
    LOG.store(line as *mut c_void, Ordering::Release);
}

fn log(line: &str) {
    let function = LOG.load(Ordering::Acquire);
    if function.is_null() {
        eprintln!("twoshot: {line}");
        return;
    }
    // SAFETY: only `set_log` writes here, and it writes a function of this type.
    let function = unsafe { std::mem::transmute::<*mut c_void, fn(&str)>(function) };
    function(line);
}

/// What a function that cannot be passed on does.
extern "C" fn absent() -> c_int {
    INVALID_USAGE
}

/// What one that returns text does: a program prints it unseen, most of all when everything fails.
extern "C" fn absent_text() -> *const c_char {
    c"twoshot: there is no stock NCCL to ask".as_ptr()
}

/// Whether a function returns text, not a code.
fn returns_text(name: &CStr) -> bool {
    let texts = [&b"ncclGetErrorString"[..], b"ncclGetLastError"];
    let bytes = name.to_bytes();
    let plain = bytes.strip_prefix(b"p").unwrap_or(bytes);
    texts.contains(&plain)
}

fn substitute(name: &CStr) -> *const c_void {
    if returns_text(name) { absent_text as *const c_void } else { absent as *const c_void }
}

/// Finds the address for a slot. Called by `resolve` with the caller's argument registers saved.
extern "C" fn address_of(index: usize) -> *const c_void {
    let found = std::panic::catch_unwind(|| {
        let name = NAMES[index];
        match stock() {
            Ok(stock) => {
                let address = own_or_plain(name, |name| stock.symbol(name)).unwrap_or_else(|| {
                    log(&format!(
                        "{} of NCCL {} has no {}: the call fails with ncclInvalidUsage",
                        stock.path.display(),
                        stock.version,
                        name.to_string_lossy()
                    ));
                    substitute(name)
                });
                SLOTS[index].store(address.cast_mut(), Ordering::Release);
                address
            }
            // Not remembered: the library may be loaded later.
            Err(error) => {
                // A question about an error that has been told is none.
                if !returns_text(name) {
                    log(&format!("{} fails: {error}", name.to_string_lossy()));
                }
                substitute(name)
            }
        }
    });
    found.unwrap_or_else(|_| substitute(NAMES[index]))
}

/// The function itself; for a name with a p before it that the library lacks, the plain one.
fn own_or_plain(name: &'static CStr, find: impl Fn(&CStr) -> Option<*const c_void>) -> Option<*const c_void> {
    find(name).or_else(|| {
        let bytes = name.to_bytes_with_nul();
        let plain = bytes.strip_prefix(b"p")?;
        find(CStr::from_bytes_with_nul(plain).ok()?)
    })
}

/// Keeps the argument registers, asks `address_of` for the slot whose index the jump left in a scratch register, goes on
/// to that address. Vector registers are kept as far as the C ABI passes arguments in them by default (128 bits); no
/// NCCL function takes wider ones.
#[cfg(target_arch = "x86_64")]
#[unsafe(naked)]
pub(super) unsafe extern "C" fn resolve() {
    // rax counts a variadic call's vector registers; r10 is a closure's environment. The stack is 8 off alignment on
    // entry, as in any function.
    std::arch::naked_asm!(
        "push rbp",
        "mov rbp, rsp",
        "sub rsp, 192",
        "mov [rsp], rdi",
        "mov [rsp + 8], rsi",
        "mov [rsp + 16], rdx",
        "mov [rsp + 24], rcx",
        "mov [rsp + 32], r8",
        "mov [rsp + 40], r9",
        "mov [rsp + 48], rax",
        "mov [rsp + 56], r10",
        "movups [rsp + 64], xmm0",
        "movups [rsp + 80], xmm1",
        "movups [rsp + 96], xmm2",
        "movups [rsp + 112], xmm3",
        "movups [rsp + 128], xmm4",
        "movups [rsp + 144], xmm5",
        "movups [rsp + 160], xmm6",
        "movups [rsp + 176], xmm7",
        "mov rdi, r11",
        "call {address_of}",
        "mov r11, rax",
        "mov rdi, [rsp]",
        "mov rsi, [rsp + 8]",
        "mov rdx, [rsp + 16]",
        "mov rcx, [rsp + 24]",
        "mov r8, [rsp + 32]",
        "mov r9, [rsp + 40]",
        "mov rax, [rsp + 48]",
        "mov r10, [rsp + 56]",
        "movups xmm0, [rsp + 64]",
        "movups xmm1, [rsp + 80]",
        "movups xmm2, [rsp + 96]",
        "movups xmm3, [rsp + 112]",
        "movups xmm4, [rsp + 128]",
        "movups xmm5, [rsp + 144]",
        "movups xmm6, [rsp + 160]",
        "movups xmm7, [rsp + 176]",
        "mov rsp, rbp",
        "pop rbp",
        "jmp r11",
        address_of = sym address_of,
    )
}

/// See the other architecture's. x8 is where a result in memory goes.
#[cfg(target_arch = "aarch64")]
#[unsafe(naked)]
pub(super) unsafe extern "C" fn resolve() {
    std::arch::naked_asm!(
        "stp x29, x30, [sp, #-224]!",
        "mov x29, sp",
        "stp x0, x1, [sp, #16]",
        "stp x2, x3, [sp, #32]",
        "stp x4, x5, [sp, #48]",
        "stp x6, x7, [sp, #64]",
        "str x8, [sp, #80]",
        "stp q0, q1, [sp, #96]",
        "stp q2, q3, [sp, #128]",
        "stp q4, q5, [sp, #160]",
        "stp q6, q7, [sp, #192]",
        "mov x0, x17",
        "bl {address_of}",
        "mov x16, x0",
        "ldp x0, x1, [sp, #16]",
        "ldp x2, x3, [sp, #32]",
        "ldp x4, x5, [sp, #48]",
        "ldp x6, x7, [sp, #64]",
        "ldr x8, [sp, #80]",
        "ldp q0, q1, [sp, #96]",
        "ldp q2, q3, [sp, #128]",
        "ldp q4, q5, [sp, #160]",
        "ldp q6, q7, [sp, #192]",
        "ldp x29, x30, [sp], #224",
        "br x16",
        address_of = sym address_of,
    )
}

/// The body of one jump.
#[cfg(target_arch = "x86_64")]
macro_rules! jump {
    ($index:literal) => {
        std::arch::naked_asm!(
            "mov r11, qword ptr [rip + {slots} + {offset}]",
            "test r11, r11",
            "jz 2f",
            "jmp r11",
            "2:",
            "mov r11d, {index}",
            "jmp {resolve}",
            slots = sym $crate::intercept::trampoline::SLOTS,
            offset = const $index * 8,
            index = const $index,
            resolve = sym $crate::intercept::trampoline::resolve,
        )
    };
}

/// The body of one jump. x16 and x17 are the registers that the ABI leaves to such stubs.
#[cfg(target_arch = "aarch64")]
macro_rules! jump {
    ($index:literal) => {
        std::arch::naked_asm!(
            "adrp x16, {slots} + {offset}",
            "ldr x16, [x16, :lo12:{slots} + {offset}]",
            "cbz x16, 2f",
            "br x16",
            "2:",
            "mov w17, {index}",
            "b {resolve}",
            slots = sym $crate::intercept::trampoline::SLOTS,
            offset = const $index * 8,
            index = const $index,
            resolve = sym $crate::intercept::trampoline::resolve,
        )
    };
}
pub(super) use jump;

/// Defines the exported jumps and the table of their names.
macro_rules! pass {
    (COUNT = $count:literal; $($index:literal $name:ident;)*) => {
        /// How many jumps there are.
        pub(super) const COUNT: usize = $count;

        /// Their names, by index.
        pub(super) static NAMES: [&std::ffi::CStr; COUNT] = [
            $(
                match std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!("a name without its end"),
                },
            )*
        ];

        $(
            #[doc = concat!("Jumps to the stock library's `", stringify!($name), "`.")]
            ///
            /// # Safety
            /// What NCCL's function of this name asks for.
            #[unsafe(no_mangle)]
            #[unsafe(naked)]
            #[allow(non_snake_case)]
            pub unsafe extern "C" fn $name() {
                $crate::intercept::trampoline::jump!($index)
            }
        )*
    };
}
pub(super) use pass;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profiling_name_falls_back_to_the_plain_one() {
        let plain = |name: &CStr| (name == c"ncclSend").then_some(8 as *const c_void);
        assert_eq!(own_or_plain(c"pncclSend", plain), Some(8 as *const c_void));
        assert_eq!(own_or_plain(c"ncclSend", plain), Some(8 as *const c_void));
        assert_eq!(own_or_plain(c"pncclRecv", plain), None);
        assert_eq!(own_or_plain(c"ncclRecv", plain), None);
    }
}
