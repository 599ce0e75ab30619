//! `twoshot doctor` names the cause of every broken set-up: each is compared with `tests/doctor/NAME.txt`.
//! `TWOSHOT_UPDATE_GOLDEN=1` writes those files anew.

#[path = "doctor/case.rs"]
mod case;

use case::{Case, lookalike};
use twoshot::config::VARIABLES;
use twoshot_sim::{Fabric, Link, Topology, nccl, old_nccl_dir, twoshot_library};

fn fabric(change: impl FnOnce(&mut twoshot_sim::Host)) -> Topology {
    Topology::fabric(2, 2).with_host(0, change)
}

#[test]
fn a_host_whose_gpus_are_linked_is_routed() {
    Case::new("routed", Topology::one_host(4)).routed("over the 4 visible GPUs would be routed");
    Case::new("routed-across", Topology::fabric(2, 2)).args(&["--across-hosts"]).routed("of this host and of any host");
}

#[test]
fn a_driver_that_is_missing_broken_or_too_old_is_named() {
    let case = Case::new("no-driver", Topology::one_host(2)).broken("libcuda.so.1");
    case.stock("probe", "no CUDA driver");
    Case::new("old-driver", Topology::one_host(2).driver(11_040))
        .stock("probe", "too old, install driver 520 (CUDA 11.8) or newer");
    let case = Case::new("driver-lacks-a-function", Topology::one_host(2)).without("cuLaunchKernelEx");
    case.stock("probe", "undefined symbol: cuLaunchKernelEx");
    let case = Case::new("no-nvml", Topology::one_host(2)).broken("libnvidia-ml.so.1");
    case.stock("no-nvlink", "the NVML library cannot be used");
    let case = Case::new("kernels-do-not-load", Topology::one_host(2)).faults("call=cuModuleLoadData,nth=1,code=222");
    case.stock("module", "GPU 0: cuModuleLoadData failed with CUDA driver error 222");
}

#[test]
fn gpus_that_are_missing_alone_too_old_or_not_linked_are_named() {
    Case::new("no-gpu", Topology::one_host(2))
        .gpus("-1")
        .stock("probe", "no GPU is visible: check CUDA_VISIBLE_DEVICES");
    Case::new("one-gpu", Topology::one_host(1)).stock("one-rank", "1 visible");
    let case = Case::new("old-gpu", Topology::one_host(2).gpu(0, 1, "cc=8.0"));
    case.stock("architecture", "compute capability 9.0 and newer (GPU 1)");
    let case = Case::new("no-nvlink", Topology::one_host(3).pair(0, 1, 2, Link::Pcie));
    case.stock("no-nvlink", "1 of 3 pairs have none: 1-2");
    Case::new("no-peer-access", Topology::one_host(2).pair(0, 0, 1, Link::None)).stock("no-nvlink", "1 of 1 pairs");
}

#[test]
fn memory_that_cannot_be_shared_is_named() {
    let case = Case::new("no-descriptors", Topology::one_host(2).gpus("fd-handle=0"));
    case.stock("no-virtual-memory", "file descriptors: not supported");
    let case = Case::new("export-fails", Topology::one_host(2));
    case.faults("call=cuMemExportToShareableHandle,nth=1,code=801").stock("export", "GPU 0: cuMemExport");
}

#[test]
fn what_keeps_hosts_apart_is_named() {
    let across = |name, topology| Case::new(name, topology).args(&["--across-hosts"]);
    across("fabric-in-progress", fabric(|host| host.fabric = Fabric::InProgress))
        .across("no-fabric", "fabric       registration in progress");
    across("fabric-not-started", fabric(|host| host.fabric = Fabric::NotStarted))
        .across("no-fabric", "registration not started");
    across("zero-uuid", Topology::one_host(2)).across("no-fabric", "cluster UUID zero: NVLink ends at this host");
    across("no-imex", fabric(|host| host.imex = false)).no_imex().across("fabric-handle", "missing IMEX channel");
    across("no-fabric-handles", Topology::fabric(2, 2).gpus("fabric-handle=0"))
        .across("fabric-handle", "fabric handles: not supported");
    let case = across("fabric-disabled", Topology::fabric(2, 2)).env("NCCL_MNNVL_ENABLE", "0");
    case.across("fabric-disabled", "NCCL_MNNVL_ENABLE=0: communicators that span hosts stay with stock NCCL");
}

#[test]
fn reports_of_other_hosts_are_merged_with_this_ones() {
    let two = |change: fn(&mut twoshot_sim::Host)| Topology::fabric(2, 2).with_host(1, change);
    Case::new("other-host", two(|_| {})).with_report_of(1).routed("of this host and of the hosts given");
    Case::new("other-clique", two(|host| host.clique = 7)).with_report_of(1).across("other-clique", "rank 2, $SESSION");
    let case = Case::new("other-cluster", two(|host| host.uuid = *b"another-cluster!")).with_report_of(1);
    case.across("other-cluster", "rank 2, $SESSION");
    let case = Case::new("no-report", Topology::fabric(2, 2)).args(&["--with", "/dev/null"]);
    case.unreadable("/dev/null: EOF while parsing");
}

