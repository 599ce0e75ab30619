//! `twoshot plot`: latency and bus bandwidth of everything that a record timed, side by side. The font is part of the
//! program, so that a machine without any draws the same picture.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::io::BufWriter;
use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use plotters::backend::{BitMapBackend, SVGBackend};
use plotters::coord::Shift;
use plotters::coord::ranged1d::{KeyPointHint, Ranged, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;

use crate::bench::say;
use crate::report::{Record, Row, Times, nccl_version};
use crate::sizes;

/// Draw latency and bus bandwidth of records of `twoshot bench --json`
#[derive(Args, Debug)]
pub struct Plot {
    /// The records; several are drawn into one picture
    #[arg(required = true, value_name = "RECORD")]
    records: Vec<PathBuf>,
    /// The picture, .svg or .png
    #[arg(long, short, value_name = "FILE", default_value = "twoshot.svg")]
    out: PathBuf,
    /// Which times
    #[arg(long, default_value = "graph")]
    way: Way,
}

/// How the calls were made.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub enum Way {
    /// Replays of a captured graph
    Graph,
    /// One call after the other
    Eager,
}

/// Runs it; the exit code is 0, or 2 when there is nothing to draw or no place for it.
pub fn main(plot: &Plot) -> i32 {
    let records = plot.records.iter().map(|path| Record::read(path)).collect::<Result<Vec<_>, _>>();
    match records.and_then(|records| draw(&records, plot.way, &plot.out)) {
        Ok(()) => {
            say(&format!("drawn to {}", plot.out.display()));
            0
        }
        Err(message) => {
            eprintln!("twoshot plot: {message}");
            2
        }
    }
}

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Format {
    Svg,
    Png,
}

fn format(path: &Path) -> Result<Format, String> {
    match path.extension().map(|extension| extension.to_string_lossy().to_ascii_lowercase()).as_deref() {
        Some("svg") => Ok(Format::Svg),
        Some("png") => Ok(Format::Png),
        _ => Err(format!("{}: a picture's name ends in .svg or .png", path.display())),
    }
}

/// Whether a picture of this name can be drawn: asked before anything is measured.
pub fn check(path: &Path) -> Result<(), String> {
    format(path).map(|_| ())
}

/// One line in both panels: bytes, microseconds, GB/s.
#[derive(Clone, Debug, PartialEq)]
struct Line {
    name: String,
    points: Vec<(u64, f64, f64)>,
}

/// Bus bandwidth as nccl-tests counts it, in GB/s: what every link must carry at least.
fn bus(ranks: u32, bytes: u64, us: f64) -> f64 {
    let n = f64::from(ranks);
    2.0 * (n - 1.0) / n * bytes as f64 / us / 1e3
}

/// The types and operations of the records, in words.
fn kinds(records: &[Record]) -> BTreeSet<String> {
    let rows = records.iter().flat_map(|record| &record.rows);
    rows.map(|row| format!("{} {}", row.dtype.name(), row.op.name())).collect()
}

