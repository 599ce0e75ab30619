//! Communicators that span hosts: this host's facts merged with those of others, or with a twin of itself.
#![forbid(unsafe_code)]

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;

use twoshot::decline::Decline;
use twoshot::domain::merge;
use twoshot::report;
use twoshot::wire::Facts;

use super::Verdict;

/// One host as `doctor --json` writes it: a line of digits per GPU.
pub fn written(facts: &[Facts]) -> Vec<String> {
    facts.iter().map(report::line).collect()
}

/// Reports are a few kilobytes; a path that leads elsewhere must not fill the memory.
const MOST_BYTES: u64 = 1 << 20;

/// The GPUs of another host, from its report.
fn read(path: &PathBuf) -> Result<Vec<Facts>, String> {
    let wrong = |what: &str| format!("{}: {what}", path.display());
    let mut text = Vec::new();
    let file = File::open(path).map_err(|error| wrong(&error.to_string()))?;
    file.take(MOST_BYTES).read_to_end(&mut text).map_err(|error| wrong(&error.to_string()))?;
    report::read(&text).map_err(|what| wrong(&what))
}

/// As if every GPU here had a counterpart on a second host of the same cluster and clique.
fn twin(own: &[Facts]) -> Vec<Facts> {
    let other = |facts: &Facts| {
        let mut twin = *facts;
        twin.host = twin.host.map(|byte| !byte);
        twin.gpu = twin.gpu.map(|byte| !byte);
        twin
    };
    own.iter().map(other).collect()
}

/// What the ranks of a communicator over all these hosts would conclude: the library's own merge.
pub fn judge(own: &[Facts], refusal: Option<&(Decline, String)>, others: &[PathBuf]) -> Verdict {
    let mut all = own.to_vec();
    let mut names = vec!["this host".to_owned(); own.len()];
    for path in others {
        match read(path) {
            Ok(facts) => {
                names.extend(vec![path.display().to_string(); facts.len()]);
                all.extend(facts);
            }
            Err(text) => return Verdict { routed: false, reason: None, text },
        }
    }
    if others.is_empty() {
        names.extend(vec!["a host like this one".to_owned(); own.len()]);
        all.extend(twin(own));
    }
    let ranks = all.len() as u32;
    let placed = (0..).zip(&all).map(|(rank, facts)| Facts { rank, ranks, ..*facts }.encode());
    match merge(&placed.collect::<Vec<_>>()) {
        Err(declined) => {
            let place = names.get(declined.rank as usize).map_or("?", String::as_str);
            Verdict::declined(declined.reason, &format!("rank {}, {place}", declined.rank))
        }
        Ok(_) if refusal.is_some() => {
            let (reason, detail) = refusal.map_or((Decline::Probe, ""), |(reason, detail)| (*reason, detail));
            Verdict::declined(reason, detail)
        }
        Ok(domain) => {
            let others = if others.is_empty() { "any host of this cluster and clique" } else { "the hosts given" };
            let text = match domain.hosts {
                1 => "all GPUs given are of one host".to_owned(),
                _ => format!("AllReduce over GPUs of this host and of {others} would be routed"),
            };
            Verdict { routed: domain.hosts > 1, reason: None, text }
        }
    }
}
