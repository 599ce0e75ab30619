//! Whether the ranks of a communicator form one NVLink domain: a pure merge of every rank's facts, with the same
//! result on every rank.
#![forbid(unsafe_code)]

use std::time::Duration;

use crate::decline::Decline;
use crate::driver::HandleType;
use crate::wire::{Blob, Facts};

/// Longest deadline of a step that is believed.
pub const LONGEST: Duration = Duration::from_hours(1);
/// Oldest compute capability with kernels.
pub const MIN_ARCH: u32 = 90;

/// What the ranks have in common.
#[derive(Clone, Debug, Eq, PartialEq)]
pub struct Domain {
    /// Facts by rank.
    pub facts: Vec<Facts>,
    /// How memory handles travel.
    pub handle: HandleType,
    /// Number of hosts.
    pub hosts: u32,
    /// Lowest compute capability.
    pub arch: u32,
    /// Smallest block budget.
    pub blocks: u32,
    /// All ranks were told how many blocks to take, so the table has no say.
    pub chosen_blocks: bool,
    /// Every rank can and wants multicast.
    pub multicast: bool,
    /// Every rank wants the switch to make sums, and has multicast.
    pub switch_reduce: bool,
    /// Minor release of stock NCCL; 0 where the ranks have different ones.
    pub nccl: u32,
    /// What the ranks make of their tuning files.
    pub tuned: Tuned,
    /// The longest deadline that any rank gives a step: so long the others wait for it.
    pub deadline: Duration,
    /// Every rank has seen all operations that were made for this communicator.
    pub operations: bool,
}

/// The common verdict on tuning files.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Tuned {
    /// No rank has one.
    Unset,
    /// All ranks have the same one.
    Agreed,
    /// This rank is the first whose file cannot be used or is not rank 0's: no rank uses any.
    Ignored {
        /// Which one.
        rank: u32,
    },
}

/// `facts` of all ranks.
fn tuned(facts: &[Facts]) -> Tuned {
    let first = facts.first().map_or(0, |facts| facts.tuning);
    match (0u32..).zip(facts).find(|(_, facts)| facts.tuning == UNUSABLE || facts.tuning != first) {
        Some((rank, _)) => Tuned::Ignored { rank },
        None if first == 0 => Tuned::Unset,
        None => Tuned::Agreed,
    }
}

/// [`Facts::tuning`] of a file that cannot be used.
pub const UNUSABLE: u64 = 1;

/// Why there is no domain.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Declined {
    /// The reason.
    pub reason: Decline,
    /// The first rank it holds for.
    pub rank: u32,
    /// A driver or system code that explains it, or 0.
    pub code: i32,
}

impl std::fmt::Display for Declined {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (rank {}", self.reason.name(), self.rank)?;
        if self.code != 0 {
            write!(f, ", code {}", self.code)?;
        }
        write!(f, "): {}", self.reason.hint())
    }
}