fn lines(records: &[Record], way: Way) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let worlds: BTreeSet<_> = records.iter().map(|record| (&record.gpu, record.ranks)).collect();
    let kinds = kinds(records);
    let releases: BTreeSet<_> = records.iter().map(|record| record.nccl).collect();
    let builds: BTreeSet<_> = records.iter().map(|record| (&record.twoshot, &record.commit)).collect();
    for record in records {
        for row in &record.rows {
            let mut more = String::new();
            if worlds.len() > 1 {
                more.push_str(&format!(", {} x {}", record.ranks, record.gpu));
            }
            if kinds.len() > 1 {
                more.push_str(&format!(", {} {}", row.dtype.name(), row.op.name()));
            }
            if record.unaligned {
                more.push_str(", unaligned");
            }
            let stock = format!("stock NCCL {}{more}", nccl_version(record.nccl));
            let mut ours = format!("twoshot{more}");
            if builds.len() > 1 {
                let commit: String = record.commit.iter().flat_map(|commit| commit.chars().take(7)).collect();
                ours.push_str(&format!(", {} {commit}", record.twoshot));
            }
            if releases.len() > 1 {
                ours.push_str(&format!(", beside NCCL {}", nccl_version(record.nccl)));
            }
            let others = row.others_us.iter().map(|(name, times)| (format!("{name}{more}"), Some(times)));
            let own = [(stock, row.stock_us.as_ref()), (ours, routed(row))];
            for (name, times) in own.into_iter().chain(others) {
                let Some(us) = times.map(|times| median(times, way)).filter(|us| us.is_finite() && *us > 0.0) else {
                    continue;
                };
                let point = (row.bytes, us, bus(record.ranks, row.bytes, us));
                match lines.iter_mut().find(|line| line.name == name) {
                    Some(line) => line.points.push(point),
                    None => lines.push(Line { name, points: vec![point] }),
                }
            }
        }
    }
    for line in &mut lines {
        line.points.sort_by_key(|point| point.0);
    }
    lines
}

/// What went to stock NCCL is not drawn a second time as ours.
fn routed(row: &Row) -> Option<&Times> {
    row.routed_us.as_ref().filter(|_| row.route == "routed")
}

fn median(times: &Times, way: Way) -> f64 {
    match way {
        Way::Graph => times.graph.median,
        Way::Eager => times.eager.median,
    }
}

/// Inches do not matter: pixels of the PNG, units of the SVG.
const SIZE: (u32, u32) = (1280, 620);
const FONT: &str = "sans-serif";
const INK: RGBColor = RGBColor(0x22, 0x22, 0x22);
const FAINT: RGBColor = RGBColor(0xe4, 0xe4, 0xe4);
/// Grey for the first line, stock NCCL; then colours that colour-blind people can tell apart.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0x6b, 0x6b, 0x6b),
    RGBColor(0x00, 0x72, 0xb2),
    RGBColor(0xd5, 0x5e, 0x00),
    RGBColor(0x00, 0x9e, 0x73),
    RGBColor(0xcc, 0x79, 0xa7),
    RGBColor(0xe6, 0x9f, 0x00),
    RGBColor(0x56, 0xb4, 0xe9),
    RGBColor(0x8c, 0x56, 0x4b),
];

/// Draws the records.
pub fn draw(records: &[Record], way: Way, path: &Path) -> Result<(), String> {
    let format = format(path)?;
    let lines = lines(records, way);
    if lines.is_empty() {
        return Err("nothing was timed, there is nothing to draw".to_owned());
    }
    register_font(FONT, FontStyle::Normal, dejavu::sans::regular()).map_err(|_| "the font is broken".to_owned())?;
    let (title, subtitle) = titles(records, way);
    let wrong = |error: std::io::Error| format!("{}: {error}", path.display());
    match format {
        Format::Svg => {
            let mut text = String::new();
            picture(&SVGBackend::with_string(&mut text, SIZE).into_drawing_area(), &lines, &title, &subtitle)?;
            std::fs::write(path, text).map_err(wrong)
        }
        Format::Png => {
            let mut pixels = vec![0; (SIZE.0 * SIZE.1 * 3) as usize];
            let area = BitMapBackend::with_buffer(&mut pixels, SIZE).into_drawing_area();
            picture(&area, &lines, &title, &subtitle)?;
            drop(area);
            let file = BufWriter::new(std::fs::File::create(path).map_err(wrong)?);
            let mut encoder = png::Encoder::new(file, SIZE.0, SIZE.1);
            encoder.set_color(png::ColorType::Rgb);
            encoder.set_depth(png::BitDepth::Eight);
            let written = encoder.write_header().and_then(|mut writer| writer.write_image_data(&pixels));
            written.map_err(|error| format!("{}: {error}", path.display()))
        }
    }
}

