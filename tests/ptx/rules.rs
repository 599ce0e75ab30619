//! What the kernels' PTX must and must not contain. Each rule is one function; a finding names kernel, line and rule.

use std::collections::HashMap;

use crate::parse::{Instruction, Kernel, kernels};
use crate::ring::{self, ring};
use crate::taint::{CONTROL, FACTOR, IN, MULTICAST, OUT, Origins, Taint, WINDOWS, scales};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Rule {
    /// The analysis must be able to follow every parameter.
    Followed,
    /// multimem instructions take multicast addresses, nothing else does; `_uc` kernels have neither.
    Multicast,
    /// What the switch adds up has arrived: stored, announced behind a barrier by a release, acquired, and only then loaded
    /// through the multicast address; in f32, and in no other kernel.
    Arrival,
    /// What goes through a ring: `ring.rs`.
    Ring,
    /// An atomic that others wait for must release. The two that nobody waits for are named by their marks.
    Atomics,
    /// No float compare (a NaN sentinel would never match), no flush of subnormals, no fused or inexact arithmetic.
    Arithmetic,
    /// Windows and control: relaxed at system scope. Payload: ordinary loads of `in`, ordinary stores to `out`.
    Accesses,
    /// The next launch may start at once; nothing is touched before the previous one has ended.
    Boundary,
    /// No stack, no spills.
    Resources,
}

#[derive(Debug)]
pub struct Finding {
    pub rule: Rule,
    pub text: String,
}

/// Everything that is wrong with a PTX file.
pub fn lint(ptx: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    for kernel in kernels(ptx) {
        let mut report = |rule, line, text: &str| {
            findings.push(Finding { rule, text: format!("{} line {line}: {text}", kernel.name) });
        };
        let taint = match Taint::of(&kernel) {
            Ok(taint) => taint,
            Err(text) => {
                report(Rule::Followed, 0, &text);
                continue;
            }
        };
        for instruction in &kernel.instructions {
            let mut report = |rule, text: &str| report(rule, instruction.line, text);
            multicast(&kernel, instruction, &taint, &mut report);
            atomics(instruction, &taint, &mut report);
            arithmetic(&kernel, instruction, &mut report);
            accesses(&kernel, instruction, &taint, &mut report);
        }
        boundary(&kernel, &mut report);
        arrival(&kernel, &taint, &mut report);
        ring(&kernel, &taint, &mut report);
    }
    findings
}

/// Everything that is wrong with a log of `ptxas -v`, which must speak of so many kernels.
pub fn lint_resources(log: &str, expected: usize) -> Vec<Finding> {
    let clean = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
    let lines: Vec<&str> = log.lines().filter(|line| line.contains("bytes stack frame")).collect();
    let mut findings: Vec<_> = lines
        .iter()
        .filter(|line| line.trim() != clean)
        .map(|line| Finding { rule: Rule::Resources, text: line.trim().into() })
        .collect();
    if lines.len() != expected {
        let text = format!("{} kernels in the log, {expected} expected", lines.len());
        findings.push(Finding { rule: Rule::Resources, text });
    }
    findings
}

pub fn origins_of_address(instruction: &Instruction, taint: &Taint) -> Option<Origins> {
    let memory = ["ld", "st", "atom", "red", "multimem", "prefetch", "cp"].contains(&instruction.base());
    (memory && !instruction.has("param")).then(|| instruction.address().map_or(0, |address| taint.operand(address)))
}

fn multicast(kernel: &Kernel, instruction: &Instruction, taint: &Taint, report: &mut dyn FnMut(Rule, &str)) {
    let multimem = instruction.base() == "multimem";
    if kernel.name.ends_with("_uc") {
        let touched = instruction.operands.iter().any(|operand| taint.operand(operand) & MULTICAST != 0);
        if multimem || touched {
            report(Rule::Multicast, "a unicast kernel touches multicast");
        }
        return;
    }
    let Some(origins) = origins_of_address(instruction, taint) else { return };
    if multimem && origins != MULTICAST {
        report(Rule::Multicast, "multimem on an address that is not the multicast window's");
    }
    if !multimem && origins & MULTICAST != 0 {
        report(Rule::Multicast, "an ordinary access to the multicast window");
    }
    let data = instruction.operands.iter().filter(|operand| !operand.starts_with('['));
    if instruction.base() == "st" && data.fold(0, |all, operand| all | taint.operand(operand)) & MULTICAST != 0 {
        report(Rule::Multicast, "the multicast address is stored where the lint cannot follow it");
    }
}

