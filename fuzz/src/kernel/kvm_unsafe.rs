//! The host's KVM as another engine for generated kernels. It shares no code with the interpreter, so it is another opinion; where the host
//! has no hardware virtualization it may be a wrong one, for then KVM emulates too.
//!
//! Interrupts are injected as the other engines' bus raises them: at once after the write to the port, or when a window opens.

use std::sync::Arc;

use anyhow::{Context, Result, bail};
use doppel_memory::{Backing, GuestRam};
use doppel_x86::{Cpu, CpuidModel, FpuArea, Kick, Rflags, Segment};
use kvm_bindings::{
    CpuId, Msrs, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs, kvm_userspace_memory_region, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use super::image::Image;
use super::layout::*;
use super::machine::{self, Dma, Ending, Final, KernelBus};
use crate::watchdog::{WATCH_PERIOD, Watchdog};
use crate::xsave::{Vectors, XsaveLayout};
use doppel_x86::Bus;

/// Leaves of CPUID, and those that have subleaves.
const LEAVES: [(u32, u32); 2] = [(0, 0x1f), (0x8000_0000, 0x8000_0008)];
const WITH_SUBLEAVES: [u32; 3] = [4, 7, 0xd];

/// A machine of KVM's.
pub struct KvmRunner {
    cpu: Box<Cpu>,
    ram: Arc<GuestRam>,
    vcpu: VcpuFd,
    /// Owns the machine that the CPU is of.
    _vm: VmFd,
    bus: KernelBus,
    layout: XsaveLayout,
    watchdog: Watchdog,
}

/// Interrupts the thread that made it, and with it KVM_RUN.
struct Signal(libc::pthread_t);

impl Kick for Signal {
    fn kick(&self) {
        // SAFETY: the thread that makes a runner runs it, and outlives the runner's watchdog or at least its own handle's validity,
        // since the process ends with that thread.
        unsafe { libc::pthread_kill(self.0, libc::SIGUSR1) };
    }
}

extern "C" fn ignore(_: libc::c_int) {}

fn signal_of_this_thread() -> Signal {
    let action = ignore as extern "C" fn(libc::c_int);
    // SAFETY: the handler does nothing. Without SA_RESTART a system call that it interrupts returns.
    unsafe {
        let mut how: libc::sigaction = std::mem::zeroed();
        how.sa_sigaction = action as usize;
        libc::sigaction(libc::SIGUSR1, &how, std::ptr::null_mut());
        Signal(libc::pthread_self())
    }
}

impl KvmRunner {
    /// A machine with one CPU, which shows the same CPUID as the others.
    pub fn new(model: &Arc<CpuidModel>) -> Result<Self> {
        let ram = Arc::new(GuestRam::with_backing(RAM, Backing::Memfd)?);
        let cpu = Cpu::with_model(0, ram.clone(), model.clone());
        let kvm = Kvm::new().context("/dev/kvm")?;
        let vm = kvm.create_vm().context("KVM_CREATE_VM")?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: ram.host_base(),
            flags: 0,
        };
        // SAFETY: the RAM is mapped there for as long as `ram` lives, which the runner keeps longer than the machine.
        unsafe { vm.set_user_memory_region(region) }.context("KVM_SET_USER_MEMORY_REGION")?;
        vm.set_tss_address(0xfffb_d000)
            .context("KVM_SET_TSS_ADDR")?;
        let vcpu = vm.create_vcpu(0).context("KVM_CREATE_VCPU")?;
        vcpu.set_cpuid2(&cpuid(&cpu)?).context("KVM_SET_CPUID2")?;
        Ok(KvmRunner {
            watchdog: Watchdog::with_period(Arc::new(signal_of_this_thread()), WATCH_PERIOD),
            bus: KernelBus::new(ram.clone()),
            layout: XsaveLayout::new(model.xcr0()),
            cpu,
            ram,
            vcpu,
            _vm: vm,
        })
    }

    /// Runs a case. What is not compared is as expected.
    pub fn run(&mut self, image: &Image, dma: &Dma, expected: &Final) -> Result<Final> {
        machine::load(&self.ram, image);
        self.bus.reset(dma);
        machine::reset(&mut self.cpu, image);
        load(&self.vcpu, &self.cpu)?;
        self.watchdog.start();
        let ending = self.run_to_end();
        self.watchdog.stop();
        self.take(ending?, expected)
    }

    fn run_to_end(&mut self) -> Result<Ending> {
        let (mut kicks, mut wakes) = (0, 0);
        loop {
            self.inject()?;
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, data)) => {
                    for chunk in data.chunks(4) {
                        let mut value = [0; 4];
                        value[..chunk.len()].copy_from_slice(chunk);
                        let value = u32::from_le_bytes(value);
                        self.bus.port_write(port, data.len().min(4) as u8, value);
                    }
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let size = data.len().min(4);
                    let value = self.bus.port_read(port, size as u8).to_le_bytes();
                    data[..size].copy_from_slice(&value[..size]);
                }
                Ok(VcpuExit::MmioRead(at, data)) => {
                    let value = self.bus.mmio_read(at, data.len() as u8).to_le_bytes();
                    data.copy_from_slice(&value[..data.len()]);
                }
                Ok(VcpuExit::MmioWrite(at, data)) => {
                    let mut value = [0; 8];
                    value[..data.len()].copy_from_slice(data);
                    let value = u64::from_le_bytes(value);
                    self.bus.mmio_write(at, data.len() as u8, value);
                }
                Ok(VcpuExit::IrqWindowOpen) => {}
                Ok(VcpuExit::Shutdown) => return Ok(Ending::Shutdown),
                Ok(VcpuExit::Hlt) => {
                    store(&self.vcpu, &mut self.cpu)?;
                    self.cpu.activity = doppel_x86::Activity::Halted;
                    if machine::is_finished(&self.cpu) {
                        return Ok(Ending::Finished);
                    }
                    wakes += 1;
                    if wakes > machine::MOST_WAKES || !machine::wake(&self.cpu, &mut self.bus) {
                        return Ok(Ending::Halted);
                    }
                }
                Ok(other) => {
                    let other = format!("{other:?}");
                    store(&self.vcpu, &mut self.cpu)?;
                    bail!(
                        "KVM: {other} at {:#x}, CS {:#x}",
                        self.cpu.rip,
                        self.cpu.seg[1].selector
                    )
                }
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                    kicks += 1;
                    if kicks > 10 {
                        return Ok(Ending::TimedOut);
                    }
                }
                Err(e) => bail!("KVM_RUN: {e}"),
            }
        }
    }

    /// Gives KVM what is pending, or asks for a window.
    fn inject(&mut self) -> Result<()> {
        if self.bus.take_nmi() {
            self.vcpu.nmi().context("KVM_NMI")?;
        }
        let run = self.vcpu.get_kvm_run();
        self.bus.set_cr8(run.cr8);
        let (open, pending) = (
            run.ready_for_interrupt_injection,
            self.bus.interrupt_pending(),
        );
        run.request_interrupt_window = u8::from(pending);
        if !pending || open == 0 || run.if_flag == 0 {
            return Ok(());
        }
        let mut events = self.vcpu.get_vcpu_events()?;
        if events.interrupt.shadow != 0 || events.interrupt.injected != 0 {
            return Ok(());
        }
        if let Some(vector) = self.bus.interrupt_acknowledge() {
            events.interrupt.injected = 1;
            events.interrupt.nr = vector;
            events.flags = 0;
            self.vcpu.set_vcpu_events(&events)?;
            self.vcpu.get_kvm_run().request_interrupt_window = 0;
        }
        Ok(())
    }

    fn take(&mut self, ending: Ending, expected: &Final) -> Result<Final> {
        store(&self.vcpu, &mut self.cpu)?;
        let mut ram = machine::contents(&self.ram);
        take_over_accessed(&mut ram, &expected.ram);
        let known = |name: &str| {
            let found = expected.registers.iter().find(|(n, _)| *n == name);
            found.map(|(_, v)| *v)
        };
        let not_told = ["shadow", "nmi blocked", "active"];
        let registers = machine::registers(&self.cpu).into_iter().map(|(name, v)| {
            let hidden = name.ends_with("attributes") || name.ends_with("limit");
            match not_told.contains(&name) || hidden {
                true => (name, known(name).unwrap_or(v)),
                false => (name, v),
            }
        });
        Ok(Final {
            ending,
            registers: registers.collect(),
            vectors: Vectors::of(&self.cpu.fpu, &self.layout),
            msrs: expected.msrs.clone(),
            noted: expected.noted.clone(),
            instructions: expected.instructions,
            ram: if ram == expected.ram { Vec::new() } else { ram },
        })
    }
}