fn titles(records: &[Record], way: Way) -> (String, String) {
    let unique = |word: &dyn Fn(&Record) -> String| {
        let words: BTreeSet<_> = records.iter().map(word).filter(|word| !word.is_empty()).collect();
        words.into_iter().collect::<Vec<_>>().join(" and ")
    };
    let gpus = unique(&|record| format!("{} x {}", record.ranks, record.gpu));
    let kinds = kinds(records).into_iter().collect::<Vec<_>>().join(", ");
    let way = if way == Way::Graph { "captured in CUDA graphs" } else { "eager calls" };
    let title = format!("AllReduce, {kinds}, {gpus}, {way}");
    let twoshot = unique(&|record| record.twoshot.clone());
    let date = unique(&|record| record.date.chars().take(10).collect());
    let mode = unique(&|record| record.mode.clone());
    let mode = if mode == "measured" { String::new() } else { format!("; NOT A MEASUREMENT: {mode}") };
    (title, format!("twoshot {twoshot}, {date}; median of the slowest rank{mode}"))
}

/// A text in the picture.
fn text(size: i32, colour: RGBColor) -> TextStyle<'static> {
    (FONT, size).into_font().color(&colour)
}

fn picture<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    lines: &[Line],
    title: &str,
    subtitle: &str,
) -> Result<(), String> {
    let wrong = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
    area.fill(&WHITE).map_err(wrong)?;
    area.draw(&Text::new(title.to_owned(), (24, 16), text(22, INK))).map_err(wrong)?;
    area.draw(&Text::new(subtitle.to_owned(), (24, 46), text(14, COLOURS[0]))).map_err(wrong)?;
    let panels = area.margin(76, 34, 12, 16).split_evenly((1, 2));
    panel(&panels[0], lines, "latency, us (lower is better)", |point| point.1)?;
    panel(&panels[1], lines, "bus bandwidth, GB/s (higher is better)", |point| point.2)?;
    legend(area, lines)?;
    area.present().map_err(wrong)
}

/// Powers of one number inside a range, with marks where people expect them.
struct Powers {
    low: f64,
    high: f64,
    base: f64,
    text: fn(f64) -> String,
    /// At most so many marks.
    most: usize,
}

impl Ranged for Powers {
    type FormatOption = plotters::coord::ranged1d::NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, limit: (i32, i32)) -> i32 {
        let share = (value / self.low).ln() / (self.high / self.low).ln();
        limit.0 + ((f64::from(limit.1 - limit.0)) * share).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        let first = (self.low.ln() / self.base.ln() - 1e-9).ceil() as i32;
        let last = (self.high.ln() / self.base.ln() + 1e-9).floor() as i32;
        let mut all: Vec<f64> = (first..=last).map(|power| self.base.powi(power)).collect();
        if self.base >= 10.0 && all.len() < 4 {
            // 1, 2, 5 in every decade where there are few decades.
            let steps = (first - 1..=last).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10f64.powi(power)));
            all = steps.filter(|value| (self.low * 0.999..=self.high * 1.001).contains(value)).collect();
        }
        let stride = all.len().div_ceil(self.most).max(1);
        all.into_iter().step_by(stride).collect()
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.low..self.high
    }
}

impl ValueFormatter<f64> for Powers {
    fn format_ext(&self, value: &f64) -> String {
        (self.text)(*value)
    }
}

fn bytes_text(value: f64) -> String {
    sizes::format(value.round() as u64)
}

fn number_text(value: f64) -> String {
    if value >= 1.0 { format!("{value:.0}") } else { format!("{value}").chars().take(6).collect() }
}

