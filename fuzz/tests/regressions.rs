//! Programs that once came out differently, each with the state (a seed and a case) in which they did.

use doppel_fuzz::campaign::report;
use doppel_fuzz::native_unsafe::supported;
use doppel_fuzz::random::Random;
use doppel_fuzz::rig::{EngineName, Rig};
use doppel_fuzz::state::State;

/// What was wrong, seed, case, code.
const PROGRAMS: &[(&str, u64, u64, &str)] = &[
    (
        "MASKMOVQ with a prefix for SS, which is ignored, to an address that is not canonical",
        134000,
        1978069,
        "360ff7f80f0b",
    ),
    (
        "a dot product with an inexact product, which traps, and an exact one that is flushed to zero",
        72000,
        1021748,
        "c4c36940a1b20f2010d50f0b",
    ),
    (
        "a CALL to where no code can be, which pushes onto the operand that names its target",
        64000,
        4005024,
        "65ff1425fa0340000f0b",
    ),
    (
        "FXRSTOR of a multiple of 4 with alignment checks",
        1,
        1,
        "9c810c24000004009d41bc14102010490fae4c24000f0b",
    ),
    (
        "FXSAVE of a multiple of 8 with alignment checks",
        1,
        1,
        "9c810c24000004009d41bc18102010490fae4424000f0b",
    ),
    (
        "FXRSTOR whose last bytes are not there",
        1,
        1,
        "41bc102e2010490fae4c24000f0b",
    ),
    (
        "FXSAVE whose last bytes are not there",
        1,
        1,
        "41bc102e2010490fae4424000f0b",
    ),
    (
        "FXSAVE across the end of memory",
        1,
        1,
        "41bc002f2010490fae4424000f0b",
    ),
    (
        "FXRSTOR from two pages that are not there",
        191000,
        439176,
        "0fae0d98ef1f000f0b",
    ),
    (
        "a masked broadcast across the canonical boundary with alignment checks",
        1,
        1,
        "9c810c24000004009d49bcfeffffffff7f000062d17c595804240f0b",
    ),
    (
        "an approximation that is flushed to zero",
        20261125,
        9712377,
        "62527d2824d50f850d0000006487adda0be0ef62227d2c4cc10f0b",
    ),
    (
        "a masked pair across the canonical boundary with alignment checks",
        20261125,
        7844385,
        "41d3ae422a201048a9c6f1fbc23ed3050a1b200066ffb29e0020104c0bd3268f05cf22200081f855ccd50162e27d2c5a05f5182000e8060000009de901000000c3beea0f6010c5fa164e0041ba1a00000048bf5b57a3ffff7f000062260e06d784d7d3a75c000f0b",
    ),
    (
        "MASKMOVDQU of a multiple of 8 with alignment checks",
        64000,
        4061915,
        "9d660ff7dc0f0b",
    ),
    (
        "a vector that only the base of GS misaligns, with alignment checks",
        51000,
        673761,
        "9c810c24000004009d65440f281425c02300000f0b",
    ),
    (
        "CMPXCHG16B of what only the base of GS misaligns, with alignment checks",
        51000,
        673761,
        "9c810c24000004009d65480fc70c25c02300000f0b",
    ),
    (
        "flags of a repeated comparison that faults",
        1,
        1241,
        "bfff2f2010f2ae0f0b",
    ),
    (
        "REP INS of nothing without permission",
        1,
        7766,
        "b90000000066f36d0f0b",
    ),
    ("PREFETCHIT is a NOP", 1, 11157, "420f18bc9534eeffff0f0b"),
    (
        "DS prefix and the stack segment",
        1,
        7679,
        "3e0f44adc44521000f0b",
    ),
    (
        "order of the faults of MOVS",
        2,
        55889,
        "befa2f201048a50f0b",
    ),
    ("order of the faults of CMPS", 1, 15572, "66f3a70f0b"),
    ("MASKMOVQ enters MMX state", 1, 4156, "0ff7c00f0b"),
    (
        "FIST that stores nothing, to no address",
        1,
        3237,
        "42db940e950440100f0b",
    ),
    (
        "FSTP of an empty register, not masked",
        1,
        906,
        "41dbbcdeabf1ffff0f0b",
    ),
    (
        "gather that faults at once",
        1,
        125,
        "62b27d2a928c4520fdffff0f0b",
    ),
    (
        "gather by quadwords that faults at once",
        1,
        33,
        "62227d0e93ace2c824b2ff0f0b",
    ),
    (
        "mask of a VEX gather that faults",
        1,
        3951,
        "c4222d938465af0c20100f0b",
    ),
    (
        "destination of a VEX gather that faults",
        1,
        13274,
        "c442ed92accded0820100f0b",
    ),
    (
        "destination of a gather that has begun",
        1,
        73797,
        "41b8ff8c01106242fd2c92acb89e7c1e000f0b",
    ),
    (
        "destination of a gather half as long",
        2,
        40487,
        "62827d4e93a417e1837f980f0b",
    ),
    ("scatter that faults", 1, 1547, "62a27d29a38c6b510b20100f0b"),
    (
        "masked operand that is not canonical",
        1,
        5605,
        "62f1e529c28cf709102010800f0b",
    ),
    (
        "PCMPESTRM with REX.W is not aligned",
        1,
        6355,
        "bf6b000000664d0f3a609438f40420107f0f0b",
    ),
    ("underflow that is exact", 1, 13780, "62626d4bbcf60f0b"),
    ("CVTPD2PI is aligned", 1, 1565, "6466410f2dbcd72a00e0ef0f0b"),
    ("inserts are not masked", 1, 14237, "62534d4f18441f00570f0b"),
    (
        "extracts are not masked",
        1,
        53421,
        "6562d37d2d199c703d09e0ef210f0b",
    ),
    (
        "elements of a broadcast to a shorter vector",
        1,
        55694,
        "6211fcb9799433233020100f0b",
    ),
    (
        "mask of complex numbers",
        1,
        60559,
        "6266078d578371d7bbff0f0b",
    ),
    ("FXRSTOR's reserved bits", 1, 59615, "0fae89382020100f0b"),
    (
        "shifts by a constant are masked",
        1,
        76085,
        "6291ed067354b200360f0b",
    ),
    (
        "VPMADDWD is not masked",
        2,
        66175,
        "41baf42f201062c1650bf53a0f0b",
    ),
    (
        "long operands are not checked for alignment",
        1,
        6479,
        "9d67c5dd651ccd771e20100f0b",
    ),
    (
        "a repeated comparison of nothing keeps the flags",
        1,
        500,
        "b900000000f348a70f0b",
    ),
    (
        "flags through a link out of vector code",
        2,
        10201,
        "66440f3800c5e8000000006681d3650a0f0b",
    ),
    (
        "VCVTPS2PH raises #XM before it stores",
        1,
        10864,
        "64c4637d1d9c2439e27fdfe80f0b",
    ),
    (
        "mask of sums of products",
        11,
        33351,
        "41be2c9a88106242752c53aeb685d7ff0f0b",
    ),
    (
        "VCVTNE2PS2BF16 is not masked",
        11,
        118188,
        "3e62522f217296e71f60100f0b",
    ),
    (
        "alignment check of an x87 number",
        11,
        75383,
        "41509d64dbabe90f00800f0b",
    ),
    (
        "a return to the address that stood for none in the jump cache",
        21,
        129607,
        "bc00106010c30f0b",
    ),
    (
        "bit strings at 32-bit addresses",
        31,
        214461,
        "646667440fa305670e00f00f0b",
    ),
    (
        "alignment check of an x87 environment",
        31,
        196967,
        "6641fff09d6541d9a2c30b00000f0b",
    ),
    (
        "alignment check at the end of the canonical addresses",
        31,
        223609,
        "68f1b6ee529dbb8700000048bd6df4dfefff7f0000644c0f38f1541d000f0b",
    ),
    (
        "mask of products of every second element",
        51,
        66991,
        "62f29504281425f12f20100f0b",
    ),
    (
        "flush-to-zero where exceptions are suppressed",
        41,
        148644,
        "62b27d169be949b80d600000000000000f0b",
    ),
    (
        "#XM of the products of VDPPD",
        41,
        74444,
        "b81f000000c4c351418404500920103849b80d600000000000000f0b",
    ),
    ("#XM of the products of DPPS", 74, 65022, "660f3a40f9940f0b"),
    (
        "masked operand across the end of the canonical addresses",
        41,
        109201,
        "48bd1e9189ffff7f000062f57cab5a8ddc6e76000f0b",
    ),
    (
        "destination of CMPS before a source that is not canonical",
        71,
        43526,
        "48be0700000000800000f3a60f0b",
    ),
    (
        "CMPXCHG16B that is misaligned and not canonical",
        72,
        27654,
        "480fc78c84bceebfff0f0b",
    ),
    (
        "masks of VPSHUFBITQMB",
        74,
        11575,
        "41bd78000000656292350a8fac2cdcaeffff0f0b",
    ),
    (
        "ignored SS prefix of a string instruction",
        91,
        1014047,
        "48be170000000080000036f248a50f0b",
    ),
    (
        "a base in two pages that is held while they are written",
        91,
        823817,
        "41bdff0f20104d2b9500000000bb0010201066d31366450fbf45010f0b",
    ),
    (
        "return to an address that is not canonical",
        1,
        1,
        "48b80000000000800000500fafc3c3",
    ),
    (
        "call of an address that is not canonical",
        1,
        1,
        "48b80000000000800000ffd0",
    ),
    ("a prefetch of a register", 72, 618, "66450f0dca0f0b"),
    (
        "a gather of which nothing is done",
        72,
        1714,
        "c4227991a42e8fe0ffff0f0b",
    ),
    (
        "a gather whose second element faults",
        72,
        3707,
        "c4c241929ce108231b8e0f0b",
    ),
    (
        "a misaligned operand of SHA",
        72,
        1975,
        "410f3acc93d30f2010420f0b",
    ),
    (
        "alignment checks of a vector",
        7,
        15,
        "6641ffb6421120109dc48165559422341600000f0b",
    ),
    (
        "alignment checks of a masked load",
        71,
        2083,
        "6641fff39d2ec4a2752c9c4f371f60100f0b",
    ),
    (
        "alignment checks of a conversion to half precision",
        71,
        16963,
        "9dc463791d1c25170c2010040f0b",
    ),
    (
        "the faults of a store that an exception suppresses",
        72,
        20330,
        "42db1c5db42f20100f0b",
    ),
    ("the same, of 80 bits", 71, 35019, "41dbbe8ce21f000f0b"),
    (
        "MOVSXD to 16 bits at the end of a page",
        71,
        19475,
        "656644630425f71e40000f0b",
    ),
    (
        "a count of which half is loaded",
        71,
        67425,
        "660fe20c25f12f20100f0b",
    ),
];