#[test]
fn an_environment_that_asks_for_something_else_is_named() {
    let case = |name| Case::new(name, Topology::one_host(2));
    case("p2p-disabled").env("NCCL_P2P_DISABLE", "1").stock("forbidden", "NCCL_P2P_DISABLE=1: AllReduce stays");
    case("algo-named").env("NCCL_ALGO", "allreduce:ring").stock("forbidden", "NCCL_ALGO names AllReduce");
    case("cumem-off").env("NCCL_CUMEM_ENABLE", "0").stock("forbidden", "NCCL_CUMEM_ENABLE=0");
    case("disabled").env("TWOSHOT_ENABLE", "0").stock("disabled", "TWOSHOT_ENABLE=0");
    case("nonsense").env("TWOSHOT_MAX_BYTES", "lots").stock("invalid-config", "TWOSHOT_MAX_BYTES=lots: expected bytes");
    case("misspelled").env("TWOSHOT_MAXBYTES", "1M").routed("TWOSHOT_MAXBYTES is set, and is no variable");
    case("tuning-missing").env("TWOSHOT_TUNING_FILE", "/nowhere/t.json").routed("no rank will use a tuning file");
}

#[test]
fn multicast_calls_are_made_only_where_they_are_asked_for_and_allowed() {
    let case = |name| Case::new(name, Topology::one_host(2));
    let created = |case: Case, said: &str| case.routed(said).calls("cuMulticastCreate");
    assert_eq!(created(case("multicast-not-tried"), "attribute; --try-multicast"), 0);
    assert_eq!(created(case("multicast-tried").args(&["--try-multicast"]), "an object for 2 GPUs was created"), 1);
    let off = case("multicast-off").args(&["--try-multicast"]).env("NCCL_NVLS_ENABLE", "0");
    assert_eq!(created(off, "switched off by"), 0);
    let full = Case::new("multicast-full", Topology::one_host(2).multicast_slots(0)).args(&["--try-multicast"]);
    assert_eq!(created(full, "cuMulticastCreate failed"), 1);
    let none = Case::new("multicast-none", Topology::one_host(2).gpus("multicast=0")).args(&["--try-multicast"]);
    assert_eq!(created(none, "not on all GPUs"), 0);
}

#[test]
fn an_nccl_that_is_missing_too_old_or_not_the_only_one_is_named() {
    let case = |name| Case::new(name, Topology::one_host(2));
    let missing = case("no-nccl").env("TWOSHOT_NCCL_LIBRARY", "/nowhere/libnccl.so.2");
    missing.stock("no-nccl", "cannot open /nowhere/libnccl.so.2");
    case("old-nccl").env("SIM_NCCL_VERSION", "21805").stock("old-nccl", "2.18.5");
    let other = old_nccl_dir().join("libnccl.so.2");
    let two = case("two-nccls").env("TWOSHOT_NCCL_LIBRARY", other.to_str().expect("text"));
    two.routed("two NCCLs in one process");
    let itself = case("twoshot-as-nccl").env("TWOSHOT_NCCL_LIBRARY", twoshot_library().to_str().expect("text"));
    itself.routed("is twoshot itself: TWOSHOT_NCCL_LIBRARY must name stock NCCL");
}

#[test]
fn two_nccls_in_a_running_process_are_found() {
    let process = lookalike(&[nccl(), old_nccl_dir().join("libnccl.so.2")]);
    let case = Case::new("two-nccls-loaded", Topology::one_host(2)).root("/").of(&process);
    case.routed("2 NCCLs in one process");
    let process = lookalike(&[nccl()]);
    Case::new("one-nccl-loaded", Topology::one_host(2)).root("/").of(&process).routed("has not loaded twoshot");
}

#[test]
fn a_container_without_shared_memory_is_named() {
    let case = Case::new("no-shared-memory", Topology::one_host(2)).root("/nowhere");
    case.routed("stock NCCL needs it; give the container one");
}

#[test]
fn every_variable_is_listed_with_its_meaning_from_the_librarys_own_table() {
    let text = Case::new("variables", Topology::one_host(2)).args(&["--variables"]).routed("cross-over").text;
    for variable in VARIABLES {
        assert!(text.contains(variable.name) && text.contains(variable.meaning), "{}: {text}", variable.name);
    }
}

#[test]
fn a_program_reads_the_same_verdict() {
    let value = Case::new("json", Topology::one_host(2).pair(0, 0, 1, Link::Pcie)).json();
    assert_eq!(value["verdict"]["routed"], false);
    assert_eq!(value["verdict"]["reason"], "no-nvlink");
    assert_eq!(value["across_hosts"]["reason"], "no-fabric");
    let marks: Vec<_> = value["findings"].as_array().expect("a list").iter().map(|one| &one["mark"]).collect();
    assert!(marks.iter().any(|mark| *mark == "fail") && marks.iter().any(|mark| *mark == "ok"), "{value}");
}
