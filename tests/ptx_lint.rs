//! Reads the PTX that was shipped and holds it to the protocol's rules. Needs no GPU and no nvcc. Each rule is also
//! shown a violation, planted into that PTX, which it has to find.

#[path = "ptx/parse.rs"]
mod parse;
#[path = "ptx/ring.rs"]
mod ring;
#[path = "ptx/rules.rs"]
mod rules;
#[path = "ptx/taint.rs"]
mod taint;

#[allow(missing_docs, non_camel_case_types, non_snake_case, dead_code, clippy::all)]
mod args {
    include!(concat!(env!("OUT_DIR"), "/args.rs"));
}

use rules::{Finding, Rule, lint, lint_resources};

const TARGETS: [&str; 2] = ["90", "100"];
const ARCHITECTURES: [&str; 3] = ["90", "100", "103"];
const KERNELS: usize = 113;

fn read(file: &str) -> String {
    let path = std::path::Path::new(env!("TWOSHOT_PTX_DIR")).join(file);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn shipped(target: &str) -> String {
    read(&format!("kernels.sm_{target}.ptx"))
}

fn assert_clean(what: &str, findings: &[Finding]) {
    let texts: Vec<_> = findings.iter().map(|found| format!("{:?}: {}", found.rule, found.text)).collect();
    assert!(texts.is_empty(), "{what}:\n{}", texts.join("\n"));
}

/// The text of one kernel, alone.
fn kernel(ptx: &str, name: &str) -> String {
    let start = ptx.find(&format!(".visible .entry {name}(")).expect("the kernel exists");
    let end = ptx[start + 1..].find(".visible .entry").map_or(ptx.len(), |end| start + 1 + end);
    ptx[start..end].to_owned()
}

/// Replaces the first occurrence and expects that rule, and no panic, to object.
fn plant(name: &str, from: &str, to: &str, rule: Rule) {
    let clean = kernel(&shipped("90"), name);
    assert!(clean.contains(from), "{name} has no {from:?} to replace");
    assert_clean("before the violation is planted", &lint(&clean));
    let findings = lint(&clean.replacen(from, to, 1));
    assert!(findings.iter().any(|found| found.rule == rule), "{from:?} -> {to:?}: {rule:?} not in {findings:?}");
}

const UC: &str = "twoshot_twoshot_f32_4_uc";
const MC: &str = "twoshot_oneshot_bf16_2_mc";
const SWITCH: &str = "twoshot_switch_bf16_n_mc";
const BULK: [&str; 2] = ["twoshot_bulk_bf16_2_uc", "twoshot_bulk_f32_n_uc"];

#[test]
fn shipped_ptx_breaks_no_rule() {
    for target in TARGETS {
        assert_clean(target, &lint(&shipped(target)));
    }
}

#[test]
fn shipped_ptx_holds_every_kernel_once() {
    let mut expected = Vec::new();
    for shape in ["oneshot", "twoshot"] {
        for kind in ["f32", "f16", "bf16"] {
            for ranks in ["2", "4", "8", "n"] {
                expected.extend(["uc", "mc"].map(|door| format!("twoshot_{shape}_{kind}_{ranks}_{door}")));
            }
        }
    }
    for shape in ["oneshot", "twoshot"] {
        for class in ["f32op", "f16op", "bf16op", "i8", "i32", "i64", "f64", "fp8"] {
            expected.extend(["uc", "mc"].map(|door| format!("twoshot_{shape}_{class}_n_{door}")));
        }
    }
    expected.extend(["f32", "f16", "bf16", "i8", "i32", "i64", "f64", "fp8"].map(|t| format!("twoshot_scale_{t}")));
    expected.extend(["f32", "f16", "bf16"].map(|kind| format!("twoshot_switch_{kind}_n_mc")));
    for class in ["f32", "f16", "bf16", "f32op", "f16op", "bf16op", "i8", "i32", "i64", "f64", "fp8"] {
        expected.extend(["2", "n"].map(|ranks| format!("twoshot_bulk_{class}_{ranks}_uc")));
    }
    expected.sort();
    assert_eq!(expected.len(), KERNELS);
    for target in TARGETS {
        let mut found: Vec<_> = parse::kernels(&shipped(target)).into_iter().map(|kernel| kernel.name).collect();
        found.sort();
        assert_eq!(found, expected, "sm_{target}");
    }
}

#[test]
fn multicast_kernels_do_use_multicast() {
    for kernel in parse::kernels(&shipped("90")) {
        let stores = kernel.instructions.iter().filter(|instruction| instruction.base() == "multimem").count();
        assert_eq!(stores > 0, kernel.name.ends_with("_mc"), "{}", kernel.name);
    }
}

#[test]
fn no_architecture_needs_a_stack_or_spills() {
    for architecture in ARCHITECTURES {
        let log = read(&format!("ptxas-sm_{architecture}.log"));
        assert_clean(architecture, &lint_resources(&log, KERNELS));
    }
}

#[test]
fn ordinary_store_to_a_multicast_address_is_found() {
    plant(MC, "multimem.st.relaxed.sys.global.v4.f32", "st.relaxed.sys.global.v4.b32", Rule::Multicast);
}

#[test]
fn multimem_on_a_unicast_address_is_found() {
    plant(MC, "st.relaxed.sys.global.u32", "multimem.st.relaxed.sys.global.u32", Rule::Multicast);
}

#[test]
fn multicast_in_a_unicast_kernel_is_found() {
    let renamed = kernel(&shipped("90"), MC).replace("_mc", "_uc");
    assert!(lint(&renamed).iter().any(|found| found.rule == Rule::Multicast));
}

#[test]
fn multicast_address_is_followed_through_arithmetic_and_selection() {
    let body = |last: &str| {
        format!(
            ".visible .entry k_mc(\n.param .b8 k_mc_param_0[80]\n)\n{{\n\
             mov.b64 %rd1, k_mc_param_0;\ngriddepcontrol.wait;\n@%p0 griddepcontrol.launch_dependents;\n\
             mov.u64 %rd2, %rd1;\nld.param.u64 %rd3, [%rd2+40];\nld.param.u64 %rd4, [k_mc_param_0+24];\n\
             cvta.to.global.u64 %rd5, %rd3;\nshl.b64 %rd6, %rd7, 4;\nmad.lo.s64 %rd8, %rd6, 2, %rd5;\n\
             mov.u64 %rd9, %rd4;\nselp.b64 %rd10, %rd8, %rd9, %p1;\n{last}\nret;\n}}\n"
        )
    };
    assert!(lint(&body("multimem.st.relaxed.sys.global.v4.f32 [%rd8+16], {%r1, %r2, %r3, %r4};")).is_empty());
    for (last, rule) in [
        ("st.relaxed.sys.global.u32 [%rd10], %r1;", Rule::Multicast),
        ("multimem.st.relaxed.sys.global.v4.f32 [%rd10], {%r1, %r2, %r3, %r4};", Rule::Multicast),
        ("{ st.relaxed.sys.global.u64 [%rd9], %rd8; }", Rule::Multicast),
        ("add.s64 %rd11, %rd1, %rd7;", Rule::Followed),
        ("add.s64 %rd11, %rd1, 8; add.s64 %rd11, %rd1, 16;", Rule::Followed),
        ("add.s64 %rd11, %rd1, 8; ld.param.u64 %rd12, [%rd11+32]; st.global.b32 [%rd12], %r1;", Rule::Multicast),
        ("ld.param.u64 %rd11, [%rd4+8];", Rule::Followed),
        ("st.relaxed.sys.global.u32 [%rd12], %r1;", Rule::Accesses),
    ] {
        let findings = lint(&body(last));
        assert!(findings.iter().any(|found| found.rule == rule), "{last}: {findings:?}");
    }
}

#[test]
fn multicast_address_in_an_ordinary_load_of_what_the_switch_should_add_is_found() {
    let load = "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2";
    plant(SWITCH, load, "ld.relaxed.sys.global.v4.b32", Rule::Multicast);
    plant(SWITCH, "ld.relaxed.sys.global.v4.b32", load, Rule::Multicast);
}

#[test]
fn an_arrival_that_does_not_release_is_found() {
    let ptx = kernel(&shipped("90"), SWITCH);
    // Every one, for a rule that is content with one of two would miss the path of unaligned buffers.
    let findings = lint(&ptx.replace("st.release.sys.global.u32", "st.relaxed.sys.global.u32"));
    assert!(findings.iter().any(|found| found.rule == Rule::Arrival), "{findings:?}");
    plant(SWITCH, "st.release.sys.global.u32", "st.release.gpu.global.u32", Rule::Accesses);
    plant(SWITCH, "st.release.sys.global.u32", "red.relaxed.sys.global.add.u32", Rule::Atomics);
}

#[test]
fn an_arrival_before_the_blocks_barrier_is_found() {
    each_removed(SWITCH, Rule::Arrival, "bar.sync");
}

#[test]
fn a_load_through_the_switch_that_was_not_acquired_is_found() {
    each_removed(SWITCH, Rule::Arrival, "fence.acq_rel.sys;");
    each_removed(SWITCH, Rule::Arrival, "fence.proxy.alias;");
}

/// Without any one of some instructions a kernel is as it was or wrong, and without at least one of them it is wrong.
/// (A fence of a fault's record, or the barrier of the epoch behind another one, may go without harm to arrivals.)
fn each_removed(name: &str, rule: Rule, instruction: &str) {
    let clean = kernel(&shipped("90"), name);
    let places: Vec<usize> = clean.match_indices(instruction).map(|(at, _)| at).collect();
    let found = places.iter().filter(|at| {
        let (before, rest) = clean.split_at(**at);
        let end = rest.find(';').expect("a statement ends") + 1;
        let findings = lint(&format!("{before}{}", &rest[end..]));
        findings.iter().any(|found| found.rule == rule)
    });
    // On the paths of aligned and of unaligned buffers.
    assert!(found.count() >= 2, "{instruction} removed: of {} places in {name}", places.len());
}

#[test]
fn a_flag_without_a_fence_and_a_tile_called_done_too_early_are_found() {
    for name in BULK {
        each_removed(name, Rule::Ring, "fence.acq_rel.sys;");
        each_removed(name, Rule::Ring, "bar.warp.sync");
    }
}

#[test]
fn a_flag_or_a_word_of_the_block_that_is_not_acquired_or_released_is_found() {
    for name in BULK {
        let ptx = kernel(&shipped("90"), name);
        for (strong, weak, rule) in [
            ("ld.acquire.sys.global.u64", "ld.relaxed.sys.global.u64", Rule::Ring),
            ("ld.acquire.sys.global.u64", "ld.acquire.gpu.global.u64", Rule::Accesses),
            ("ld.acquire.cta.shared.u32", "ld.relaxed.cta.shared.u32", Rule::Accesses),
            ("st.release.cta.shared.u32", "st.relaxed.cta.shared.u32", Rule::Ring),
            ("st.release.cta.shared.b32", "st.relaxed.cta.shared.b32", Rule::Accesses),
            ("st.relaxed.sys.global.b64", "st.relaxed.gpu.global.b64", Rule::Accesses),
            ("ld.relaxed.sys.global.v4.b32", "ld.global.v4.b32", Rule::Accesses),
        ] {
            assert!(ptx.contains(strong), "{name} has no {strong}");
            let findings = lint(&ptx.replace(strong, weak));
            assert!(findings.iter().any(|found| found.rule == rule), "{name}: {strong} -> {weak}: {findings:?}");
        }
        // Each path by itself: aligned buffers and others, the poller of each.
        each_removed(name, Rule::Ring, "ld.acquire.sys.global.u64");
    }
}

#[test]
fn a_ring_in_another_kernel_is_found() {
    plant(UC, "st.relaxed.sys.global.u32", "st.relaxed.sys.global.b64", Rule::Ring);
    plant(UC, "ld.relaxed.sys.global.v4.b32", "ld.acquire.sys.global.u64", Rule::Ring);
    plant(UC, "st.relaxed.sys.global.u32", "st.relaxed.cta.shared.u32", Rule::Accesses);
}

#[test]
fn a_sum_of_the_switch_in_less_than_f32_is_found() {
    plant(SWITCH, "add.acc::f32.v4.bf16x2", "add.v4.bf16x2", Rule::Arrival);
    plant(SWITCH, "ld_reduce.relaxed.sys.global.add", "ld_reduce.relaxed.gpu.global.add", Rule::Arrival);
    plant(SWITCH, "ld_reduce.relaxed.sys.global.add", "ld_reduce.relaxed.sys.global.max", Rule::Arrival);
}

#[test]
fn the_switch_and_arrivals_in_another_kernel_are_found() {
    let load = "multimem.ld_reduce.relaxed.sys.global.add.v4.f32";
    plant(MC, "multimem.st.relaxed.sys.global.v4.f32", load, Rule::Arrival);
    plant(UC, "st.relaxed.sys.global.u32", "st.release.sys.global.u32", Rule::Arrival);
}

#[test]
fn atomic_that_does_not_release_is_found() {
    plant(UC, " // not-an-arrival: overlap ticket", "", Rule::Atomics);
    plant(UC, " // not-an-arrival: fault claim", "", Rule::Atomics);
    // A mark does not make an addition a ticket.
    plant(UC, "atom.relaxed.gpu.global.exch.b32", "atom.relaxed.gpu.global.add.u32", Rule::Atomics);
    plant(UC, "st.relaxed.sys.global.u32", "red.relaxed.sys.global.add.u32", Rule::Atomics);
}

#[test]
fn float_compare_is_found() {
    plant(UC, "setp.eq.s32", "setp.eq.f32", Rule::Arithmetic);
    plant(UC, "setp.eq.s32", "testp.notanumber.f32", Rule::Arithmetic);
}

#[test]
fn flushed_fused_or_otherwise_rounded_sums_are_found() {
    plant(UC, "add.rn.f32", "add.rn.ftz.f32", Rule::Arithmetic);
    plant(UC, "add.rn.f32", "add.f32", Rule::Arithmetic);
    plant(UC, "add.rn.f32", "add.rz.f32", Rule::Arithmetic);
    plant(UC, "add.rn.f32", "fma.rn.f32", Rule::Arithmetic);
    plant(MC, "cvt.rn.bf16x2.f32", "cvt.rz.bf16x2.f32", Rule::Arithmetic);
}

#[test]
fn an_operation_of_the_launch_in_a_kernel_that_only_sums_is_found() {
    plant(UC, "add.rn.f32", "mul.rn.f32", Rule::Arithmetic);
    plant(UC, "add.rn.f32", "max.f32", Rule::Arithmetic);
    let fp8 = "twoshot_oneshot_fp8_n_uc";
    plant(fp8, "max.f32", "max.ftz.f32", Rule::Arithmetic);
    plant(fp8, "div.rn.f32", "div.approx.f32", Rule::Arithmetic);
    plant(fp8, "cvt.rn.satfinite.e4m3x2.f32", "cvt.rn.satfinite.relu.e4m3x2.f32", Rule::Arithmetic);
}

#[test]
fn a_factor_kernel_that_rounds_elsewhere_or_reads_more_than_its_own_is_found() {
    for (kernel, product, wrong) in [
        ("f32", "mul.rn.f32", "mul.rn.ftz.f32"),
        ("f16", "mul.rn.f16x2", "fma.rn.f16x2"),
        ("bf16", "mul.rn.bf16x2", "mul.rn.f16x2"),
        ("f64", "mul.rn.f64", "mul.rz.f64"),
        ("fp8", "cvt.rn.satfinite.e5m2x2.f32", "cvt.rn.e5m2x2.f32"),
    ] {
        plant(&format!("twoshot_scale_{kernel}"), product, wrong, Rule::Arithmetic);
    }
    let name = "twoshot_scale_f32";
    plant(name, "ld.global.v4.b32", "ld.global.nc.v4.b32", Rule::Accesses);
    plant(name, "st.global.v4.b32", "st.relaxed.sys.global.v4.b32", Rule::Accesses);
    plant(name, "ld.global.v4.b32", "st.global.v4.b32", Rule::Accesses);
    plant(name, "griddepcontrol.wait;", "", Rule::Boundary);
    plant(name, "@p griddepcontrol.launch_dependents;", "", Rule::Boundary);
    plant(name, "@p griddepcontrol.launch_dependents;", "griddepcontrol.launch_dependents;", Rule::Boundary);
    // The factor's address is no place to write to.
    let clean = kernel(&shipped("90"), name);
    let address = clean.lines().find(|line| line.contains("ld.param.") && line.contains("param_0+40]"));
    let register = address.and_then(|line| line.split_whitespace().nth(1)).expect("the factor's address is loaded");
    let body = "griddepcontrol.wait;";
    let stored = clean.replacen(
        body,
        &format!("{body} griddepcontrol.launch_dependents; st.global.b32 [{}], %r1;", register.trim_end_matches(',')),
        1,
    );
    assert!(lint(&stored).iter().any(|found| found.rule == Rule::Accesses), "{register}");
}

#[test]
fn weak_or_narrow_scope_access_to_a_window_is_found() {
    plant(UC, "ld.relaxed.sys.global.v4.b32", "ld.global.v4.b32", Rule::Accesses);
    plant(UC, "ld.relaxed.sys.global.v4.b32", "ld.relaxed.gpu.global.v4.b32", Rule::Accesses);
    plant(UC, "st.relaxed.sys.global.v4.b32", "st.global.v4.b32", Rule::Accesses);
    plant(UC, "st.relaxed.sys.global.v4.b32", "st.relaxed.cta.global.v4.b32", Rule::Accesses);
}

#[test]
fn cached_read_of_the_payload_is_found() {
    // `in` may be `out`: the read-only path would be allowed to return what it held before.
    plant(UC, "ld.global.v4.b32", "ld.global.nc.v4.b32", Rule::Accesses);
}

#[test]
fn access_before_the_previous_launch_ended_is_found() {
    plant(UC, "@p griddepcontrol.launch_dependents;", "griddepcontrol.launch_dependents;", Rule::Boundary);
    let clean = kernel(&shipped("90"), UC);
    let without = clean.replace("@p griddepcontrol.launch_dependents;", "");
    assert!(lint(&without).iter().any(|found| found.rule == Rule::Boundary));
    let waits: Vec<usize> = clean.match_indices("griddepcontrol.wait;").map(|(at, _)| at).collect();
    assert!(waits.len() > 1, "one wait on the path of aligned buffers, one on the other");
    for at in waits {
        let (before, rest) = clean.split_at(at);
        let findings = lint(&format!("{before}{}", rest.replacen("griddepcontrol.wait;", "", 1)));
        assert!(findings.iter().any(|found| found.rule == Rule::Boundary));
    }
}

#[test]
fn spills_stacks_and_missing_kernels_are_found() {
    let log = read("ptxas-sm_90.log");
    for (from, to) in [
        (" 0 bytes spill stores", " 8 bytes spill stores"),
        ("0 bytes stack frame", "16 bytes stack frame"),
        ("bytes stack frame", "?"),
    ] {
        assert!(!lint_resources(&log.replacen(from, to, 1), KERNELS).is_empty(), "{to}");
    }
}
