//! The worker's reference, which judges stock NCCL's results with a tolerance.
use std::process::Command;

#[test]
fn a_result_of_stock_nccl_passes_by_as_much_as_its_roundings_can_do_and_no_more() {
    let output = Command::new(twoshot_sim::worker()).arg("--check-tolerance").output().expect("the worker was built");
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && stdout == "ok\n", "{stdout}");
}
