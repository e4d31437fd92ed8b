//! Guest code: every instruction is translated and explained, as user and as kernel code, and the interpreter executes what it can.

use std::sync::Arc;

use doppel_memory::GuestRam;
use doppel_translate::TranslateOptions;
use doppel_translate::explain::{Sample, Symbols};
use doppel_x86::{Activity, Cpu, Cr0, EmptyBus, Gpr, HiddenInstructions, event, interpret};

use crate::choices::Choices;
use crate::{Door, Take};

pub const DOOR: Door = Door {
    name: "code",
    longest: 256,
    words: &[
        b"\x0f\x01",
        b"\x0f\xae",
        b"\x0f\xc7",
        b"\x0f\x20",
        b"\x0f\x22",
        b"\xc5\xf8",
        b"\xc4\xe2\x7d",
        b"\x62\xf1\x7c\x48",
        b"\xf3\xa4",
        b"\xf2\xae",
        b"\xf0\x0f\xb1",
        b"\x48\xcf",
        b"\x0f\x07",
        b"\x0f\x30",
        b"\x67\x64",
        b"\x66\x0f\x3a",
    ],
    seeds,
    open,
};

const RAM: u64 = 1 << 20;
const CODE: u64 = 0x8000;
const MOST: u32 = 200;

fn open() -> anyhow::Result<Take> {
    let ram = Arc::new(GuestRam::new(RAM)?);
    let blank = vec![0u8; RAM as usize];
    Ok(Box::new(move |bytes| {
        let mut choices = Choices::new(bytes);
        let (user, paged) = (choices.byte(), choices.byte());
        let code = choices.rest();
        explain(code, user & 1 != 0);
        ram.write_from_device(0, &blank);
        interpret(&ram, code, paged);
    }))
}

fn explain(bytes: &[u8], user: bool) {
    let sample = Sample {
        bytes,
        address: 0x40_0ff8,
        user,
        hidden: HiddenInstructions::NONE,
    };
    // Bytes that end within an instruction are refused.
    let _ = sample.explain(&TranslateOptions::default(), &Symbols::default());
}

/// In real mode, or in protected mode with the segments that reset leaves.
fn interpret(ram: &Arc<GuestRam>, code: &[u8], form: u8) {
    ram.write_from_device(CODE, code);
    let mut cpu = Cpu::new(0, ram.clone());
    if form & 1 != 0 {
        cpu.cr0 |= Cr0::PE;
    }
    for segment in &mut cpu.seg {
        segment.base = 0;
        segment.selector = 0;
        // Of 32 bits or of 16.
        segment.attributes = segment.attributes & !0x4000 | u32::from(form & 2) << 13;
    }
    cpu.rip = CODE;
    cpu.gpr[Gpr::Rsp as usize] = 0x7000;
    let mut bus = EmptyBus;
    for _ in 0..MOST {
        event::deliver_pending(&mut cpu, &mut bus);
        if cpu.activity != Activity::Active {
            break;
        }
        interpret::step(&mut cpu, &mut bus);
        cpu.code_writes.clear();
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let codes: [&[u8]; 8] = [
        &[0x48, 0x8b, 0x03, 0xc3],
        &[0x0f, 0xa2, 0x0f, 0x01, 0xf9, 0x0f, 0x31],
        &[0x9c, 0xfa, 0x9d, 0xfb, 0xf4],
        &[0xf3, 0x48, 0xa5, 0xf2, 0xae, 0xc3],
        &[
            0x0f, 0x20, 0xc0, 0x0c, 0x01, 0x0f, 0x22, 0xc0, 0xea, 0, 0x90, 8, 0,
        ],
        &[
            0xc5, 0xfd, 0x6f, 0x00, 0xc4, 0xe2, 0x7d, 0x18, 0x00, 0xc5, 0xf8, 0x77,
        ],
        &[0x62, 0xf1, 0x7c, 0x48, 0x10, 0x00, 0x0f, 0xae, 0x20],
        &[
            0xf0, 0x48, 0x0f, 0xb1, 0x0b, 0x75, 0xf9, 0x0f, 0x01, 0xf8, 0x48, 0xcf,
        ],
    ];
    let with = |form: u8| move |code: &&[u8]| [&[form, form], *code].concat();
    (0..4)
        .flat_map(|form| codes.iter().map(with(form)).collect::<Vec<_>>())
        .collect()
}