fn panel<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    lines: &[Line],
    caption: &str,
    value: impl Fn(&(u64, f64, f64)) -> f64 + Copy,
) -> Result<(), String> {
    let wrong = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
    let all = || lines.iter().flat_map(|line| &line.points);
    let extent = |of: &dyn Fn(&(u64, f64, f64)) -> f64| {
        let values = || all().map(of);
        (values().fold(f64::INFINITY, f64::min), values().fold(0.0, f64::max))
    };
    let (left, right) = extent(&|point| point.0 as f64);
    let (bottom, top) = extent(&value);
    let x = Powers { low: left / 1.25, high: right * 1.25, base: 2.0, text: bytes_text, most: 9 };
    let y = Powers { low: bottom / 1.4, high: top * 1.4, base: 10.0, text: number_text, most: 12 };
    let mut chart = ChartBuilder::on(area)
        .margin_right(14)
        .caption(caption, text(16, INK))
        .x_label_area_size(44)
        .y_label_area_size(58)
        .build_cartesian_2d(x, y)
        .map_err(wrong)?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(FAINT)
        .axis_style(INK)
        .x_desc("payload per rank")
        .label_style(text(13, INK))
        .axis_desc_style(text(14, INK))
        .draw()
        .map_err(wrong)?;
    for (index, line) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        let points = || line.points.iter().map(|point| (point.0 as f64, value(point)));
        chart.draw_series(LineSeries::new(points(), colour.stroke_width(2))).map_err(wrong)?;
        chart.draw_series(points().map(|at| Circle::new(at, 3, colour.filled()))).map_err(wrong)?;
    }
    Ok(())
}

