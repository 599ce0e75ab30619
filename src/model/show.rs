//! The model's word as tables, for the terminal and for `docs/scaling.md`.

use std::fmt::Write;

use super::{B200, Case, Error, GB200, Gpu, H100, Parameters, Point, What, check, left_out, limits, switch_limits};

/// The block budget of all predictions, the one that is shipped.
const BLOCKS: u32 = 32;
/// Worlds in the prediction.
const RANKS: [u32; 9] = [2, 4, 8, 12, 16, 24, 32, 48, 72];
/// A HGX board ends at eight.
const BOARD: u32 = 8;

fn size(bytes: u64) -> String {
    crate::stats::bytes(bytes)
}

fn percent(share: f64) -> String {
    format!("{:.0} %", share * 100.0)
}

/// All tables, in Markdown.
pub fn tables(parameters: &Parameters, points: &[Point]) -> String {
    let mut text = String::new();
    let _ = calibration(&mut text, parameters, points)
        .and_then(|()| predictions(&mut text, parameters))
        .and_then(|()| crossings(&mut text, parameters))
        .and_then(|()| in_switch(&mut text, parameters))
        .and_then(|()| comparison(&mut text, parameters));
    text
}

fn calibration(text: &mut String, p: &Parameters, points: &[Point]) -> std::fmt::Result {
    writeln!(text, "### Parameters\n\n| parameter | value |\n|---|---:|")?;
    for (name, value, unit) in [
        ("launch", p.launch, "us"),
        ("without programmatic dependent launch", p.plain, "us more"),
        ("hop", p.hop, "us"),
        ("each further peer of a hop", p.peer, "us"),
        ("our share of the links' nominal rate", p.link, ""),
        ("stored and polled by one block", p.block, "GB/s"),
        ("stock NCCL's latencies by its own cost model", p.stock_latency, ""),
        ("stock NCCL's share of the links: LL", p.stock_ll, ""),
        ("LL128", p.stock_ll128, ""),
        ("Simple", p.stock_simple, ""),
    ] {
        writeln!(text, "| {name} | {} |", format!("{value:.3} {unit}").trim_end())?;
    }
    writeln!(text, "\n### Error on the points themselves, and on those left out of the fit\n")?;
    writeln!(text, "| left out | points | mean error | worst |\n|---|---:|---:|---:|")?;
    let mut row = |name: String, error: Error| {
        writeln!(text, "| {name} | {} | {} | {} |", error.points, percent(error.mean), percent(error.worst))
    };
    row("nothing".to_owned(), Error::of(p, points.iter()))?;
    for (bytes, error) in left_out(points, p, |point| point.case.bytes) {
        row(size(bytes), error)?;
    }
    let ours: Vec<_> = points.iter().filter(|point| point.case.what != What::Stock).copied().collect();
    for (ranks, error) in left_out(&ours, p, |point| point.case.ranks) {
        row(format!("all of twoshot on {ranks} GPUs"), error)?;
    }
    Ok(())
}

fn time(p: &Parameters, what: What, gpu: Gpu, (ranks, multicast): (u32, bool), bytes: u64) -> f64 {
    p.time(&Case { what, gpu, ranks, multicast, blocks: BLOCKS, plain: false, bytes })
}

/// The GPUs with different figures, and how far their domains reach.
fn worlds() -> impl Iterator<Item = (&'static str, Gpu, u32, bool)> {
    let kinds = [("H100, H200", H100), ("B200, GB200", GB200)];
    let all = kinds.into_iter().flat_map(|(name, gpu)| {
        RANKS.into_iter().flat_map(move |ranks| [false, true].map(|multicast| (name, gpu, ranks, multicast)))
    });
    all.filter(|(_, gpu, ranks, multicast)| (gpu.arch >= B200.arch || *ranks <= BOARD) && !(*multicast && *ranks == 2))
}

