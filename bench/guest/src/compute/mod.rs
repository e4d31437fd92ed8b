//! Work that stays in user mode. It is written plainly, so that a compiler makes of it what it makes of most programs.

mod bytecode;
mod integer;
mod loads;
mod matrix_unsafe;
mod nbody;
mod sorting;
mod stream;

use crate::row::{Row, Work};

pub const ROWS: &[Row] = &[
    row("mix", 6_000_000, Work::All(integer::mix)),
    row("sort", 600_000, Work::Own(sorting::sort)),
    row("chase", 2_000_000, Work::Own(loads::chase)),
    row("hash", 800_000, Work::All(loads::hash)),
    row("double", 800_000, Work::All(nbody::double)),
    row("matrix-sse2", 12, Work::Own(matrix_unsafe::sse2)),
    row("matrix-avx2", 20, Work::Own(matrix_unsafe::avx2)),
    row("recursion", 35, Work::All(integer::recursion)),
    row("bytecode", 700_000, Work::All(bytecode::run)),
    row("memcpy", 12_000, Work::Own(stream::memcpy)),
    row("memset", 15_000, Work::Own(stream::memset)),
    row("scan", 30, Work::Own(stream::scan)),
    row("sha256", 10, Work::Own(stream::sha256)),
    row("compress", 1, Work::Own(stream::compress)),
];

const fn row(name: &'static str, count: u64, work: Work) -> Row {
    Row {
        group: "compute",
        name,
        count,
        work,
        repeated: true,
    }
}
