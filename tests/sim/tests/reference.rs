//! The worker's reference, which judges stock NCCL's results with a tolerance.
use std::process::Command;

#[test]
fn a_result_of_stock_nccl_passes_by_as_much_as_its_roundings_can_do_and_no_more() {
    let mut worker = Command::new(twoshot_sim::worker());
    let output = worker.arg("--check-tolerance").env("LD_LIBRARY_PATH", twoshot_sim::lib_dir()).output();
    let output = output.expect("the worker was built");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && stdout == "ok\n", "{stdout}{stderr}");
}