fn predictions(text: &mut String, p: &Parameters) -> std::fmt::Result {
    writeln!(text, "\n### Predicted times: one-shot / two-shot / stock NCCL, in us, at most {BLOCKS} blocks\n")?;
    let sizes = [1 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];
    writeln!(text, "| GPUs | ranks | multicast | {} |", sizes.map(size).join(" | "))?;
    writeln!(text, "|---|---:|---|{}", "---:|".repeat(sizes.len()))?;
    for (name, gpu, ranks, multicast) in worlds() {
        let cells = sizes.map(|bytes| {
            let of = |what| time(p, what, gpu, (ranks, multicast), bytes);
            let (one, two, stock) = (of(What::OneShot), of(What::TwoShot), of(What::Stock));
            format!("{one:.1} / {two:.1} / {stock:.1}")
        });
        let multicast = if multicast { "yes" } else { "no" };
        writeln!(text, "| {name} | {ranks} | {multicast} | {} |", cells.join(" | "))?;
    }
    Ok(())
}

fn crossings(text: &mut String, p: &Parameters) -> std::fmt::Result {
    writeln!(text, "\n### Predicted cross-overs, as shipped for worlds that nobody has measured\n")?;
    writeln!(text, "| GPUs | ranks | multicast | one-shot to | two-shot to |\n|---|---:|---|---:|---:|")?;
    for (name, gpu, ranks, multicast) in worlds() {
        let (one, two) = limits(p, gpu, ranks, multicast, BLOCKS);
        let multicast = if multicast { "yes" } else { "no" };
        writeln!(text, "| {name} | {ranks} | {multicast} | {} | {} |", size(one), size(two))?;
    }
    Ok(())
}

/// What adding in the switch is predicted to bring.
fn in_switch(text: &mut String, p: &Parameters) -> std::fmt::Result {
    writeln!(
        text,
        "\n### Predicted, and verified by nothing: two-shot / two-shot whose sums the switch makes, in us\n"
    )?;
    writeln!(
        text,
        "Payloads that a GPU's link carries in one direction by either, times, and the payloads from which"
    )?;
    writeln!(text, "and to which `TWOSHOT_SWITCH_REDUCE=1` takes it.\n")?;
    let sizes = [64 << 10, 256 << 10, 1 << 20, 2 << 20, 4 << 20];
    writeln!(text, "| GPUs | ranks | link | {} | taken from | to |", sizes.map(size).join(" | "))?;
    writeln!(text, "|---|---:|---:|{}---:|---:|", "---:|".repeat(sizes.len()))?;
    for (name, gpu, ranks, _) in worlds().filter(|(.., multicast)| *multicast) {
        let cells = sizes.map(|bytes| {
            let of = |what| time(p, what, gpu, (ranks, true), bytes);
            format!("{:.1} / {:.1}", of(What::TwoShot), of(What::Switch))
        });
        let n = f64::from(ranks);
        let link = format!("{:.2} / {:.2}", 2.0 * (n - 1.0) / n, 1.0 + 1.0 / n);
        let from = match switch_limits(p, gpu, ranks, BLOCKS) {
            (_, 0) => "never | ".to_owned(),
            (from, to) => format!("{} | {}", size(from), size(to)),
        };
        writeln!(text, "| {name} | {ranks} | {link} | {} | {from} |", cells.join(" | "))?;
    }
    Ok(())
}

fn comparison(text: &mut String, p: &Parameters) -> std::fmt::Result {
    writeln!(text, "\n### Against what others published\n")?;
    writeln!(text, "| source | what | GPUs | bytes | published us | predicted us | error | what differs |")?;
    writeln!(text, "|---|---|---|---:|---:|---:|---:|---|")?;
    for known in check::all() {
        let what = match known.case.what {
            What::OneShot => "one-shot",
            What::TwoShot => "two-shot",
            What::Switch => "two-shot in the switch",
            What::Stock => "stock",
        };
        let predicted = p.time(&known.case);
        let error = (predicted / known.us - 1.0) * 100.0;
        let (source, gpus, bytes) = (known.source, known.case.gpu.name, size(known.case.bytes));
        let (ranks, us, differs) = (known.case.ranks, known.us, known.differs);
        writeln!(
            text,
            "| {source} | {what} | {ranks} x {gpus} | {bytes} | {us} | {predicted:.1} | {error:+.0} % | {differs} |"
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{PARAMETERS, POINTS};

    #[test]
    fn the_page_on_scaling_shows_what_the_model_says() {
        let page = include_str!("../../docs/scaling.md");
        let tables = tables(&PARAMETERS, POINTS);
        assert!(page.ends_with(&tables), "docs/scaling.md should end with what `twoshot model` prints:\n{tables}");
    }
}