fn atomics(instruction: &Instruction, taint: &Taint, report: &mut dyn FnMut(Rule, &str)) {
    if !["atom", "red"].contains(&instruction.base()) {
        return;
    }
    let named = match instruction.mark.as_deref() {
        Some("overlap ticket") => instruction.opcode == "atom.relaxed.gpu.global.exch.b32",
        Some("fault claim") => instruction.opcode == "atom.relaxed.gpu.global.cas.b32",
        _ => false,
    };
    if !named && !instruction.has("release") && !instruction.has("acq_rel") {
        report(Rule::Atomics, "an atomic that may be an arrival, without release");
    }
    if origins_of_address(instruction, taint) != Some(WINDOWS) {
        report(Rule::Atomics, "an atomic outside the own window's header");
    }
}

/// Float instructions of the kernels whose operation is a value of the launch, besides the sums' own.
const RUNTIME: [&str; 14] = [
    "mul.rn.f32",
    "div.rn.f32",
    "max.f32",
    "min.f32",
    "add.rn.f64",
    "mul.rn.f64",
    "div.rn.f64",
    "max.f64",
    "min.f64",
    "cvt.rn.f16x2.e4m3x2",
    "cvt.rn.satfinite.e4m3x2.f32",
    "cvt.rn.satfinite.e5m2x2.f32",
    // The number of ranks.
    "cvt.rn.f32.u32",
    "cvt.rn.f64.u32",
];

/// Whether a kernel only sums: its class is f32, f16 or bf16.
fn only_sums(kernel: &Kernel) -> bool {
    !matches!(kernel.name.split('_').nth(2), Some("f32op" | "f16op" | "bf16op" | "i8" | "i32" | "i64" | "f64" | "fp8"))
}

/// Float instructions of a kernel that multiplies by a factor.
fn products(kernel: &Kernel) -> &'static [&'static str] {
    match kernel.name.rsplit('_').next() {
        Some("f32") => &["mul.rn.f32"],
        Some("f16") => &["mul.rn.f16x2"],
        Some("bf16") => &["mul.rn.bf16x2"],
        Some("f64") => &["mul.rn.f64"],
        Some("fp8") => &[
            "mul.rn.f32",
            "cvt.f32.f16",
            "cvt.rn.f16x2.e4m3x2",
            "cvt.rn.satfinite.e4m3x2.f32",
            "cvt.rn.satfinite.e5m2x2.f32",
        ],
        _ => &[],
    }
}

fn arithmetic(kernel: &Kernel, instruction: &Instruction, report: &mut dyn FnMut(Rule, &str)) {
    if scales(kernel) {
        let float = ["f16", "f16x2", "bf16", "bf16x2", "f32", "f64", "e4m3x2", "e5m2x2"]
            .iter()
            .any(|kind| instruction.has(kind));
        let plain = matches!(instruction.base(), "mov" | "ld" | "st" | "selp");
        if (float && !plain && !products(kernel).contains(&instruction.opcode.as_str())) || instruction.has("ftz") {
            report(Rule::Arithmetic, "float arithmetic other than this type's product");
        }
        return;
    }
    if !only_sums(kernel) && RUNTIME.contains(&instruction.opcode.as_str()) {
        return;
    }
    let float = ["f16", "f16x2", "bf16", "bf16x2", "f32", "f64"].iter().any(|kind| instruction.has(kind));
    match instruction.base() {
        "setp" | "set" | "testp" | "slct" | "min" | "max" if float => report(Rule::Arithmetic, "a float compare"),
        "testp" => report(Rule::Arithmetic, "a float compare"),
        "mov" | "ld" | "st" | "multimem" | "selp" => {}
        "add" if float && instruction.opcode != "add.rn.f32" => {
            report(Rule::Arithmetic, "a sum that is not add.rn.f32")
        }
        "add" => {}
        "cvt" if float => {
            let exact = instruction.opcode == "cvt.f32.f16";
            let rounded = ["cvt.rn.f16x2.f32", "cvt.rn.bf16x2.f32"].contains(&instruction.opcode.as_str());
            if !exact && !rounded {
                report(Rule::Arithmetic, "a conversion that the contract does not know");
            }
        }
        _ if float => report(Rule::Arithmetic, "float arithmetic other than a sum"),
        _ => {}
    }
    if instruction.has("ftz") {
        report(Rule::Arithmetic, "subnormals are flushed");
    }
}