/// One row of names under the panels.
fn legend<B: DrawingBackend>(area: &DrawingArea<B, Shift>, lines: &[Line]) -> Result<(), String> {
    let wrong = |error: DrawingAreaErrorKind<B::ErrorType>| error.to_string();
    let (mut x, y) = (70, SIZE.1 as i32 - 20);
    for (index, line) in lines.iter().enumerate() {
        let colour = COLOURS[index % COLOURS.len()];
        area.draw(&PathElement::new(vec![(x, y), (x + 30, y)], colour.stroke_width(3))).map_err(wrong)?;
        area.draw(&Circle::new((x + 15, y), 4, colour.filled())).map_err(wrong)?;
        area.draw(&Text::new(line.name.clone(), (x + 38, y - 6), text(14, INK))).map_err(wrong)?;
        let width = area.estimate_text_size(&line.name, &text(14, INK)).map_err(wrong)?.0;
        x += 38 + width as i32 + 30;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn times(us: f64) -> Value {
        let figure = |us: f64| json!({"median": us, "min": us, "max": us});
        json!({"eager": figure(us * 2.0), "graph": figure(us), "host": figure(1.0)})
    }

    fn record() -> Record {
        let row = |bytes: u64, stock: f64, ours: f64, route: &str| {
            json!({"dtype": "bf16", "bytes": bytes, "count": bytes / 2, "route": route, "verified_calls": 1,
                "compared_elements": 1, "wrong_stock": 0, "wrong_routed": 0, "stock_us": times(stock),
                "routed_us": times(ours), "others_us": {"FlashInfer": times(stock / 2.0)}})
        };
        serde_json::from_value(json!({"format": 1, "date": "2026-11-22T00:00:00Z", "mode": "measured",
            "gpu": "NVIDIA H100", "arch": 90, "ranks": 4, "hosts": 1, "driver": "", "cuda": 13000, "nccl": 22809,
            "twoshot": "0.1.0", "repetitions": 9, "rows": [row(1 << 20, 20.0, 8.0, "routed"),
                row(1024, 9.0, 2.5, "routed"), row(64 << 20, 320.0, 320.0, "stock")]}))
        .unwrap()
    }

    #[test]
    fn a_library_that_was_timed_in_graphs_only_has_a_line_there_and_none_among_eager_calls() {
        let mut row = serde_json::to_value(record()).unwrap();
        let graph = times(3.0)["graph"].clone();
        row["rows"][0]["others_us"] = json!({"FlashInfer": {"graph": graph}});
        let record: Record = serde_json::from_value(row).unwrap();
        let points = |way| {
            lines(std::slice::from_ref(&record), way)
                .iter()
                .find(|line| line.name == "FlashInfer")
                .map(|line| line.points.len())
        };
        assert_eq!((points(Way::Graph), points(Way::Eager)), (Some(3), Some(2)));
    }

    #[test]
    fn every_path_that_was_timed_is_a_line_and_what_went_to_stock_is_not_drawn_as_ours() {
        let found = lines(&[record()], Way::Graph);
        let names: Vec<_> = found.iter().map(|line| (line.name.as_str(), line.points.len())).collect();
        assert_eq!(names, [("stock NCCL 2.28.9", 3), ("twoshot", 2), ("FlashInfer", 3)]);
        assert_eq!(found[1].points[0], (1024, 2.5, bus(4, 1024, 2.5)), "in order of size");
        assert_eq!(lines(&[record()], Way::Eager)[1].points[0].1, 5.0);
        let mut other = record();
        other.rows.iter_mut().for_each(|row| row.op = crate::element::Op::Max);
        let names: Vec<_> = lines(&[record(), other], Way::Graph).into_iter().map(|line| line.name).collect();
        assert!(names.contains(&"twoshot, bf16 sum".to_owned()) && names.contains(&"twoshot, bf16 max".to_owned()));
    }

    #[test]
    fn bus_bandwidth_is_counted_as_nccl_tests_does() {
        assert!((bus(4, 64 << 20, 323.0) - 311.6).abs() < 0.1);
        assert!((bus(2, 1_000_000, 1000.0) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn both_kinds_of_picture_are_drawn_without_a_font_of_the_system() {
        let folder = std::env::temp_dir().join(format!("twoshot-plot-{}", std::process::id()));
        std::fs::create_dir(&folder).unwrap();
        let (svg, png) = (folder.join("x.svg"), folder.join("x.PNG"));
        draw(&[record()], Way::Graph, &svg).unwrap();
        draw(&[record()], Way::Graph, &png).unwrap();
        let text = std::fs::read_to_string(&svg).unwrap();
        for word in ["stock NCCL 2.28.9", "twoshot", "FlashInfer", "64M", "bus bandwidth", "4 x NVIDIA H100"] {
            assert!(text.contains(word), "no {word}");
        }
        let decoder = png::Decoder::new(std::io::BufReader::new(std::fs::File::open(&png).unwrap()));
        let mut reader = decoder.read_info().unwrap();
        let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
        reader.next_frame(&mut pixels).unwrap();
        let coloured = |colour: RGBColor| pixels.chunks(3).filter(|p| **p == [colour.0, colour.1, colour.2]).count();
        assert!(coloured(COLOURS[1]) > 300 && coloured(INK) > 300, "lines and letters");
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn nothing_timed_and_unknown_kinds_of_picture_are_refused() {
        let mut untimed = record();
        untimed.rows.iter_mut().for_each(|row| {
            (row.stock_us, row.routed_us) = (None, None);
            row.others_us.clear();
        });
        assert!(draw(&[untimed], Way::Graph, Path::new("/nowhere/x.svg")).unwrap_err().contains("nothing was timed"));
        assert!(check(Path::new("x.gif")).is_err() && check(Path::new("x")).is_err());
    }

    #[test]
    fn marks_lie_inside_and_are_never_too_many() {
        let axis = |low, high, base| Powers { low, high, base, text: number_text, most: 9 };
        let marks = |axis: Powers| axis.key_points(9_usize);
        assert_eq!(marks(axis(2.0, 30.0, 10.0)), [2.0, 5.0, 10.0, 20.0]);
        assert!(marks(axis(8.0, 1e9, 2.0)).len() <= 9);
        assert!(marks(axis(2.1, 2.9, 10.0)).len() <= 9);
    }
}
