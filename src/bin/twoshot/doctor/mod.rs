//! `twoshot doctor`: one screen that says whether AllReduce over the visible GPUs would be routed, and if not, why and
//! what to do. It looks and probes; it changes nothing, and makes multicast calls only where they are asked for.
#![forbid(unsafe_code)]

mod across;
mod gpu;
mod host;
mod multicast;
mod process;

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use twoshot::config::Config;
use twoshot::decline::Decline;
use twoshot::domain::merge;
use twoshot::setup::{HostIdentity, payloads};
use twoshot::table::{World, row};

use crate::sizes;

/// Say whether AllReduce over the visible GPUs would be routed, and if not, why
#[derive(Args, Debug)]
pub struct Doctor {
    /// For programs; also what `--with` reads on another host
    #[arg(long)]
    json: bool,
    /// Let the exit code say whether communicators that span hosts would be routed
    #[arg(long)]
    across_hosts: bool,
    /// Reports of other hosts (`twoshot doctor --json`): would a communicator over all of them be routed?
    #[arg(long, value_name = "FILE")]
    with: Vec<PathBuf>,
    /// Also create a multicast object, add all GPUs and release it (never where the environment switches multicast off)
    #[arg(long)]
    try_multicast: bool,
    /// Also look at the libraries of a running process
    #[arg(long)]
    pid: Option<u32>,
    /// List every variable that bears on the matter, not only those that are set
    #[arg(long)]
    variables: bool,
    /// The file system to look at, such as a container's /proc/PID/root
    #[arg(long, value_name = "PATH", default_value = "/")]
    root: PathBuf,
}

/// How a finding bears on the verdict.
#[derive(Clone, Copy, Debug, Eq, PartialEq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Mark {
    Ok,
    /// Neither good nor bad.
    Info,
    /// Works, but not as it could, or not everywhere.
    Warn,
    /// Keeps AllReduce with stock NCCL.
    Fail,
}

/// One line.
#[derive(Clone, Debug, Serialize)]
struct Finding {
    mark: Mark,
    topic: &'static str,
    text: String,
}

/// What was found, in the order in which it is shown.
#[derive(Debug, Default, Serialize)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(&mut self, mark: Mark, topic: &'static str, text: impl Into<String>) {
        self.0.push(Finding { mark, topic, text: text.into() });
    }
}

/// The end of it.
#[derive(Debug, Serialize)]
struct Verdict {
    routed: bool,
    /// `twoshot::decline`'s word, where one applies.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<&'static str>,
    text: String,
}

impl Verdict {
    fn declined(reason: Decline, detail: &str) -> Self {
        let text = if detail.is_empty() { reason.hint().to_owned() } else { format!("{} ({detail})", reason.hint()) };
        Self { routed: false, reason: Some(reason.name()), text }
    }
}

#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    findings: Findings,
    /// Of the GPUs that are visible here.
    verdict: Verdict,
    /// Of communicators that span hosts.
    across_hosts: Verdict,
    /// What the ranks would tell each other, for `--with`.
    gpus: Vec<String>,
}

/// Runs it; the exit code is 0 when AllReduce would be routed: over the visible GPUs, or with `--across-hosts` or
/// `--with` over several hosts; else 1.
pub fn main(doctor: &Doctor) -> i32 {
    let report = examine(doctor);
    let mut out = std::io::stdout().lock();
    // A reader that went away changes nothing about the verdict.
    let _ = if doctor.json {
        serde_json::to_writer_pretty(&mut out, &report).map_err(std::io::Error::other).and_then(|()| writeln!(out))
    } else {
        write!(out, "{}", shown(&report))
    };
    let across = doctor.across_hosts || !doctor.with.is_empty();
    i32::from(!if across { report.across_hosts.routed } else { report.verdict.routed })
}

fn examine(doctor: &Doctor) -> Report {
    let mut findings = Findings::default();
    let parsed = Config::parse(|name| std::env::var_os(name));
    let invalid = parsed.as_ref().err().map(ToString::to_string);
    let config = parsed.unwrap_or_default().with_tuning(twoshot::tuning::read);
    let gpus = gpu::examine(&mut findings, doctor, &config);
    let libraries = host::libraries(&mut findings);
    host::variables(&mut findings, &config, invalid.as_deref(), doctor.variables);
    let host = host::container(&mut findings, &config, &doctor.root);
    if let Some(pid) = doctor.pid {
        process::examine(&mut findings, &doctor.root, pid);
    }
    let version = env!("CARGO_PKG_VERSION");
    let facts = gpus.as_ref().map(|gpus| named(&gpus.facts, &config)).unwrap_or_default();
    let refusal = gpus.as_ref().ok().and_then(|gpus| gpus.refusal_across.clone());
    let verdict = verdict(&mut findings, &config, invalid, gpus, host, libraries);
    // What keeps any call with stock NCCL keeps those across hosts too.
    let everywhere = ["no-nvlink", "one-rank", "shared-gpu"];
    let across_hosts = match verdict.reason {
        Some(reason) if !everywhere.contains(&reason) => Verdict { text: verdict.text.clone(), ..verdict },
        _ => across::judge(&facts, refusal.as_ref(), &doctor.with),
    };
    Report { version, findings, verdict, across_hosts, gpus: across::written(&facts) }
}