/// Where page tables differ in nothing but A, A is as expected: KVM sets it when a walk has come to its end, and processors on the way.
fn take_over_accessed(ram: &mut [u8], expected: &[u8]) {
    const A: u8 = 1 << 5;
    for at in TABLES.start as usize..TABLES.end as usize {
        if ram[at] ^ expected[at] == A {
            ram[at] = expected[at];
        }
    }
}

fn cpuid(cpu: &Cpu) -> Result<CpuId> {
    let mut entries = Vec::new();
    for (first, last) in LEAVES {
        for leaf in first..=last {
            let subleaves = if WITH_SUBLEAVES.contains(&leaf) {
                10
            } else {
                1
            };
            for subleaf in 0..subleaves {
                let found = cpu.cpuid(leaf, subleaf);
                entries.push(kvm_cpuid_entry2 {
                    function: leaf,
                    index: subleaf,
                    flags: u32::from(subleaves > 1),
                    eax: found.eax,
                    ebx: found.ebx,
                    ecx: found.ecx,
                    edx: found.edx,
                    ..Default::default()
                });
            }
        }
    }
    CpuId::from_entries(&entries).map_err(|e| anyhow::anyhow!("CPUID: {e:?}"))
}

fn segment(s: &Segment) -> kvm_segment {
    let bit = |n: u32| (s.attributes >> n & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 0xf) as u8,
        s: bit(4),
        dpl: (s.attributes >> 5 & 3) as u8,
        present: bit(7),
        avl: bit(12),
        l: bit(13),
        db: bit(14),
        g: bit(15),
        unusable: bit(16),
        padding: 0,
    }
}

