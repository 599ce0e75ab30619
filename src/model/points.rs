//! What the model stands on: bf16 and f32 sums on 2 and 4 H100 80GB HBM3 of one host, all pairs NV18, driver 580.159.04,
//! CUDA 13.0, multicast off, captured graphs, 2026-11-22. `OneShot` and `TwoShot` are the prototype of these kernels,
//! `Stock` is NCCL 2.28.3 by nccl-tests with `-G 20`. One run each.

use super::{Case, H100, Point, What};

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;

/// The prototype's largest grid.
const ALL: u32 = 128;

const fn point(what: What, ranks: u32, plain: bool, blocks: u32, bytes: u64, us: f64) -> Point {
    Point { case: Case { what, gpu: H100, ranks, multicast: false, blocks, plain, bytes }, us }
}

const fn stock(bytes: u64, us: f64) -> Point {
    point(What::Stock, 4, false, 24, bytes, us)
}

const fn one(ranks: u32, bytes: u64, us: f64) -> Point {
    point(What::OneShot, ranks, false, ALL, bytes, us)
}

const fn two(ranks: u32, blocks: u32, bytes: u64, us: f64) -> Point {
    point(What::TwoShot, ranks, false, blocks, bytes, us)
}

const fn plain_one(ranks: u32, bytes: u64, us: f64) -> Point {
    point(What::OneShot, ranks, true, ALL, bytes, us)
}

const fn plain_two(ranks: u32, blocks: u32, bytes: u64, us: f64) -> Point {
    point(What::TwoShot, ranks, true, blocks, bytes, us)
}

/// All of them.
pub const POINTS: &[Point] = &[
    stock(KIB, 9.1),
    stock(4 * KIB, 9.5),
    stock(16 * KIB, 10.6),
    stock(64 * KIB, 11.0),
    stock(256 * KIB, 11.3),
    stock(MIB, 20.2),
    stock(4 * MIB, 42.6),
    stock(16 * MIB, 101.1),
    stock(64 * MIB, 323.0),
    // With programmatic dependent launch.
    one(4, KIB, 2.56),
    one(4, 4 * KIB, 2.74),
    one(4, 16 * KIB, 2.83),
    one(4, 64 * KIB, 3.30),
    one(4, 256 * KIB, 4.93),
    two(4, ALL, KIB, 3.80),
    two(4, ALL, 64 * KIB, 4.30),
    two(4, ALL, 256 * KIB, 4.66),
    two(4, ALL, 512 * KIB, 5.55),
    two(4, 32, MIB, 7.72),
    two(4, 64, 2 * MIB, 12.4),
    two(4, ALL, 4 * MIB, 21.2),
    one(2, KIB, 2.37),
    one(2, 64 * KIB, 2.76),
    one(2, 256 * KIB, 3.38),
    two(2, ALL, MIB, 6.61),
    // Without.
    plain_one(4, KIB, 2.85),
    plain_one(4, 4 * KIB, 3.04),
    plain_one(4, 16 * KIB, 3.20),
    plain_one(4, 64 * KIB, 3.52),
    plain_one(4, 256 * KIB, 5.30),
    plain_one(4, MIB, 12.5),
    plain_two(4, ALL, KIB, 4.06),
    plain_two(4, ALL, 4 * KIB, 4.28),
    plain_two(4, ALL, 16 * KIB, 4.48),
    plain_two(4, ALL, 64 * KIB, 4.70),
    plain_one(2, KIB, 2.48),
    plain_one(2, MIB, 6.36),
    plain_two(2, ALL, KIB, 3.49),
    plain_two(2, ALL, MIB, 6.81),
    plain_two(2, ALL, 4 * MIB, 16.5),
    plain_two(2, ALL, 16 * MIB, 66.1),
    // At most so many blocks.
    plain_two(4, 16, 256 * KIB, 5.26),
    plain_two(4, 24, 256 * KIB, 5.26),
    plain_two(4, 32, 256 * KIB, 5.02),
    plain_two(4, 64, 256 * KIB, 4.98),
    plain_two(4, ALL, 256 * KIB, 4.95),
    plain_two(4, 16, MIB, 12.3),
    plain_two(4, 24, MIB, 12.3),
    plain_two(4, 32, MIB, 8.6),
    plain_two(4, 64, MIB, 8.1),
    plain_two(4, ALL, MIB, 7.8),
    plain_two(4, 16, 4 * MIB, 47.0),
    plain_two(4, 24, 4 * MIB, 37.8),
    plain_two(4, 32, 4 * MIB, 27.0),
    plain_two(4, 64, 4 * MIB, 24.3),
    plain_two(4, ALL, 4 * MIB, 21.9),
    plain_two(4, 16, 16 * MIB, 265.0),
    plain_two(4, 24, 16 * MIB, 191.0),
    plain_two(4, 32, 16 * MIB, 152.0),
    plain_two(4, 64, 16 * MIB, 95.0),
    plain_two(4, ALL, 16 * MIB, 83.6),
];