fn accesses(kernel: &Kernel, instruction: &Instruction, taint: &Taint, report: &mut dyn FnMut(Rule, &str)) {
    let Some(origins) = origins_of_address(instruction, taint) else { return };
    let opcode = instruction.opcode.as_str();
    if instruction.has("shared") {
        if !ring::word(kernel, opcode) {
            report(Rule::Accesses, &format!("{opcode} to shared memory"));
        }
        return;
    }
    let strong = |base: &str| opcode.starts_with(&format!("{base}.relaxed.sys.global."));
    let ordinary = |base: &str| {
        [".u8", ".b16", ".b32", ".v2.b32", ".v4.b32"].iter().any(|width| opcode == format!("{base}.global{width}"))
    };
    let allowed = match origins {
        WINDOWS => {
            let known = strong("ld") || strong("st") || instruction.base() == "atom";
            known || opcode == "st.release.sys.global.u32" || ring::window(kernel, opcode)
        }
        CONTROL => strong("ld") || strong("st"),
        IN | FACTOR => ordinary("ld"),
        OUT => ordinary("st"),
        MULTICAST => instruction.base() == "multimem",
        _ => false,
    };
    if !allowed {
        report(Rule::Accesses, &format!("{opcode} to an address from {}", names(origins)));
    }
}

fn boundary(kernel: &Kernel, report: &mut dyn FnMut(Rule, usize, &str)) {
    let memory = |instruction: &Instruction| {
        ["ld", "st", "atom", "red", "multimem"].contains(&instruction.base()) && !instruction.has("param")
    };
    // A kernel that triggers whatever the host says lets a kernel of the program's in that does not wait.
    let trigger = "griddepcontrol.launch_dependents";
    for instruction in kernel.instructions.iter().filter(|found| found.opcode == trigger && !found.predicated) {
        report(Rule::Boundary, instruction.line, "launch_dependents must be the host's choice");
    }
    if !kernel.instructions.iter().any(|found| found.opcode == trigger) {
        report(Rule::Boundary, 0, "launch_dependents is missing");
    }
    on_every_path(kernel, |waited: u8, instruction| match instruction.opcode.as_str() {
        "griddepcontrol.wait" => Ok(1),
        // A launch that triggers before it has waited lets its successor in, which triggers too: the GPU fills with
        // waiting blocks, and the kernel that a peer waits for finds no place.
        opcode if opcode == trigger && waited == 0 => Err("launch_dependents comes before griddepcontrol.wait"),
        _ if memory(instruction) && waited == 0 => Err("memory is touched before griddepcontrol.wait"),
        _ => Ok(waited),
    })
    .into_iter()
    .for_each(|(line, text)| report(Rule::Boundary, line, text));
}