fn load(vcpu: &VcpuFd, cpu: &Cpu) -> Result<()> {
    let g = cpu.gpr;
    vcpu.set_regs(&kvm_regs {
        rax: g[0],
        rcx: g[1],
        rdx: g[2],
        rbx: g[3],
        rsp: g[4],
        rbp: g[5],
        rsi: g[6],
        rdi: g[7],
        r8: g[8],
        r9: g[9],
        r10: g[10],
        r11: g[11],
        r12: g[12],
        r13: g[13],
        r14: g[14],
        r15: g[15],
        rip: cpu.rip,
        rflags: cpu.rflags.bits(),
    })?;
    let [es, cs, ss, ds, fs, gs] = cpu.seg.each_ref().map(segment);
    let table = |base, limit| kvm_dtable {
        base,
        limit,
        ..Default::default()
    };
    let old = vcpu.get_sregs()?;
    vcpu.set_sregs(&kvm_sregs {
        es,
        cs,
        ss,
        ds,
        fs,
        gs,
        ldt: segment(&cpu.ldtr),
        tr: segment(&cpu.tr),
        gdt: table(cpu.gdtr.base, cpu.gdtr.limit),
        idt: table(cpu.idtr.base, cpu.idtr.limit),
        cr0: cpu.cr0.bits(),
        cr2: cpu.cr2,
        cr3: cpu.cr3,
        cr4: cpu.cr4.bits(),
        cr8: 0,
        efer: cpu.efer.bits(),
        apic_base: old.apic_base,
        interrupt_bitmap: [0; 4],
    })
    .context("KVM_SET_SREGS")?;
    vcpu.set_debug_regs(&kvm_debugregs {
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        ..Default::default()
    })?;
    let mut xcrs = kvm_xcrs {
        nr_xcrs: 1,
        ..Default::default()
    };
    xcrs.xcrs[0].value = cpu.xcr0;
    vcpu.set_xcrs(&xcrs).context("KVM_SET_XCRS")?;
    let mut xsave = vcpu.get_xsave()?;
    for (word, bytes) in xsave.region.iter_mut().zip(cpu.fpu.bytes.chunks(4)) {
        *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    }
    // SAFETY: the area has no more components than the host's XCR0, since the guest's model is a part of the host's.
    unsafe { vcpu.set_xsave(&xsave) }.context("KVM_SET_XSAVE")?;
    let m = &cpu.msr;
    let entries = [
        (0xc000_0081, m.star),
        (0xc000_0082, m.lstar),
        (0xc000_0083, m.cstar),
        (0xc000_0084, m.sfmask),
        (0xc000_0102, m.kernel_gs_base),
        (0x174, m.sysenter_cs),
        (0x175, m.sysenter_esp),
        (0x176, m.sysenter_eip),
        (0x277, m.pat),
    ]
    .map(|(index, data)| kvm_msr_entry {
        index,
        data,
        ..Default::default()
    });
    let msrs = Msrs::from_entries(&entries).map_err(|e| anyhow::anyhow!("MSRs: {e:?}"))?;
    let written = vcpu.set_msrs(&msrs)?;
    anyhow::ensure!(
        written == entries.len(),
        "KVM has no MSR {:#x}",
        entries[written].index
    );
    let mut events = vcpu.get_vcpu_events()?;
    events.exception.injected = 0;
    events.interrupt.injected = 0;
    events.interrupt.shadow = 0;
    events.nmi.injected = 0;
    events.nmi.pending = 0;
    events.nmi.masked = 0;
    events.flags =
        kvm_bindings::KVM_VCPUEVENT_VALID_NMI_PENDING | kvm_bindings::KVM_VCPUEVENT_VALID_SHADOW;
    vcpu.set_vcpu_events(&events)
        .context("KVM_SET_VCPU_EVENTS")?;
    Ok(())
}

