//! The kernel sources compiled for the CPU, against an independent reference.
use std::process::Command;

#[test]
fn the_kernels_reduce_every_bit_right_whatever_the_schedule_and_over_the_wrap_of_the_epoch() {
    let output = Command::new(twoshot_sim::executor_selftest()).arg("60").output().expect("the self-test was built");
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{stdout}{stderr}");
}
