//! The simulator's topology reader as a library with the comparisons reported to the fuzzer.

fn main() {
    let cuda = "../tests/sim/cuda";
    for watched in ["targets/topology.cc", "../tests/sim/cuda/topology.cc", "../tests/sim/cuda/topology.h"] {
        println!("cargo::rerun-if-changed={watched}");
    }
    cc::Build::new()
        .cpp(true)
        .std("c++17")
        .opt_level(1)
        .include(cuda)
        .flag("-fsanitize-coverage=trace-cmp")
        .flag("-D_GLIBCXX_ASSERTIONS")
        .file(format!("{cuda}/topology.cc"))
        .file("targets/topology.cc")
        .compile("fuzz_topology");
}
