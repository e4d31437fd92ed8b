//! Several CPUs on one RAM: atomics, memory order, interrupts, dropped translations, code that another CPU writes.

use doppel_conformance::bus::PORT_IPI;
use doppel_conformance::paging::{A, D, P, RW};
use doppel_conformance::*;
use iced_x86::IcedError;
use iced_x86::code_asm::*;

type Emitted = Result<(), IcedError>;

/// A word of the data page on a line of its own.
const fn word(n: u64) -> u64 {
    DATA + 64 * n
}

/// Memory operands at an absolute address.
fn at(address: u64) -> AsmMemoryOperand {
    qword_ptr(address)
}

/// Emits a loop of `times` rounds, counted in RCX from there down to 1.
fn rounds(
    a: &mut CodeAssembler,
    times: u64,
    body: impl Fn(&mut CodeAssembler) -> Emitted,
) -> Emitted {
    let mut again = a.create_label();
    a.mov(rcx, times)?;
    a.set_label(&mut again)?;
    a.nop()?; // the body may begin with a label of its own
    body(a)?;
    a.dec(rcx)?;
    a.jnz(again)
}

/// Waits until the word at an address is `r` or more (unsigned).
fn wait_for(a: &mut CodeAssembler, address: u64, r: AsmRegister64) -> Emitted {
    let (mut again, mut done) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.cmp(at(address), r)?;
    a.jae(done)?;
    a.pause()?;
    a.jmp(again)?;
    a.set_label(&mut done)?;
    a.nop()
}

/// Code for CPU `n`, with a stop behind it.
fn place(crowd: &Crowd, n: u64, code: impl Fn(&mut CodeAssembler) -> Emitted) -> u64 {
    let start = CODE + 0x2000 * n;
    let end = crowd.first().place(64, start, code);
    crowd.first().place(64, end, machine::stop);
    start
}

/// All CPUs run the same code.
fn run_all(crowd: &mut Crowd, code: impl Fn(&mut CodeAssembler) -> Emitted) {
    let start = place(crowd, 0, code);
    crowd.run(|_| start);
}

/// Two CPUs run one piece of code each.
fn run_two(
    crowd: &mut Crowd,
    first: impl Fn(&mut CodeAssembler) -> Emitted,
    second: impl Fn(&mut CodeAssembler) -> Emitted,
) {
    let starts = [place(crowd, 0, first), place(crowd, 1, second)];
    crowd.run(|n| starts[n]);
}

// ---- atomics ----

const COUNTS: u64 = 2000;

/// The same of split locks: a host that detects these makes each wait, for up to a quarter of a second.
fn split_counts() -> u64 {
    let processor = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let slow = ["split_lock_detect", "bus_lock_detect"]
        .iter()
        .any(|flag| processor.contains(flag));
    if slow { COUNTS / 500 } else { COUNTS }
}

/// Every CPU does something that adds 1 to the word at `address`, which is `size` bytes long.
fn counted(n: u32, address: u64, size: u32, add: impl Fn(&mut CodeAssembler) -> Emitted) {
    let is_split = address % 64 + u64::from(size) > 64;
    let counts = if is_split { split_counts() } else { COUNTS };
    each_crowd(n, |crowd| {
        run_all(crowd, |a| {
            a.mov(rbx, address)?;
            rounds(a, counts, &add)
        });
        let sum = (counts * u64::from(n)) & (u64::MAX >> (64 - 8 * size));
        let bytes: u64 = (0..size.into())
            .map(|n| u64::from(crowd.first().ram.load::<u8>(address + n).unwrap()) << (8 * n))
            .sum();
        assert_eq!(bytes, sum);
    });
}

#[test]
fn locked_increments_add_up() {
    counted(4, word(0), 8, |a| a.lock().inc(qword_ptr(rbx)));
    counted(4, word(0), 4, |a| a.lock().add(dword_ptr(rbx), 1));
    counted(4, word(0), 1, |a| a.lock().inc(byte_ptr(rbx)));
    counted(4, word(0), 2, |a| {
        a.mov(ax, 1u32)?;
        a.lock().xadd(word_ptr(rbx), ax)
    });
}