/// Carries how far a kernel has come along its branches, from 0 at its start: on every path, not only in the order of
/// the text. Where paths meet, the one that has come less far counts. `step` says where an instruction leads, or what is
/// wrong with it there.
pub fn on_every_path(
    kernel: &Kernel,
    step: impl Fn(u8, &Instruction) -> Result<u8, &'static str>,
) -> Vec<(usize, &'static str)> {
    // None: not reached.
    type Reached = Option<u8>;
    let meet = |a: Reached, b: Reached| a.into_iter().chain(b).min();
    let mut at_label: HashMap<&str, Reached> = HashMap::new();
    loop {
        let before = at_label.clone();
        let mut reached = Some(0);
        let mut wrong = Vec::new();
        for instruction in &kernel.instructions {
            match instruction.opcode.as_str() {
                label if label.starts_with('$') => {
                    let here = at_label.entry(label).or_default();
                    *here = meet(*here, reached);
                    reached = *here;
                }
                "ret" | "exit" if !instruction.predicated => reached = None,
                _ if instruction.base() == "bra" => {
                    let there = at_label.entry(instruction.operands[0].as_str()).or_default();
                    *there = meet(*there, reached);
                    if !instruction.predicated {
                        reached = None;
                    }
                }
                _ => {
                    reached = reached.map(|reached| {
                        step(reached, instruction).unwrap_or_else(|text| {
                            wrong.push((instruction.line, text));
                            reached
                        })
                    });
                }
            }
        }
        if before == at_label {
            return wrong;
        }
    }
}

fn arrival(kernel: &Kernel, taint: &Taint, report: &mut dyn FnMut(Rule, usize, &str)) {
    let loads = |instruction: &Instruction| instruction.opcode.starts_with("multimem.ld_reduce");
    let releases = |instruction: &Instruction| instruction.opcode == "st.release.sys.global.u32";
    if !kernel.name.starts_with("twoshot_switch_") {
        for instruction in kernel.instructions.iter().filter(|one| loads(one) || releases(one)) {
            report(Rule::Arrival, instruction.line, "a sum in the switch, or an arrival, where none belongs");
        }
        return;
    }
    for instruction in kernel.instructions.iter().filter(|one| loads(one)) {
        let added = ["add.v4.f32", "add.acc::f32.v4.f16x2", "add.acc::f32.v4.bf16x2"];
        if !added.iter().any(|how| instruction.opcode == format!("multimem.ld_reduce.relaxed.sys.global.{how}")) {
            report(Rule::Arrival, instruction.line, "the switch must add in f32, relaxed at system scope");
        }
    }
    for (what, there) in [
        ("announces", kernel.instructions.iter().any(releases)),
        ("loads through the switch", kernel.instructions.iter().any(loads)),
    ] {
        if !there {
            report(Rule::Arrival, 0, &format!("nothing {what}"));
        }
    }
    let own_line = |instruction: &Instruction, base: &str| {
        instruction.opcode == format!("{base}.relaxed.sys.global.v4.b32")
            && origins_of_address(instruction, taint) == Some(WINDOWS)
    };
    // 0 something was polled or nothing yet, 1 acquired, 2 and the aliases are one again.
    let acquired = on_every_path(kernel, |reached, instruction| match instruction.opcode.as_str() {
        _ if own_line(instruction, "ld") => Ok(0),
        "fence.acq_rel.sys" => Ok(reached.max(1)),
        "fence.proxy.alias" if reached >= 1 => Ok(2),
        _ if loads(instruction) && reached < 2 => Err("a load through the switch of what was not acquired"),
        _ => Ok(reached),
    });
    // 0 the block has stored lines, or nothing yet; 1 all its threads have.
    let released = on_every_path(kernel, |reached, instruction| match instruction.base() {
        _ if own_line(instruction, "st") => Ok(0),
        "bar" | "barrier" => Ok(1),
        _ if releases(instruction) && reached < 1 => Err("an arrival without a barrier behind what it speaks of"),
        _ => Ok(reached),
    });
    for (line, text) in acquired.into_iter().chain(released) {
        report(Rule::Arrival, line, text);
    }
}

fn names(origins: Origins) -> String {
    let table = [
        (IN, "in"),
        (OUT, "out"),
        (WINDOWS, "windows"),
        (MULTICAST, "multicast"),
        (CONTROL, "control"),
        (FACTOR, "factor"),
    ];
    let found: Vec<_> = table.iter().filter(|(bit, _)| origins & bit != 0).map(|(_, name)| *name).collect();
    if found.is_empty() { "no parameter".into() } else { found.join(" and ") }
}
