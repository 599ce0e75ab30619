//! The worlds of the fault tests, and what set-up calls in each of them.

use std::collections::BTreeMap;
use std::time::Duration;

use twoshot_sim::Topology;

use crate::common::{Job, Report};

/// The library whose calls fault rules concern and statistics count apart.
const LIBRARY: &str = "libtwoshot.so";

/// How the ranks share memory.
#[derive(Clone, Copy, Debug, Eq, Ord, PartialEq, PartialOrd)]
pub enum World {
    /// Three ranks of one host, by descriptors, with multicast.
    OneHost,
    /// Two hosts of two ranks, by fabric handles, with multicast.
    Fabric,
}

impl World {
    pub const ALL: [Self; 2] = [Self::OneHost, Self::Fabric];

    pub fn ranks(self) -> usize {
        match self {
            Self::OneHost => 3,
            Self::Fabric => 4,
        }
    }

    pub fn topology(self) -> Topology {
        match self {
            Self::OneHost => Topology::one_host(3),
            Self::Fabric => Topology::fabric(2, 2),
        }
    }

    /// A job in this world whose fault rules concern the library alone.
    pub fn job(self, program: &str) -> Job {
        Job::new(self.topology(), program)
            .env("TWOSHOT_SIM_CALLER", LIBRARY)
            // Small windows and grids: what is tested is the order of calls, not their size.
            .env("TWOSHOT_MAX_BYTES", "64K")
            .env("TWOSHOT_ONESHOT_MAX_BYTES", "16K")
            .env("TWOSHOT_MAX_BLOCKS", 1)
            .timeout(Duration::from_secs(60))
    }

    /// How often each entry is used by set-up, and by set-up and the end together, on each rank.
    pub fn census(self) -> Vec<BTreeMap<String, Uses>> {
        // The first collective sets the communicator up; an AllReduce would already be routed.
        let begun = self.job("collective name=allgather count=64; barrier; leave").run();
        let ended = self.job("collective name=allgather count=64; barrier; destroy").run();
        for report in [&begun, &ended] {
            report.expect_success().expect_on();
        }
        (0..self.ranks())
            .map(|rank| {
                let (begun, ended) = (own_calls(&begun, rank), own_calls(&ended, rank));
                let uses = |name: &str, total: u64| Uses { setup: begun.get(name).copied().unwrap_or(0), total };
                ended.iter().map(|(name, total)| (name.clone(), uses(name, *total))).collect()
            })
            .collect()
    }
}

/// How often an entry is used.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Uses {
    pub setup: u64,
    pub total: u64,
}

/// The entries that the library called on one rank, and how often.
pub fn own_calls(report: &Report, rank: usize) -> BTreeMap<String, u64> {
    let stats = report.session.stats(report.outcomes[rank].pid).expect("stats of a rank");
    // Only the library asks NVML here, so its calls need no telling apart.
    let own = stats.iter().filter_map(|(name, uses)| {
        let name = name.strip_prefix("own.").or_else(|| name.strip_prefix("call.").filter(|n| n.starts_with("nvml")));
        name.map(|name| (name.to_owned(), uses))
    });
    own.filter(|(_, uses)| *uses > 0).collect()
}