#[test]
fn so_do_they_misaligned_across_lines_and_across_pages() {
    for offset in [3, 61, 0xffd] {
        counted(3, word(0) + offset, 8, |a| a.lock().inc(qword_ptr(rbx)));
        counted(3, word(0) + offset, 4, |a| {
            a.mov(eax, 1)?;
            a.lock().xadd(dword_ptr(rbx), eax)
        });
    }
}

/// Two linear pages whose physical pages are not neighbours.
#[test]
fn a_split_lock_over_pages_apart_is_atomic_against_all_else() {
    let counts = split_counts();
    each_crowd(3, |crowd| {
        let m = crowd.first();
        m.map(0, SPARE, P | RW);
        m.map(1, SPARE + 0x5000, P | RW);
        // One CPU counts in the upper half alone, which lies at the start of the second page.
        let split = |a: &mut CodeAssembler| {
            a.mov(rbx, X + 0xffc)?;
            rounds(a, counts, |a| a.lock().inc(qword_ptr(rbx)))
        };
        let half = |a: &mut CodeAssembler| {
            a.mov(rbx, X + 0x1000)?;
            rounds(a, counts, |a| a.lock().inc(dword_ptr(rbx)))
        };
        let starts = [place(crowd, 0, split), place(crowd, 1, half)];
        crowd.run(|n| starts[n % 2]);
        let ram = &crowd.first().ram;
        let low = ram.load::<u32>(SPARE + 0xffc).unwrap();
        let high = ram.load::<u32>(SPARE + 0x5000).unwrap();
        assert_eq!((u64::from(low), u64::from(high)), (2 * counts, counts));
    });
}

#[test]
fn compare_and_exchange_and_exchange_make_locks() {
    each_crowd(4, |crowd| {
        run_all(crowd, |a| {
            rounds(a, COUNTS / 4, |a| {
                let (mut again, mut wait, mut got) =
                    (a.create_label(), a.create_label(), a.create_label());
                a.set_label(&mut again)?;
                a.mov(eax, 1)?;
                a.xchg(at(word(1)), rax)?;
                a.test(rax, rax)?;
                a.jz(got)?;
                a.set_label(&mut wait)?;
                a.pause()?;
                a.cmp(at(word(1)), 0)?;
                a.jne(wait)?;
                a.jmp(again)?;
                a.set_label(&mut got)?;
                a.mov(rax, at(word(0)))?;
                a.inc(rax)?;
                a.mov(at(word(0)), rax)?;
                a.mov(at(word(1)), 0)
            })
        });
        assert_eq!(crowd.first().get(word(0)), COUNTS);
    });
    counted(4, word(0), 8, |a| {
        let mut again = a.create_label();
        a.mov(rax, qword_ptr(rbx))?;
        a.set_label(&mut again)?;
        a.lea(rdx, qword_ptr(rax + 1))?;
        a.lock().cmpxchg(qword_ptr(rbx), rdx)?;
        a.jnz(again)
    });
}

#[test]
fn sixteen_bytes_are_exchanged_as_one() {
    each_crowd(3, |crowd| {
        run_all(crowd, |a| {
            a.mov(r8, word(2))?;
            rounds(a, COUNTS, |a| {
                let mut again = a.create_label();
                a.mov(r9, rcx)?;
                a.mov(rax, qword_ptr(r8))?;
                a.mov(rdx, qword_ptr(r8 + 8))?;
                a.set_label(&mut again)?;
                a.lea(rbx, qword_ptr(rax + 1))?;
                a.lea(rcx, qword_ptr(rdx - 1))?;
                a.lock().cmpxchg16b(xmmword_ptr(r8))?;
                a.jnz(again)?;
                a.mov(rcx, r9)
            })
        });
        let m = crowd.first();
        let sum = m.get(word(2)).wrapping_add(m.get(word(2) + 8));
        assert_eq!((m.get(word(2)), sum), (3 * COUNTS, 0));
    });
}