/// The facts with this host's identity, as they would travel.
fn named(facts: &[twoshot::wire::Facts], config: &Config) -> Vec<twoshot::wire::Facts> {
    let host = HostIdentity::read(config).map(|identity| identity.bytes()).unwrap_or_default();
    facts.iter().map(|facts| twoshot::wire::Facts { host, ..*facts }).collect()
}

/// The library's own merge of all ranks' facts decides, so that doctor cannot say something else than set-up will.
fn verdict(
    findings: &mut Findings,
    config: &Config,
    invalid: Option<String>,
    gpus: Result<gpu::Gpus, String>,
    host: Result<(), (Decline, String)>,
    libraries: Result<(), (&'static str, String)>,
) -> Verdict {
    let declined = Verdict::declined;
    let gpus = match gpus {
        Ok(gpus) => gpus,
        Err(why) => return declined(Decline::Probe, &why),
    };
    if let Some(message) = invalid {
        return declined(Decline::InvalidConfig, &message);
    }
    if !config.enable || config.mode == twoshot::config::Mode::Off {
        let detail = if config.enable { "TWOSHOT_MODE=off" } else { "" };
        return declined(Decline::Disabled, detail);
    }
    if let Some(words) = config.forbidden {
        return declined(Decline::Forbidden, words);
    }
    let ranks = gpus.facts.len();
    let domain = match merge(&gpus.facts.iter().map(twoshot::wire::Facts::encode).collect::<Vec<_>>()) {
        Ok(domain) => domain,
        Err(refusal) => {
            let detail = if ranks < 2 { format!("{ranks} visible") } else { format!("GPU {}", refusal.rank) };
            return declined(refusal.reason, &detail);
        }
    };
    if let Some((reason, detail)) = gpus.refusal {
        return declined(reason, &detail);
    }
    if let Err((reason, detail)) = host {
        return declined(reason, &detail);
    }
    if let Err((reason, text)) = libraries {
        return Verdict { routed: false, reason: Some(reason), text };
    }
    // The NCCL that a program brings along may be another; the row for its release is then another, too.
    let nccl = crate::measure::stock(None).map_or(0, |(_, version)| twoshot::tuning::band(version));
    let world =
        World { ranks: ranks as u32, arch: domain.arch, multicast: domain.multicast, hosts: domain.hosts, nccl };
    let limits = tuned(findings, config, world).unwrap_or_else(|| row(world));
    let (one, two, bulk) = payloads(config, limits);
    let bulk = if domain.multicast { 0 } else { bulk };
    let most = two.max(bulk);
    let source = limits.source.name();
    let way = if domain.multicast { "multicast, else unicast" } else { "unicast" };
    findings.add(
        Mark::Info,
        "cross-over",
        format!(
            "one-shot to {}, two-shot to {}{}, stock above ({source}; {way})",
            sizes::format(one),
            sizes::format(two),
            if bulk > two { format!(", bulk to {}", sizes::format(bulk)) } else { String::new() },
        ),
    );
    let text = format!("AllReduce up to {} over the {ranks} visible GPUs would be routed", sizes::format(most));
    Verdict { routed: true, reason: None, text }
}

/// The row of the tuning file, if there is one for this world. What is wrong with the file is no reason for stock NCCL.
fn tuned(findings: &mut Findings, config: &Config, world: World) -> Option<twoshot::table::Row> {
    let tuning = match config.tuning.as_ref()? {
        Ok(tuning) => tuning,
        Err(why) => {
            findings.add(Mark::Warn, "tuning", format!("{why}: no rank will use a tuning file"));
            return None;
        }
    };
    let found = tuning.row(world);
    if found.is_none() {
        let (rows, ranks) = (tuning.rows.len(), world.ranks);
        let nccl = twoshot::tuning::band_name(world.nccl);
        let text = format!("none of the {rows} row(s) is for {ranks} ranks here with NCCL {nccl}: the table is used");
        findings.add(Mark::Info, "tuning", text);
    }
    found
}

fn shown(report: &Report) -> String {
    let mut text = format!("twoshot {}\n", report.version);
    let mut last = "";
    for Finding { mark, topic, text: words } in &report.findings.0 {
        let mark = match mark {
            Mark::Ok => "ok  ",
            Mark::Info => "    ",
            Mark::Warn => "warn",
            Mark::Fail => "FAIL",
        };
        let topic = if *topic == last { "" } else { topic };
        text.push_str(&format!("{mark} {topic:<12} {words}\n"));
        if !topic.is_empty() {
            last = topic;
        }
    }
    text.push('\n');
    for (place, verdict) in [("here", &report.verdict), ("across hosts", &report.across_hosts)] {
        let Verdict { routed, reason, text: words } = verdict;
        let word = match (routed, reason) {
            (true, _) => "ROUTED".to_owned(),
            (false, Some(reason)) => format!("STOCK NCCL, {reason}"),
            (false, None) => "STOCK NCCL".to_owned(),
        };
        text.push_str(&format!("{place}: {word}: {words}\n"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use twoshot::driver::FabricFacts;
    use twoshot::wire::Facts;

    fn gpus(count: u32, change: impl Fn(&mut Facts)) -> gpu::Gpus {
        let facts = (0..count).map(|rank| {
            let fabric = FabricFacts { completed: true, ..FabricFacts::default() };
            let mut facts = Facts {
                ranks: count,
                rank,
                gpu: [rank as u8 + 1; 16],
                arch: 90,
                blocks: 132,
                vmm: true,
                fd_handles: true,
                fabric,
                ..Facts::default()
            };
            change(&mut facts);
            facts
        });
        gpu::Gpus { facts: facts.collect(), refusal: None, refusal_across: None }
    }

    fn judged(config: Config, gpus: Result<gpu::Gpus, String>) -> Verdict {
        verdict(&mut Findings::default(), &config, None, gpus, Ok(()), Ok(()))
    }

    #[test]
    fn four_linked_gpus_are_routed() {
        let verdict = judged(Config::default(), Ok(gpus(4, |_| {})));
        assert!(verdict.routed && verdict.reason.is_none() && verdict.text.contains("4 visible GPUs"));
    }

    #[test]
    fn every_obstacle_is_named_by_its_reason() {
        let reason = |config, gpus| judged(config, gpus).reason;
        let fine = || Ok(gpus(4, |_| {}));
        let set = |change: fn(&mut Config)| {
            let mut config = Config::default();
            change(&mut config);
            config
        };
        assert_eq!(reason(Config::default(), Err("no driver".to_owned())), Some("probe"));
        assert_eq!(reason(Config::default(), Ok(gpus(1, |_| {}))), Some("one-rank"));
        assert_eq!(reason(Config::default(), Ok(gpus(2, |f| f.arch = 80))), Some("architecture"));
        assert_eq!(reason(Config::default(), Ok(gpus(2, |f| f.fd_handles = false))), Some("no-virtual-memory"));
        assert_eq!(reason(set(|c| c.enable = false), fine()), Some("disabled"));
        assert_eq!(reason(set(|c| c.mode = twoshot::config::Mode::Off), fine()), Some("disabled"));
        assert_eq!(reason(set(|c| c.forbidden = Some("NCCL_P2P_DISABLE=1")), fine()), Some("forbidden"));
        let unlinked =
            gpu::Gpus { refusal: Some((Decline::NoNvlink, "GPU 0 and GPU 1".to_owned())), ..gpus(2, |_| {}) };
        assert_eq!(reason(Config::default(), Ok(unlinked)), Some("no-nvlink"));
    }

    #[test]
    fn a_screen_shows_a_topic_once_and_ends_with_the_verdict() {
        let mut findings = Findings::default();
        findings.add(Mark::Ok, "GPU", "first");
        findings.add(Mark::Fail, "GPU", "second");
        let verdict = Verdict { routed: false, reason: Some("no-nvlink"), text: "words".to_owned() };
        let across_hosts = Verdict { routed: true, reason: None, text: "more words".to_owned() };
        let text = shown(&Report { version: "1.2.3", findings, verdict, across_hosts, gpus: Vec::new() });
        assert_eq!(text.lines().filter(|line| line.contains("GPU")).count(), 1);
        assert!(text.ends_with("here: STOCK NCCL, no-nvlink: words\nacross hosts: ROUTED: more words\n"), "{text}");
    }
}
