//! `twoshot model`: what AllReduce would cost in worlds that nobody has measured, and how far the model was off.
#![forbid(unsafe_code)]

use std::path::PathBuf;

use clap::Args;
use twoshot::model::{Case, GPUS, Gpu, PARAMETERS, POINTS, Point, What, fit, tables};

use crate::bench::say;
use crate::element::{Dtype, Op};
use crate::report::{Record, Row};

/// Predict AllReduce times and cross-overs for 2 to 72 ranks (docs/scaling.md)
#[derive(Args, Debug)]
pub struct Model {
    /// Fit the model to these records of `twoshot bench --json` instead of the points it comes with
    #[arg(long, value_name = "RECORD", num_args = 1..)]
    fit: Vec<PathBuf>,
    /// Only the parameters, for programs
    #[arg(long)]
    json: bool,
}

/// Runs it; the exit code is 0, or 2 when a record cannot be used.
pub fn main(model: &Model) -> i32 {
    match run(model) {
        Ok(text) => {
            say(text.trim_end());
            0
        }
        Err(message) => {
            eprintln!("twoshot model: {message}");
            2
        }
    }
}

fn run(model: &Model) -> Result<String, String> {
    let mut points = Vec::new();
    for path in &model.fit {
        let found = self::points(&Record::read(path)?).map_err(|why| format!("{}: {why}", path.display()))?;
        points.extend(found);
    }
    let (points, parameters) =
        if points.is_empty() { (POINTS.to_vec(), PARAMETERS) } else { (points.clone(), fit(&points, &PARAMETERS)) };
    if model.json {
        return serde_json::to_string_pretty(&parameters).map_err(|error| error.to_string());
    }
    Ok(tables(&parameters, &points))
}

fn gpu(name: &str) -> Option<Gpu> {
    // Whole words: B200 is in GB200.
    let named = |gpu: &Gpu| name.split(|c: char| !c.is_ascii_alphanumeric()).any(|word| word == gpu.name);
    GPUS.into_iter().find(named)
}

/// The captured times of a record.
fn points(record: &Record) -> Result<Vec<Point>, String> {
    if record.mode != "measured" {
        return Err(format!("the mode was \"{}\": these times mean nothing", record.mode));
    }
    let Some(gpu) = gpu(&record.gpu) else { return Err(format!("the links of {} are not known", record.gpu)) };
    let Some(agreed) = record.agreed else {
        return Err("it does not say what the ranks agreed on: nothing was routed, or an older version wrote it".into());
    };
    let case = |what, bytes| Case {
        what,
        gpu,
        ranks: record.ranks,
        multicast: agreed.multicast,
        blocks: agreed.blocks,
        plain: false,
        bytes,
    };
    let mut points = Vec::new();
    // The model is about sums whose lines are full of payload.
    let full = |row: &&Row| row.op == Op::Sum && [Dtype::Bf16, Dtype::F16, Dtype::F32].contains(&row.dtype);
    for row in record.rows.iter().filter(full) {
        if let Some(stock) = row.stock_us {
            points.push(Point { case: case(What::Stock, row.bytes), us: stock.graph.median });
        }
        if let (Some(routed), "routed") = (row.routed_us, row.route.as_str()) {
            let what = What::of(agreed.algorithm(row.bytes));
            points.extend(what.map(|what| Point { case: case(what, row.bytes), us: routed.graph.median }));
        }
    }
    points.retain(|point| point.us > 0.0);
    if points.is_empty() { Err("nothing was timed".to_owned()) } else { Ok(points) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::Agreed;
    use serde_json::json;

    fn record(mode: &str) -> Record {
        let figure = |us: f64| json!({"median": us, "min": us, "max": us});
        let times = |us: f64| json!({"eager": figure(us * 2.0), "graph": figure(us), "host": figure(1.0)});
        let row = |bytes: u64, stock: f64, ours: f64| {
            json!({"dtype": "bf16", "bytes": bytes, "count": bytes / 2, "route": "routed", "verified_calls": 1,
                "compared_elements": 1, "wrong_stock": 0, "wrong_routed": 0, "stock_us": times(stock),
                "routed_us": times(ours)})
        };
        let mut record: Record = serde_json::from_value(json!({"format": 1, "date": "", "mode": mode,
            "gpu": "NVIDIA H100 80GB HBM3", "arch": 90, "ranks": 4, "hosts": 1, "driver": "", "cuda": 0, "nccl": 22809,
            "twoshot": "", "repetitions": 9, "rows": [row(1024, 9.0, 2.5), row(1 << 20, 20.0, 8.0)]}))
        .unwrap();
        let limits = Agreed { ranks: 4, blocks: 32, oneshot_bytes: 65536, twoshot_bytes: 4 << 20, ..Agreed::default() };
        record.agreed = Some(limits);
        record
    }

    #[test]
    fn a_measured_record_gives_stock_and_the_algorithm_that_ran() {
        let points = points(&record("measured")).unwrap();
        let seen: Vec<_> = points.iter().map(|point| (point.case.what, point.case.bytes, point.us)).collect();
        let (stock, one, two) = (What::Stock, What::OneShot, What::TwoShot);
        assert_eq!(seen, [(stock, 1024, 9.0), (one, 1024, 2.5), (stock, 1 << 20, 20.0), (two, 1 << 20, 8.0)]);
        let mut record = record("measured");
        if let Some(agreed) = &mut record.agreed {
            agreed.switch_bytes = Some(1 << 20);
        }
        assert_eq!(super::points(&record).unwrap()[3].case.what, What::Switch);
    }

    #[test]
    fn times_that_mean_nothing_and_links_that_nobody_knows_are_refused() {
        assert!(points(&record("simulated")).unwrap_err().contains("simulated"));
        assert!(points(&Record { gpu: "NVIDIA A100".to_owned(), ..record("measured") }).unwrap_err().contains("A100"));
        assert!(points(&Record { agreed: None, ..record("measured") }).is_err());
    }

    #[test]
    fn a_gpu_is_known_by_its_product_name() {
        let name = |text| gpu(text).map(|gpu| gpu.name);
        assert_eq!(name("NVIDIA H100 80GB HBM3"), Some("H100"));
        assert_eq!(name("NVIDIA GB200"), Some("GB200"));
        assert_eq!(name("NVIDIA B200"), Some("B200"));
        assert_eq!(name("NVIDIA A100-SXM4-80GB"), None);
    }
}