// ---- memory order ----

const LITMUS: u64 = 1500;

/// Both CPUs begin each round together. R12 is the round.
fn together(a: &mut CodeAssembler, body: impl Fn(&mut CodeAssembler) -> Emitted) -> Emitted {
    a.xor(r12d, r12d)?;
    rounds(a, LITMUS, |a| {
        a.inc(r12)?;
        a.lock().inc(at(word(8)))?;
        a.lea(r13, qword_ptr(r12 + r12))?;
        wait_for(a, word(8), r13)?;
        body(a)
    })
}

/// Adds 1 to a count of violations where the flags say so.
fn count_if(
    a: &mut CodeAssembler,
    violated: fn(&mut CodeAssembler, CodeLabel) -> Emitted,
) -> Emitted {
    let (mut bad, mut good) = (a.create_label(), a.create_label());
    violated(a, bad)?;
    a.jmp(good)?;
    a.set_label(&mut bad)?;
    a.lock().inc(at(word(9)))?;
    a.set_label(&mut good)?;
    a.nop()
}

#[test]
fn messages_are_passed_in_order() {
    each_crowd(2, |crowd| {
        let writes = |a: &mut CodeAssembler| {
            together(a, |a| {
                a.mov(at(word(0)), r12)?;
                a.mov(at(word(1)), r12)
            })
        };
        let reads = |a: &mut CodeAssembler| {
            together(a, |a| {
                a.mov(rax, at(word(1)))?;
                a.mov(rbx, at(word(0)))?;
                a.cmp(rbx, rax)?;
                count_if(a, |a, bad| a.jb(bad))
            })
        };
        run_two(crowd, writes, reads);
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}

/// Each CPU stores to its own word and loads the other's; notes what it saw in an array of its own.
fn buffered(crowd: &mut Crowd, fence: fn(&mut CodeAssembler) -> Emitted) -> usize {
    const SEEN: u64 = SPARE + 0x10_0000;
    let cpu = |me: u64| {
        move |a: &mut CodeAssembler| {
            a.mov(r14, SEEN + 0x1_0000 * me)?;
            together(a, |a| {
                a.mov(at(word(me)), r12)?;
                fence(a)?;
                a.mov(rax, at(word(1 - me)))?;
                a.mov(qword_ptr(r14 + r12 * 8), rax)
            })
        }
    };
    run_two(crowd, cpu(0), cpu(1));
    let m = crowd.first();
    (1..=LITMUS)
        .filter(|n| (0..2).all(|me| m.get(SEEN + 0x1_0000 * me + 8 * n) < *n))
        .count()
}

#[test]
fn fences_and_locked_instructions_empty_the_store_buffer() {
    each_crowd(2, |crowd| assert_eq!(buffered(crowd, |a| a.mfence()), 0));
    each_crowd(2, |crowd| {
        assert_eq!(buffered(crowd, |a| a.lock().add(dword_ptr(rsp - 64), 0)), 0);
    });
    each_crowd(2, |crowd| {
        assert_eq!(buffered(crowd, |a| a.xchg(qword_ptr(rsp - 64), rax)), 0);
    });
}

#[test]
fn loads_are_not_delayed_beyond_later_stores() {
    each_crowd(2, |crowd| {
        const SEEN: u64 = SPARE + 0x10_0000;
        let cpu = |me: u64| {
            move |a: &mut CodeAssembler| {
                a.mov(r14, SEEN + 0x1_0000 * me)?;
                together(a, |a| {
                    a.mov(rax, at(word(1 - me)))?;
                    a.mov(at(word(me)), r12)?;
                    a.mov(qword_ptr(r14 + r12 * 8), rax)
                })
            }
        };
        run_two(crowd, cpu(0), cpu(1));
        let m = crowd.first();
        let saw = |n: u64, me: u64| m.get(SEEN + 0x1_0000 * me + 8 * n) >= n;
        assert!(!(1..=LITMUS).any(|n| saw(n, 0) && saw(n, 1)));
    });
}

// ---- interrupts ----

/// Sends vector 0x40 to a CPU.
fn interrupt(a: &mut CodeAssembler, cpu: u32) -> Emitted {
    a.mov(eax, (cpu << 8) | 0x40)?;
    a.out(i32::from(PORT_IPI), eax)
}

#[test]
fn interrupts_go_to_and_fro_between_halted_cpus() {
    const TIMES: u64 = 200;
    each_crowd(2, |crowd| {
        let handler = CODE + 0x8000;
        let m = crowd.first();
        m.gate(0x40, handler, 0xe, 0, 0);
        m.place(64, handler, |a: &mut CodeAssembler| {
            a.inc(r15)?;
            a.iretq()
        });
        // R15 counts the interrupts; between STI and HLT none comes.
        let wait = |a: &mut CodeAssembler| {
            let (mut again, mut done) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.cli()?;
            a.cmp(r15, r14)?;
            a.jae(done)?;
            a.sti()?;
            a.hlt()?;
            a.jmp(again)?;
            a.set_label(&mut done)?;
            a.inc(r14)
        };
        let begin = |a: &mut CodeAssembler| {
            a.xor(r15d, r15d)?;
            a.mov(r14d, 1)
        };
        let first = |a: &mut CodeAssembler| {
            begin(a)?;
            rounds(a, TIMES, |a| {
                interrupt(a, 1)?;
                wait(a)
            })
        };
        let second = |a: &mut CodeAssembler| {
            begin(a)?;
            rounds(a, TIMES, |a| {
                wait(a)?;
                interrupt(a, 0)
            })
        };
        run_two(crowd, first, second);
        for m in &crowd.cpus {
            assert_eq!(m.reg(doppel_x86::Gpr::R15), TIMES);
        }
    });
}

#[test]
fn an_interrupt_reaches_a_cpu_in_a_loop_and_drops_its_translation() {
    const TIMES: u64 = 200;
    each_crowd(2, |crowd| {
        let handler = CODE + 0x8000;
        let m = crowd.first();
        // Two physical pages take turns behind one linear page: the one in use holds what was last announced or later.
        let linear = m.map(0, SPARE, P | RW | A | D);
        m.gate(0x40, handler, 0xe, 0, 0);
        m.place(64, handler, |a: &mut CodeAssembler| {
            a.invlpg(byte_ptr(rbp))?;
            a.lock().inc(at(word(1)))?;
            a.iretq()
        });
        let changes = |a: &mut CodeAssembler| {
            a.mov(r8, SPARE)?;
            a.xor(r12d, r12d)?;
            rounds(a, TIMES, |a| {
                a.inc(r12)?;
                a.xor(r8, 0x1000)?;
                a.mov(qword_ptr(r8), r12)?;
                a.lea(rax, qword_ptr(r8 + (P | RW | A | D) as i32))?;
                a.mov(at(X_PT), rax)?;
                interrupt(a, 1)?;
                wait_for(a, word(1), r12)?;
                // From now on nobody reads the other page.
                a.mov(rbx, r8)?;
                a.xor(rbx, 0x1000)?;
                a.mov(qword_ptr(rbx), 0)?;
                a.mov(at(word(0)), r12)
            })?;
            a.mov(at(word(2)), 1)
        };
        let reads = |a: &mut CodeAssembler| {
            a.mov(rbp, linear)?;
            a.sti()?;
            let (mut again, mut good) = (a.create_label(), a.create_label());
            a.set_label(&mut again)?;
            a.mov(rax, at(word(0)))?;
            a.mov(rbx, qword_ptr(rbp))?;
            a.cmp(rbx, rax)?;
            a.jae(good)?;
            a.lock().inc(at(word(9)))?;
            a.set_label(&mut good)?;
            a.cmp(at(word(2)), 0)?;
            a.je(again)
        };
        run_two(crowd, changes, reads);
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}

// ---- page tables ----

#[test]
fn walks_set_no_bits_in_an_entry_that_was_taken_away() {
    const TIMES: u64 = 300;
    each_crowd(2, |crowd| {
        let handler = CODE + 0x8000;
        let m = crowd.first();
        let linear = m.map(0, SPARE, P | RW);
        m.gate(14, handler, 0xe, 0, 0);
        m.place(64, handler, |a: &mut CodeAssembler| {
            a.add(rsp, 8)?;
            a.iretq()
        });
        // What is taken away stays away; what is put back gets its bits again.
        let takes = |a: &mut CodeAssembler| {
            rounds(a, TIMES, |a| {
                a.xor(eax, eax)?;
                a.xchg(at(X_PT), rax)?;
                for _ in 0..20 {
                    a.pause()?;
                }
                a.cmp(at(X_PT), 0)?;
                count_if(a, |a, bad| a.jne(bad))?;
                a.mov(rax, SPARE | P | RW)?;
                a.mov(at(X_PT), rax)?;
                a.mov(r13, at(word(3)))?;
                a.add(r13, 2)?;
                wait_for(a, word(3), r13)?;
                a.mov(rax, at(X_PT))?;
                a.not(rax)?;
                a.test(rax, (A | D) as i32)?;
                count_if(a, |a, bad| a.jnz(bad))
            })?;
            a.mov(at(word(2)), 1)
        };
        let writes = |a: &mut CodeAssembler| {
            let mut again = a.create_label();
            a.mov(rbp, linear)?;
            a.set_label(&mut again)?;
            a.invlpg(byte_ptr(rbp))?;
            a.inc(qword_ptr(rbp))?;
            a.lock().inc(at(word(3)))?;
            a.cmp(at(word(2)), 0)?;
            a.je(again)
        };
        run_two(crowd, takes, writes);
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}

// ---- code ----

const MOV_EAX_RET: u64 = 0xc300_0000_00b8;

/// Puts `mov eax, r12d; ret` at an address in one store.
fn emit(a: &mut CodeAssembler, routine: u64) -> Emitted {
    a.mov(rdx, r12)?;
    a.shl(rdx, 8)?;
    a.mov(rax, MOV_EAX_RET)?;
    a.or(rdx, rax)?;
    a.mov(rbx, routine)?;
    a.mov(qword_ptr(rbx), rdx)
}

/// Calls the routine by its address until `word(2)` is set; what it returns is never older than what `word(0)` announced before.
fn calls(a: &mut CodeAssembler, routine: u64, serialize: bool) -> Emitted {
    let (mut again, mut good) = (a.create_label(), a.create_label());
    a.set_label(&mut again)?;
    a.mov(r14, at(word(0)))?;
    if serialize {
        a.xor(eax, eax)?;
        a.cpuid()?;
    }
    a.call(routine)?;
    a.cmp(rax, r14)?;
    a.jae(good)?;
    a.lock().inc(at(word(9)))?;
    a.set_label(&mut good)?;
    a.inc(r15)?;
    a.cmp(at(word(2)), 0)?;
    a.je(again)
}

fn changed_by_another(alias: bool, serialize: bool) {
    const TIMES: u64 = 300;
    each_crowd(3, |crowd| {
        let routine = SPARE + 0xf00;
        let written = if alias {
            crowd.first().map(0, SPARE, P | RW) + 0xf00
        } else {
            routine
        };
        crowd.first().put_bytes(routine, &MOV_EAX_RET.to_le_bytes());
        let changes = |a: &mut CodeAssembler| {
            a.xor(r12d, r12d)?;
            rounds(a, TIMES, |a| {
                a.inc(r12)?;
                emit(a, written)?;
                a.mov(at(word(0)), r12)
            })?;
            a.mov(at(word(2)), 1)
        };
        let start = place(crowd, 0, changes);
        let calling = place(crowd, 1, |a| calls(a, routine, serialize));
        crowd.run(|n| if n == 0 { start } else { calling });
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}

#[test]
fn code_that_another_cpu_writes_is_never_older_than_what_it_announced() {
    changed_by_another(false, false);
    changed_by_another(true, false);
    changed_by_another(false, true);
}

/// One CPU writes a routine and again after the other has called it, in one fresh page after the other: what it may write without a
/// check when the other translates is taken from it.
#[test]
fn who_may_write_to_a_page_loses_that_when_another_translates_from_it() {
    const PAGES: u64 = 40;
    each_crowd(2, |crowd| {
        let routine = SPARE + 0x10_0000;
        let writes = |a: &mut CodeAssembler| {
            a.xor(r12d, r12d)?;
            a.mov(rbp, routine)?;
            rounds(a, PAGES, |a| {
                for _ in 0..2 {
                    a.inc(r12)?;
                    emit(a, routine)?;
                    a.mov(qword_ptr(rbp), rdx)?;
                    a.mov(at(word(0)), r12)?;
                    wait_for(a, word(1), r12)?;
                }
                a.add(rbp, 0x1000)
            })
        };
        let calls = |a: &mut CodeAssembler| {
            a.xor(r12d, r12d)?;
            a.mov(rbp, routine)?;
            rounds(a, PAGES, |a| {
                for _ in 0..2 {
                    a.inc(r12)?;
                    wait_for(a, word(0), r12)?;
                    a.call(rbp)?;
                    a.cmp(rax, r12)?;
                    count_if(a, |a, bad| a.jne(bad))?;
                    a.mov(at(word(1)), r12)?;
                }
                a.add(rbp, 0x1000)
            })
        };
        run_two(crowd, writes, calls);
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}

#[test]
fn cpus_that_write_code_for_each_other_both_go_on() {
    const TIMES: u64 = 200;
    each_crowd(2, |crowd| {
        let routine = |n: u64| SPARE + 0x1000 * n + 0x100;
        for n in 0..2 {
            crowd
                .first()
                .put_bytes(routine(n), &MOV_EAX_RET.to_le_bytes());
        }
        let cpu = |me: u64| {
            move |a: &mut CodeAssembler| {
                a.xor(r12d, r12d)?;
                rounds(a, TIMES, |a| {
                    a.inc(r12)?;
                    emit(a, routine(1 - me))?;
                    a.mov(at(word(me)), r12)?;
                    a.mov(r14, at(word(1 - me)))?;
                    a.call(routine(me))?;
                    a.cmp(rax, r14)?;
                    count_if(a, |a, bad| a.jb(bad))
                })
            }
        };
        run_two(crowd, cpu(0), cpu(1));
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}

#[test]
fn data_that_others_write_beside_code_does_not_disturb_it() {
    each_crowd(3, |crowd| {
        // In the page of the code itself.
        let counter = CODE + 0xff0;
        run_all(crowd, |a| {
            a.mov(rbx, counter)?;
            rounds(a, 500, |a| a.lock().inc(qword_ptr(rbx)))
        });
        assert_eq!(crowd.first().get(counter), 1500);
    });
}

#[test]
fn code_that_a_device_writes_reaches_every_cpu_that_serializes() {
    const TIMES: u64 = 200;
    each_crowd(2, |crowd| {
        let routine = SPARE + 0xf00;
        crowd.first().put_bytes(routine, &MOV_EAX_RET.to_le_bytes());
        let start = place(crowd, 0, |a| calls(a, routine, true));
        let ram = crowd.first().ram.clone();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                for n in 1..=TIMES {
                    let code = MOV_EAX_RET | n << 8;
                    ram.write_from_device(routine, &code.to_le_bytes());
                    ram.write_from_device(word(0), &n.to_le_bytes());
                    std::thread::yield_now();
                }
                ram.write_from_device(word(2), &1u64.to_le_bytes());
            });
            crowd.run(|_| start);
        });
        assert_eq!(crowd.first().get(word(9)), 0);
    });
}
