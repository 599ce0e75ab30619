//! `twoshot bench` on simulated GPUs: hosts of one NVLink fabric, one process per GPU, multicast on and then off.
//!
//! Usage: `demo TWOSHOT_PROGRAM LIBTWOSHOT [HOSTS GPUS_PER_HOST [BENCH_OPTION...]]`. The bench knows nothing of the
//! simulator: it gets a list of places, which is all that differs.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use twoshot_sim::{Session, Topology, nccl};

/// A JSON string. Paths and numbers only come here.
fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' | '\\' => out.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// One object per rank: the environment that puts it on its simulated host and GPU.
fn places(session: &Session, hosts: u32, gpus: u32, multicast: bool) -> String {
    let mut all = Vec::new();
    for rank in 0..hosts * gpus {
        let (host, gpu) = (rank / gpus, rank % gpus);
        let mut variables = vec![
            ("LD_LIBRARY_PATH", session.libraries().display().to_string()),
            ("TWOSHOT_SIM_DIR", session.dir().display().to_string()),
            ("TWOSHOT_SIM_HOST", host.to_string()),
            ("TWOSHOT_SIM_RANK", rank.to_string()),
            ("TWOSHOT_HOST_ID", format!("sim-host-{host}")),
            ("NCCL_HOSTID", format!("sim-host-{host}")),
            ("CUDA_VISIBLE_DEVICES", gpu.to_string()),
        ];
        if !multicast {
            variables.push(("TWOSHOT_MULTICAST", "0".to_owned()));
        }
        let pairs: Vec<_> =
            variables.iter().map(|(name, value)| format!("{}: {}", quoted(name), quoted(value))).collect();
        all.push(format!("{{\"device\": 0, \"environment\": {{{}}}}}", pairs.join(", ")));
    }
    format!("[{}]\n", all.join(",\n "))
}

fn run(arguments: &[String]) -> Result<bool, String> {
    let [program, library, rest @ ..] = arguments else {
        return Err("usage: demo TWOSHOT_PROGRAM LIBTWOSHOT [HOSTS GPUS_PER_HOST [BENCH_OPTION...]]".to_owned());
    };
    let number = |index: usize, default| rest.get(index).map_or(Ok(default), |text| text.parse::<u32>());
    let (hosts, gpus) = (number(0, 2), number(1, 4));
    let (Ok(hosts), Ok(gpus)) = (hosts, gpus) else { return Err("HOSTS and GPUS_PER_HOST are numbers".to_owned()) };
    let options = rest.get(2..).unwrap_or_default();
    let mut good = true;
    for multicast in [true, false] {
        let words = if multicast { "multicast" } else { "unicast (TWOSHOT_MULTICAST=0)" };
        println!("\n== {hosts} simulated hosts x {gpus} GPUs, one NVLink fabric, {words}");
        let session = Session::new(&Topology::fabric(hosts, gpus)).map_err(|error| error.to_string())?;
        let file = session.dir().join("places.json");
        std::fs::write(&file, places(&session, hosts, gpus, multicast)).map_err(|error| error.to_string())?;
        let mut bench = Command::new(program);
        bench.args(["bench", "--simulated", "--require-routed", "--library", library]);
        bench.arg("--nccl").arg(nccl()).arg("--places").arg(&file).args(options);
        let status = bench.status().map_err(|error| format!("{}: {error}", Path::new(program).display()))?;
        good &= status.success();
    }
    Ok(good)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(message) => {
            eprintln!("demo: {message}");
            ExitCode::from(2)
        }
    }
}