/// Flags that are dead when `mov rax, [0]` faults, since `xor ebx, ebx` follows; whether the block is entered with them.
const DEAD_FLAGS: &[(&str, bool, &str)] = &[
    ("of a subtraction", false, "83e905"),
    ("of a comparison", false, "4839d8"),
    ("of a comparison in words", false, "6639d8"),
    ("of an addition in bytes", false, "00d9"),
    ("of logic", false, "21d9"),
    ("of a register and itself", false, "29c9"),
    ("of INC after ADD", false, "01d8ffc1"),
    ("of ADD with a result that is gone", false, "01d989d9"),
    ("of a shift", false, "c1e304"),
    ("of a shift by CL after ADD", false, "01d8d3e2"),
    ("of a stack pointer that moves on", false, "4883ec2850"),
    (
        "of INC after a shift and an access",
        false,
        "c1e304505affc0",
    ),
    (
        "of ADD, but for a carry from a bit in memory",
        false,
        "01d80fba24251000201003",
    ),
    ("from before the block", true, ""),
];

/// A load from an address that is not mapped, and REP MOVS to it, which is left to the interpreter.
const FAULTS: [&str; 2] = [
    "488b042500000000",
    "b903000000 be58072010 bf00000000 f348a5",
];

#[test]
fn flags_at_a_fault_are_exact() {
    if !supported() {
        eprintln!("SKIPPED: no bare processor here");
        return;
    }
    let mut rig = Rig::new().unwrap();
    rig.fault_flags = true;
    let endings = DEAD_FLAGS.iter().flat_map(|d| FAULTS.map(|f| (d, f)));
    for ((what, entered_with, before), fault) in endings {
        let code = bytes(&format!("{before}{fault} 31db 0f0b").replace(' ', ""));
        let engine = match entered_with {
            true => "translate-entry-flags",
            false => "translate",
        };
        for case in 0..20 {
            let state = State::random(&mut Random::of(7, case, 0));
            let engines = [EngineName::Translate(engine)];
            let verdict = rig.check(&state, &code, &engines).unwrap();
            assert!(verdict.faulted && !verdict.discarded, "{what}");
            if let Some((engine, _)) = verdict.failures.first() {
                let report = report(&mut rig, 7, case, engine, &state, &code).unwrap();
                panic!("{what}: {report}");
            }
        }
    }
}

const ENGINES: [EngineName; 3] = [
    EngineName::Interpret,
    EngineName::Translate("translate"),
    EngineName::Translate("translate-no-flag-liveness"),
];

fn bytes(hex: &str) -> Vec<u8> {
    (0..hex.len() / 2)
        .map(|n| u8::from_str_radix(&hex[2 * n..2 * n + 2], 16).unwrap())
        .collect()
}

#[test]
fn what_once_differed_no_longer_does() {
    if !supported() {
        eprintln!("SKIPPED: no bare processor here");
        return;
    }
    let mut rig = Rig::new().unwrap();
    for (what, seed, case, hex) in PROGRAMS {
        let state = State::random(&mut Random::of(*seed, *case, 0));
        let code = bytes(hex);
        if !rig.offers(&code, state.rip) {
            eprintln!("SKIPPED: {what}: this processor has no such instruction");
            continue;
        }
        let verdict = rig.check(&state, &code, &ENGINES).unwrap();
        assert!(!verdict.discarded, "{what}: not compared");
        if let Some((engine, _)) = verdict.failures.first() {
            let report = report(&mut rig, *seed, *case, engine, &state, &code).unwrap();
            panic!("{what}: {report}");
        }
    }
}