/// Merges all ranks' blobs.
pub fn merge(blobs: &[Blob]) -> Result<Domain, Declined> {
    let declined = |reason, rank: usize| Declined { reason, rank: rank as u32, code: 0 };
    let facts = blobs
        .iter()
        .enumerate()
        .map(|(rank, blob)| {
            let facts = Facts::decode(blob).ok_or(declined(Decline::Foreign, rank))?;
            let placed = facts.rank as usize == rank && facts.ranks as usize == blobs.len();
            if placed { Ok(facts) } else { Err(declined(Decline::Foreign, rank)) }
        })
        .collect::<Result<Vec<_>, _>>()?;
    let Some(first) = facts.first().copied() else { return Err(declined(Decline::OneRank, 0)) };
    // A rank's own verdict says more than what the others conclude from its facts.
    if let Some((rank, (reason, code))) =
        facts.iter().enumerate().find_map(|(rank, facts)| facts.declined.map(|declined| (rank, declined)))
    {
        return Err(Declined { reason, rank: rank as u32, code });
    }
    let require = |reason, holds: &dyn Fn(&Facts) -> bool| match facts.iter().position(|facts| !holds(facts)) {
        Some(rank) => Err(declined(reason, rank)),
        None => Ok(()),
    };
    if facts.len() < 2 {
        return Err(declined(Decline::OneRank, 0));
    }
    require(Decline::VersionDiffers, &|f| f.build == first.build)?;
    require(Decline::ConfigDiffers, &|f| f.config == first.config)?;
    require(Decline::BindingDiffers, &|f| f.bound == first.bound)?;
    require(Decline::Architecture, &|f| f.arch >= MIN_ARCH)?;
    require(Decline::NoVirtualMemory, &|f| f.vmm)?;
    for (rank, own) in facts.iter().enumerate() {
        if !own.shared_gpu && facts[..rank].iter().any(|other| other.gpu == own.gpu) {
            return Err(declined(Decline::SharedGpu, rank));
        }
    }
    let mut hosts: Vec<_> = facts.iter().map(|f| f.host).collect();
    hosts.sort_unstable();
    hosts.dedup();
    let handle = if hosts.len() == 1 {
        require(Decline::NoVirtualMemory, &|f| f.fd_handles)?;
        HandleType::Fd
    } else {
        require(Decline::FabricDisabled, &|f| f.mnnvl)?;
        require(Decline::NoFabric, &|f| f.fabric.completed && f.fabric.uuid != [0; 16])?;
        require(Decline::OtherCluster, &|f| f.fabric.uuid == first.fabric.uuid)?;
        require(Decline::OtherClique, &|f| f.fabric.clique == first.fabric.clique)?;
        require(Decline::FabricHandle, &|f| f.fabric_handles)?;
        HandleType::Fabric
    };
    Ok(Domain {
        handle,
        hosts: hosts.len() as u32,
        arch: facts.iter().map(|f| f.arch).min().unwrap_or(0),
        blocks: facts.iter().map(|f| f.blocks).min().unwrap_or(1).max(1),
        chosen_blocks: facts.iter().all(|f| f.chosen_blocks),
        multicast: facts.iter().all(|f| f.multicast),
        switch_reduce: facts.iter().all(|f| f.multicast && f.switch_reduce),
        nccl: if facts.iter().all(|f| f.nccl == first.nccl) { first.nccl } else { 0 },
        tuned: tuned(&facts),
        deadline: facts
            .iter()
            .map(|f| Duration::from_millis(f.deadline_ms.into()))
            .max()
            .unwrap_or_default()
            .min(LONGEST),
        operations: facts.iter().all(|f| f.operations),
        facts,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::FabricFacts;
    use proptest::prelude::*;

    fn rank(rank: u32, ranks: u32, host: u8) -> Facts {
        Facts {
            ranks,
            rank,
            host: [host; 16],
            gpu: [rank as u8 + 1; 16],
            arch: 90,
            blocks: 132,
            vmm: true,
            fd_handles: true,
            fabric_handles: true,
            multicast: true,
            mnnvl: true,
            fabric: FabricFacts { completed: true, uuid: [9; 16], clique: 7 },
            ..Facts::default()
        }
    }

    fn merged(facts: &[Facts]) -> Result<Domain, Declined> {
        merge(&facts.iter().map(Facts::encode).collect::<Vec<_>>())
    }

    fn two_hosts() -> Vec<Facts> {
        (0..4).map(|r| rank(r, 4, r as u8 / 2)).collect()
    }

    #[track_caller]
    fn declines(change: impl Fn(&mut Facts), reason: Decline) {
        let mut facts = two_hosts();
        change(&mut facts[2]);
        let declined = merged(&facts).unwrap_err();
        assert_eq!((declined.reason, declined.rank), (reason, 2));
    }

    #[test]
    fn one_host_shares_by_descriptor_and_needs_no_fabric() {
        let mut facts: Vec<_> = (0..4).map(|r| rank(r, 4, 1)).collect();
        for f in &mut facts {
            f.fabric = FabricFacts::default();
            f.fabric_handles = false;
            f.mnnvl = false;
        }
        let domain = merged(&facts).unwrap();
        assert_eq!((domain.handle, domain.hosts), (HandleType::Fd, 1));
    }

    #[test]
    fn hosts_of_one_clique_share_by_fabric_handle() {
        let domain = merged(&two_hosts()).unwrap();
        assert_eq!((domain.handle, domain.hosts), (HandleType::Fabric, 2));
    }

    #[test]
    fn several_hosts_need_one_completed_cluster_and_clique() {
        declines(|f| f.fabric.uuid = [0; 16], Decline::NoFabric);
        declines(|f| f.fabric.completed = false, Decline::NoFabric);
        declines(|f| f.fabric.uuid = [8; 16], Decline::OtherCluster);
        declines(|f| f.fabric.clique = 8, Decline::OtherClique);
        declines(|f| f.fabric_handles = false, Decline::FabricHandle);
        declines(|f| f.mnnvl = false, Decline::FabricDisabled);
    }

    #[test]
    fn a_uuid_whose_first_byte_is_zero_is_a_uuid() {
        let mut facts = two_hosts();
        for f in &mut facts {
            f.fabric.uuid = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        }
        assert!(merged(&facts).is_ok());
    }

    #[test]
    fn what_one_rank_lacks_declines_all() {
        declines(|f| f.config = 1, Decline::ConfigDiffers);
        declines(|f| f.build = 1, Decline::VersionDiffers);
        declines(|f| f.bound = 1, Decline::BindingDiffers);
        declines(|f| f.arch = 80, Decline::Architecture);
        declines(|f| f.vmm = false, Decline::NoVirtualMemory);
        declines(|f| f.gpu = [1; 16], Decline::SharedGpu);
        declines(|f| f.declined = Some((Decline::Probe, 999)), Decline::Probe);
        declines(|f| f.rank = 1, Decline::Foreign);
    }

    #[test]
    fn the_smallest_budget_and_one_refusal_of_multicast_hold_for_all() {
        let mut facts = two_hosts();
        facts[1].blocks = 24;
        facts[3].multicast = false;
        let domain = merged(&facts).unwrap();
        assert_eq!((domain.blocks, domain.multicast), (24, false));
    }

    #[test]
    fn the_switch_makes_sums_only_where_every_rank_wants_it_and_has_multicast() {
        let mut facts = two_hosts();
        assert!(!merged(&facts).unwrap().switch_reduce);
        facts.iter_mut().for_each(|f| f.switch_reduce = true);
        assert!(merged(&facts).unwrap().switch_reduce);
        facts[3].switch_reduce = false;
        assert!(!merged(&facts).unwrap().switch_reduce);
        (facts[3].switch_reduce, facts[1].multicast) = (true, false);
        assert!(!merged(&facts).unwrap().switch_reduce);
    }

    #[test]
    fn a_number_of_blocks_that_one_rank_chose_does_not_replace_the_table_for_all() {
        let mut facts = two_hosts();
        facts[1].chosen_blocks = true;
        assert!(!merged(&facts).unwrap().chosen_blocks);
        facts.iter_mut().for_each(|f| f.chosen_blocks = true);
        assert!(merged(&facts).unwrap().chosen_blocks);
    }

    #[test]
    fn a_tuning_file_counts_only_where_all_ranks_have_the_same_one() {
        let voted = |tuning: [u64; 4]| {
            let mut facts = two_hosts();
            facts.iter_mut().zip(tuning).for_each(|(facts, tuning)| facts.tuning = tuning);
            merged(&facts).unwrap().tuned
        };
        assert_eq!(voted([0; 4]), Tuned::Unset);
        assert_eq!(voted([7; 4]), Tuned::Agreed);
        assert_eq!(voted([7, 7, 8, 7]), Tuned::Ignored { rank: 2 });
        assert_eq!(voted([7, 0, 7, 7]), Tuned::Ignored { rank: 1 });
        assert_eq!(voted([0, 0, 0, 7]), Tuned::Ignored { rank: 3 });
        assert_eq!(voted([UNUSABLE, 7, 7, 7]), Tuned::Ignored { rank: 0 });
        assert_eq!(voted([UNUSABLE; 4]), Tuned::Ignored { rank: 0 });
        assert_eq!(voted([7, UNUSABLE, 7, 7]), Tuned::Ignored { rank: 1 });
    }

    #[test]
    fn the_most_patient_rank_says_how_long_all_wait_up_to_an_hour() {
        let mut facts = two_hosts();
        facts.iter_mut().zip([100, 20_000, 300, 0]).for_each(|(facts, ms)| facts.deadline_ms = ms);
        assert_eq!(merged(&facts).unwrap().deadline, Duration::from_secs(20));
        facts[2].deadline_ms = u32::MAX;
        assert_eq!(merged(&facts).unwrap().deadline, LONGEST);
    }

    #[test]
    fn different_releases_of_nccl_are_no_release() {
        let mut facts = two_hosts();
        facts.iter_mut().for_each(|facts| facts.nccl = 228);
        assert_eq!(merged(&facts).unwrap().nccl, 228);
        facts[1].nccl = 230;
        assert_eq!(merged(&facts).unwrap().nccl, 0);
    }

    #[test]
    fn one_rank_is_no_domain() {
        assert_eq!(merged(&[rank(0, 1, 0)]).unwrap_err().reason, Decline::OneRank);
        assert_eq!(merged(&[]).unwrap_err().reason, Decline::OneRank);
    }

    proptest! {
        #[test]
        fn no_table_of_hosts_clusters_and_cliques_joins_what_the_fabric_does_not(
            rows in prop::collection::vec((0u8..3, 0u8..3, 0u32..3, any::<bool>()), 2..9),
        ) {
            let ranks = rows.len() as u32;
            let facts: Vec<_> = rows.iter().enumerate().map(|(r, (host, uuid, clique, completed))| Facts {
                fabric: FabricFacts { completed: *completed, uuid: [*uuid; 16], clique: *clique },
                ..rank(r as u32, ranks, *host)
            }).collect();
            if let Ok(domain) = merged(&facts) {
                let one_host = rows.iter().all(|row| row.0 == rows[0].0);
                let one_fabric = rows.iter().all(|row| row.1 != 0 && row.3 && (row.1, row.2) == (rows[0].1, rows[0].2));
                let joined = if domain.handle == HandleType::Fd { one_host } else { !one_host && one_fabric };
                prop_assert!(joined);
            }
        }
    }
}