/// What is compared, into a CPU.
fn store(vcpu: &VcpuFd, cpu: &mut Cpu) -> Result<()> {
    let r = vcpu.get_regs()?;
    cpu.gpr = [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12,
        r.r13, r.r14, r.r15,
    ];
    cpu.rip = r.rip;
    cpu.rflags = Rflags::from_bits_retain(r.rflags);
    let s = vcpu.get_sregs()?;
    let all = [s.es, s.cs, s.ss, s.ds, s.fs, s.gs];
    for (mine, theirs) in cpu.seg.iter_mut().zip(all) {
        (mine.base, mine.limit, mine.selector) = (theirs.base, theirs.limit, theirs.selector);
    }
    cpu.cpl = s.ss.dpl;
    (cpu.ldtr.base, cpu.ldtr.selector) = (s.ldt.base, s.ldt.selector);
    (cpu.tr.base, cpu.tr.selector) = (s.tr.base, s.tr.selector);
    (cpu.gdtr.base, cpu.gdtr.limit) = (s.gdt.base, s.gdt.limit);
    (cpu.idtr.base, cpu.idtr.limit) = (s.idt.base, s.idt.limit);
    cpu.cr0 = doppel_x86::Cr0::from_bits_retain(s.cr0);
    (cpu.cr2, cpu.cr3) = (s.cr2, s.cr3);
    cpu.cr4 = doppel_x86::Cr4::from_bits_retain(s.cr4);
    cpu.efer = doppel_x86::Efer::from_bits_retain(s.efer);
    let d = vcpu.get_debug_regs()?;
    cpu.dr = [d.db[0], d.db[1], d.db[2], d.db[3], 0, 0, d.dr6, d.dr7];
    cpu.xcr0 = vcpu.get_xcrs()?.xcrs[0].value;
    let xsave = vcpu.get_xsave()?;
    cpu.fpu = FpuArea::reset();
    for (bytes, word) in cpu.fpu.bytes.chunks_mut(4).zip(xsave.region) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    Ok(())
}
