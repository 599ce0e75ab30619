//! The rules of kernels/ring.cuh: what a flag speaks of is complete, and what is loaded has been spoken of. The opcodes'
//! types tell flags from the header (`.b64`) and what is done from what is ready (`.b32`): kernels/ptx.cuh.

use crate::parse::{Instruction, Kernel};
use crate::rules::{Rule, on_every_path, origins_of_address};
use crate::taint::{OUT, Taint, WINDOWS};

const ACQUIRE_FLAG: &str = "ld.acquire.sys.global.u64";
const STORE_FLAG: &str = "st.relaxed.sys.global.b64";
const ACQUIRE_WORD: &str = "ld.acquire.cta.shared.u32";
const RELEASE_READY: &str = "st.release.cta.shared.u32";
const RELEASE_DONE: &str = "st.release.cta.shared.b32";
const RESET_WORD: &str = "st.relaxed.cta.shared.u32";
const WARP_BARRIER: &str = "bar.warp.sync";

/// Whether a kernel goes through the ring.
pub fn bulk(kernel: &Kernel) -> bool {
    kernel.name.starts_with("twoshot_bulk_")
}

/// Whether shared memory may be accessed like this.
pub fn word(kernel: &Kernel, opcode: &str) -> bool {
    bulk(kernel) && [ACQUIRE_WORD, RELEASE_READY, RELEASE_DONE, RESET_WORD].contains(&opcode)
}

/// Whether a window may be, besides by what all kernels do.
pub fn window(kernel: &Kernel, opcode: &str) -> bool {
    bulk(kernel) && opcode == ACQUIRE_FLAG
}

pub fn ring(kernel: &Kernel, taint: &Taint, report: &mut dyn FnMut(Rule, usize, &str)) {
    let own = [ACQUIRE_FLAG, STORE_FLAG, ACQUIRE_WORD, RELEASE_READY, RELEASE_DONE, WARP_BARRIER];
    let found = |opcode: &str| kernel.instructions.iter().find(|one| one.opcode == opcode);
    if !bulk(kernel) {
        for instruction in own.iter().filter_map(|opcode| found(opcode)) {
            report(Rule::Ring, instruction.line, "what only kernels with a ring do");
        }
        return;
    }
    for opcode in own.iter().filter(|opcode| found(opcode).is_none()) {
        report(Rule::Ring, 0, &format!("no {opcode}"));
    }
    let of = |instruction: &Instruction, base: &str, origin| {
        instruction.base() == base && origins_of_address(instruction, taint) == Some(origin)
    };
    let line = |instruction: &Instruction, base: &str| {
        instruction.opcode == format!("{base}.relaxed.sys.global.v4.b32") && of(instruction, base, WINDOWS)
    };
    // 0 nothing, 1 acquired what the workers have done, 2 and fenced; no flag goes on an older fence.
    let signalled = on_every_path(kernel, |reached, instruction| match instruction.opcode.as_str() {
        ACQUIRE_WORD => Ok(1),
        "fence.acq_rel.sys" if reached >= 1 => Ok(2),
        STORE_FLAG if reached < 2 => Err("a flag without a fence behind what it speaks of"),
        _ => Ok(reached),
    });
    // 0 nothing of the next tile, 1 acquired that it is there.
    let loaded = on_every_path(kernel, |reached, instruction| match instruction.opcode.as_str() {
        ACQUIRE_WORD => Ok(1),
        RELEASE_DONE => Ok(0),
        _ if line(instruction, "ld") && reached < 1 => Err("a line is loaded that nobody said was there"),
        _ => Ok(reached),
    });
    // 0 lanes are at different places of a tile, 1 all are done with it.
    let done = on_every_path(kernel, |reached, instruction| match instruction.opcode.as_str() {
        WARP_BARRIER => Ok(1),
        RELEASE_DONE if reached < 1 => Err("a tile is called done without a barrier of the warp"),
        _ if line(instruction, "st") || line(instruction, "ld") || of(instruction, "st", OUT) => Ok(0),
        _ => Ok(reached),
    });
    // 1 a flag was acquired.
    let ready = on_every_path(kernel, |reached, instruction| match instruction.opcode.as_str() {
        ACQUIRE_FLAG => Ok(1),
        RELEASE_READY if reached < 1 => Err("a chunk is called ready without its flag"),
        _ => Ok(reached),
    });
    for (line, text) in signalled.into_iter().chain(loaded).chain(done).chain(ready) {
        report(Rule::Ring, line, text);
    }
}
